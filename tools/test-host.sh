#!/usr/bin/env bash
# Runs tests on a real Firecracker, in an emulated host: test-host.sh [FILTER]
# QEMU emulates a processor with AMD's virtualisation, Debian's kernel on it has KVM, and Firecracker runs there. FILTER is
# one of nextest's, in place of tests/host/filter. Expects `make images` and `cargo test --no-run` done; see `make test-host`.
# There are two such hosts, of one processor each: one with two stood still in the middle of a run, as both took exceptions
# without end, it seems at code that Linux had patched on the other. Each has its part of the tests. Results are in TARGET/host:
# junit-PART.xml, console-PART.log, dmesg-PART and the version of Firecracker. Ends as the suite does.
# One whose clock is wrong is turned on anew. So is one that says nothing for five minutes: it stands still, whatever its tests
# do, and stalled-PART.log has where its processor was.
# WRENN_HOST_SCOPE is what of the workspace was built, as cargo says it; by default all of it, as `make test` does.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
here=$root/tests/host
images=${WRENN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/wrenn}/images
cache=${WRENN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/wrenn}/host
target=${CARGO_TARGET_DIR:-$root/target}
out=$target/host
# A suite that takes longer than this hangs.
limit=${WRENN_HOST_LIMIT:-4800}

mkdir -p "$cache" "$out"
work=$(mktemp -d "$out/.work.XXXXXX"); trap 'rm -rf "$work"' EXIT

# What is tested, at the paths where it was built, without the symbols that make it large.
host=$work/host
mkdir -p "$host/bin"
printf '%s\n%s\n' "$root" "$target" >"$host/places"
tests=(agent::it disk::it end-to-end::{cli,hostile,lifecycle,ports,proxy,pty,recovery} firecracker-qemu::conformance network vmm::it)
read -ra scope <<<"${WRENN_HOST_SCOPE:---workspace}"
# What was built is named as a whole, so that nothing is built anew for being asked for alone.
cargo nextest list "${scope[@]}" --list-type binaries-only --message-format json |
  jq '."rust-binaries" |= with_entries(select(.key | IN($ARGS.positional[])))' --args "${tests[@]}" >"$host/binaries-metadata.json"
# Of this platform only: what others need may never have been fetched.
cargo metadata --format-version 1 --offline --filter-platform "$(rustc -vV | sed -n "s/^host: //p")" >"$host/cargo-metadata.json"
(cd "$root" && git ls-files -z | grep -zv '^tests/sdk/' | xargs -0 cp --parents -t "$(mkdir -p "$host$root"; echo "$host$root")")
{
  jq -r '."rust-binaries"[]."binary-path"' "$host/binaries-metadata.json"
  printf '%s\n' "$target/debug/wrenn" "$target/debug/firecracker-qemu"
} | while read -r program; do
  mkdir -p "$host$(dirname "$program")"
  strip --strip-debug -o "$host$program" "$program"
done
# Unchanged, as its bytes name the template.
cp "$target/envd" "$host$target/debug/"
mkdir -p "$host$target/tmp"
cp "$target"/tmp/guest-*.cpio "$host$target/tmp/"

exec 9>"$cache/.lock"; flock 9   # two emulated hosts at once would only wait for each other
firecracker=$("$here/fetch.sh" "$cache" | tail -n 1)
base=$("$here/root.sh" "$cache" | tail -n 1)

