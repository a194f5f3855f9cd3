//! Whatever a tree looks like, envd says of it what `find`, `stat` and `readlink` say.

use crate::entries::{files_in, list, stat, text};
use crate::harness::Envd;
use connectrpc::CodecFormat;
use guest_api::filesystem::{EntryInfo, FileType};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(Clone, Debug)]
enum Kind {
    Directory(u32),
    File(u32, usize),
    Link(OsString),
    Pipe,
}

/// Where (one of the directories so far), how it is called, what it is, whose it is.
type Node = (Index, OsString, Kind, (u32, u32));

fn name() -> impl Strategy<Value = OsString> {
    let bytes = prop_oneof![
        2 => prop::sample::select(vec![b'a', b'b', b'-', b' ', b'\n', b'.', b'\\', b'"', 0xff, 0xc3, 0xbc]),
        1 => any::<u8>(),
    ];
    prop::collection::vec(bytes, 1..12)
        .prop_filter("a file name", |name| !name.contains(&b'/') && !name.contains(&0) && name != b"." && name != b"..")
        .prop_map(OsString::from_vec)
}

fn node() -> impl Strategy<Value = Node> {
    let mode = 0..=0o7777u32;
    let kind = prop_oneof![
        mode.clone().prop_map(Kind::Directory),
        (mode, 0..9000usize).prop_map(|(mode, size)| Kind::File(mode, size)),
        prop_oneof![name(), Just(".".into()), Just("..".into()), Just("/etc/passwd".into()), Just("a/b".into())]
            .prop_map(Kind::Link),
        Just(Kind::Pipe),
    ];
    (any::<Index>(), name(), kind, (prop::sample::select(vec![0, 1, 54321]), prop::sample::select(vec![0, 2, 54321])))
}

fn build(root: &Path, nodes: &[Node]) {
    let mut directories = vec![root.to_owned()];
    let mut modes = Vec::new();
    for (parent, name, kind, (user, group)) in nodes {
        let path = parent.get(&directories).join(name);
        if std::fs::symlink_metadata(&path).is_ok() {
            continue;
        }
        match kind {
            Kind::Directory(mode) => {
                std::fs::create_dir(&path).unwrap();
                directories.push(path.clone());
                modes.push((path.clone(), *mode));
            }
            Kind::File(mode, size) => {
                std::fs::write(&path, vec![b'x'; *size]).unwrap();
                modes.push((path.clone(), *mode));
            }
            Kind::Link(target) => symlink(target, &path).unwrap(),
            Kind::Pipe => rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::from_raw_mode(0o600)).unwrap(),
        }
        lchown(&path, Some(*user), Some(*group)).unwrap();
    }
    // Last, since a new owner takes the set-id bits off.
    for (path, mode) in modes {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
}

/// The standard output of a program, if it succeeds.
fn output(program: &str, arguments: &[&OsStr]) -> Option<Vec<u8>> {
    let output = Command::new(program).env("LC_ALL", "C.UTF-8").args(arguments).output().unwrap();
    output.status.success().then_some(output.stdout)
}

/// One entry as the tools have it, in a form both sides can take.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Fact {
    path: String,
    size: i64,
    mode: u32,
    permissions: String,
    owner: String,
    group: String,
    modified: String,
    kind: i32,
    target: Option<String>,
}

