//! The kernel's own devices: bridge, VXLAN, and a TUN with nothing behind it.

use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::Context;
use podgate::lab::machine::ETH0;
use podgate::lab::{Lab, Sandbox};
use podgate::netlink::{AddressSpec, Family, LinkKind, LinkSettings, NewLink, RouteSpec, RuleAction, RuleSpec, TABLE_MAIN, VxlanMode, VxlanSpec};
use podgate_runtime::netns::Netns;
use podgate_runtime::tun::Tun;

use super::{Alive, FROM, Peer, TO, attach, host, network, routed_pod, router};
use crate::e2e::reflector::Reflector;
use crate::e2e::subject::Subject;

/// Two pods on a bridge.
pub fn bridge(mtu: u32) -> anyhow::Result<Peer> {
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
    let (from, to) = (pod("from", FROM)?, pod("to", TO)?);
    Ok(Peer { from: Some(from), to: vec![(to, TO.into())], _alive: Alive { _gateway: Some(gateway), ..Alive::default() }, ..Peer::default() })
}

/// Two pods whose packets the kernel routes to a TUN and from it to the other pod, as Podgate has it do.
pub fn reflector(mtu: u32) -> anyhow::Result<Peer> {
    reflecting(mtu, |gateway| {
        let mut tun = Tun::open(TUN, 1, gateway)?;
        // As Podgate's: above every pod's, so that the kernel never has cause to cut or complain.
        tun.set_mtu(65_535)?;
        Ok(Reflector::start(tun.queues.pop().context("a TUN with one queue")?)?)
    })
}

/// The same with tun-rs at the TUN.
pub fn tun_rs(mtu: u32) -> anyhow::Result<Peer> {
    reflecting(mtu, |gateway| {
        let device = gateway.run(|| tun_rs::DeviceBuilder::new().name(TUN).offload(true).mtu(65_535).build_sync())??;
        Ok(Reflector::start_tun_rs(device)?)
    })
}

const TUN: &str = "reflector";

fn reflecting(mtu: u32, start: impl FnOnce(&Netns) -> anyhow::Result<Reflector>) -> anyhow::Result<Peer> {
    const UP: u32 = 100;
    let (gateway, netlink) = router()?;
    let reflector = start(&gateway)?;
    netlink.set_link(TUN, &LinkSettings::new().up())?;
    netlink.add_rule(&RuleSpec::new(Family::V4, 5, RuleAction::Lookup(TABLE_MAIN)).iif(TUN))?;
    netlink.add_route(&RouteSpec::unicast(UP, network(Ipv4Addr::UNSPECIFIED, 0), TUN))?;
    let pod = |name: &str, address: Ipv4Addr| -> anyhow::Result<Netns> {
        let pod = routed_pod(&netlink, name, address, mtu)?;
        netlink.add_rule(&RuleSpec::new(Family::V4, 20, RuleAction::Lookup(UP)).iif(name))?;
        Ok(pod)
    };
    let (from, to) = (pod("from", FROM)?, pod("to", TO)?);
    let alive = Alive { _gateway: Some(gateway), _reflector: Some(reflector), ..Alive::default() };
    Ok(Peer { from: Some(from), to: vec![(to, TO.into())], _alive: alive, ..Peer::default() })
}

/// Two nodes, each with a bridge that holds a pod and a VXLAN device to the other.
pub fn vxlan(sandbox: &Sandbox, binary: &Path, subject: Subject, mtu: u32) -> anyhow::Result<Peer> {
    let lab = Lab::builder(sandbox, binary).named(&subject.name()).machines()?;
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
    let (from, to) = (pod(1, 2, FROM)?, pod(2, 1, TO)?);
    Ok(Peer { from: Some(from), to: vec![(to, TO.into())], _alive: Alive { _nodes: Some(lab), ..Alive::default() }, ..Peer::default() })
}
