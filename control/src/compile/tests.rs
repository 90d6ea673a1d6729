//! The semantics row by row, with kube-proxy's own cases: inputs and expected outcomes. The files go by topic; here is what they share.

mod changes;
mod endpoints;
mod nodes;
mod packets;
mod services;

use std::collections::BTreeMap as Map;

use podgate_core::addr::Addr;
use podgate_core::fib::Pod;
use podgate_core::flow::Timeouts;
use podgate_core::service::{Backend, Place, TrafficPolicy};
use podgate_core::snapshot::OutsideToPods;
use serde_json::{Value, json};

use super::*;
use crate::config::NodePortAddresses;
use crate::model::Object;

mod balance;

fn settings() -> Settings {
    Settings {
        pod_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "fd00:77::/32".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        node_ports: 30000..=32767,
        node_port_addresses: NodePortAddresses::Primary,
        masquerade: Some(vec![61000..=65534]),
        external_ips: vec!["203.0.113.0/24".parse().unwrap(), "10.96.5.0/24".parse().unwrap()],
        overlay_port: 4790,
        overlay_vni: 1,
        direct_return_vni: None,
        outside_to_pods: OutsideToPods::Allow,
        health_port: 10256,
        announcements: Announcements::Optional,
        timeouts: Timeouts::default(),
    }
}

pub(crate) fn local() -> LocalNode {
    LocalNode {
        name: "n1".into(),
        settings: settings(),
        addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        underlay: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        underlay_mtu: 1500,
        path_mtus: Default::default(),
        outside_mtu: 1500,
        masquerade_sources: vec!["192.0.2.1".parse().unwrap()],
        pods: vec![("10.244.1.10".parse().unwrap(), Pod::new(1444))],
        host_ports: Vec::new(),
        probe_token: 7,
        workers: 2,
    }
}

fn node(name: &str, cidrs: &[&str], ips: &[&str], annotations: Value) -> Object {
    let addresses: Vec<Value> = ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    let object = json!({"metadata": {"name": name, "annotations": annotations, "labels": {"topology.kubernetes.io/zone": "zone-a"}},
        "spec": {"podCIDRs": cidrs}, "status": {"addresses": addresses}});
    Object::from_node(&serde_json::from_value(object).unwrap()).unwrap()
}

fn n1() -> Object {
    node("n1", &["10.244.1.0/24", "fd00:77:1::/64"], &["192.0.2.1", "2001:db8::1"], json!({}))
}

fn n2() -> Object {
    node("n2", &["10.244.2.0/24", "fd00:77:2::/64"], &["192.0.2.2", "2001:db8::2"], json!({}))
}

fn service(name: &str, spec: Value) -> Object {
    service_with_status(name, spec, json!({}))
}

fn service_with_status(name: &str, spec: Value, status: Value) -> Object {
    let object = json!({"metadata": {"name": name}, "spec": spec, "status": status});
    Object::from_service(&serde_json::from_value(object).unwrap()).unwrap()
}

fn slice(name: &str, service: &str, ports: Value, endpoints: Value) -> Object {
    let kind = if endpoints.to_string().contains("\"fd00") { "IPv6" } else { "IPv4" };
    let object = json!({"metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}}, "addressType": kind,
        "ports": ports, "endpoints": endpoints});
    Object::from_slice(&serde_json::from_value(object).unwrap()).unwrap()
}

fn fresh(objects: impl IntoIterator<Item = Object>) -> Compiled {
    fresh_for(&Arc::new(local()), objects)
}

fn fresh_for(local: &Arc<LocalNode>, objects: impl IntoIterator<Item = Object>) -> Compiled {
    compile(&Compiled::empty(local), &Arc::new(objects.into_iter().collect()), local)
}

fn key(address: &str) -> FrontendKey {
    let (address, protocol) = address.split_once('/').unwrap_or((address, "TCP"));
    let address: std::net::SocketAddr = address.parse().unwrap();
    FrontendKey::new(address.ip(), address.port(), if protocol == "UDP" { 17 } else { 6 })
}

#[track_caller]
fn frontend<'a>(compiled: &'a Compiled, address: &str) -> &'a Frontend {
    compiled.snapshot.services.get(&key(address)).unwrap_or_else(|| panic!("nobody answers {address}"))
}

fn list(backends: &[Backend]) -> Vec<String> {
    backends.iter().map(|b| format!("{}:{}", b.addr, b.port)).collect()
}

fn endpoint(last: u8, conditions: &str, node: &str, zones: &[&str]) -> Value {
    let zones: Vec<Value> = zones.iter().map(|z| json!({"name": z})).collect();
    json!({"addresses": [format!("10.244.9.{last}")], "nodeName": node, "hints": {"forZones": zones},
        "conditions": {"ready": conditions.contains('r'), "serving": conditions.contains('s'), "terminating": conditions.contains('t')}})
}
