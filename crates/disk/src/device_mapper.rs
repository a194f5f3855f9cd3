//! Device-mapper: the ioctls of `linux/dm-ioctl.h` that copy-on-write devices need, and nothing of what they are for.

use std::fs::{File, OpenOptions};
use std::io;

use rustix::io::Errno;
use rustix::ioctl;
use rustix::time::Timespec;

const CONTROL: &str = "/dev/mapper/control";

const DEV_CREATE: u8 = 3;
const DEV_REMOVE: u8 = 4;
const DEV_SUSPEND: u8 = 6;
const DEV_STATUS: u8 = 7;
const LIST_DEVICES: u8 = 2;
const TABLE_LOAD: u8 = 9;
const TABLE_STATUS: u8 = 12;

const READ_ONLY: u32 = 1 << 0;
const SUSPEND: u32 = 1 << 1;
const BUFFER_FULL: u32 = 1 << 8;
/// No file system of the host is on any of these devices.
const SKIP_LOCKFS: u32 = 1 << 10;

/// Tells udev to leave the device alone, where there is one: what a guest writes to its disk is no matter for whatever
/// looks for file systems and volume groups on the host. These are the flags of libdevmapper that turn off the rules for
/// subsystems, disks and others, and the one that says that they are meant.
const UDEV_KEEPS_OFF: u32 = (0x02 | 0x04 | 0x08 | 0x40) << 16;

/// Size of `struct dm_ioctl`, in bytes, and where its fields are.
const HEADER: usize = 312;
const NAME: std::ops::Range<usize> = 48..176;
/// Size of `struct dm_target_spec`, in bytes.
const TARGET: usize = 40;
/// What an answer may take at first.
const ANSWER: usize = 16 << 10;

/// Somebody else may look at a device that has just been let go, as udev does.
const BUSY_ATTEMPTS: usize = 100;
const BUSY_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// One stretch of a device, in sectors of 512 bytes.
pub(crate) struct Target {
    pub(crate) start: u64,
    pub(crate) length: u64,
    pub(crate) kind: &'static str,
    pub(crate) parameters: String,
}

/// The way to the kernel.
#[derive(Debug)]
pub(crate) struct DeviceMapper {
    control: File,
}

/// A buffer that begins with a `dm_ioctl`.
struct Call<'a> {
    opcode: ioctl::Opcode,
    buffer: &'a mut [u8],
}

// SAFETY: device-mapper reads and writes as many bytes at the pointer as the field `data_size` says, which `request` and
// `DeviceMapper::call` set to the buffer's length; all bytes of it are initialised, and any bytes are valid ones.
unsafe impl ioctl::Ioctl for Call<'_> {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> ioctl::Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        self.buffer.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(_: ioctl::IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// What the kernel said.
struct Answer(Vec<u8>);

impl Answer {
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().expect("four bytes"))
    }

    fn flags(&self) -> u32 {
        self.u32(28)
    }

    /// The number after the major one, of which the kernel puts the low byte first and the rest above the major.
    fn minor(&self) -> u32 {
        let device = u64::from_le_bytes(self.0[40..48].try_into().expect("eight bytes"));
        ((device & 0xff) | ((device >> 12) & 0xfff_ff00)) as u32
    }

    fn data(&self) -> &[u8] {
        let start = self.u32(16) as usize;
        self.0.get(start..).unwrap_or_default()
    }
}

