#!/bin/busybox sh
# The first program of the emulated host: finds the disks and goes on from the root. Firecracker's jailer needs a root
# that can be pivoted away from, which an initrd is not.
PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
for module in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk; do
  busybox insmod "/modules/$module.ko"
done
busybox mount -t ext4 /dev/vda /root
busybox mount -t ext4 /dev/vdb /root/host
busybox mount --move /dev /root/dev
busybox umount /proc
exec busybox switch_root /root /sbin/init
