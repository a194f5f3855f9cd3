//! `/v1/capsules/{id}/ports/{port}/tcp`

use agent_api::port::{PortRefusal, TCP, tcp_path};
use api::ErrorCode;
use axum::body::Body;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::{CONNECTION, UPGRADE};
use axum::response::Response;
use hyper::upgrade::OnUpgrade;
use proxy::{Answer, boxed};

use super::App;
use super::answers::{InCapsule, OfGuest};
use super::caller::{Guest, parameter};
use super::error::Error;

/// Connect to a port of a capsule
///
/// The request asks to be upgraded to `tcp`; from the answer 101 on it is a connection to what listens on the port. A capsule
/// that is starting is waited for.
#[utoipa::path(
    get, path = "/v1/capsules/{id}/ports/{port}/tcp", tag = "capsules", operation_id = "connectToPort",
    params(InCapsule, ("port" = u16, Path, description = "1 to 65535, but not envd's 49983")),
    responses((status = 101, description = "From here on, bytes"), OfGuest)
)]
pub async fn connect(State(app): State<App>, request: Request) -> Result<Response, Error> {
    let (mut parts, _) = request.into_parts();
    let port = parameter(&mut parts, &app, "port").await?;
    let port: u16 =
        port.parse().map_err(|_| Error::new(ErrorCode::InvalidRequest, "port must be a number from 1 to 65535"))?;
    let asks = parts.headers.get(UPGRADE).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(TCP.as_bytes()));
    let client = parts.extensions.remove::<OnUpgrade>().filter(|_| asks);
    let client =
        client.ok_or_else(|| Error::new(ErrorCode::InvalidRequest, "the request must ask to be upgraded to tcp"))?;
    let Guest(guest) = Guest::from_request_parts(&mut parts, &app).await?;
    proxy::aside(&parts.extensions).await;
    let request = Request::get(tcp_path(guest.id, port)).header(CONNECTION, "upgrade").header(UPGRADE, TCP);
    let request = request.extension(client).body(boxed(Body::empty())).expect("the parts are an id and a number");
    let unreachable = || Error::new(ErrorCode::HostUnavailable, "the host does not answer");
    match app.ctx.host.ports().exchange(request).await {
        Ok(Answer::Upgraded(response, tunnel)) => {
            let stop = app.ctx.stop.clone();
            tokio::spawn(async move {
                tokio::select! {
                    // How it ended its ends know.
                    _ = tunnel.carry(|| ()) => {}
                    () = stop.cancelled() => {}
                }
            });
            Ok(response.map(Body::new))
        }
        Ok(Answer::Whole(response)) => {
            let refusal = PortRefusal::of(response.headers()).ok_or_else(unreachable)?;
            app.ctx.nudge.notify_one();
            Err(refused(refusal, port))
        }
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "the host does not carry a connection");
            Err(unreachable())
        }
    }
}

fn refused(refusal: PortRefusal, port: u16) -> Error {
    match refusal {
        PortRefusal::Closed | PortRefusal::NoAnswer => {
            Error::new(ErrorCode::InvalidState, format!("nothing listens on port {port}"))
        }
        PortRefusal::Absent | PortRefusal::Paused => Error::new(ErrorCode::InvalidState, "the capsule does not run"),
        PortRefusal::Forbidden => Error::new(ErrorCode::Forbidden, format!("port {port} steers the capsule")),
        PortRefusal::Busy => Error::new(ErrorCode::HostUnavailable, "the capsule has too many connections"),
        PortRefusal::Malformed => Error::new(ErrorCode::InvalidRequest, "this is not a port"),
    }
}
