#!/usr/bin/env bash
# Builds the root of the emulated host: root.sh CACHE_DIR
# A Debian bookworm from root.packages with the modules of the kernel in CACHE_DIR/linux, as an ext4 image, and the
# initrd that finds it; both named by what they are made of and built once. The last line printed is
# CACHE_DIR/root-<hash>, to which `.ext4` and `.cpio` are added. No loop device, no mount.
set -euo pipefail
cache=${1:?usage: root.sh CACHE_DIR}
here=$(cd "$(dirname "$0")" && pwd)
export LC_ALL=C.UTF-8
kernel=$(basename "$cache"/linux/modules/*)
hash=$({ cat "$here"/root.{sh,packages} "$here/initrd.sh"; echo "$kernel"; } | sha256sum | cut -c1-12)
out=$cache/root-$hash
if [ ! -e "$out.cpio" ]; then
  rm -f "$cache"/root-*
  work=$(mktemp -d "$cache/.root.XXXXXX"); trap 'rm -rf "$work"' EXIT
  chmod 0755 "$work"

  echo "making the emulated host's root, with Linux $kernel" >&2
  mmdebstrap --quiet --mode=root --variant=minbase --include="$(grep -v '^#' "$here/root.packages" | paste -sd,)" \
    --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    bookworm "$work/root" >&2
  rm -rf "$work"/root/var/{cache,lib}/apt/* "$work"/root/dev/*
  cp -r "$cache/linux/modules" "$work/root/usr/lib/"
  depmod -b "$work/root" "$kernel"
  ln -sf /bin/busybox "$work/root/sbin/init"
  # What the initrd has mounted by then is /host, whatever is to be done this time.
  printf '::once:/bin/bash /host/main.sh\n' >"$work/root/etc/inittab"
  mkdir -p "$work"/root/{host,scratch}
  truncate -s 2G "$work/root.ext4"
  mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 -m 0 -d "$work/root" "$work/root.ext4" >&2

  initrd=$work/initrd
  mkdir -p "$initrd"/{bin,dev,proc,sys,modules,root}
  cp "$work/root/bin/busybox" "$initrd/bin/"
  for module in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk; do
    find "$cache/linux/modules" -name "$module.ko" -exec cp {} "$initrd/modules/" \;
  done
  install -m 0755 "$here/initrd.sh" "$initrd/init"
  (cd "$initrd" && find . | cpio --quiet -o -H newc >"$work/initrd.cpio")
  mv "$work/root.ext4" "$out.ext4"
  mv "$work/initrd.cpio" "$out.cpio"
fi
echo "$out"
