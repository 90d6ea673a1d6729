//! An attachment in the kernel: the veth pair, what the gateway's namespace has of a pod, and what the pod has, in either mode.

use super::{AttachSpec, Attached, DefaultRoute, PodError, Pods, Target, of};
use crate::netlink::sysctl::{self, Key, SysctlError};
use crate::netlink::{
    AddrGenMode, AddressSpec, Family, Link, LinkKind, LinkSettings, LinkState, MissingIsFine, NeighbourSpec, Netlink, NetlinkError, NewLink,
    ORIGIN_BOOT, RouteSpec, RuleAction, RuleSpec, TABLE_MAIN,
};
use crate::routing::devices::POD_GATEWAY_V4;
use crate::routing::whole;
use ipnetwork::IpNetwork;
use podgate_cni::protocol::AttachMode;
use podgate_cni::result::Route;
use podgate_runtime::netns::Netns;
use std::net::{IpAddr, Ipv6Addr};

/// The pods' IPv6 next hop.
pub const POD_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// In a pod: the preference of `from ADDRESS lookup TABLE` for an interface without the default route.
const PREF_SOURCE: u32 = 1000;
/// In a pod: such a table is this and the interface's index.
const SOURCE_TABLES: u32 = 20_000;

/// The next hop of every pod.
pub fn gateway_of(family: Family) -> IpAddr {
    match family {
        Family::V4 => POD_GATEWAY_V4.into(),
        Family::V6 => POD_GATEWAY_V6.into(),
    }
}

impl Pods {
    /// The pair, up at the pod's end, with no address and no rule: nothing passes it.
    pub(super) fn make_link(&self, pod_ns: &Netns, pod_netlink: &Netlink, spec: &AttachSpec, mut pod: Attached) -> Result<Attached, PodError> {
        let error = of(&spec.id);
        let sysctl_error = |source| PodError::Sysctl { id: spec.id.clone(), source };
        let settings = LinkSettings::new().mtu(spec.mtu).gso_max_size(spec.gso_max_size).addr_gen_mode(AddrGenMode::None);
        let peer_settings = LinkSettings { mac: spec.mac, ..settings.clone() };
        let kind = LinkKind::veth_into(&spec.ifname, pod_ns, peer_settings);
        self.netlink.create_link(&NewLink { name: &pod.veth, kind, settings }).map_err(|source| match source.is_present_already() {
            // Our own name is new, so it is the pod's.
            true => PodError::InterfaceExists { ifname: spec.ifname.clone() },
            false => error(source),
        })?;
        let link = self.netlink.expect_link(&pod.veth).map_err(&error)?;
        pod.veth_index = link.index;
        pod.gateway_mac = link.mac.unwrap_or(pod.gateway_mac);
        pod.pod_mac = pod_netlink.expect_link(&spec.ifname).map_err(&error)?.mac.unwrap_or(pod.pod_mac);

        // As a host (forwarding off) the interface answers no router solicitation and takes no neighbour from one.
        if !self.veths_are_hosts {
            optional(sysctl::write_all(self.gateway.netns(), &as_host(&pod.veth))).map_err(sysctl_error)?;
        }
        prepare_pod(pod_ns, pod_netlink, spec)?;
        if spec.addresses.is_empty() {
            // Whoever gives the addresses speaks through it; without rules that is all that passes.
            self.netlink.set_link(&pod.veth, &LinkSettings::new().up()).map_err(&error)?;
        }
        Ok(pod)
    }

    /// Rules and routes in the gateway's namespace, then the pod's addresses and routes.
    pub(super) fn join(&self, pod_netlink: &Netlink, spec: &AttachSpec, mut pod: Attached) -> Result<Attached, PodError> {
        let error = of(&spec.id);
        let route = pod.route();
        for rule in route.rules() {
            self.netlink.add_rule(&rule).map_err(&error)?;
        }
        self.netlink.set_link(&pod.veth, &LinkSettings::new().up()).map_err(&error)?;
        for address in &pod.addresses {
            let neighbour = NeighbourSpec { device: pod.veth.clone(), address: *address, mac: pod.pod_mac };
            self.netlink.set_neighbour(&neighbour).map_err(&error)?;
        }
        for route in route.routes() {
            self.netlink.add_route(&route).map_err(&error)?;
        }
        pod.routes = furnish(pod_netlink, spec, &pod, Neighbours::Permanent)?;
        Ok(pod)
    }

