//! The rtnetlink requests that make up a slot.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::NetlinkSerializable;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::netlink::Requests;

const NEW: i32 = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;

impl Requests {
    fn route(&mut self, label: &'static str, flags: i32, message: &RouteNetlinkMessage) {
        self.push(label, message.message_type(), flags, |bytes| {
            let start = bytes.len();
            bytes.resize(start + message.buffer_len(), 0);
            message.serialize(&mut bytes[start..]);
        });
    }

    /// A veth pair: `name` in the namespace of the socket, `peer` in the one that `peer_netns` refers to.
    pub(crate) fn add_veth(&mut self, name: &str, peer: &str, peer_netns: BorrowedFd<'_>) {
        let mut other = LinkMessage::default();
        other.attributes = vec![LinkAttribute::IfName(peer.to_owned()), LinkAttribute::NetNsFd(peer_netns.as_raw_fd())];
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
            ]),
        ];
        self.route("make the veth pair", NEW, &RouteNetlinkMessage::NewLink(message));
    }

    pub(crate) fn delete_link(&mut self, name: &str) {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        self.route("delete the veth pair", libc::NLM_F_ACK, &RouteNetlinkMessage::DelLink(message));
    }

    /// Sets a link up, with these properties.
    pub(crate) fn set_up(&mut self, link: u32, properties: Vec<LinkAttribute>) {
        let mut message = LinkMessage::default();
        message.header.index = link;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = properties;
        self.route("set a link up", libc::NLM_F_ACK, &RouteNetlinkMessage::SetLink(message));
    }

    pub(crate) fn add_address(&mut self, link: u32, address: Ipv4Addr, prefix: u8) {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = prefix;
        message.header.index = link;
        message.attributes = vec![AddressAttribute::Local(address.into()), AddressAttribute::Address(address.into())];
        self.route("add an address", NEW, &RouteNetlinkMessage::NewAddress(message));
    }

    /// A route by `gateway` over `link`, for one address or for everything.
    pub(crate) fn add_route(&mut self, destination: Option<Ipv4Addr>, gateway: Ipv4Addr, link: u32) {
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: AddressFamily::Inet,
            destination_prefix_length: if destination.is_some() { 32 } else { 0 },
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Static,
            scope: RouteScope::Universe,
            kind: RouteType::Unicast,
            ..RouteHeader::default()
        };
        message.attributes = vec![RouteAttribute::Gateway(RouteAddress::Inet(gateway)), RouteAttribute::Oif(link)];
        message.attributes.extend(destination.map(|address| RouteAttribute::Destination(RouteAddress::Inet(address))));
        self.route("add a route", NEW, &RouteNetlinkMessage::NewRoute(message));
    }

    pub(crate) fn add_neighbour(&mut self, link: u32, address: Ipv4Addr, mac: [u8; 6]) {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = link;
        message.header.state = NeighbourState::Permanent;
        message.header.kind = RouteType::Unicast;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ];
        self.route("add a neighbour", NEW, &RouteNetlinkMessage::NewNeighbour(message));
    }
}