/// What `find` says of everything below `root`, with `stat` and `readlink` where it is a link.
fn facts(root: &Path) -> Vec<Fact> {
    let format = OsStr::new("%p\\0%s\\0%m\\0%M\\0%u\\0%g\\0%T@\\0%y\\0");
    let root = root.as_os_str();
    let wire =
        output("find", &[root, OsStr::new("-mindepth"), OsStr::new("1"), OsStr::new("-printf"), format]).unwrap();
    let fields: Vec<&[u8]> = wire.split(|byte| *byte == 0).collect();
    let fact = |fields: &[&[u8]]| {
        let text = |at: usize| String::from_utf8_lossy(fields[at]).into_owned();
        let path = PathBuf::from(OsStr::from_bytes(fields[0]));
        let is_link = fields[7] == b"l";
        let argument = path.as_os_str();
        let (mode, kind) = if is_link {
            let arguments = [OsStr::new("-L"), OsStr::new("-c"), OsStr::new("%a %F"), OsStr::new("--"), argument];
            let said = output("stat", &arguments).map(|said| String::from_utf8(said).unwrap());
            let said = said.as_deref().and_then(|said| said.trim().split_once(' '));
            said.map_or(("0".to_owned(), "nothing".to_owned()), |(mode, kind)| (mode.to_owned(), kind.to_owned()))
        } else {
            (text(2), text(7))
        };
        let target = is_link.then(|| {
            let ask = |option: &str| output("readlink", &[OsStr::new(option), OsStr::new("--"), argument]);
            let end = |mut said: Vec<u8>| {
                assert_eq!(said.pop(), Some(0));
                PathBuf::from(OsString::from_vec(said))
            };
            // Only what leads somewhere: over a link into itself, `readlink -e` broods for minutes.
            let resolved = if kind == "nothing" { None } else { ask("-ze") };
            let target = match resolved {
                Some(target) => end(target),
                None => path.parent().unwrap().join(end(ask("-z").unwrap())),
            };
            target.to_string_lossy().into_owned()
        });
        let kind = match kind.as_str() {
            "f" | "regular file" | "regular empty file" => FileType::FILE_TYPE_FILE,
            "d" | "directory" => FileType::FILE_TYPE_DIRECTORY,
            "nothing" => FileType::FILE_TYPE_SYMLINK,
            _ => FileType::FILE_TYPE_UNSPECIFIED,
        };
        Fact {
            path: text(0),
            size: text(1).parse().unwrap(),
            mode: u32::from_str_radix(&mode, 8).unwrap(),
            permissions: text(3).replacen('l', "L", 1),
            owner: text(4),
            group: text(5),
            modified: text(6),
            kind: kind as i32,
            target,
        }
    };
    fields.chunks_exact(8).map(fact).collect()
}

fn fact(entry: &EntryInfo) -> Fact {
    let modified = entry.modified_time.as_option().unwrap();
    Fact {
        path: entry.path.clone(),
        size: entry.size,
        mode: entry.mode,
        permissions: entry.permissions.clone(),
        owner: entry.owner.clone(),
        group: entry.group.clone(),
        // `find` writes one digit more than the kernel has.
        modified: format!("{}.{:09}0", modified.seconds, modified.nanos),
        kind: entry.r#type.to_i32(),
        target: entry.symlink_target.clone(),
    }
}

#[test]
fn envd_and_the_tools_agree() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let envd = Envd::start();
    let clients = [files_in(&envd, CodecFormat::Proto), files_in(&envd, CodecFormat::Json)];
    let config = Config { cases: 32, failure_persistence: None, ..Config::default() };
    let trees = prop::collection::vec(node(), 0..24);
    let trees = (0..clients.len(), trees);
    let checked = TestRunner::new(config).run(&trees, |(codec, nodes)| {
        let client = &clients[codec];
        let root = tempfile::tempdir().unwrap();
        build(root.path(), &nodes);
        let entries = runtime.block_on(list(client, &text(root.path()), u32::MAX)).unwrap();
        let mut said: Vec<Fact> = entries.iter().map(fact).collect();
        let mut expected = facts(root.path());
        said.sort();
        expected.sort();
        prop_assert_eq!(said, expected);
        for entry in &entries {
            prop_assert_eq!(entry.is_symlink, entry.symlink_target.is_some());
            // A path that had to be mended names nothing any more.
            if !entry.path.contains('\u{fffd}') {
                prop_assert_eq!(&runtime.block_on(stat(client, &entry.path)).unwrap(), entry);
            }
        }
        let order: Vec<_> = entries
            .iter()
            .filter(|entry| !entry.path.contains('\u{fffd}'))
            .map(|entry| Path::new(&entry.path))
            .collect();
        prop_assert!(order.is_sorted_by(|one, other| one.components().lt(other.components())), "{:?}", order);
        Ok(())
    });
    checked.unwrap();
}
