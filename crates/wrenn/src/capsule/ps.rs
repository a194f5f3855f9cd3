//! `wrenn capsule ps`.

use std::process::ExitCode;

use anyhow::Result;
use api::CapsuleId;
use clap::Args;

use crate::rest::Client;
use crate::terminal::{self, Paint, Style};

/// Lists the processes that were started in a capsule and still run.
#[derive(Debug, Args)]
pub(super) struct Ps {
    /// The capsule.
    id: CapsuleId,
    /// Print process ids only.
    #[arg(short, long)]
    quiet: bool,
}

impl Ps {
    pub(super) async fn run(self, client: &Client, json: bool) -> Result<ExitCode> {
        let processes = client.processes(self.id).await?.processes;
        if json {
            terminal::print_json(&processes)?;
            return Ok(ExitCode::SUCCESS);
        }
        if self.quiet {
            for process in &processes {
                terminal::print(&process.pid.to_string())?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        let tag = |process: &api::Process| process.tag.clone().unwrap_or_else(|| "-".to_owned());
        let wide = processes.iter().map(|process| tag(process).len()).max().unwrap_or(0).max("TAG".len());
        terminal::print(&Paint::stdout().paint(Style::Bold, &format!("{:>7}  {:<wide$}  COMMAND", "PID", "TAG")))?;
        for process in &processes {
            let words = [&process.cmd].into_iter().chain(&process.args);
            // As it would be typed; a line break in an argument must not break the table.
            let command = words.map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
            terminal::print(&format!("{:>7}  {:<wide$}  {command}", process.pid, tag(process)))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "_-./=:,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    if word.chars().any(char::is_control) {
        return format!("$'{}'", word.escape_default());
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_would_need_it() {
        for (word, shown) in
            [("ls", "ls"), ("", "''"), ("a b", "'a b'"), ("it's", r"'it'\''s'"), ("a\nb", r"$'a\nb'"), ("é", "é")]
        {
            assert_eq!(quoted(word), shown);
        }
    }
}
