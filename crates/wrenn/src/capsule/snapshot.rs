//! `wrenn capsule snapshot`.

use std::process::ExitCode;

use anyhow::Result;
use api::{CapsuleId, CreateSnapshot};
use clap::Args;

use crate::rest::Client;
use crate::terminal::{self, Progress};

/// Makes a template of a capsule and prints its name: what is created from it begins where the capsule is now.
#[derive(Debug, Args)]
pub(super) struct Snapshot {
    /// The capsule; it runs on.
    id: CapsuleId,
    /// What it is called [default: a name that is made up].
    #[arg(long)]
    name: Option<String>,
    /// Replace the template of that name, if there is one.
    #[arg(long, requires = "name")]
    overwrite: bool,
}

impl Snapshot {
    pub(super) async fn run(self, client: &Client, json: bool) -> Result<ExitCode> {
        let progress = Progress::new(json);
        progress.show("making a template");
        let request = CreateSnapshot { sandbox_id: self.id, name: self.name };
        let template = client.snapshot(&request, self.overwrite).await?;
        drop(progress);
        if json {
            terminal::print_json(&template)?;
        } else {
            terminal::print(&template.name)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
