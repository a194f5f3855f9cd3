//! A file or device of the host in a VMM's mount namespace, after that was made.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MoveMountFlags, OpenTreeFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use tokio::sync::oneshot;

/// Mounts `device` over the file `path` in the mount namespace of process `pid`.
pub(super) async fn show(pid: u32, device: &Path, path: PathBuf) -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = rustix::mount::open_tree(CWD, device, flags)?;
    let namespace = format!("/proc/{pid}/ns/mnt");
    let namespace = rustix::fs::open(namespace, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let (sender, receiver) = oneshot::channel();
    // A thread of its own, which ends in that namespace.
    std::thread::Builder::new().name("show".into()).spawn(move || {
        let entered = || {
            // SAFETY: only the working directory, root and umask stop being shared with other threads; this one uses none of
            // them for anybody else, and shares its memory and descriptors as before.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
            rustix::thread::move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&namespace),
                Some(LinkNameSpaceType::Mount),
            )?;
            rustix::mount::move_mount(&mount, "", CWD, &path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        };
        // Who asked may have stopped waiting.
        let _ = sender.send(entered());
    })?;
    receiver.await.map_err(|_| io::Error::other("the thread for it ended"))??;
    Ok(())
}
