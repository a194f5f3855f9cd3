//! Power cuts: whatever was not synced is lost in part, and no pause that was acknowledged is.
//!
//! A capsule is paused and resumed as the agent does it (`crates/agent/src/capsule`), with what the agent uses for it; its guest
//! is this test, which writes to a disk and a memory. The power goes at a request to the disk below that chance has picked.

#![expect(clippy::print_stderr, reason = "a failed run is understood by its seed")]

pub mod device;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use disk::{Attached, Backend, Disks, Error};
use rustix::fs::MemfdFlags;
use snapshot::{Snapshot, Store};

use crate::world::{IMAGE, MIB, Random, fresh, read_all};
use device::Power;

const SIZE: u64 = IMAGE + 4 * MIB;
const MEMORY: u64 = 2 * MIB;
const PAGE: u64 = 4096;

/// How often the power goes.
fn cuts() -> usize {
    std::env::var("WRENN_CUTS").map_or(12, |cuts| cuts.parse().expect("WRENN_CUTS is a number"))
}

/// Within how many requests to the disk below the power goes. Rounds take about a hundred of them, and several times that with
/// device-mapper, which writes its exceptions beside what they are of and syncs both.
fn within(backend: Backend) -> u64 {
    match backend {
        Backend::Reflink | Backend::Copy => 600,
        Backend::DeviceMapper => 4000,
    }
}

type Anything = Box<dyn std::error::Error>;

/// What a guest is.
#[derive(Clone, PartialEq)]
struct Guest {
    disk: Vec<u8>,
    memory: Vec<u8>,
}

/// What the capsule may be after a power cut.
struct Promise {
    /// Paused, as one of these.
    paused: Vec<Guest>,
    /// Gone with the machine that it ran on.
    lost: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Running,
    Pausing,
    Paused,
    Resuming,
}

const PHASES: [(&str, Phase); 4] = [
    ("running", Phase::Running),
    ("pausing", Phase::Pausing),
    ("paused", Phase::Paused),
    ("resuming", Phase::Resuming),
];

/// The capsule on the disk, as an agent has it.
struct Capsule {
    disks: Disks,
    store: Store,
    image: PathBuf,
    dir: PathBuf,
}

