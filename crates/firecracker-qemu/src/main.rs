//! Firecracker's HTTP API, served by QEMU for hosts without KVM: one process per microVM.
//!
//! Owns the contract of Firecracker 1.16.1 as a client sees it (requests, phases, faults, files, exit codes) and the
//! QEMU process behind it. Refuses what cannot be done here instead of pretending: vsock, huge pages, PCI hotplug,
//! memory hotplug. It makes no namespace, tap, cgroup or chroot: whoever starts it has done that. In a jail, without
//! privileges, it cannot limit the rate of an interface either, nor put the metadata address on its tap: that is there already.
//!
//! Where it differs from Firecracker, by nature: `acpi=off` has no VM generation id, so a restored guest learns from
//! its agent that it is a copy; the guest's clock continues from the snapshot; snapshot files are QEMU's, in our own
//! envelope, and load only with the same QEMU version and processor clock rate.

mod api;
mod args;
mod log;
mod machine;
mod memory;
mod mmds;
mod netlink;
mod qemu;
mod qmp;
mod serve;
mod snapshot;
mod throttle;
mod tracker;
mod tsc;
mod uffd;

use std::process::ExitCode;

use clap::Parser as _;

// One thread: Firecracker answers one request at a time, and QEMU's life is tied to the thread that started it.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = match args::Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Where this goes is closed: nobody reads it.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(args::BAD_ARGUMENTS) } else { ExitCode::SUCCESS };
        }
    };
    if let Err(error) = log::install(&args) {
        args::complain(&error);
        return ExitCode::FAILURE;
    }
    match serve::run(args).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!("{}", crate::log::chain(&error));
            ExitCode::FAILURE
        }
    }
}
