//! Endpoint slices: who answers for a service.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::discovery::v1;

use super::{Blame, ModelError, ObjectName, Protocol, namespaced};

/// The annotation that gives each endpoint of a slice its weight.
pub const WEIGHT_ANNOTATION: &str = "podgate.io/weight";
/// The largest weight: in percent, say. It bounds the work of filling a Maglev table.
pub const WEIGHT_MAX: u16 = 100;
/// The annotation by which a slice names the node that publishes it.
pub const PUBLISHER_ANNOTATION: &str = "podgate.io/published-by";
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// By this annotation the endpoints controller says when what it wrote down had happened (RFC 3339).
const TRIGGER_TIME_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// A slice of a service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Its own name.
    pub name: ObjectName,
    /// The service that its label names, if it has that label.
    pub service: Option<ObjectName>,
    /// Its ports; those without a number are left out.
    pub ports: Vec<SlicePort>,
    /// Its endpoints; those without an address of the slice's family are left out.
    pub endpoints: Vec<Endpoint>,
    /// What the annotation `podgate.io/weight` says, if it is no weight: every endpoint has weight 1 then, and it is warned of.
    pub bad_weight: Option<Arc<str>>,
    /// When the change that it was last written for had happened, if it says so: network programming is measured from there.
    pub triggered: Option<SystemTime>,
    /// The node that publishes it as its own, if one does.
    pub publisher: Option<Arc<str>>,
}

/// A port of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// The name that joins it to a port of the service; empty where that has none.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// The port on the endpoint.
    pub port: u16,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address: the first one listed, as kube-proxy does.
    pub address: IpAddr,
    /// The node that it runs on, if the slice says so.
    pub node: Option<Arc<str>>,
    /// Whether it takes new connections; absent means yes.
    pub ready: bool,
    /// Whether it answers, ready or not; absent means yes.
    pub serving: bool,
    /// Whether it is on its way out; absent means no.
    pub terminating: bool,
    /// Nodes that it is meant for, from `hints.forNodes`.
    pub node_hints: Vec<Arc<str>>,
    /// Zones that it is meant for, from `hints.forZones`.
    pub zone_hints: Vec<Arc<str>>,
    /// Its share of new connections beside the others', 1 to [`WEIGHT_MAX`]: that of its slice.
    pub weight: u16,
}

impl EndpointSlice {
    /// From the Kubernetes object.
    pub fn from_k8s(slice: &v1::EndpointSlice) -> Result<EndpointSlice, ModelError> {
        let name = namespaced("EndpointSlice", &slice.metadata)?;
        let blame = Blame { kind: "EndpointSlice", name: &name };
        let label = slice.metadata.labels.as_ref().and_then(|l| l.get(SERVICE_NAME_LABEL)).filter(|s| !s.is_empty());
        let service = label.map(|s| ObjectName { namespace: name.namespace.clone(), name: s.as_str().into() });
        let annotation = slice.metadata.annotations.as_ref().and_then(|a| a.get(WEIGHT_ANNOTATION)).map(|text| text.trim());
        let weight = annotation.map_or(Some(1), |text| text.parse().ok().filter(|weight| (1..=WEIGHT_MAX).contains(weight)));
        let bad_weight = annotation.filter(|_| weight.is_none()).map(Into::into);
        let weight = weight.unwrap_or(1);
        // A time that cannot be read measures nothing; it is no reason to refuse the endpoints.
        let triggered = slice.metadata.annotations.as_ref().and_then(|a| a.get(TRIGGER_TIME_ANNOTATION));
        let triggered = triggered.and_then(|at| at.trim().parse::<k8s_openapi::jiff::Timestamp>().ok()).and_then(as_system_time);
        let publisher = slice.metadata.annotations.as_ref().and_then(|a| a.get(PUBLISHER_ANNOTATION)).map(|node| node.as_str().into());
        let mut ports = Vec::new();
        for port in slice.ports.iter().flatten() {
            let protocol = Protocol::parse(port.protocol.as_deref()).ok_or_else(|| {
                blame.error("ports.protocol", format!("`{}` is none of TCP, UDP, SCTP", port.protocol.as_deref().unwrap_or_default()))
            })?;
            // An absent port means "all ports", which a proxy cannot serve; upstream skips it, and 0.
            if let Some(number) = port.port.filter(|p| *p != 0) {
                ports.push(SlicePort { name: port.name.as_deref().unwrap_or_default().into(), protocol, port: blame.port("ports.port", number)? });
            }
        }
        let is_v4 = match slice.address_type.as_str() {
            "IPv4" => true,
            "IPv6" => false,
            // Names are for others to resolve: such a slice has no endpoint for us.
            "FQDN" => return Ok(EndpointSlice { ports: Vec::new(), endpoints: Vec::new(), bad_weight, service, name, triggered: None, publisher }),
            other => return Err(blame.error("addressType", format!("`{other}` is none of IPv4, IPv6, FQDN"))),
        };
        let mut endpoints = Vec::new();
        for endpoint in slice.endpoints.iter().flatten() {
            let Some(first) = endpoint.addresses.first() else { continue };
            let address = blame.ip("endpoints.addresses", first)?;
            if address.is_ipv4() == is_v4 {
                endpoints.push(parse_endpoint(endpoint, address, weight));
            }
        }
        Ok(EndpointSlice { ports, endpoints, bad_weight, service, name, triggered, publisher })
    }
}

