//! A disk that can lose its power: a file, served by this process, whose writes are volatile until it is synced. A loop device
//! over it passes on the flushes of the file system there, so what is lost here is what a real disk's cache may lose.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use rustix::mount::UnmountFlags;
use tempfile::TempDir;

use crate::world::Random;

const NAME: &str = "disk";
const DISK: INodeNo = INodeNo(2);
/// What is kept or lost as a whole.
const BLOCK: usize = 4096;
/// Nothing changes behind the kernel's back.
const FOR_EVER: Duration = Duration::from_secs(3600);

/// What the disk has on its platters and in its cache.
struct Platters {
    size: u64,
    /// What is there when the power is.
    current: File,
    /// What is there after it was gone.
    durable: File,
    /// Written since the last sync, in order.
    volatile: VecDeque<(u64, Vec<u8>)>,
    /// After so many more writes and syncs the power goes.
    left: Option<u64>,
}

impl Platters {
    fn is_off(&self) -> bool {
        self.left == Some(0)
    }

    /// Counts a request down. False when the power is gone.
    fn serve(&mut self) -> bool {
        if self.is_off() {
            return false;
        }
        self.left = self.left.map(|left| left - 1);
        !self.is_off()
    }

    /// Of what was not synced each block reaches the platters or does not, as chance has it; nothing else is left.
    fn lose(&mut self, random: &mut Random) {
        let odds = [1, 2, 4, 64][random.below(4) as usize];
        let mut touched = Vec::new();
        for (at, bytes) in std::mem::take(&mut self.volatile) {
            touched.push((at, bytes.len()));
            for (index, block) in bytes.chunks(BLOCK).enumerate() {
                if random.below(odds) == 0 && odds > 1 {
                    self.durable.write_all_at(block, at + (index * BLOCK) as u64).unwrap();
                }
            }
        }
        for (at, len) in touched {
            let mut bytes = vec![0; len];
            self.durable.read_exact_at(&mut bytes, at).unwrap();
            self.current.write_all_at(&bytes, at).unwrap();
        }
        self.left = None;
    }
}

#[derive(Clone)]
struct Server(Arc<Mutex<Platters>>);

impl Server {
    fn platters(&self) -> MutexGuard<'_, Platters> {
        self.0.lock().unwrap()
    }

    fn attr(&self, ino: INodeNo) -> FileAttr {
        let (kind, size) =
            if ino == DISK { (FileType::RegularFile, self.platters().size) } else { (FileType::Directory, 0) };
        FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: BLOCK as u32,
        }
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&FOR_EVER, &self.attr(DISK), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOR_EVER, &self.attr(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Every read and write comes here.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        len: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let platters = self.platters();
        if platters.is_off() {
            return reply.error(Errno::EIO);
        }
        let mut bytes = vec![0; u64::from(len).min(platters.size.saturating_sub(at)) as usize];
        platters.current.read_exact_at(&mut bytes, at).unwrap();
        reply.data(&bytes);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        bytes: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut platters = self.platters();
        if platters.is_off() {
            return reply.error(Errno::EIO);
        }
        let is_served = platters.serve();
        // Also the one at which the power goes may reach the platters, whatever its sender is told.
        platters.current.write_all_at(bytes, at).unwrap();
        platters.volatile.push_back((at, bytes.to_vec()));
        match is_served {
            true => reply.written(bytes.len() as u32),
            false => reply.error(Errno::EIO),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut platters = self.platters();
        if !platters.serve() {
            return reply.error(Errno::EIO);
        }
        for (at, bytes) in std::mem::take(&mut platters.volatile) {
            platters.durable.write_all_at(&bytes, at).unwrap();
        }
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}

/// A file system on such a disk.
pub struct Power {
    dir: TempDir,
    server: Server,
    session: Option<BackgroundSession>,
}

impl Power {
    /// Makes an empty one, which is mounted.
    pub fn new(size: u64, mkfs: &[&str]) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let platter = || {
            let file = tempfile::tempfile_in("/var/tmp").unwrap();
            file.set_len(size).unwrap();
            file
        };
        let (current, durable) = (platter(), platter());
        let server =
            Server(Arc::new(Mutex::new(Platters { size, current, durable, volatile: VecDeque::new(), left: None })));
        for name in ["served", "mount"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let mut power = Self { dir, server, session: None };
        power.serve();
        run(mkfs[0], mkfs[1..].iter().copied().map(OsStr::new).chain([power.disk().as_os_str()]));
        power.mount();
        power
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("mount")
    }

    fn disk(&self) -> PathBuf {
        self.dir.path().join("served").join(NAME)
    }

    fn serve(&mut self) {
        let served = self.dir.path().join("served");
        self.session = Some(fuser::spawn_mount(self.server.clone(), served, &Config::default()).unwrap());
    }

    fn mount(&self) {
        run("mount", ["-o".as_ref(), "loop".as_ref(), self.disk().as_os_str(), self.path().as_os_str()]);
    }

    /// Has the power go after so many more writes and syncs.
    pub fn cut_after(&self, requests: u64) {
        self.server.platters().left = Some(requests);
    }

    /// Whether it is gone.
    pub fn is_off(&self) -> bool {
        self.server.platters().is_off()
    }

    /// Has the power be back, after it has gone if it was there still. Nobody may use the file system any more.
    pub fn restore(&mut self, random: &mut Random) {
        self.cut_after(0);
        self.unmount();
        self.server.platters().lose(random);
        self.serve();
        self.mount();
    }

    fn unmount(&mut self) {
        rustix::mount::unmount(self.path(), UnmountFlags::empty()).unwrap();
        // The loop device goes with the mount; what the kernel knew of the file goes with the other one.
        while is_backing(&self.disk()) {
            let _ = rustix::thread::nanosleep(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 5_000_000 });
        }
        self.session.take().unwrap().umount_and_join().unwrap();
    }
}

impl Drop for Power {
    fn drop(&mut self) {
        // Where a test has failed this is all that can be done.
        self.cut_after(0);
        let _ = rustix::mount::unmount(self.path(), UnmountFlags::DETACH);
        drop(self.session.take());
    }
}

fn is_backing(path: &Path) -> bool {
    let devices = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path().join("loop/backing_file"));
    devices.filter_map(|file| fs::read_to_string(file).ok()).any(|file| Path::new(file.trim_end()) == path)
}

fn run<'a>(program: &str, args: impl IntoIterator<Item = &'a OsStr>) {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(out.status.success(), "{program}: {}", String::from_utf8_lossy(&out.stderr));
}
