//! envd as its clients see it: a real binary, driven over its real wire.

mod entries;
mod files;
mod files_disk;
mod harness;
mod http;
mod init;
mod input;
mod leaks;
mod lifetime;
mod output;
mod plan;
mod readers;
mod restore;
mod tree;
mod watch;
mod wire;
