//! What takes Podgate's place, built from what the kernel and Debian offer: each in namespaces of its own, with the same MTU.

mod kernel;
mod kube_proxy;
mod tunnel;

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Context;
use ipnetwork::{IpNetwork, Ipv4Network};
use podgate::lab::machine::ETH0;
use podgate::lab::{Lab, Sandbox};
use podgate::netlink::sysctl::{self, Key};
use podgate::netlink::{AddressSpec, LinkKind, LinkSettings, NeighbourSpec, Netlink, NewLink, RouteSpec, TABLE_MAIN};
use podgate_runtime::ethtool::{self, Switch};
use podgate_runtime::netns::Netns;

use super::load::{Dial, Ends, Server};
use super::reflector::Reflector;
use super::subject::Uplink;

pub use kernel::{bridge, reflector, tun_rs, vxlan};
pub use kube_proxy::{Rules, kube_proxy};
pub use tunnel::{nebula, wireguard};

/// A peer: the namespaces of its ends, and what lives as long as they do.
#[derive(Default)]
pub struct Peer {
    from: Option<Netns>,
    to: Vec<(Netns, IpAddr)>,
    services: Option<u32>,
    _alive: Alive,
}

#[derive(Default)]
struct Alive {
    _gateway: Option<Netns>,
    _reflector: Option<Reflector>,
    _programs: Vec<tunnel::Program>,
    _nodes: Option<Lab>,
}

impl Peer {
    /// Its ends.
    pub fn ends(&self) -> Ends<'_> {
        let to = self.to.iter().map(|(netns, address)| Server { netns, address: *address }).collect();
        Ends { from: self.from.as_ref().expect("a peer that was built"), to, dial: self.services.map_or(Dial::Direct, Dial::Services) }
    }
}

/// The address of a peer's sending pod, and of its receiving one.
const FROM: Ipv4Addr = Ipv4Addr::new(10, 244, 9, 1);
const TO: Ipv4Addr = Ipv4Addr::new(10, 244, 9, 2);

/// Two UDP sockets on the underlay itself.
pub fn underlay(sandbox: &Sandbox, binary: &std::path::Path) -> anyhow::Result<Peer> {
    let lab = Lab::builder(sandbox, binary).named("underlay").machines()?;
    let [from, to] = [lab.node(1).machine(), lab.node(2).machine()];
    let to = vec![(to.netns().try_clone()?, to.addresses().v4.into())];
    Ok(Peer { from: Some(from.netns().try_clone()?), to, _alive: Alive { _nodes: Some(lab), ..Alive::default() }, ..Peer::default() })
}

impl Uplink {
    /// Switches the offloads of every node's uplink, and makes sure that they are as they should be.
    pub fn set_up(self, lab: &Lab) -> anyhow::Result<()> {
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

/// A fresh namespace that forwards IPv4 and does not check where packets come from.
fn router() -> anyhow::Result<(Netns, Netlink)> {
    let (netns, netlink) = host()?;
    let sysctls = [(Key::v4("all", "rp_filter"), "0"), (Key::v4("default", "rp_filter"), "0"), (Key::new("net/ipv4/ip_forward"), "1")];
    sysctl::write_all(&netns, &sysctls)?;
    Ok((netns, netlink))
}

/// Gives `pod` an interface whose other end is `name` here.
fn attach(here: &Netlink, name: &str, pod: &Netns, mtu: u32, settings: LinkSettings) -> anyhow::Result<()> {
    Ok(here.create_link(&NewLink { name, kind: LinkKind::veth_into(ETH0, pod, LinkSettings::new().mtu(mtu)), settings })?)
}

/// A pod that is routed to: a veth `name`, /32, a default route by a permanent neighbour, as Podgate and most plugins without a bridge have it.
fn routed_pod(here: &Netlink, name: &str, address: Ipv4Addr, mtu: u32) -> anyhow::Result<Netns> {
    let (pod, theirs) = host()?;
    attach(here, name, &pod, mtu, LinkSettings::new().mtu(mtu).up())?;
    here.add_route(&RouteSpec::unicast(TABLE_MAIN, network(address, 32), name))?;
    theirs.set_link(ETH0, &LinkSettings::new().up())?;
    theirs.add_address(&AddressSpec::new(ETH0, network(address, 32)))?;
    let via = IpAddr::from([169, 254, 1, 1]);
    theirs.add_route(&RouteSpec::unicast(TABLE_MAIN, network(Ipv4Addr::UNSPECIFIED, 0), ETH0).via(via).onlink())?;
    let mac = |netlink: &Netlink, device: &str| -> anyhow::Result<_> { netlink.expect_link(device)?.mac.context("a veth has an Ethernet address") };
    here.set_neighbour(&NeighbourSpec { device: name.to_owned(), address: address.into(), mac: mac(&theirs, ETH0)? })?;
    theirs.set_neighbour(&NeighbourSpec { device: ETH0.to_owned(), address: via, mac: mac(here, name)? })?;
    Ok(pod)
}

fn network(address: Ipv4Addr, prefix: u8) -> IpNetwork {
    Ipv4Network::new(address, prefix).expect("a prefix of at most 32 bits").into()
}
