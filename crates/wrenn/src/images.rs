//! The guest kernel and the default template, prepared once per machine by the scripts in `images/`, which this binary
//! carries so that it needs no checkout.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::terminal::Progress;

const SCRIPTS: [(&str, &str); 5] = [
    ("build.sh", include_str!("../../../images/build.sh")),
    ("kernel.sh", include_str!("../../../images/kernel.sh")),
    ("kernel.config", include_str!("../../../images/kernel.config")),
    ("rootfs.sh", include_str!("../../../images/rootfs.sh")),
    ("rootfs.packages", include_str!("../../../images/rootfs.packages")),
];

/// What a host needs to start capsules.
pub struct Images {
    /// The guest kernel.
    pub kernel: PathBuf,
    /// Image files by template name.
    pub templates: BTreeMap<String, PathBuf>,
}

/// `images.json`, as `images/build.sh` writes it; file names are relative to its directory.
#[derive(Deserialize)]
struct Manifest {
    kernel: String,
    templates: BTreeMap<String, String>,
}

/// Where images are kept: `$WRENN_CACHE`, else the user's cache directory.
pub fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("WRENN_CACHE") {
        Some(cache) => PathBuf::from(cache),
        None => dirs::cache_dir().context("no cache directory: set HOME, XDG_CACHE_HOME or WRENN_CACHE")?.join("wrenn"),
    };
    Ok(base.join("images"))
}

/// Builds what is missing; what the scripts say goes to `progress`.
pub async fn prepare(cache: &Path, progress: &Progress) -> Result<Images> {
    let envd = crate::beside("envd")
        .context("the guest agent `envd` is not beside this binary; `make build` puts it there")?;
    let scripts = tempfile::tempdir()?;
    for (name, text) in SCRIPTS {
        let path = scripts.path().join(name);
        std::fs::write(&path, text)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    }
    let mut build = Command::new(scripts.path().join("build.sh"))
        .arg(cache)
        .arg(envd)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("running images/build.sh")?;
    let mut lines = BufReader::new(build.stderr.take().context("its stderr is a pipe")?).lines();
    let mut last = Vec::new();
    while let Some(line) = lines.next_line().await? {
        progress.say(&line);
        last.push(line);
        last.drain(..last.len().saturating_sub(20));
    }
    if !build.wait().await?.success() {
        bail!("preparing images failed:\n{}", last.join("\n"));
    }
    let manifest = cache.join("images.json");
    let text = std::fs::read(&manifest).with_context(|| format!("reading {}", manifest.display()))?;
    let manifest: Manifest =
        serde_json::from_slice(&text).with_context(|| format!("reading {}", manifest.display()))?;
    Ok(Images {
        kernel: cache.join(manifest.kernel),
        templates: manifest.templates.into_iter().map(|(name, file)| (name, cache.join(file))).collect(),
    })
}
