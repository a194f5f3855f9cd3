//! What this host has promised to capsules, and whether it can promise more.
//!
//! A capsule is admitted before anything of it is made, and again whenever it resumes. What it is promised, its memory and
//! processors, is its own from then until nothing of it runs: a [`Promise`] is that, and there is one ledger, so of two starts
//! at once that do not both fit one is refused. Processors and memory are counted by promise and not by use: a guest that is
//! idle now may use all it was promised a moment later. Disk is counted by what is free, since disks and snapshots share what
//! is the same. Network slots are the network's to count.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use agent_api::HostFull;

use crate::capsule::Spec;

const MIB: u64 = 1 << 20;

/// How far an operator lets a host be promised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// How many times the memory that is not reserved may be promised.
    pub memory_factor: f64,
    /// Memory in MiB that is kept for the host and its VMMs; `None` is an eighth of it.
    pub memory_reserve_mib: Option<u64>,
    /// How many virtual processors each processor may be promised as.
    pub vcpu_factor: f64,
    /// Disk space in MiB that no start may count on.
    pub disk_reserve_mib: u64,
}

impl Default for Limits {
    /// Memory once, as a guest that has none is a guest that dies. Processors sixteen times, as guests mostly wait.
    fn default() -> Self {
        Self { memory_factor: 1.0, memory_reserve_mib: None, vcpu_factor: 16.0, disk_reserve_mib: 1024 }
    }
}

/// What a host can run out of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Memory of guests, in MiB.
    Memory,
    /// Virtual processors.
    Vcpus,
    /// Space for disks and snapshots, in MiB.
    Disk,
    /// Networks.
    Slots,
    /// Starts of any kind: the host is being stopped.
    Starts,
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::Vcpus => "vcpus",
            Self::Disk => "disk",
            Self::Slots => "slots",
            Self::Starts => "starts",
        })
    }
}

/// Why a host takes no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub struct Full {
    /// What there is not enough of.
    pub resource: Resource,
    /// How much was asked for.
    pub asked: u64,
    /// How much is promised already, or taken.
    pub used: u64,
    /// How much there is to be had.
    pub limit: u64,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resource, asked, used, limit } = self;
        let unit = match resource {
            Resource::Memory | Resource::Disk => " (MiB)",
            Resource::Vcpus | Resource::Slots => "",
            Resource::Starts => return f.write_str("the host is being stopped and starts nothing"),
        };
        write!(f, "the host has not enough {resource} left: {asked} asked, {used} of {limit} in use{unit}")
    }
}

impl From<Full> for HostFull {
    fn from(full: Full) -> Self {
        let Full { resource, asked, used, limit } = full;
        Self { resource: resource.to_string(), asked, used, limit, ..Default::default() }
    }
}

/// How much of each resource there is, and how much is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// MiB of guests' memory: promised, and to be promised at most.
    pub memory_mib: (u64, u64),
    /// Virtual processors: promised, and to be promised at most.
    pub vcpus: (u64, u64),
    /// MiB of the data directory's file system: taken, and to be taken at most.
    pub disk_mib: (u64, u64),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Promised {
    memory_mib: u64,
    vcpus: u64,
}

/// The one ledger of a host.
#[derive(Debug)]
pub struct Admission {
    memory_limit_mib: u64,
    vcpu_limit: u64,
    disk_reserve_mib: u64,
    /// Where disks and snapshots go, and what is below that if it is a volume in a file.
    places: Vec<PathBuf>,
    promised: Arc<Mutex<Promised>>,
    is_stopped: AtomicBool,
}

/// What one capsule was promised. Dropped, it is promised to nobody.
#[derive(Debug)]
pub struct Promise {
    ledger: Arc<Mutex<Promised>>,
    of: Promised,
}

impl Drop for Promise {
    fn drop(&mut self) {
        let mut promised = lock(&self.ledger);
        promised.memory_mib -= self.of.memory_mib;
        promised.vcpus -= self.of.vcpus;
    }
}

impl Admission {
    /// The ledger of this machine, on which nothing is promised yet, with disks in `places`.
    pub fn new(limits: &Limits, places: Vec<PathBuf>) -> Self {
        let memory = rustix::system::sysinfo();
        let memory_mib = u64::from(memory.mem_unit) * memory.totalram / MIB;
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
        Self::of(limits, memory_mib, cpus, places)
    }

