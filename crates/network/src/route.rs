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

use crate::attributes::{Attributes, Reader};
use crate::limits::{INGRESS_BURST, INGRESS_BYTES_PER_SECOND, INGRESS_QUEUE};
use crate::netlink::{Error, Requests, Socket};

const NEW: i32 = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
/// `struct ifinfomsg`.
const IFINFOMSG: usize = 16;
const IFLA_MTU: u16 = 4;

/// One end of a veth pair.
pub(crate) struct VethEnd<'a> {
    pub(crate) name: &'a str,
    pub(crate) mac: [u8; 6],
}

impl Requests {
    fn route(&mut self, label: &'static str, flags: i32, message: &RouteNetlinkMessage) {
        self.push(label, message.message_type(), flags, |bytes| {
            let start = bytes.len();
            bytes.resize(start + message.buffer_len(), 0);
            message.serialize(&mut bytes[start..]);
        });
    }

    /// A veth pair: `here` in the namespace of the socket, with this index and up; `there` in the one that `there_netns`
    /// refers to, and down.
    pub(crate) fn add_veth(
        &mut self,
        here: &VethEnd<'_>,
        index: u32,
        there: &VethEnd<'_>,
        there_netns: BorrowedFd<'_>,
        mtu: u32,
    ) {
        let attributes = |end: &VethEnd<'_>| {
            vec![
                LinkAttribute::IfName(end.name.to_owned()),
                LinkAttribute::Address(end.mac.to_vec()),
                LinkAttribute::Mtu(mtu),
            ]
        };
        let mut other = LinkMessage::default();
        other.attributes = attributes(there);
        other.attributes.push(LinkAttribute::NetNsFd(there_netns.as_raw_fd()));
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = attributes(here);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
        ]));
        self.route("make the veth pair", NEW, &RouteNetlinkMessage::NewLink(message));
    }

    pub(crate) fn delete_link(&mut self, name: &str) {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        self.route("delete a link", 0, &RouteNetlinkMessage::DelLink(message));
    }

    /// Makes the link send no faster than a guest may receive. What it has saved up is a full burst again afterwards.
    pub(crate) fn shape(&mut self, link: u32) {
        const RTM_NEWQDISC: u16 = 36;
        const ROOT: u32 = 0xFFFF_FFFF;
        /// `1:`, by which `tc` shows it.
        const HANDLE: u32 = 1 << 16;
        const TCA_KIND: u16 = 1;
        const TCA_OPTIONS: u16 = 2;
        const TCA_TBF_PARMS: u16 = 1;
        const TCA_TBF_BURST: u16 = 6;
        let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        self.push("shape a link", RTM_NEWQDISC, flags, |bytes| {
            // `struct tcmsg`: family, padding, link, handle, parent, information.
            for word in [0, link, HANDLE, ROOT, 0] {
                bytes.extend(word.to_ne_bytes());
            }
            let mut a = Attributes(bytes);
            a.text(TCA_KIND, "tbf");
            a.nest(TCA_OPTIONS, |a| {
                // `struct tc_tbf_qopt`: two of `struct tc_ratespec`, limit, buffer, MTU. The buffer is given in bytes
                // below. A rate's link layer must be known (1, Ethernet), or a table would be needed.
                let mut options = vec![0, 1, 0, 0, 0, 0, 0, 0];
                options.extend(INGRESS_BYTES_PER_SECOND.to_ne_bytes());
                options.extend([0; 12]);
                options.extend(INGRESS_QUEUE.to_ne_bytes());
                options.extend([0; 8]);
                a.bytes(TCA_TBF_PARMS, &options);
                a.bytes(TCA_TBF_BURST, &INGRESS_BURST.to_ne_bytes());
            });
        });
    }

    /// Sets a link up, with these properties.
    pub(crate) fn set_up(&mut self, link: u32, properties: Vec<LinkAttribute>) {
        let mut message = LinkMessage::default();
        message.header.index = link;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = properties;
        self.route("set a link up", 0, &RouteNetlinkMessage::SetLink(message));
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

/// The MTU of a link in the namespace of the socket.
pub(crate) fn mtu(socket: &Socket, link: &str) -> Result<Option<u32>, Error> {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(link.to_owned())];
    let mut request = Requests::default();
    // The acknowledgement ends the answer.
    request.route("look at a link", libc::NLM_F_ACK, &RouteNetlinkMessage::GetLink(message));
    let answers = socket.ask(&request)?;
    let mtu =
        |answer: &Vec<u8>| Reader(answer.get(IFINFOMSG..)?).get(IFLA_MTU)?.try_into().ok().map(u32::from_ne_bytes);
    Ok(answers.iter().find_map(mtu))
}
