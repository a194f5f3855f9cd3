//! The `wrenn` command; everything it does is in the library beside it.

use std::process::ExitCode;

use clap::Parser;
use wrenn::Wrenn;

#[tokio::main]
async fn main() -> ExitCode {
    Wrenn::parse().run().await
}