/// Nothing for what lies before 1970.
fn as_system_time(at: k8s_openapi::jiff::Timestamp) -> Option<SystemTime> {
    let nanoseconds = u64::try_from(at.as_nanosecond()).ok()?;
    Some(SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds))
}

fn parse_endpoint(endpoint: &v1::Endpoint, address: IpAddr, weight: u16) -> Endpoint {
    let conditions = endpoint.conditions.as_ref();
    let hints = endpoint.hints.as_ref();
    Endpoint {
        address,
        node: endpoint.node_name.as_deref().filter(|n| !n.is_empty()).map(Into::into),
        ready: conditions.and_then(|c| c.ready).unwrap_or(true),
        serving: conditions.and_then(|c| c.serving).unwrap_or(true),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        node_hints: hints.and_then(|h| h.for_nodes.as_ref()).into_iter().flatten().map(|n| n.name.as_str().into()).collect(),
        zone_hints: hints.and_then(|h| h.for_zones.as_ref()).into_iter().flatten().map(|z| z.name.as_str().into()).collect(),
        weight,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn slice(mut object: Value) -> Result<EndpointSlice, ModelError> {
        object["metadata"] = json!({"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}});
        EndpointSlice::from_k8s(&serde_json::from_value(object).unwrap())
    }

    #[test]
    fn absent_conditions_mean_ready_serving_and_not_terminating() {
        let slice = slice(json!({"addressType": "IPv4", "ports": [{"port": 80}], "endpoints": [{"addresses": ["10.0.0.1", "10.0.0.2"]}]})).unwrap();
        assert_eq!(slice.service, Some(ObjectName::new("shop", "web")));
        let [endpoint] = &slice.endpoints[..] else { panic!("one endpoint") };
        assert_eq!(endpoint.address.to_string(), "10.0.0.1", "only the first address counts");
        assert_eq!((endpoint.ready, endpoint.serving, endpoint.terminating), (true, true, false));
    }

    #[test]
    fn a_slices_weight_is_that_of_each_endpoint_and_a_slip_in_it_counts_as_one() {
        let of = |weight: Value| {
            let metadata = json!({"name": "web-1", "namespace": "shop", "annotations": {"podgate.io/weight": weight}});
            let endpoints = json!([{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}]);
            let object = json!({"metadata": metadata, "addressType": "IPv4", "ports": [{"port": 80}], "endpoints": endpoints});
            let slice = EndpointSlice::from_k8s(&serde_json::from_value(object).unwrap()).unwrap();
            (slice.endpoints.iter().map(|e| e.weight).collect::<Vec<_>>(), slice.bad_weight)
        };
        assert_eq!(of(json!(" 90 ")), (vec![90, 90], None));
        for bad in ["0", "101", "-1", "many", ""] {
            assert_eq!(of(json!(bad)), (vec![1, 1], Some(bad.into())));
        }
    }

    #[test]
    fn a_port_that_is_absent_or_zero_is_skipped() {
        let slice =
            slice(json!({"addressType": "IPv4", "endpoints": [], "ports": [{"name": "a"}, {"name": "b", "port": 0}, {"name": "c", "port": 1}]}));
        assert_eq!(slice.unwrap().ports, [SlicePort { name: "c".into(), protocol: Protocol::Tcp, port: 1 }]);
    }

    #[test]
    fn the_time_of_a_change_is_read_where_it_is_one() {
        let triggered = |at: &str| {
            let annotations = json!({"endpoints.kubernetes.io/last-change-trigger-time": at});
            let metadata = json!({"name": "web-1", "annotations": annotations});
            let object = json!({"metadata": metadata, "addressType": "IPv4", "ports": [], "endpoints": []});
            EndpointSlice::from_k8s(&serde_json::from_value(object).unwrap()).unwrap().triggered
        };
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(triggered("1970-01-02T00:00:00Z"), Some(at(86_400)));
        assert_eq!(triggered("1970-01-02T01:00:00+01:00"), Some(at(86_400)));
        assert_eq!(triggered("yesterday"), None);
    }

    #[test]
    fn fqdn_slices_and_addresses_of_the_other_family_are_ignored() {
        let endpoints = json!([{"addresses": ["10.0.0.1"]}, {"addresses": ["fd00::1"]}, {"addresses": []}]);
        let of = |kind: &str| slice(json!({"addressType": kind, "ports": [{"port": 80}], "endpoints": endpoints}));
        assert_eq!(of("IPv4").unwrap().endpoints.len(), 1);
        assert_eq!(of("IPv6").unwrap().endpoints.len(), 1);
        assert_eq!(of("FQDN").unwrap().endpoints.len(), 0);
        assert_eq!(of("Ipv4").unwrap_err().to_string(), "EndpointSlice shop/web-1: addressType: `Ipv4` is none of IPv4, IPv6, FQDN");
    }
}
