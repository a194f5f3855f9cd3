//! What all capsules of one agent share: its configuration, network, disks, images and cgroups.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::CapsuleId;
use api::egress::Cidr;
use disk::{Attached, Backend, Disks, ImageName};
use network::slot::Slot;
use network::{Claim, Network, Traffic};
use objects::Objects;
use sha2::{Digest, Sha256};
use snapshot::Store;
use tokio::sync::Semaphore;
use tracing::{debug, info, warn};
use vmm::cgroup::Cgroup;

use crate::admission::{self, Admission};
use crate::audit;
use crate::boot::Boots;
use crate::capsule::files;
use crate::capsule::record::Journal;
use crate::egress::Egress;
use crate::point::Meta;

pub(crate) const CAPSULES: &str = "capsules";
pub(crate) const TEMPLATES: &str = "templates";
/// Points of forks, and guests that only exist to be boot snapshots.
pub(crate) const PASSING: &str = "passing";
pub(crate) const BOOTS: &str = "boots";
/// Has a file for each capsule that the object store is still to forget.
pub(crate) const FORGOTTEN: &str = "forgotten";
/// Has a file for each capsule that hibernated here.
pub(crate) const HIBERNATED: &str = "hibernated";
/// All directories whose directories may have headers.
const DIRS: [&str; 4] = [CAPSULES, TEMPLATES, PASSING, BOOTS];

/// The MTU of which nobody has to be told.
const ETHERNET: u16 = 1500;

/// Each sends several chunks at the same time.
const UPLOADS_AT_ONCE: usize = 2;

/// For what removes saved memory beside everything else to be done, when the disks are closed; and between two tries.
const BUSY_LIMIT: Duration = Duration::from_secs(5);
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// How an agent is set up. Complete before anything is opened.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where everything of this agent lies. Two agents never share one.
    pub dir: PathBuf,
    /// The VMM: `firecracker` or `firecracker-qemu`.
    pub vmm: PathBuf,
    /// The guest kernel, an ELF file.
    pub kernel: PathBuf,
    /// Image files by template name.
    pub templates: BTreeMap<String, PathBuf>,
    /// The program that serves the memory of resumed guests, with the words before its options: `wrenn pager`.
    pub pager: (PathBuf, Vec<String>),
    /// Where what is paused goes too, so that other hosts can resume it.
    pub objects: Option<objects::Config>,
    /// What image templates' capsules begin from in place of a boot: sizes taken when the host is opened. `None` makes no
    /// boot snapshots and uses none.
    pub boot_snapshots: Option<Sizes>,
    /// Private and link-local networks that capsules may reach although they are closed to them by default.
    pub egress_allow: Vec<Cidr>,
    /// Networks that no capsule may reach.
    pub egress_deny: Vec<Cidr>,
    /// How root disks are made. `None` is the best way that needs nothing but the directory.
    pub disks: Option<Backend>,
    /// How many network slots are kept ready; see [`SLOTS_READY`].
    pub slots_ready: usize,
    /// The user that the VMM in slot N runs as has the number `vmm_users` + N; see [`VMM_USERS`].
    pub vmm_users: u32,
    /// How far the host may be promised to capsules.
    pub limits: admission::Limits,
}

/// Where the users of VMMs begin: above those of people and services, and below those that are handed out for containers by
/// the million.
pub const VMM_USERS: u32 = 900_000;

/// How many network slots an agent keeps ready. A slot is made in some milliseconds, so that is what may be started within
/// as much and wait for none; each takes a few hundred KiB of the kernel's memory.
pub const SLOTS_READY: usize = 8;

/// The sizes of a capsule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sizes {
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Size of the root disk in MiB.
    pub disk_mib: u32,
}

/// The shared parts. Dropping it gives nothing back; see [`crate::Agent::close`].
pub struct Host {
    /// How it is set up.
    pub config: Config,
    /// Slots and firewall.
    network: Arc<Network>,
    /// Root disks.
    pub disks: Arc<Disks>,
    /// The cgroup above all capsules' cgroups.
    pub cgroups: Cgroup,
    /// Images by name, imported.
    pub images: BTreeMap<String, PathBuf>,
    /// The memory of everything that is saved here.
    pub memory: Store,
    /// What capsules may reach outside.
    pub egress: Egress,
    /// What is begun from in place of booting an image.
    pub boots: Boots,
    /// Where what is paused goes too.
    pub objects: Option<Objects>,
    /// What is promised to capsules that run.
    pub admission: Admission,
    /// One for each upload that may be under way.
    pub uploads: Semaphore,
    /// Held by who brings an image to the object store or from there.
    pub image_turn: tokio::sync::Mutex<()>,
    /// 8 hex characters that name what is machine-wide (claims, cgroup, firewall table) after the data directory.
    pub instance: String,
}