    fn of(limits: &Limits, memory_mib: u64, cpus: u64, places: Vec<PathBuf>) -> Self {
        let reserve = limits.memory_reserve_mib.unwrap_or(memory_mib / 8);
        // What does not fit into the type is more than there is of anything.
        let times = |count: u64, factor: f64| (count as f64 * factor.max(0.0)) as u64;
        Self {
            memory_limit_mib: times(memory_mib.saturating_sub(reserve), limits.memory_factor),
            vcpu_limit: times(cpus, limits.vcpu_factor),
            disk_reserve_mib: limits.disk_reserve_mib,
            places,
            promised: Arc::default(),
            is_stopped: AtomicBool::new(false),
        }
    }

    /// Has nothing start any more.
    pub fn stop(&self) {
        self.is_stopped.store(true, Ordering::SeqCst);
    }

    /// Refuses when nothing starts any more.
    pub fn check_starts(&self) -> Result<(), Full> {
        match self.is_stopped.load(Ordering::SeqCst) {
            true => Err(Full { resource: Resource::Starts, asked: 1, used: 0, limit: 0 }),
            false => Ok(()),
        }
    }

    /// Promises a capsule what it needs to run, or says what there is not enough of.
    pub fn admit(&self, spec: &Spec) -> Result<Promise, Full> {
        self.admit_all(std::slice::from_ref(spec)).map(|mut promises| promises.remove(0))
    }

    /// Promises all of these capsules what they need, or none of them.
    pub fn admit_all(&self, specs: &[Spec]) -> Result<Vec<Promise>, Full> {
        self.check_starts()?;
        let asked = specs.iter().map(needs).fold(Promised::default(), Promised::plus);
        // To be paused is what every capsule must be able to be.
        self.check_disk(asked.memory_mib)?;
        let mut promised = lock(&self.promised);
        for (resource, asked, used, limit) in [
            (Resource::Memory, asked.memory_mib, promised.memory_mib, self.memory_limit_mib),
            (Resource::Vcpus, asked.vcpus, promised.vcpus, self.vcpu_limit),
        ] {
            if used.saturating_add(asked) > limit {
                return Err(Full { resource, asked, used, limit });
            }
        }
        *promised = promised.plus(asked);
        Ok(specs.iter().map(|spec| Promise { ledger: self.promised.clone(), of: needs(spec) }).collect())
    }

    /// What a capsule has that runs already, whatever the limits are now.
    pub fn acknowledge(&self, spec: &Spec) -> Promise {
        let mut promised = lock(&self.promised);
        *promised = promised.plus(needs(spec));
        Promise { ledger: self.promised.clone(), of: needs(spec) }
    }

    /// How much there is, and how much is in use.
    pub fn room(&self) -> Room {
        let promised = *lock(&self.promised);
        let disk = self.places.iter().filter_map(|place| self.disk(place).ok());
        let disk_mib = disk.min_by_key(|(used, limit)| limit.saturating_sub(*used)).unwrap_or_default();
        Room {
            memory_mib: (promised.memory_mib, self.memory_limit_mib),
            vcpus: (promised.vcpus, self.vcpu_limit),
            disk_mib,
        }
    }

    fn check_disk(&self, asked: u64) -> Result<(), Full> {
        for place in &self.places {
            // What cannot be asked will be told by whoever writes there.
            let Ok((used, limit)) = self.disk(place) else { continue };
            if used.saturating_add(asked) > limit {
                return Err(Full { resource: Resource::Disk, asked, used, limit });
            }
        }
        Ok(())
    }

    /// MiB that are taken, and that may be, of the file system that `place` is on.
    fn disk(&self, place: &Path) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::statvfs(place)?;
        let mib = |blocks: u64| blocks.saturating_mul(stat.f_frsize) / MIB;
        let used = mib(stat.f_blocks.saturating_sub(stat.f_bfree));
        // What only root may take, or is kept back otherwise, is nobody's here.
        Ok((used, (used + mib(stat.f_bavail)).saturating_sub(self.disk_reserve_mib)))
    }
}

impl Promised {
    fn plus(self, other: Self) -> Self {
        Self {
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
            vcpus: self.vcpus.saturating_add(other.vcpus),
        }
    }
}

