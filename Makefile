# The same words everywhere: build · images · demo · test · test-host · lint · bench-NAME · fuzz-NAME · dev
# `make demo` and `make test` work on a fresh Debian 12 machine with git and a Rust toolchain; see README.md.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/wrenn
TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
STATIC := x86_64-unknown-linux-gnu
ENVD := $(TARGET)/envd
export WRENN_CACHE := $(CACHE)

.PHONY: build images demo test test-host vmm-table lint dev setup envd nextest
.SILENT:

## Debian packages that building and running need.
setup:
	tools/setup.sh $(PEER)

## The guest agent: one static file.
envd: setup
	RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" cargo build -q --profile guest -p envd --target $(STATIC)
	install -m 0755 -D $(TARGET)/$(STATIC)/guest/envd $(ENVD)

## Release binaries in target/release: wrenn, firecracker-qemu, envd.
build: envd
	cargo build --release -p wrenn -p firecracker-qemu
	install -m 0755 $(ENVD) $(TARGET)/release/envd

## Kernel and default template, built once per machine.
images: envd
	images/build.sh $(CACHE)/images $(ENVD)

## From nothing to code running in a microVM.
demo: build
	tools/demo.sh $(TARGET)/release/wrenn

# What runs the tests.
nextest:
	command -v cargo-nextest >/dev/null || cargo install -q --locked cargo-nextest

## Everything, against real parts. NAME=... runs the tests whose names contain it.
test: images nextest
	tools/setup.sh chromium openssh-client postgresql python3 python3-venv
	cargo build --workspace --bins --lib
	cargo nextest run --workspace --no-run
# After everything that builds, which puts its own there.
	install -m 0755 $(ENVD) $(TARGET)/debug/envd
	cargo nextest run --workspace --no-fail-fast $(NAME)

## What a VMM must do and what the agent does with it, on a real Firecracker in an emulated host. NAME=... as above.
test-host: images nextest
	tools/setup.sh binutils busybox-static cpio kmod python3 python3-venv
	cargo build --workspace --bins --lib
# Under a profile of its own, which leaves the results of `make test` alone.
	cargo nextest run --workspace --profile host the_guest_is_made
	tools/test-host.sh $(if $(NAME),'test($(NAME))')

## The table of docs/vmm.md, from what `make test` and `make test-host` found last.
vmm-table:
	tools/vmm-table.py docs/vmm.md tests/host/differences "firecracker-qemu=$$(ls -t target/nextest/{ci,default}/junit.xml 2>/dev/null | head -n 1)" \
	  "$$(cat $(TARGET)/host/version)=$$(ls $(TARGET)/host/junit-*.xml | paste -sd,)"

## Formatting, warnings, licences and dependency policy.
lint: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	tools/deny.sh

## Runs `wrenn up` from the sources as they are, with a data directory of its own.
dev: images
	cargo build -p wrenn -p firecracker-qemu
	install -m 0755 $(ENVD) $(TARGET)/debug/envd
	$(TARGET)/debug/wrenn up --dir $(CACHE)/dev

# What ours is measured beside.
bench-guest-path: PEER = openssh-server
bench-proxy: PEER = nginx-light haproxy caddy
bench-snapshot-store: PEER = qemu-utils zstd
bench-slots: PEER = iptables
bench-%: build images
	cargo run --release -q -p benches --bin $*

## One parser against ten minutes of made-up input: api, egress, files, guest, pager, proxy or snapshot.
fuzz-%:
	tools/fuzz.sh $*