/// Opening what capsules share.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The data directory.
    #[error("opening the data directory {}", .0.display())]
    Dir(PathBuf, #[source] std::io::Error),
    /// The network.
    #[error("opening the network")]
    Network(#[source] network::Error),
    /// The disks.
    #[error("opening the disks")]
    Disks(#[source] disk::Error),
    /// An image.
    #[error("importing the image of template `{0}`")]
    Image(String, #[source] disk::Error),
    /// An image's name.
    #[error("the template name `{0}`")]
    ImageName(String, #[source] disk::InvalidName),
    /// The cgroups.
    #[error("making the cgroup of this agent")]
    Cgroup(#[source] vmm::cgroup::Error),
    /// The memory of what was saved.
    #[error("opening the store of saved memory")]
    Memory(#[source] snapshot::Error),
    /// The object store.
    #[error("opening the object store")]
    Objects(#[source] objects::Error),
}

/// Giving back what capsules shared.
#[derive(Debug, thiserror::Error)]
pub enum CloseError {
    /// A capsule is still there.
    #[error("capsules are still being ended")]
    InUse,
    /// The network.
    #[error("closing the network")]
    Network(#[source] network::Error),
    /// The cgroup.
    #[error("removing the agent's control group")]
    Cgroup(#[source] vmm::cgroup::Error),
    /// The disks.
    #[error("closing the disks")]
    Disks(#[source] disk::Error),
}

impl Host {
    /// Opens everything; images are imported if they are not there yet. Blocks for as long as that takes.
    pub fn open(mut config: Config) -> Result<Self, Error> {
        let make = |dir: &PathBuf| std::fs::create_dir_all(dir).and_then(|()| dir.canonicalize());
        config.dir = make(&config.dir).map_err(|source| Error::Dir(config.dir.clone(), source))?;
        let instance = instance(&config.dir);
        let network = Network::open(&network::Config {
            instance: instance.clone(),
            allow: config.egress_allow.iter().map(|cidr| cidr.range()).collect(),
            deny: config.egress_deny.iter().map(|cidr| cidr.range()).collect(),
            ready: config.slots_ready,
            users: config.vmm_users,
        })
        .map_err(Error::Network)?;
        let disks = Disks::open(&config.dir, &instance, config.disks).map(Arc::new).map_err(Error::Disks)?;
        let cgroups = Cgroup::root(&instance).map_err(Error::Cgroup)?;
        cgroups.create().map_err(Error::Cgroup)?;
        let mut images = BTreeMap::new();
        for (name, file) in &config.templates {
            let image_name: ImageName = name.parse().map_err(|source| Error::ImageName(name.clone(), source))?;
            let image = disks.import_image(file, &image_name).map_err(|source| Error::Image(name.clone(), source))?;
            images.insert(name.clone(), image);
        }
        // What an object store has may be over any image that was ever here.
        if config.objects.is_none() {
            collect_images(disks.root(), &images).map_err(|source| Error::Dir(disks.images(), source))?;
        }
        for dir in DIRS.into_iter().chain([FORGOTTEN, HIBERNATED]) {
            let dir = disks.root().join(dir);
            std::fs::create_dir_all(&dir).map_err(|source| Error::Dir(dir, source))?;
        }
        let (memory, broken) = Store::open(disks.root(), headers(disks.root())).map_err(Error::Memory)?;
        // What is named only by what an unfinished write left was never there.
        for header in broken.into_iter().filter(|header| header.path.exists()) {
            warn!(header = %header.path.display(), error = crate::chain(&header.error), "a snapshot of an earlier run is damaged");
        }
        let boots = Boots::open(&config, &images, disks.root(), &memory)
            .map_err(|source| Error::Dir(disks.root().join(BOOTS), source))?;
        let objects = config.objects.as_ref().map(Objects::open).transpose().map_err(Error::Objects)?;
        let (network, uploads) = (Arc::new(network), Semaphore::new(UPLOADS_AT_ONCE));
        let egress = Egress::new(network.clone());
        // The volume of disks may be a file that is larger than what is free below it.
        let admission = Admission::new(&config.limits, vec![disks.root().to_owned(), config.dir.clone()]);
        Ok(Self {
            config,
            network,
            egress,
            disks,
            cgroups,
            images,
            instance,
            memory,
            boots,
            objects,
            uploads,
            image_turn: tokio::sync::Mutex::default(),
            admission,
        })
    }

    /// The directory of all capsules' directories.
    pub fn capsules(&self) -> PathBuf {
        self.disks.root().join(CAPSULES)
    }

    /// The directory with a file for each capsule that the object store is still to forget.
    pub fn forgotten(&self) -> PathBuf {
        self.disks.root().join(FORGOTTEN)
    }

    /// The directory with a file for each capsule that hibernated here.
    pub fn hibernated(&self) -> PathBuf {
        self.disks.root().join(HIBERNATED)
    }

    /// Which object store there is, for records.
    pub fn store(&self) -> Option<String> {
        self.config.objects.as_ref().map(objects::Config::identity)
    }

    /// The imported image of that file name; whether it is there is not said.
    pub fn image_file(&self, name: &str) -> PathBuf {
        self.disks.root().join("images").join(name)
    }

    /// The directory of the templates that came of capsules.
    pub fn templates(&self) -> PathBuf {
        self.disks.root().join(TEMPLATES)
    }

    /// A directory that does not exist yet, for the template `name`: not the name alone, as a template of that name may have
    /// been deleted and still be in use.
    pub fn template_dir(&self, name: &str) -> PathBuf {
        self.templates().join(format!("{name}@{}", CapsuleId::random()))
    }

    /// A directory that does not exist yet, for a point that nobody will find again.
    pub fn passing(&self) -> PathBuf {
        self.passing_all().join(CapsuleId::random().to_string())
    }

    /// The directory of all those.
    pub fn passing_all(&self) -> PathBuf {
        self.disks.root().join(PASSING)
    }

    /// Claims a network slot, one that is ready if there is one.
    pub fn claim_slot(&self) -> Result<Claim, network::Error> {
        self.network.claim()
    }

    /// The claim to a slot that an earlier agent had, for the capsule that runs on in it.
    pub fn take_over_slot(&self, slot: Slot) -> Result<Claim, network::Error> {
        self.network.take_over(slot)
    }

    /// Makes the network of a claimed slot, if it was not ready.
    pub fn create_network(&self, slot: Slot) -> impl Future<Output = Result<(), network::Error>> + Send + use<> {
        let network = self.network.clone();
        blocking(move || network.create(slot))
    }

    /// The user that the VMM in a slot runs as.
    pub fn user(&self, slot: Slot) -> u32 {
        self.network.user(slot)
    }

    /// Has the kernel see that a VMM has attached to the slot, so that its guest is reached at once.
    pub fn network_attached(&self, slot: Slot) -> impl Future<Output = Result<(), network::Error>> + Send + use<> {
        let network = self.network.clone();
        blocking(move || network.attached(slot))
    }

    /// What guests are told that fits into one packet on the way out; none where it is what they expect.
    pub fn mtu(&self) -> Option<u16> {
        u16::try_from(self.network.mtu()).ok().filter(|mtu| *mtu != ETHERNET)
    }

    /// Takes a slot back, for the next or to be removed. No process of the capsule may be left.
    pub fn destroy_network(&self, claim: Claim) -> impl Future<Output = Result<(), network::Error>> + Send + use<> {
        let (network, egress) = (self.network.clone(), self.egress.clone());
        blocking(move || {
            egress.end(claim.slot());
            network.give_back(claim)
        })
    }

    /// What went through every slot of this agent.
    pub fn traffic(&self) -> Result<BTreeMap<Slot, Traffic>, network::Error> {
        self.network.traffic()
    }

    /// Takes every slot of an earlier run that is not in `keep`, and begins to keep slots ready.
    pub fn sweep_networks(&self, keep: &HashSet<Slot>) -> Result<(), network::Error> {
        self.network.sweep(keep).map(drop)
    }

    /// Gives back what is the host's own; every capsule must be gone.
    pub async fn close(self) -> Result<(), CloseError> {
        drop(self.egress);
        let network = Arc::into_inner(self.network).ok_or(CloseError::InUse)?;
        network.close().map_err(CloseError::Network)?;
        self.cgroups.remove().await.map_err(CloseError::Cgroup)?;
        let unused = async {
            loop {
                match self.disks.close() {
                    Err(disk::Error::Busy(_)) => tokio::time::sleep(BUSY_PAUSE).await,
                    closed => return closed,
                }
            }
        };
        let closed = tokio::time::timeout(BUSY_LIMIT, unused).await;
        closed.unwrap_or_else(|_| self.disks.close()).map_err(CloseError::Disks)
    }

    /// Makes a root disk of `size` bytes.
    pub fn clone_image(
        &self,
        image: &Path,
        dest: &Path,
        size: u64,
    ) -> impl Future<Output = Result<(), disk::Error>> + Send + use<> {
        let (disks, image, dest) = (self.disks.clone(), image.to_owned(), dest.to_owned());
        blocking(move || disks.create(&image, &dest, Some(size)))
    }

    /// Makes another disk that is what `disk` is now.
    pub fn clone_disk(&self, disk: &Path, dest: &Path) -> impl Future<Output = Result<(), disk::Error>> + Send + use<> {
        let (disks, disk, dest) = (self.disks.clone(), disk.to_owned(), dest.to_owned());
        blocking(move || disks.copy(&disk, &dest))
    }

    /// The same, for a disk that must be there as a whole if it is after a power cut; its name is the caller's to sync.
    pub fn clone_disk_durably(
        &self,
        disk: &Path,
        dest: &Path,
    ) -> impl Future<Output = Result<(), disk::Error>> + Send + use<> {
        let (disks, disk, dest) = (self.disks.clone(), disk.to_owned(), dest.to_owned());
        blocking(move || disks.copy_durably(&disk, &dest))
    }

    /// Makes a disk ready for a VMM, and says what that opens.
    pub fn attach_disk(&self, disk: &Path) -> impl Future<Output = Result<Attached, disk::Error>> + Send + use<> {
        let (disks, disk) = (self.disks.clone(), disk.to_owned());
        blocking(move || disks.attach(&disk))
    }

    /// Takes that back; the VMM must be gone.
    pub fn detach_disk(&self, disk: &Path) -> impl Future<Output = Result<(), disk::Error>> + Send + use<> {
        let (disks, disk) = (self.disks.clone(), disk.to_owned());
        blocking(move || disks.detach(&disk))
    }

    /// Makes durable what was written to a disk.
    pub fn sync_disk(&self, disk: &Path) -> impl Future<Output = Result<(), disk::Error>> + Send + use<> {
        let (disks, disk) = (self.disks.clone(), disk.to_owned());
        blocking(move || disks.sync(&disk))
    }

    /// The cgroup in which the VMM of a capsule and all its children live.
    pub fn cgroup(&self, id: CapsuleId) -> Cgroup {
        self.cgroups.child(&id.to_string())
    }

    /// What a capsule was started with, as the API shows it.
    pub fn versions(&self, vmm: String, envd: String) -> BTreeMap<String, String> {
        let kernel =
            self.config.kernel.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let kernel = kernel.trim_start_matches("vmlinux-").split('-').next().unwrap_or_default().to_owned();
        [
            ("kernel_version", kernel),
            ("vmm_version", vmm),
            ("agent_version", env!("CARGO_PKG_VERSION").to_owned()),
            ("envd_version", envd),
        ]
        .map(|(name, version)| (name.to_owned(), version))
        .into()
    }
}

/// Runs what blocks where it stops nobody else.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("the work does not panic, and nobody aborts it")
}

/// Removes what memory nobody refers to any more, where it stops nobody.
pub fn collect(memory: &Store) {
    let memory = memory.clone();
    let collect = move || match memory.collect() {
        Ok(collected) if collected.files > 0 => debug!(?collected, "removed saved memory"),
        Ok(_) => {}
        Err(error) => warn!(error = crate::chain(&error), "saved memory that nobody needs stays for now"),
    };
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => drop(runtime.spawn_blocking(collect)),
        Err(_) => collect(),
    }
}

/// Removes the images of earlier runs that no template, capsule or point names any more. Whole disks that came of them do not
/// need them, but uploads of those do. While there is a record that cannot be read, nobody knows what it names, and all stay.
fn collect_images(root: &Path, named: &BTreeMap<String, PathBuf>) -> std::io::Result<()> {
    let dirs = DIRS.iter().flat_map(|dir| std::fs::read_dir(root.join(dir)).into_iter().flatten().flatten());
    let mut under_disks = HashSet::new();
    for entry in dirs {
        // A copy-on-write disk cannot be read without its image.
        under_disks.extend(disk::image_under(&entry.path().join(files::DISK)).ok().flatten());
        under_disks.extend(match Journal::open(entry.path()) {
            Ok(Some(journal)) => journal.record().image.clone(),
            Ok(None) => Meta::read(&entry.path()).and_then(|meta| meta.image),
            Err(error) => {
                warn!(dir = %entry.path().display(), %error, "images stay: this capsule's record cannot be read");
                return Ok(());
            }
        });
    }
    for entry in std::fs::read_dir(root.join(audit::IMAGES))? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let is_needed = under_disks.contains(name) || named.values().any(|image| *image == path);
        if audit::image_name(name).is_some() && !is_needed {
            std::fs::remove_file(&path)?;
            info!(image = %path.display(), "removed an image that no template names");
        }
    }
    Ok(())
}

/// Every header below `root`.
fn headers(root: &Path) -> Vec<PathBuf> {
    let dirs = DIRS.iter().flat_map(|dir| std::fs::read_dir(root.join(dir)).into_iter().flatten().flatten());
    dirs.flat_map(|entry| files::headers(&entry.path())).collect()
}

fn instance(dir: &Path) -> String {
    let digest = Sha256::digest(dir.as_os_str().as_encoded_bytes());
    hex::encode(&digest[..4])
}
