//! The QEMU TCG plugin that puts guest memory under userfaultfd.
//!
//! QEMU has no way to share the faults of its guest RAM with another process, so this library is loaded into it with
//! `-plugin`. When the first vCPU is initialised (memory is mapped, nothing has touched it) it registers the memory and
//! sends Firecracker's handshake, one JSON array and one descriptor, over an inherited socket. It instruments no guest
//! code, so TCG runs at its usual speed, and it decides nothing: `firecracker-qemu` at the other end of the socket
//! keeps the descriptor or passes it to a page-fault handler.
//!
//! Options, as `-plugin FILE,fd=N,memory=NAME[,missing=on][,track=on]`:
//! - `fd`: the inherited unix stream socket;
//! - `memory`: the name of the memfd that holds guest memory;
//! - `missing`: the other end resolves faults on absent pages (Uffd restore);
//! - `track`: write-protect every page asynchronously, so that PAGEMAP_SCAN tells what was written since.
//!
//! Built for plugin interface 1, which is QEMU 6.0 to 8.2. Any failure ends QEMU: a guest whose memory is not
//! registered as asked must not run.

mod maps;
mod register;

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::io::Write as _;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::sync::Mutex;

/// The plugin interface this library speaks; QEMU refuses to load it without this symbol.
#[unsafe(no_mangle)]
pub static qemu_plugin_version: c_int = 1;

unsafe extern "C" {
    fn qemu_plugin_register_vcpu_init_cb(id: u64, callback: extern "C" fn(u64, c_uint));
}

/// What the command line asked for, taken when the first vCPU is initialised.
static REQUEST: Mutex<Option<Request>> = Mutex::new(None);

/// The socket and the userfaultfd stay open for the life of QEMU: their end is how the other side sees its death.
static KEPT: Mutex<Option<(OwnedFd, OwnedFd)>> = Mutex::new(None);

struct Request {
    socket: OwnedFd,
    memory: String,
    modes: register::Modes,
}

/// Called by QEMU when it loads the plugin, before guest memory exists.
///
/// # Safety
/// `argv` points to `argc` valid C strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    id: u64,
    _info: *const c_void,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    let arguments = (0..usize::try_from(argc).unwrap_or(0)).map(|i| {
        // SAFETY: QEMU passes `argc` pointers to NUL-terminated strings that outlive this call.
        unsafe { CStr::from_ptr(*argv.add(i)) }.to_string_lossy().into_owned()
    });
    match parse(arguments) {
        Ok(request) => {
            *REQUEST.lock().unwrap_or_else(|poison| poison.into_inner()) = Some(request);
            // SAFETY: `id` is the one QEMU gave us and the callback lives as long as this library.
            unsafe { qemu_plugin_register_vcpu_init_cb(id, vcpu_init) };
            0
        }
        Err(message) => {
            complain(&message);
            1
        }
    }
}

extern "C" fn vcpu_init(_id: u64, _vcpu: c_uint) {
    let Some(request) = REQUEST.lock().unwrap_or_else(|poison| poison.into_inner()).take() else {
        return;
    };
    match register::hand_over(&request.socket, &request.memory, request.modes) {
        Ok(uffd) => *KEPT.lock().unwrap_or_else(|poison| poison.into_inner()) = Some((request.socket, uffd)),
        Err(error) => {
            complain(&error.to_string());
            std::process::exit(70);
        }
    }
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Request, String> {
    let (mut socket, mut memory) = (None, None);
    let mut modes = register::Modes::default();
    for argument in arguments {
        match argument.split_once('=') {
            Some(("fd", number)) => {
                let number = number.parse().map_err(|_| format!("fd={number} is not a number"))?;
                // SAFETY: whoever starts QEMU passes this descriptor for this plugin alone.
                socket = Some(unsafe { OwnedFd::from_raw_fd(number) });
            }
            Some(("memory", name)) => memory = Some(name.to_owned()),
            Some(("missing", value)) => modes.missing = value == "on",
            Some(("track", value)) => modes.track = value == "on",
            _ => return Err(format!("unknown option {argument}")),
        }
    }
    match (socket, memory) {
        (Some(socket), Some(memory)) => Ok(Request { socket, memory, modes }),
        _ => Err("fd and memory are required".to_owned()),
    }
}

/// Standard error is QEMU's log, which `firecracker-qemu` reads.
fn complain(message: &str) {
    // A message that cannot be written has no other reader.
    let _ = writeln!(std::io::stderr(), "firecracker-qemu-uffd: {message}");
}
