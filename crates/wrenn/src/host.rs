//! What an operator says of a host, to `wrenn up` and to `wrenn agent` alike.

use std::path::PathBuf;

use ::agent::admission::Limits;
use anyhow::{Context, Result};
use api::egress::Cidr;
use api::limits;
use clap::Args;

use crate::images::Images;

/// How a host runs capsules.
#[derive(Debug, Args)]
pub struct HostArgs {
    /// The VMM to use in place of the one that fits this machine.
    #[arg(long, env = "WRENN_VMM")]
    pub vmm: Option<PathBuf>,
    /// Where what is paused goes too, so that any host can resume it: s3://bucket/prefix (with the usual AWS_* variables)
    /// or file:///path. Without it nothing is uploaded.
    #[arg(long, env = "WRENN_OBJECTS", value_name = "URL", value_parser = objects)]
    objects: Option<::objects::Config>,
    /// How root disks are made: reflink, device-mapper (which reserves all of a disk before it is used) or copy, in place of the
    /// best way that needs nothing but the directory.
    #[arg(long, env = "WRENN_DISKS", value_name = "HOW")]
    disks: Option<::agent::DiskBackend>,
    /// Lets capsules reach this network although it is private (RFC 1918, 100.64.0.0/10) or link-local; may be repeated.
    /// Capsules never reach each other, nor this machine's own addresses.
    #[arg(long, env = "WRENN_EGRESS_ALLOW", value_name = "CIDR", value_delimiter = ',')]
    egress_allow: Vec<Cidr>,
    /// Keeps all capsules from reaching this network; may be repeated.
    #[arg(long, env = "WRENN_EGRESS_DENY", value_name = "CIDR", value_delimiter = ',')]
    egress_deny: Vec<Cidr>,
    /// The user that the VMM in slot N (1 to 32767) runs as has this number plus N. No account may be in that range.
    #[arg(long, env = "WRENN_VMM_USERS", default_value_t = ::agent::VMM_USERS, value_parser = vmm_users())]
    vmm_users: u32,
    /// How many times the memory that is not reserved may be promised to capsules.
    #[arg(long, env = "WRENN_MEMORY_FACTOR", default_value_t = Limits::default().memory_factor, value_parser = factor)]
    memory_factor: f64,
    /// Memory that is kept for the host itself, in MiB; an eighth of it if not given.
    #[arg(long, env = "WRENN_MEMORY_RESERVE", value_name = "MIB")]
    memory_reserve: Option<u64>,
    /// How many virtual processors each processor may be promised as.
    #[arg(long, env = "WRENN_VCPU_FACTOR", default_value_t = Limits::default().vcpu_factor, value_parser = factor)]
    vcpu_factor: f64,
    /// Disk space that is kept free, in MiB.
    #[arg(long, env = "WRENN_DISK_RESERVE", value_name = "MIB", default_value_t = Limits::default().disk_reserve_mib)]
    disk_reserve: u64,
}

impl HostArgs {
    /// How an agent is set up whose VMM and images were found. This same program serves the memory of resumed capsules.
    pub fn config(self, dir: PathBuf, vmm: PathBuf, images: Images) -> Result<::agent::Config> {
        let program = std::env::current_exe().context("finding this program")?;
        Ok(::agent::Config {
            dir,
            vmm,
            kernel: images.kernel,
            templates: images.templates,
            pager: (program, vec!["pager".into()]),
            objects: self.objects,
            boot_snapshots: Some(::agent::Sizes {
                vcpus: limits::DEFAULT_VCPUS,
                memory_mib: limits::DEFAULT_MEMORY_MB,
                disk_mib: limits::DEFAULT_DISK_SIZE_MB,
            }),
            egress_allow: self.egress_allow,
            egress_deny: self.egress_deny,
            slots_ready: ::agent::SLOTS_READY,
            vmm_users: self.vmm_users,
            limits: Limits {
                memory_factor: self.memory_factor,
                memory_reserve_mib: self.memory_reserve,
                vcpu_factor: self.vcpu_factor,
                disk_reserve_mib: self.disk_reserve,
            },
            disks: self.disks,
        })
    }
}

/// A factor of which something is left.
fn factor(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(factor) if factor > 0.0 && factor <= 1000.0 => Ok(factor),
        _ => Err("it must be a number above 0 and up to 1000".into()),
    }
}

/// An object store's address, with what the environment says to it.
pub fn objects(address: &str) -> Result<::objects::Config, ::objects::Error> {
    ::objects::Config::parse(address, std::env::vars())
}

/// Numbers of users, of which none is root, nor beyond what the kernel has.
pub fn vmm_users() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1000..=2_000_000_000)
}
