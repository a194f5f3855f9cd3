//! Runs tests in the languages of the published SDKs, which are in `tests/sdk`.

use std::path::Path;
use std::process::Command;

use crate::cache;

/// The SDKs of one language, as installed from their registry.
pub enum Sdk {
    /// `wrenn` and `e2b`.
    Python,
    /// `e2b`.
    JavaScript,
}

impl Sdk {
    /// Runs one file of tests with `env` in the environment; fails when one of its tests fails.
    pub fn test(self, file: &str, env: &[(&str, &str)]) {
        let sdk = Path::new(env!("CARGO_MANIFEST_DIR")).join("sdk");
        let mut command = Command::new(sdk.join("run.sh"));
        command.arg(cache().join("sdk")).envs(env.iter().copied());
        match self {
            Sdk::Python => {
                command.args(["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]);
                command.env("PYTHONDONTWRITEBYTECODE", "1")
            }
            Sdk::JavaScript => command.args(["node", "--test", "--test-reporter=spec"]),
        };
        assert!(command.arg(sdk.join(file)).status().unwrap().success(), "{file} failed");
    }
}
