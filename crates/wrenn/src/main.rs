//! The `wrenn` command; everything it does is in the library beside it.

use std::process::ExitCode;

use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use wrenn::Wrenn;

fn main() -> ExitCode {
    // What goes wrong is told by the commands themselves; the log is for operators. WRENN_LOG takes tracing's directives.
    let filter = tracing_subscriber::EnvFilter::try_from_env("WRENN_LOG").unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    allow_many_files();
    Wrenn::parse().run()
}

/// A shell allows 1024 open files, for the sake of programs that use `select`. Ours have a connection or two for each client.
fn allow_many_files() {
    let limits = getrlimit(Resource::Nofile);
    // What is refused leaves what there was.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, ..limits });
}
