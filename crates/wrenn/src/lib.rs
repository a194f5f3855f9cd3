//! The `wrenn` command: its words, one module per command, and what they share.
//!
//! A command parses, asks the part of Wrenn that does the work, and says what came of it: for people on a terminal, as
//! JSON with `--json`. It refuses to do the work itself.

pub mod agent;
pub mod capsule;
pub mod completions;
pub mod control;
pub mod current;
pub mod doctor;
pub mod host;
pub mod images;
pub mod pager;
pub mod rest;
pub mod template;
pub mod terminal;
pub mod up;
pub mod vmm_choice;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use tokio::runtime::Runtime;

/// Runs untrusted code in microVMs.
#[derive(Debug, Parser)]
#[command(name = "wrenn", version, about, propagate_version = true, disable_help_subcommand = true)]
pub struct Wrenn {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(up::Up),
    Agent(agent::AgentCommand),
    Control(control::ControlCommand),
    Capsule(capsule::CapsuleCommand),
    Template(template::TemplateCommand),
    Doctor(doctor::Doctor),
    #[command(hide = true)]
    Pager(pager::PagerCommand),
    Completions(completions::Completions),
}

impl Wrenn {
    /// Runs the command, tells what went wrong on standard error, and gives the code to exit with.
    pub fn run(self) -> ExitCode {
        let result = match self.command {
            Command::Up(command) => in_runtime(command.run()),
            Command::Agent(command) => in_runtime(command.run()),
            Command::Control(command) => in_runtime(command.run()),
            Command::Capsule(command) => in_runtime(command.run()),
            Command::Template(command) => in_runtime(command.run()),
            Command::Doctor(command) => in_runtime(command.run()),
            Command::Completions(command) => command.run(),
            // One runs beside every resumed capsule, with no more threads than it needs.
            Command::Pager(command) => command.run(),
        };
        result.unwrap_or_else(|error| {
            terminal::error(&error);
            ExitCode::FAILURE
        })
    }
}

fn in_runtime(command: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    Runtime::new().context("starting the runtime")?.block_on(command)
}

/// A program that was installed in the same directory as this one.
pub fn beside(name: &str) -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?.parent()?.join(name);
    path.is_file().then_some(path)
}
