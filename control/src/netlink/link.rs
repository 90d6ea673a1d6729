//! Links: veth pairs, bridges, VXLAN devices, and the settings of any link.

use super::socket::Doing;
use super::{MissingIsFine, Netlink, NetlinkError};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use podgate_runtime::netns::Netns;
use std::fmt;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::str::FromStr;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Mac, String> {
        let octets: Option<Vec<u8>> = text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
        octets
            .and_then(|octets| octets.try_into().ok())
            .map(Mac)
            .ok_or_else(|| format!("\"{text}\" is not an Ethernet address such as 02:00:00:00:00:01"))
    }
}

/// How the kernel makes a link's IPv6 link-local address (`addrgenmode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddrGenMode {
    /// From the Ethernet address, the kernel's default.
    Eui64,
    /// Not at all: the link has no link-local address, sends no neighbour solicitation and answers none.
    None,
    /// Another of the kernel's ways.
    Other,
}

/// Whether a link is administratively up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// Up.
    Up,
    /// Down.
    Down,
}

/// A link's counters that the gateway shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// Packets received.
    pub rx_packets: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets dropped on reception.
    pub rx_dropped: u64,
    /// Packets dropped on sending: for a TUN, what did not fit its queue.
    pub tx_dropped: u64,
    /// Erroneous packets received.
    pub rx_errors: u64,
    /// Failures in sending.
    pub tx_errors: u64,
}

/// A link as it is.
#[derive(Clone, Debug)]
pub struct Link {
    /// Its number in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its driver's kind: `veth`, `tun`, `bridge`, `vxlan`; empty for hardware and loopback.
    pub kind: String,
    /// Its Ethernet address; none for a TUN.
    pub mac: Option<Mac>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is set up.
    pub state: LinkState,
    /// Whether it has a carrier: for a veth, whether the other end is up; for a TUN, whether a queue is attached.
    pub carrier: LinkState,
    /// Whether it is the loopback interface.
    pub loopback: bool,
    /// The length of its transmission queue, in packets.
    pub txqueuelen: u32,
    /// The largest packet handed to it for segmentation, IPv6 (and IPv4 before Linux 6.3).
    pub gso_max_size: Option<u32>,
    /// The same for IPv4 (Linux 6.3).
    pub gso_ipv4_max_size: Option<u32>,
    /// The bridge or bond it belongs to, by index.
    pub controller: Option<u32>,
    /// A veth's other end, by index in its namespace.
    pub peer: Option<u32>,
    /// How its link-local address is made.
    pub addr_gen_mode: Option<AddrGenMode>,
    /// Its counters.
    pub stats: LinkStats,
}

/// What to change on a link; what is `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkSettings {
    /// Another name.
    pub name: Option<String>,
    /// The Ethernet address.
    pub mac: Option<Mac>,
    /// The MTU in bytes.
    pub mtu: Option<u32>,
    /// The queue's length in packets.
    pub txqueuelen: Option<u32>,
    /// The largest packet for segmentation, for IPv6 and for IPv4 alike.
    pub gso_max_size: Option<u32>,
    /// How the link-local address is made.
    pub addr_gen_mode: Option<AddrGenMode>,
    /// The bridge to join, by index; 0 leaves it.
    pub controller: Option<u32>,
    /// Up or down.
    pub state: Option<LinkState>,
}

impl LinkSettings {
    /// Nothing to change.
    pub fn new() -> LinkSettings {
        LinkSettings::default()
    }

    /// With another name.
    pub fn name(mut self, name: impl Into<String>) -> LinkSettings {
        self.name = Some(name.into());
        self
    }

    /// With this Ethernet address.
    pub fn mac(mut self, mac: Mac) -> LinkSettings {
        self.mac = Some(mac);
        self
    }

    /// With this MTU.
    pub fn mtu(mut self, mtu: u32) -> LinkSettings {
        self.mtu = Some(mtu);
        self
    }

    /// With this queue length.
    pub fn txqueuelen(mut self, packets: u32) -> LinkSettings {
        self.txqueuelen = Some(packets);
        self
    }

    /// With this limit for segmentation, both families.
    pub fn gso_max_size(mut self, bytes: u32) -> LinkSettings {
        self.gso_max_size = Some(bytes);
        self
    }

    /// With this way of making link-local addresses.
    pub fn addr_gen_mode(mut self, mode: AddrGenMode) -> LinkSettings {
        self.addr_gen_mode = Some(mode);
        self
    }

