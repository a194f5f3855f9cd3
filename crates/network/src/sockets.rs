//! Ending TCP connections of the host's own.
//!
//! A connection to a guest may outlive the guest: whoever waits for an answer sends again, and the next guest at that
//! address would be sent what was meant for the one before.

use std::io;
use std::net::Ipv4Addr;

use rustix::io::Errno;

use crate::attributes::Attributes;
use crate::netlink::{DIAGNOSTICS, Requests, Socket};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const INET_DIAG_REQ_BYTECODE: u16 = 1;
/// A condition on the other end's address.
const INET_DIAG_BC_D_COND: u8 = 8;
const ALL_STATES: u32 = u32::MAX;
/// `struct inet_diag_sockid`, and where in an answer and in it the other end's address is.
const ID: std::ops::Range<usize> = 4..52;
const DESTINATION: std::ops::Range<usize> = 24..28;

/// Aborts every TCP connection of this network namespace to `address`.
pub(crate) fn abort_to(address: Ipv4Addr) -> io::Result<()> {
    let socket = Socket::open(DIAGNOSTICS)?;
    let mut request = Requests::default();
    request.push("list connections of the host", SOCK_DIAG_BY_FAMILY, libc::NLM_F_DUMP, |bytes| {
        write(bytes, &[0; 48]);
        let mut condition = vec![INET_DIAG_BC_D_COND, 16, 20, 0];
        condition.extend([libc::AF_INET as u8, 32, 0, 0]);
        // Of any port.
        condition.extend((-1i32).to_ne_bytes());
        condition.extend(address.octets());
        Attributes(bytes).bytes(INET_DIAG_REQ_BYTECODE, &condition);
    });
    for found in socket.ask(&request)? {
        if found.get(DESTINATION) != Some(&address.octets()[..]) {
            continue;
        }
        let mut abort = Requests::default();
        abort.push("abort a connection of the host", SOCK_DESTROY, 0, |bytes| write(bytes, &found[ID]));
        match socket.transact(abort) {
            // It has ended by itself.
            Err(error) if error.is(Errno::NOENT) => {}
            result => result?,
        }
    }
    Ok(())
}

/// `struct inet_diag_req_v2`: family, protocol, two that are not used, states, and which socket.
fn write(bytes: &mut Vec<u8>, id: &[u8]) {
    bytes.extend([libc::AF_INET as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend(ALL_STATES.to_ne_bytes());
    bytes.extend(id);
}
