//! QEMU's command line for a configuration.
//!
//! Everything that carries a path or a name is given as JSON, where commas have no meaning.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::api::types::{BootSource, CacheType, Drive, IoEngine};
use crate::machine::config::VmConfig;
use crate::memory;

/// What Firecracker boots with when it is given no arguments.
const DEFAULT_BOOT_ARGS: &str =
    "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

/// The virtio-mmio transports of `microvm` without a second IOAPIC.
const TRANSPORT_BASE: u64 = 0xfeb0_0000;
const TRANSPORT_SIZE: u64 = 512;
const TRANSPORT_IRQ: usize = 5;

/// The descriptors QEMU inherits, by number.
#[derive(Clone, Copy, Debug)]
pub struct Inherited {
    pub memory: i32,
    pub monitor: i32,
    pub handshake: Option<i32>,
}

/// What the plugin registers memory for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Userfault {
    /// A page-fault handler fills absent pages.
    pub missing: bool,
    /// Written pages are tracked.
    pub track: bool,
}

/// Where the guest comes from.
#[derive(Clone, Copy, Debug)]
pub enum Origin<'a> {
    Boot { source: &'a BootSource, tsc_khz: u64 },
    Snapshot,
}

/// The node that holds a drive's file; a replaced file gets the next generation.
pub fn node_name(index: usize, generation: u32) -> String {
    format!("node-{index}-{generation}")
}

/// The id of a drive's device.
pub fn drive_device(index: usize) -> String {
    format!("drive-{index}")
}

/// The block node for a drive. QEMU tells files from devices only where it is not told which it is.
pub fn drive_node(drive: &Drive, path: &Path, name: &str) -> Value {
    let aio = match drive.io_engine {
        IoEngine::Sync => "threads",
        IoEngine::Async => "io_uring",
    };
    let is_device = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    json!({
        "driver": "raw",
        "node-name": name,
        "read-only": drive.is_read_only,
        "discard": "unmap",
        "cache": { "direct": false, "no-flush": drive.cache_type == CacheType::Unsafe },
        "file": {
            "driver": if is_device { "host_device" } else { "file" },
            "filename": path,
            "aio": aio,
            "locking": "off",
            "discard": "unmap",
            "read-only": drive.is_read_only,
            "cache": { "direct": false, "no-flush": drive.cache_type == CacheType::Unsafe },
        },
    })
}

/// The whole command line after the program's name.
pub fn arguments(
    config: &VmConfig,
    origin: Origin<'_>,
    fds: Inherited,
    plugin: Option<(&Path, Userfault)>,
) -> Vec<String> {
    let devices = devices(config);
    let mut argv = Argv(Vec::new());
    argv.pair("-machine", "microvm,acpi=off,auto-kernel-cmdline=off,rtc=on,memory-backend=ram");
    argv.pair("-accel", "tcg,thread=multi,tb-size=128");
    argv.pair("-cpu", "max");
    argv.pair("-m", &format!("{}M", config.machine.mem_size_mib));
    let threads = if config.machine.smt && config.machine.vcpu_count > 1 { 2 } else { 1 };
    let vcpus = config.machine.vcpu_count;
    argv.pair("-smp", &format!("cpus={vcpus},sockets=1,cores={},threads={threads}", vcpus / threads));
    argv.json(
        "-object",
        &json!({
            "qom-type": "memory-backend-file",
            "id": "ram",
            "size": config.memory_bytes(),
            "mem-path": format!("/proc/self/fd/{}", fds.memory),
            "share": true,
        }),
    );
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot", "-S"] {
        argv.flag(flag);
    }
    argv.pair("-display", "none");
    // The guest's way out of QEMU must not lead to another program.
    argv.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    argv.pair("-global", "virtio-mmio.force-legacy=false");
    argv.pair("-chardev", &format!("socket,id=monitor,fd={}", fds.monitor));
    argv.pair("-mon", "chardev=monitor,mode=control");
    argv.pair("-chardev", "stdio,id=console,signal=off");
    argv.pair("-serial", "chardev:console");
    // Firecracker has this controller too: `reboot=k` ends the VM through it and Ctrl-Alt-Del comes from it.
    argv.json("-device", &json!({ "driver": "i8042" }));
    if let (Some((path, userfault)), Some(fd)) = (plugin, fds.handshake) {
        let on = |on| if on { "on" } else { "off" };
        let path = path.display().to_string().replace(',', ",,");
        let (name, missing, track) = (memory::NAME, on(userfault.missing), on(userfault.track));
        argv.pair("-plugin", &format!("file={path},fd={fd},memory={name},missing={missing},track={track}"));
    }
    match origin {
        Origin::Boot { source, tsc_khz } => {
            argv.pair("-kernel", &source.kernel_image_path.display().to_string());
            if let Some(initrd) = &source.initrd_path {
                argv.pair("-initrd", &initrd.display().to_string());
            }
            argv.pair("-append", &kernel_command_line(config, source, tsc_khz, devices.len()));
        }
        Origin::Snapshot => argv.pair("-incoming", "defer"),
    }
    for (index, drive) in config.drives.iter().enumerate() {
        if let Some(path) = &drive.path_on_host {
            argv.json("-blockdev", &drive_node(drive, path, &node_name(index, 0)));
        }
    }
    for (index, interface) in config.network_interfaces.iter().enumerate() {
        argv.json(
            "-netdev",
            &json!({
                "type": "tap",
                "id": format!("tap-{index}"),
                "ifname": interface.host_dev_name,
                "script": "no",
                "downscript": "no",
            }),
        );
    }
    if config.entropy.is_some() {
        argv.json("-object", &json!({ "qom-type": "rng-builtin", "id": "entropy-source" }));
    }
    for (slot, mut device) in devices.into_iter().enumerate() {
        device["bus"] = json!(format!("virtio-mmio-bus.{slot}"));
        argv.json("-device", &device);
    }
    argv.0
}

