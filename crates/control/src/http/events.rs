//! `/v1/events/stream`: what happens to a team's capsules, as server-sent events.
//!
//! Clients read events by lines, and some take U+2028 and its like for the end of one: everything that is not ASCII is escaped.
//! They end the stream at names they do not know, so what keeps it alive is a comment.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use api::{Event, EventName};
use axum::extract::State;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter};
use tokio::sync::broadcast::error::RecvError;

use super::App;
use super::answers::OfTeam;
use super::caller::Caller;
use crate::db;

/// How often a quiet stream says that it lives.
const ALIVE: Duration = Duration::from_secs(15);

/// Follow what happens
///
/// Server-sent events of the team's capsules, from now on: `connected` first, then `capsule.create`, `capsule.destroy` and
/// `capsule.state.changed`. Nothing that happened before or between two streams is told. A client that falls 1024 events behind
/// finds the stream ended.
#[utoipa::path(
    get, path = "/v1/events/stream", tag = "events", operation_id = "events",
    responses((status = 200, description = "Events", body = Event, content_type = "text/event-stream"), OfTeam)
)]
pub async fn stream(caller: Caller, State(app): State<App>) -> Response {
    let events = Sse::new(events(&app, caller)).keep_alive(KeepAlive::new().interval(ALIVE).text("keepalive"));
    // A proxy in front must not collect them.
    ([("x-accel-buffering", "no")], events).into_response()
}

fn events(app: &App, Caller { team, .. }: Caller) -> impl Stream<Item = Result<sse::Event, Infallible>> + use<> {
    let listener = app.ctx.events.listen_any_team();
    let connected = Event {
        event: EventName::Connected,
        timestamp: db::now(),
        outcome: None,
        resource: None,
        actor: None,
        metadata: Default::default(),
        error: None,
        sandbox: None,
    };
    let happens = futures::stream::unfold(listener, move |mut listener| async move {
        loop {
            match listener.recv().await {
                Ok((of, event)) if of == team => return Some((event, listener)),
                Ok(_) => {}
                // Who reads slowly must not take what it got for everything.
                Err(RecvError::Lagged(_) | RecvError::Closed) => return None,
            }
        }
    });
    let all = futures::stream::once(async { connected }).chain(happens);
    all.map(|event| Ok(frame(&event))).take_until(app.ctx.stop.clone().cancelled_owned())
}

fn frame(event: &Event) -> sse::Event {
    let mut json = Vec::new();
    event.serialize(&mut serde_json::Serializer::with_formatter(&mut json, Ascii)).expect("an event is plain data");
    let json = String::from_utf8(json).expect("it is ASCII");
    sse::Event::default().event(event.event.as_str()).data(json)
}

/// JSON without a byte above 127.
struct Ascii;

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        for part in fragment.split_inclusive(|c: char| !c.is_ascii()) {
            let ascii = part.trim_end_matches(|c: char| !c.is_ascii());
            CompactFormatter.write_string_fragment(writer, ascii)?;
            for unit in part[ascii.len()..].encode_utf16() {
                write!(writer, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_break_there_is_stays_inside_its_event() {
        let text = "é\u{2028}\u{85}\u{b}\u{c}\u{1c}🦀\n\"a";
        let mut json = Vec::new();
        text.serialize(&mut serde_json::Serializer::with_formatter(&mut json, Ascii)).unwrap();
        let json = String::from_utf8(json).unwrap();
        assert_eq!(json, r#""\u00e9\u2028\u0085\u000b\f\u001c\ud83e\udd80\n\"a""#);
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
    }
}
