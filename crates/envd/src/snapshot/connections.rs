//! TCP connections of the past: after a restore their other ends are gone, or somebody else's twin.
//!
//! The kernel lists them and ends them (`SOCK_DESTROY`); who holds one sees `ECONNABORTED` at once instead of a silence of
//! minutes. Connections within the guest stay: both of their ends were restored. So do listeners.

use crate::netlink::{Requests, Socket};
use rustix::net::netlink;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// Every state but `LISTEN`, `TIME_WAIT` and `CLOSE`, a bit for each.
const STATES: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
/// `struct inet_diag_sockid`: ports, addresses, interface, cookie.
const ID: usize = 48;

/// One that the kernel listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Connection {
    family: u8,
    id: [u8; ID],
}

/// Ends all but the one from `caller`, and says how many; `None` where the kernel cannot.
pub(super) fn close_all_but(caller: SocketAddr) -> io::Result<Option<u32>> {
    let socket = Socket::open(netlink::SOCK_DIAG)?;
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut request = Requests::default();
        request.push(SOCK_DIAG_BY_FAMILY, libc::NLM_F_DUMP, |bytes| ask(bytes, family as u8, &[0; ID]));
        match socket.list(&request, |body| found.extend(Connection::read(body))) {
            // A kernel without that family, or without any of this.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    let mut closed = 0;
    for connection in found.iter().filter(|connection| connection.is_foreign() && connection.peer() != caller) {
        let mut request = Requests::default();
        request.push(SOCK_DESTROY, libc::NLM_F_ACK, |bytes| ask(bytes, connection.family, &connection.id));
        match socket.transact(&request) {
            Ok(()) => closed += 1,
            // It ended by itself meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    Ok(Some(closed))
}

/// `struct inet_diag_req_v2`.
fn ask(bytes: &mut Vec<u8>, family: u8, id: &[u8; ID]) {
    bytes.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend(STATES.to_ne_bytes());
    bytes.extend(id);
}

impl Connection {
    /// `struct inet_diag_msg`: family, state, timer, retransmissions, id, and what does not matter here.
    fn read(body: &[u8]) -> Option<Connection> {
        let (head, rest) = body.split_first_chunk::<4>()?;
        Some(Connection { family: head[0], id: *rest.first_chunk()? })
    }

    fn peer(&self) -> SocketAddr {
        let port = u16::from_be_bytes([self.id[2], self.id[3]]);
        let mut address = [0; 16];
        address.copy_from_slice(&self.id[20..36]);
        let address = match i32::from(self.family) {
            libc::AF_INET6 => IpAddr::from(Ipv6Addr::from(address)).to_canonical(),
            _ => IpAddr::from(Ipv4Addr::new(address[0], address[1], address[2], address[3])),
        };
        SocketAddr::new(address, port)
    }

    /// Its other end is not in this guest.
    fn is_foreign(&self) -> bool {
        let peer = self.peer().ip();
        !peer.is_loopback() && self.id[4..20] != self.id[20..36]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(family: i32, source: &[u8], destination: &[u8]) -> Connection {
        let mut body = vec![family as u8, 1, 0, 0, 0x1F, 0x90, 0x23, 0x29];
        for address in [source, destination] {
            body.extend(address);
            body.resize(body.len() + 16 - address.len(), 0);
        }
        body.resize(72, 0);
        Connection::read(&body).unwrap()
    }

    #[test]
    fn what_stays_within_the_guest_is_left_alone() {
        let mapped = |last: [u8; 4]| [&[0; 10][..], &[255, 255], &last].concat();
        let outside = of(libc::AF_INET, &[169, 254, 0, 21], &[93, 184, 0, 1]);
        assert!(outside.is_foreign());
        assert_eq!(outside.peer(), "93.184.0.1:9001".parse().unwrap());
        assert!(!of(libc::AF_INET, &[127, 0, 0, 1], &[127, 0, 0, 1]).is_foreign());
        assert!(!of(libc::AF_INET, &[169, 254, 0, 21], &[169, 254, 0, 21]).is_foreign());
        let outside = of(libc::AF_INET6, &mapped([169, 254, 0, 21]), &mapped([1, 2, 3, 4]));
        assert_eq!(outside.peer(), "1.2.3.4:9001".parse().unwrap());
        assert!(outside.is_foreign());
        assert!(!of(libc::AF_INET6, &mapped([127, 0, 0, 1]), &mapped([127, 0, 0, 1])).is_foreign());
        assert!(!of(libc::AF_INET6, &Ipv6Addr::LOCALHOST.octets(), &Ipv6Addr::LOCALHOST.octets()).is_foreign());
        assert_eq!(Connection::read(&[2; 40]), None);
    }
}
