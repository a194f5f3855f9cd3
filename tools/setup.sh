#!/usr/bin/env bash
# Installs the Debian packages that building and running need, and those that are named besides; nothing when all are there.
set -euo pipefail
packages=(
  gcc libc6-dev make pkg-config  # linking
  qemu-system-x86                # firecracker-qemu, where there is no KVM
  xfsprogs e2fsprogs mmdebstrap  # disks and images
  iproute2 nftables curl jq      # oracles of the tests, and the demo
  "$@"
)
missing=(); for p in "${packages[@]}"; do dpkg-query -Wf '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p"); done
if [ ${#missing[@]} -gt 0 ]; then
  [ "$(id -u)" = 0 ] || { echo "need root to install: ${missing[*]}" >&2; exit 1; }
  echo "installing ${missing[*]}" >&2
  apt-get update -q >/dev/null
  # PostgreSQL's package would start a cluster of its own: tests make theirs.
  mkdir -p /etc/postgresql-common/createcluster.d
  echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.d/wrenn.conf
  # Nor do servers start that are only measured beside ours.
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}" >/dev/null
fi
