//! Real namespaces, links and rules, as root, on machines of their own: see [`machine`].

mod guest;
mod ipv6;
mod killed;
mod lifecycle;
mod limits;
pub(crate) mod machine;
mod many;
mod mtu;
mod pool;
mod traffic;
mod wire;
