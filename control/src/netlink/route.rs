//! Routes of any table, both families.

use super::socket::Doing;
use super::{Family, Netlink, NetlinkError, ORIGIN_KERNEL};
use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;

/// The metric that the kernel gives an IPv6 route without one (`IP6_RT_PRIO_USER`).
const METRIC_V6_DEFAULT: u32 = 1024;

/// What a route does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RouteKind {
    /// Sends it on.
    Unicast,
    /// Delivers it here.
    Local,
    /// Answers "unreachable".
    Unreachable,
    /// Drops it without a word.
    Blackhole,
    /// Answers "prohibited".
    Prohibit,
    /// Another kind of the kernel's (broadcast, multicast, throw …), by number.
    Other(u8),
}

/// A route as we write one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteSpec {
    /// The table it is in.
    pub table: u32,
    /// What it is for; a prefix of length 0 is the default route.
    pub destination: IpNetwork,
    /// What it does.
    pub kind: RouteKind,
    /// The interface it goes out by; none for the kinds that send nothing.
    pub device: Option<String>,
    /// The next hop, if it is not the destination itself.
    pub gateway: Option<IpAddr>,
    /// Among routes to the same destination the lowest wins; 0 is the family's default.
    pub metric: u32,
    /// The path MTU that the node's own senders assume.
    pub mtu: Option<u32>,
    /// The largest TCP segment that the node's own senders announce, in bytes.
    pub advmss: Option<u32>,
    /// The source that the node's own packets get.
    pub prefsrc: Option<IpAddr>,
    /// How far the destination is (`RT_SCOPE_…`), IPv4 only; `None` leaves it to the kind of the route.
    pub scope: Option<u8>,
    /// Whether the next hop is taken to be on the link, whatever the addresses say.
    pub onlink: bool,
    /// Who made it (`RTPROT_…`).
    pub origin: u8,
}

impl RouteSpec {
    /// A route out by `device`, `protocol kernel`.
    pub fn unicast(table: u32, destination: IpNetwork, device: impl Into<String>) -> RouteSpec {
        RouteSpec { device: Some(device.into()), ..RouteSpec::of_kind(table, destination, RouteKind::Unicast) }
    }

    /// A route that answers "unreachable", `protocol kernel`.
    pub fn unreachable(table: u32, destination: IpNetwork) -> RouteSpec {
        RouteSpec::of_kind(table, destination, RouteKind::Unreachable)
    }

    /// A route that drops, `protocol kernel`.
    pub fn blackhole(table: u32, destination: IpNetwork) -> RouteSpec {
        RouteSpec::of_kind(table, destination, RouteKind::Blackhole)
    }

    fn of_kind(table: u32, destination: IpNetwork, kind: RouteKind) -> RouteSpec {
        let destination = IpNetwork::new(destination.network(), destination.prefix()).expect("the prefix of a valid network");
        let origin = ORIGIN_KERNEL;
        let spec = RouteSpec {
            table,
            destination,
            kind,
            device: None,
            gateway: None,
            metric: 0,
            mtu: None,
            advmss: None,
            prefsrc: None,
            scope: None,
            onlink: false,
            origin,
        };
        spec.metric(0)
    }

    /// With this metric.
    pub fn metric(mut self, metric: u32) -> RouteSpec {
        self.metric = if metric == 0 && self.family() == Family::V6 { METRIC_V6_DEFAULT } else { metric };
        self
    }

    /// By this next hop.
    pub fn via(mut self, gateway: IpAddr) -> RouteSpec {
        self.gateway = Some(gateway);
        self
    }

    /// The next hop is on the link.
    pub fn onlink(mut self) -> RouteSpec {
        self.onlink = true;
        self
    }

    /// With this path MTU for the node's own senders.
    pub fn mtu(mut self, bytes: u32) -> RouteSpec {
        self.mtu = Some(bytes);
        self
    }

    /// With this source for the node's own packets.
    pub fn prefsrc(mut self, address: IpAddr) -> RouteSpec {
        self.prefsrc = Some(address);
        self
    }

    /// Made by another.
    pub fn origin(mut self, origin: u8) -> RouteSpec {
        self.origin = origin;
        self
    }

    /// Its family.
    pub fn family(&self) -> Family {
        Family::of(self.destination.ip())
    }

    /// Whether adding `self` with [`Netlink::replace_route`] replaces `other`, or leaves it as it is because it is the same to the
    /// kernel. A deletion of `other` afterwards would take `self`.
    pub fn takes_the_place_of(&self, other: &RouteSpec) -> bool {
        let same_place = self.table == other.table && self.destination == other.destination && self.metric == other.metric;
        // IPv6 keeps routes of one metric that differ in their next hop (net/ipv6/ip6_fib.c), IPv4 does not.
        let same_hop = self.device == other.device && self.gateway == other.gateway && self.kind == other.kind;
        same_place && (self.family() == Family::V4 || same_hop)
    }