    /// In the bridge of this index.
    pub fn controller(mut self, index: u32) -> LinkSettings {
        self.controller = Some(index);
        self
    }

    /// Up.
    pub fn up(mut self) -> LinkSettings {
        self.state = Some(LinkState::Up);
        self
    }

    /// Down.
    pub fn down(mut self) -> LinkSettings {
        self.state = Some(LinkState::Down);
        self
    }

    /// What the kernel takes in one message. `addrgenmode` is taken by changes only, not at creation.
    fn attributes(&self) -> Vec<LinkAttribute> {
        let mut attributes = Vec::new();
        attributes.extend(self.name.clone().map(LinkAttribute::IfName));
        attributes.extend(self.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
        attributes.extend(self.mtu.map(LinkAttribute::Mtu));
        attributes.extend(self.txqueuelen.map(LinkAttribute::TxQueueLen));
        // The legacy limit goes first: setting it to 64 KiB or less sets the IPv4 one as well (net/core/dev.c).
        attributes.extend(self.gso_max_size.map(LinkAttribute::GsoMaxSize));
        attributes.extend(self.gso_max_size.map(LinkAttribute::GsoIpv4MaxSize));
        attributes.extend(self.controller.map(LinkAttribute::Controller));
        attributes
    }

    fn addr_gen_attribute(&self) -> Option<LinkAttribute> {
        let mode = match self.addr_gen_mode? {
            AddrGenMode::Eui64 => In6AddrGenMode::Eui64,
            AddrGenMode::None => In6AddrGenMode::None,
            AddrGenMode::Other => In6AddrGenMode::StablePrivacy,
        };
        Some(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(mode)])]))
    }

    fn apply_state(&self, message: &mut LinkMessage) {
        if let Some(state) = self.state {
            message.header.change_mask |= LinkFlags::Up;
            if state == LinkState::Up {
                message.header.flags |= LinkFlags::Up;
            }
        }
    }
}

/// A link to be made.
#[derive(Debug)]
pub struct NewLink<'a> {
    /// Its name.
    pub name: &'a str,
    /// What it is.
    pub kind: LinkKind<'a>,
    /// Its settings from the first moment on.
    pub settings: LinkSettings,
}

/// The kinds of links that can be made.
#[derive(Debug)]
pub enum LinkKind<'a> {
    /// A pair of connected interfaces.
    Veth {
        /// The other end's name.
        peer: &'a str,
        /// The namespace it is made in; `None` for the same one. It never exists anywhere else.
        peer_netns: Option<&'a Netns>,
        /// The other end's settings.
        peer_settings: LinkSettings,
    },
    /// A learning bridge.
    Bridge,
    /// A VXLAN or VXLAN-GPE tunnel.
    Vxlan(VxlanSpec),
}

impl LinkKind<'_> {
    /// A veth whose other end `peer` is made in `netns`.
    pub fn veth_into<'a>(peer: &'a str, netns: &'a Netns, peer_settings: LinkSettings) -> LinkKind<'a> {
        LinkKind::Veth { peer, peer_netns: Some(netns), peer_settings }
    }
}

/// A VXLAN device (RFC 7348) or VXLAN-GPE device, as a stock Linux peer has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VxlanSpec {
    /// The network's number; ignored when `mode` is external.
    pub vni: u32,
    /// The UDP port.
    pub port: u16,
    /// Our address on the underlay.
    pub local: Option<IpAddr>,
    /// Where everything is sent that has no better entry.
    pub remote: Option<IpAddr>,
    /// What is inside.
    pub mode: VxlanMode,
}

/// What a VXLAN device carries and who says where to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VxlanMode {
    /// Ethernet frames to a fixed remote.
    Ethernet,
    /// `gpe external`: IP packets without Ethernet header; the route's `encap ip` says where to.
    GpeExternal,
}

impl Netlink {
    /// Every link, in the order of their indices.
    pub fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let doing = Doing { operation: "list", object: &"links" };
        let found = self.transport.dumped(doing, RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        Ok(found.into_iter().filter_map(link_of).collect())
    }

