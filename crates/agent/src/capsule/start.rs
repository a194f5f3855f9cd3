//! Starting a capsule, wherever it begins: slot, then network and VMM beside disk and pager, then the guest's first answer.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use disk::Attached;
use guest_api::{Metadata, RestoreKind};
use network::slot::{GUEST_MAC, Slot, TAP};
use snapshot::Snapshot;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use vmm::client::{Boot, Client, Load, Memory};
use vmm::process::{Exit, Launch, Process};

use super::pager::{self, Served};
use super::record::{Base, Journal, Phase, Record, Saved};
use super::{Spec, files};
use crate::admission::{Full, Resource};
use crate::guest::{self, Guest, Restoring};
use crate::host::{Host, blocking};
use crate::point::Point;

/// From the VMM's start to the guest's first answer. A loaded machine without KVM needs seconds, an emulated one a minute;
/// control waits 180 s.
const GUEST_LIMIT: Duration = Duration::from_secs(170);
/// From the VMM's exec to its API.
const SOCKET_LIMIT: Duration = Duration::from_secs(20);
/// What the guest kernel is told: a quiet serial console, its address, and envd as its init.
const BOOT_ARGS: &str = "console=ttyS0 quiet loglevel=1 reboot=k panic=1 pci=off random.trust_cpu=on \
    i8042.noaux i8042.nomux i8042.dumbkbd \
    ip=169.254.0.21::169.254.0.22:255.255.255.252:capsule:eth0:off init=/usr/local/bin/envd";