    fn message(&self, device: Option<u32>) -> RouteMessage {
        let mut message = RouteMessage::default();
        let header = &mut message.header;
        header.address_family = self.family().kernel();
        header.destination_prefix_length = self.destination.prefix();
        header.protocol = RouteProtocol::from(self.origin);
        header.kind = match self.kind {
            RouteKind::Unicast => RouteType::Unicast,
            RouteKind::Local => RouteType::Local,
            RouteKind::Unreachable => RouteType::Unreachable,
            RouteKind::Blackhole => RouteType::BlackHole,
            RouteKind::Prohibit => RouteType::Prohibit,
            RouteKind::Other(kind) => kind.into(),
        };
        header.scope = match self.scope {
            Some(scope) if self.family() == Family::V4 => RouteScope::from(scope),
            _ => usual_scope(self.family(), self.kind, self.gateway),
        };
        if self.onlink {
            header.flags |= RouteFlags::Onlink;
        }
        let attributes = &mut message.attributes;
        attributes.push(RouteAttribute::Table(self.table));
        if self.destination.prefix() > 0 {
            attributes.push(RouteAttribute::Destination(self.destination.network().into()));
        }
        attributes.extend(device.map(RouteAttribute::Oif));
        attributes.extend(self.gateway.map(|gateway| RouteAttribute::Gateway(gateway.into())));
        if self.metric != 0 {
            attributes.push(RouteAttribute::Priority(self.metric));
        }
        let metrics: Vec<RouteMetric> = self.mtu.map(RouteMetric::Mtu).into_iter().chain(self.advmss.map(RouteMetric::Advmss)).collect();
        if !metrics.is_empty() {
            attributes.push(RouteAttribute::Metrics(metrics));
        }
        attributes.extend(self.prefsrc.map(|source| RouteAttribute::PrefSource(source.into())));
        message
    }
}

impl fmt::Display for RouteSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} route ", self.family())?;
        match self.kind {
            RouteKind::Unicast => {}
            RouteKind::Local => write!(f, "local ")?,
            RouteKind::Unreachable => write!(f, "unreachable ")?,
            RouteKind::Blackhole => write!(f, "blackhole ")?,
            RouteKind::Prohibit => write!(f, "prohibit ")?,
            RouteKind::Other(kind) => write!(f, "type {kind} ")?,
        }
        if self.destination.prefix() == 0 {
            write!(f, "default")?
        } else {
            write!(f, "{}", self.destination)?
        }
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        if let Some(device) = &self.device {
            write!(f, " dev {device}")?;
        }
        if let Some(source) = self.prefsrc {
            write!(f, " src {source}")?;
        }
        if self.metric != 0 {
            write!(f, " metric {}", self.metric)?;
        }
        if let Some(mtu) = self.mtu {
            write!(f, " mtu {mtu}")?;
        }
        if let Some(advmss) = self.advmss {
            write!(f, " advmss {advmss}")?;
        }
        write!(f, " table {}", self.table)
    }
}

/// A route as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// What can be said of it in our words.
    pub spec: RouteSpec,
    /// Whether that is all. Routes with several next hops, tunnels or other metrics are others' and never taken for ours.
    pub exact: bool,
}

impl Route {
    /// Whether this is exactly what `spec` asks for.
    pub fn is(&self, spec: &RouteSpec) -> bool {
        self.exact && self.spec == *spec
    }
}