    /// The link of that name, or `None`.
    pub fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let object = format_args!("link {name}");
        match self.transport.fetched(Doing { operation: "find", object: &object }, RouteNetlinkMessage::GetLink(message)) {
            Ok(found) => Ok(found.and_then(link_of)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The link of that name, which must be there.
    pub fn expect_link(&self, name: &str) -> Result<Link, NetlinkError> {
        self.link(name)?.ok_or_else(|| NetlinkError::Refused {
            operation: "find",
            object: format!("link {name}"),
            errno: libc::ENODEV,
            message: None,
        })
    }

    /// Makes a link. It is made down, gets `addrgenmode`, and goes up last, so that no link-local address is made in between.
    pub fn create_link(&self, new: &NewLink<'_>) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes = new.settings.attributes();
        message.attributes.push(LinkAttribute::IfName(new.name.to_owned()));
        message.attributes.push(LinkAttribute::LinkInfo(info_of(&new.kind)));
        let object = format_args!("link {} ({})", new.name, kind_name(&new.kind));
        let doing = Doing { operation: "create", object: &object };
        self.transport.acknowledged(doing, RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)?;
        let finished = self.finish(new);
        if finished.is_err() {
            let _ = self.delete_link(new.name);
        }
        finished
    }

    fn finish(&self, new: &NewLink<'_>) -> Result<(), NetlinkError> {
        let last = |settings: &LinkSettings| LinkSettings { addr_gen_mode: settings.addr_gen_mode, state: settings.state, ..LinkSettings::new() };
        if let LinkKind::Veth { peer, peer_netns, peer_settings } = &new.kind {
            let settings = last(peer_settings);
            if settings != LinkSettings::new() {
                match peer_netns {
                    Some(netns) => Netlink::open(netns)?.set_link(peer, &settings)?,
                    None => self.set_link(peer, &settings)?,
                }
            }
        }
        let settings = last(&new.settings);
        if settings == LinkSettings::new() { Ok(()) } else { self.set_link(new.name, &settings) }
    }

    /// Changes a link. Where several things change at once, `addrgenmode` is set before the link goes up.
    pub fn set_link(&self, name: &str, settings: &LinkSettings) -> Result<(), NetlinkError> {
        let index = self.expect_link(name)?.index;
        let object = format_args!("link {name}");
        let doing = Doing { operation: "change", object: &object };
        if let Some(attribute) = settings.addr_gen_attribute() {
            let mut message = LinkMessage::default();
            message.header.index = index;
            message.attributes.push(attribute);
            self.transport.acknowledged(doing, RouteNetlinkMessage::SetLink(message), 0)?;
        }
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = settings.attributes();
        settings.apply_state(&mut message);
        if message.attributes.is_empty() && settings.state.is_none() {
            return Ok(());
        }
        self.transport.acknowledged(doing, RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Moves a link into another namespace, where it arrives down and without addresses.
    pub fn move_link(&self, name: &str, netns: &Netns) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = self.expect_link(name)?.index;
        message.attributes.push(LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd()));
        let object = format_args!("link {name} to another namespace");
        self.transport.acknowledged(Doing { operation: "move", object: &object }, RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Deletes a link; a veth takes its other end with it.
    pub fn delete_link(&self, name: &str) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let object = format_args!("link {name}");
        self.transport.acknowledged(Doing { operation: "delete", object: &object }, RouteNetlinkMessage::DelLink(message), 0)
    }

    /// Deletes several links at once. The kernel waits for every CPU to let go of what it deletes; here it does so once for all of them
    /// (`rtnl_group_dellink` in net/core/rtnetlink.c). A link that is not there is passed over.
    pub fn delete_links(&self, names: &[&str]) -> Result<(), NetlinkError> {
        for name in names {
            let mut message = LinkMessage::default();
            message.attributes.push(LinkAttribute::IfName((*name).to_owned()));
            message.attributes.push(LinkAttribute::Group(DOOMED_GROUP));
            let object = format_args!("the group of link {name}");
            self.transport.acknowledged(Doing { operation: "set", object: &object }, RouteNetlinkMessage::SetLink(message), 0).or_missing()?;
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(DOOMED_GROUP));
        let object = format_args!("{} links", names.len());
        self.transport.acknowledged(Doing { operation: "delete", object: &object }, RouteNetlinkMessage::DelLink(message), 0).or_missing()
    }
}

/// The group (`IFLA_GROUP`) that links are put into to be deleted together: "pg".
const DOOMED_GROUP: u32 = 0x7067;

fn kind_name(kind: &LinkKind<'_>) -> &'static str {
    match kind {
        LinkKind::Veth { .. } => "veth",
        LinkKind::Bridge => "bridge",
        LinkKind::Vxlan(_) => "vxlan",
    }
}

fn info_of(kind: &LinkKind<'_>) -> Vec<LinkInfo> {
    match kind {
        LinkKind::Bridge => vec![LinkInfo::Kind(InfoKind::Bridge)],
        LinkKind::Veth { peer, peer_netns, peer_settings } => {
            let mut message = LinkMessage::default();
            message.attributes = peer_settings.attributes();
            message.attributes.push(LinkAttribute::IfName((*peer).to_owned()));
            if let Some(netns) = peer_netns {
                message.attributes.push(LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd()));
            }
            vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(message)))]
        }
        LinkKind::Vxlan(spec) => {
            let mut data = vec![InfoVxlan::Port(spec.port), InfoVxlan::UDPCsum(true)];
            match spec.mode {
                VxlanMode::Ethernet => data.push(InfoVxlan::Id(spec.vni)),
                VxlanMode::GpeExternal => data.extend([InfoVxlan::CollectMetadata(true), InfoVxlan::Gpe, InfoVxlan::Learning(false)]),
            }
            data.extend(spec.local.map(|address| match address {
                IpAddr::V4(address) => InfoVxlan::Local(address),
                IpAddr::V6(address) => InfoVxlan::Local6(address),
            }));
            data.extend(spec.remote.map(|address| match address {
                IpAddr::V4(address) => InfoVxlan::Group(address),
                IpAddr::V6(address) => InfoVxlan::Group6(address),
            }));
            vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(data))]
        }
    }
}

