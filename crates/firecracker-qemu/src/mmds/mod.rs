//! The microVM metadata service: a JSON store the API fills and the guest reads.
//!
//! Firecracker answers the guest inside its network device. Here the service is a listener in the microVM's network
//! namespace, on the metadata address, bound to the guest's tap so that nobody else reaches it.

mod guest;
mod tokens;

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::api::types::{MmdsConfig, NetworkInterface};
use crate::netlink;

const PORT: u16 = 80;

/// Guest connections served at once; more of them wait.
const CONNECTIONS: usize = 16;

/// A guest that is slower than this to send a request's head is hung up on.
const HEAD: Duration = Duration::from_secs(10);

/// Why the store or the service refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("The MMDS patch request doesn't fit: the data store is limited to {limit} bytes.")]
    TooLarge { limit: usize },
    #[error("The MMDS data store is not initialized.")]
    Uninitialised,
    #[error(transparent)]
    Network(#[from] netlink::Error),
    #[error("cannot listen on the metadata address of {device}")]
    Listen { device: String, source: io::Error },
}

/// The metadata. Clones are handles of the same store.
#[derive(Clone)]
pub struct Store {
    data: Arc<Mutex<Option<Value>>>,
    /// Bytes of JSON.
    limit: usize,
}

impl Store {
    /// An empty store for at most `limit` bytes of JSON.
    pub fn new(limit: usize) -> Self {
        Self { data: Arc::default(), limit }
    }

    /// Replaces everything.
    pub fn put(&self, data: Value) -> Result<(), Error> {
        self.check(&data)?;
        *self.lock() = Some(data);
        Ok(())
    }

    /// Merges `patch` in, as RFC 7396 has it: null removes.
    pub fn patch(&self, patch: Value) -> Result<(), Error> {
        let mut data = self.lock();
        let mut merged = data.clone().ok_or(Error::Uninitialised)?;
        merge(&mut merged, patch);
        self.check(&merged)?;
        *data = Some(merged);
        Ok(())
    }

    /// Everything; an empty object before the first [`put`](Self::put).
    pub fn get(&self) -> Value {
        self.lock().clone().unwrap_or_else(|| Value::Object(serde_json::Map::new()))
    }

    fn check(&self, data: &Value) -> Result<(), Error> {
        if data.to_string().len() <= self.limit { Ok(()) } else { Err(Error::TooLarge { limit: self.limit }) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Value>> {
        self.data.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

/// The guest's side. Dropping it takes the address away and hangs up.
pub struct Service {
    listeners: Vec<JoinHandle<()>>,
    address: Ipv4Addr,
    devices: Vec<String>,
}

impl Service {
    /// Serves `store` to the guest sides of the configured interfaces.
    pub fn start(config: &MmdsConfig, interfaces: &[NetworkInterface], store: &Store) -> Result<Self, Error> {
        let mut service = Self { listeners: Vec::new(), address: config.address(), devices: Vec::new() };
        let guest = Arc::new(guest::Guest::new(config, store.clone()));
        for interface in interfaces.iter().filter(|known| config.network_interfaces.contains(&known.iface_id)) {
            let device = interface.host_dev_name.clone();
            if netlink::add_address(&device, config.address())? {
                service.devices.push(device.clone());
            }
            let listener = listen(&device, config.address()).map_err(|source| Error::Listen { device, source })?;
            service.listeners.push(tokio::spawn(accept(listener, Arc::clone(&guest))));
        }
        Ok(service)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        for listener in &self.listeners {
            listener.abort();
        }
        for device in &self.devices {
            if let Err(error) = netlink::remove_address(device, self.address) {
                tracing::warn!("leaving the metadata address behind: {}", crate::log::chain(&error));
            }
        }
    }
}

fn listen(device: &str, address: Ipv4Addr) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind_device(Some(device.as_bytes()))?;
    socket.bind(SocketAddr::from((address, PORT)))?;
    socket.listen(64)
}

async fn accept(listener: TcpListener, guest: Arc<guest::Guest>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("cannot accept from the guest: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let guest = Arc::clone(&guest);
        tokio::spawn(async move {
            let _slot = slot;
            let answer = service_fn(|request| {
                let (head, _) = http::Request::into_parts(request);
                let response = guest.answer(&head, Instant::now());
                async move { Ok::<_, Infallible>(response.map(Full::<bytes::Bytes>::from)) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), answer);
            // What a guest does to its own connection is its affair.
            if let Err(error) = connection.await {
                tracing::debug!("metadata connection: {error}");
            }
        });
    }
}

fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    if let Value::Object(target) = target {
        for (key, value) in patch {
            if value.is_null() {
                target.remove(&key);
            } else {
                merge(target.entry(key).or_insert(Value::Null), value);
            }
        }
    }
}

#[cfg(test)]
mod tests;
