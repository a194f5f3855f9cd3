//! The API without any machine behind it: a request's method, path and body become an [`Action`], or a fault.

pub mod types;

#[cfg(test)]
mod tests;

use http::Method;
use serde::de::DeserializeOwned;
use serde_json::Value;

use types::*;

/// Everything a client can ask for.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Describe,
    GetVersion,
    GetVmConfig,
    GetMachineConfig,
    PutMachineConfig(MachineConfig),
    PatchMachineConfig(MachineConfigPatch),
    PutBootSource(BootSource),
    PutDrive(Drive),
    PatchDrive(DrivePatch),
    PutNetworkInterface(NetworkInterface),
    PatchNetworkInterface(NetworkInterfacePatch),
    PutMmdsConfig(MmdsConfig),
    PutMmds(Value),
    PatchMmds(Value),
    GetMmds,
    PutBalloon(Balloon),
    PatchBalloon(BalloonPatch),
    PatchBalloonStats(BalloonStatsPatch),
    GetBalloon,
    GetBalloonStats,
    PutEntropy(Entropy),
    PutSerial(Serial),
    PutLogger(Logger),
    PutMetrics(Metrics),
    Act(ActionType),
    PatchVm(VmPatch),
    CreateSnapshot(SnapshotCreate),
    LoadSnapshot(SnapshotLoad),
}

