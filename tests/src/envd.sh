#!/usr/bin/env bash
# One envd as an ordinary process of a Debian machine of its own: envd.sh TREE DIR ENVD
# Runs as pid 1 of new network, mount and pid namespaces; everything in them ends with it, and it ends with its input.
# TREE, the default template's root file system, is read-only and shared; what may be written is below DIR.
set -euo pipefail
tree=$1 dir=$2 envd=$3
root=$dir/machine
mkdir -p "$root"
mount --bind "$tree" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for place in home root tmp run opt; do
  cp -a "$tree/$place" "$dir/$place"
  mount --bind "$dir/$place" "$root/$place"
done
# A disk that is soon full.
mount -t tmpfs -o size=1m,mode=1777 small "$root/mnt"
# envd's file is not in the tree: each build has its own.
install -m 0755 "$envd" "$root/opt/envd"

echo ready
read -r address gateway   # the link to the machine is there
ip link set lo up
ip address add "$address/30" dev eth0
ip link set eth0 up
ip route add default via "$gateway"
env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
  chroot "$root" /opt/envd --port 49983 --isnotfc </dev/null &
read -r _ || true
