//! Real namespaces, links and rules, as root, on machines of their own: see [`machine`].

mod guest;
mod lifecycle;
mod machine;
mod pool;
mod traffic;
