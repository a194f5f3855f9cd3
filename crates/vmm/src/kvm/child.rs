//! The child of the probe and the guest it runs. After the fork: system calls and plain memory only.

use std::arch::global_asm;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

use kvm_bindings::{
    KVM_EXIT_HLT, KVM_EXIT_IO, kvm_cpuid_entry2, kvm_regs, kvm_run, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region, kvm_xcrs,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use rustix::process::{Pid, Signal, set_parent_process_death_signal};

use super::{Event, MESSAGE};

/// What a guest writes to its port that got a wrong result.
pub(super) const WRONG: u8 = 0xff;
/// What it writes after its last test.
pub(super) const LAST: u8 = 4;

/// Names of the calls, in the order they are made.
pub(super) const CALLS: [&str; 13] = [
    "KVM_GET_API_VERSION",
    "KVM_CREATE_VM",
    "mapping the guest's memory",
    "KVM_SET_USER_MEMORY_REGION",
    "KVM_CREATE_VCPU",
    "KVM_GET_SUPPORTED_CPUID",
    "KVM_SET_CPUID2",
    "KVM_GET_SREGS",
    "KVM_SET_SREGS",
    "KVM_SET_XCRS",
    "KVM_SET_REGS",
    "mapping the vCPU",
    "KVM_RUN",
];

// Where things are in the guest's memory, which is one 2 MiB page mapped to itself.
const MEMORY: usize = 2 << 20;
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const PD: usize = 0x3000;
const IDT: usize = 0x4000;
const GDT: usize = 0x5000;
const XSAVE: usize = 0x6000;
const OPERAND: usize = 0x7000;
const STACK: usize = 0x9000;
const CODE: usize = 0x10000;

// The guest. It counts up on port 0x10 as it goes; `al` is what is written.
global_asm!(
    ".pushsection .rodata.wrenn_kvm_guest, \"a\"",
    ".globl wrenn_kvm_guest, wrenn_kvm_guest_handler, wrenn_kvm_guest_end",
    "wrenn_kvm_guest:",
    "mov al, 1",
    "out 0x10, al",
    // A locked 16-byte exchange of the zeroes that are there.
    "xor eax, eax",
    "xor edx, edx",
    "mov ebx, 0x11223344",
    "mov ecx, 0x55667788",
    "mov edi, {operand}",
    "lock cmpxchg16b xmmword ptr [rdi]",
    "jne 2f",
    "cmp rbx, [rdi]",
    "jne 2f",
    "cmp rcx, [rdi + 8]",
    "jne 2f",
    "mov al, 2",
    "out 0x10, al",
    // Saving SSE registers, spoiling one, and getting it back.
    "movq xmm0, rbx",
    "mov eax, 3",
    "xor edx, edx",
    "mov edi, {xsave}",
    "xsave [rdi]",
    "pxor xmm0, xmm0",
    "xrstor [rdi]",
    "movq rcx, xmm0",
    "cmp rbx, rcx",
    "jne 2f",
    "mov al, 3",
    "out 0x10, al",
    // An exception that is handled and returned from.
    "xor ebx, ebx",
    "int3",
    "cmp ebx, 0x99",
    "jne 2f",
    "mov al, {last}",
    "out 0x10, al",
    "hlt",
    "2:",
    "mov al, {wrong}",
    "out 0x10, al",
    "hlt",
    "wrenn_kvm_guest_handler:",
    "mov ebx, 0x99",
    "iretq",
    "wrenn_kvm_guest_end:",
    ".popsection",
    operand = const OPERAND,
    xsave = const XSAVE,
    last = const LAST,
    wrong = const WRONG,
);

unsafe extern "C" {
    static wrenn_kvm_guest: u8;
    static wrenn_kvm_guest_handler: u8;
    static wrenn_kvm_guest_end: u8;
}

/// Layout of `struct kvm_cpuid2` with room for all entries of any processor.
#[repr(C)]
struct Cpuid {
    count: u32,
    padding: u32,
    entries: [kvm_cpuid_entry2; 256],
}

/// Starts the child; it ends by itself when the guest does, and then closes `messages`.
pub(super) fn fork(device: OwnedFd, messages: OwnedFd) -> io::Result<Pid> {
    // SAFETY: the child only makes system calls and writes to its own memory and stack, neither allocates nor locks nor
    // unwinds, and leaves by `_exit`, so nothing of the parent's state is used or torn down in it.
    let pid = unsafe { libc::fork() };
    if pid != 0 {
        return Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(io::Error::last_os_error);
    }
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    let last = run(&device, &messages).unwrap_or_else(|(call, error)| {
        [Event::CallFailed as u8, call, u8::try_from(error.raw_os_error()).unwrap_or(u8::MAX)]
    });
    let _ = rustix::io::write(&messages, &last);
    // SAFETY: ends the process without running anything of the parent's.
    unsafe { libc::_exit(0) }
}

type Failure = (u8, rustix::io::Errno);

/// Makes the guest and lets it run; the message to end with.
fn run(device: &OwnedFd, messages: &OwnedFd) -> Result<[u8; MESSAGE], Failure> {
    ioctl(0, device, io_number(0x00), 0)?;
    let vm = descriptor(ioctl(1, device, io_number(0x01), 0)?);
    let memory = map_guest().map_err(|error| (2, error))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.as_ptr() as u64,
    };
    ioctl(3, &vm, write_number::<kvm_userspace_memory_region>(0x46), ptr::from_ref(&region) as usize)?;
    let vcpu = descriptor(ioctl(4, &vm, io_number(0x41), 0)?);

    // Without this the guest has no features, and may not even set `CR4.OSXSAVE`.
    let mut cpuid = Cpuid { count: 256, padding: 0, entries: [kvm_cpuid_entry2::default(); 256] };
    let address = ptr::from_mut(&mut cpuid) as usize;
    ioctl(5, device, number(READ | WRITE, 0x05, 8), address)?;
    ioctl(6, &vcpu, number(WRITE, 0x90, 8), address)?;

    let mut sregs = kvm_sregs::default();
    ioctl(7, &vcpu, number(READ, 0x83, size_of::<kvm_sregs>()), ptr::from_mut(&mut sregs) as usize)?;
    enter_long_mode(&mut sregs);
    ioctl(8, &vcpu, write_number::<kvm_sregs>(0x84), ptr::from_ref(&sregs) as usize)?;
    // x87 and SSE. The guest does not do this itself, because QEMU's emulation of SVM loses what a nested guest sets, and
    // yet is good enough to boot Linux.
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = 0b11;
    ioctl(9, &vcpu, write_number::<kvm_xcrs>(0xa7), ptr::from_ref(&xcrs) as usize)?;
    let regs = kvm_regs { rip: CODE as u64, rsp: STACK as u64, rflags: 2, ..Default::default() };
    ioctl(10, &vcpu, write_number::<kvm_regs>(0x82), ptr::from_ref(&regs) as usize)?;

    let size = ioctl(11, device, io_number(0x04), 0)?.cast_unsigned() as usize;
    // SAFETY: a new mapping of the vCPU's shared page at an address of the kernel's choice.
    let page = unsafe { mmap(ptr::null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &vcpu, 0) };
    let page = page.map_err(|error| (11, error))?.cast::<kvm_run>();
    loop {
        ioctl(12, &vcpu, io_number(0x80), 0)?;
        // SAFETY: the kernel made the page at least as large as `kvm_run`, and writes it only during KVM_RUN.
        let state = unsafe { &*page };
        match state.exit_reason {
            KVM_EXIT_HLT => return Ok([Event::Halted as u8, 0, 0]),
            KVM_EXIT_IO => {
                // SAFETY: for this exit `io` is the field of the union that is valid, and `data_offset` is where, inside the
                // mapping, the kernel put the byte that the guest wrote.
                let byte = unsafe { *page.cast::<u8>().add(state.__bindgen_anon_1.io.data_offset as usize) };
                let _ = rustix::io::write(messages, &[Event::Reached as u8, byte, 0]);
            }
            reason => return Ok([Event::Left as u8, u8::try_from(reason).unwrap_or(u8::MAX), 0]),
        }
    }
}

