//! Addresses of interfaces.

use super::socket::Doing;
use super::{Family, Netlink, NetlinkError};
use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope};
use std::fmt;

/// Whether an IPv6 address is tried for duplicates before it may be used (RFC 4862 §5.4), which takes more than a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DuplicateDetection {
    /// It is, as the interface is configured.
    Default,
    /// It is not (`nodad`): right for a pod, whose address nobody else can have.
    Off,
}

/// An address to be given to an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressSpec {
    /// The interface.
    pub device: String,
    /// The address, with its prefix's length.
    pub address: IpNetwork,
    /// Whether it is tried for duplicates.
    pub duplicate_detection: DuplicateDetection,
    /// Who may be told of it.
    pub reach: Reach,
}

/// Who may be told of an address: a source is chosen among those that its receiver can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Anybody.
    Everywhere,
    /// Nobody but the host itself (`RT_SCOPE_HOST`): the kernel takes it for no packet's source.
    Host,
}

impl AddressSpec {
    /// An address that is usable at once.
    pub fn new(device: impl Into<String>, address: IpNetwork) -> AddressSpec {
        AddressSpec { device: device.into(), address, duplicate_detection: DuplicateDetection::Off, reach: Reach::Everywhere }
    }

    /// The same, of which nobody else is told.
    pub fn for_the_host_alone(self) -> AddressSpec {
        AddressSpec { reach: Reach::Host, ..self }
    }

    fn message(&self, index: u32) -> AddressMessage {
        let mut message = AddressMessage::default();
        let ip = self.address.ip();
        message.header.family = Family::of(ip).kernel();
        message.header.prefix_len = self.address.prefix();
        message.header.index = index;
        message.header.scope = if ip.is_loopback() || self.reach == Reach::Host { AddressScope::Host } else { AddressScope::Universe };
        message.attributes.push(AddressAttribute::Local(ip));
        message.attributes.push(AddressAttribute::Address(ip));
        if ip.is_ipv6() && self.duplicate_detection == DuplicateDetection::Off {
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        if let IpNetwork::V4(network) = self.address
            && network.prefix() < 31
        {
            message.attributes.push(AddressAttribute::Broadcast(network.broadcast()));
        }
        message
    }
}

impl fmt::Display for AddressSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "address {} on {}", self.address, self.device)
    }
}

/// An address as an interface has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface, by index.
    pub index: u32,
    /// The address, with its prefix's length.
    pub address: IpNetwork,
    /// Whether it cannot be used yet: its duplicate detection runs or has failed.
    pub tentative: bool,
    /// Whether it is kept for old connections only (RFC 4862 §5.5.4).
    pub deprecated: bool,
    /// Whether it stays until somebody removes it.
    pub permanent: bool,
    /// Whether it is a temporary address or a further one of the same network.
    pub secondary: bool,
}

impl Netlink {
    /// Every address of every interface, both families.
    pub fn addresses(&self) -> Result<Vec<Address>, NetlinkError> {
        let doing = Doing { operation: "list", object: &"addresses" };
        let found = self.transport.dumped(doing, RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
        Ok(found.into_iter().filter_map(address_of).collect())
    }

    /// Gives an address to an interface. That it has it already is an error (`EEXIST`).
    pub fn add_address(&self, spec: &AddressSpec) -> Result<(), NetlinkError> {
        let message = spec.message(self.expect_link(&spec.device)?.index);
        self.transport.acknowledged(Doing { operation: "add", object: spec }, RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Takes an address away from an interface.
    pub fn delete_address(&self, spec: &AddressSpec) -> Result<(), NetlinkError> {
        let message = spec.message(self.expect_link(&spec.device)?.index);
        self.transport.acknowledged(Doing { operation: "delete", object: spec }, RouteNetlinkMessage::DelAddress(message), 0)
    }
}

pub(super) fn address_of(message: RouteNetlinkMessage) -> Option<Address> {
    let (RouteNetlinkMessage::NewAddress(message) | RouteNetlinkMessage::DelAddress(message)) = message else { return None };
    Family::from_kernel(message.header.family)?;
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    let (mut local, mut address) = (None, None);
    for attribute in message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(ip),
            AddressAttribute::Address(ip) => address = Some(ip),
            AddressAttribute::Flags(all) => flags = all,
            _ => {}
        }
    }
    // For point-to-point interfaces IFA_ADDRESS is the other end's (linux/if_addr.h).
    Some(Address {
        index: message.header.index,
        address: IpNetwork::new(local.or(address)?, message.header.prefix_len).ok()?,
        tentative: flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed),
        deprecated: flags.contains(AddressFlags::Deprecated),
        permanent: flags.contains(AddressFlags::Permanent),
        secondary: flags.contains(AddressFlags::Secondary),
    })
}
