//! What is wanted of others, worked out from what the daemon knows: the tables' own node, rules and routes, sockets, and what a source tells.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use podgate_core::addr::{Addr, protocol};
use podgate_core::fib::Pod;
use podgate_core::service::{Face, FrontendKey};

use super::Inner;
use super::machine::Machine;
use crate::compile::{Compiled, HostPort, LocalNode, Settings, pod_mtu};
use crate::config::Config;
use crate::pods::Attached;
use crate::routing::{self, RoutingPlan};
use crate::source::NodeReport;

/// What only this machine knows, for the compiler.
pub(super) fn local_node(
    config: &Config,
    machine: &Machine,
    (pods, host_ports): (Vec<(IpAddr, Pod)>, Vec<HostPort>),
    path_mtus: BTreeMap<IpAddr, u32>,
    token: u64,
    workers: u16,
) -> LocalNode {
    LocalNode {
        name: config.node.as_str().into(),
        settings: Settings::from(config),
        addresses: machine.addresses.clone(),
        underlay: machine.underlay.clone(),
        underlay_mtu: machine.underlay_mtu,
        path_mtus,
        outside_mtu: machine.underlay_mtu,
        masquerade_sources: machine.primary(),
        pods,
        host_ports,
        probe_token: token,
        workers,
    }
}

/// What a source that takes part in the cluster tells of this node.
pub(super) fn report(inner: &Inner) -> NodeReport {
    let (mut used, mut free) = ([0, 0], [0, 0]);
    for pool in inner.ipam.list().pools.iter().filter(|pool| pool.pool.is_none()) {
        let at = usize::from(!pool.cidr.is_ipv4());
        used[at] += pool.used as u128;
        free[at] += pool.capacity.saturating_sub(pool.used as u128);
    }
    let ranges = inner.compiled.snapshot.node.node_pod_cidrs.clone();
    NodeReport {
        underlay: inner.machine.underlay.clone(),
        underlay_mtu: inner.machine.underlay_mtu,
        ranges,
        used,
        free,
        published: inner.published.clone(),
    }
}

/// Sockets for UDP ports of services on the node's addresses: they bring datagrams that came in fragments, which no port rule matches.
pub(super) fn udp_ports(compiled: &Compiled) -> Vec<SocketAddr> {
    let here = compiled.apart.keys().filter(|key| key.protocol == protocol::UDP && compiled.snapshot.node.owns(key.addr));
    here.map(|key| SocketAddr::new(key.addr.ip(), key.port)).collect()
}

/// What rules and routes there are to be.
pub(super) fn routing_plan(config: &Config, inner: &Inner) -> RoutingPlan {
    let Compiled { snapshot, apart, health_checks, .. } = &inner.compiled;
    let node = &snapshot.node;
    let mtu = pod_mtu(&inner.machine.underlay, inner.machine.underlay_mtu);
    let ip = |addr: &Addr| addr.ip();
    let mut node_addresses: BTreeSet<IpAddr> = node.node_port_addresses.iter().map(ip).collect();
    node_addresses.extend(inner.machine.primary());
    let elsewhere = apart.iter().filter(|(key, face)| face.is_vip() && !node.owns(key.addr) && snapshot.is_vip(key.addr));
    let mut vips: BTreeSet<IpAddr> = elsewhere.map(|(key, _)| key.addr.ip()).collect();
    if !vips.is_empty() {
        // What leads to another node's address must not be led away from it, least of all the overlay itself.
        for address in inner.cluster.nodes().values().flat_map(|node| &node.addresses) {
            vips.remove(address);
        }
    }
    // Host ports, and load balancers' addresses and external IPs that are this node's own: the service has its ports, the node all the others.
    let on_the_node = apart.iter().filter(|(key, face)| **face != Face::NodePort && node.owns(key.addr));
    let host_port = |key: &FrontendKey| routing::HostPort { address: key.addr.ip(), protocol: key.protocol, port: key.port };
    let with_ports = |key: &FrontendKey| matches!(key.protocol, protocol::TCP | protocol::UDP);
    let host_ports: Vec<routing::HostPort> = on_the_node.filter(|(key, _)| with_ports(key)).map(|(key, _)| host_port(key)).collect();
    node_addresses.extend(host_ports.iter().map(|port| port.address));
    RoutingPlan {
        pods_device: config.devices.pods.clone(),
        host_device: config.devices.host.clone(),
        node_addresses: node_addresses.into_iter().collect(),
        node_port_addresses: node.node_port_addresses.iter().map(ip).collect(),
        sources: inner.machine.primary(),
        pod_cidrs: config.pod_cidrs.clone(),
        service_cidrs: config.service_cidrs.clone(),
        vips: vips.into_iter().collect(),
        node_ports: config.node_ports.clone(),
        health_check_ports: health_checks.values().map(|check| check.port).collect(),
        masquerade: config.masquerade.clone().unwrap_or_default(),
        host_ports,
        pod_mtu: mtu,
        host_mtu: mtu,
        pods: inner.pods.list().filter_map(Attached::routed).collect(),
    }
}
