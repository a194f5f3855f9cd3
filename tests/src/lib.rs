//! What end-to-end tests share: a `wrenn up` of their own, an envd of their own, the published SDKs, a browser, and the
//! count of what the machine holds.

mod browser;
mod envd;
mod machine;
mod sdk;
mod split;
mod terminal;
mod up;

pub use browser::Browser;
pub use envd::Envd;
pub use machine::Machine;
pub use sdk::Sdk;
pub use split::Split;
pub use terminal::Terminal;
pub use up::{Api, Options, Up};

/// Where things that are made once per machine are kept.
pub fn cache() -> std::path::PathBuf {
    let default = || std::path::Path::new(&std::env::var("HOME").unwrap()).join(".cache/wrenn");
    std::env::var("WRENN_CACHE").map_or_else(|_| default(), std::path::PathBuf::from)
}
