//! The inside of a capsule: reached through its host, once it can be used.

use std::sync::Arc;

use agent_api::{GuestFiles, GuestProcesses, REFUSAL_HEADER};
use api::{CapsuleId, Status};
use connectrpc::client::ClientBody;
use connectrpc::{ConnectError, ErrorCode};
use hyper::body::Incoming;
use hyper::{Request, Response};
use lifecycle::Command;
use tokio::time::Instant;

use super::{Context, Error, usable};
use crate::db::capsule::Capsule;

/// A capsule that can be used. Clones reach the same one.
#[derive(Clone)]
pub struct Guest {
    ctx: Arc<Context>,
    pub id: CapsuleId,
}

/// Goes into the capsule, which may still be starting: it is waited for until `until`.
pub async fn enter(ctx: &Arc<Context>, capsule: Capsule, until: Instant) -> Result<Guest, Error> {
    let capsule = usable::usable(ctx, capsule, Command::Exec, until).await?;
    Ok(Guest { ctx: ctx.clone(), id: capsule.id })
}

impl Guest {
    pub fn processes(&self) -> GuestProcesses {
        self.ctx.host.processes(self.id)
    }

    pub fn files(&self) -> GuestFiles {
        self.ctx.host.files(self.id)
    }

    /// A plain HTTP request to the guest's envd, under the path and query it has.
    pub async fn send(&self, request: Request<ClientBody>) -> Result<Response<Incoming>, Error> {
        self.ctx.host.send_to_guest(self.id, request).await.map_err(|error| self.failed(error))
    }

    /// What it means that a call did not come to its end. What looks as if the capsule were no more is looked into.
    pub fn failed(&self, error: ConnectError) -> Error {
        let error = match error.code {
            ErrorCode::NotFound if refused_by_host(&error) => Error::Gone,
            // By itself, as it was idle: the row will say so in a moment.
            ErrorCode::FailedPrecondition if refused_by_host(&error) => Error::State(Status::Paused),
            ErrorCode::ResourceExhausted if refused_by_host(&error) => Error::Busy,
            // Only an error of the way to the host has a source; others came back from it.
            ErrorCode::Unavailable if error.source_arc().is_some() => Error::Host(error.into()),
            _ => Error::Guest(error),
        };
        if matches!(error, Error::Gone | Error::State(_) | Error::Guest(_)) {
            self.ctx.nudge.notify_one();
        }
        error
    }
}

/// Whether the guest was not even asked.
pub fn refused_by_host(error: &ConnectError) -> bool {
    error.response_headers().contains_key(REFUSAL_HEADER)
}
