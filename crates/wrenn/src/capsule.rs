//! `wrenn capsule`: capsules over the REST API.

mod cp;
mod create;
mod exec;
mod follow;
mod fork;
mod kill;
mod list;
mod logs;
mod network;
mod pause;
mod port_forward;
mod ps;
mod rm;
mod shell;
mod snapshot;
mod stats;
mod stdio;
mod url;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::rest::Server;

/// Creates, lists, uses and removes capsules.
#[derive(Debug, Args)]
#[command(visible_alias = "capsules")]
pub struct CapsuleCommand {
    #[command(flatten)]
    server: Server,
    /// Print results as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(create::Create),
    List(list::List),
    Exec(exec::Exec),
    Shell(shell::Shell),
    Cp(cp::Cp),
    Ps(ps::Ps),
    Stats(stats::Stats),
    Kill(kill::Kill),
    Logs(logs::Logs),
    Pause(pause::Pause),
    Hibernate(pause::Hibernate),
    Resume(pause::Resume),
    Fork(fork::Fork),
    Snapshot(snapshot::Snapshot),
    Network(network::Network),
    Url(url::Url),
    PortForward(port_forward::PortForward),
    Rm(rm::Rm),
}

impl CapsuleCommand {
    pub(crate) async fn run(self) -> Result<ExitCode> {
        let client = match self.server.client() {
            Err(error) if matches!(self.verb, Verb::Exec(_) | Verb::Shell(_) | Verb::Logs(_)) => {
                return Ok(exec::not_run(&error));
            }
            client => client?,
        };
        match self.verb {
            Verb::Create(create) => create.run(&client, self.json).await,
            Verb::List(list) => list.run(&client, self.json).await,
            Verb::Exec(exec) => exec.run(&client, self.json).await,
            Verb::Shell(shell) => Ok(shell.run(&client).await),
            Verb::Cp(cp) => cp.run(&client).await,
            Verb::Ps(ps) => ps.run(&client, self.json).await,
            Verb::Stats(stats) => stats.run(&client, self.json).await,
            Verb::Kill(kill) => kill.run(&client).await,
            Verb::Logs(logs) => logs.run(&client).await,
            Verb::Pause(pause) => pause.run(&client, self.json).await,
            Verb::Hibernate(hibernate) => hibernate.run(&client, self.json).await,
            Verb::Resume(resume) => resume.run(&client, self.json).await,
            Verb::Fork(fork) => fork.run(&client, self.json).await,
            Verb::Snapshot(snapshot) => snapshot.run(&client, self.json).await,
            Verb::Network(network) => network.run(&client, self.json).await,
            Verb::Url(url) => url.run(&client, self.json),
            Verb::PortForward(forward) => forward.run(&client).await,
            Verb::Rm(rm) => rm.run(&client, self.json).await,
        }
    }
}

/// Reads `NAME=VALUE`.
fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::Wrenn;

    const ID: &str = "cl-0000000000000000000000000";

    fn parses(arguments: &[&str]) -> bool {
        Wrenn::try_parse_from([&["wrenn", "capsule"], arguments].concat()).is_ok()
    }

    #[test]
    fn the_definitions_are_consistent() {
        Wrenn::command().debug_assert();
    }

    #[test]
    fn what_follows_the_capsule_is_the_command_with_all_its_dashes() {
        assert!(parses(&["exec", ID, "--", "python3", "-c", "print(1)"]));
        assert!(parses(&["exec", ID, "ls", "-l", "--json", "--url"]));
        assert!(parses(&["exec", ID, "-e", "A=1", "--env", "B=x=y", "--cwd", "/", "--timeout", "5", "env"]));
        assert!(parses(&["exec", "--json", "--background", ID, "sleep", "9"]));
        assert!(!parses(&["exec", ID]));
        assert!(!parses(&["exec", ID, "--env", "A", "env"]));
        assert!(!parses(&["exec", ID, "--env", "=1", "env"]));
        assert!(!parses(&["exec", ID, "--timeout", "0", "env"]));
        assert!(!parses(&["exec", ID, "--timeout", "5", "--background", "env"]));
        assert!(!parses(&["exec", "cl-1", "env"]));
        assert!(parses(&["exec", "-it", ID, "vim", "-R", "x"]) && parses(&["exec", "-i", ID, "cat"]));
        assert!(!parses(&["exec", "-it", "--background", ID, "vim"]) && !parses(&["exec", "--json", "-i", ID, "cat"]));
    }

    #[test]
    fn the_other_verbs() {
        assert!(parses(&["create"]));
        assert!(parses(&[
            "create",
            "--vcpus",
            "2",
            "--memory",
            "1024",
            "--label",
            "a=b",
            "--label",
            "c=",
            "--no-wait"
        ]));
        assert!(!parses(&["create", "--vcpus", "two"]));
        assert!(parses(&["ls", "-q"]) && parses(&["list", "--json", "--url", "http://h", "--api-key", "k"]));
        assert!(parses(&["shell", ID]) && parses(&["shell", "--cmd", "top -b", ID]));
        assert!(!parses(&["shell"]) && !parses(&["shell", ID, "top"]));
        assert!(parses(&["network", ID]) && parses(&["network", ID, "--open"]));
        assert!(parses(&[
            "network",
            ID,
            "--no-internet",
            "--allow-out",
            "a.example,192.0.2.0/24",
            "--allow-out",
            "b.example"
        ]));
        assert!(!parses(&["network", ID, "--open", "--no-internet"]) && !parses(&["network"]));
        assert!(parses(&["create", "--deny-out", "192.0.2.1"]));
        assert!(parses(&["rm", ID, ID]));
        assert!(!parses(&["rm"]));
        assert!(parses(&["cp", "-", &format!("{ID}:/x")]) && !parses(&["cp", "a"]) && !parses(&["cp", "cl-1:/x", "a"]));
        assert!(parses(&["kill", ID, "7", "tag", "-s", "SIGTERM"]) && !parses(&["kill", ID, "7", "-s", "TERM"]));
        assert!(parses(&["logs", "-f", ID, "7"]) && !parses(&["logs", ID]) && parses(&["ps", ID]));
        assert!(parses(&["url", ID, "8000"]) && !parses(&["url", ID, "0"]) && !parses(&["url", ID]));
        assert!(parses(&["port-forward", ID, "8000", "9000:80", "--address", "0.0.0.0"]));
        assert!(!parses(&["port-forward", ID]) && !parses(&["port-forward", ID, "1:2:3"]));
        // 2^128, which is no id.
        assert!(!parses(&["rm", "cl-f5lxx1zz5pnorynqglhzmsp34"]));
        assert_eq!(pair("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
    }
}
