//! Firecracker's HTTP API served by QEMU, for hosts without KVM.
