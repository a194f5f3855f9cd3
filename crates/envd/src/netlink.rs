//! Netlink as far as envd needs it: requests out, answers in, in one place for sockets ([`crate::snapshot`]) and packet
//! rules ([`crate::ports`]). Everything is native-endian here; what a protocol wants big-endian its caller writes so.

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::io;

const HEADER: usize = 16;
/// A kernel never sends more at once.
const ANSWER: usize = 64 * 1024;

/// A socket of the network namespace in which it was opened.
pub struct Socket(OwnedFd);

/// Requests that are sent as one message.
#[derive(Default)]
pub struct Requests {
    bytes: Vec<u8>,
    count: u32,
    acknowledged: usize,
}

impl Socket {
    pub fn open(protocol: Protocol) -> io::Result<Socket> {
        let kind = (AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC);
        let socket = rustix::net::socket_with(kind.0, kind.1, kind.2, Some(protocol))?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Socket(socket))
    }

    /// Sends requests that all ask for acknowledgement; the first refusal is the error.
    pub fn transact(&self, requests: &Requests) -> io::Result<()> {
        rustix::net::send(&self.0, &requests.bytes, SendFlags::empty())?;
        let mut left = requests.acknowledged;
        let mut result = Ok(());
        let mut answer = vec![0; ANSWER];
        while left > 0 {
            // The kernel has worked through the requests before `send` returns: what it has to say is waiting.
            let length = match rustix::net::recv(&self.0, &mut answer[..], RecvFlags::DONTWAIT) {
                Ok((_, length)) => length,
                // A refused batch is not acknowledged any further.
                Err(Errno::AGAIN) if result.is_err() => return result,
                Err(error) => return Err(error.into()),
            };
            for (kind, body) in messages(&answer[..length]) {
                if let Some(verdict) = verdict(kind, body) {
                    left = left.saturating_sub(1);
                    result = result.and(verdict);
                }
            }
        }
        result
    }

    /// Sends one request for a list, and hands over the body of each element.
    pub fn list(&self, request: &Requests, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        rustix::net::send(&self.0, &request.bytes, SendFlags::empty())?;
        let mut answer = vec![0; ANSWER];
        loop {
            let (_, length) = rustix::net::recv(&self.0, &mut answer[..], RecvFlags::empty())?;
            for (kind, body) in messages(&answer[..length]) {
                if kind == libc::NLMSG_DONE as u16 {
                    return Ok(());
                }
                match verdict(kind, body) {
                    Some(verdict) => verdict?,
                    None => each(body),
                }
            }
        }
    }
}

impl Requests {
    /// Adds one; `write` appends what follows the header.
    pub fn push(&mut self, kind: u16, flags: i32, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.bytes.len();
        self.count += 1;
        self.acknowledged += usize::from(flags & libc::NLM_F_ACK != 0);
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(((flags | libc::NLM_F_REQUEST) as u16).to_ne_bytes());
        self.bytes.extend(self.count.to_ne_bytes());
        self.bytes.extend([0; 4]);
        write(&mut self.bytes);
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Kind and body of each message in one answer.
fn messages(mut answer: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*answer.first_chunk()?) as usize;
        let message = answer.get(..length).filter(|message| message.len() >= HEADER)?;
        answer = answer.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([message[4], message[5]]), &message[HEADER..]))
    })
}

/// What an acknowledgement says; `None` for any other message.
fn verdict(kind: u16, body: &[u8]) -> Option<io::Result<()>> {
    if kind != libc::NLMSG_ERROR as u16 {
        return None;
    }
    let code = body.first_chunk().map_or(-libc::EPROTO, |code| i32::from_ne_bytes(*code));
    Some(if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_taken_apart_whatever_they_hold() {
        let mut requests = Requests::default();
        requests.push(2, 0, |bytes| bytes.extend((-libc::ENOENT).to_ne_bytes()));
        requests.push(7, 0, |bytes| bytes.extend(b"odd"));
        let found: Vec<_> = messages(&requests.bytes).collect();
        assert_eq!(found.len(), 2);
        assert_eq!(verdict(found[0].0, found[0].1).unwrap().unwrap_err().raw_os_error(), Some(libc::ENOENT));
        assert_eq!((found[1].0, found[1].1), (7, &b"odd"[..]));
        // The last message's own padding may be missing.
        for cut in 0..requests.bytes.len() - 1 {
            assert!(messages(&requests.bytes[..cut]).count() < 2);
        }
        assert_eq!(messages(&[0; 64]).count(), 0);
        assert_eq!(messages(&[255; 64]).count(), 0);
    }
}
