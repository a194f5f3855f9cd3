//! What a capsule uses, as its guest sees it.

use api::Point;
use connectrpc::client::full_body;
use http_body_util::{BodyExt, Limited};
use hyper::Request;
use serde::Deserialize;

use super::Error;
use super::guest::Guest;

/// An answer is a few hundred bytes.
const ANSWER_LIMIT: usize = 64 << 10;

/// What we want of envd's answer to `GET /metrics`.
#[derive(Deserialize)]
struct Values {
    ts: i64,
    cpu_used_pct: f64,
    mem_used: u64,
    disk_used: u64,
}

/// Reads what the capsule uses now.
pub async fn now(guest: &Guest) -> Result<Point, Error> {
    let request = Request::get("/metrics").body(full_body(Default::default())).expect("the parts are constants");
    let response = guest.send(request).await?;
    let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await;
    let body = body.map_err(|_| Error::GuestAnswer("metrics that break off"))?.to_bytes();
    let values: Values = serde_json::from_slice(&body).map_err(|_| Error::GuestAnswer("other metrics"))?;
    Ok(Point {
        timestamp_unix: values.ts,
        cpu_pct: values.cpu_used_pct,
        mem_bytes: values.mem_used,
        disk_bytes: values.disk_used,
    })
}