    /// Whether an attachment is whole: its veth here if it has one, and in the pod the interface with `addresses` and the way out.
    pub fn check(&self, id: &str, pod_ns: &Netns, addresses: &[IpAddr]) -> Result<(), PodError> {
        let error = of(id);
        let broken = |what: String| Err(PodError::Broken { id: id.to_owned(), what });
        let Some(pod) = self.find(id) else { return Err(PodError::NotAttached { id: id.to_owned() }) };
        if pod.netns != (pod_ns.id().dev, pod_ns.id().ino) {
            return broken("its namespace is not the one that it was attached in".into());
        }
        if let Some(address) = addresses.iter().find(|address| !pod.addresses.contains(address)) {
            return broken(format!("it does not have {address}"));
        }
        match (pod.mode, self.netlink.link(&pod.veth).map_err(&error)?) {
            (AttachMode::Tun, _) => {}
            (AttachMode::Veth, Some(veth)) if veth.state == LinkState::Up => {}
            (AttachMode::Veth, Some(_)) => return broken(format!("the gateway's end, {}, is down", pod.veth)),
            (AttachMode::Veth, None) => return broken(format!("the gateway's end, {}, is gone", pod.veth)),
        }
        let inside = Netlink::open(pod_ns).map_err(&error)?;
        let is_ours = |link: &Link| match pod.mode {
            AttachMode::Veth => link.mac == Some(pod.pod_mac) && link.kind == "veth",
            AttachMode::Tun => link.kind == "tun",
        };
        let link = match inside.link(&pod.ifname).map_err(&error)? {
            Some(link) if is_ours(&link) => link,
            Some(_) => return broken(format!("{} is another interface", pod.ifname)),
            None => return broken(format!("{} is gone", pod.ifname)),
        };
        if link.state != LinkState::Up {
            return broken(format!("{} is down", pod.ifname));
        }
        if pod.mode == AttachMode::Tun && link.carrier != LinkState::Up {
            return broken(format!("nobody reads {}: `podgate status` says why", pod.ifname));
        }
        let found = inside.addresses().map_err(&error)?;
        for address in &pod.addresses {
            if !found.iter().any(|known| known.index == link.index && known.address == whole(*address)) {
                return broken(format!("{} has lost {address}", pod.ifname));
            }
        }
        let wanted: Vec<IpNetwork> = pod.routes.iter().filter_map(|route| route.dst.parse().ok()).collect();
        for family in Family::BOTH {
            let there = inside.routes(family, TABLE_MAIN).map_err(&error)?;
            let in_main = pod.routes.iter().zip(&wanted).filter(|(route, dst)| route.table.is_none() && Family::of(dst.ip()) == family);
            for (_, destination) in in_main {
                let is_it = |spec: &RouteSpec| spec.destination == *destination && spec.device.as_deref() == Some(&pod.ifname);
                if !there.iter().any(|route| is_it(&route.spec)) {
                    return broken(format!("the route to {destination} by {} is gone", pod.ifname));
                }
            }
        }
        Ok(())
    }
}

/// Whether a pod's next hops are in its neighbour table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Neighbours {
    /// For good, so that none is ever asked for.
    Permanent,
    /// A TUN has no use for them.
    None,
}

/// The pod's links up, and without any router's say in its addresses.
pub(super) fn prepare_pod(pod_ns: &Netns, netlink: &Netlink, spec: &AttachSpec) -> Result<(), PodError> {
    let (error, up) = (of(&spec.id), LinkSettings::new().up());
    let theirs = [(Key::v6(&spec.ifname, "disable_ipv6"), "0"), (Key::v6(&spec.ifname, "accept_ra"), "0")];
    optional(sysctl::write_all(pod_ns, &theirs)).map_err(|source| PodError::Sysctl { id: spec.id.clone(), source })?;
    netlink.set_link("lo", &up).map_err(&error)?;
    netlink.set_link(&spec.ifname, &up).map_err(&error)
}

