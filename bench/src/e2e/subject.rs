//! What carries the packets: Podgate, and for comparison the kernel's own devices and a bare reflector, each between pods of their own.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use ipnetwork::{IpNetwork, Ipv4Network};
use podgate::lab::machine::ETH0;
use podgate::lab::node::NodeSettings;
use podgate::lab::{Lab, Pod, Sandbox};
use podgate::netlink::sysctl::{self, Key};
use podgate::netlink::{
    AddressSpec, Family, LinkKind, LinkSettings, NeighbourSpec, Netlink, NewLink, RouteSpec, RuleAction, RuleSpec, TABLE_MAIN, VxlanMode, VxlanSpec,
};
use podgate_runtime::ethtool::{self, Switch};
use podgate_runtime::netns::Netns;
use podgate_runtime::tun::Tun;

use super::reflector::Reflector;
use super::stream::Ends;

/// Where the two ends of a workload are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On one node.
    SameNode,
    /// On two.
    BetweenNodes,
}

/// A subject of measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// Podgate, on two nodes of a [`Lab`].
    Podgate,
    /// Podgate over [`Uplink::Segmented`].
    PodgateSegmented,
    /// Podgate over [`Uplink::Card`].
    PodgateCard,
    /// The kernel: veth and bridge.
    Bridge,
    /// veth, policy routing and a TUN, with no logic behind it.
    Reflector,
    /// The kernel: VXLAN over [`Uplink::Whole`].
    Vxlan,
    /// VXLAN over [`Uplink::Segmented`].
    VxlanSegmented,
    /// VXLAN over [`Uplink::Card`].
    VxlanCard,
}

impl Subject {
    /// All of them.
    pub const ALL: [Subject; 8] = [
        Subject::Podgate,
        Subject::Bridge,
        Subject::Reflector,
        Subject::Vxlan,
        Subject::VxlanSegmented,
        Subject::PodgateSegmented,
        Subject::VxlanCard,
        Subject::PodgateCard,
    ];

    /// Its name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Subject::Podgate => "podgate",
            Subject::PodgateSegmented => "podgate-segmented",
            Subject::PodgateCard => "podgate-card",
            Subject::Bridge => "bridge",
            Subject::Reflector => "reflector",
            Subject::Vxlan => "vxlan",
            Subject::VxlanSegmented => "vxlan-segmented",
            Subject::VxlanCard => "vxlan-card",
        }
    }

    /// Whether it carries packets between such ends.
    pub const fn carries(self, place: Place) -> bool {
        match self {
            Subject::Podgate => true,
            Subject::Bridge | Subject::Reflector => matches!(place, Place::SameNode),
            _ => matches!(place, Place::BetweenNodes),
        }
    }

    /// What its nodes' uplinks do.
    const fn uplink(self) -> Uplink {
        match self {
            Subject::PodgateSegmented | Subject::VxlanSegmented => Uplink::Segmented,
            Subject::PodgateCard | Subject::VxlanCard => Uplink::Card,
            _ => Uplink::Whole,
        }
    }
}

/// What the nodes' uplinks (veths) do with superframes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Uplink {
    /// They pass whole, as between cards with every offload.
    Whole,
    /// They are cut in software by the sender and arrive as single packets.
    Segmented,
    /// They are cut in software by the sender, and what arrives goes through GRO, as the driver of any card does it.
    Card,
}

/// Every subject, built and idle.
pub struct Bed {
    clusters: BTreeMap<Subject, Cluster>,
    peers: BTreeMap<Subject, Peer>,
}

/// Two nodes with Podgate, and the pods between which it carries: two on the first node, one on the second.
struct Cluster {
    lab: Lab,
    pods: [Arc<Pod>; 3],
}

/// A peer: the namespaces of two pods, and what lives as long as they do.
struct Peer {
    from: Netns,
    to: Netns,
    _alive: Alive,
}

