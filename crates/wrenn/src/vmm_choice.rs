//! Which VMM this host gets: `firecracker` where it is installed and KVM runs guests, else `firecracker-qemu`.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use tokio::process::Command;
use vmm::client::Version;
use vmm::kvm::Kvm;

/// No program needs longer to say its version.
const VERSION_LIMIT: Duration = Duration::from_secs(10);

/// A program on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    pub path: PathBuf,
    /// The first line of what it says to `--version`, or why it says nothing.
    pub says: Result<String, String>,
}

/// What this host has to run a guest with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub kvm: Kvm,
    pub firecracker: Option<Program>,
    pub firecracker_qemu: Option<Program>,
    pub qemu: Option<Program>,
}

/// The VMM to use, and the sentence that says which and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    pub binary: PathBuf,
    pub sentence: String,
}

/// The rule. `Err` is the sentence that says why there is none.
pub fn decide(found: &Found) -> Result<Choice, String> {
    let why_not = match (usable_firecracker(found.firecracker.as_ref()), &found.kvm) {
        (Ok((path, version)), Kvm::Usable) => {
            let sentence = format!("Using firecracker {version} ({}), because KVM runs guests here.", path.display());
            return Ok(Choice { binary: path.clone(), sentence });
        }
        (Ok(_), kvm) => kvm.to_string(),
        (Err(why), Kvm::Usable) => why,
        (Err(why), kvm) => format!("{kvm}, and {why}"),
    };
    let program =
        |program: Option<&Program>| program.filter(|program| program.says.is_ok()).map(|found| found.path.clone());
    match (program(found.firecracker_qemu.as_ref()), program(found.qemu.as_ref())) {
        (Some(binary), Some(_)) => {
            let sentence = format!("Using firecracker-qemu ({}), which is slower: {why_not}.", binary.display());
            Ok(Choice { binary, sentence })
        }
        (None, _) => Err(format!("No VMM: {why_not}, and there is no working firecracker-qemu beside wrenn.")),
        (_, None) => {
            Err(format!("No VMM: {why_not}, and firecracker-qemu needs qemu-system-x86_64, which does not work here."))
        }
    }
}

/// Its path and version, or why it cannot be used.
fn usable_firecracker(program: Option<&Program>) -> Result<(&PathBuf, Version), String> {
    let program = program.ok_or("firecracker is not installed")?;
    let version = firecracker_version(program)?;
    if version < Version::OLDEST {
        return Err(format!("firecracker is version {version}, older than {}", Version::OLDEST));
    }
    Ok((&program.path, version))
}

/// What `Firecracker v1.16.1` says.
pub(crate) fn firecracker_version(program: &Program) -> Result<Version, String> {
    let line = program.says.clone().map_err(|why| format!("firecracker does not work ({why})"))?;
    let word = line.split_whitespace().last().unwrap_or_default();
    word.trim_start_matches('v').parse().map_err(|_| format!("firecracker's version is unknown (`{line}`)"))
}

/// Looks at the host, unless told which to use.
pub async fn choose(told: Option<&Path>) -> Result<Choice> {
    if let Some(binary) = told {
        let binary = binary.canonicalize().with_context(|| format!("there is no VMM at {}", binary.display()))?;
        let sentence = format!("Using {}, as told.", binary.display());
        return Ok(Choice { binary, sentence });
    }
    decide(&find().await?).map_err(|sentence| anyhow!("{sentence} `wrenn doctor` says what to do."))
}

/// What this host has. Runs a guest to find out about KVM, which takes seconds where KVM is broken.
pub async fn find() -> Result<Found> {
    let kvm = tokio::task::spawn_blocking(|| vmm::kvm::probe(Path::new("/dev/kvm")));
    let beside = |name| crate::beside(name).or_else(|| in_path(name));
    let (firecracker, firecracker_qemu, qemu) = tokio::join!(
        program(in_path("firecracker").or_else(|| crate::beside("firecracker"))),
        program(beside("firecracker-qemu")),
        program(in_path("qemu-system-x86_64")),
    );
    Ok(Found { kvm: kvm.await?, firecracker, firecracker_qemu, qemu })
}