/// The pod's own side: addresses, neighbours, routes; the routes, as its result tells them.
pub(super) fn furnish(netlink: &Netlink, spec: &AttachSpec, pod: &Attached, neighbours: Neighbours) -> Result<Vec<Route>, PodError> {
    let error = of(&spec.id);
    let mut told = Vec::new();
    for address in &pod.addresses {
        netlink.add_address(&AddressSpec::new(&spec.ifname, whole(*address))).map_err(&error)?;
        let family = Family::of(*address);
        let gateway = gateway_of(family);
        if neighbours == Neighbours::Permanent {
            netlink.set_neighbour(&NeighbourSpec { device: spec.ifname.clone(), address: gateway, mac: pod.gateway_mac }).map_err(&error)?;
        }
        let everything = IpNetwork::new(family.unspecified(), 0).expect("0 is a prefix length of both families");
        let taken = netlink.routes(family, TABLE_MAIN).map_err(&error)?.iter().any(|route| route.spec.destination == everything);
        let ours = match (spec.default_route, taken) {
            (DefaultRoute::Yes, true) => return Err(PodError::DefaultRouteExists { id: spec.id.clone(), family }),
            (DefaultRoute::Yes | DefaultRoute::IfFree, false) => true,
            (DefaultRoute::IfFree, true) | (DefaultRoute::No, _) => false,
        };
        let mut targets: Vec<Target> = Vec::new();
        if ours {
            targets.push(everything.into());
        } else {
            let table = SOURCE_TABLES + netlink.expect_link(&spec.ifname).map_err(&error)?.index;
            // One that was left behind, by an interface of that address before this one, led to another table.
            for old in source_rules(netlink, *address).map_err(&error)? {
                netlink.delete_rule(&old).or_missing().map_err(&error)?;
            }
            let rule = RuleSpec::new(family, PREF_SOURCE, RuleAction::Lookup(table)).from(whole(*address)).origin(ORIGIN_BOOT);
            netlink.add_rule(&rule).map_err(&error)?;
            targets.push(Target { table: Some(table), ..everything.into() });
        }
        // An IPAM plugin may name the default route as well, which has been dealt with.
        let said = |target: &&Target| target.destination == everything && target.table.is_none() && target.metric.is_none();
        let of_family = |target: &&Target| Family::of(target.destination.ip()) == family;
        targets.extend(spec.targets.iter().filter(of_family).filter(|target| !said(target)).cloned());
        for target in targets {
            let mut route = RouteSpec::unicast(target.table.unwrap_or(TABLE_MAIN), target.destination, &spec.ifname).via(gateway).onlink();
            route = route.metric(target.metric.unwrap_or(0)).origin(ORIGIN_BOOT);
            (route.mtu, route.advmss, route.scope) = (target.mtu, target.advmss, target.scope);
            netlink.add_route(&route).map_err(&error)?;
            let Target { destination, mtu, advmss, metric, table, scope } = target;
            told.push(Route { dst: destination.to_string(), gw: None, mtu, advmss, priority: metric, table, scope });
        }
    }
    Ok(told)
}

/// Takes out of a pod's namespace what does not go with the interface.
pub(super) fn withdraw(pod_ns: &Netns, pod: &Attached) -> Result<(), NetlinkError> {
    let netlink = Netlink::open(pod_ns)?;
    for address in &pod.addresses {
        for rule in source_rules(&netlink, *address)? {
            netlink.delete_rule(&rule).or_missing()?;
        }
    }
    Ok(())
}

pub(super) fn source_rules(netlink: &Netlink, address: IpAddr) -> Result<Vec<RuleSpec>, NetlinkError> {
    let rules = netlink.rules(Family::of(address))?.into_iter().map(|rule| rule.spec);
    Ok(rules.filter(|rule| rule.pref == PREF_SOURCE && rule.from == Some(whole(address))).collect())
}

/// What makes an interface that of a host, as IPv6 has it.
fn as_host(device: &str) -> [(Key, &'static str); 2] {
    [(Key::v6(device, "forwarding"), "0"), (Key::v6(device, "accept_ra"), "0")]
}

/// Whether every new interface of the gateway's namespace is a host's from the start.
pub(super) fn veths_are_hosts(gateway: &Netns) -> bool {
    let is_so = |(key, value): &(Key, &str)| sysctl::read_here(key).is_ok_and(|found| found == *value);
    gateway.run(|| as_host("default").iter().all(is_so)).unwrap_or(false)
}

/// A kernel without IPv6 has none of its sysctls.
fn optional(done: Result<(), SysctlError>) -> Result<(), SysctlError> {
    match done {
        Err(error) if error.is_missing() => Ok(()),
        other => other,
    }
}
