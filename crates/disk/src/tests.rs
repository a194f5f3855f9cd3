//! Real file systems, as root: the ext4 of the machine, XFS on a loop device, a small tmpfs.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};
use tempfile::TempDir;

use super::*;

const MIB: u64 = 1 << 20;

/// A data directory that leaves no mount behind when a test fails.
struct DataDir(TempDir);

impl DataDir {
    fn new() -> Self {
        Self(tempfile::tempdir_in("/var/tmp").unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for DataDir {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.path().join("volume"), UnmountFlags::DETACH);
    }
}

/// A sparse file of 8 MiB with data at its start, in its middle and at its end.
fn image(dir: &Path) -> PathBuf {
    let path = dir.join("built.ext4");
    let file = File::create(&path).unwrap();
    file.set_len(8 * MIB).unwrap();
    file.write_all_at(b"first", 0).unwrap();
    file.write_all_at(&[7; 300_000], 3 * MIB + 17).unwrap();
    file.write_all_at(b"last", 8 * MIB - 4).unwrap();
    file.sync_all().unwrap();
    path
}

fn open(dir: &Path) -> Result<Disks, Error> {
    Disks::open(dir, "test", None)
}

fn without_mkfs(dir: &Path) -> Result<Disks, Error> {
    Disks::open_with(dir, "test", None, "/nonexistent/mkfs.xfs".as_ref())
}

fn base() -> ImageName {
    "base-1.0".parse().unwrap()
}

fn loops_of(dir: &Path) -> Option<PathBuf> {
    loop_device::find(&dir.canonicalize().unwrap().join("volume.xfs")).unwrap()
}

fn mounted(dir: &Path) -> bool {
    fs::read_to_string("/proc/self/mountinfo").unwrap().contains(dir.join("volume").to_str().unwrap())
}

fn data_bytes(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_directory_that_cannot_share_blocks_gets_a_volume_that_can() {
    let dir = DataDir::new();
    let disks = open(dir.path()).unwrap();
    assert_eq!(disks.backend(), Backend::Reflink);
    assert_eq!(disks.root(), dir.path().canonicalize().unwrap().join("volume"));
    assert!(fs::metadata(dir.path().join("volume.xfs")).unwrap().len() >= volume_minimum());
    assert!(data_bytes(&dir.path().join("volume.xfs")) < 512 * MIB, "the volume is sparse");

    let built = image(dir.path());
    let path = disks.import_image(&built, &base()).unwrap();
    assert_eq!(fs::read(&path).unwrap(), fs::read(&built).unwrap());

    // Fifty disks share the image's blocks, and what is written to one is seen in no other.
    let free = || rustix::fs::statvfs(disks.root()).unwrap().f_bfree;
    let before = free();
    let clones: Vec<_> = (0..50).map(|i| disks.root().join(format!("clone-{i}"))).collect();
    for clone in &clones {
        disks.create(&path, clone, None).unwrap();
    }
    File::options().write(true).open(&clones[7]).unwrap().write_all_at(b"mine!", 0).unwrap();
    rustix::fs::syncfs(File::open(disks.root()).unwrap()).unwrap();
    assert!((before - free()) * 4096 < 4 * MIB, "50 clones of 300 KB of data took {} blocks", before - free());
    for (i, clone) in clones.iter().enumerate() {
        let mut start = [0; 5];
        File::open(clone).unwrap().read_exact(&mut start).unwrap();
        assert_eq!(&start, if i == 7 { b"mine!" } else { b"first" });
    }
    assert_eq!(fs::read(&path).unwrap(), fs::read(&built).unwrap());
    disks.close().unwrap();
    assert!(!mounted(dir.path()));
    assert_eq!(loops_of(dir.path()), None);
}

fn volume_minimum() -> u64 {
    4 << 30
}

#[test]
fn a_killed_agent_s_volume_is_used_as_it_is() {
    let dir = DataDir::new();
    let first = open(dir.path()).unwrap();
    let path = first.import_image(&image(dir.path()), &base()).unwrap();
    let device = loops_of(dir.path());
    assert!(device.is_some());
    // A kill runs no destructor, and Disks has none: what is open is closed, mount and loop stay.
    drop(first);

    let second = open(dir.path()).unwrap();
    assert_eq!(loops_of(dir.path()), device);
    assert_eq!(second.import_image(&dir.path().join("built.ext4"), &base()).unwrap(), path);
    second.close().unwrap();
    assert_eq!(loops_of(dir.path()), None);

    // And after an orderly end it is mounted again, with what was in it.
    let third = open(dir.path()).unwrap();
    assert!(path.exists());
    third.close().unwrap();
}

#[test]
fn a_volume_mounted_out_of_sight_is_not_attached_twice() {
    let dir = DataDir::new();
    let disks = open(dir.path()).unwrap();
    let device = loops_of(dir.path()).unwrap();
    // Another mount of the same volume stands for one in a mount namespace that we do not see.
    let elsewhere = tempfile::tempdir().unwrap();
    rustix::mount::mount_bind(disks.root(), elsewhere.path()).unwrap();
    disks.close().unwrap();
    assert_eq!(loops_of(dir.path()).as_deref(), Some(&*device));
    let again = open(dir.path()).unwrap();
    assert_eq!(loops_of(dir.path()).as_deref(), Some(&*device));
    rustix::mount::unmount(elsewhere.path(), UnmountFlags::empty()).unwrap();
    again.close().unwrap();
    assert_eq!(loops_of(dir.path()), None);
}

#[test]
fn two_directories_do_not_meet() {
    let (a, b) = (DataDir::new(), DataDir::new());
    let (disks_a, disks_b) = (open(a.path()).unwrap(), open(b.path()).unwrap());
    let path = disks_a.import_image(&image(a.path()), &base()).unwrap();
    assert_ne!(loops_of(a.path()), loops_of(b.path()));
    assert_eq!(fs::read_dir(disks_b.root().join("images")).unwrap().count(), 0);
    disks_b.close().unwrap();
    assert!(path.exists());
    disks_a.close().unwrap();
}

#[test]
fn a_volume_in_use_says_so() {
    let dir = DataDir::new();
    let disks = open(dir.path()).unwrap();
    let root = disks.root().to_owned();
    let used = File::create(root.join("in-use")).unwrap();
    assert!(matches!(disks.close(), Err(Error::Busy(path)) if path == root));
    drop(used);
    open(dir.path()).unwrap().close().unwrap();
    assert_eq!(loops_of(dir.path()), None);
}

#[test]
fn a_volume_that_cannot_be_mounted_is_not_passed_over() {
    let dir = DataDir::new();
    fs::write(dir.path().join("volume.xfs"), vec![0; MIB as usize]).unwrap();
    assert!(matches!(open(dir.path()), Err(Error::Mount { .. })));
    assert_eq!(loops_of(dir.path()), None);
    assert_eq!(fs::metadata(dir.path().join("volume.xfs")).unwrap().len(), MIB);
}

#[test]
fn a_file_system_that_can_share_blocks_is_used_directly() {
    let outer = DataDir::new();
    let volume = open(outer.path()).unwrap();
    let inner = volume.root().join("data");
    fs::create_dir(&inner).unwrap();
    let disks = open(&inner).unwrap();
    assert_eq!((disks.backend(), disks.root()), (Backend::Reflink, inner.as_path()));
    assert!(!inner.join("volume.xfs").exists());
    disks.close().unwrap();
    volume.close().unwrap();
}

#[test]
fn without_mkfs_disks_are_sparse_copies() {
    let dir = DataDir::new();
    let disks = without_mkfs(dir.path()).unwrap();
    assert_eq!((disks.backend(), disks.root()), (Backend::Copy, dir.path()));
    let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["images"], "a volume that could not be made leaves nothing");

    let built = image(dir.path());
    let path = disks.import_image(&built, &base()).unwrap();
    let clone = dir.path().join("clone");
    disks.create(&path, &clone, Some(64 * MIB)).unwrap();
    for copy in [&path, &clone] {
        assert!(data_bytes(copy) < MIB, "{} has {} bytes of data", copy.display(), data_bytes(copy));
        let mut start = vec![0; 8 * MIB as usize];
        File::open(copy).unwrap().read_exact(&mut start).unwrap();
        assert_eq!(start, fs::read(&built).unwrap());
    }
    let mut grown = File::options().read(true).write(true).open(&clone).unwrap();
    grown.write_all(b"mine!").unwrap();
    grown.seek(SeekFrom::Start(8 * MIB)).unwrap();
    let mut rest = Vec::new();
    grown.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, vec![0; 56 * MIB as usize]);
    assert_eq!(fs::read(&path).unwrap(), fs::read(&built).unwrap());
    disks.close().unwrap();
}

