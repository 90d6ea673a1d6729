//! The objects of the lab's cluster, as the YAML documents that a directory source reads.

use std::fmt::Write as _;
use std::net::IpAddr;

use super::machine::Dual;
use super::program::PORT;
use crate::netlink::Family;

/// The namespace of the lab's objects.
pub const NAMESPACE: &str = "default";

/// The port on which services answer.
pub const SERVICE_PORT: u16 = 80;

/// A node's object.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// Its name.
    pub name: String,
    /// Its addresses on the underlay.
    pub addresses: Dual,
    /// Its pod ranges.
    pub pod_cidrs: Vec<String>,
}

/// `externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrafficPolicy {
    /// Any endpoint.
    Cluster,
    /// Endpoints of the node that was dialled.
    Local,
}

/// A service with port 80 and one node port, over TCP and UDP, for both families.
#[derive(Clone, Debug)]
pub struct ServiceSpec {
    /// Its name.
    pub name: String,
    /// Its VIPs.
    pub vips: Dual,
    /// Its node port.
    pub node_port: u16,
    /// Which endpoints it chooses for the outside.
    pub policy: TrafficPolicy,
    /// Its endpoints.
    pub endpoints: Vec<EndpointSpec>,
}

/// One endpoint of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSpec {
    /// Its addresses.
    pub addresses: Dual,
    /// The node it is on.
    pub node: String,
}

/// The `v1/Node` document.
pub fn node(spec: &NodeSpec) -> String {
    let NodeSpec { name, addresses, pod_cidrs } = spec;
    let cidrs = pod_cidrs.join(", ");
    format!(
        "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDR: {first}, podCIDRs: [{cidrs}]}}\nstatus:\n  addresses:\n  \
         - {{type: InternalIP, address: {v4}}}\n  - {{type: InternalIP, address: \"{v6}\"}}\n",
        first = quoted(pod_cidrs.first().map_or("", String::as_str)),
        cidrs = cidrs.split(", ").map(quoted).collect::<Vec<_>>().join(", "),
        v4 = addresses.v4,
        v6 = addresses.v6,
    )
}

/// The `v1/Service` document and its two `EndpointSlice`s.
pub fn service(spec: &ServiceSpec) -> String {
    let ServiceSpec { name, vips, node_port, policy, .. } = spec;
    let mut text = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {NAMESPACE}}}\nspec:\n  type: NodePort\n  clusterIP: {v4}\n  \
         clusterIPs: [{v4}, \"{v6}\"]\n  ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: RequireDualStack\n  externalTrafficPolicy: {policy:?}\n  ports:\n",
        v4 = vips.v4,
        v6 = vips.v6,
    );
    for (port, protocol) in PORTS {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  - {{name: {port}, protocol: {protocol}, port: {SERVICE_PORT}, targetPort: {PORT}, nodePort: {node_port}}}");
    }
    text + &endpoint_slices(spec)
}

/// The names and protocols of a service's ports.
const PORTS: [(&str, &str); 2] = [("tcp", "TCP"), ("udp", "UDP")];

fn endpoint_slices(spec: &ServiceSpec) -> String {
    let mut text = String::new();
    for family in Family::BOTH {
        let name = format!("{}-{}", spec.name, family.to_string().to_lowercase());
        let _ = write!(
            text,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}\n  namespace: {NAMESPACE}\n  labels: \
             {{kubernetes.io/service-name: {service}}}\naddressType: {family}\nports:\n",
            service = spec.name,
        );
        for (port, protocol) in PORTS {
            let _ = writeln!(text, "- {{name: {port}, protocol: {protocol}, port: {PORT}}}");
        }
        if spec.endpoints.is_empty() {
            text.push_str("endpoints: []\n");
        } else {
            text.push_str("endpoints:\n");
        }
        for EndpointSpec { addresses, node } in &spec.endpoints {
            let address: IpAddr = addresses.of(family);
            let _ =
                writeln!(text, "- {{addresses: [\"{address}\"], nodeName: {node}, conditions: {{ready: true, serving: true, terminating: false}}}}");
        }
    }
    text
}

fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses() -> Dual {
        Dual { v4: "192.0.2.1".parse().unwrap(), v6: "2001:db8::1".parse().unwrap() }
    }

    #[test]
    fn a_node_is_written_with_both_families() {
        let text = node(&NodeSpec { name: "n".into(), addresses: addresses(), pod_cidrs: vec!["10.244.1.0/24".into(), "fd00:77:1::/64".into()] });
        assert!(text.contains("podCIDR: \"10.244.1.0/24\", podCIDRs: [\"10.244.1.0/24\", \"fd00:77:1::/64\"]"), "{text}");
        assert!(text.contains("address: \"2001:db8::1\""), "{text}");
    }

    #[test]
    fn a_service_without_endpoints_says_so_in_both_slices() {
        let spec = ServiceSpec { name: "web".into(), vips: addresses(), node_port: 30080, policy: TrafficPolicy::Local, endpoints: vec![] };
        let text = service(&spec);
        assert_eq!(text.matches("endpoints: []").count(), 2, "{text}");
        assert!(text.contains("externalTrafficPolicy: Local"), "{text}");
    }
}