pub(super) fn link_of(message: RouteNetlinkMessage) -> Option<Link> {
    let (RouteNetlinkMessage::NewLink(message) | RouteNetlinkMessage::DelLink(message)) = message else { return None };
    if message.header.interface_family != AddressFamily::Unspec {
        return None; // a bridge port's own message
    }
    let state = |flag| if message.header.flags.contains(flag) { LinkState::Up } else { LinkState::Down };
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: String::new(),
        mac: None,
        mtu: 0,
        state: state(LinkFlags::Up),
        carrier: state(LinkFlags::LowerUp),
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        txqueuelen: 0,
        gso_max_size: None,
        gso_ipv4_max_size: None,
        controller: None,
        peer: None,
        addr_gen_mode: None,
        stats: LinkStats::default(),
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok().map(Mac),
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::TxQueueLen(len) => link.txqueuelen = len,
            LinkAttribute::GsoMaxSize(size) => link.gso_max_size = Some(size),
            LinkAttribute::GsoIpv4MaxSize(size) => link.gso_ipv4_max_size = Some(size),
            LinkAttribute::Controller(index) => link.controller = Some(index),
            LinkAttribute::Link(index) => link.peer = Some(index),
            LinkAttribute::LinkInfo(info) => {
                for part in info {
                    if let LinkInfo::Kind(kind) = part {
                        link.kind = kind.to_string();
                    }
                }
            }
            LinkAttribute::AfSpecUnspec(families) => link.addr_gen_mode = addr_gen_mode_of(&families).or(link.addr_gen_mode),
            LinkAttribute::Stats64(stats) => {
                link.stats = LinkStats {
                    rx_packets: stats.rx_packets,
                    tx_packets: stats.tx_packets,
                    rx_bytes: stats.rx_bytes,
                    tx_bytes: stats.tx_bytes,
                    rx_dropped: stats.rx_dropped,
                    tx_dropped: stats.tx_dropped,
                    rx_errors: stats.rx_errors,
                    tx_errors: stats.tx_errors,
                };
            }
            _ => {}
        }
    }
    Some(link)
}

fn addr_gen_mode_of(families: &[AfSpecUnspec]) -> Option<AddrGenMode> {
    let inet6 = families.iter().find_map(|family| if let AfSpecUnspec::Inet6(attributes) = family { Some(attributes) } else { None })?;
    inet6.iter().find_map(|attribute| match attribute {
        AfSpecInet6::AddrGenMode(In6AddrGenMode::Eui64) => Some(AddrGenMode::Eui64),
        AfSpecInet6::AddrGenMode(In6AddrGenMode::None) => Some(AddrGenMode::None),
        AfSpecInet6::AddrGenMode(_) => Some(AddrGenMode::Other),
        _ => None,
    })
}
