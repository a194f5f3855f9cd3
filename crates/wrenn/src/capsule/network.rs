//! `wrenn capsule network`.

use std::process::ExitCode;

use anyhow::Result;
use api::{CapsuleId, SetEgress};
use clap::Args;

use crate::rest::Client;
use crate::terminal;

/// Shows what a capsule may reach outside, or changes it at once: what is not allowed any more is cut.
#[derive(Debug, Args)]
pub(super) struct Network {
    /// The capsule.
    id: CapsuleId,
    #[command(flatten)]
    egress: Egress,
    /// Let it reach everything that its host lets capsules reach.
    #[arg(long, conflicts_with_all = ["no_internet", "allow_out", "deny_out"])]
    open: bool,
}

/// What a capsule may reach outside; all of it is said at once.
#[derive(Debug, Args)]
pub(super) struct Egress {
    /// Let it reach nothing outside but what --allow-out says.
    #[arg(long)]
    no_internet: bool,
    /// An IPv4 address, a network or a name (example.com, *.example.com) that it may reach although --deny-out says otherwise;
    /// may be repeated. Names need --no-internet.
    #[arg(long, value_name = "CIDR|NAME", value_delimiter = ',')]
    allow_out: Vec<String>,
    /// An IPv4 address or a network that it may not reach; may be repeated.
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    deny_out: Vec<String>,
}

impl Egress {
    /// What the API is asked; nothing of what was not said.
    pub(super) fn asked(self) -> SetEgress {
        let list = |entries: Vec<String>| (!entries.is_empty()).then_some(entries);
        SetEgress {
            allow_internet_access: self.no_internet.then_some(false),
            allow_out: list(self.allow_out),
            deny_out: list(self.deny_out),
        }
    }
}

impl Network {
    pub(super) async fn run(self, client: &Client, json: bool) -> Result<ExitCode> {
        let asked = self.egress.asked();
        let network = if self.open || asked != SetEgress::default() {
            client.set_network(self.id, &asked).await?
        } else {
            client.get(self.id).await?.network
        };
        if json {
            terminal::print_json(&network)?;
        } else {
            for (word, entries) in [("allow", &network.allow_out), ("deny", &network.deny_out)] {
                for entry in entries {
                    terminal::print(&format!("{word} {entry}"))?;
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