#[derive(Default)]
struct Alive {
    _gateway: Option<Netns>,
    _reflector: Option<Reflector>,
    _nodes: Option<Lab>,
}

/// The address of a peer's sending pod, and of its receiving one.
const FROM: Ipv4Addr = Ipv4Addr::new(10, 244, 9, 1);
const TO: Ipv4Addr = Ipv4Addr::new(10, 244, 9, 2);

/// Packets dropped so far, by node and reason.
pub type Drops = BTreeMap<(String, String), u64>;

impl Bed {
    /// Builds what `subjects` need for `places`.
    pub fn build(sandbox: &Sandbox, binary: &Path, workers: u16, subjects: &[Subject], places: &[Place]) -> anyhow::Result<Bed> {
        let cluster = |subject: Subject| -> anyhow::Result<Cluster> {
            let settings = NodeSettings { workers: Some(workers), ..NodeSettings::default() };
            let lab = Lab::builder(sandbox, binary).named(subject.name()).settings(settings).build(&|_| {})?;
            let pods = [lab.pod("a1")?, lab.pod("b1")?, lab.pod("a2")?];
            Ok(Cluster { lab, pods })
        };
        let podgate = cluster(Subject::Podgate).context("cannot build Podgate's cluster")?;
        // The same MTU for everybody, or segments would differ in number.
        let mtu = podgate.pods[0].machine().netlink()?.expect_link(ETH0)?.mtu;
        let mut bed = Bed { clusters: [(Subject::Podgate, podgate)].into(), peers: BTreeMap::new() };
        for subject in subjects.iter().filter(|subject| places.iter().any(|place| subject.carries(*place))) {
            let built = match subject {
                Subject::Podgate => continue,
                Subject::PodgateSegmented | Subject::PodgateCard => {
                    let built = cluster(*subject).with_context(|| format!("cannot build the cluster of {}", subject.name()))?;
                    subject.uplink().set_up(&built.lab)?;
                    bed.clusters.insert(*subject, built);
                    continue;
                }
                Subject::Bridge => bridge(mtu),
                Subject::Reflector => reflector(mtu),
                Subject::Vxlan | Subject::VxlanSegmented | Subject::VxlanCard => vxlan(sandbox, binary, *subject, mtu),
            };
            bed.peers.insert(*subject, built.with_context(|| format!("cannot build {}", subject.name()))?);
        }
        Ok(bed)
    }

    /// The ends of `subject`, which was built and carries between such places.
    pub fn ends(&self, subject: Subject, place: Place) -> Ends<'_> {
        if let Some(Cluster { pods, .. }) = self.clusters.get(&subject) {
            let to = pods[if place == Place::SameNode { 1 } else { 2 }].machine();
            return Ends { from: pods[0].machine().netns(), to: to.netns(), address: to.address(Family::V4) };
        }
        let peer = &self.peers[&subject];
        Ends { from: &peer.from, to: &peer.to, address: TO.into() }
    }

    /// What Podgate's nodes have dropped so far.
    pub fn drops(&self) -> anyhow::Result<Drops> {
        let mut drops = Drops::new();
        for (subject, cluster) in &self.clusters {
            for node in cluster.lab.nodes() {
                let name = format!("{} of {}", node.name(), subject.name());
                drops.extend(node.drops()?.into_iter().map(|(reason, packets)| ((name.clone(), reason), packets)));
            }
        }
        Ok(drops)
    }

    /// What they have dropped since: node, reason, packets.
    pub fn drops_since(&self, before: &Drops) -> anyhow::Result<Vec<(String, String, u64)>> {
        let since = |(key, packets): ((String, String), u64)| {
            let packets = packets.saturating_sub(before.get(&key).copied().unwrap_or(0));
            (packets > 0).then_some((key.0, key.1, packets))
        };
        Ok(self.drops()?.into_iter().filter_map(since).collect())
    }
}

