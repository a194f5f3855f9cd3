//! `wrenn capsule fork`.

use std::process::ExitCode;

use anyhow::Result;
use api::{CapsuleId, ForkCapsule};
use clap::Args;

use crate::rest::Client;
use crate::terminal::{self, Progress};

/// Makes capsules that begin where another is now, and prints their ids once all run. If one cannot start, none is kept.
#[derive(Debug, Args)]
pub(super) struct Fork {
    /// The capsule; it runs on.
    id: CapsuleId,
    /// How many.
    #[arg(long, default_value_t = 1)]
    count: i64,
    /// A label of each; may be repeated [default: those of the capsule].
    #[arg(long, value_name = "NAME=VALUE", value_parser = super::pair)]
    label: Vec<(String, String)>,
}

impl Fork {
    pub(super) async fn run(self, client: &Client, json: bool) -> Result<ExitCode> {
        let metadata = (!self.label.is_empty()).then(|| self.label.into_iter().collect());
        let progress = Progress::new(json);
        progress.show("forking");
        let forks = client.fork(self.id, &ForkCapsule { count: Some(self.count), metadata }).await?;
        drop(progress);
        if json {
            terminal::print_json(&forks)?;
        } else {
            for fork in forks {
                terminal::print(&fork.id.to_string())?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
