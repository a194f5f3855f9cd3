//! The log: to standard error, or to the file that `--log-path` or `PUT /logger` names.

use std::error::Error as StdError;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, OnceLock};

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::api::types::{LogLevel, Logger};
use crate::args::Args;

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open the log {path}")]
    Open { path: String, source: io::Error },
}

static FILE: Mutex<Option<File>> = Mutex::new(None);
static LEVEL: OnceLock<reload::Handle<LevelFilter, tracing_subscriber::Registry>> = OnceLock::new();

/// Sets the log up from the command line.
pub fn install(args: &Args) -> Result<(), Error> {
    if let Some(path) = &args.log_path {
        redirect(path)?;
    }
    let (level, handle) = reload::Layer::new(LevelFilter::from(args.level));
    let lines = tracing_subscriber::fmt::layer().with_writer(|| Output).with_ansi(false).with_target(false);
    tracing_subscriber::registry().with(level).with(lines).init();
    // This is the only place that sets it.
    let _ = LEVEL.set(handle);
    Ok(())
}

/// Applies `PUT /logger`.
pub fn configure(logger: &Logger) -> Result<(), Error> {
    if let Some(path) = &logger.log_path {
        redirect(path)?;
    }
    if let (Some(level), Some(handle)) = (logger.level, LEVEL.get()) {
        // The subscriber lives as long as the process, so the handle always reaches it.
        let _ = handle.reload(LevelFilter::from(level));
    }
    Ok(())
}

/// An error and its causes on one line.
pub fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn redirect(path: &Path) -> Result<(), Error> {
    let file = File::options()
        .create(true)
        .append(true)
        .open(path)
        .map_err(|source| Error::Open { path: path.display().to_string(), source })?;
    *FILE.lock().unwrap_or_else(|poison| poison.into_inner()) = Some(file);
    Ok(())
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Off => Self::OFF,
            LogLevel::Trace => Self::TRACE,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Info => Self::INFO,
            LogLevel::Warn => Self::WARN,
            LogLevel::Error => Self::ERROR,
        }
    }
}

/// Where a line goes is decided when it is written.
struct Output;

impl Write for Output {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match FILE.lock().unwrap_or_else(|poison| poison.into_inner()).as_mut() {
            Some(file) => file.write(line),
            None => io::stderr().write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
