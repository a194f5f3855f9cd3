//! A blocking netlink socket and the requests sent through it, several in one system call.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

/// rtnetlink is netlink's protocol 0.
pub(crate) const ROUTE: Option<Protocol> = None;
/// nftables.
pub(crate) const NETFILTER: Option<Protocol> = Some(rustix::net::netlink::NETFILTER);

const HEADER: usize = 16;
/// Larger than any answer: each carries one request back at most.
const ANSWER: usize = 1 << 16;

/// Why the kernel did not do what a request asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request was refused.
    #[error("{request}")]
    Refused {
        /// What it asked for.
        request: &'static str,
        #[source]
        source: Errno,
    },
    /// The socket failed, not a request.
    #[error("talk to the kernel over netlink")]
    Socket(#[from] Errno),
    /// The kernel answered fewer requests than it was sent.
    #[error("the kernel did not answer: {0}")]
    Unanswered(&'static str),
}

impl Error {
    /// Whether a request was refused for this reason.
    pub(crate) fn is(&self, errno: Errno) -> bool {
        matches!(self, Self::Refused { source, .. } if *source == errno)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::other(error)
    }
}

/// A socket of the network namespace in which it was opened, wherever it is used.
pub(crate) struct Socket(OwnedFd);

impl Socket {
    pub(crate) fn open(protocol: Option<Protocol>) -> Result<Self, Error> {
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        Ok(Self(socket))
    }

    /// Sends all requests in one message. The first that was refused is the error; rtnetlink has done the others
    /// nevertheless, while nftables does all of a batch or nothing.
    pub(crate) fn transact(&self, requests: &Requests) -> Result<(), Error> {
        rustix::net::send(&self.0, &requests.bytes, SendFlags::empty())?;
        // The kernel has worked through the requests before `send` returns: what it has to say is waiting.
        let mut answers = vec![0; ANSWER];
        let mut answered = vec![false; requests.labels.len()];
        let mut refused = None;
        loop {
            let length = match rustix::net::recv(&self.0, &mut answers[..], RecvFlags::DONTWAIT) {
                Ok((_, length)) => length,
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            };
            for (request, result) in results(&answers[..length]) {
                let Some(&(label, _)) = requests.labels.get(request) else { continue };
                answered[request] = true;
                if let Err(source) = result {
                    refused.get_or_insert(Error::Refused { request: label, source });
                }
            }
        }
        let silent =
            |(&(label, expected), answered): (&(&'static str, bool), bool)| (expected && !answered).then_some(label);
        match refused {
            Some(error) => Err(error),
            None => requests
                .labels
                .iter()
                .zip(answered)
                .find_map(silent)
                .map_or(Ok(()), |label| Err(Error::Unanswered(label))),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The acknowledgements and errors in one answer, by index of the request.
fn results(mut answer: &[u8]) -> impl Iterator<Item = (usize, Result<(), Errno>)> {
    let field = |bytes: &[u8], at: usize| bytes.get(at..at + 4).and_then(|field| field.try_into().ok());
    std::iter::from_fn(move || {
        loop {
            let length = u32::from_ne_bytes(field(answer, 0)?) as usize;
            let message = answer.get(..length.max(HEADER))?;
            answer = &answer[length.max(HEADER).next_multiple_of(4).min(answer.len())..];
            if u16::from_ne_bytes([message[4], message[5]]) != libc::NLMSG_ERROR as u16 {
                continue;
            }
            let request = u32::from_ne_bytes(field(message, 8)?) as usize;
            let code = i32::from_ne_bytes(field(message, HEADER)?);
            return Some((request, if code == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(-code)) }));
        }
    })
}

/// Requests to be sent together, each with what it asks for in words.
#[derive(Default)]
pub(crate) struct Requests {
    bytes: Vec<u8>,
    /// With each label, whether the kernel was asked to acknowledge.
    labels: Vec<(&'static str, bool)>,
}

impl Requests {
    /// Adds one: `flags` are those besides `NLM_F_REQUEST`, `write` appends what follows the header.
    pub(crate) fn push(&mut self, label: &'static str, kind: u16, flags: i32, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.bytes.len();
        let flags = flags | libc::NLM_F_REQUEST;
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((flags as u16).to_ne_bytes());
        self.bytes.extend((self.labels.len() as u32).to_ne_bytes());
        self.bytes.extend([0; 4]);
        write(&mut self.bytes);
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self.labels.push((label, flags & libc::NLM_F_ACK != 0));
    }
}