/// Two pods on a bridge.
fn bridge(mtu: u32) -> anyhow::Result<Peer> {
    let (gateway, netlink) = host()?;
    netlink.create_link(&NewLink { name: "bridge", kind: LinkKind::Bridge, settings: LinkSettings::new().mtu(mtu).up() })?;
    let controller = netlink.expect_link("bridge")?.index;
    let pod = |name: &str, address: Ipv4Addr| -> anyhow::Result<Netns> {
        let (pod, theirs) = host()?;
        attach(&netlink, name, &pod, mtu, LinkSettings::new().mtu(mtu).controller(controller).up())?;
        theirs.set_link(ETH0, &LinkSettings::new().up())?;
        theirs.add_address(&AddressSpec::new(ETH0, network(address, 24)))?;
        Ok(pod)
    };
    Ok(Peer { from: pod("from", FROM)?, to: pod("to", TO)?, _alive: Alive { _gateway: Some(gateway), ..Alive::default() } })
}

/// Two pods whose packets the kernel routes to a TUN and from it to the other pod, as Podgate has it do.
fn reflector(mtu: u32) -> anyhow::Result<Peer> {
    const UP: u32 = 100;
    const TUN: &str = "reflector";
    let (gateway, netlink) = host()?;
    sysctl::write_all(
        &gateway,
        &[(Key::v4("all", "rp_filter"), "0"), (Key::v4("default", "rp_filter"), "0"), (Key::new("net/ipv4/ip_forward"), "1")],
    )?;
    let mut tun = Tun::open(TUN, 1, &gateway)?;
    // As Podgate's: above every pod's, so that the kernel never has cause to cut or complain.
    tun.set_mtu(65_535)?;
    netlink.set_link(TUN, &LinkSettings::new().up())?;
    netlink.add_rule(&RuleSpec::new(Family::V4, 5, RuleAction::Lookup(TABLE_MAIN)).iif(TUN))?;
    netlink.add_route(&RouteSpec::unicast(UP, network(Ipv4Addr::UNSPECIFIED, 0), TUN))?;
    let pod = |name: &str, address: Ipv4Addr| -> anyhow::Result<Netns> {
        let (pod, theirs) = host()?;
        attach(&netlink, name, &pod, mtu, LinkSettings::new().mtu(mtu).up())?;
        netlink.add_rule(&RuleSpec::new(Family::V4, 20, RuleAction::Lookup(UP)).iif(name))?;
        netlink.add_route(&RouteSpec::unicast(TABLE_MAIN, network(address, 32), name))?;
        theirs.set_link(ETH0, &LinkSettings::new().up())?;
        theirs.add_address(&AddressSpec::new(ETH0, network(address, 32)))?;
        let via = IpAddr::from([169, 254, 1, 1]);
        theirs.add_route(&RouteSpec::unicast(TABLE_MAIN, network(Ipv4Addr::UNSPECIFIED, 0), ETH0).via(via).onlink())?;
        let mac =
            |netlink: &Netlink, device: &str| -> anyhow::Result<_> { netlink.expect_link(device)?.mac.context("a veth has an Ethernet address") };
        netlink.set_neighbour(&NeighbourSpec { device: name.to_owned(), address: address.into(), mac: mac(&theirs, ETH0)? })?;
        theirs.set_neighbour(&NeighbourSpec { device: ETH0.to_owned(), address: via, mac: mac(&netlink, name)? })?;
        Ok(pod)
    };
    let (from, to) = (pod("from", FROM)?, pod("to", TO)?);
    let queue = tun.queues.pop().context("a TUN with one queue")?;
    Ok(Peer { from, to, _alive: Alive { _gateway: Some(gateway), _reflector: Some(Reflector::start(queue)?), ..Alive::default() } })
}