/// The step of a start that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The record could not be written.
    #[error("writing the capsule's record")]
    Record(#[source] io::Error),
    /// No network slot could be claimed.
    #[error("claiming a network slot")]
    Claim(#[source] network::Error),
    /// The network could not be made.
    #[error("making the capsule's network")]
    Network(#[source] network::Error),
    /// What it may reach outside could not be said.
    #[error("limiting what the capsule may reach")]
    Egress(#[source] crate::egress::Error),
    /// The image is not on this host.
    #[error("this host has no image `{0}`")]
    NoImage(String),
    /// The root disk could not be made.
    #[error("making the root disk")]
    Disk(#[source] disk::Error),
    /// What the capsule begins from could not be taken over.
    #[error("taking over the snapshot")]
    Place(#[source] io::Error),
    /// Its share of the memory could not be taken over.
    #[error("taking over the snapshot's memory")]
    Link(#[source] snapshot::Error),
    /// The snapshot's memory is damaged.
    #[error("opening the snapshot's memory")]
    Snapshot(#[source] snapshot::OpenError),
    /// The VMM's state file is not the one that was saved.
    #[error("the snapshot's VMM state is damaged")]
    State,
    /// The VMM's cgroup could not be made.
    #[error("making the VMM's control group")]
    Cgroup(#[source] vmm::cgroup::Error),
    /// The VMM process could not be started.
    #[error("starting the VMM")]
    Launch(#[source] vmm::process::Error),
    /// The pager could not be started.
    #[error("starting the pager")]
    Pager(#[source] vmm::process::Error),
    /// Some of its memory is in an object store, and this host is not told of one.
    #[error("its memory is in an object store, and this host has none")]
    NoObjects,
    /// The VMM refused what it was asked.
    #[error("configuring the VMM")]
    Configure(#[source] vmm::client::Error),
    /// The VMM ended before the guest answered.
    #[error("the VMM ended during the start ({0})")]
    Died(Exit),
    /// The pager ended before the guest answered.
    #[error("the pager ended during the start ({0})")]
    PagerDied(Exit),
    /// The pager had nothing to serve for too long.
    #[error("the process that serves its memory was not ready in time")]
    PagerSilent,
    /// The guest booted for too long.
    #[error("the guest did not answer within {} s", GUEST_LIMIT.as_secs())]
    Silent,
    /// The guest answered, but not as it must.
    #[error("preparing the guest")]
    Guest(#[source] guest::Error),
    /// What ran of it before could not be ended, or given back.
    #[error("ending what ran of it before")]
    Unfinished,
    /// Somebody destroyed the capsule meanwhile.
    #[error("destroyed during the start")]
    Cancelled,
}

impl Error {
    /// Whether what the capsule begins from is damaged, so that trying again is of no use.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Snapshot(_) | Self::State | Self::PagerDied(pager::DAMAGED))
    }

    /// What the host had not enough of, if that is why.
    pub fn is_full(&self) -> Option<Full> {
        let slots = u64::from(Slot::MAX.get());
        let full = Full { resource: Resource::Slots, asked: 1, used: slots, limit: slots };
        matches!(self, Self::Claim(network::Error::Exhausted)).then_some(full)
    }

    /// Whether the cause may be what the capsule begins from, so that beginning otherwise may succeed.
    pub fn is_of_origin(&self) -> bool {
        match self {
            Self::Place(_)
            | Self::Link(_)
            | Self::Snapshot(_)
            | Self::State
            | Self::Configure(_)
            | Self::Died(_)
            | Self::PagerDied(_)
            | Self::PagerSilent
            | Self::Silent
            | Self::Guest(_) => true,
            Self::Record(_)
            | Self::Claim(_)
            | Self::Network(_)
            | Self::Egress(_)
            | Self::NoImage(_)
            | Self::Disk(_)
            | Self::Cgroup(_)
            | Self::Launch(_)
            | Self::Pager(_)
            | Self::NoObjects
            | Self::Unfinished
            | Self::Cancelled => false,
        }
    }
}

/// What a capsule begins from.
#[derive(Clone, Copy)]
pub enum Origin<'a> {
    /// Its image, which is booted.
    Image,
    /// Its own pause, which it keeps until the guest has confirmed.
    Pause,
    /// What its image is after a boot, in place of that.
    Boot(&'a Point),
    /// The same, to learn what those who begin there need first.
    Rehearsal(&'a Point),
    /// What another was, with an identity of its own.
    Point(&'a Point),
}

impl<'a> Origin<'a> {
    fn point(self) -> Option<&'a Point> {
        match self {
            Self::Image | Self::Pause => None,
            Self::Boot(point) | Self::Rehearsal(point) | Self::Point(point) => Some(point),
        }
    }

    /// Where it is kept what those who begin here need first: `dir` is the capsule's. A fork's point is begun from once.
    fn working_set(self, dir: &Path) -> Option<PathBuf> {
        match self {
            Self::Image => None,
            Self::Pause => Some(dir.join(files::WORKING_SET)),
            Self::Boot(point) | Self::Rehearsal(point) => Some(point.dir.join(files::WORKING_SET)),
            Self::Point(point) => (!point.is_doomed()).then(|| point.dir.join(files::WORKING_SET)),
        }
    }

    /// Whether this start says what the next one from the same place fetches. A boot snapshot is begun from by strangers, and none
    /// decides for the next.
    fn is_noted(self) -> bool {
        !matches!(self, Self::Boot(_))
    }
}

/// A capsule that runs: what its driver holds.
pub struct Running {
    /// The VMM.
    pub process: Process,
    /// What serves its memory, if it did not boot.
    pub pager: Option<Process>,
    /// The way into the guest.
    pub guest: Arc<Guest>,
}

impl Running {
    /// Readies the guest for a snapshot. If the VMM ends meanwhile, whoever asks it next is told.
    pub async fn prepare(&self) {
        tokio::select! {
            () = self.guest.prepare() => {}
            _ = self.process.exited() => {}
        }
    }

    /// The VMM's API.
    pub async fn client(&self) -> Result<Client, vmm::client::Error> {
        Client::connect(SOCKET_LIMIT, &self.process).await
    }
}

/// Makes the capsule that `journal` describes run. On failure the caller releases what the journal names.
pub async fn start(
    host: &Arc<Host>,
    journal: &mut Journal,
    origin: Origin<'_>,
    cancelled: &CancellationToken,
) -> Result<Running, Error> {
    let spec = journal.record().spec.clone();
    let dir = journal.dir().to_owned();
    // Each step says when it is done: `WRENN_LOG=agent=debug` shows where a start's time goes, and benchmarks read it.
    debug!(capsule = %spec.id, "recorded");

    let claim = host.claim_slot().map_err(Error::Claim)?;
    let slot = claim.slot();
    journal.hold(claim);
    journal.update(|record| record.slot = Some(slot)).map_err(Error::Record)?;
    debug!(capsule = %spec.id, "slot claimed");
    host.cgroup(spec.id).create().map_err(Error::Cgroup)?;
    files::make_vm(&dir).map_err(Error::Place)?;

    // Both are waited for even if one fails: what is half-made must not grow behind the back of the release. A pager that may
    // never be ready is not: it is a process, which the release ends.
    let (process, placed) = tokio::join!(
        launch(host, journal.record(), &dir, slot),
        place(host, &dir, origin, journal.record(), host.user(slot), cancelled)
    );
    let (process, Placed { saved, pager }) = (process?, placed?);
    let recorded = journal.update(|record| {
        record.vmm = Some(process.identity());
        record.pager = pager.as_ref().map(Process::identity);
        if let Some(saved) = &saved {
            record.snapshots = record.snapshots.max(saved.number);
            record.base = Base::Snapshot(saved.clone());
        }
        match origin {
            Origin::Image => record.image = host.images.get(&record.spec.image).and_then(|image| file_name(image)),
            Origin::Boot(point) | Origin::Rehearsal(point) | Origin::Point(point) => {
                record.image = point.meta.image.clone();
            }
            Origin::Pause => {}
        }
    });
    recorded.map_err(Error::Record)?;
    if cancelled.is_cancelled() {
        return Err(Error::Cancelled);
    }

    let guest = Guest::new(slot.host_ip(), journal.record().token.clone());
    let bring_up = async {
        let client = Client::connect(SOCKET_LIMIT, &process).await;
        let client = client.map_err(Error::Configure)?;
        debug!(capsule = %spec.id, "VMM listens");
        let versions = match &saved {
            None => boot(host, &client, &guest, &spec, slot).await?,
            Some(_) => {
                load(&client, &spec).await?;
                host.network_attached(slot).await.map_err(Error::Network)?;
                restore(&guest, &spec, &dir, origin, &journal.record().versions).await?
            }
        };
        Ok((client.version().to_string(), versions))
    };
    let (vmm_version, envd_version) = tokio::select! {
        up = bring_up => up?,
        exit = process.exited() => return Err(Error::Died(exit)),
        exit = pager::lost(pager.as_ref(), &dir) => return Err(Error::PagerDied(exit)),
        () = tokio::time::sleep(GUEST_LIMIT) => return Err(Error::Silent),
        () = cancelled.cancelled() => return Err(Error::Cancelled),
    };
    // Durable where that ends a pause: after a power cut it would be resumed with a disk that has moved on.
    let running = |record: &mut Record| {
        record.phase = Phase::Running;
        record.generation += 1;
        // The kernel is the one that was booted, here and now or in the snapshot.
        let booted = origin.point().map_or(&record.versions, |point| &point.meta.versions);
        let kernel = booted.get_key_value("kernel_version").map(|(name, version)| (name.clone(), version.clone()));
        record.versions = host.versions(vmm_version, envd_version);
        record.versions.extend(kernel);
    };
    match origin {
        Origin::Pause => journal.commit(running).map_err(Error::Record)?,
        Origin::Image | Origin::Boot(_) | Origin::Rehearsal(_) | Origin::Point(_) => {
            journal.update(running).map_err(Error::Record)?;
        }
    }
    let number = saved.map(|saved| saved.number);
    files::tidy(&host.memory, &dir, number);
    Ok(Running { process, pager, guest: Arc::new(guest) })
}

/// Makes the network, and the VMM in it.
async fn launch(host: &Host, record: &Record, dir: &Path, slot: Slot) -> Result<Process, Error> {
    let Record { spec, egress, .. } = record;
    host.create_network(slot).await.map_err(Error::Network)?;
    // Before there is anyone who could send.
    if !egress.is_open() {
        host.egress.set(slot, egress).await.map_err(Error::Egress)?;
    }
    debug!(capsule = %spec.id, "network made");
    let launch = Launch {
        binary: &host.config.vmm,
        id: &spec.id.to_string(),
        dir: &dir.join(files::VM),
        kernel: &host.config.kernel,
        netns: &slot.netns_path(),
        cgroup: &host.cgroup(spec.id),
        log: &dir.join(files::VMM_LOG),
        user: host.user(slot),
        size: vmm::jail::Size { vcpus: spec.vcpus, memory_mib: spec.memory_mib, disk_mib: spec.disk_mib },
    };
    let process = launch.spawn().await.map_err(Error::Launch)?;
    debug!(capsule = %spec.id, "VMM executed");
    Ok(process)
}

/// What a capsule begins from, in its directory.
struct Placed {
    /// The snapshot; none is booted from.
    saved: Option<Saved>,
    pager: Option<Process>,
}

/// Puts what the capsule begins from into its directory, gives it to `user`, as whom its VMM runs, and starts the pager where
/// there is memory to serve.
async fn place(
    host: &Host,
    dir: &Path,
    origin: Origin<'_>,
    record: &Record,
    user: u32,
    cancelled: &CancellationToken,
) -> Result<Placed, Error> {
    let Record { spec, base, .. } = record;
    let rootfs = dir.join(files::DISK);
    let saved = match origin {
        Origin::Image => {
            let image = host.images.get(&spec.image).ok_or_else(|| Error::NoImage(spec.image.clone()))?;
            let size = u64::from(spec.disk_mib) << 20;
            host.clone_image(image, &rootfs, size).await.map_err(Error::Disk)?;
            give_disk(host, dir, user).await?;
            debug!(capsule = %spec.id, "disk made");
            return Ok(Placed { saved: None, pager: None });
        }
        Origin::Pause => {
            let Base::Snapshot(saved) = base else { return Err(Error::State) };
            // The guest is about to write to the disk, and if it comes to nothing this is what the pause had.
            let disk = dir.join(files::disk(saved.number));
            host.clone_disk_durably(&rootfs, &disk).await.map_err(Error::Disk)?;
            let parent = dir.to_owned();
            // One that was booted has no working set of its own yet; its image's boot snapshot is nearly the same guest.
            let boot = host.images.get(&spec.image).and_then(|image| host.boots.get(image, spec.sizes()));
            let durable = move || {
                if let Some(boot) = boot.filter(|_| !parent.join(files::WORKING_SET).exists()) {
                    take_working_set(&boot.dir, &parent)?;
                }
                files::sync(&parent)
            };
            blocking(durable).await.map_err(Error::Place)?;
            saved.clone()
        }
        Origin::Boot(point) | Origin::Rehearsal(point) | Origin::Point(point) => {
            let disk = point.dir.join(files::DISK);
            host.clone_disk(&disk, &rootfs).await.map_err(Error::Disk)?;
            let saved = Saved { number: 1, state: point.meta.state.clone() };
            let (memory, from, to, number) = (host.memory.clone(), point.dir.clone(), dir.to_owned(), saved.number);
            let link = move || {
                std::fs::copy(from.join(files::STATE), to.join(files::state(number))).map_err(Error::Place)?;
                take_working_set(&from, &to).map_err(Error::Place)?;
                memory.link(&from.join(files::MEMORY), &to.join(files::memory(number))).map_err(Error::Link)
            };
            blocking(link).await?;
            saved
        }
    };
    give_disk(host, dir, user).await?;
    files::give_state(dir, saved.number).map_err(Error::Place)?;
    debug!(capsule = %spec.id, "snapshot placed");
    let working_set = origin.working_set(dir).map(|path| (path, origin.is_noted()));
    if record.is_remote {
        check_state(dir, &saved).await?;
        let started = pager::start(host, spec, dir, user, Served::Remote, working_set);
        let pager = cancelled.run_until_cancelled(started).await.ok_or(Error::Cancelled)??;
        return Ok(Placed { saved: Some(saved), pager: Some(pager) });
    }
    // Until the pager has opened everything, a merge of this memory must not take anything away.
    let held = host.memory.hold(&dir.join(files::memory(saved.number))).map_err(Error::Link)?;
    check(host, dir, &saved).await?;
    let started = pager::start(host, spec, dir, user, Served::Own(saved.number), working_set);
    let pager = cancelled.run_until_cancelled(started).await.ok_or(Error::Cancelled)??;
    drop(held);
    debug!(capsule = %spec.id, "pager is ready");
    Ok(Placed { saved: Some(saved), pager: Some(pager) })
}

/// Makes the disk ready, and gives it to the VMM.
async fn give_disk(host: &Host, dir: &Path, user: u32) -> Result<(), Error> {
    let attached = host.attach_disk(&dir.join(files::DISK)).await.map_err(Error::Disk)?;
    match attached {
        Attached::File => files::give_disk(dir, user),
        Attached::Device(device) => files::give_device(dir, user, &device),
    }
    .map_err(Error::Place)
}

/// Until its own resumes say otherwise, a capsule needs first what all need that begin at the point in `from`.
fn take_working_set(from: &Path, to: &Path) -> io::Result<()> {
    match std::fs::copy(from.join(files::WORKING_SET), to.join(files::WORKING_SET)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Refuses a damaged snapshot before anything is begun from it. Pages are checked as they are read.
async fn check(host: &Host, dir: &Path, saved: &Saved) -> Result<(), Error> {
    let (generations, header) = (host.memory.generations().to_owned(), dir.join(files::memory(saved.number)));
    blocking(move || Snapshot::open(&generations, &header).map(drop)).await.map_err(Error::Snapshot)?;
    check_state(dir, saved).await
}

async fn check_state(dir: &Path, saved: &Saved) -> Result<(), Error> {
    let state = dir.join(files::state(saved.number));
    match blocking(move || files::digest(&state)).await {
        Ok(found) if found == saved.state => Ok(()),
        _ => Err(Error::State),
    }
}

/// Boots the image. Returns envd's version.
async fn boot(host: &Host, client: &Client, guest: &Guest, spec: &Spec, slot: Slot) -> Result<String, Error> {
    let boot = Boot {
        kernel: Path::new(vmm::KERNEL),
        boot_args: BOOT_ARGS,
        rootfs: &Path::new(vmm::CAPSULE_DIR).join(files::DISK),
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        tap: TAP,
        mac: &GUEST_MAC.map(|octet| format!("{octet:02X}")).join(":"),
        mtu: host.mtu(),
    };
    client.configure(&boot).await.map_err(Error::Configure)?;
    client.put_mmds(&metadata(spec)).await.map_err(Error::Configure)?;
    debug!(capsule = %spec.id, "VMM configured");
    client.start().await.map_err(Error::Configure)?;
    host.network_attached(slot).await.map_err(Error::Network)?;
    debug!(capsule = %spec.id, "guest started");
    let health = guest.first_answer().await.map_err(Error::Guest)?;
    debug!(capsule = %spec.id, "guest answered");
    guest.init(&spec.default_env).await.map_err(Error::Guest)?;
    debug!(capsule = %spec.id, "guest prepared");
    Ok(health.version)
}

/// Loads the snapshot and lets the guest go on.
async fn load(client: &Client, spec: &Spec) -> Result<(), Error> {
    let inside = Path::new(vmm::CAPSULE_DIR);
    let load = Load {
        state: &inside.join(files::STATE),
        memory: Memory::Uffd(&inside.join(files::PAGER_SOCKET)),
        resume: false,
        track_dirty_pages: true,
        tap: None,
        vsock: None,
        clock_realtime: false,
    };
    client.load_snapshot(&load).await.map_err(Error::Configure)?;
    debug!(capsule = %spec.id, "snapshot loaded");
    client.put_mmds(&metadata(spec)).await.map_err(Error::Configure)?;
    client.resume().await.map_err(Error::Configure)?;
    debug!(capsule = %spec.id, "guest started");
    Ok(())
}

/// Has the guest be nobody's twin. Returns envd's version: the one that is in the memory.
async fn restore(
    guest: &Guest,
    spec: &Spec,
    dir: &Path,
    origin: Origin<'_>,
    versions: &std::collections::BTreeMap<String, String>,
) -> Result<String, Error> {
    let name = spec.id.to_string();
    let kind = if origin.point().is_some() { RestoreKind::Fork } else { RestoreKind::Resume };
    // What boots is called as its image says, also when its boot was done before.
    let hostname = matches!(origin, Origin::Point(_)).then_some(name.as_str());
    let (token, versions) =
        origin.point().map_or((guest.token(), versions), |point| (point.meta.token.as_str(), &point.meta.versions));
    let restoring = Restoring { kind, hostname, token, metadata: metadata(spec) };
    guest.restore(&spec.default_env, &restoring).await.map_err(Error::Guest)?;
    debug!(capsule = %spec.id, dir = %dir.display(), "guest restored");
    Ok(versions.get("envd_version").cloned().unwrap_or_default())
}

fn file_name(path: &Path) -> Option<String> {
    path.file_name().and_then(|name| name.to_str()).map(str::to_owned)
}

fn metadata(spec: &Spec) -> Metadata {
    Metadata { instance_id: spec.id.to_string(), env_id: spec.template_id.clone(), access_token_hash: None }
}
