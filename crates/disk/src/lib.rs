//! Images and copy-on-write root disks.
