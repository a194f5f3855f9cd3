//! The `wrenn` command; everything it does is in the library beside it.

use std::process::ExitCode;

use clap::Parser;
use wrenn::Wrenn;

fn main() -> ExitCode {
    // What goes wrong is told by the commands themselves; the log is for operators. WRENN_LOG takes tracing's directives.
    let filter = tracing_subscriber::EnvFilter::try_from_env("WRENN_LOG").unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    Wrenn::parse().run()
}
