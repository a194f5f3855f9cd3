//! KVM, the VMMs, and which of them is used.

use vmm::client::Version;
use vmm::kvm::Kvm;

use super::Check;
use crate::vmm_choice::{self, Choice, Found, Program};

/// The release that firecracker-qemu was written against; its predecessors lack parts of what it uses.
const OLDEST_QEMU: (u32, u32) = (7, 2);

pub(super) fn checks(found: &Found, choice: &Result<Choice, String>) -> Vec<Check> {
    let uses = |program: Option<&Program>| {
        program.is_some_and(|program| choice.as_ref().is_ok_and(|choice| choice.binary == program.path))
    };
    let mut checks = vec![kvm(&found.kvm)];
    // What the choice does without is worth a word, but nothing to be mended.
    if found.kvm == Kvm::Usable || found.firecracker.is_some() {
        checks.push(firecracker(found.firecracker.as_ref()));
    } else {
        checks.push(Check::ok("firecracker", "not installed, and of no use without KVM"));
    }
    if uses(found.firecracker.as_ref()) {
        checks.push(Check::ok("firecracker-qemu", "not needed: firecracker runs here"));
        checks.push(Check::ok("qemu", "not needed: firecracker runs here"));
    } else {
        checks.push(firecracker_qemu(found.firecracker_qemu.as_ref()));
        checks.push(qemu(found.qemu.as_ref()));
    }
    checks.push(match choice {
        Ok(choice) => Check::ok("vmm", choice.sentence.clone()),
        Err(why) => Check::fail("vmm", why.clone(), "do what is said about the programs above"),
    });
    checks
}

fn kvm(kvm: &Kvm) -> Check {
    let remedy = match kvm {
        Kvm::Usable => return Check::ok("kvm", kvm.to_string()),
        Kvm::Missing => {
            "enable virtualisation in the firmware, or nested virtualisation of this virtual machine, and load kvm_intel or \
             kvm_amd; without it capsules run under QEMU, several times slower"
        }
        Kvm::Denied(_) => "run as root, or give this user access to /dev/kvm",
        Kvm::Broken(_) => {
            "this machine is virtual and what it is virtual on does not pass virtualisation on; use one that does, or run \
             capsules under QEMU, several times slower"
        }
    };
    Check::warn("kvm", kvm.to_string(), remedy)
}

fn firecracker(program: Option<&Program>) -> Check {
    let install = "install it from github.com/firecracker-microvm/firecracker/releases into /usr/local/bin";
    let Some(program) = program else {
        return Check::warn("firecracker", "not installed", install);
    };
    match vmm_choice::firecracker_version(program) {
        Ok(version) if version >= Version::OLDEST => {
            Check::ok("firecracker", format!("{version} ({})", program.path.display()))
        }
        Ok(version) => Check::warn("firecracker", format!("{version}, older than {}", Version::OLDEST), install),
        Err(why) => Check::warn("firecracker", why, install),
    }
}

fn firecracker_qemu(program: Option<&Program>) -> Check {
    let remedy = "`make build` puts it beside wrenn; needed only where firecracker cannot run";
    match program {
        None => Check::warn("firecracker-qemu", "not beside wrenn, nor in PATH", remedy),
        Some(Program { path, says: Ok(line) }) => Check::ok("firecracker-qemu", format!("{line} ({})", path.display())),
        Some(Program { path, says: Err(why) }) => {
            Check::warn("firecracker-qemu", format!("{} does not work: {why}", path.display()), remedy)
        }
    }
}

fn qemu(program: Option<&Program>) -> Check {
    let remedy = format!("apt install qemu-system-x86 ({}.{} or newer)", OLDEST_QEMU.0, OLDEST_QEMU.1);
    let line = match program {
        None => return Check::warn("qemu", "qemu-system-x86_64 is not installed", remedy),
        Some(Program { path, says: Err(why) }) => {
            return Check::warn("qemu", format!("{} does not work: {why}", path.display()), remedy);
        }
        Some(Program { says: Ok(line), .. }) => line,
    };
    match qemu_version(line) {
        Some(version) if version >= OLDEST_QEMU => Check::ok("qemu", line.clone()),
        Some(_) | None => Check::warn("qemu", line.clone(), remedy),
    }
}

/// Of `QEMU emulator version 7.2.22 (Debian …)`.
fn qemu_version(line: &str) -> Option<(u32, u32)> {
    let mut numbers = line.split_once("version ")?.1.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn versions_decide() {
        let program = |says: &str| Program { path: "/p".into(), says: Ok(says.to_owned()) };
        let qemu = |says: &str| qemu(Some(&program(says))).verdict;
        assert_eq!(qemu("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"), Verdict::Ok);
        assert_eq!(qemu("QEMU emulator version 10.0.1"), Verdict::Ok);
        assert_eq!(qemu("QEMU emulator version 7.1.0"), Verdict::Warn);
        assert_eq!(qemu("something else"), Verdict::Warn);
        let firecracker = |says: &str| firecracker(Some(&program(says)));
        assert_eq!(firecracker("Firecracker v1.12.0").found, "1.12.0 (/p)");
        assert_eq!(firecracker("Firecracker v1.11.9").verdict, Verdict::Warn);
    }

    fn verdicts(found: &Found) -> Vec<(&'static str, Verdict)> {
        let checks = checks(found, &vmm_choice::decide(found));
        assert!(checks.iter().all(|check| (check.verdict == Verdict::Ok) == check.remedy.is_none()));
        checks.into_iter().map(|check| (check.name, check.verdict)).collect()
    }

    #[test]
    fn only_what_the_choice_needs_is_asked_for() {
        use Verdict::{Fail, Ok, Warn};
        let names = ["kvm", "firecracker", "firecracker-qemu", "qemu", "vmm"];
        let expect = |verdicts: [Verdict; 5]| names.into_iter().zip(verdicts).collect::<Vec<_>>();
        let program = |path: &str, says: &str| Some(Program { path: path.into(), says: Result::Ok(says.to_owned()) });

        let nothing = Found { kvm: Kvm::Missing, firecracker: None, firecracker_qemu: None, qemu: None };
        assert_eq!(verdicts(&nothing), expect([Warn, Ok, Warn, Warn, Fail]));
        let kvm = Found { kvm: Kvm::Usable, ..nothing.clone() };
        assert_eq!(verdicts(&kvm), expect([Ok, Warn, Warn, Warn, Fail]));
        let firecracker = Found { firecracker: program("/f", "Firecracker v1.16.1"), ..kvm };
        assert_eq!(verdicts(&firecracker), expect([Ok; 5]));
        let qemu = program("/q", "QEMU emulator version 7.2.0");
        let emulated = Found { firecracker_qemu: program("/fq", "1"), qemu, ..nothing };
        assert_eq!(verdicts(&emulated), expect([Warn, Ok, Ok, Ok, Ok]));
    }
}
