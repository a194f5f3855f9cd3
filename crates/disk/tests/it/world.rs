//! A data directory with an image in it, and the count of what it leaves.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use disk::{Attached, Backend, Disks};
use rustix::mount::UnmountFlags;
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;
pub const IMAGE: u64 = 8 * MIB;

/// A file system of its own in a file, XFS that can share blocks.
pub struct Small {
    dir: TempDir,
}

impl Small {
    pub fn new(size: u64) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (file, mount) = (dir.path().join("xfs"), dir.path().join("mount"));
        File::create(&file).unwrap().set_len(size).unwrap();
        fs::create_dir(&mount).unwrap();
        let run = |program: &str, args: &[&str], path: &Path| {
            let made = Command::new(program).args(args).arg(&file).arg(path).status().unwrap();
            assert!(made.success(), "{program}");
        };
        assert!(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&file).status().unwrap().success());
        run("mount", &["-o", "loop"], &mount);
        Self { dir }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("mount")
    }

    pub fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.path()).unwrap();
        stat.f_bavail * stat.f_frsize
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.path(), UnmountFlags::DETACH);
    }
}

/// Disks of one kind in a directory of their own.
pub struct World {
    pub disks: Disks,
    pub image: PathBuf,
    pub backend: Backend,
    instance: String,
    data: PathBuf,
    /// Gone with it, where it is of its own.
    dir: Option<TempDir>,
}

impl World {
    pub fn new(backend: Backend) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let data = dir.path().to_owned();
        let mut world = Self::on(backend, &data);
        world.dir = Some(dir);
        world
    }

    /// In a directory that is there.
    pub fn on(backend: Backend, dir: &Path) -> Self {
        static WORLDS: AtomicUsize = AtomicUsize::new(0);
        let instance = format!("{:x}.{}", std::process::id(), WORLDS.fetch_add(1, Ordering::Relaxed));
        let disks = Disks::open(dir, &instance, Some(backend)).unwrap();
        assert_eq!(disks.backend(), backend);
        let image = disks.import_image(&built(dir), &"base".parse().unwrap()).unwrap();
        fs::remove_file(dir.join("built.ext4")).unwrap();
        Self { disks, image, backend, instance, data: dir.to_owned(), dir: None }
    }

    /// As when the process that had it was killed.
    pub fn open_again(&mut self) {
        self.disks = Disks::open(&self.data, &self.instance, Some(self.backend)).unwrap();
    }

    /// The path of a disk in a directory of its own, which is made.
    pub fn place(&self, name: &str) -> PathBuf {
        let dir = self.disks.root().join(name);
        fs::create_dir_all(&dir).unwrap();
        dir.join("rootfs.ext4")
    }

    /// A disk of `size` bytes that is attached to whom this returns.
    pub fn made(&self, name: &str, size: u64) -> (PathBuf, File) {
        let disk = self.place(name);
        self.disks.create(&self.image, &disk, Some(size)).unwrap();
        let user = self.attach(&disk);
        (disk, user)
    }

    /// Opens it as a VMM does.
    pub fn attach(&self, disk: &Path) -> File {
        let path = match self.disks.attach(disk).unwrap() {
            Attached::File => disk.to_owned(),
            Attached::Device(device) => {
                assert!(fs::metadata(&device).unwrap().file_type().is_block_device());
                device
            }
        };
        File::options().read(true).write(true).open(path).unwrap()
    }

    /// All of a disk that is not attached, seen by attaching it.
    pub fn all_of(&self, disk: &Path) -> Vec<u8> {
        let user = self.attach(disk);
        let all = read_all(&user);
        drop(user);
        self.disks.detach(disk).unwrap();
        all
    }

    /// Ends it: nothing is left of what it had of the machine.
    pub fn end(self) {
        self.disks.close().unwrap();
        let devices = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
        let named = |path: PathBuf| {
            let name = fs::read_to_string(path.join("dm/name")).unwrap_or_default();
            let below = fs::read_to_string(path.join("loop/backing_file")).unwrap_or_default();
            let is_ours = name.contains(&self.instance) || below.starts_with(self.data.to_str().unwrap());
            is_ours.then_some((path, name, below))
        };
        let left: Vec<_> = devices.filter_map(named).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Where a test has failed; else this was done.
        let _ = self.disks.close();
    }
}

/// A sparse file with data at its start, in its middle and at its end.
fn built(dir: &Path) -> PathBuf {
    let path = dir.join("built.ext4");
    fs::write(&path, "").unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(IMAGE).unwrap();
    for (bytes, at) in image_data() {
        file.write_all_at(&bytes, at).unwrap();
    }
    file.sync_all().unwrap();
    path
}

fn image_data() -> [(Vec<u8>, u64); 3] {
    [(b"first".to_vec(), 0), (vec![7; 300_000], 3 * MIB + 17), (b"last".to_vec(), IMAGE - 4)]
}

/// What a disk of `size` bytes is in the beginning.
pub fn fresh(size: u64) -> Vec<u8> {
    let mut all = vec![0; size as usize];
    for (bytes, at) in image_data() {
        all[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
    }
    all
}

pub fn read_all(file: &File) -> Vec<u8> {
    let size = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0)).unwrap();
    rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0)).unwrap();
    let mut all = vec![0; size as usize];
    file.read_exact_at(&mut all, 0).unwrap();
    all
}

/// Numbers that are all determined by the first.
pub struct Random(pub u64);

impl Random {
    /// Below `end`. SplitMix64, and the modulo's bias is of no concern.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}
