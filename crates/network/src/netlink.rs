//! A blocking netlink socket and the requests sent through it, several in one system call.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

/// rtnetlink is netlink's protocol 0.
pub(crate) const ROUTE: Option<Protocol> = None;
/// Sockets of the machine.
pub(crate) const DIAGNOSTICS: Option<Protocol> = Some(rustix::net::netlink::SOCK_DIAG);
/// nftables and connection tracking.
pub(crate) const NETFILTER: Option<Protocol> = Some(rustix::net::netlink::NETFILTER);

const HEADER: usize = 16;
/// Where in the header the flags are.
const FLAGS: usize = 6;
/// Larger than any answer: each carries one request back at most, or a part of what was asked.
const ANSWER: usize = 1 << 16;
/// How often the kernel is asked for something that changes while it tells.
const TELL_AGAIN: usize = 20;

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
    /// The kernel answered fewer requests than it was sent, or never told something as a whole.
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

    /// Sends all requests in one message, and nothing where there are none. The first that was refused is the error; rtnetlink
    /// has done the others nevertheless, while nftables does all of a batch or nothing.
    pub(crate) fn transact(&self, mut requests: Requests) -> Result<(), Error> {
        // What is refused is always answered; when the last was done, so were all before.
        let Some(last) = requests.acknowledge_last() else { return Ok(()) };
        rustix::net::send(&self.0, &requests.bytes, SendFlags::empty())?;
        // The kernel has worked through the requests before `send` returns: what it has to say is waiting.
        let mut answers = vec![0; ANSWER];
        let mut done = false;
        let mut refused = None;
        loop {
            let length = match rustix::net::recv(&self.0, &mut answers[..], RecvFlags::DONTWAIT) {
                Ok((_, length)) => length,
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            };
            for message in messages(&answers[..length]) {
                let Some((request, result)) = message.result() else { continue };
                let Some(sent) = requests.sent.get(request) else { continue };
                match result {
                    Ok(()) => done |= request == last,
                    Err(source) => drop(refused.get_or_insert(Error::Refused { request: sent.label, source })),
                }
            }
        }
        match refused {
            Some(error) => Err(error),
            None if !done => Err(Error::Unanswered(requests.sent[last].label)),
            None => Ok(()),
        }
    }

    /// Sends one request and returns what the kernel tells: each message without its header.
    pub(crate) fn ask(&self, request: &Requests) -> Result<Vec<Vec<u8>>, Error> {
        let label = request.sent.first().map_or("nothing", |sent| sent.label);
        let mut answers = vec![0; ANSWER];
        // What was told while it changed may have something twice, or not at all.
        for _ in 0..TELL_AGAIN {
            rustix::net::send(&self.0, &request.bytes, SendFlags::empty())?;
            let (mut told, mut is_whole, mut is_end) = (Vec::new(), true, false);
            while !is_end {
                let (_, length) = rustix::net::recv(&self.0, &mut answers[..], RecvFlags::empty())?;
                for message in messages(&answers[..length]) {
                    is_whole &= message.flags() & libc::NLM_F_DUMP_INTR as u16 == 0;
                    match message.result() {
                        Some((_, Err(source))) => return Err(Error::Refused { request: label, source }),
                        Some((_, Ok(()))) => is_end = true,
                        None if message.kind() == libc::NLMSG_DONE as u16 => is_end = true,
                        None => told.push(message.0[HEADER..].to_owned()),
                    }
                }
            }
            if is_whole {
                return Ok(told);
            }
        }
        Err(Error::Unanswered(label))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One message of an answer, with its header.
struct Message<'a>(&'a [u8]);

impl Message<'_> {
    fn half(&self, at: usize) -> u16 {
        u16::from_ne_bytes([self.0[at], self.0[at + 1]])
    }

    fn kind(&self) -> u16 {
        self.half(4)
    }

    fn flags(&self) -> u16 {
        self.half(FLAGS)
    }

    /// For an acknowledgement or an error, the index of the request and what became of it.
    fn result(&self) -> Option<(usize, Result<(), Errno>)> {
        if self.kind() != libc::NLMSG_ERROR as u16 {
            return None;
        }
        let request = u32::from_ne_bytes(self.0[8..12].try_into().ok()?) as usize;
        let code = i32::from_ne_bytes(self.0.get(HEADER..HEADER + 4)?.try_into().ok()?);
        Some((request, if code == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(-code)) }))
    }
}

/// The messages in one answer.
fn messages(mut answer: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(answer.get(..4)?.try_into().ok()?) as usize;
        let message = answer.get(..length.max(HEADER))?;
        answer = &answer[message.len().next_multiple_of(4).min(answer.len())..];
        Some(Message(message))
    })
}

/// Requests to be sent together.
#[derive(Default)]
pub(crate) struct Requests {
    bytes: Vec<u8>,
    sent: Vec<Sent>,
}

struct Sent {
    /// What it asks for, in words.
    label: &'static str,
    /// Whether it only begins or ends a batch.
    is_around: bool,
    /// Where in the bytes it begins.
    start: usize,
}

impl Requests {
    /// Adds one: `flags` are those besides `NLM_F_REQUEST`, `write` appends what follows the header.
    pub(crate) fn push(&mut self, label: &'static str, kind: u16, flags: i32, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.bytes.len();
        let flags = flags | libc::NLM_F_REQUEST;
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((flags as u16).to_ne_bytes());
        self.bytes.extend((self.sent.len() as u32).to_ne_bytes());
        self.bytes.extend([0; 4]);
        write(&mut self.bytes);
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self.sent.push(Sent { label, is_around: false, start });
    }

    /// Adds what begins or ends a batch, and asks for nothing itself.
    pub(crate) fn push_around(&mut self, label: &'static str, kind: u16, write: impl FnOnce(&mut Vec<u8>)) {
        self.push(label, kind, 0, write);
        self.sent.last_mut().expect("one was pushed").is_around = true;
    }

    /// The bytes so far.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Asks for an answer to the last request, and returns its index. What begins and ends a batch is none: kernels before
    /// Linux 6.10 answer neither.
    fn acknowledge_last(&mut self) -> Option<usize> {
        let last = self.sent.iter().rposition(|sent| !sent.is_around)?;
        let at = self.sent[last].start + FLAGS;
        let flags = u16::from_ne_bytes([self.bytes[at], self.bytes[at + 1]]) | libc::NLM_F_ACK as u16;
        self.bytes[at..at + 2].copy_from_slice(&flags.to_ne_bytes());
        Some(last)
    }
}
