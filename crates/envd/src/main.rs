//! The `envd` binary: arguments, then init if it is pid 1, then the server.

use envd::process::{self, Processes};
use envd::{cgroup::Cgroups, filesystem, http, init, metrics::Metrics, mmds::Mmds, reaper::Reaper, settings::Settings};
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::process::ExitCode;
use std::sync::Arc;

/// Requests are short and processes do the work; more workers would only take memory.
const MAX_WORKERS: usize = 4;

const USAGE: &str = "usage: envd [--port PORT] [--isnotfc] [--version]";

#[derive(Debug, PartialEq, Eq)]
enum Command {
    /// `metadata`: there is a metadata service to ask.
    Serve {
        port: u16,
        metadata: bool,
    },
    Version,
    Help,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("starting the runtime")]
    Runtime(#[source] io::Error),
    #[error("listening on port {port}")]
    Listen { port: u16, source: io::Error },
    #[error("waiting for signals")]
    Signals(#[source] io::Error),
    #[error("serving")]
    Serve(#[source] io::Error),
}

fn main() -> ExitCode {
    envd::sys::memory::keep_little();
    let is_init = rustix::process::getpid().is_init();
    let command = match parse(std::env::args().skip(1)) {
        Ok(command) => command,
        // The kernel hands init every word of its command line that it does not know.
        Err(_) if is_init => Command::Serve { port: guest_api::PORT, metadata: true },
        Err(word) => return say(&mut io::stderr(), &format!("envd: cannot understand '{word}'\n{USAGE}"), 2),
    };
    let (port, metadata) = match command {
        Command::Serve { port, metadata } => (port, metadata),
        Command::Version => return say(&mut io::stdout(), envd::VERSION, 0),
        Command::Help => return say(&mut io::stdout(), USAGE, 0),
    };
    // A guest's console is slow and read by few: only what went wrong.
    let level = if is_init { tracing::Level::WARN } else { tracing::Level::INFO };
    tracing_subscriber::fmt().with_max_level(level).with_writer(io::stderr).with_ansi(false).init();

    let cgroups = if is_init { init::run() } else { Cgroups::none() };
    match serve(port, cgroups, is_init, metadata) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "envd stops");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Command, String> {
    let (mut port, mut metadata) = (guest_api::PORT, true);
    while let Some(word) = words.next() {
        let (flag, value) = match word.split_once('=') {
            Some((flag, value)) => (flag, Some(value.to_owned())),
            None => (word.as_str(), None),
        };
        match flag.trim_start_matches('-') {
            _ if !flag.starts_with('-') => return Err(word),
            "port" => port = value.or_else(|| words.next()).and_then(|value| value.parse().ok()).ok_or(word)?,
            "isnotfc" => metadata = false,
            "version" => return Ok(Command::Version),
            "help" | "h" => return Ok(Command::Help),
            _ => return Err(word),
        }
    }
    Ok(Command::Serve { port, metadata })
}

fn serve(port: u16, cgroups: Cgroups, is_init: bool, metadata: bool) -> Result<(), Error> {
    let listen = |source| Error::Listen { port, source };
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).map_err(listen)?;
    listener.set_nonblocking(true).map_err(listen)?;
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_WORKERS);
    let mut runtime = match workers {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime.worker_threads(workers).enable_all().build().map_err(Error::Runtime)?;
    runtime.block_on(async {
        let reaper = Arc::new(Reaper::default());
        let settings = Arc::new(Settings::default());
        let cgroups = Arc::new(cgroups);
        let mmds = Arc::new(Mmds::new(is_init && metadata));
        let processes = Arc::new(Processes::new(Arc::clone(&reaper), Arc::clone(&cgroups)));
        let processes = process::rpc::Service { processes, settings: Arc::clone(&settings) };
        let files = filesystem::rpc::Service { settings: Arc::clone(&settings), watchers: Arc::default() };
        let context = http::Context {
            settings: Arc::clone(&settings),
            metrics: Arc::new(Metrics::default()),
            mmds: Arc::clone(&mmds),
            cgroups,
            reaper: Arc::clone(&reaper),
            is_init,
            turn: Arc::default(),
        };
        tokio::spawn(async move { mmds.learn(&settings).await });
        if is_init {
            tokio::spawn(envd::ports::forward());
        }
        let listener = tokio::net::TcpListener::from_std(listener).map_err(listen)?;
        if let Ok(address) = listener.local_addr() {
            tracing::info!(%address, "serving");
        }
        tokio::select! {
            result = reaper.run() => result.map_err(Error::Signals),
            result = init::shut_down_on_signal(), if is_init => result.map_err(Error::Signals),
            result = http::serve(listener, http::router(processes, files, context)) => result.map_err(Error::Serve),
        }
    })
}

fn say(to: &mut dyn Write, text: &str, code: u8) -> ExitCode {
    match writeln!(to, "{text}") {
        Ok(()) => ExitCode::from(code),
        Err(_) => ExitCode::FAILURE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(words: &[&str]) -> Result<Command, String> {
        parse(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn arguments() {
        assert_eq!(of(&[]), Ok(Command::Serve { port: 49983, metadata: true }));
        assert_eq!(of(&["--port", "0", "--isnotfc"]), Ok(Command::Serve { port: 0, metadata: false }));
        assert_eq!(of(&["-isnotfc", "-port=8080"]), Ok(Command::Serve { port: 8080, metadata: false }));
        assert_eq!(of(&["--version"]), Ok(Command::Version));
        for bad in [&["--port"][..], &["--port", "x"], &["--port=65536"], &["port"], &["--nope"]] {
            assert!(of(bad).is_err(), "{bad:?}");
        }
    }
}
