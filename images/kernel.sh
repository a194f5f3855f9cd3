#!/usr/bin/env bash
# Builds the guest kernel once per machine: kernel.sh CACHE_DIR
# Debian's linux-source-6.1 (installed with apt where it is missing) is unpacked, configured with kernel.config over
# tinyconfig and compiled; the result is CACHE_DIR/vmlinux-<version>-<hash of version and config>, an ELF file.
# The last line printed is its path. Nothing is built when that file exists already.
set -euo pipefail
cache=${1:?usage: kernel.sh CACHE_DIR}
here=$(cd "$(dirname "$0")" && pwd)
config=${KERNEL_CONFIG:-$here/kernel.config}

# A kernel of this config that is already there serves until the config changes: it needs no look at apt.
config_hash=$(sha256sum <"$config" | cut -c1-12)
newest=$(ls -1v "$cache"/vmlinux-*-"$config_hash" 2>/dev/null | tail -n 1 || true)
if [ -n "$newest" ] && [ -z "${KERNEL_LATEST:-}" ]; then echo "$newest"; exit 0; fi

need=(linux-source-6.1 make gcc flex bison bc libelf-dev libssl-dev lz4 xz-utils kmod cpio rsync)
missing=(); for p in "${need[@]}"; do dpkg-query -Wf '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p"); done
if [ ${#missing[@]} -gt 0 ]; then
  echo "installing ${missing[*]}" >&2
  apt-get update -q >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}" >&2
fi

version=$(dpkg-query -Wf '${Version}' linux-source-6.1 | sed 's/-.*//')
out=$cache/vmlinux-$version-$config_hash
mkdir -p "$cache"
work=$(mktemp -d "$cache/.kernel.XXXXXX"); trap 'rm -rf "$work"' EXIT
echo "unpacking linux $version" >&2
tar -C "$work" --strip-components=1 -xf /usr/src/linux-source-6.1.tar.xz
cd "$work"
export KBUILD_BUILD_TIMESTAMP='1970-01-01' KBUILD_BUILD_USER=wrenn KBUILD_BUILD_HOST=wrenn
make -s tinyconfig >/dev/null
scripts/kconfig/merge_config.sh -m .config "$config" >/dev/null 2>&1
make -s olddefconfig 2>/dev/null >&2
# An option that Kconfig dropped would only be noticed inside a guest: refuse it here.
lost=$(grep -E '^CONFIG_[A-Z0-9_]+=' "$config" | grep -vxFf .config || true)
if [ -n "$lost" ]; then printf 'kernel.config names options this kernel does not accept:\n%s\n' "$lost" >&2; exit 1; fi
echo "compiling linux $version (about seven minutes on two cores)" >&2
make -s -j"$(nproc)" vmlinux >&2
strip --strip-debug -o "$work/vmlinux.out" vmlinux
mv "$work/vmlinux.out" "$out"
echo "$out"
