//! Policy routing: what brings packets to the two TUNs, and nothing else.
//!
//! [`desired`] turns a plan into rules and routes, purely; [`apply()`] makes the kernel agree, changing only what differs, in an
//! order in which the node is reachable and the pods are closed in at every step; [`reconcile`] repeats that whenever somebody
//! changes something. The tables are design decision D1:
//!
//! ```text
//! in the gateway's namespace (fails closed)           on the node (`local` stays at 0, behind ours, and exists at every step)
//! pref 0   local                                      pref 0   iif HOST                              lookup local
//! pref 4   iif lo                lookup main          pref 0   to NODE_IP tcp|udp                    goto 10
//! pref 5   iif PODS              lookup main          pref 0   lookup local
//! pref 20  iif VETH from POD_IP  lookup UP            pref 10  to NODE_IP tcp|udp dport NODEPORTS    lookup HOST_TABLE
//! pref 30  blackhole   (no 32766, no 32767)           pref 11  to NODE_IP tcp|udp dport MASQ_RANGE   lookup HOST_TABLE
//! main: POD_IP dev VETH; unreachable default          pref 12  to HOST_ADDR proto dport              lookup HOST_TABLE
//! UP:   default dev PODS                              pref 100 lookup local;  pref 101 lookup CLUSTER_TABLE
//! ```
//!
//! Nothing of ours is in the node's `main`: others' rules (`from NODE_IP lookup T`) would steal it, and a lost device would leak
//! it to the default route. For the same reason each route of ours on the node has an `unreachable` one behind it.
//!
//! Read first: ip-rule(8), ip-route(8), `net/core/fib_rules.c`.

pub mod apply;
pub mod devices;
pub mod reconcile;

pub use apply::{Changes, RoutingError, Side, apply, withdraw};
pub use devices::{DEVICE_MTU, DeviceError, TXQUEUELEN_MAX};
pub use reconcile::{Event, Reconciler};

use crate::netlink::{Family, RouteSpec, RuleAction, RuleSpec, TABLE_LOCAL, TABLE_MAIN};
use ipnetwork::IpNetwork;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

/// On the node: the default route to the TUN `host`, for ports that are ours on the node's own addresses.
pub const HOST_TABLE: u32 = 232;
/// On the node: pods, services and other VIPs.
pub const CLUSTER_TABLE: u32 = 233;
/// In the gateway's namespace: the default route to the TUN `pods`.
pub const UP_TABLE: u32 = 234;

/// The metric of the `unreachable` routes, which count only when the real one is gone.
pub const METRIC_CLOSED: u32 = 9999;
/// `dport 61000-65535` is refused by the kernel, which takes 65535 for "no upper end" (`net/core/fib_rules.c`).
pub const DPORT_MAX: u16 = 65534;

/// Preference of `local` while pref 0 is rebuilt.
pub(crate) const PREF_MEANWHILE: u32 = 1;
const PREF_LO: u32 = 4;
const PREF_PODS: u32 = 5;
/// Preference of a pod's own rules.
pub const PREF_POD: u32 = 20;
pub(crate) const PREF_CLOSED: u32 = 30;
const PREF_NODE_PORTS: u32 = 10;
const PREF_MASQUERADE: u32 = 11;
const PREF_HOST_PORTS: u32 = 12;
const PREF_LOCAL_AGAIN: u32 = 100;
const PREF_CLUSTER: u32 = 101;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// What policy routing depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoutingPlan {
    /// The TUN in the gateway's namespace.
    pub pods_device: String,
    /// The TUN on the node.
    pub host_device: String,
    /// Each address of the node that pods' masqueraded traffic may leave from.
    pub node_addresses: Vec<IpAddr>,
    /// Those of them that answer NodePorts.
    pub node_port_addresses: Vec<IpAddr>,
    /// The source of the node's own packets to pods and services: NODE_IP, at most one of each family.
    pub sources: Vec<IpAddr>,
    /// The cluster's pod ranges.
    pub pod_cidrs: Vec<IpNetwork>,
    /// The cluster's service ranges.
    pub service_cidrs: Vec<IpNetwork>,
    /// Every other VIP (load balancers', external IPs) that is not an address of the node.
    pub vips: Vec<IpAddr>,
    /// NodePorts.
    pub node_ports: RangeInclusive<u16>,
    /// TCP ports of the node's own among them, where it answers load balancers' health checks.
    pub health_check_ports: BTreeSet<u16>,
    /// Source ports of masqueraded traffic; none where it is switched off.
    pub masquerade: Vec<RangeInclusive<u16>>,
    /// Single ports on the node's addresses that are ours.
    pub host_ports: Vec<HostPort>,
    /// The pods' MTU, which the node's own packets to them must fit.
    pub pod_mtu: u32,
    /// The MTU of what the node sends to its own NodePorts, and of what it forwards to us.
    pub host_mtu: u32,
    /// The pods attached to this node.
    pub pods: Vec<PodRoute>,
}

