//! `wrenn capsule pause`, `hibernate` and `resume`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use api::{Capsule, CapsuleId, Status};
use clap::Args;

use crate::rest::Client;
use crate::terminal::{self, Progress};

/// Pause between two looks at a capsule that is on its way.
const LOOK_PAUSE: Duration = Duration::from_millis(200);
/// How long it may be on its way.
const LIMIT: Duration = Duration::from_secs(300);

/// Puts capsules aside: their memory, processes and files wait on disk.
#[derive(Debug, Args)]
pub(super) struct Pause {
    /// The capsules.
    #[arg(required = true)]
    ids: Vec<CapsuleId>,
}

/// Moves paused capsules to the object store, so that they take nothing of their host.
#[derive(Debug, Args)]
pub(super) struct Hibernate {
    /// The capsules.
    #[arg(required = true)]
    ids: Vec<CapsuleId>,
}

/// Lets paused capsules go on where they were, and those that hibernate.
#[derive(Debug, Args)]
pub(super) struct Resume {
    /// The capsules.
    #[arg(required = true)]
    ids: Vec<CapsuleId>,
}

impl Pause {
    pub(super) async fn run(self, client: &Client, json: bool) -> Result<ExitCode> {
        let pause = async |id| reach(client, client.pause(id).await?, Status::Paused).await;
        each(self.ids, json, "pausing", "pause", pause).await
    }
}

impl Hibernate {
    pub(super) async fn run(self, client: &Client, json: bool) -> Result<ExitCode> {
        let hibernate = async |id| {
            let mut capsule = client.hibernate(id).await?;
            // It is paused until the upload is done.
            let way = async {
                while capsule.status == Status::Paused {
                    tokio::time::sleep(LOOK_PAUSE).await;
                    capsule = client.get(id).await?;
                }
                reach(client, capsule, Status::Hibernated).await
            };
            match tokio::time::timeout(LIMIT, way).await {
                Ok(result) => result,
                Err(_) => bail!("it took longer than {} seconds", LIMIT.as_secs()),
            }
        };
        each(self.ids, json, "uploading", "hibernate", hibernate).await
    }
}

impl Resume {
    pub(super) async fn run(self, client: &Client, json: bool) -> Result<ExitCode> {
        let resume = async |id| reach(client, client.resume(id).await?, Status::Running).await;
        each(self.ids, json, "resuming", "resume", resume).await
    }
}

/// Does it to one after the other; one that fails does not keep the others from it.
async fn each(
    ids: Vec<CapsuleId>,
    json: bool,
    doing: &str,
    verb: &str,
    act: impl AsyncFn(CapsuleId) -> Result<Capsule>,
) -> Result<ExitCode> {
    let (mut done, mut code) = (Vec::new(), ExitCode::SUCCESS);
    for id in ids {
        let progress = Progress::new(json);
        progress.show(&format!("{doing} {id}"));
        let acted = act(id).await.with_context(|| format!("cannot {verb} {id}"));
        drop(progress);
        match acted {
            Ok(capsule) if json => done.push(capsule),
            Ok(capsule) => terminal::print(&capsule.id.to_string())?,
            Err(error) => {
                terminal::error(&error);
                code = ExitCode::FAILURE;
            }
        }
    }
    if json {
        terminal::print_json(&done)?;
    }
    Ok(code)
}

/// Waits until the capsule is what it is on its way to.
async fn reach(client: &Client, mut capsule: Capsule, wanted: Status) -> Result<Capsule> {
    let way = async {
        loop {
            match capsule.status {
                status if status == wanted => return Ok(capsule),
                Status::Pausing | Status::Resuming => tokio::time::sleep(LOOK_PAUSE).await,
                status => {
                    let reason = capsule.reason.unwrap_or_else(|| format!("it is {status:?}").to_lowercase());
                    bail!("{reason}");
                }
            }
            capsule = client.get(capsule.id).await?;
        }
    };
    match tokio::time::timeout(LIMIT, way).await {
        Ok(result) => result,
        Err(_) => bail!("it took longer than {} seconds", LIMIT.as_secs()),
    }
}
