//! The pager against real userfaultfds: memory that this process, or one it started, maps and registers as VMMs do.

mod behaviour;
mod lazy;
mod model;
mod peers;
mod stored;
mod vmm;
