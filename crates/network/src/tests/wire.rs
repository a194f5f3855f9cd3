//! A guest without a network stack: frames that are written to a slot's tap as they are, and read from it.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::guest::tap;
use crate::Slot;
use crate::slot::{GUEST_ADDRESS, GUEST_MAC, TAP, TAP_MAC};

pub(super) const UDP: u8 = 17;
pub(super) const ICMP: u8 = 1;

pub(super) struct Wire(File);

impl Wire {
    pub(super) fn open(slot: Slot) -> Self {
        Self(tap(&slot.netns_path(), TAP))
    }

    /// Sends a datagram from the guest's address.
    pub(super) fn send_udp(&mut self, from: u16, to: (Ipv4Addr, u16), text: &[u8]) {
        let mut datagram = Vec::new();
        for half in [from, to.1, 8 + text.len() as u16, 0] {
            datagram.extend(half.to_be_bytes());
        }
        datagram.extend(text);
        self.send(0x0800, &ipv4(UDP, to.0, &datagram));
    }

    /// Asks `to` for an echo. Each `id` is a connection of its own.
    pub(super) fn ping(&mut self, id: u16, to: Ipv4Addr) {
        let [high, low] = id.to_be_bytes();
        let mut echo = vec![8, 0, 0, 0, high, low, 0, 1];
        let sum = checksum(&echo);
        echo[2..4].copy_from_slice(&sum.to_be_bytes());
        self.send(0x0800, &ipv4(ICMP, to, &echo));
    }

    /// Sends what follows a frame's addresses.
    pub(super) fn send(&mut self, kind: u16, packet: &[u8]) {
        let frame = [&TAP_MAC[..], &GUEST_MAC, &kind.to_be_bytes(), packet].concat();
        self.0.write_all(&frame).unwrap();
    }

    /// The payload of the next IPv4 packet of that protocol, without headers; none when there is none for some seconds.
    pub(super) fn next(&mut self, protocol: u8) -> Option<Vec<u8>> {
        let mut frame = [0; 65536];
        loop {
            let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
            if poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&patience)).unwrap() == 0 {
                return None;
            }
            let length = self.0.read(&mut frame).unwrap();
            let frame = &frame[..length];
            if frame[12..14] == [8, 0] && frame[23] == protocol {
                return Some(frame[42..].to_vec());
            }
        }
    }
}

fn ipv4(protocol: u8, to: Ipv4Addr, content: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + content.len() as u16).to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
    packet.extend(GUEST_ADDRESS.octets());
    packet.extend(to.octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(content);
    packet
}

fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    let sum = (sum & 0xFFFF) + (sum >> 16);
    !((sum + (sum >> 16)) as u16)
}