/// The guest's memory with its code and tables in it.
fn map_guest() -> Result<NonNull<u8>, rustix::io::Errno> {
    // SAFETY: a new private mapping at an address of the kernel's choice, never unmapped.
    let memory =
        unsafe { mmap_anonymous(ptr::null_mut(), MEMORY, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE) }?;
    let memory = memory.cast::<u8>();
    let put = |offset: usize, value: u64| {
        // SAFETY: all offsets are constants of this file, multiples of 8 and below `MEMORY`.
        unsafe { memory.add(offset).cast::<u64>().write(value) }
    };
    // Present and writable, at each level; the last is one large page from 0.
    put(PML4, PDPT as u64 | 0b11);
    put(PDPT, PD as u64 | 0b11);
    put(PD, 0b1000_0011);
    // Descriptor 1: 64-bit code. Descriptor 2: data.
    put(GDT + 8, 0x00af_9b00_0000_ffff);
    put(GDT + 16, 0x00cf_9300_0000_ffff);
    let start = &raw const wrenn_kvm_guest;
    // SAFETY: the three symbols are in one section in this order, so the distances are those within one object, and the
    // code, below 4 KiB, fits where it is copied to.
    let handler = unsafe {
        ptr::copy_nonoverlapping(start, memory.add(CODE), (&raw const wrenn_kvm_guest_end).offset_from_unsigned(start));
        CODE + (&raw const wrenn_kvm_guest_handler).offset_from_unsigned(start)
    } as u64;
    // Vector 3: a present interrupt gate to the handler in code descriptor 1.
    put(IDT + 3 * 16, (handler & 0xffff) | 1 << 19 | 0x8e << 40 | (handler >> 16) << 48);
    NonNull::new(memory).ok_or(rustix::io::Errno::NOMEM)
}

