//! The state file of a snapshot: everything but guest memory and disks.
//!
//! ```text
//! "FCQEMU\r\n" | version u32 | header bytes u32 | device bytes u64 | SHA-256 of the rest | header, JSON | device state
//! ```
//! Integers are little-endian. Paths in the header are as the client gave them, so a snapshot loads wherever the same
//! paths lead to the right files.

use std::io::{self, Read as _, Write as _};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::api::types::{Balloon, Drive, Entropy, MachineConfig, MmdsConfig, NetworkInterface};

const MAGIC: [u8; 8] = *b"FCQEMU\r\n";
const VERSION: u32 = 1;
const PREFIX: usize = 8 + 4 + 4 + 8;

/// Both parts are tens of kilobytes; a length beyond this is not ours.
const MAX_PART: u64 = 16 << 20;

/// Why a state file was not written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot write the snapshot state file")]
    Write(#[source] io::Error),
    #[error("cannot read the snapshot state file")]
    Read(#[source] io::Error),
    #[error("the snapshot state file is not one of firecracker-qemu")]
    Foreign,
    #[error("the snapshot state file has format {0}, this is format {VERSION}")]
    Version(u32),
    #[error("the snapshot state file is truncated or damaged")]
    Damaged,
    #[error("the snapshot state file cannot be understood")]
    Header(#[source] serde_json::Error),
}

/// A microVM without its memory and disks.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    pub header: Header,
    /// QEMU's device state, opaque.
    pub device: Vec<u8>,
}

/// What has to be the same, or made again, where the snapshot is loaded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// Device state is only understood by the QEMU that wrote it.
    pub qemu_version: String,
    /// The guest measures time in the host's ticks.
    pub tsc_khz: u64,
    pub machine: MachineConfig,
    pub drives: Vec<Drive>,
    pub network_interfaces: Vec<NetworkInterface>,
    pub mmds: Option<MmdsConfig>,
    pub balloon: Option<Balloon>,
    pub entropy: Option<Entropy>,
}

impl State {
    /// Writes the file at `path`, replacing what is there.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let file = self.encode()?;
        let mut target = std::fs::File::create(path).map_err(Error::Write)?;
        target.write_all(&file).map_err(Error::Write)
    }

    /// Reads the file at `path`.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let file = std::fs::File::open(path).map_err(Error::Read)?;
        let mut bytes = Vec::new();
        file.take(2 * MAX_PART + 4096).read_to_end(&mut bytes).map_err(Error::Read)?;
        Self::decode(&bytes)
    }

    fn encode(&self) -> Result<Vec<u8>, Error> {
        let header = serde_json::to_vec(&self.header).map_err(Error::Header)?;
        let header_length = u32::try_from(header.len()).map_err(|_| Error::Damaged)?;
        let mut prefix = Vec::with_capacity(PREFIX);
        prefix.extend(MAGIC);
        prefix.extend(VERSION.to_le_bytes());
        prefix.extend(header_length.to_le_bytes());
        prefix.extend((self.device.len() as u64).to_le_bytes());
        let digest = digest(&prefix, &header, &self.device);
        Ok([prefix.as_slice(), &digest, &header, &self.device].concat())
    }

    fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let (prefix, rest) = bytes.split_at_checked(PREFIX).ok_or(Error::Foreign)?;
        if prefix[..8] != MAGIC {
            return Err(Error::Foreign);
        }
        let word = |at: usize| u32::from_le_bytes([prefix[at], prefix[at + 1], prefix[at + 2], prefix[at + 3]]);
        if word(8) != VERSION {
            return Err(Error::Version(word(8)));
        }
        let header_length = u64::from(word(12));
        let device_length = u64::from(word(16)) | u64::from(word(20)) << 32;
        if header_length > MAX_PART || device_length > MAX_PART {
            return Err(Error::Damaged);
        }
        let (claimed, rest) = rest.split_at_checked(32).ok_or(Error::Damaged)?;
        if rest.len() as u64 != header_length + device_length {
            return Err(Error::Damaged);
        }
        let (header, device) = rest.split_at(word(12) as usize);
        if digest(prefix, header, device) != *claimed {
            return Err(Error::Damaged);
        }
        let header = serde_json::from_slice(header).map_err(Error::Header)?;
        Ok(Self { header, device: device.to_vec() })
    }
}

fn digest(prefix: &[u8], header: &[u8], device: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(prefix).chain_update(header).chain_update(device).finalize().into()
}

#[cfg(test)]
mod tests;
