//! `wrenn doctor`: what this host has and lacks, and what to do about it.
//!
//! Each check tries the thing itself where that leaves nothing behind (opens the device, clones a file, runs a guest) and
//! asks about it only where not. It refuses to repair: what it would have to do needs root and an owner's consent.

mod audit;
mod jail;
mod kernel;
mod objects;
mod programs;
mod storage;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use crate::terminal::{self, Paint, Progress, Style};
use crate::vmm_choice::{self, Choice};
pub(crate) use kernel::NEEDED;

/// Says what this host has and lacks for running capsules, and what to do about it.
///
/// Exits with 1 when capsules cannot run here; with --storage, when something that is stored is damaged, lost, or of no use
/// to anyone and will not be removed.
#[derive(Debug, Args)]
pub struct Doctor {
    /// The data directory of `wrenn up`; it need not exist yet.
    #[arg(long, env = "WRENN_DIR", default_value = "/var/lib/wrenn")]
    dir: PathBuf,
    /// Look at what is stored in the data directory instead, also while it is in use. Nothing is changed.
    #[arg(long)]
    storage: bool,
    /// With --storage: look at this object store too.
    #[arg(long, env = "WRENN_OBJECTS", value_name = "URL", value_parser = crate::host::objects)]
    objects: Option<::objects::Config>,
    /// Where the users of VMMs begin, as `wrenn up` and `wrenn agent` are told.
    #[arg(long, env = "WRENN_VMM_USERS", default_value_t = ::agent::VMM_USERS, value_parser = crate::host::vmm_users())]
    vmm_users: u32,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Capsules run, but something is slower, looser or smaller than it could be.
    Warn,
    /// Capsules do not run.
    Fail,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do about it; only where something is to be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    fn warn(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Warn, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn fail(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Fail, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Everything that was found out.
#[derive(Debug, Serialize)]
struct Report {
    /// Whether capsules can run here.
    ready: bool,
    /// The VMM that `wrenn up` would use; absent when there is none.
    vmm: Option<Choice>,
    checks: Vec<Check>,
}

impl Doctor {
    pub(crate) async fn run(self) -> Result<ExitCode> {
        let progress = Progress::new(self.json);
        progress.show("looking");
        if self.storage {
            return audit::run(&self.dir, self.objects.as_ref(), self.json, progress).await;
        }
        let report = self.examine().await?;
        drop(progress);
        if self.json {
            terminal::print_json(&report)?
        } else {
            report.print()?
        }
        Ok(if report.ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn examine(&self) -> Result<Report> {
        let found = vmm_choice::find().await?;
        let choice = vmm_choice::decide(&found);
        let mut checks = programs::checks(&found, &choice);
        checks.extend(kernel::checks());
        checks.extend(jail::checks(self.vmm_users).await);
        checks.extend(storage::checks(&self.dir));
        let ready = checks.iter().all(|check| check.verdict != Verdict::Fail);
        Ok(Report { ready, vmm: choice.ok(), checks })
    }
}

impl Report {
    fn print(&self) -> std::io::Result<()> {
        let paint = Paint::stdout();
        let wide = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        for check in &self.checks {
            let verdict = match check.verdict {
                Verdict::Ok => paint.paint(Style::Green, "ok  "),
                Verdict::Warn => paint.paint(Style::Yellow, "warn"),
                Verdict::Fail => paint.paint(Style::Red, "fail"),
            };
            terminal::print(&format!("{verdict}  {:<wide$}  {}", check.name, check.found))?;
            if let Some(remedy) = &check.remedy {
                terminal::print(&format!("      {:<wide$}  {}", "", paint.paint(Style::Dim, &format!("→ {remedy}"))))?;
            }
        }
        terminal::print("")?;
        let verdict =
            if self.ready { "Capsules can run here." } else { "Capsules cannot run here until what fails is mended." };
        terminal::print(&paint.paint(Style::Bold, verdict))?;
        if let Some(choice) = &self.vmm { terminal::print(&choice.sentence) } else { Ok(()) }
    }
}
