//! Pods' host ports: which may be, and what they are to the compiler.

use std::net::IpAddr;

use podgate_cni::Response;
use podgate_cni::protocol::PortMapping;
use podgate_core::addr::Addr;

use super::Inner;
use super::answers::error;
use crate::compile::HostPort;
use crate::model::Protocol;
use crate::pods::{Attached, Pods};

/// CNI SPEC.md, "Error": invalid network config.
const INVALID_CONFIG: u32 = 7;

/// Refuses mappings that cannot be served, with what to change.
pub(super) fn refuse(mappings: &[PortMapping], inner: &Inner) -> Result<(), Response> {
    for (at, mapping) in mappings.iter().enumerate() {
        let PortMapping { host_port, container_port, protocol, host_ip } = mapping;
        let refused = |why: String| Err(error(INVALID_CONFIG, format!("portMappings: host port {host_port}/{protocol}: {why}")));
        if protocol_of(mapping).is_none() {
            return refused("only tcp and udp can be mapped".into());
        }
        if *host_port == 0 || *container_port == 0 {
            return refused("hostPort and containerPort are 1 to 65535".into());
        }
        if let Some(address) = address_of(mapping) {
            if address.is_loopback() {
                return refused(format!("it is not served on {address}; leave hostIP out, or name an address of the node that others reach"));
            }
            if !inner.compiled.snapshot.node.owns(Addr::from(address)) {
                return refused(format!("hostIP {address} is no address of this node that pods or peers may meet; `podgate status` lists those"));
            }
        }
        let taken = inner.pods.list().flat_map(|pod| pod.options.port_mappings.iter().map(move |other| (other, &*pod.name)));
        let own = mappings[..at].iter().map(|other| (other, "this pod, a second time"));
        if let Some((_, whose)) = taken.chain(own).find(|(other, _)| meet(mapping, other)) {
            let on = host_ip.map(|ip| format!(" on {ip}")).unwrap_or_default();
            return refused(format!("it is taken{on}, by {whose}; give one of them another hostPort"));
        }
    }
    Ok(())
}

/// The mappings of every pod, for each family that it has an address of.
pub(super) fn of(pods: &Pods) -> Vec<HostPort> {
    let mut ports: Vec<HostPort> = pods.list().flat_map(of_pod).collect();
    ports.sort_unstable();
    ports
}

fn of_pod(pod: &Attached) -> impl Iterator<Item = HostPort> {
    let with_protocol = pod.options.port_mappings.iter().filter_map(|mapping| Some((mapping, protocol_of(mapping)?)));
    with_protocol.flat_map(move |(mapping, protocol)| {
        let families = pod.addresses.iter().filter(|to| mapping.host_ip.is_none_or(|ip| ip.is_ipv4() == to.is_ipv4()));
        families.map(move |to| HostPort {
            pod: pod.name.as_str().into(),
            protocol,
            address: address_of(mapping),
            port: mapping.host_port,
            to: *to,
            to_port: mapping.container_port,
        })
    })
}

fn protocol_of(mapping: &PortMapping) -> Option<Protocol> {
    match mapping.protocol.to_ascii_lowercase().as_str() {
        "tcp" => Some(Protocol::Tcp),
        "udp" => Some(Protocol::Udp),
        _ => None,
    }
}

/// The one address that it is on; none for `0.0.0.0` and `::`, which mean all of a family.
fn address_of(mapping: &PortMapping) -> Option<IpAddr> {
    mapping.host_ip.filter(|ip| !ip.is_unspecified())
}

/// Whether two mappings would serve the same port of the same address.
fn meet(a: &PortMapping, b: &PortMapping) -> bool {
    let families_meet = match (a.host_ip, b.host_ip) {
        (Some(a), Some(b)) => a.is_ipv4() == b.is_ipv4(),
        _ => true,
    };
    let addresses_meet = match (address_of(a), address_of(b)) {
        (Some(a), Some(b)) => a == b,
        _ => true,
    };
    a.host_port == b.host_port && protocol_of(a) == protocol_of(b) && families_meet && addresses_meet
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(port: u16, protocol: &str, ip: Option<&str>) -> PortMapping {
        PortMapping { host_port: port, container_port: 80, protocol: protocol.into(), host_ip: ip.map(|ip| ip.parse().unwrap()) }
    }

    #[test]
    fn mappings_meet_where_one_address_would_have_one_port_twice() {
        let a = mapping(8080, "tcp", None);
        for (other, meets) in [
            (mapping(8080, "TCP", None), true),
            (mapping(8080, "udp", None), false),
            (mapping(8081, "tcp", None), false),
            (mapping(8080, "tcp", Some("192.0.2.1")), true),
            (mapping(8080, "tcp", Some("::")), true),
        ] {
            assert_eq!(meet(&a, &other), meets, "{other:?}");
            assert_eq!(meet(&other, &a), meets, "{other:?}");
        }
        let on = |ip| mapping(8080, "tcp", Some(ip));
        assert!(!meet(&on("192.0.2.1"), &on("192.0.2.2")) && meet(&on("192.0.2.1"), &on("0.0.0.0")) && !meet(&on("192.0.2.1"), &on("::")));
    }
}
