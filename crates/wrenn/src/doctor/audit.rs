//! What is stored in the data directory, and whether all of it is needed, and all that is needed there.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use ::agent::audit::{Audit, Verdict, audit};
use anyhow::{Context, Result, bail};

use super::objects::Stored;
use crate::terminal::{self, Paint, Progress, Style};

/// What lies in the directory besides what the agent has there.
const BESIDE: [&str; 9] = [
    "api-key",
    "api-key.new",
    "lock",
    "tls",
    "wrenn.db",
    "wrenn.db-journal",
    "wrenn.db-shm",
    "wrenn.db-wal",
    "lost+found",
];

pub(super) async fn run(
    dir: &Path,
    objects: Option<&objects::Config>,
    json: bool,
    progress: Progress,
) -> Result<ExitCode> {
    if !rustix::process::geteuid().is_root() {
        bail!("this needs root: only root may read what capsules left");
    }
    let dir = dir.canonicalize().with_context(|| format!("looking at {}", dir.display()))?;
    // As long as we hold it nobody mounts what we mount, or begins to change what we look at.
    let _lock = lock(&dir)?;
    let audit = audit(&dir, &BESIDE).await.with_context(|| format!("looking at {}", dir.display()))?;
    let stored = match objects {
        Some(objects) => Some(Stored::look(objects).await.context("looking at the object store")?),
        None => None,
    };
    drop(progress);
    let is_clean = audit.is_clean() && stored.as_ref().is_none_or(|stored| stored.wrong.is_empty());
    if json {
        terminal::print_json(&serde_json::json!({
            "dir": dir, "clean": is_clean, "used": audit.used, "findings": audit.findings, "objects": stored,
        }))?;
    } else {
        print(&dir, &audit)?;
        if let Some(stored) = &stored {
            print_objects(stored)?;
        }
    }
    Ok(if is_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The lock of `dir`; nothing where there is none, or where it is in use and may be looked at all the same.
fn lock(dir: &Path) -> Result<Option<File>> {
    let path = dir.join("lock");
    let Ok(file) = File::open(&path) else { return Ok(None) };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {
            let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
            if dir.join("volume.xfs").exists() && device(&dir.join("volume")) == device(dir) {
                bail!("the `wrenn` that uses {} is just starting or stopping; try again when it has", dir.display());
            }
            Ok(None)
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("locking {}", path.display())),
    }
}

fn print(dir: &Path, audit: &Audit) -> Result<()> {
    let paint = Paint::stdout();
    let wide = audit.used.keys().map(|kind| kind_name(kind).len()).max().unwrap_or(0);
    for (kind, count) in &audit.used {
        let of = kind_name(kind);
        terminal::print(&format!("used        {of:<wide$}  {:>6}  {:>11}", count.count, size(count.bytes)))?;
    }
    for finding in &audit.findings {
        let (word, style) = match finding.verdict {
            Verdict::Garbage => ("garbage", Style::Dim),
            Verdict::Unreferenced => ("unreferenced", Style::Red),
            Verdict::Foreign => ("foreign", Style::Red),
            Verdict::Broken => ("broken", Style::Red),
        };
        let word = paint.paint(style, &format!("{word:<12}"));
        terminal::print(&format!("{word}{} ({})", finding.path.display(), size(finding.bytes)))?;
        terminal::print(&format!("            {}", paint.paint(Style::Dim, &format!("→ {}", finding.why))))?;
    }
    terminal::print("")?;
    let wrong = audit.wrong().count();
    let verdict = match wrong {
        0 => format!("All that is stored in {} is in use or will be removed.", dir.display()),
        _ => format!("{wrong} of what is stored in {} should not be as it is.", dir.display()),
    };
    terminal::print(&paint.paint(Style::Bold, &verdict))?;
    Ok(())
}

fn print_objects(stored: &Stored) -> Result<()> {
    let paint = Paint::stdout();
    terminal::print("")?;
    for (word, count) in [("used", stored.used), ("garbage", stored.garbage)] {
        terminal::print(&format!("{word:<12}{:<10}  {:>6}  {:>11}", "chunk", count.objects, size(count.bytes)))?;
    }
    for (name, why) in &stored.wrong {
        terminal::print(&format!("{}{name}", paint.paint(Style::Red, "broken      ")))?;
        terminal::print(&format!("            {}", paint.paint(Style::Dim, &format!("→ {why}"))))?;
    }
    let uploads = stored.uploads;
    let verdict = match stored.wrong.len() {
        0 => format!("All that is in the object store belongs to {uploads} uploads or will be removed."),
        wrong => format!("{wrong} of what is in the object store should not be as it is."),
    };
    terminal::print("")?;
    terminal::print(&paint.paint(Style::Bold, &verdict))?;
    Ok(())
}

fn kind_name(kind: &impl serde::Serialize) -> String {
    serde_json::to_value(kind).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
}

fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{} KiB", bytes.div_ceil(1 << 10)),
        _ => format!("{} MiB", bytes >> 20),
    }
}
