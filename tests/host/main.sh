#!/usr/bin/env bash
# What the emulated host does, as its first program's only task: bash main.sh, with tools/test-host.sh's disk at /host.
# Sets the machine up, runs the suite, writes what came of it to the last disk and turns the power off.
set -u
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
exec >/dev/ttyS0 2>&1 </dev/null
results=/run/results
part=

# Seconds since the machine was turned on.
now() { cut -d' ' -f1 /proc/uptime; }

# Whether the clock is right, by that of the machine outside. Where that is busy, Linux may measure its processor's counter
# so wrongly that what it takes for a minute is ten seconds.
has_time() {
  local rtc=/sys/class/rtc/rtc0/since_epoch begun second took
  second=$(cat $rtc); until [ "$(cat $rtc)" != "$second" ]; do :; done
  begun=$(now) second=$(cat $rtc)
  until [ $(($(cat $rtc) - second)) -ge 3 ]; do :; done
  took=$(now)
  took=$((10#${took/./} - 10#${begun/./}))
  echo "emulated host: 3 s outside are $took/100 s here"
  [ $took -gt 250 ] && [ $took -lt 350 ]
}

set_up() {
  mkdir -p /dev/pts /dev/shm && mount -t devpts devpts /dev/pts && mount -t tmpfs tmpfs /dev/shm &&
  mount -t tmpfs -o size=64m,mode=0755 tmpfs /run && mkdir -p /run/netns "$results" &&
  mount -t cgroup2 cgroup2 /sys/fs/cgroup &&
  modprobe -a kvm-amd tun loop xfs dm-snapshot dm-zero fuse veth nf_tables nft_chain_nat nft_masq nft_ct || return
  echo 1 >/proc/sys/vm/unprivileged_userfaultfd
  ip link set lo up
  echo "emulated host: booted after $(now) s"
  # A way out for capsules, to nowhere.
  modprobe dummy && ip link add out type dummy && ip addr add 192.0.2.1/24 dev out && ip link set out up &&
  ip route add default via 192.0.2.2 dev out || return
  # Images and data directories share blocks here, as on a well-kept host.
  mkfs.xfs -q -K -m reflink=1 /dev/vdd && mount -o discard /dev/vdd /scratch &&
  mkdir -p /scratch/{tmp,cache/images} && chmod 1777 /scratch/tmp && mount --bind /scratch/tmp /tmp &&
  mkdir /run/images && mount -o ro /dev/vdc /run/images && cp /run/images/*.* /scratch/cache/images/ || return
  # The sources and what was built of them are where they were built.
  part=$(grep -o 'wrenn.part=[a-z]*' /proc/cmdline | cut -d= -f2)
  local directory
  while read -r directory; do
    mkdir -p "$directory" && mount --bind "/host$directory" "$directory" || return
  done </host/places
  install -m 0755 /host/bin/* /usr/local/bin/
}

suite() {
  export WRENN_CACHE=/scratch/cache TMPDIR=/scratch/tmp FIRECRACKER_BIN=/usr/local/bin/firecracker RUST_BACKTRACE=0
  export WRENN_KILLS=1 WRENN_CUTS=4
  cd "$(head -n 1 /host/places)" &&
  cargo-nextest nextest run --profile host --color never --no-fail-fast --hide-progress-bar --no-tests pass --test-threads 2 \
    --cargo-metadata /host/cargo-metadata.json --binaries-metadata /host/binaries-metadata.json \
    --workspace-remap . --target-dir-remap "$(tail -n 1 /host/places)" -E "$(cat "/host/filter-$part")"
}

mount -t proc proc /proc && mount -t sysfs sysfs /sys
if ! has_time; then
  mkdir -p "$results"; status=75
elif set_up; then
  echo "emulated host: ready after $(now) s"
  suite; status=$?
  echo "emulated host: done after $(now) s"
  cp "$(head -n 1 /host/places)/target/nextest/host/junit.xml" "$results/" 2>/dev/null
else
  echo "emulated host: it could not be set up"; status=99
fi
firecracker --version 2>/dev/null | head -n 1 >"$results/version"
dmesg >"$results/dmesg"
echo "$status" >"$results/status"
tar -C "$results" -cf /dev/vde .
sync
/bin/busybox poweroff -f
