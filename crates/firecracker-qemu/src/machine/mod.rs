//! The microVM as its API sees it: what may be asked in which phase, and what is then done.
//!
//! ```text
//!   Configuring ── InstanceStart ──────────► Started (running ⇄ paused) ──► this process ends
//!        └──────── PUT /snapshot/load ─────►    │
//!                        └─ on failure the process ends, as Firecracker's does
//! ```

pub mod config;
mod metrics;
pub mod vm;

use std::io;

use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::api::Action;
use crate::api::types::{ActionType, RunState, SnapshotLoad, VmPatch};
use crate::args::{Args, CONTRACT};
use crate::{log, mmds, tsc};
use config::VmConfig;
use metrics::Metrics;
use vm::Vm;

/// Why a request failed. The display of an error and its sources is the fault message.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("The requested operation is not supported before starting the microVM.")]
    NotBeforeStart,
    #[error("The requested operation is not supported after starting the microVM.")]
    NotAfterStart,
    #[error("Loading a microVM snapshot not allowed after configuring boot-specific resources.")]
    LoadAfterConfiguration,
    #[error("No balloon device found.")]
    NoBalloon,
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Vm(#[from] vm::Error),
    /// After this the process ends.
    #[error("Load snapshot error")]
    Load(#[source] Box<Self>),
    #[error(transparent)]
    Mmds(#[from] mmds::Error),
    #[error(transparent)]
    Log(#[from] log::Error),
    #[error("Cannot open or write the metrics file")]
    Metrics(#[source] io::Error),
    #[error("Cannot open the serial output file")]
    Serial(#[source] io::Error),
}

/// What a request that succeeded is answered with.
#[derive(Debug, PartialEq)]
pub enum Reply {
    Empty,
    Json(Value),
}

/// How a started microVM ended.
#[derive(Debug)]
pub struct End {
    /// The guest rebooted or powered off, rather than QEMU failing.
    pub guest_shut_down: bool,
    /// QEMU's exit status and last errors.
    pub last_words: String,
}

/// One microVM and its API's state.
pub struct Machine {
    id: String,
    phase: Phase,
    store: mmds::Store,
    metadata: Option<mmds::Service>,
    metrics: Metrics,
    born: tsc::Reading,
    ends: mpsc::UnboundedSender<End>,
}

enum Phase {
    Configuring(Box<VmConfig>),
    Started(Box<Vm>),
}

impl Machine {
    /// A microVM with nothing configured. Its end, once it was started, is sent to `ends`.
    pub fn new(args: &Args, ends: mpsc::UnboundedSender<End>) -> Self {
        Self {
            id: args.id.clone(),
            phase: Phase::Configuring(Box::default()),
            store: mmds::Store::new(args.mmds_size_limit.unwrap_or(args.http_api_max_payload_size)),
            metadata: None,
            metrics: Metrics::default(),
            born: tsc::Reading::now(),
            ends,
        }
    }

    /// Does what a request asks.
    pub async fn handle(&mut self, action: Action) -> Result<Reply, Error> {
        let outcome = match self.phase {
            Phase::Configuring(_) => self.before_start(action).await,
            Phase::Started(_) => self.after_start(action).await,
        };
        self.metrics.count_request(outcome.is_ok());
        outcome
    }

    /// Ends the microVM, if there is one, and waits until it is gone.
    pub async fn stop(&mut self) {
        self.metadata = None;
        if let Phase::Started(vm) = std::mem::replace(&mut self.phase, Phase::Configuring(Box::default())) {
            (*vm).stop().await;
        }
    }

    async fn before_start(&mut self, action: Action) -> Result<Reply, Error> {
        let Phase::Configuring(config) = &mut self.phase else {
            return Err(Error::NotAfterStart);
        };
        match action {
            Action::Describe => return Ok(self.describe()),
            Action::GetVersion => return Ok(version()),
            Action::GetVmConfig => return Ok(Reply::Json(config.to_json())),
            Action::GetMachineConfig => return Ok(Reply::Json(json!(config.machine))),
            Action::PutMachineConfig(machine) => config.set_machine(machine)?,
            Action::PatchMachineConfig(patch) => config.patch_machine(patch)?,
            Action::PutBootSource(source) => config.set_boot_source(source)?,
            Action::PutDrive(drive) => config.set_drive(drive)?,
            Action::PutNetworkInterface(interface) => config.set_network_interface(interface)?,
            Action::PutMmdsConfig(mmds) => config.set_mmds(mmds)?,
            Action::PutBalloon(balloon) => config.set_balloon(balloon)?,
            Action::PutEntropy(entropy) => config.set_entropy(entropy)?,
            Action::PutSerial(serial) => {
                if let Some(path) = &serial.serial_out_path {
                    crate::qemu::open_console(path).map_err(Error::Serial)?;
                }
                config.serial = Some(serial);
            }
            Action::GetBalloon => {
                return Ok(Reply::Json(json!(config.balloon.as_ref().ok_or(Error::NoBalloon)?)));
            }
            Action::PutLogger(logger) => log::configure(&logger)?,
            Action::PutMetrics(metrics) => self.metrics.open(&metrics.metrics_path).map_err(Error::Metrics)?,
            Action::PutMmds(data) => self.store.put(data)?,
            Action::PatchMmds(patch) => self.store.patch(patch)?,
            Action::GetMmds => return Ok(Reply::Json(self.store.get())),
            Action::Act(ActionType::InstanceStart) => {
                let config = config.as_ref().clone();
                let vm = Vm::boot(config, self.born).await?;
                self.started(vm)?;
            }
            Action::LoadSnapshot(load) => self.load(load).await?,
            Action::Act(ActionType::FlushMetrics | ActionType::SendCtrlAltDel)
            | Action::PatchDrive(_)
            | Action::PatchNetworkInterface(_)
            | Action::PatchBalloon(_)
            | Action::PatchBalloonStats(_)
            | Action::GetBalloonStats
            | Action::PatchVm(_)
            | Action::CreateSnapshot(_) => return Err(Error::NotBeforeStart),
        }
        Ok(Reply::Empty)
    }

    async fn after_start(&mut self, action: Action) -> Result<Reply, Error> {
        let Phase::Started(vm) = &mut self.phase else {
            return Err(Error::NotBeforeStart);
        };
        match action {
            Action::Describe => return Ok(self.describe()),
            Action::GetVersion => return Ok(version()),
            Action::GetVmConfig => return Ok(Reply::Json(vm.config.to_json())),
            Action::GetMachineConfig => return Ok(Reply::Json(json!(vm.config.machine))),
            Action::PatchVm(VmPatch { state }) => {
                let since = metrics::Started::now();
                match state {
                    RunState::Paused => vm.pause().await?,
                    RunState::Running => vm.resume().await?,
                }
                self.metrics.state_changed(state, since);
            }
            Action::CreateSnapshot(request) => {
                let (kind, since) = (request.snapshot_type, metrics::Started::now());
                vm.snapshot(request).await?;
                self.metrics.saved(kind, since);
            }
            Action::PatchDrive(patch) => vm.patch_drive(patch).await?,
            Action::PatchNetworkInterface(patch) => vm.patch_network_interface(patch)?,
            Action::PatchBalloon(patch) => vm.patch_balloon(patch).await?,
            Action::PatchBalloonStats(patch) => vm.patch_balloon_stats(patch).await?,
            Action::GetBalloon => {
                return Ok(Reply::Json(json!(vm.config.balloon.as_ref().ok_or(Error::NoBalloon)?)));
            }
            Action::GetBalloonStats => return Ok(Reply::Json(vm.balloon_stats().await?)),
            Action::Act(ActionType::SendCtrlAltDel) => vm.ctrl_alt_del().await?,
            Action::Act(ActionType::FlushMetrics) => self.metrics.flush().map_err(Error::Metrics)?,
            Action::PutMmds(data) => self.store.put(data)?,
            Action::PatchMmds(patch) => self.store.patch(patch)?,
            Action::GetMmds => return Ok(Reply::Json(self.store.get())),
            Action::PutMachineConfig(_)
            | Action::PatchMachineConfig(_)
            | Action::PutBootSource(_)
            | Action::PutDrive(_)
            | Action::PutNetworkInterface(_)
            | Action::PutMmdsConfig(_)
            | Action::PutBalloon(_)
            | Action::PutEntropy(_)
            | Action::PutSerial(_)
            | Action::PutLogger(_)
            | Action::PutMetrics(_)
            | Action::LoadSnapshot(_)
            | Action::Act(ActionType::InstanceStart) => return Err(Error::NotAfterStart),
        }
        Ok(Reply::Empty)
    }

    async fn load(&mut self, load: SnapshotLoad) -> Result<(), Error> {
        if let Phase::Configuring(config) = &self.phase
            && **config != (VmConfig { serial: config.serial.clone(), ..VmConfig::default() })
        {
            return Err(Error::LoadAfterConfiguration);
        }
        let since = metrics::Started::now();
        let loaded = Vm::load(load, self.born).await.map_err(Error::Vm);
        loaded.and_then(|vm| self.started(vm)).map_err(|error| Error::Load(Box::new(error)))?;
        self.metrics.loaded(since);
        Ok(())
    }

    /// From here on QEMU's end is this process's end.
    fn started(&mut self, vm: Vm) -> Result<(), Error> {
        if let Some(mmds) = &vm.config.mmds {
            self.metadata = Some(mmds::Service::start(mmds, &vm.config.network_interfaces, &self.store)?);
        }
        let (finished, ends) = (vm.qemu.finished(), self.ends.clone());
        tokio::spawn(async move {
            let (guest_shut_down, last_words) = finished.await;
            // Nobody listens when this process is ending already.
            let _ = ends.send(End { guest_shut_down, last_words });
        });
        self.phase = Phase::Started(Box::new(vm));
        Ok(())
    }

    fn describe(&self) -> Reply {
        let state = match &self.phase {
            Phase::Configuring(_) => "Not started",
            Phase::Started(vm) => match vm.run {
                RunState::Running => "Running",
                RunState::Paused => "Paused",
            },
        };
        let vmm_version = format!("{CONTRACT}+qemu");
        Reply::Json(json!({ "id": self.id, "state": state, "vmm_version": vmm_version, "app_name": "Firecracker" }))
    }
}

/// The plain version of the contract, for whoever parses it.
fn version() -> Reply {
    Reply::Json(json!({ "firecracker_version": CONTRACT }))
}
