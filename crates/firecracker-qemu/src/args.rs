//! The command line: Firecracker's, as far as it makes sense here.

use std::io::Write as _;
use std::path::PathBuf;

use clap::Parser;

use crate::api::types::LogLevel;

/// Says the contract first, so that what reads Firecracker's version reads this one, then what really serves it.
pub const VERSION: &str =
    concat!("v1.16.1 API, served by QEMU without KVM (firecracker-qemu ", env!("CARGO_PKG_VERSION"), ")");

/// The Firecracker release whose contract is served.
pub const CONTRACT: &str = "1.16.1";

/// The exit code of Firecracker for a command line it does not understand.
pub const BAD_ARGUMENTS: u8 = 153;

#[derive(Debug, Parser)]
#[command(name = "Firecracker", version = VERSION, about = "Firecracker's HTTP API served by QEMU, for hosts without KVM")]
pub struct Args {
    /// Unix socket to serve the API on; it must not exist.
    #[arg(long, default_value = "/run/firecracker.socket")]
    pub api_sock: PathBuf,

    /// Name of this microVM: 1 to 64 letters, digits and hyphens.
    #[arg(long, default_value = "anonymous-instance", value_parser = instance_id)]
    pub id: String,

    /// File to append the log to, instead of standard error.
    #[arg(long)]
    pub log_path: Option<PathBuf>,

    /// Least severe level that is logged.
    #[arg(long, default_value = "Info")]
    pub level: LogLevel,

    /// Largest request body, in bytes.
    #[arg(long, default_value_t = 51_200)]
    pub http_api_max_payload_size: usize,

    /// Largest MMDS data store, in bytes of JSON; by default as large as a request body.
    #[arg(long)]
    pub mmds_size_limit: Option<usize>,

    /// Accepted and without effect: QEMU's own seccomp filter is always on.
    #[arg(long)]
    pub no_seccomp: bool,
}

fn instance_id(text: &str) -> Result<String, String> {
    let fits = (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if fits { Ok(text.to_owned()) } else { Err("an id is 1 to 64 letters, digits and hyphens".to_owned()) }
}

/// Says why the process ends before there is a log to say it in.
pub fn complain(error: &dyn std::error::Error) {
    // A message that cannot be written has no other reader.
    let _ = writeln!(std::io::stderr(), "firecracker-qemu: {}", crate::log::chain(error));
}
