//! `wrenn capsule list`.

use std::process::ExitCode;

use anyhow::Result;
use api::{Capsule, Status};
use clap::Args;

use crate::rest::Client;
use crate::terminal::{self, Paint, Style};

/// Lists capsules.
#[derive(Debug, Args)]
#[command(visible_alias = "ls")]
pub(super) struct List {
    /// Print ids only.
    #[arg(short, long)]
    quiet: bool,
}

impl List {
    pub(super) async fn run(self, client: &Client, json: bool) -> Result<ExitCode> {
        let capsules = client.list().await?;
        if json {
            terminal::print_json(&capsules)?;
        } else if self.quiet {
            for capsule in &capsules {
                terminal::print(&capsule.id.to_string())?;
            }
        } else {
            print_table(&capsules)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print_table(capsules: &[Capsule]) -> std::io::Result<()> {
    let paint = Paint::stdout();
    let wide = capsules.iter().map(|capsule| capsule.template.len()).max().unwrap_or(0).max("TEMPLATE".len());
    let header =
        format!("{:<28}  {:<12}  {:<wide$}  {:>5}  {:>8}  CREATED", "ID", "STATUS", "TEMPLATE", "VCPUS", "MEMORY");
    terminal::print(&paint.paint(Style::Bold, &header))?;
    for capsule in capsules {
        // Padded before it is painted, because colours have no width on a terminal but do in a format.
        let status = format!("{:<12}", status_word(capsule.status));
        terminal::print(&format!(
            "{}  {}  {:<wide$}  {:>5}  {:>4} MiB  {}",
            capsule.id,
            paint.paint(style_of(capsule.status), &status),
            capsule.template,
            capsule.vcpus,
            capsule.memory_mb,
            capsule.created_at.to_rfc3339(),
        ))?;
    }
    Ok(())
}

/// The word the API uses for it.
fn status_word(status: Status) -> String {
    format!("{status:?}").to_lowercase()
}

fn style_of(status: Status) -> Style {
    match status {
        Status::Running => Style::Green,
        Status::Error | Status::Missing => Style::Red,
        Status::Pending
        | Status::Starting
        | Status::Pausing
        | Status::Snapshotting
        | Status::Resuming
        | Status::Stopping => Style::Yellow,
        Status::Paused | Status::Hibernated | Status::Stopped => Style::Dim,
    }
}
