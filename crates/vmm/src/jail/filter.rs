//! The system calls that no VMM makes, as a program for the kernel to run at each call.
//!
//! What a VMM does need, its own filters say better: Firecracker's, and those of QEMU's `-sandbox`. This one is beneath both,
//! and takes away what leads out of a jail: other namespaces, other processes, mounts, keys, and what few programs use and
//! much was found in (user namespaces, BPF, io_uring, performance counters).

use libc::{BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W};
use libc::{sock_filter, sock_fprog};

/// `AUDIT_ARCH_X86_64`: what numbers calls as they are numbered here.
const ARCHITECTURE: u32 = 0xC000_003E;
/// Calls of the x32 interface have this bit, and are the same calls by other numbers.
const X32: u32 = 0x4000_0000;
/// All of `CLONE_NEW*` that `clone` knows.
const NEW_NAMESPACES: u32 = 0x7E02_0000;
/// Offsets in `struct seccomp_data`: the call's number, the architecture, the lower half of the first argument.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const FIRST: u32 = 16;
/// Families of sockets that some VMM uses: its API, its metadata service, and asking for the tap.
const FAMILIES: [libc::c_int; 3] = [libc::AF_UNIX, libc::AF_INET, libc::AF_NETLINK];

/// Answered with EPERM.
const REFUSED: [libc::c_long; 57] = [
    // Namespaces, mounts, roots.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_process_madvise,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    // Keys.
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    // The kernel itself.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_fanotify_init,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_syslog,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS_sysfs,
    libc::SYS_ustat,
    libc::SYS_uselib,
    libc::SYS__sysctl,
    libc::SYS_modify_ldt,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    // The machine.
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
];

/// The program.
pub(super) fn program() -> Vec<sock_filter> {
    let mut program = vec![
        load(ARCH),
        jump(BPF_JEQ, ARCHITECTURE, 1, 0),
        answer(libc::SECCOMP_RET_KILL_PROCESS),
        load(NUMBER),
        jump(BPF_JGE, X32, 0, 1),
        refuse(libc::ENOSYS),
        // What it is asked for cannot be seen here. C libraries then use `clone`.
        jump(BPF_JEQ, number(libc::SYS_clone3), 0, 1),
        refuse(libc::ENOSYS),
    ];
    for call in REFUSED {
        program.extend([jump(BPF_JEQ, number(call), 0, 1), refuse(libc::EPERM)]);
    }
    program.extend([
        jump(BPF_JEQ, number(libc::SYS_clone), 0, 4),
        load(FIRST),
        jump(BPF_JSET, NEW_NAMESPACES, 0, 1),
        refuse(libc::EPERM),
        answer(libc::SECCOMP_RET_ALLOW),
    ]);
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        let families = FAMILIES.len() as u8;
        program.extend([jump(BPF_JEQ, number(call), 0, families + 3), load(FIRST)]);
        for (index, family) in FAMILIES.into_iter().enumerate() {
            let to_allow = families - index as u8;
            program.push(jump(BPF_JEQ, family as u32, to_allow, 0));
        }
        program.extend([refuse(libc::EAFNOSUPPORT), answer(libc::SECCOMP_RET_ALLOW)]);
    }
    program.push(answer(libc::SECCOMP_RET_ALLOW));
    program
}

/// Has the kernel run `program` at every call of this process and of all that come of it. Runs after `fork`.
pub(super) fn install(program: &[sock_filter]) -> std::io::Result<()> {
    // The kernel only reads it.
    let program = sock_fprog { len: program.len() as libc::c_ushort, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel copies `len` instructions from `filter`, which has as many, and checks them. The call gives the
    // process fewer rights and changes none of its memory.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn number(call: libc::c_long) -> u32 {
    u32::try_from(call).expect("calls have small numbers")
}

fn load(offset: u32) -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, offset)
}

fn answer(action: u32) -> sock_filter {
    statement(BPF_RET | BPF_K, action)
}

fn refuse(error: i32) -> sock_filter {
    answer(libc::SECCOMP_RET_ERRNO | error as u32)
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

/// Goes on after as many instructions as are said, for yes and for no.
fn jump(test: u32, k: u32, yes: u8, no: u8) -> sock_filter {
    sock_filter { code: (BPF_JMP | test | BPF_K) as u16, jt: yes, jf: no, k }
}
