use std::os::unix::fs::PermissionsExt;

use super::*;

fn plan<'a>(program: &'a Path, dir: &'a Path) -> Plan<'a> {
    let size = Size { vcpus: 2, memory_mib: 512, disk_mib: 5120 };
    Plan {
        program,
        dir,
        kernel: Path::new("/boot/vmlinux"),
        netns: Path::new("/proc/self/ns/net"),
        user: 900_007,
        size,
    }
}

/// An ELF file for 64 bits with one program header, of that kind.
fn elf(kind: u8) -> Vec<u8> {
    let mut file = vec![0; 64 + 56];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    (file[32], file[54], file[56], file[64]) = (64, 56, 1, kind);
    file
}

#[test]
fn only_what_a_program_needs_is_in_its_jail() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("firecracker");
    fs::write(directory.path().join("libplugin.so"), "").unwrap();
    fs::write(directory.path().join("secret"), "").unwrap();
    let sources = |program: &Path| {
        let parts = plan(program, directory.path()).parts().unwrap();
        let sources = parts.into_iter().filter_map(|part| match part {
            Part::Bind { from, .. } => Some(PathBuf::from(std::ffi::OsStr::from_bytes(from.as_bytes()))),
            _ => None,
        });
        sources.collect::<Vec<_>>()
    };
    fs::write(&program, elf(1)).unwrap();
    let own = [directory.path().join("libplugin.so"), program.clone(), "/boot/vmlinux".into(), directory.path().into()];
    assert_eq!(sources(&program), own, "a static program has itself");
    for other in [elf(3), elf(1)[..60].to_vec(), b"#!/bin/sh\n".to_vec()] {
        fs::write(&program, other).unwrap();
        assert!(sources(&program).contains(&"/usr".into()), "another has the system's libraries");
        assert!(sources(&program).ends_with(&own));
    }
}

#[test]
fn nothing_but_the_agents_directory_and_the_scratch_can_be_written_to() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("vmm");
    fs::write(&program, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let parts = plan(&program, directory.path()).parts().unwrap();
    let mut writable: Vec<&CStr> = Vec::new();
    for part in &parts {
        match part {
            Part::Bind { at, flags, .. } | Part::Mount { at, flags, .. } if !flags.contains(MountFlags::RDONLY) => {
                writable.push(at);
            }
            Part::Seal { at, .. } => writable.retain(|writable| *writable != at.as_c_str()),
            _ => {}
        }
        if let Part::Bind { flags, .. } | Part::Mount { flags, .. } = part {
            assert!(flags.contains(MountFlags::NOSUID), "{part:?}");
        }
    }
    assert_eq!(writable, [c"run/wrenn/vm", c"run/wrenn/vm/scratch"]);
    assert_eq!(parts.last(), Some(&Part::Seal { at: c".".into(), flags: DATA }));
}
