//! What a client has configured before the microVM starts, and the rules between the parts.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::api::types::*;
use crate::snapshot::Header;

/// QEMU's `microvm` has this many virtio-mmio transports.
const MAX_DEVICES: usize = 8;

/// Why a piece of configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("The vCPU number is invalid! It must be 1 to 32, and even above 1 when SMT is enabled.")]
    Vcpus,
    #[error("The memory size (MiB) is invalid: it must be 1 to {max}.", max = MAX_MEMORY_MIB)]
    MemorySize,
    #[error("CPU templates are not supported by firecracker-qemu.")]
    CpuTemplate,
    #[error("Huge pages are not supported by firecracker-qemu.")]
    HugePages,
    #[error("Unable to open {what} {path}: {source}.")]
    File { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("A root block device already exists!")]
    SecondRoot,
    #[error("No more than {MAX_DEVICES} devices can be attached.")]
    TooManyDevices,
    #[error("The tap device {0} is already used by another interface.")]
    TapInUse(String),
    #[error("The MAC address {0} is already used by another interface.")]
    MacInUse(String),
    #[error("{0} is not the name of a network device.")]
    TapName(String),
    #[error("MMDS needs at least one network interface, and interface {0:?} does not exist.")]
    MmdsInterface(Option<String>),
    #[error("The MMDS IPv4 address is not link local.")]
    MmdsAddress,
    #[error("Unknown Network Device: {0}")]
    UnknownInterface(String),
    #[error("The balloon cannot be larger than the memory.")]
    BalloonTooLarge,
}

/// A terabyte: a typing error beyond it should not reach the host's allocator.
const MAX_MEMORY_MIB: u64 = 1 << 20;

/// The configuration of one microVM.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VmConfig {
    pub machine: MachineConfig,
    pub boot_source: Option<BootSource>,
    /// The root device, if any, is first.
    pub drives: Vec<Drive>,
    pub network_interfaces: Vec<NetworkInterface>,
    pub mmds: Option<MmdsConfig>,
    pub balloon: Option<Balloon>,
    pub entropy: Option<Entropy>,
    pub serial: Option<Serial>,
}

impl VmConfig {
    /// `PUT /machine-config`.
    pub fn set_machine(&mut self, machine: MachineConfig) -> Result<(), Error> {
        let odd = machine.smt && machine.vcpu_count > 1 && machine.vcpu_count % 2 == 1;
        if !(1..=32).contains(&machine.vcpu_count) || odd {
            return Err(Error::Vcpus);
        }
        if !(1..=MAX_MEMORY_MIB).contains(&machine.mem_size_mib) {
            return Err(Error::MemorySize);
        }
        if machine.cpu_template.is_some_and(|template| template != CpuTemplate::None) {
            return Err(Error::CpuTemplate);
        }
        if machine.huge_pages != HugePages::None {
            return Err(Error::HugePages);
        }
        if self.balloon.as_ref().is_some_and(|balloon| balloon.amount_mib > machine.mem_size_mib) {
            return Err(Error::BalloonTooLarge);
        }
        self.machine = machine;
        Ok(())
    }

    /// `PATCH /machine-config`.
    pub fn patch_machine(&mut self, patch: MachineConfigPatch) -> Result<(), Error> {
        let old = self.machine.clone();
        self.set_machine(MachineConfig {
            vcpu_count: patch.vcpu_count.unwrap_or(old.vcpu_count),
            mem_size_mib: patch.mem_size_mib.unwrap_or(old.mem_size_mib),
            smt: patch.smt.unwrap_or(old.smt),
            cpu_template: patch.cpu_template.or(old.cpu_template),
            track_dirty_pages: patch.track_dirty_pages.unwrap_or(old.track_dirty_pages),
            huge_pages: patch.huge_pages.unwrap_or(old.huge_pages),
        })
    }

    /// `PUT /boot-source`.
    pub fn set_boot_source(&mut self, source: BootSource) -> Result<(), Error> {
        readable("the kernel", &source.kernel_image_path)?;
        if let Some(initrd) = &source.initrd_path {
            readable("the initrd", initrd)?;
        }
        self.boot_source = Some(source);
        Ok(())
    }

    /// `PUT /drives/{id}`: replaces a drive of the same id.
    pub fn set_drive(&mut self, drive: Drive) -> Result<(), Error> {
        if let Some(path) = &drive.path_on_host {
            open_drive(path, drive.is_read_only)?;
        }
        if drive.is_root_device && self.drives.iter().any(|d| d.is_root_device && d.drive_id != drive.drive_id) {
            return Err(Error::SecondRoot);
        }
        match self.drives.iter().position(|known| known.drive_id == drive.drive_id) {
            Some(index) => self.drives[index] = drive,
            None => {
                self.check_room()?;
                self.drives.push(drive);
            }
        }
        // A stable sort: only the root device moves.
        self.drives.sort_by_key(|drive| !drive.is_root_device);
        Ok(())
    }