impl Netlink {
    /// The routes of one table and family. A table that does not exist is empty.
    pub fn routes(&self, family: Family, table: u32) -> Result<Vec<Route>, NetlinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = family.kernel();
        message.attributes.push(RouteAttribute::Table(table));
        let object = format_args!("{family} routes of table {table}");
        let found = match self.transport.dumped(Doing { operation: "list", object: &object }, RouteNetlinkMessage::GetRoute(message)) {
            Err(error) if error.is_missing() => return Ok(Vec::new()),
            other => other?,
        };
        let mut names: HashMap<u32, String> = HashMap::new();
        if !found.is_empty() {
            names.extend(self.links()?.into_iter().map(|link| (link.index, link.name)));
        }
        let routes = found.into_iter().filter_map(|message| route_of(message, |index| names.get(&index).cloned()));
        Ok(routes.filter(|route| route.spec.table == table && route.spec.family() == family).collect())
    }

    /// Adds a route. That its place is taken is an error (`EEXIST`).
    pub fn add_route(&self, spec: &RouteSpec) -> Result<(), NetlinkError> {
        self.write_route("add", spec, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Puts a route in its place, whatever was there.
    pub fn replace_route(&self, spec: &RouteSpec) -> Result<(), NetlinkError> {
        self.write_route("replace", spec, NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn write_route(&self, operation: &'static str, spec: &RouteSpec, flags: u16) -> Result<(), NetlinkError> {
        let message = spec.message(self.device_index(spec.device.as_deref())?);
        self.transport.acknowledged(Doing { operation, object: spec }, RouteNetlinkMessage::NewRoute(message), flags)
    }

    /// Deletes a route.
    pub fn delete_route(&self, spec: &RouteSpec) -> Result<(), NetlinkError> {
        let message = spec.message(self.device_index(spec.device.as_deref())?);
        self.transport.acknowledged(Doing { operation: "delete", object: spec }, RouteNetlinkMessage::DelRoute(message), 0)
    }

    /// How the node would reach `destination`: the route the kernel chooses for a packet of its own.
    pub fn route_to(&self, destination: IpAddr) -> Result<Route, NetlinkError> {
        let mut message = RouteMessage::default();
        let family = Family::of(destination);
        message.header.address_family = family.kernel();
        message.header.destination_prefix_length = family.bits();
        message.attributes.push(RouteAttribute::Destination(destination.into()));
        let object = format_args!("the route to {destination}");
        let doing = Doing { operation: "look up", object: &object };
        let found = self.transport.fetched(doing, RouteNetlinkMessage::GetRoute(message))?;
        let names: HashMap<u32, String> = self.links()?.into_iter().map(|link| (link.index, link.name)).collect();
        found.and_then(|message| route_of(message, |index| names.get(&index).cloned())).ok_or_else(|| NetlinkError::Malformed {
            operation: "look up",
            object: object.to_string(),
            detail: "it names no route".to_owned(),
        })
    }

    fn device_index(&self, device: Option<&str>) -> Result<Option<u32>, NetlinkError> {
        device.map(|name| Ok(self.expect_link(name)?.index)).transpose()
    }
}

pub(super) fn route_of(message: RouteNetlinkMessage, name_of: impl Fn(u32) -> Option<String>) -> Option<Route> {
    let (RouteNetlinkMessage::NewRoute(message) | RouteNetlinkMessage::DelRoute(message)) = message else { return None };
    let header = &message.header;
    let family = Family::from_kernel(header.address_family)?;
    let mut exact = header.tos == 0 && header.source_prefix_length == 0;
    let mut destination = family.unspecified();
    let mut table = u32::from(header.table);
    let (mut device, mut gateway, mut metric, mut mtu, mut advmss, mut prefsrc) = (None, None, 0, None, None, None);
    for attribute in message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip_of(address)?,
            RouteAttribute::Gateway(address) => gateway = ip_of(address),
            RouteAttribute::PrefSource(address) => prefsrc = ip_of(address),
            RouteAttribute::Table(number) => table = number,
            RouteAttribute::Priority(value) => metric = value,
            RouteAttribute::Oif(index) => device = Some(name_of(index).unwrap_or_else(|| format!("if{index}"))),
            RouteAttribute::Metrics(metrics) => {
                for value in metrics {
                    match value {
                        RouteMetric::Mtu(bytes) => mtu = Some(bytes),
                        RouteMetric::Advmss(bytes) => advmss = Some(bytes),
                        RouteMetric::Other(_) => {}
                        _ => exact = false,
                    }
                }
            }
            RouteAttribute::CacheInfo(_) | RouteAttribute::Preference(_) | RouteAttribute::Uid(_) => {}
            _ => exact = false,
        }
    }
    let kind = match header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Local => RouteKind::Local,
        RouteType::Unreachable => RouteKind::Unreachable,
        RouteType::BlackHole => RouteKind::Blackhole,
        RouteType::Prohibit => RouteKind::Prohibit,
        other => RouteKind::Other(other.into()),
    };
    if matches!(kind, RouteKind::Unreachable | RouteKind::Blackhole | RouteKind::Prohibit) {
        device = None; // IPv6 shows `lo` for them
    }
    let destination = IpNetwork::new(destination, header.destination_prefix_length).ok()?;
    let onlink = header.flags.contains(RouteFlags::Onlink);
    let origin = header.protocol.into();
    let scope = (family == Family::V4 && header.scope != usual_scope(family, kind, gateway)).then(|| header.scope.into());
    Some(Route { spec: RouteSpec { table, destination, kind, device, gateway, metric, mtu, advmss, prefsrc, scope, onlink, origin }, exact })
}

/// As `ip route` does: a destination on the link has link scope, or the kernel would not resolve next hops through it.
fn usual_scope(family: Family, kind: RouteKind, gateway: Option<IpAddr>) -> RouteScope {
    match (family, kind, gateway) {
        (Family::V4, RouteKind::Unicast, None) => RouteScope::Link,
        (Family::V4, RouteKind::Local, _) => RouteScope::Host,
        _ => RouteScope::Universe,
    }
}

fn ip_of(address: RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(address.into()),
        RouteAddress::Inet6(address) => Some(address.into()),
        _ => None,
    }
}