/// Why a request is not an action.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("Invalid request method and/or path: {method} {path}.")]
    NoSuchEndpoint { method: Method, path: String },
    #[error("{method} request with an empty body.")]
    EmptyBody { method: Method },
    #[error("GET request cannot have a body.")]
    UnexpectedBody,
    #[error("An error occurred when deserializing the json body of a request: {0}.")]
    Body(serde_json::Error),
    #[error("API Resource IDs can only contain alphanumeric characters and underscores, and cannot be empty.")]
    BadId,
    #[error("The id from the path [{path}] does not match the id from the body [{body}]!")]
    MismatchedId { path: String, body: String },
    #[error("{0} is not supported by firecracker-qemu.")]
    Unsupported(&'static str),
    #[error("{0}")]
    Invalid(&'static str),
}

/// Reads one request. `path` is the request target as sent.
pub fn parse(method: &Method, path: &str, body: &[u8]) -> Result<Action, Error> {
    let mut segments = path.split('/').skip(1).filter(|segment| !segment.is_empty());
    let segments: [Option<&str>; 4] = std::array::from_fn(|_| segments.next());
    let unknown = || Error::NoSuchEndpoint { method: method.clone(), path: path.trim_start_matches('/').to_owned() };
    match *method {
        Method::GET if !body.is_empty() => Err(Error::UnexpectedBody),
        Method::GET => get(segments).ok_or_else(unknown),
        Method::PUT | Method::PATCH if body.is_empty() => Err(Error::EmptyBody { method: method.clone() }),
        Method::PUT => put(segments, body)?.ok_or_else(unknown),
        Method::PATCH => patch(segments, body)?.ok_or_else(unknown),
        _ => Err(unknown()),
    }
}

fn get(segments: [Option<&str>; 4]) -> Option<Action> {
    Some(match segments {
        [None, ..] => Action::Describe,
        [Some("version"), None, ..] => Action::GetVersion,
        [Some("vm"), Some("config"), None, _] => Action::GetVmConfig,
        [Some("machine-config"), None, ..] => Action::GetMachineConfig,
        [Some("mmds"), None, ..] => Action::GetMmds,
        [Some("balloon"), None, ..] => Action::GetBalloon,
        [Some("balloon"), Some("statistics"), None, _] => Action::GetBalloonStats,
        _ => return None,
    })
}

fn put(segments: [Option<&str>; 4], body: &[u8]) -> Result<Option<Action>, Error> {
    Ok(Some(match segments {
        [Some("machine-config"), None, ..] => Action::PutMachineConfig(json(body)?),
        [Some("boot-source"), None, ..] => Action::PutBootSource(json(body)?),
        [Some("drives"), Some(id), None, _] => {
            let drive: Drive = json(body)?;
            check_id(id, &drive.drive_id)?;
            if drive.socket.is_some() {
                return Err(Error::Unsupported("A vhost-user drive (socket)"));
            }
            if drive.path_on_host.is_none() {
                return Err(Error::Invalid("A drive needs path_on_host."));
            }
            Action::PutDrive(drive)
        }
        [Some("network-interfaces"), Some(id), None, _] => {
            let interface: NetworkInterface = json(body)?;
            check_id(id, &interface.iface_id)?;
            Action::PutNetworkInterface(interface)
        }
        [Some("mmds"), None, ..] => Action::PutMmds(object(body)?),
        [Some("mmds"), Some("config"), None, _] => Action::PutMmdsConfig(json(body)?),
        [Some("balloon"), None, ..] => {
            let balloon: Balloon = json(body)?;
            if balloon.free_page_hinting {
                return Err(Error::Unsupported("Free page hinting"));
            }
            Action::PutBalloon(balloon)
        }
        [Some("entropy"), None, ..] => {
            let entropy: Entropy = json(body)?;
            if entropy.rate_limiter.is_some_and(|limiter| limiter.ops.is_some()) {
                return Err(Error::Unsupported("A limit on the entropy device's operations"));
            }
            Action::PutEntropy(entropy)
        }
        [Some("serial"), None, ..] => {
            let serial: Serial = json(body)?;
            if serial.rate_limiter.is_some() {
                return Err(Error::Unsupported("A rate limiter on the serial port"));
            }
            Action::PutSerial(serial)
        }
        [Some("logger"), None, ..] => Action::PutLogger(json(body)?),
        [Some("metrics"), None, ..] => Action::PutMetrics(json(body)?),
        [Some("actions"), None, ..] => Action::Act(json::<InstanceAction>(body)?.action_type),
        [Some("snapshot"), Some("create"), None, _] => Action::CreateSnapshot(json(body)?),
        [Some("snapshot"), Some("load"), None, _] => Action::LoadSnapshot(json(body)?),
        [Some("vsock"), None, ..] => return Err(Error::Unsupported("A vsock device")),
        [Some("pmem"), Some(_), None, _] => return Err(Error::Unsupported("A pmem device")),
        [Some("hotplug"), Some("memory"), None, _] => return Err(Error::Unsupported("Memory hotplug")),
        [Some("cpu-config"), None, ..] => return Err(Error::Unsupported("A custom CPU configuration")),
        _ => return Ok(None),
    }))
}

fn patch(segments: [Option<&str>; 4], body: &[u8]) -> Result<Option<Action>, Error> {
    Ok(Some(match segments {
        [Some("machine-config"), None, ..] => Action::PatchMachineConfig(json(body)?),
        [Some("drives"), Some(id), None, _] => {
            let drive: DrivePatch = json(body)?;
            check_id(id, &drive.drive_id)?;
            Action::PatchDrive(drive)
        }
        [Some("network-interfaces"), Some(id), None, _] => {
            let interface: NetworkInterfacePatch = json(body)?;
            check_id(id, &interface.iface_id)?;
            Action::PatchNetworkInterface(interface)
        }
        [Some("mmds"), None, ..] => Action::PatchMmds(object(body)?),
        [Some("balloon"), None, ..] => Action::PatchBalloon(json(body)?),
        [Some("balloon"), Some("statistics"), None, _] => Action::PatchBalloonStats(json(body)?),
        [Some("balloon"), Some("hinting"), Some("start" | "stop"), None] => {
            return Err(Error::Unsupported("Free page hinting"));
        }
        [Some("vm"), None, ..] => Action::PatchVm(json(body)?),
        _ => return Ok(None),
    }))
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(Error::Body)
}

/// The data store is an object at its root.
fn object(body: &[u8]) -> Result<Value, Error> {
    json::<serde_json::Map<String, Value>>(body).map(Value::Object)
}

fn check_id(path: &str, body: &str) -> Result<(), Error> {
    if !path.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Err(Error::BadId);
    }
    if path != body {
        return Err(Error::MismatchedId { path: path.to_owned(), body: body.to_owned() });
    }
    Ok(())
}