fn needs(spec: &Spec) -> Promised {
    Promised { memory_mib: spec.memory_mib.into(), vcpus: spec.vcpus.into() }
}

fn lock(promised: &Mutex<Promised>) -> std::sync::MutexGuard<'_, Promised> {
    promised.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use api::CapsuleId;

    use super::*;

    fn spec(memory_mib: u32, vcpus: u32) -> Spec {
        Spec {
            id: CapsuleId::random(),
            image: String::new(),
            vcpus,
            memory_mib,
            disk_mib: 1,
            timeout_sec: 0,
            default_env: BTreeMap::new(),
            template_id: String::new(),
        }
    }

    fn limits() -> Limits {
        Limits { memory_factor: 1.5, memory_reserve_mib: Some(96), vcpu_factor: 2.0, disk_reserve_mib: 0 }
    }

    #[test]
    fn what_is_promised_is_promised_once() {
        let host = Admission::of(&limits(), 1120, 2, Vec::new());
        assert_eq!(host.room(), Room { memory_mib: (0, 1536), vcpus: (0, 4), disk_mib: (0, 0) });
        let one = host.admit(&spec(1024, 1)).unwrap();
        let full = host.admit(&spec(513, 1)).unwrap_err();
        assert_eq!(full, Full { resource: Resource::Memory, asked: 513, used: 1024, limit: 1536 });
        assert_eq!(full.to_string(), "the host has not enough memory left: 513 asked, 1024 of 1536 in use (MiB)");
        let two = host.admit(&spec(512, 1)).unwrap();
        drop(one);
        let full = host.admit(&spec(1, 4)).unwrap_err();
        assert_eq!(full.to_string(), "the host has not enough vcpus left: 4 asked, 1 of 4 in use");
        // All of them or none.
        assert!(host.admit_all(&[spec(500, 1), spec(500, 1), spec(500, 1)]).is_err());
        assert_eq!(host.room().memory_mib, (512, 1536));
        let rest = host.admit_all(&[spec(500, 1), spec(500, 1)]).unwrap();
        assert_eq!(host.room().memory_mib, (1512, 1536));
        // What runs already, runs.
        let more = host.acknowledge(&spec(4096, 8));
        assert_eq!((host.room().memory_mib.0, host.room().vcpus.0), (5608, 11));
        drop((two, rest, more));
        assert_eq!((host.room().memory_mib.0, host.room().vcpus.0), (0, 0));
    }

    #[test]
    fn of_many_at_once_as_many_are_admitted_as_fit() {
        let host = Admission::of(&limits(), 1120, 64, Vec::new());
        let admitted: Vec<_> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..64).map(|_| scope.spawn(|| host.admit(&spec(100, 1)))).collect();
            starts.into_iter().filter_map(|start| start.join().unwrap().ok()).collect()
        });
        assert_eq!((admitted.len(), host.room().memory_mib.0), (15, 1500));
    }

    #[test]
    fn a_start_must_be_able_to_end_as_a_pause() {
        let place = tempfile::tempdir().unwrap();
        let host = |disk_reserve_mib| {
            let limits = Limits { memory_factor: 1e9, disk_reserve_mib, ..limits() };
            Admission::of(&limits, 1120, 1, vec![place.path().to_owned()])
        };
        drop(host(0).admit(&spec(1, 1)).unwrap());
        let full = host(0).admit(&spec(u32::MAX, 1)).unwrap_err();
        assert_eq!((full.resource, full.asked), (Resource::Disk, u64::from(u32::MAX)));
        assert!(full.used < full.limit, "{full:?}");
        assert_eq!(host(u64::MAX).admit(&spec(1, 1)).unwrap_err().resource, Resource::Disk);
    }

    #[test]
    fn factors_that_are_out_of_reach_are_no_limit() {
        let limits = Limits { memory_factor: f64::INFINITY, vcpu_factor: -1.0, ..limits() };
        let host = Admission::of(&limits, 1120, 2, Vec::new());
        assert_eq!((host.memory_limit_mib, host.vcpu_limit), (u64::MAX, 0));
        assert_eq!(Admission::of(&limits, 10, 2, Vec::new()).memory_limit_mib, 0);
    }
}
