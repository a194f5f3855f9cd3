#!/usr/bin/env bash
# Builds and runs one fuzz target: fuzz.sh NAME [libFuzzer's arguments…]. The corpus, which is kept in the cache, begins
# with fuzz/seeds/NAME where there is one.
# The coverage that libFuzzer needs is a pass of LLVM's, which the stable compiler has; no other toolchain is needed.
set -euo pipefail
shopt -s nullglob
name=${1:?usage: fuzz.sh NAME [arguments…]}; shift
cd "$(dirname "$0")/../fuzz"
cache=${WRENN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/wrenn}/fuzz
export CARGO_TARGET_DIR=$cache/target
target=$(rustc -vV | sed -n 's/^host: //p')
# With a target given, build scripts and macros are spared the instrumentation.
RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing" \
  cargo build -q --release --target "$target" --bin "$name"
mkdir -p "$cache/corpus/$name"
exec "$CARGO_TARGET_DIR/$target/release/$name" -max_total_time=600 -artifact_prefix="$cache/$name-" "$@" "$cache/corpus/$name" seeds/"$name"*/
