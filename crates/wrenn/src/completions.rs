//! `wrenn completions`: what a shell needs to complete this command's words.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::{Generator, Shell};

/// Prints a completion script: for bash, `source <(wrenn completions bash)`.
#[derive(Debug, Args)]
pub struct Completions {
    shell: Known,
}

/// The shells whose scripts are tested.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Known {
    Bash,
    Zsh,
    Fish,
}

impl Completions {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let shell = match self.shell {
            Known::Bash => Shell::Bash,
            Known::Zsh => Shell::Zsh,
            Known::Fish => Shell::Fish,
        };
        let mut command = crate::Wrenn::command();
        command.set_bin_name("wrenn");
        command.build();
        // The generator panics when its output fails, so it gets one that cannot.
        let mut script = Vec::new();
        shell.generate(&command, &mut script);
        io::stdout().lock().write_all(&script)?;
        Ok(ExitCode::SUCCESS)
    }
}