impl RoutingPlan {
    /// Whether `other` differs from it in pods at most.
    fn is_but_for_pods(&self, other: &RoutingPlan) -> bool {
        let bare = |plan: &RoutingPlan| RoutingPlan { pods: Vec::new(), ..plan.clone() };
        bare(self) == bare(other)
    }
}

/// A port on an address of the node that leads into the gateway: a hostPort, or a VIP that is an address of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    /// The address.
    pub address: IpAddr,
    /// The protocol's number.
    pub protocol: u8,
    /// The port.
    pub port: u16,
}

/// A pod as routing sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRoute {
    /// The host end of its veth.
    pub veth: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

impl PodRoute {
    /// What lets the pod's own packets out, and nobody else's through its veth.
    pub fn rules(&self) -> impl Iterator<Item = RuleSpec> {
        self.addresses
            .iter()
            .map(|address| RuleSpec::new(Family::of(*address), PREF_POD, RuleAction::Lookup(UP_TABLE)).iif(&self.veth).from(whole(*address)))
    }

    /// The way to the pod.
    pub fn routes(&self) -> impl Iterator<Item = RouteSpec> {
        self.addresses.iter().map(|address| RouteSpec::unicast(TABLE_MAIN, whole(*address), &self.veth))
    }
}

/// The rules and routes of one side, in the order in which they are tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Rules; those of equal preference in this order.
    pub rules: Vec<RuleSpec>,
    /// Routes.
    pub routes: Vec<RouteSpec>,
}

/// What the plan asks for on `side`.
pub fn desired(plan: &RoutingPlan, side: Side) -> Desired {
    match side {
        Side::Gateway => in_the_gateway(plan),
        Side::Node => on_the_node(plan),
    }
}

fn in_the_gateway(plan: &RoutingPlan) -> Desired {
    let mut desired = Desired::default();
    for family in Family::BOTH {
        let rule = |pref, action| RuleSpec::new(family, pref, action);
        desired.rules.push(rule(0, RuleAction::Lookup(TABLE_LOCAL)));
        // Errors that the kernel makes here go straight to the pod; what is written to PODS, to a pod and nowhere else.
        desired.rules.push(rule(PREF_LO, RuleAction::Lookup(TABLE_MAIN)).iif("lo"));
        desired.rules.push(rule(PREF_PODS, RuleAction::Lookup(TABLE_MAIN)).iif(&plan.pods_device));
        desired.rules.extend(plan.pods.iter().flat_map(PodRoute::rules).filter(|rule| rule.family == family));
        desired.rules.push(rule(PREF_CLOSED, RuleAction::Blackhole));
        desired.routes.push(RouteSpec::unreachable(TABLE_MAIN, everything(family)).metric(METRIC_CLOSED));
        desired.routes.push(RouteSpec::unicast(UP_TABLE, everything(family), &plan.pods_device));
    }
    desired.routes.extend(plan.pods.iter().flat_map(PodRoute::routes));
    desired
}

