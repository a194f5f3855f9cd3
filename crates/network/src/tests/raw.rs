//! Frames byte by byte: a guest that says whatever it likes on its tap, and ears at the uplink.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType};

use super::guest::{inside, tap};
use crate::Slot;
use crate::slot::{GUEST_ADDRESS, GUEST_MAC, TAP, TAP_MAC};

/// How long nothing may come before a test that waits for something fails.
const PATIENCE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

pub(super) const IPV4: u16 = 0x0800;
pub(super) const ARP: u16 = 0x0806;
pub(super) const IPV6: u16 = 0x86dd;
pub(super) const VLAN: u16 = 0x8100;
pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// An Ethernet frame from the guest to its gateway.
pub(super) fn frame(kind: u16, content: &[u8]) -> Vec<u8> {
    frame_from(GUEST_MAC, kind, content)
}

pub(super) fn frame_from(mac: [u8; 6], kind: u16, content: &[u8]) -> Vec<u8> {
    [&TAP_MAC[..], &mac, &kind.to_be_bytes(), content].concat()
}

/// An IPv4 packet; the guest's own and whole unless it is told otherwise.
pub(super) struct Packet {
    pub(super) from: Ipv4Addr,
    pub(super) to: Ipv4Addr,
    pub(super) protocol: u8,
    /// Of a multiple of 4 bytes.
    pub(super) options: Vec<u8>,
    /// In units of 8 bytes.
    pub(super) offset: u16,
    pub(super) more_follows: bool,
    pub(super) content: Vec<u8>,
}

impl Packet {
    pub(super) fn new(to: Ipv4Addr, protocol: u8, content: Vec<u8>) -> Self {
        Self { from: GUEST_ADDRESS, to, protocol, options: Vec::new(), offset: 0, more_follows: false, content }
    }

    pub(super) fn udp(to: Ipv4Addr, port: u16, said: &[u8]) -> Self {
        Self::new(to, UDP, udp(port, said))
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let words = 5 + self.options.len() / 4;
        let length = (words * 4 + self.content.len()) as u16;
        let flags = self.offset | if self.more_follows { 0x2000 } else { 0 };
        let mut header = vec![0x40 | words as u8, 0];
        header.extend(length.to_be_bytes());
        header.extend([0x12, 0x34]);
        header.extend(flags.to_be_bytes());
        header.extend([64, self.protocol, 0, 0]);
        header.extend(self.from.octets());
        header.extend(self.to.octets());
        header.extend(&self.options);
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header.extend(&self.content);
        header
    }

    pub(super) fn frame(&self) -> Vec<u8> {
        frame(IPV4, &self.bytes())
    }

    /// The same, cut into fragments of `size` bytes, a multiple of 8.
    pub(super) fn fragments(&self, size: usize) -> Vec<Vec<u8>> {
        let parts = self.content.chunks(size);
        let last = parts.len() - 1;
        let cut = |(index, part): (usize, &[u8])| {
            let offset = (index * size / 8) as u16;
            let part = part.to_vec();
            let options = self.options.clone();
            Packet { offset, more_follows: index < last, content: part, options, ..*self }.frame()
        };
        parts.enumerate().map(cut).collect()
    }
}

/// A datagram without a checksum, which UDP allows.
pub(super) fn udp(port: u16, said: &[u8]) -> Vec<u8> {
    let length = (8 + said.len()) as u16;
    [&4000u16.to_be_bytes()[..], &port.to_be_bytes(), &length.to_be_bytes(), &[0, 0], said].concat()
}

/// An echo request, or another message of ICMP.
pub(super) fn icmp(kind: u8, code: u8, rest: &[u8]) -> Vec<u8> {
    let mut message = [&[kind, code, 0, 0][..], rest].concat();
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// A TCP segment that belongs to no connection.
pub(super) fn segment(from: Ipv4Addr, to: Ipv4Addr, port: u16, flags: u8, said: &[u8]) -> Vec<u8> {
    let mut segment = [
        &4000u16.to_be_bytes()[..],
        &port.to_be_bytes(),
        &[0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0],
        said,
    ]
    .concat();
    let length = segment.len() as u16;
    let pseudo = [&from.octets()[..], &to.octets(), &[0, TCP], &length.to_be_bytes(), &segment].concat();
    let sum = checksum(&pseudo);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

/// An ARP message: 1 asks, 2 tells.
pub(super) fn arp(operation: u16, mac: [u8; 6], sender: Ipv4Addr, about: Ipv4Addr) -> Vec<u8> {
    [&[0, 1, 8, 0, 6, 4][..], &operation.to_be_bytes(), &mac, &sender.octets(), &[0; 6], &about.octets()].concat()
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A guest without a network stack.
pub(super) struct RawGuest(File);

impl RawGuest {
    pub(super) fn start(slot: Slot) -> Self {
        Self(tap(&slot.netns_path(), TAP))
    }

    pub(super) fn says(&mut self, frame: &[u8]) {
        self.0.write_all(frame).unwrap();
    }

    /// Says it again and again until there is an answer: what is said before the link is there nobody hears.
    pub(super) fn says_until_heard(&mut self, frame: &[u8]) {
        const BREATH: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        for _ in 0..500 {
            self.says(frame);
            let mut ready = [PollFd::new(&self.0, PollFlags::IN)];
            if poll(&mut ready, Some(&BREATH)).unwrap() == 1 {
                return drop(self.hears(|heard| heard[12..14] == frame[12..14]));
            }
        }
        panic!("the link does not come up");
    }

    /// The first frame that is like this.
    pub(super) fn hears(&mut self, mut like: impl FnMut(&[u8]) -> bool) -> Vec<u8> {
        let mut buffer = [0; 65536];
        loop {
            let mut ready = [PollFd::new(&self.0, PollFlags::IN)];
            assert_eq!(poll(&mut ready, Some(&PATIENCE)).unwrap(), 1, "the guest hears nothing like it");
            let length = self.0.read(&mut buffer).unwrap();
            if like(&buffer[..length]) {
                return buffer[..length].to_vec();
            }
        }
    }
}

/// Hears every frame that passes a link, as it is on the wire.
pub(super) struct Ear(OwnedFd);

impl Ear {
    pub(super) fn at(netns: &Path) -> Self {
        let all = Protocol::from_raw((3u16.to_be() as u32).try_into().unwrap());
        let socket = inside(netns, || {
            rustix::net::socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, Some(all))
        });
        Self(socket.unwrap())
    }

    /// Whether a frame with `said` in it comes before one with `end` in it.
    pub(super) fn hears(&self, said: &[u8], end: &[u8]) -> bool {
        let mut buffer = [0; 65536];
        let mut heard = false;
        loop {
            let mut ready = [PollFd::new(&self.0, PollFlags::IN)];
            assert_eq!(poll(&mut ready, Some(&PATIENCE)).unwrap(), 1, "the wire is silent");
            let (_, length) = rustix::net::recv(&self.0, &mut buffer[..], RecvFlags::empty()).unwrap();
            let has = |what: &[u8]| buffer[..length].windows(what.len()).any(|part| part == what);
            heard |= has(said);
            if has(end) {
                return heard;
            }
        }
    }
}