impl DeviceMapper {
    /// `NotFound` where the kernel has none.
    pub(crate) fn open() -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
        Ok(Self { control })
    }

    /// Makes a device of these targets and lets it work. Leaves nothing when it fails.
    pub(crate) fn create(&self, name: &str, is_read_only: bool, targets: &[Target]) -> io::Result<u32> {
        let flags = if is_read_only { READ_ONLY } else { 0 };
        let minor = self.call(DEV_CREATE, name, flags, 0, &[])?.minor();
        let made = self
            .call(TABLE_LOAD, name, flags, 0, targets)
            .and_then(|_| self.call(DEV_SUSPEND, name, flags, UDEV_KEEPS_OFF, &[]));
        match made {
            Ok(_) => Ok(minor),
            Err(error) => {
                // What it failed of is told.
                let _ = self.remove(name);
                Err(error)
            }
        }
    }

    /// The minor number of a device, if it is there.
    pub(crate) fn find(&self, name: &str) -> io::Result<Option<u32>> {
        match self.call(DEV_STATUS, name, 0, 0, &[]) {
            Ok(answer) => Ok(Some(answer.minor())),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes a device, if it is there and nobody uses it: `ResourceBusy` otherwise.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        match self.call(DEV_REMOVE, name, 0, UDEV_KEEPS_OFF, &[]) {
            Err(error) if !is_missing(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// As [`remove`](Self::remove), and waits for who still uses it, for at most five seconds.
    pub(crate) fn remove_when_unused(&self, name: &str) -> io::Result<()> {
        for _ in 1..BUSY_ATTEMPTS {
            match self.remove(name) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                removed => return removed,
            }
            // Nobody says when a device is let go. This is no thread that anything else waits for.
            let _ = rustix::thread::nanosleep(&BUSY_PAUSE);
        }
        self.remove(name)
    }

    /// Waits for what is being written, and holds back what comes.
    pub(crate) fn suspend(&self, name: &str) -> io::Result<()> {
        self.call(DEV_SUSPEND, name, SUSPEND | SKIP_LOCKFS, 0, &[]).map(drop)
    }

    /// Lets a suspended device go on.
    pub(crate) fn resume(&self, name: &str) -> io::Result<()> {
        self.call(DEV_SUSPEND, name, 0, UDEV_KEEPS_OFF, &[]).map(drop)
    }

    /// What the first target of a device says of itself.
    pub(crate) fn status(&self, name: &str) -> io::Result<String> {
        let answer = self.call(TABLE_STATUS, name, 0, 0, &[])?;
        Ok(text(answer.data().get(TARGET..).unwrap_or_default()))
    }

    /// The names of all devices.
    pub(crate) fn list(&self) -> io::Result<Vec<String>> {
        let answer = self.call(LIST_DEVICES, "", 0, 0, &[])?;
        let (mut names, mut rest) = (Vec::new(), answer.data());
        // Each is the device's number (zero where there is none at all), the distance to the next, and a name.
        while rest.len() > 12 && rest[..8] != [0; 8] {
            names.push(text(&rest[12..]));
            let next = u32::from_le_bytes(rest[8..12].try_into().expect("four bytes")) as usize;
            if next == 0 {
                break;
            }
            rest = rest.get(next..).unwrap_or_default();
        }
        Ok(names)
    }

    fn call(&self, command: u8, name: &str, flags: u32, event: u32, targets: &[Target]) -> io::Result<Answer> {
        let mut room = ANSWER;
        loop {
            let mut buffer = request(name, flags, event, targets, room)?;
            // _IOWR(0xfd, command, struct dm_ioctl)
            let opcode = (3 << 30) | ((HEADER as ioctl::Opcode) << 16) | (0xfd << 8) | ioctl::Opcode::from(command);
            // SAFETY: `buffer` is as `Call` needs it, and `control` is device-mapper's control device.
            unsafe { ioctl::ioctl(&self.control, Call { opcode, buffer: &mut buffer }) }?;
            let answer = Answer(buffer);
            if answer.flags() & BUFFER_FULL == 0 {
                return Ok(answer);
            }
            room *= 4;
        }
    }
}

/// A `dm_ioctl` and the targets after it, with at least `room` bytes for what is answered in their place.
fn request(name: &str, flags: u32, event: u32, targets: &[Target], room: usize) -> io::Result<Vec<u8>> {
    if name.len() >= NAME.len() {
        return Err(Errno::NAMETOOLONG.into());
    }
    let mut buffer = vec![0; HEADER];
    buffer[NAME.start..NAME.start + name.len()].copy_from_slice(name.as_bytes());
    for target in targets {
        let begin = buffer.len();
        buffer.extend(target.start.to_le_bytes());
        buffer.extend(target.length.to_le_bytes());
        // A status that is only answered, and the distance to the next, which is known below.
        buffer.extend([0; 8]);
        let mut kind = [0; 16];
        kind[..target.kind.len()].copy_from_slice(target.kind.as_bytes());
        buffer.extend(kind);
        buffer.extend(target.parameters.as_bytes());
        buffer.push(0);
        buffer.resize(buffer.len().next_multiple_of(8), 0);
        let next = (buffer.len() - begin) as u32;
        buffer[begin + 20..begin + 24].copy_from_slice(&next.to_le_bytes());
    }
    buffer.resize(buffer.len().max(HEADER + room), 0);
    // Version 4 of the interface, any of it.
    let fields = [4, 0, 0, buffer.len() as u32, HEADER as u32, targets.len() as u32, 0, flags, event];
    for (index, field) in fields.iter().enumerate() {
        buffer[index * 4..index * 4 + 4].copy_from_slice(&field.to_le_bytes());
    }
    Ok(buffer)
}

fn is_missing(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NXIO.raw_os_error())
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