#[test]
fn the_same_content_is_one_image_wherever_its_holes_are() {
    let dir = DataDir::new();
    let disks = without_mkfs(dir.path()).unwrap();
    let sparse = image(dir.path());
    let dense = dir.path().join("dense");
    fs::write(&dense, fs::read(&sparse).unwrap()).unwrap();
    assert!(data_bytes(&dense) > 4 * data_bytes(&sparse));
    let path = disks.import_image(&sparse, &base()).unwrap();
    assert_eq!(disks.import_image(&dense, &base()).unwrap(), path);
    assert_eq!(fs::read_dir(dir.path().join("images")).unwrap().count(), 1);

    // One byte, and a longer hole at the end, are each another image.
    File::options().write(true).open(&dense).unwrap().write_all_at(b"x", 5 * MIB).unwrap();
    let known = path.file_stem().unwrap().to_str().unwrap().rsplit_once('-').unwrap().1;
    assert_eq!(disks.import_known_image(&sparse, &base(), known).unwrap(), path);
    let other = disks.import_known_image(&dense, &base(), known);
    assert!(matches!(other, Err(Error::ImageChanged(_))), "{other:?}");
    assert_eq!(fs::read_dir(dir.path().join("images")).unwrap().count(), 1);
    assert_ne!(disks.import_image(&dense, &base()).unwrap(), path);
    File::options().write(true).open(&sparse).unwrap().set_len(9 * MIB).unwrap();
    assert_ne!(disks.import_image(&sparse, &base()).unwrap(), path);
}