    /// `PUT /network-interfaces/{id}`: replaces an interface of the same id.
    pub fn set_network_interface(&mut self, interface: NetworkInterface) -> Result<(), Error> {
        check_tap_name(&interface.host_dev_name)?;
        let others = || self.network_interfaces.iter().filter(|known| known.iface_id != interface.iface_id);
        if others().any(|other| other.host_dev_name == interface.host_dev_name) {
            return Err(Error::TapInUse(interface.host_dev_name));
        }
        if let Some(mac) = interface.guest_mac.clone()
            && others().any(|other| other.guest_mac.as_ref() == Some(&mac))
        {
            return Err(Error::MacInUse(mac.into()));
        }
        match self.network_interfaces.iter().position(|known| known.iface_id == interface.iface_id) {
            Some(index) => self.network_interfaces[index] = interface,
            None => {
                self.check_room()?;
                self.network_interfaces.push(interface);
            }
        }
        Ok(())
    }

    /// `PUT /mmds/config`.
    pub fn set_mmds(&mut self, mmds: MmdsConfig) -> Result<(), Error> {
        let known = |id: &String| self.network_interfaces.iter().any(|interface| interface.iface_id == *id);
        let unknown = mmds.network_interfaces.iter().find(|id| !known(id));
        if mmds.network_interfaces.is_empty() || unknown.is_some() {
            return Err(Error::MmdsInterface(unknown.cloned()));
        }
        if !mmds.address().is_link_local() {
            return Err(Error::MmdsAddress);
        }
        self.mmds = Some(mmds);
        Ok(())
    }

    /// `PUT /balloon`.
    pub fn set_balloon(&mut self, balloon: Balloon) -> Result<(), Error> {
        if balloon.amount_mib > self.machine.mem_size_mib {
            return Err(Error::BalloonTooLarge);
        }
        if self.balloon.is_none() {
            self.check_room()?;
        }
        self.balloon = Some(balloon);
        Ok(())
    }

    /// `PUT /entropy`.
    pub fn set_entropy(&mut self, entropy: Entropy) -> Result<(), Error> {
        if self.entropy.is_none() {
            self.check_room()?;
        }
        self.entropy = Some(entropy);
        Ok(())
    }

    /// The configuration a snapshot was taken of, with its interfaces on other taps where the client asks for it.
    pub fn from_snapshot(header: &Header, overrides: &[NetworkOverride]) -> Result<Self, Error> {
        let mut config = Self {
            machine: header.machine.clone(),
            boot_source: None,
            drives: header.drives.clone(),
            network_interfaces: header.network_interfaces.clone(),
            mmds: header.mmds.clone(),
            balloon: header.balloon.clone(),
            entropy: header.entropy.clone(),
            serial: None,
        };
        for wanted in overrides {
            check_tap_name(&wanted.host_dev_name)?;
            let known = config.network_interfaces.iter_mut().find(|interface| interface.iface_id == wanted.iface_id);
            known.ok_or_else(|| Error::UnknownInterface(wanted.iface_id.clone()))?.host_dev_name =
                wanted.host_dev_name.clone();
        }
        Ok(config)
    }

    /// Bytes of guest memory.
    pub fn memory_bytes(&self) -> u64 {
        self.machine.mem_size_mib << 20
    }

    /// `GET /vm/config`.
    pub fn to_json(&self) -> Value {
        json!({
            "balloon": self.balloon,
            "boot-source": self.boot_source,
            "cpu-config": null,
            "drives": self.drives,
            "entropy": self.entropy,
            "machine-config": self.machine,
            "mmds-config": self.mmds,
            "network-interfaces": self.network_interfaces,
            "serial": self.serial,
            "vsock": null,
        })
    }

    fn check_room(&self) -> Result<(), Error> {
        let used = self.drives.len()
            + self.network_interfaces.len()
            + usize::from(self.balloon.is_some())
            + usize::from(self.entropy.is_some());
        if used < MAX_DEVICES { Ok(()) } else { Err(Error::TooManyDevices) }
    }
}

/// Whether the backing file of a drive can be opened as QEMU will open it.
pub fn open_drive(path: &std::path::Path, read_only: bool) -> Result<(), Error> {
    std::fs::File::options().read(true).write(!read_only).open(path).map(drop).map_err(|source| Error::File {
        what: "the drive",
        path: path.to_owned(),
        source,
    })
}

fn readable(what: &'static str, path: &std::path::Path) -> Result<(), Error> {
    std::fs::File::open(path).map(drop).map_err(|source| Error::File { what, path: path.to_owned(), source })
}

/// The kernel's own rule for interface names.
fn check_tap_name(name: &str) -> Result<(), Error> {
    let printable = name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':');
    if (1..=15).contains(&name.len()) && printable && name != "." && name != ".." {
        Ok(())
    } else {
        Err(Error::TapName(name.to_owned()))
    }
}

#[cfg(test)]
mod tests;
