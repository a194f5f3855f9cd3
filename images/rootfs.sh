#!/usr/bin/env bash
# Builds the root file system of the default template: rootfs.sh CACHE_DIR ENVD
# A Debian bookworm tree from rootfs.packages (mmdebstrap), made once per package list and kept as a tar; on top of it
# the guest agent, written into an ext4 image with mkfs.ext4 -d: no loop device, no mount. The same packages and the same
# envd give the same bytes. The result is CACHE_DIR/minimal-<hash>.ext4; the last line printed is its path.
set -euo pipefail
cache=${1:?usage: rootfs.sh CACHE_DIR ENVD}
envd=${2:?usage: rootfs.sh CACHE_DIR ENVD}
here=$(cd "$(dirname "$0")" && pwd)
size_mib=${ROOTFS_MIB:-5120}
export SOURCE_DATE_EPOCH=1735689600 LC_ALL=C.UTF-8

need=(mmdebstrap e2fsprogs)
missing=(); for p in "${need[@]}"; do dpkg-query -Wf '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p"); done
if [ ${#missing[@]} -gt 0 ]; then
  echo "installing ${missing[*]}" >&2
  apt-get update -q >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}" >&2
fi

mkdir -p "$cache"
packages=$(grep -v '^#' "$here/rootfs.packages" | paste -sd,)
tree=$cache/bookworm-$(cat "$here/rootfs.packages" "$here/rootfs.sh" | sha256sum | cut -c1-12).tar
work=$(mktemp -d "$cache/.rootfs.XXXXXX"); trap 'rm -rf "$work"' EXIT
if [ ! -e "$tree" ]; then
  echo "installing Debian bookworm with $(tr ',' '\n' <<<"$packages" | wc -l) packages" >&2
  mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" \
    --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*/LC_MESSAGES/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --customize-hook='chroot "$1" useradd --create-home --shell /bin/bash --uid 1000 user' \
    --customize-hook='echo "user ALL=(ALL:ALL) NOPASSWD: ALL" >"$1/etc/sudoers.d/user" && chmod 0440 "$1/etc/sudoers.d/user"' \
    --customize-hook='cp /etc/skel/.bashrc "$1/root/.bashrc"' \
    --customize-hook='echo capsule >"$1/etc/hostname"; printf "127.0.0.1 localhost\n127.0.1.1 capsule\n::1 localhost ip6-localhost ip6-loopback\n" >"$1/etc/hosts"' \
    --customize-hook='printf "nameserver 8.8.8.8\nnameserver 8.8.4.4\n" >"$1/etc/resolv.conf"' \
    --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin "$1"/var/log/* "$1"/etc/machine-id "$1"/etc/ssh/ssh_host_*; : >"$1/etc/machine-id"' \
    bookworm "$work/tree.tar" >&2
  sha256sum <"$work/tree.tar" >"$tree.sha256"
  mv "$work/tree.tar" "$tree"
fi

hash=$({ cat "$tree.sha256"; sha256sum <"$envd"; echo "$size_mib"; } | sha256sum | cut -c1-16)
out=$cache/minimal-$hash.ext4
if [ ! -e "$out" ]; then
  # mkfs.ext4 -d takes files in the order in which the directory lists them; tmpfs lists them as they were made, everywhere.
  root=$(mktemp -d /dev/shm/wrenn-rootfs.XXXXXX); trap 'rm -rf "$work" "$root"' EXIT
  chmod 0755 "$root"
  tar -C "$root" --numeric-owner --xattrs --xattrs-include='*' -xpf "$tree"
  install -m 0755 "$envd" "$root/usr/local/bin/envd"
  find "$root" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
  # A fixed UUID and hash seed and a frozen clock make the bytes repeat; a sparse file stays sparse, and every block
  # group is marked initialised, so that no guest spends its first minute zeroing inode tables.
  truncate -s "${size_mib}M" "$work/rootfs.ext4"
  E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH mkfs.ext4 -q -F -L wrenn -U 6b1d0f6e-7772-656e-6e00-000000000001 \
    -E hash_seed=6b1d0f6e-7772-656e-6e00-000000000002,lazy_itable_init=0,lazy_journal_init=0 \
    -O ^metadata_csum_seed,^orphan_file -m 0 -J size=16 -d "$root" "$work/rootfs.ext4" >&2
  # It copies change and access times from the tree, which are those of this minute: set them for every inode in use.
  last=$(dumpe2fs -h "$work/rootfs.ext4" 2>/dev/null | awk -F: '/^Inode count/ {n=$2} /^Free inodes/ {f=$2} END {print n-f}')
  for inode in 2 $(seq 11 "$last"); do
    for time in atime ctime crtime; do
      echo "sif <$inode> $time @$SOURCE_DATE_EPOCH"; echo "sif <$inode> ${time}_extra 0"
    done
  done >"$work/times"
  E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH debugfs -w -f "$work/times" "$work/rootfs.ext4" >/dev/null 2>&1
  mv "$work/rootfs.ext4" "$out"
fi
echo "$out"