impl Capsule {
    /// What an agent does that starts: everything is as the record says, or becomes so.
    fn open(power: &Power, backend: Backend) -> Result<(Self, Option<u32>), Anything> {
        let data = power.path().join("data");
        fs::create_dir_all(&data)?;
        let disks = Disks::open(&data, &format!("{:x}.p", std::process::id()), Some(backend))?;
        disks.sweep(&[])?;
        let built = data.join("built.ext4");
        fs::write(&built, fresh(IMAGE))?;
        let image = disks.import_image(&built, &"base".parse()?)?;
        let dir = disks.root().join("capsules");
        fs::create_dir_all(&dir)?;
        let headers = fs::read_dir(&dir)?.map(|entry| entry.unwrap().path());
        let headers: Vec<_> =
            headers.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("memory-")).collect();
        let (store, _) = Store::open(disks.root(), headers)?;
        let mut capsule = Self { disks, store, image, dir };
        let paused = capsule.recover()?;
        Ok((capsule, paused))
    }

    fn recover(&mut self) -> Result<Option<u32>, Anything> {
        let Some((phase, number)) = self.record() else { return Ok(None) };
        self.disks.detach(&self.disk())?;
        match phase {
            Phase::Paused => {}
            Phase::Resuming => {
                let before = self.dir.join(format!("disk-{number}"));
                if before.exists() {
                    fs::rename(before, self.disk())?;
                    sync(&self.dir)?;
                }
            }
            Phase::Pausing if self.header(number).exists() => {}
            Phase::Running | Phase::Pausing => return Ok(None),
        }
        self.write_record(Phase::Paused, number, true)?;
        let before = self.dir.join(format!("disk-{number}"));
        if before.exists() {
            fs::remove_file(before)?;
        }
        Ok(Some(number))
    }

    fn disk(&self) -> PathBuf {
        self.dir.join("rootfs.ext4")
    }

    fn header(&self, number: u32) -> PathBuf {
        self.dir.join(format!("memory-{number}"))
    }

    fn record(&self) -> Option<(Phase, u32)> {
        let text = fs::read_to_string(self.dir.join("record")).ok()?;
        let (phase, number) = text.split_once(' ')?;
        let phase = PHASES.iter().find(|(name, _)| *name == phase)?.1;
        Some((phase, number.parse().ok()?))
    }

    fn write_record(&self, phase: Phase, number: u32, is_durable: bool) -> io::Result<()> {
        let name = PHASES.iter().find(|(_, of)| *of == phase).unwrap().0;
        let new = self.dir.join("record.new");
        let mut file = File::create(&new)?;
        write!(file, "{name} {number}")?;
        file.sync_all()?;
        fs::rename(new, self.dir.join("record"))?;
        if is_durable { sync(&self.dir) } else { Ok(()) }
    }

    fn attach(&self) -> Result<File, Anything> {
        let path = match self.disks.attach(&self.disk())? {
            Attached::File => self.disk(),
            Attached::Device(device) => device,
        };
        Ok(File::options().read(true).write(true).open(path)?)
    }

    /// What the paused capsule is.
    fn saved(&self, number: u32) -> Result<Guest, Anything> {
        let snapshot = Snapshot::open(self.store.generations(), &self.header(number))?;
        let mut memory = vec![0; MEMORY as usize];
        snapshot.read_exact_at(&mut memory, 0)?;
        let mut disk = read_all(&self.disks.flat(&self.disk())?);
        disk.truncate(SIZE as usize);
        Ok(Guest { disk, memory })
    }

    /// Boots, or resumes what is paused, runs, and pauses again. Says in `promise` what may be if it ends anywhere.
    fn round(
        &mut self,
        paused: Option<u32>,
        guest: &mut Guest,
        promise: &mut Promise,
        random: &mut Random,
    ) -> Result<u32, Anything> {
        let number = match paused {
            None => {
                (promise.lost, *guest) = (true, Guest { disk: fresh(SIZE), memory: vec![0; MEMORY as usize] });
                for entry in fs::read_dir(&self.dir)? {
                    let path = entry?.path();
                    match path.file_name().unwrap().to_str().unwrap().starts_with("memory-") {
                        true => self.store.remove(&path)?,
                        false => fs::remove_file(&path)?,
                    }
                }
                self.disks.create(&self.image, &self.disk(), Some(SIZE))?;
                0
            }
            Some(number) => {
                self.write_record(Phase::Resuming, number, true)?;
                let before = self.dir.join(format!("disk-{number}"));
                beside_others(&self.dir, || self.disks.copy_durably(&self.disk(), &before))?;
                sync(&self.dir)?;
                number
            }
        };
        let user = self.attach()?;
        if paused.is_some() {
            // A resumed guest writes before anybody has said that it runs.
            write(guest, &user, None, random)?;
        }
        promise.lost = true;
        self.write_record(Phase::Running, number, paused.is_some())?;
        promise.paused.clear();
        if paused.is_some() {
            fs::remove_file(self.dir.join(format!("disk-{number}")))?;
        }
        let dump = File::from(rustix::fs::memfd_create("dump", MemfdFlags::CLOEXEC)?);
        dump.set_len(MEMORY)?;
        write(guest, &user, Some(&dump), random)?;

        // The pause.
        let next = number + 1;
        self.write_record(Phase::Pausing, next, false)?;
        let parent = (number > 0).then(|| self.header(number));
        let packed = self.store.pack(&dump, parent.as_deref())?;
        self.disks.sync(&self.disk())?;
        promise.paused.push(guest.clone());
        self.store.commit(&packed, &self.header(next))?;
        self.write_record(Phase::Paused, next, true)?;
        // Acknowledged.
        promise.lost = false;
        drop(user);
        self.disks.detach(&self.disk())?;
        // That nothing of it runs is recorded too.
        self.write_record(Phase::Paused, next, false)?;
        if number > 0 {
            self.store.remove(&self.header(number))?;
            self.store.collect()?;
        }
        Ok(next)
    }
}

