//! Real namespaces, links and rules, as root, on machines of their own: see [`machine`].

mod guest;
mod hostile;
mod ipv6;
mod killed;
mod lifecycle;
mod limits;
pub(crate) mod machine;
mod many;
mod mtu;
mod names;
mod policy;
mod pool;
mod raw;
mod traffic;
mod wire;