/// The first executable file of this name in the search path.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    let executable = |path: &PathBuf| path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
    std::env::split_paths(&std::env::var_os("PATH")?).map(|directory| directory.join(name)).find(executable)
}

async fn program(path: Option<PathBuf>) -> Option<Program> {
    let path = path?;
    let says = first_line(&path).await;
    Some(Program { path, says })
}

async fn first_line(path: &Path) -> Result<String, String> {
    let output = Command::new(path).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
    let output = match tokio::time::timeout(VERSION_LIMIT, output).await {
        Ok(output) => output.map_err(|error| error.to_string())?,
        Err(_) => return Err("it does not answer".to_owned()),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next() {
        Some(line) if output.status.success() => Ok(line.to_owned()),
        _ => Err(format!("`--version` gives {}", output.status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(path: &str, says: &str) -> Option<Program> {
        Some(Program { path: path.into(), says: Ok(says.to_owned()) })
    }

    fn complete() -> Found {
        Found {
            kvm: Kvm::Usable,
            firecracker: program("/usr/bin/firecracker", "Firecracker v1.16.1"),
            firecracker_qemu: program("/opt/wrenn/firecracker-qemu", "firecracker-qemu 0.1.0"),
            qemu: program("/usr/bin/qemu-system-x86_64", "QEMU emulator version 7.2.22"),
        }
    }

    fn sentence(found: &Found) -> String {
        decide(found).map_or_else(|why| why, |choice| choice.sentence)
    }

    #[test]
    fn firecracker_where_it_works() {
        let choice = decide(&complete()).unwrap();
        assert_eq!(choice.binary, Path::new("/usr/bin/firecracker"));
        assert_eq!(choice.sentence, "Using firecracker 1.16.1 (/usr/bin/firecracker), because KVM runs guests here.");
        let alone = Found { firecracker_qemu: None, qemu: None, ..complete() };
        assert_eq!(decide(&alone), Ok(choice));
    }

    #[test]
    fn else_firecracker_qemu_and_why() {
        let begin = "Using firecracker-qemu (/opt/wrenn/firecracker-qemu), which is slower:";
        for (found, why) in [
            (Found { kvm: Kvm::Missing, ..complete() }, "KVM is not there."),
            (
                Found { kvm: Kvm::Broken("the guest hung halting".to_owned()), ..complete() },
                "KVM is there but cannot run a guest: the guest hung halting.",
            ),
            (Found { firecracker: None, ..complete() }, "firecracker is not installed."),
            (
                Found { kvm: Kvm::Denied("Permission denied".to_owned()), firecracker: None, ..complete() },
                "KVM may not be used: Permission denied, and firecracker is not installed.",
            ),
            (
                Found { firecracker: program("/f", "Firecracker v1.11.0"), ..complete() },
                "firecracker is version 1.11.0, older than 1.12.0.",
            ),
            (
                Found { firecracker: program("/f", "what?"), ..complete() },
                "firecracker's version is unknown (`what?`).",
            ),
        ] {
            assert_eq!(sentence(&found), format!("{begin} {why}"));
        }
    }

    #[test]
    fn else_none_and_what_is_missing() {
        let without = |found: Found| decide(&found).unwrap_err();
        let none = without(Found { kvm: Kvm::Missing, firecracker_qemu: None, ..complete() });
        assert_eq!(none, "No VMM: KVM is not there, and there is no working firecracker-qemu beside wrenn.");
        let none = without(Found { firecracker: None, qemu: None, ..complete() });
        assert!(none.contains("firecracker is not installed") && none.contains("qemu-system-x86_64"), "{none}");
    }
}
