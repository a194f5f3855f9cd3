#!/usr/bin/env bash
# Checks deny.toml: licences, sources and banned crates. Advisories need the advisory database, which not every machine
# reaches: `cargo deny check advisories` where it does.
set -euo pipefail
tools=${WRENN_CACHE:?run by make lint}/tools
export PATH=$tools/bin:$PATH
command -v cargo-deny >/dev/null || { echo "installing cargo-deny (once per machine)" >&2; CARGO_TARGET_DIR=$tools/target cargo install -q --locked --root "$tools" cargo-deny; rm -rf "$tools/target"; }
cargo deny --offline --log-level error check bans licenses sources