fn on_the_node(plan: &RoutingPlan) -> Desired {
    let mut desired = Desired::default();
    for family in Family::BOTH {
        let ranges = plan.pod_cidrs.iter().chain(&plan.service_cidrs).copied().chain(plan.vips.iter().map(|vip| whole(*vip)));
        let targets: BTreeSet<IpNetwork> = ranges.filter(|range| Family::of(range.ip()) == family).collect();
        if targets.is_empty() {
            continue; // the cluster does not use this family
        }
        let ports = port_rules(plan, family);
        // Only what has a port rule needs the detour around `local`, and only to the first of them.
        if let Some(first) = ports.iter().map(|rule| rule.pref).min() {
            desired.rules.push(RuleSpec::new(family, 0, RuleAction::Lookup(TABLE_LOCAL)).iif(&plan.host_device));
            let detours: BTreeSet<_> = ports.iter().map(|rule| (rule.to, rule.protocol)).collect();
            for (to, protocol) in detours {
                desired.rules.push(RuleSpec { to, protocol, ..RuleSpec::new(family, 0, RuleAction::Goto(first)) });
            }
        } else {
            desired.rules.push(RuleSpec::new(family, 0, RuleAction::Lookup(TABLE_LOCAL)).iif(&plan.host_device));
        }
        desired.rules.push(RuleSpec::new(family, 0, RuleAction::Lookup(TABLE_LOCAL)));
        desired.rules.extend(ports);
        desired.rules.push(RuleSpec::new(family, PREF_LOCAL_AGAIN, RuleAction::Lookup(TABLE_LOCAL)));
        desired.rules.push(RuleSpec::new(family, PREF_CLUSTER, RuleAction::Lookup(CLUSTER_TABLE)));

        desired.routes.push(RouteSpec::unicast(HOST_TABLE, everything(family), &plan.host_device).mtu(plan.host_mtu));
        desired.routes.push(RouteSpec::unreachable(HOST_TABLE, everything(family)).metric(METRIC_CLOSED));
        let source = plan.sources.iter().find(|source| Family::of(**source) == family);
        for target in targets {
            let mut route = RouteSpec::unicast(CLUSTER_TABLE, target, &plan.host_device).mtu(plan.pod_mtu);
            route.prefsrc = source.copied();
            desired.routes.push(route);
            desired.routes.push(RouteSpec::unreachable(CLUSTER_TABLE, target).metric(METRIC_CLOSED));
        }
    }
    desired
}

/// Ports on the node's own addresses that lead into the gateway.
fn port_rules(plan: &RoutingPlan, family: Family) -> Vec<RuleSpec> {
    let mut rules = Vec::new();
    let mut add = |pref, address: &IpAddr, protocol, ports: &RangeInclusive<u16>| {
        let ports = *ports.start()..=(*ports.end()).min(DPORT_MAX);
        if Family::of(*address) == family && !ports.is_empty() {
            rules.push(RuleSpec::new(family, pref, RuleAction::Lookup(HOST_TABLE)).to(whole(*address)).protocol(protocol).dport(ports));
        }
    };
    for protocol in [TCP, UDP] {
        for address in &plan.node_port_addresses {
            let own = plan.health_check_ports.iter().filter(|_| protocol == TCP);
            without(&plan.node_ports, own).for_each(|ports| add(PREF_NODE_PORTS, address, protocol, &ports));
        }
        for address in &plan.node_addresses {
            plan.masquerade.iter().for_each(|ports| add(PREF_MASQUERADE, address, protocol, ports));
        }
    }
    let host_ports: BTreeSet<&HostPort> = plan.host_ports.iter().collect();
    for HostPort { address, protocol, port } in host_ports {
        add(PREF_HOST_PORTS, address, *protocol, &(*port..=*port));
    }
    rules
}

/// `ports` in parts that leave `gaps` out. A socket of the node on a port that leads into the gateway would get no further than the handshake's
/// second packet: early demux finds the half-open connection, and what has a socket is not forwarded (`net/ipv4/ip_forward.c`).
fn without<'a>(ports: &RangeInclusive<u16>, gaps: impl Iterator<Item = &'a u16>) -> impl Iterator<Item = RangeInclusive<u16>> {
    let (mut start, end) = (u32::from(*ports.start()), u32::from(*ports.end()));
    let bounds: Vec<u32> = gaps.filter(|gap| ports.contains(gap)).map(|gap| u32::from(*gap)).chain([end + 1]).collect();
    bounds.into_iter().filter_map(move |gap| {
        let part = (start < gap).then(|| start as u16..=(gap - 1) as u16);
        start = gap + 1;
        part
    })
}

/// The network of this one address.
pub fn whole(address: IpAddr) -> IpNetwork {
    IpNetwork::from(address)
}

fn everything(family: Family) -> IpNetwork {
    IpNetwork::new(family.unspecified(), 0).expect("0 is a prefix length of both families")
}

#[cfg(test)]
mod tests;
