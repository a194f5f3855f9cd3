//! A started microVM: how it is started, paused, saved and changed.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;

use super::config::{self, VmConfig};
use crate::api::types::*;
use crate::memory::{self, Mapped, Memory};
use crate::qemu::argv::{self, Origin, Userfault};
use crate::qemu::{self, Qemu};
use crate::snapshot::{self, Header, State};
use crate::tracker::{self, Tracker};
use crate::{netlink, throttle, tsc, uffd};

/// How long a Full snapshot of a lazily restored guest waits for its page-fault handler.
const SAVE: Duration = Duration::from_secs(120);

/// Why the microVM did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("Cannot start microvm without kernel configuration.")]
    NoKernel,
    #[error("Cannot start microvm: the kernel is not an uncompressed 64-bit x86 ELF image.")]
    KernelFormat,
    #[error("Cannot start microvm: the kernel cannot be read")]
    KernelRead(#[source] io::Error),
    #[error("save/restore unavailable while running")]
    SaveWhileRunning,
    #[error("Unknown Vsock Device")]
    NoVsock,
    #[error("clock_realtime requested but not present in the snapshot state")]
    NoClock,
    #[error("Exactly one of mem_backend and mem_file_path must be given.")]
    MemoryBackend,
    #[error("the snapshot needs QEMU {saved}, this is {here}")]
    QemuVersion { saved: String, here: String },
    #[error("the snapshot's time stamp counter runs at {saved} kHz, this host's at {here} kHz")]
    TscRate { saved: u64, here: u64 },
    #[error("Unknown drive: {0}")]
    UnknownDrive(String),
    #[error("Unknown Network Device: {0}")]
    UnknownInterface(String),
    #[error("No balloon device found.")]
    NoBalloon,
    #[error("The balloon's statistics cannot be switched on or off after boot.")]
    BalloonStats,
    #[error("the page-fault handler did not supply the memory in time")]
    SaveTimeout,
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error(transparent)]
    Qemu(#[from] qemu::Error),
    #[error(transparent)]
    Uffd(#[from] uffd::Error),
    #[error(transparent)]
    Tracker(#[from] tracker::Error),
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    #[error(transparent)]
    Network(#[from] netlink::Error),
}

/// A started microVM. Dropping it kills it.
pub struct Vm {
    pub config: VmConfig,
    pub run: RunState,
    pub qemu: Qemu,
    memory: Memory,
    tracker: Option<Tracker>,
    tsc_khz: u64,
    /// Device state taken or loaded since the vCPUs last ran. QEMU gives it once per stop.
    devices: Option<Vec<u8>>,
    /// How often each drive's file was replaced.
    generations: Vec<u32>,
    /// Where absent memory comes from: the client's page-fault handler.
    lazy: Option<Lazy>,
}

/// The connection to the handler stays open: its end tells the handler that the microVM is gone.
struct Lazy {
    mapped: Mapped,
    _handler: UnixStream,
}

impl Vm {
    /// Boots `config`.
    pub async fn boot(config: VmConfig, since: tsc::Reading) -> Result<Self, Error> {
        let source = config.boot_source.as_ref().ok_or(Error::NoKernel)?;
        check_kernel(&source.kernel_image_path)?;
        let tsc_khz = since.rate_khz().await;
        let memory = Memory::create(config.memory_bytes())?;
        let userfault = config.machine.track_dirty_pages.then_some(Userfault { missing: false, track: true });
        let qemu = Qemu::start(&config, Origin::Boot { source, tsc_khz }, &memory, userfault).await?;
        let mut vm = Self::assemble(config, qemu, memory, tsc_khz);
        vm.take_handshake(None).await?;
        vm.limit_everything().await?;
        if let Some(balloon) = vm.config.balloon.clone() {
            vm.set_balloon(balloon.amount_mib).await?;
        }
        vm.poll_balloon().await?;
        vm.resume().await?;
        Ok(vm)
    }

    /// Loads a snapshot, paused unless `resume_vm`.
    pub async fn load(load: SnapshotLoad, since: tsc::Reading) -> Result<Self, Error> {
        if load.vsock_override.is_some() {
            return Err(Error::NoVsock);
        }
        if load.clock_realtime {
            return Err(Error::NoClock);
        }
        let backend = match (load.mem_backend, load.mem_file_path) {
            (Some(backend), None) => backend,
            (None, Some(backend_path)) => MemBackend { backend_type: BackendType::File, backend_path },
            _ => return Err(Error::MemoryBackend),
        };
        let State { header, device } = State::read(&load.snapshot_path)?;
        let mut config = VmConfig::from_snapshot(&header, &load.network_overrides)?;
        let track = load.track_dirty_pages || load.enable_diff_snapshots;
        config.machine.track_dirty_pages = track;
        for drive in &config.drives {
            if let Some(path) = &drive.path_on_host {
                config::open_drive(path, drive.is_read_only)?;
            }
        }
        let (memory, handler) = match backend.backend_type {
            BackendType::File => (restore(backend.backend_path, config.memory_bytes()).await?, None),
            BackendType::Uffd => {
                let handler = uffd::connect(&backend.backend_path).await?;
                (Memory::create(config.memory_bytes())?, Some(handler))
            }
        };
        let missing = handler.is_some();
        let userfault = (missing || track).then_some(Userfault { missing, track });
        // To measure the rate takes time, which QEMU needs too.
        let (here, qemu) = tokio::join!(since.rate_khz(), Qemu::start(&config, Origin::Snapshot, &memory, userfault));
        let qemu = qemu?;
        if !tsc::compatible(header.tsc_khz, here) {
            return Err(Error::TscRate { saved: header.tsc_khz, here });
        }
        if qemu.version() != header.qemu_version {
            return Err(Error::QemuVersion { saved: header.qemu_version, here: qemu.version().to_owned() });
        }
        let mut vm = Self::assemble(config, qemu, memory, header.tsc_khz);
        vm.take_handshake(handler).await?;
        vm.qemu.load_devices(device.clone()).await?;
        vm.devices = Some(device);
        vm.limit_everything().await?;
        vm.poll_balloon().await?;
        if load.resume_vm {
            vm.resume().await?;
        }
        Ok(vm)
    }

    /// `Resumed`. Resuming what runs is no error.
    pub async fn resume(&mut self) -> Result<(), Error> {
        if self.run == RunState::Paused {
            // From here on the vCPUs may have run.
            self.devices = None;
            self.qemu.execute("cont", json!({})).await?;
            self.run = RunState::Running;
        }
        Ok(())
    }

    /// `Paused`. Pausing what is paused is no error.
    pub async fn pause(&mut self) -> Result<(), Error> {
        self.qemu.execute("stop", json!({})).await?;
        self.run = RunState::Paused;
        Ok(())
    }

    /// Writes a snapshot of the paused microVM.
    pub async fn snapshot(&mut self, request: SnapshotCreate) -> Result<(), Error> {
        match self.run {
            RunState::Running => return Err(Error::SaveWhileRunning),
            RunState::Paused => {}
        }
        let device = match &self.devices {
            Some(device) => device.clone(),
            None => self.devices.insert(self.qemu.save_devices().await?).clone(),
        };
        // A Full snapshot resets the record of written pages too: the next Diff is relative to it.
        let written = self.tracker.as_mut().map(Tracker::written).transpose()?;
        let save = Save {
            ranges: match (request.snapshot_type, written) {
                (SnapshotType::Diff, Some(written)) => written,
                (SnapshotType::Diff | SnapshotType::Full, _) => self.memory.present()?,
            },
            faults: match request.snapshot_type {
                SnapshotType::Full => self.lazy.as_ref().map(|lazy| lazy.mapped),
                SnapshotType::Diff => None,
            },
        };
        save.write(self.memory.share()?, request.mem_file_path).await?;
        let state = State { header: self.header(), device };
        state.write(&request.snapshot_path)?;
        if let Some(tracker) = &mut self.tracker {
            tracker.saved();
        }
        Ok(())
    }

    /// `PATCH /drives/{id}`.
    pub async fn patch_drive(&mut self, patch: DrivePatch) -> Result<(), Error> {
        let position = self.config.drives.iter().position(|drive| drive.drive_id == patch.drive_id);
        let index = position.ok_or(Error::UnknownDrive(patch.drive_id))?;
        if let Some(path) = &patch.path_on_host {
            self.replace_drive_file(index, path).await?;
        }
        if let Some(limiter) = patch.rate_limiter {
            let limiter = throttle::patched(self.config.drives[index].rate_limiter, limiter);
            let arguments = throttle::drive(&argv::drive_device(index), Some(&limiter));
            self.qemu.execute("block_set_io_throttle", arguments).await?;
            self.config.drives[index].rate_limiter = Some(limiter);
        }
        Ok(())
    }

    /// `PATCH /network-interfaces/{id}`.
    pub fn patch_network_interface(&mut self, patch: NetworkInterfacePatch) -> Result<(), Error> {
        let known = self.config.network_interfaces.iter_mut().find(|known| known.iface_id == patch.iface_id);
        let interface = known.ok_or(Error::UnknownInterface(patch.iface_id))?;
        let mut changed = interface.clone();
        if let Some(limiter) = patch.rx_rate_limiter {
            changed.rx_rate_limiter = Some(throttle::patched(changed.rx_rate_limiter, limiter));
        }
        if let Some(limiter) = patch.tx_rate_limiter {
            changed.tx_rate_limiter = Some(throttle::patched(changed.tx_rate_limiter, limiter));
        }
        netlink::set_limits(&changed.host_dev_name, &throttle::tap(&changed))?;
        *interface = changed;
        Ok(())
    }

    /// `PATCH /balloon`.
    pub async fn patch_balloon(&mut self, patch: BalloonPatch) -> Result<(), Error> {
        if self.config.balloon.is_none() {
            return Err(Error::NoBalloon);
        }
        if patch.amount_mib > self.config.machine.mem_size_mib {
            return Err(config::Error::BalloonTooLarge.into());
        }
        self.set_balloon(patch.amount_mib).await?;
        if let Some(balloon) = &mut self.config.balloon {
            balloon.amount_mib = patch.amount_mib;
        }
        Ok(())
    }

    /// `PATCH /balloon/statistics`.
    pub async fn patch_balloon_stats(&mut self, patch: BalloonStatsPatch) -> Result<(), Error> {
        let balloon = self.config.balloon.as_mut().ok_or(Error::NoBalloon)?;
        if (balloon.stats_polling_interval_s == 0) != (patch.stats_polling_interval_s == 0) {
            return Err(Error::BalloonStats);
        }
        balloon.stats_polling_interval_s = patch.stats_polling_interval_s;
        self.poll_balloon().await
    }

    /// `GET /balloon/statistics`.
    pub async fn balloon_stats(&self) -> Result<Value, Error> {
        let balloon = self.config.balloon.as_ref().ok_or(Error::NoBalloon)?;
        if balloon.stats_polling_interval_s == 0 {
            return Err(Error::BalloonStats);
        }
        let read = json!({ "path": "/machine/peripheral/balloon", "property": "guest-stats" });
        let stats = self.qemu.execute("qom-get", read).await?["stats"].take();
        let actual = self.qemu.execute("query-balloon", json!({})).await?["actual"].as_u64().unwrap_or_default();
        let actual_mib = (self.memory.size().saturating_sub(actual)) >> 20;
        // QEMU reports what the guest did not tell as the largest number.
        let told = |name: &str| stats[name].as_u64().filter(|value| *value != u64::MAX);
        Ok(json!({
            "target_pages": balloon.amount_mib << 8,
            "actual_pages": actual_mib << 8,
            "target_mib": balloon.amount_mib,
            "actual_mib": actual_mib,
            "swap_in": told("stat-swap-in"),
            "swap_out": told("stat-swap-out"),
            "major_faults": told("stat-major-faults"),
            "minor_faults": told("stat-minor-faults"),
            "free_memory": told("stat-free-memory"),
            "total_memory": told("stat-total-memory"),
            "available_memory": told("stat-available-memory"),
            "disk_caches": told("stat-disk-caches"),
            "hugetlb_allocations": told("stat-htlb-pgalloc"),
            "hugetlb_failures": told("stat-htlb-pgfail"),
        }))
    }

    /// Kills QEMU, waits until it is gone, and takes the limits off the taps.
    pub async fn stop(self) {
        self.qemu.kill().await;
        for interface in self.config.network_interfaces.iter().filter(|known| !throttle::tap(known).is_empty()) {
            if let Err(error) = netlink::set_limits(&interface.host_dev_name, &[]) {
                tracing::warn!("leaving rate limits behind: {}", crate::log::chain(&error));
            }
        }
    }

    /// `SendCtrlAltDel`.
    pub async fn ctrl_alt_del(&self) -> Result<(), Error> {
        let keys = ["ctrl", "alt", "delete"].map(|key| json!({ "type": "qcode", "data": key }));
        self.qemu.execute("send-key", json!({ "keys": keys })).await?;
        Ok(())
    }

    fn assemble(config: VmConfig, qemu: Qemu, memory: Memory, tsc_khz: u64) -> Self {
        let generations = vec![0; config.drives.len()];
        Self {
            config,
            run: RunState::Paused,
            qemu,
            memory,
            tracker: None,
            tsc_khz,
            devices: None,
            generations,
            lazy: None,
        }
    }

    /// Takes the plugin's message, where there is a plugin, and passes it to the page-fault handler, where there is one.
    async fn take_handshake(&mut self, handler: Option<UnixStream>) -> Result<(), Error> {
        let Some(socket) = &self.qemu.handshake else {
            return Ok(());
        };
        let handshake = uffd::receive(socket, self.memory.size()).await?;
        let mapped = Mapped { pid: self.qemu.pid(), base: handshake.base };
        if let Some(handler) = handler {
            uffd::forward(&handler, &handshake)?;
            self.lazy = Some(Lazy { mapped, _handler: handler });
        }
        if self.config.machine.track_dirty_pages {
            self.tracker = Some(Tracker::new(mapped, self.memory.size())?);
        }
        Ok(())
    }

    async fn limit_everything(&self) -> Result<(), Error> {
        for (index, drive) in self.config.drives.iter().enumerate() {
            if let Some(limiter) = &drive.rate_limiter {
                let arguments = throttle::drive(&argv::drive_device(index), Some(limiter));
                self.qemu.execute("block_set_io_throttle", arguments).await?;
            }
        }
        for interface in &self.config.network_interfaces {
            let limits = throttle::tap(interface);
            // A predecessor that was killed left its limits on the tap.
            match netlink::set_limits(&interface.host_dev_name, &limits) {
                Err(error) if limits.is_empty() => tracing::debug!("no limits to clear: {}", crate::log::chain(&error)),
                // In a jail: whoever made the tap then limits it.
                Err(error) if error.is_denied() => {
                    tracing::warn!(
                        "{} is not limited from here: {}",
                        interface.host_dev_name,
                        crate::log::chain(&error)
                    );
                }
                outcome => outcome?,
            }
        }
        Ok(())
    }

    /// Puts another file under a drive the guest keeps using.
    async fn replace_drive_file(&mut self, index: usize, path: &Path) -> Result<(), Error> {
        let drive = &mut self.config.drives[index];
        config::open_drive(path, drive.is_read_only)?;
        let generation = self.generations[index];
        let (old, new) = (argv::node_name(index, generation), argv::node_name(index, generation + 1));
        self.qemu.execute("blockdev-add", argv::drive_node(drive, path, &new)).await?;
        self.generations[index] += 1;
        let device = format!("/machine/peripheral/{}", argv::drive_device(index));
        let attach = json!({ "path": device, "property": "drive", "value": new });
        if let Err(error) = self.qemu.execute("qom-set", attach).await {
            self.qemu.execute("blockdev-del", json!({ "node-name": new })).await?;
            return Err(error.into());
        }
        self.qemu.execute("blockdev-del", json!({ "node-name": old })).await?;
        drive.path_on_host = Some(path.to_owned());
        Ok(())
    }

    async fn set_balloon(&self, amount_mib: u64) -> Result<(), Error> {
        // QEMU's number is what the guest keeps, and it keeps something.
        let left = self.memory.size().saturating_sub(amount_mib << 20).max(1 << 20);
        self.qemu.execute("balloon", json!({ "value": left })).await?;
        Ok(())
    }

    async fn poll_balloon(&self) -> Result<(), Error> {
        if let Some(balloon) = &self.config.balloon {
            let seconds = balloon.stats_polling_interval_s;
            let property = "guest-stats-polling-interval";
            let set = json!({ "path": "/machine/peripheral/balloon", "property": property, "value": seconds });
            self.qemu.execute("qom-set", set).await?;
        }
        Ok(())
    }

    fn header(&self) -> Header {
        let config = self.config.clone();
        Header {
            qemu_version: self.qemu.version().to_owned(),
            tsc_khz: self.tsc_khz,
            machine: config.machine,
            drives: config.drives,
            network_interfaces: config.network_interfaces,
            mmds: config.mmds,
            balloon: config.balloon,
            entropy: config.entropy,
        }
    }
}

/// QEMU starts whatever it is given; a file that is no kernel would only show as a guest that says nothing.
fn check_kernel(path: &Path) -> Result<(), Error> {
    let mut start = [0; 20];
    match File::open(path).and_then(|mut file| file.read_exact(&mut start)) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(Error::KernelFormat),
        Err(error) => return Err(Error::KernelRead(error)),
    }
    let elf64 = start.starts_with(b"\x7fELF\x02\x01");
    let x86_64 = start[18..20] == [62, 0];
    if elf64 && x86_64 { Ok(()) } else { Err(Error::KernelFormat) }
}

/// Copies a memory file off the API's thread.
async fn restore(path: std::path::PathBuf, size: u64) -> Result<Memory, Error> {
    blocking(move || Memory::restore(&path, size)).await
}

/// What of memory goes to a snapshot's file.
struct Save {
    ranges: Vec<std::ops::Range<u64>>,
    /// Absent memory is asked for here first.
    faults: Option<Mapped>,
}

impl Save {
    async fn write(self, memory: Memory, path: std::path::PathBuf) -> Result<(), Error> {
        let saving = blocking(move || match self.faults {
            Some(mapped) => memory.save_with_faults(&path, mapped),
            None => memory.save(&path, &self.ranges),
        });
        timeout(SAVE, saving).await.map_err(|_| Error::SaveTimeout)?
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, memory::Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => Ok(outcome?),
        // The work does not panic and is never aborted.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