#[test]
fn who_asks_for_what_a_directory_cannot_do_is_told() {
    let dir = DataDir::new();
    let refused = Disks::open_with(dir.path(), "test", Some(Backend::Reflink), "/nonexistent/mkfs.xfs".as_ref());
    assert!(matches!(refused, Err(Error::RunMkfs(_))), "{refused:?}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    let copies = Disks::open(dir.path(), "test", Some(Backend::Copy)).unwrap();
    assert_eq!((copies.backend(), copies.root()), (Backend::Copy, dir.path()));
}

#[test]
fn a_full_file_system_is_its_own_error() {
    let built = image(tempfile::tempdir().unwrap().keep().as_path());
    let small = tempfile::tempdir().unwrap();
    rustix::mount::mount("tmpfs", small.path(), "tmpfs", MountFlags::empty(), c"size=128k").unwrap();
    let disks = without_mkfs(small.path()).unwrap();
    let cloned = disks.create(&built, &small.path().join("clone"), None);
    let imported = disks.import_image(&built, &base());
    let images = fs::read_dir(small.path().join("images")).unwrap().count();
    let names = fs::read_dir(small.path()).unwrap().count();
    rustix::mount::unmount(small.path(), UnmountFlags::DETACH).unwrap();
    fs::remove_dir_all(built.parent().unwrap()).unwrap();
    assert!(matches!(cloned, Err(Error::NoSpace { .. })), "{cloned:?}");
    assert!(matches!(imported, Err(Error::NoSpace { .. })), "{imported:?}");
    assert_eq!((images, names), (0, 1));
}

#[test]
fn an_image_name_is_one_harmless_path_component() {
    for good in ["a", "minimal", "python-3.13_slim", "0"] {
        assert_eq!(good.parse::<ImageName>().unwrap().to_string(), good);
    }
    for bad in ["", ".", "..", ".hidden", "-f", "a/b", "a\0b", "A", "é", &"a".repeat(65)] {
        assert_eq!(bad.parse::<ImageName>(), Err(InvalidName), "{bad:?}");
    }
}
