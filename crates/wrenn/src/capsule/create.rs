//! `wrenn capsule create`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use api::{Capsule, CreateCapsule, Network, Status};
use clap::Args;

use super::network::Egress;
use crate::rest::Client;
use crate::terminal::{self, Progress};

/// Pause between two looks at a capsule that is starting.
const LOOK_PAUSE: Duration = Duration::from_millis(200);
/// How long a capsule may take to run before its creation counts as failed.
const START_LIMIT: Duration = Duration::from_secs(180);

/// Creates a capsule and prints its id once it runs.
#[derive(Debug, Args)]
pub(super) struct Create {
    /// What it is made from [default: minimal].
    #[arg(long)]
    template: Option<String>,
    /// Virtual processors [default: 1, or the template's own].
    #[arg(long)]
    vcpus: Option<i64>,
    /// Memory in MiB [default: 512, or the template's own].
    #[arg(long, value_name = "MIB")]
    memory: Option<i64>,
    /// Most its root disk may grow to, in MiB [default: 5120, or the template's own].
    #[arg(long, value_name = "MIB")]
    disk: Option<i64>,
    /// Seconds without use after which its host pauses it; 0 means never [default: 0].
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<i64>,
    /// A label; may be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = super::pair)]
    label: Vec<(String, String)>,
    /// Have a request to one of its URLs wake it when it is paused.
    #[arg(long)]
    auto_resume: bool,
    /// Have its URLs want a token, which is printed after the id.
    #[arg(long)]
    private: bool,
    #[command(flatten)]
    egress: Egress,
    /// Do not wait until it runs.
    #[arg(long)]
    no_wait: bool,
}

impl Create {
    pub(super) async fn run(self, client: &Client, json: bool) -> Result<ExitCode> {
        let egress = self.egress.asked();
        let has_network = self.private || egress.allow_out.is_some() || egress.deny_out.is_some();
        let request = CreateCapsule {
            template: self.template,
            vcpus: self.vcpus,
            memory_mb: self.memory,
            disk_size_mb: self.disk,
            timeout_sec: self.timeout,
            metadata: (!self.label.is_empty()).then(|| self.label.into_iter().collect()),
            auto_resume: self.auto_resume.then_some(true),
            allow_internet_access: egress.allow_internet_access,
            network: has_network.then_some(Network {
                allow_public_traffic: self.private.then_some(false),
                allow_out: egress.allow_out,
                deny_out: egress.deny_out,
            }),
        };
        let progress = Progress::new(json);
        progress.show("creating");
        let mut capsule = client.create(&request).await?;
        // Told once, so that a later look does not have it.
        let token = capsule.traffic_access_token.take();
        if !self.no_wait {
            progress.show(&format!("starting {}", capsule.id));
            capsule = running(client, capsule).await?;
        }
        drop(progress);
        capsule.traffic_access_token = token;
        if json {
            terminal::print_json(&capsule)?;
        } else {
            terminal::print(&capsule.id.to_string())?;
            if let Some(token) = capsule.traffic_access_token {
                terminal::print(&token)?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Waits until it runs, or has come to an end that leads there no more.
async fn running(client: &Client, mut capsule: Capsule) -> Result<Capsule> {
    let wait = async {
        loop {
            match capsule.status {
                Status::Running => return Ok(capsule),
                Status::Error | Status::Stopping | Status::Stopped | Status::Missing => {
                    let reason = capsule.reason.unwrap_or_else(|| format!("it is {:?}", capsule.status).to_lowercase());
                    bail!("{} did not start: {reason}", capsule.id);
                }
                Status::Pending
                | Status::Starting
                | Status::Pausing
                | Status::Paused
                | Status::Snapshotting
                | Status::Resuming
                | Status::Hibernated => tokio::time::sleep(LOOK_PAUSE).await,
            }
            capsule = client.get(capsule.id).await?;
        }
    };
    match tokio::time::timeout(START_LIMIT, wait).await {
        Ok(result) => result,
        Err(_) => bail!("the capsule did not run within {} seconds", START_LIMIT.as_secs()),
    }
}
