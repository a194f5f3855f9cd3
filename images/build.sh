#!/usr/bin/env bash
# Prepares what a host needs to start capsules: build.sh CACHE_DIR ENVD
# The kernel and the default template, each built only where it is missing, and CACHE_DIR/images.json that names them:
# {"kernel": "vmlinux-…", "templates": {"minimal": "minimal-….ext4"}} (file names inside CACHE_DIR).
set -euo pipefail
cache=${1:?usage: build.sh CACHE_DIR ENVD}
envd=${2:?usage: build.sh CACHE_DIR ENVD}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$cache"
exec 9>"$cache/.lock"; flock 9   # two builds at once would do the same work twice
kernel=$("$here/kernel.sh" "$cache" | tail -n 1)
rootfs=$("$here/rootfs.sh" "$cache" "$envd" | tail -n 1)
printf '{"kernel": "%s", "templates": {"minimal": "%s"}}\n' "$(basename "$kernel")" "$(basename "$rootfs")" >"$cache/images.json.tmp"
mv "$cache/images.json.tmp" "$cache/images.json"
# Each envd makes a template, and they are 300 MB each: the four that were asked for last stay. Data directories have their own.
touch -a "$rootfs"
find "$cache" -maxdepth 1 -name 'minimal-*.ext4' -printf '%A@ %p\n' | sort -rn | sed '1,4d; s/^[^ ]* //' | xargs -r rm --
cat "$cache/images.json"
