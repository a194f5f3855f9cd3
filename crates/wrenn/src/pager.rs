//! `wrenn pager`: the page server of one resumed capsule, started by the agent and not by people.

mod remote;

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use pager::Ended;

use crate::terminal;

/// Serves the memory of one resumed microVM until it is all there, the VMM is gone, or SIGTERM. Says `ready` on standard
/// output when the VMM can connect, and at the end which of the three it was: `whole`, `vmm gone` or `stopped`. Exits with
/// 0, or when the microVM has to be ended: with 10 if the snapshot is damaged, 11 if the host failed, 12 if the VMM
/// misbehaved, 13 if memory that was needed did not come from the object store. All of that memory is fetched sooner or
/// later: then it says `fetched`, or `incomplete` if some cannot be had.
#[derive(Debug, Args)]
pub struct PagerCommand {
    /// Where to listen for the VMM.
    #[arg(long)]
    socket: PathBuf,
    /// The snapshot's header.
    #[arg(long)]
    header: PathBuf,
    /// The directory of the snapshot's generations.
    #[arg(long)]
    generations: PathBuf,
    /// The object store that has what is not in the generations yet. Its credentials are in the environment, as AWS_*.
    #[arg(long, requires = "to_come")]
    objects: Option<String>,
    /// What is not there yet: a manifest of files beside it.
    #[arg(long, requires = "objects")]
    to_come: Option<PathBuf>,
    /// How long a guest may wait for a page while the object store is out of reach.
    #[arg(long, default_value_t = 60)]
    fetch_seconds: u64,
    /// The user that the VMM runs as; nobody else may connect.
    #[arg(long)]
    vmm_uid: Option<u32>,
    /// A recorded working set to fetch before it is asked for.
    #[arg(long)]
    prefetch: Option<PathBuf>,
    /// Where to record the working set of this resume.
    #[arg(long)]
    record: Option<PathBuf>,
    /// For how long to record.
    #[arg(long, default_value_t = 3)]
    record_seconds: u64,
    /// How long the VMM may take to connect, and then to hand its memory over.
    #[arg(long, default_value_t = 60)]
    patience_seconds: u64,
}

impl PagerCommand {
    /// Runs on this thread and those of the pager, without a runtime: there is one such process per resumed capsule.
    pub(crate) fn run(self) -> Result<ExitCode> {
        match self.serve() {
            Ok(ended) => {
                say(match ended {
                    Ended::Whole => "whole",
                    Ended::VmmGone => "vmm gone",
                    Ended::Stopped => "stopped",
                });
                Ok(ExitCode::SUCCESS)
            }
            Err(error) => {
                let code = error.downcast_ref::<pager::Error>().map(pager::Error::exit_code);
                terminal::error(&error);
                Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
            }
        }
    }

    fn serve(self) -> Result<Ended> {
        // Before there are threads, so that none of them takes the signal.
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGTERM);
        signals.thread_block().context("blocking SIGTERM")?;
        let stop = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).context("listening for SIGTERM")?;
        let remote = match (&self.objects, &self.to_come) {
            (Some(address), Some(to_come)) => {
                Some(remote::open(address, to_come, Duration::from_secs(self.fetch_seconds))?)
            }
            _ => None,
        };
        let pager = pager::Pager::listen(pager::Config {
            socket: self.socket,
            header: self.header,
            generations: self.generations,
            vmm_uid: self.vmm_uid,
            prefetch: self.prefetch,
            record: self.record,
            record_for: Duration::from_secs(self.record_seconds),
            patience: Duration::from_secs(self.patience_seconds),
        })?;
        let Some(remote) = remote else {
            say("ready");
            return Ok(pager.serve(stop.as_fd())?);
        };
        let pager = pager.with_fetch(remote.clone());
        say("ready");
        let fill = std::thread::spawn(move || match remote.fill() {
            Ok(()) => say("fetched"),
            Err(error) => {
                terminal::error(&error.into());
                say("incomplete");
            }
        });
        let ended = pager.serve(stop.as_fd())?;
        if ended == Ended::Whole {
            // The microVM has no more need of it, but the next pause builds on it.
            let _ = fill.join();
        }
        Ok(ended)
    }
}

/// Tells the agent, which may have gone meanwhile: that does not concern the VMM.
fn say(word: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{word}").and_then(|()| out.flush());
}
