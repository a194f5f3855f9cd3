//! Real namespaces, links and rules, as root, on machines of their own: see [`machine`].

mod guest;
mod hostile;
mod lifecycle;
mod machine;
mod names;
mod policy;
mod pool;
mod raw;
mod traffic;