# Kernel and template, once for all runs with the same ones.
kernel=$(jq -r .kernel "$images/images.json") template=$(jq -r .templates.minimal "$images/images.json")
disk=$cache/images-$(sha256sum <"$images/images.json" | cut -c1-12).ext4
if [ ! -e "$disk" ]; then
  rm -f "$cache"/images-*
  mkdir "$work/images"
  ln "$images/images.json" "$images/$kernel" "$images/$template" "$work/images/" 2>/dev/null ||
    cp --sparse=always "$images/images.json" "$images/$kernel" "$images/$template" "$work/images/"
  # `wrenn up` sees by these that nothing is to be built; what is in the tar is not looked at then.
  for sum in "$images"/*.tar.sha256; do
    cp "$sum" "$work/images/"
    : >"$work/images/$(basename "$sum" .sha256)"
  done
  truncate -s 6G "$work/images.ext4"
  mkfs.ext4 -q -F -m 0 -E lazy_itable_init=0 -d "$work/images" "$work/images.ext4"
  mv "$work/images.ext4" "$disk"
fi

cp "$firecracker"/* "$(command -v cargo-nextest)" "$host/bin/"
# What differs on a real Firecracker is not asked of it, whatever else is.
known=$(sed '/^#/d; s/ .*//; s/.*/test(=&)/' "$here/differences" | paste -sd'|')
chosen=${1:-$(sed '/^#/d; s/.*/(&)/' "$here/filter" | paste -sd'|')}
first='package(agent) | package(disk) | package(network) | binary_id(end-to-end::cli) | binary_id(end-to-end::lifecycle)'
echo "(($chosen) - ($known)) & ($first)" >"$host/filter-one"
echo "(($chosen) - ($known)) - ($first)" >"$host/filter-two"
cp "$here/main.sh" "$host/"
truncate -s 2G "$work/host.ext4"
mkfs.ext4 -q -F -m 0 -E lazy_itable_init=0 -O ^has_journal -d "$host" "$work/host.ext4"
rm -rf "$host"

disk() { echo "-drive if=none,format=raw,cache=unsafe,discard=unmap,id=$1,file=$2,snapshot=$3 -device virtio-blk-pci,drive=$1"; }
# Turns an emulated host on until it is done; 75 if that has to be tried again. EPYC-v3 has what KVM and Firecracker ask of a
# processor; of the rest, which is not emulated, QEMU would warn.
run() {
  local part=$1 console=$out/console-$1.log monitor=$work/monitor-$1 qemu stalled=
  rm -f "$work"/{scratch,results}-"$part" "$monitor".*
  mkfifo "$monitor".{in,out}
  : >"$console"
  truncate -s 24G "$work/scratch-$part"
  truncate -s 64M "$work/results-$part"
  # shellcheck disable=SC2046 # words are what is wanted
  timeout -k 10 "$limit" nice -n 5 qemu-system-x86_64 -machine q35 -accel tcg,tb-size=512 -cpu EPYC-v3 -smp 1 -m 4096 \
    -nodefaults -no-user-config -display none -no-reboot -serial stdio -monitor "pipe:$monitor" \
    -kernel "$cache/linux/vmlinuz" -initrd "$base.cpio" \
    -append "console=ttyS0 quiet mitigations=off tsc=reliable panic=-1 wrenn.part=$part" \
    $(disk root "$base.ext4" on) $(disk host "$work/host.ext4" on) $(disk images "$disk" on) \
    $(disk scratch "$work/scratch-$part" off) $(disk results "$work/results-$part" off) \
    -device virtio-rng-pci 2>"$out/qemu-$part.log" </dev/null > >(tee "$console" | sed -u "s/^/$part | /") &
  qemu=$!
  while sleep 5; kill -0 "$qemu" 2>/dev/null; do
    [ $(($(date +%s) - $(stat -c %Y "$console"))) -lt 300 ] && continue
    for _ in 1 2 3; do printf 'info registers\nx /16i $rip\nx /32gx $rsp\n' 1<>"$monitor.in"; sleep 1; done
    timeout 2 cat "$monitor.out" >"$out/stalled-$part.log" || true
    echo "FLAKY: the emulated host stands still; see $out/stalled-$part.log" >&2
    stalled=yes
    kill "$qemu"
  done
  wait "$qemu" || true
  [ -z "$stalled" ] || return 75
  mkdir -p "$work/$part"
  tar -C "$work/$part" -xf "$work/results-$part" 2>/dev/null || return 1
  [ "$(cat "$work/$part/status")" != 75 ] || return 75
}

# An emulated host, and what came of it.
emulate() {
  local part=$1 tries=0
  until run "$part"; do
    [ $? = 75 ] && [ $((tries += 1)) -lt 5 ] ||
      { echo "the emulated host ended without results; see $out/console-$part.log" >&2; rm -rf "${work:?}/$part"; return; }
  done
  cp "$work/$part/version" "$out/"
  cp "$work/$part/dmesg" "$out/dmesg-$part"
  cp "$work/$part/junit.xml" "$out/junit-$part.xml" 2>/dev/null || true
}

rm -f "$out"/{version,dmesg,junit,console,stalled}*
emulate one & emulate two & wait
for part in one two; do
  status=$(cat "$work/$part/status" 2>/dev/null || echo 1)
  [ "$status" = 0 ] || exit "$status"
done
