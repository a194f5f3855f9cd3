//! Loop devices: the two ioctls of `linux/loop.h` that a volume and a copy-on-write disk need.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::ioctl::{self, Setter};

const LOOP_CTL_GET_FREE: ioctl::Opcode = 0x4C82;
const LOOP_CONFIGURE: ioctl::Opcode = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// Somebody else may take the free device we were told of; after so many times something else is wrong.
const ATTEMPTS: usize = 64;

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// `LOOP_CTL_GET_FREE`: no argument, and the answer is the return value.
struct GetFree;

// SAFETY: the request takes no pointer, and its result is the return value alone.
unsafe impl ioctl::Ioctl for GetFree {
    type Output = u32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> ioctl::Opcode {
        LOOP_CTL_GET_FREE
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(out: ioctl::IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<u32> {
        u32::try_from(out).map_err(|_| Errno::OVERFLOW)
    }
}

/// An attached loop device. The kernel detaches it when the last user is gone: this handle, a mount or a device over it.
pub(crate) struct LoopDevice {
    path: PathBuf,
    open: File,
}

impl LoopDevice {
    /// The device that holds `backing` already, or a new one.
    ///
    /// One is left behind attached when a volume is still mounted in a mount namespace that we do not see. A second
    /// device over the same file would give XFS two writers.
    pub(crate) fn attach(backing: &Path, block_size: u32) -> io::Result<Self> {
        match find(backing)? {
            Some(path) => Ok(Self { open: File::open(&path)?, path }),
            None => Self::over(backing, block_size),
        }
    }

    /// A new device over `backing`, which nobody else writes to.
    pub(crate) fn over(backing: &Path, block_size: u32) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(backing)?;
        // The kernel ignores direct IO by itself where the file below cannot do it.
        attach_new(&file, block_size, LO_FLAGS_DIRECT_IO)
    }

    /// A new device over `backing` that nobody can write to. It reads through the page cache, so that what many devices
    /// over this one begin as is read once.
    pub(crate) fn read_only(backing: &Path, block_size: u32) -> io::Result<Self> {
        attach_new(&File::open(backing)?, block_size, LO_FLAGS_READ_ONLY)
    }

    /// Its numbers, as device-mapper reads them.
    pub(crate) fn numbers(&self) -> io::Result<String> {
        let device = self.open.metadata()?.rdev();
        Ok(format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device)))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// The loop device whose backing file is `backing`, an absolute path without links.
pub(crate) fn find(backing: &Path) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        // Other devices, and loop devices that are free, have no such file.
        let attached = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if Path::new(attached.trim_end_matches('\n')) == backing {
            return Ok(Some(Path::new("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
}

fn attach_new(backing: &File, block_size: u32, flags: u32) -> io::Result<LoopDevice> {
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    for _ in 0..ATTEMPTS {
        // SAFETY: `GetFree` describes LOOP_CTL_GET_FREE, and `control` is the loop control device.
        let number = unsafe { ioctl::ioctl(&control, GetFree) }?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let open = OpenOptions::new().read(true).write(true).open(&path)?;
        match configure(&open, backing, block_size, flags | LO_FLAGS_AUTOCLEAR) {
            Ok(()) => return Ok(LoopDevice { path, open }),
            Err(Errno::BUSY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::BUSY.into())
}

fn configure(device: &File, backing: &File, block_size: u32, flags: u32) -> Result<(), Errno> {
    let config = LoopConfig {
        fd: u32::try_from(backing.as_raw_fd()).map_err(|_| Errno::BADF)?,
        block_size,
        info: LoopInfo64 { flags, ..LoopInfo64::EMPTY },
        reserved: [0; 8],
    };
    // SAFETY: LOOP_CONFIGURE reads one `loop_config`, whose layout `LoopConfig` has, and keeps no pointer to it.
    unsafe { ioctl::ioctl(device, Setter::<LOOP_CONFIGURE, LoopConfig>::new(config)) }
}

impl LoopInfo64 {
    const EMPTY: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}