fn enter_long_mode(sregs: &mut kvm_sregs) {
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 1 << 3,
        type_: 0b1011,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 2 << 3, type_: 0b0011, l: 0, db: 1, ..code };
    sregs.cs = code;
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    (sregs.gdt.base, sregs.gdt.limit) = (GDT as u64, 3 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (IDT as u64, 4 * 16 - 1);
    sregs.cr3 = PML4 as u64;
    // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE.
    sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10 | 1 << 18;
    // PE, MP, ET, NE, PG.
    sregs.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 31;
    // LME, LMA.
    sregs.efer = 1 << 8 | 1 << 10;
}

const WRITE: u64 = 1;
const READ: u64 = 2;

/// Number of a KVM request whose argument has `size` bytes, as `_IOC` makes it.
const fn number(direction: u64, request: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | request
}

const fn io_number(request: u64) -> u64 {
    number(0, request, 0)
}

const fn write_number<T>(request: u64) -> u64 {
    number(WRITE, request, size_of::<T>())
}

fn ioctl(call: u8, fd: &OwnedFd, request: u64, argument: usize) -> Result<i32, Failure> {
    // SAFETY: every argument given in this file is 0 or the address of a live value of the type that the request reads or
    // writes, writable where it writes; the numbers carry their sizes.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
    if result >= 0 {
        return Ok(result);
    }
    // SAFETY: the calling thread's own error number.
    Err((call, rustix::io::Errno::from_raw_os_error(unsafe { *libc::__errno_location() })))
}

fn descriptor(raw: i32) -> OwnedFd {
    // SAFETY: the number was just returned as a new descriptor by a successful call, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(raw) }
}
