//! Neighbours: which Ethernet address an IP address has on a link.

use super::link::Mac;
use super::socket::Doing;
use super::{Family, Netlink, NetlinkError};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use std::fmt;
use std::net::IpAddr;

/// A permanent entry: it is never asked for on the wire, never ages and cannot be changed by what others send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeighbourSpec {
    /// The interface.
    pub device: String,
    /// The IP address.
    pub address: IpAddr,
    /// Its Ethernet address.
    pub mac: Mac,
}

impl fmt::Display for NeighbourSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "neighbour {} lladdr {} dev {}", self.address, self.mac, self.device)
    }
}

/// An entry as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface, by index.
    pub index: u32,
    /// The IP address.
    pub address: IpAddr,
    /// Its Ethernet address, if it is known.
    pub mac: Option<Mac>,
    /// Whether it is permanent.
    pub permanent: bool,
}

impl Netlink {
    /// Every entry of every interface, both families, those of multicast and loopback (`NOARP`) excepted.
    pub fn neighbours(&self) -> Result<Vec<Neighbour>, NetlinkError> {
        let mut neighbours = Vec::new();
        for family in Family::BOTH {
            let mut message = NeighbourMessage::default();
            message.header.family = family.kernel();
            let object = format_args!("{family} neighbours");
            let found = self.transport.dumped(Doing { operation: "list", object: &object }, RouteNetlinkMessage::GetNeighbour(message))?;
            neighbours.extend(found.into_iter().filter_map(neighbour_of));
        }
        Ok(neighbours)
    }

    /// Sets a permanent entry, whatever was there.
    pub fn set_neighbour(&self, spec: &NeighbourSpec) -> Result<(), NetlinkError> {
        let mut message = self.neighbour_message(&spec.device, spec.address)?;
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(spec.mac.0.to_vec()));
        self.transport.acknowledged(
            Doing { operation: "set", object: spec },
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Deletes the entry of `address` on `device`.
    pub fn delete_neighbour(&self, device: &str, address: IpAddr) -> Result<(), NetlinkError> {
        let message = self.neighbour_message(device, address)?;
        let object = format_args!("neighbour {address} dev {device}");
        self.transport.acknowledged(Doing { operation: "delete", object: &object }, RouteNetlinkMessage::DelNeighbour(message), 0)
    }

    fn neighbour_message(&self, device: &str, address: IpAddr) -> Result<NeighbourMessage, NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = Family::of(address).kernel();
        message.header.ifindex = self.expect_link(device)?.index;
        message.attributes.push(NeighbourAttribute::Destination(match address {
            IpAddr::V4(address) => NeighbourAddress::Inet(address),
            IpAddr::V6(address) => NeighbourAddress::Inet6(address),
        }));
        Ok(message)
    }
}

fn neighbour_of(message: RouteNetlinkMessage) -> Option<Neighbour> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else { return None };
    if message.header.state == NeighbourState::Noarp {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(IpAddr::V4(ip)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some(IpAddr::V6(ip)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.try_into().ok().map(Mac),
            _ => {}
        }
    }
    let permanent = message.header.state == NeighbourState::Permanent;
    Some(Neighbour { index: message.header.ifindex, address: address?, mac, permanent })
}
