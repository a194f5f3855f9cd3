//! The metrics file: one line of JSON per FlushMetrics.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::time::{Instant, SystemTime};

use serde_json::json;

use crate::api::types::{RunState, SnapshotType};

/// What is counted, and where it is written once there is a file.
#[derive(Default)]
pub struct Metrics {
    file: Option<File>,
    requests: u64,
    faults: u64,
    /// The last duration of each verb, in microseconds; 0 if it never happened.
    latencies: Latencies,
}

#[derive(Default)]
struct Latencies {
    pause: u64,
    resume: u64,
    full: u64,
    diff: u64,
    load: u64,
}

/// When something being timed began.
#[derive(Clone, Copy)]
pub struct Started(Instant);

impl Started {
    pub fn now() -> Self {
        Self(Instant::now())
    }

    fn micros(self) -> u64 {
        u64::try_from(self.0.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

impl Metrics {
    /// Appends to the file at `path` from now on.
    pub fn open(&mut self, path: &Path) -> io::Result<()> {
        self.file = Some(File::options().append(true).create(true).open(path)?);
        Ok(())
    }

    pub fn count_request(&mut self, succeeded: bool) {
        self.requests += 1;
        self.faults += u64::from(!succeeded);
    }

    pub fn state_changed(&mut self, state: RunState, since: Started) {
        match state {
            RunState::Paused => self.latencies.pause = since.micros(),
            RunState::Running => self.latencies.resume = since.micros(),
        }
    }

    pub fn saved(&mut self, kind: SnapshotType, since: Started) {
        match kind {
            SnapshotType::Full => self.latencies.full = since.micros(),
            SnapshotType::Diff => self.latencies.diff = since.micros(),
        }
    }

    pub fn loaded(&mut self, since: Started) {
        self.latencies.load = since.micros();
    }

    /// Writes one line, if there is a file.
    pub fn flush(&mut self) -> io::Result<()> {
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut line = json!({
            "utc_timestamp_ms": u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            "api_server": { "requests": self.requests, "faults": self.faults },
            "latencies_us": {
                "pause_vm": self.latencies.pause,
                "resume_vm": self.latencies.resume,
                "full_create_snapshot": self.latencies.full,
                "diff_create_snapshot": self.latencies.diff,
                "load_snapshot": self.latencies.load,
            },
        })
        .to_string();
        line.push('\n');
        file.write_all(line.as_bytes())
    }
}
