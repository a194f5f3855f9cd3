//! `wrenn capsule rm`.

use std::process::ExitCode;

use anyhow::{Context, Result};
use api::CapsuleId;
use clap::Args;

use crate::rest::Client;
use crate::terminal;

/// Removes capsules and all that is in them. Removing one twice is no error.
#[derive(Debug, Args)]
pub(super) struct Rm {
    /// The capsules.
    #[arg(required = true)]
    ids: Vec<CapsuleId>,
}

impl Rm {
    pub(super) async fn run(self, client: &Client, json: bool) -> Result<ExitCode> {
        let mut removed = Vec::new();
        let mut code = ExitCode::SUCCESS;
        for id in self.ids {
            match client.destroy(id).await.with_context(|| format!("cannot remove {id}")) {
                Ok(()) => removed.push(id),
                Err(error) => {
                    terminal::error(&error);
                    code = ExitCode::FAILURE;
                }
            }
        }
        if json {
            terminal::print_json(&removed)?;
        } else {
            for id in removed {
                terminal::print(&id.to_string())?;
            }
        }
        Ok(code)
    }
}
