//! The few netlink messages needed in the microVM's network namespace: an address on a tap, a rate on a tap.
//!
//! Rates are nftables `limit` expressions in the tap's own ingress and egress hooks. They drop what is over the rate,
//! where Firecracker holds it back; senders that mind losses see the same average.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType, netlink};

const NLMSG_ERROR: u16 = 2;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const REPLACE: u16 = 0x100;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const SCOPE_HOST: u8 = 254;

const NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEWTABLE: u16 = 0;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const NEWRULE: u16 = 6;
const FAMILY_NETDEV: u8 = 5;
const NESTED: u16 = 0x8000;

/// Why the network was not changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no network device {name}")]
    NoDevice { name: String, source: io::Error },
    #[error("cannot talk to the kernel's network configuration")]
    Socket(#[source] io::Error),
    #[error("the kernel refused {what} on {device}")]
    Refused { what: &'static str, device: String, source: io::Error },
}

impl Error {
    /// Whether it takes privileges that this process does not have.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Refused { source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
    }
}

/// Which way packets pass the tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Host to guest.
    Receive,
    /// Guest to host.
    Transmit,
}

/// A mean rate and how much may pass at once beyond it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    Bytes { per_second: u64, burst: u32 },
    Packets { per_second: u64, burst: u32 },
}

/// Puts `address` on the tap, as a host address. That it is there already is no error. `false` for who may not: then it is
/// there if whoever made the tap has put it there.
pub fn add_address(device: &str, address: Ipv4Addr) -> Result<bool, Error> {
    match address_request(RTM_NEWADDR, CREATE | REPLACE, "an address", device, address) {
        Err(error) if error.is_denied() => Ok(false),
        added => added.map(|()| true),
    }
}

/// Takes `address` off the tap.
pub fn remove_address(device: &str, address: Ipv4Addr) -> Result<(), Error> {
    address_request(RTM_DELADDR, 0, "removing an address", device, address)
}

/// Makes `limits` the only ones on the tap, in one transaction.
pub fn set_limits(device: &str, limits: &[(Direction, Limit)]) -> Result<(), Error> {
    index(device)?;
    let table = format!("firecracker-qemu-{device}");
    let named_table = |message: &mut Message| message.string(1, &table);
    let mut batch = Batch::default();
    batch.push(BATCH_BEGIN, 0, &genmsg(0, NFTABLES), |_| {});
    // Creating it first makes deleting it certain to succeed.
    batch.nft(NEWTABLE, CREATE, named_table);
    batch.nft(DELTABLE, 0, named_table);
    if !limits.is_empty() {
        batch.nft(NEWTABLE, CREATE, named_table);
    }
    for direction in [Direction::Receive, Direction::Transmit] {
        let (chain, hook): (_, u32) = match direction {
            Direction::Transmit => ("ingress", 0),
            Direction::Receive => ("egress", 1),
        };
        let mut wanted = limits.iter().filter(|(of, _)| *of == direction).map(|(_, limit)| *limit).peekable();
        if wanted.peek().is_none() {
            continue;
        }
        batch.nft(NEWCHAIN, CREATE, |message| {
            message.string(1, &table);
            message.string(3, chain);
            message.nest(4, |hooked| {
                hooked.be32(1, hook);
                hooked.be32(2, 0);
                hooked.string(3, device);
            });
            message.string(7, "filter");
        });
        for limit in wanted {
            batch.nft(NEWRULE, CREATE | APPEND, |message| {
                message.string(1, &table);
                message.string(2, chain);
                message.nest(4, |expressions| over_then_drop(expressions, limit));
            });
        }
    }
    batch.push(BATCH_END, 0, &genmsg(0, NFTABLES), |_| {});
    let refused = |source| Error::Refused { what: "a rate limit", device: device.to_owned(), source };
    transact(Some(netlink::NETFILTER), &batch.0).map_err(Error::Socket)?.map_err(refused)
}

/// `limit rate over … drop`.
fn over_then_drop(expressions: &mut Message, limit: Limit) {
    let (rate, burst, kind) = match limit {
        Limit::Packets { per_second, burst } => (per_second, burst, 0),
        Limit::Bytes { per_second, burst } => (per_second, burst, 1),
    };
    expressions.nest(1, |expression| {
        expression.string(1, "limit");
        expression.nest(2, |data| {
            data.be64(1, rate);
            data.be64(2, 1);
            data.be32(3, burst);
            data.be32(4, kind);
            data.be32(5, 1);
        });
    });
    expressions.nest(1, |expression| {
        expression.string(1, "immediate");
        expression.nest(2, |data| {
            data.be32(1, 0);
            data.nest(2, |value| value.nest(2, |verdict| verdict.be32(1, 0)));
        });
    });
}