/// What a guest does: it writes here and there, and has some of it written out.
fn write(guest: &mut Guest, user: &File, dump: Option<&File>, random: &mut Random) -> io::Result<()> {
    for _ in 0..random.below(12) {
        let at = random.below(SIZE - 1);
        let bytes = vec![random.below(256) as u8; (random.below(150_000) + 1).min(SIZE - at) as usize];
        user.write_all_at(&bytes, at)?;
        guest.disk[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        if random.below(4) == 0 {
            user.sync_data()?;
        }
    }
    let Some(dump) = dump else { return Ok(()) };
    for _ in 0..random.below(40) + 1 {
        let page = random.below(MEMORY / PAGE) * PAGE;
        let bytes = [random.below(255) as u8 + 1; PAGE as usize];
        dump.write_all_at(&bytes, page)?;
        guest.memory[page as usize..(page + PAGE) as usize].copy_from_slice(&bytes);
    }
    Ok(())
}

fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Does `it` while others sync what is theirs in the same file system, without end and once after it: names and lengths become
/// durable with that, and blocks that wait to be written do not.
fn beside_others<T>(dir: &Path, it: impl FnOnce() -> T) -> T {
    let is_done = AtomicBool::new(false);
    // They see that the power is gone, too, and it is not theirs to say so.
    let others = || -> io::Result<()> {
        loop {
            let is_last = is_done.load(Ordering::Relaxed);
            let mut file = File::create(dir.join("others"))?;
            file.write_all(b"theirs")?;
            file.sync_all()?;
            if is_last {
                return Ok(());
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(others);
        let done = it();
        is_done.store(true, Ordering::Relaxed);
        done
    })
}

pub fn a_pause_that_was_acknowledged_survives_a_power_cut(backend: Backend) {
    let seed = std::env::var("WRENN_SEED").map_or(u64::from(std::process::id()), |seed| seed.parse().unwrap());
    eprintln!("WRENN_SEED={seed}");
    let mut random = Random(seed);
    let mkfs: &[&str] = match backend {
        Backend::Reflink => &["mkfs.xfs", "-q", "-m", "reflink=1"],
        Backend::DeviceMapper | Backend::Copy => &["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0"],
    };
    let mut power = Power::new(320 * MIB, mkfs);
    let nothing = Guest { disk: Vec::new(), memory: Vec::new() };
    let (mut guest, mut promise) = (nothing, Promise { paused: Vec::new(), lost: true });
    let (mut kept, mut acknowledged) = (0, 0);
    let mut cut = 0;
    // Until there was something to lose, which chance has in its hands, too.
    while cut < cuts() || kept == 0 {
        assert!(cut < 20 * cuts(), "too little happens to say anything");
        let (mut capsule, mut paused) = Capsule::open(&power, backend).expect("what was there can be opened");
        match paused {
            None => assert!(promise.lost, "cut {cut}: an acknowledged pause is lost"),
            Some(number) => {
                let found = capsule.saved(number).expect("a pause can be read");
                let is_promised = promise.paused.contains(&found);
                assert!(is_promised, "cut {cut}: it is paused as something that it was not");
                guest = found;
                kept += 1;
            }
        }
        promise = Promise { lost: paused.is_none(), paused: paused.iter().map(|_| guest.clone()).collect() };
        power.cut_after(random.below(within(backend)));
        let error = loop {
            match capsule.round(paused, &mut guest, &mut promise, &mut random) {
                Ok(number) => (paused, acknowledged) = (Some(number), acknowledged + 1),
                Err(error) => break error,
            }
        };
        assert!(power.is_off(), "cut {cut}: {error}");
        eprintln!("cut {cut}: {error}");
        // The machine is gone, and what the kernel of this one still has of it.
        match capsule.disks.close() {
            Ok(()) | Err(Error::Device { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        drop(capsule);
        power.restore(&mut random);
        cut += 1;
    }
    eprintln!("{acknowledged} pauses were acknowledged; {kept} of {cut} times one was there after the power cut");
}