/// The virtio devices in Firecracker's order, which is the order the guest finds them in.
fn devices(config: &VmConfig) -> Vec<Value> {
    let mut devices = Vec::new();
    if let Some(balloon) = &config.balloon {
        devices.push(json!({
            "driver": "virtio-balloon-device",
            "id": "balloon",
            "deflate-on-oom": balloon.deflate_on_oom,
            "free-page-reporting": balloon.free_page_reporting,
        }));
    }
    for index in 0..config.drives.len() {
        devices.push(json!({
            "driver": "virtio-blk-device",
            "id": drive_device(index),
            "drive": node_name(index, 0),
            // Otherwise a full host disk would stop the guest instead of failing its write.
            "werror": "report",
            "rerror": "report",
        }));
    }
    for (index, interface) in config.network_interfaces.iter().enumerate() {
        let mut device = json!({
            "driver": "virtio-net-device",
            "id": format!("net-{index}"),
            "netdev": format!("tap-{index}"),
        });
        if let Some(mac) = &interface.guest_mac {
            device["mac"] = json!(mac);
        }
        if let Some(mtu) = interface.mtu {
            device["host_mtu"] = json!(mtu);
        }
        devices.push(device);
    }
    if let Some(entropy) = &config.entropy {
        let mut device = json!({ "driver": "virtio-rng-device", "id": "entropy", "rng": "entropy-source" });
        let bucket = entropy.rate_limiter.and_then(|limiter| limiter.bandwidth);
        if let Some(bucket) = bucket.filter(|bucket| bucket.size > 0 && bucket.refill_time > 0) {
            device["max-bytes"] = json!(bucket.size);
            device["period"] = json!(bucket.refill_time.min(u64::from(u32::MAX)));
        }
        devices.push(device);
    }
    devices
}

fn kernel_command_line(config: &VmConfig, source: &BootSource, tsc_khz: u64, transports: usize) -> String {
    let given = source.boot_args.as_deref().unwrap_or(DEFAULT_BOOT_ARGS);
    // What follows " -- " is for init.
    let (mut line, init) = match given.split_once(" -- ") {
        Some((kernel, init)) => (kernel.to_owned(), Some(init)),
        None => (given.to_owned(), None),
    };
    if let Some(root) = config.drives.first().filter(|drive| drive.is_root_device) {
        let device = root.partuuid.as_ref().map_or("/dev/vda".to_owned(), |uuid| format!("PARTUUID={uuid}"));
        // Firecracker's balloon comes first, but only disks are called vd*.
        let mode = if root.is_read_only { "ro" } else { "rw" };
        line.push_str(&format!(" root={device} {mode}"));
    }
    line.push_str(&format!(" tsc_early_khz={tsc_khz} tsc=reliable"));
    for slot in 0..transports {
        let address = TRANSPORT_BASE + TRANSPORT_SIZE * slot as u64;
        line.push_str(&format!(" virtio_mmio.device={TRANSPORT_SIZE}@{address:#x}:{}", TRANSPORT_IRQ + slot));
    }
    if let Some(init) = init {
        line.push_str(" -- ");
        line.push_str(init);
    }
    line
}

struct Argv(Vec<String>);

impl Argv {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.to_owned());
    }

    fn pair(&mut self, flag: &str, value: &str) {
        self.flag(flag);
        self.flag(value);
    }

    fn json(&mut self, flag: &str, value: &Value) {
        self.pair(flag, &value.to_string());
    }
}

#[cfg(test)]
mod tests;