/// Two nodes, each with a bridge that holds a pod and a VXLAN device to the other.
fn vxlan(sandbox: &Sandbox, binary: &Path, subject: Subject, mtu: u32) -> anyhow::Result<Peer> {
    let lab = Lab::builder(sandbox, binary).named(subject.name()).machines()?;
    subject.uplink().set_up(&lab)?;
    let pod = |number: usize, other: usize, address: Ipv4Addr| -> anyhow::Result<Netns> {
        let node = lab.node(number);
        let netlink = node.machine().netlink()?;
        netlink.create_link(&NewLink { name: "bridge", kind: LinkKind::Bridge, settings: LinkSettings::new().mtu(mtu).up() })?;
        let controller = netlink.expect_link("bridge")?.index;
        let spec = VxlanSpec {
            vni: 1,
            port: 4789,
            local: Some(node.machine().address(Family::V4)),
            remote: Some(lab.node(other).machine().address(Family::V4)),
            mode: VxlanMode::Ethernet,
        };
        let settings = LinkSettings::new().mtu(mtu).controller(controller).up();
        netlink.create_link(&NewLink { name: "vxlan", kind: LinkKind::Vxlan(spec), settings: settings.clone() })?;
        let (pod, theirs) = host()?;
        attach(&netlink, "pod", &pod, mtu, settings)?;
        theirs.set_link(ETH0, &LinkSettings::new().up())?;
        theirs.add_address(&AddressSpec::new(ETH0, network(address, 24)))?;
        Ok(pod)
    };
    Ok(Peer { from: pod(1, 2, FROM)?, to: pod(2, 1, TO)?, _alive: Alive { _nodes: Some(lab), ..Alive::default() } })
}

impl Uplink {
    /// Switches the offloads of every node's uplink, and makes sure that they are as they should be.
    fn set_up(self, lab: &Lab) -> anyhow::Result<()> {
        const SEGMENTATION: [&str; 4] = ["tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation", "tx-udp-segmentation", "tx-generic-segmentation"];
        // A veth gives to GRO only what comes from an end that segments no TCP either (veth_skb_is_eligible_for_gro).
        const TCP: [&str; 4] = ["tx-tcp-segmentation", "tx-tcp-ecn-segmentation", "tx-tcp-mangleid-segmentation", "tx-tcp6-segmentation"];
        let off = |names: &[&'static str]| names.iter().map(|name| (*name, Switch::Off)).collect::<Vec<_>>();
        let wanted = match self {
            Uplink::Whole => return Ok(()),
            Uplink::Segmented => off(&SEGMENTATION),
            Uplink::Card => [off(&SEGMENTATION), off(&TCP), vec![("rx-gro", Switch::On)]].concat(),
        };
        for node in lab.nodes() {
            lab.set_offloads(node, &wanted)?;
            let features = node.machine().run(|| ethtool::features(ETH0))??;
            for (name, switch) in &wanted {
                let set = features.iter().any(|feature| feature.name == *name && feature.active == (*switch == Switch::On));
                anyhow::ensure!(set, "{name} cannot be switched {switch:?} on the uplink of {}", node.name());
            }
        }
        Ok(())
    }
}

/// A fresh namespace with loopback up, and a handle on it.
fn host() -> anyhow::Result<(Netns, Netlink)> {
    let netns = Netns::anonymous()?;
    let netlink = Netlink::open(&netns)?;
    netlink.set_link("lo", &LinkSettings::new().up())?;
    Ok((netns, netlink))
}

/// Gives `pod` an interface whose other end is `name` here.
fn attach(here: &Netlink, name: &str, pod: &Netns, mtu: u32, settings: LinkSettings) -> anyhow::Result<()> {
    Ok(here.create_link(&NewLink { name, kind: LinkKind::veth_into(ETH0, pod, LinkSettings::new().mtu(mtu)), settings })?)
}

fn network(address: Ipv4Addr, prefix: u8) -> IpNetwork {
    Ipv4Network::new(address, prefix).expect("a prefix of at most 32 bits").into()
}
