//! How a guest ends: on SIGTERM, SIGINT or ctrl-alt-del everything is told to stop, then the disk is written, then the
//! machine resets, which is what makes the VMM leave.

use rustix::process::{Pid, Signal};
use rustix::system::{RebootCommand, reboot};
use std::io;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// How long processes have between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_millis(500);

/// Waits for the order to stop, and stops the machine.
pub async fn shut_down_on_signal() -> io::Result<()> {
    // Ctrl-alt-del then is a SIGINT to us instead of an immediate reset. Only the first pid namespace has one.
    if let Err(error) = reboot(RebootCommand::CadOff) {
        tracing::debug!(%error, "ctrl-alt-del stays as it is");
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping the machine");
    signal_everyone(Signal::TERM);
    tokio::time::sleep(GRACE).await;
    signal_everyone(Signal::KILL);
    rustix::fs::sync();
    Ok(reboot(RebootCommand::Restart)?)
}

/// Every process but this one. rustix has no `kill(-1)`; walking `/proc` comes to the same.
fn signal_everyone(signal: Signal) {
    let Ok(entries) = std::fs::read_dir("/proc") else { return };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    for pid in pids.filter_map(Pid::from_raw).filter(|pid| *pid != rustix::process::getpid()) {
        // It may have ended, or be one of the kernel's threads, which take no signals.
        let _ = rustix::process::kill_process(pid, signal);
    }
}