fn address_request(kind: u16, flags: u16, what: &'static str, device: &str, address: Ipv4Addr) -> Result<(), Error> {
    let index = index(device)?;
    let mut header = vec![u8::try_from(AddressFamily::INET.as_raw()).unwrap_or_default(), 32, 0, SCOPE_HOST];
    header.extend(index.to_ne_bytes());
    let mut batch = Batch::default();
    batch.push(kind, flags | ACK, &header, |message| {
        message.bytes(IFA_LOCAL, &address.octets());
        message.bytes(IFA_ADDRESS, &address.octets());
    });
    let refused = |source| Error::Refused { what, device: device.to_owned(), source };
    transact(None, &batch.0).map_err(Error::Socket)?.map_err(refused)
}

fn index(name: &str) -> Result<u32, Error> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(|e| Error::Socket(e.into()))?;
    rustix::net::netdevice::name_to_index(&socket, name)
        .map_err(|e| Error::NoDevice { name: name.to_owned(), source: e.into() })
}

/// Sends one datagram of messages (to rtnetlink without a family); the inner result is the kernel's first refusal. The kernel has answered by the time
/// the send returns, so nothing here waits.
fn transact(family: Option<rustix::net::Protocol>, bytes: &[u8]) -> io::Result<io::Result<()>> {
    let socket: OwnedFd = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        family,
    )?;
    let kernel = SocketAddrNetlink::new(0, 0);
    let mut none = SendAncillaryBuffer::new(&mut [] as &mut [MaybeUninit<u8>]);
    rustix::net::sendmsg_addr(socket.as_fd(), &kernel, &[IoSlice::new(bytes)], &mut none, SendFlags::empty())?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let got = match rustix::net::recv(&socket, buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
            Ok((got, _)) => got,
            Err(rustix::io::Errno::AGAIN) => return Ok(Ok(())),
            Err(error) => return Err(error.into()),
        };
        if let Some(code) = first_error(&buffer[..got]) {
            return Ok(Err(io::Error::from_raw_os_error(code)));
        }
    }
}

/// The first error number among answers; an acknowledgement is an error of zero.
fn first_error(mut answers: &[u8]) -> Option<i32> {
    while let Some((header, _)) = answers.split_at_checked(16) {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        if kind == NLMSG_ERROR && answers.len() >= 20 {
            let code = i32::from_ne_bytes([answers[16], answers[17], answers[18], answers[19]]);
            if code != 0 {
                return Some(-code);
            }
        }
        answers = answers.get(length.next_multiple_of(4).max(16)..)?;
    }
    None
}

/// `struct nfgenmsg`.
fn genmsg(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

/// Messages one after another, as the kernel takes them.
#[derive(Default)]
struct Batch(Vec<u8>);

impl Batch {
    fn nft(&mut self, kind: u16, flags: u16, fill: impl FnOnce(&mut Message)) {
        self.push(NFTABLES << 8 | kind, flags | ACK, &genmsg(FAMILY_NETDEV, 0), fill);
    }

    fn push(&mut self, kind: u16, flags: u16, header: &[u8], fill: impl FnOnce(&mut Message)) {
        let mut message = Message(header.to_vec());
        fill(&mut message);
        let length = u32::try_from(16 + message.0.len()).unwrap_or(u32::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend((REQUEST | flags).to_ne_bytes());
        // Sequence number and port: with one transaction per socket neither tells anything.
        self.0.extend([0; 8]);
        self.0.extend(message.0);
    }
}

/// A message body: attributes after a fixed header.
struct Message(Vec<u8>);

impl Message {
    fn bytes(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn string(&mut self, kind: u16, value: &str) {
        self.bytes(kind, &[value.as_bytes(), b"\0"].concat());
    }

    fn be32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    fn be64(&mut self, kind: u16, value: u64) {
        self.bytes(kind, &value.to_be_bytes());
    }

    fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let mut inner = Self(Vec::new());
        fill(&mut inner);
        self.bytes(kind | NESTED, &inner.0);
    }
}
