//! Services: what clients dial, and by which rules it is answered.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1;
use podgate_core::service::TrafficPolicy;

use super::{Blame, ModelError, ObjectName, Protocol, namespaced};

/// A service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: ObjectName,
    /// Why the gateway does not serve it, if it does not.
    pub skip: Option<SkipReason>,
    /// Its cluster IPs, of either family.
    pub cluster_ips: Vec<IpAddr>,
    /// Its external IPs, before the allow-list.
    pub external_ips: Vec<IpAddr>,
    /// Its load balancer's addresses whose `ipMode` is VIP.
    pub load_balancer_ips: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// `internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// How long clients stick to an endpoint.
    pub affinity: Option<Duration>,
    /// How an endpoint is chosen: the annotation `podgate.io/balance`.
    pub balance: BalancePolicy,
    /// `loadBalancerSourceRanges`, of either family.
    pub source_ranges: Vec<IpNetwork>,
    /// `healthCheckNodePort`.
    pub health_check_node_port: Option<u16>,
}

/// How a service's endpoint is chosen for a new connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BalancePolicy {
    /// At random, by weight.
    #[default]
    Random,
    /// By a Maglev table, by weight: nodes agree, and few clients move when endpoints come and go.
    Maglev,
    /// Of two at random, by weight, the one with fewer live flows on this node for its weight.
    LeastLoaded,
    /// Something else was asked for. An annotation is checked by no API server, and a slip in it is no reason not to serve: it is warned of.
    Unknown(Arc<str>),
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; empty where it has none.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// The port that clients dial.
    pub port: u16,
    /// Its node port.
    pub node_port: Option<u16>,
}

/// Why a service is not served (Kubernetes `pkg/proxy/util/utils.go`, and the two labels by which it is left to somebody else).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SkipReason {
    /// `clusterIP: None`, or the label `service.kubernetes.io/headless`.
    Headless,
    /// It has no cluster IP (yet).
    NoClusterIp,
    /// `type: ExternalName` is a matter of DNS.
    ExternalName,
    /// The label `service.kubernetes.io/service-proxy-name` gives it to another proxy.
    OtherProxy(Arc<str>),
}

/// The annotation that says how an endpoint is chosen: `random`, `maglev` or `least-loaded`.
pub const BALANCE_ANNOTATION: &str = "podgate.io/balance";
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// Kubernetes' default of `sessionAffinityConfig.clientIP.timeoutSeconds`.
const AFFINITY_DEFAULT: Duration = Duration::from_secs(10_800);

impl Service {
    /// From the Kubernetes object, with the API server's defaults.
    pub fn from_k8s(service: &v1::Service) -> Result<Service, ModelError> {
        let name = namespaced("Service", &service.metadata)?;
        let blame = Blame { kind: "Service", name: &name };
        let empty = v1::ServiceSpec::default();
        let spec = service.spec.as_ref().unwrap_or(&empty);
        let skip = skip_reason(&service.metadata.labels, spec);
        let cluster_ips =
            if skip.is_some() { Vec::new() } else { cluster_ips(spec).map(|ip| blame.ip("spec.clusterIPs", ip)).collect::<Result<_, _>>()? };
        let external_ips = spec.external_ips.iter().flatten().map(|ip| blame.ip("spec.externalIPs", ip)).collect::<Result<_, _>>()?;
        let mut load_balancer_ips = Vec::new();
        for ingress in service.status.iter().flat_map(|s| &s.load_balancer).flat_map(|l| &l.ingress).flatten() {
            // An absent ipMode means VIP, as before the field existed.
            let vip = ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP");
            if let Some(ip) = ingress.ip.as_deref().filter(|ip| vip && !ip.is_empty()) {
                load_balancer_ips.push(blame.ip("status.loadBalancer.ingress", ip)?);
            }
        }
        // Kubernetes' own validation lets blanks around a range pass.
        let source_ranges = spec.load_balancer_source_ranges.iter().flatten();
        let source_ranges = source_ranges.map(|r| blame.cidr("spec.loadBalancerSourceRanges", r)).collect::<Result<_, _>>()?;
        let mut ports: Vec<ServicePort> = Vec::new();
        for port in spec.ports.iter().flatten() {
            let port = service_port(&blame, port)?;
            if ports.iter().any(|p| p.name == port.name && p.protocol == port.protocol) {
                let problem = format!("two {} ports are named `{}`; give each a name of its own", port.protocol, port.name);
                return Err(blame.error("spec.ports", problem));
            }
            ports.push(port);
        }
        let health_check_node_port = spec.health_check_node_port.filter(|p| *p != 0);
        Ok(Service {
            skip,
            cluster_ips,
            external_ips,
            load_balancer_ips,
            ports,
            internal_policy: policy(&blame, "spec.internalTrafficPolicy", spec.internal_traffic_policy.as_deref())?,
            external_policy: policy(&blame, "spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref())?,
            affinity: affinity(&blame, spec)?,
            balance: balance(service.metadata.annotations.as_ref().and_then(|a| a.get(BALANCE_ANNOTATION))),
            source_ranges,
            health_check_node_port: health_check_node_port.map(|p| blame.port("spec.healthCheckNodePort", p)).transpose()?,
            name,
        })
    }
}

fn cluster_ips(spec: &v1::ServiceSpec) -> impl Iterator<Item = &str> {
    let listed = spec.cluster_ips.as_deref().unwrap_or_default();
    let single = spec.cluster_ip.iter().filter(|_| listed.is_empty());
    listed.iter().chain(single).map(String::as_str).filter(|ip| !ip.is_empty())
}

fn skip_reason(labels: &Option<std::collections::BTreeMap<String, String>>, spec: &v1::ServiceSpec) -> Option<SkipReason> {
    let label = |key: &str| labels.as_ref().and_then(|l| l.get(key));
    if let Some(proxy) = label(PROXY_NAME_LABEL) {
        return Some(SkipReason::OtherProxy(proxy.as_str().into()));
    }
    if label(HEADLESS_LABEL).is_some() || cluster_ips(spec).any(|ip| ip == "None") {
        return Some(SkipReason::Headless);
    }
    if spec.type_.as_deref() == Some("ExternalName") {
        return Some(SkipReason::ExternalName);
    }
    cluster_ips(spec).next().is_none().then_some(SkipReason::NoClusterIp)
}

fn service_port(blame: &Blame<'_>, port: &v1::ServicePort) -> Result<ServicePort, ModelError> {
    let protocol = Protocol::parse(port.protocol.as_deref())
        .ok_or_else(|| blame.error("spec.ports", format!("protocol `{}` is none of TCP, UDP, SCTP", port.protocol.as_deref().unwrap_or_default())))?;
    Ok(ServicePort {
        name: port.name.as_deref().unwrap_or_default().into(),
        protocol,
        port: blame.port("spec.ports.port", port.port)?,
        node_port: port.node_port.filter(|p| *p != 0).map(|p| blame.port("spec.ports.nodePort", p)).transpose()?,
    })
}

fn policy(blame: &Blame<'_>, field: &str, text: Option<&str>) -> Result<TrafficPolicy, ModelError> {
    match text {
        None | Some("" | "Cluster") => Ok(TrafficPolicy::Cluster),
        Some("Local") => Ok(TrafficPolicy::Local),
        Some(other) => Err(blame.error(field, format!("`{other}` is neither Cluster nor Local"))),
    }
}

fn balance(annotation: Option<&String>) -> BalancePolicy {
    match annotation.map_or("", |text| text.trim()) {
        "" | "random" => BalancePolicy::Random,
        "maglev" => BalancePolicy::Maglev,
        "least-loaded" => BalancePolicy::LeastLoaded,
        other => BalancePolicy::Unknown(other.into()),
    }
}

fn affinity(blame: &Blame<'_>, spec: &v1::ServiceSpec) -> Result<Option<Duration>, ModelError> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => Ok(None),
        Some("ClientIP") => {
            let seconds = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref()).and_then(|c| c.timeout_seconds);
            let Some(seconds) = seconds else { return Ok(Some(AFFINITY_DEFAULT)) };
            // The API server's bounds: above 0, at most a day.
            let seconds = u64::try_from(seconds).ok().filter(|s| (1..=86_400).contains(s)).ok_or_else(|| {
                blame.error("spec.sessionAffinityConfig.clientIP.timeoutSeconds", format!("{seconds} is not between 1 and 86400 seconds"))
            })?;
            Ok(Some(Duration::from_secs(seconds)))
        }
        Some(other) => Err(blame.error("spec.sessionAffinity", format!("`{other}` is neither ClientIP nor None"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn service(labels: Value, spec: Value, status: Value) -> Result<Service, ModelError> {
        let object = json!({"metadata": {"name": "web", "namespace": "shop", "labels": labels}, "spec": spec, "status": status});
        Service::from_k8s(&serde_json::from_value(object).unwrap())
    }

    fn skip(labels: Value, spec: Value) -> Option<SkipReason> {
        service(labels, spec, json!({})).unwrap().skip
    }

    #[test]
    fn services_that_are_not_ours_to_serve_are_skipped() {
        let ip = json!({"clusterIP": "10.96.0.1"});
        assert_eq!(skip(json!({}), json!({"clusterIP": "None"})), Some(SkipReason::Headless));
        assert_eq!(skip(json!({}), json!({"clusterIPs": ["None"]})), Some(SkipReason::Headless));
        assert_eq!(skip(json!({}), json!({"clusterIP": ""})), Some(SkipReason::NoClusterIp));
        assert_eq!(skip(json!({}), json!({"type": "ExternalName", "externalName": "example.com"})), Some(SkipReason::ExternalName));
        assert_eq!(skip(json!({"service.kubernetes.io/headless": ""}), ip.clone()), Some(SkipReason::Headless));
        assert_eq!(skip(json!({"service.kubernetes.io/service-proxy-name": "x"}), ip.clone()), Some(SkipReason::OtherProxy("x".into())));
        assert_eq!(skip(json!({}), ip), None);
    }

    #[test]
    fn an_absent_field_has_the_api_servers_default() {
        let service =
            service(json!({}), json!({"clusterIP": "10.96.0.1", "sessionAffinity": "ClientIP", "ports": [{"port": 53}]}), json!({})).unwrap();
        assert_eq!(service.cluster_ips, ["10.96.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(service.affinity, Some(Duration::from_secs(10_800)));
        assert_eq!((service.internal_policy, service.external_policy), (TrafficPolicy::Cluster, TrafficPolicy::Cluster));
        assert_eq!(service.ports, [ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 53, node_port: None }]);
    }

    #[test]
    fn an_annotation_says_how_endpoints_are_chosen() {
        let of = |text: Option<&str>| {
            let annotations = text.map(|text| json!({"podgate.io/balance": text}));
            let object = json!({"metadata": {"name": "web", "annotations": annotations}, "spec": {"clusterIP": "10.96.0.1"}});
            Service::from_k8s(&serde_json::from_value(object).unwrap()).unwrap().balance
        };
        assert_eq!([of(None), of(Some("random"))], [BalancePolicy::Random, BalancePolicy::Random]);
        assert_eq!([of(Some(" maglev ")), of(Some("least-loaded"))], [BalancePolicy::Maglev, BalancePolicy::LeastLoaded]);
        assert_eq!(of(Some("Maglev")), BalancePolicy::Unknown("Maglev".into()));
    }

    #[test]
    fn only_ingress_addresses_of_mode_vip_count() {
        let ingress =
            json!([{"ip": "203.0.113.1"}, {"ip": "203.0.113.2", "ipMode": "Proxy"}, {"hostname": "lb"}, {"ip": "2001:db8::5", "ipMode": "VIP"}]);
        let service = service(json!({}), json!({"clusterIP": "10.96.0.1"}), json!({"loadBalancer": {"ingress": ingress}})).unwrap();
        assert_eq!(service.load_balancer_ips, ["203.0.113.1".parse::<IpAddr>().unwrap(), "2001:db8::5".parse().unwrap()]);
    }

    #[test]
    fn blanks_around_a_source_range_are_trimmed() {
        let service = service(json!({}), json!({"clusterIP": "10.96.0.1", "loadBalancerSourceRanges": [" 192.0.2.0/24 "]}), json!({})).unwrap();
        assert_eq!(service.source_ranges, ["192.0.2.0/24".parse().unwrap()]);
    }

    #[test]
    fn impossible_values_are_named() {
        let error = |spec| service(json!({}), spec, json!({})).unwrap_err().to_string();
        assert_eq!(error(json!({"clusterIP": "10.96.0.300"})), "Service shop/web: spec.clusterIPs: `10.96.0.300` is not an IP address");
        assert_eq!(
            error(json!({"clusterIP": "10.96.0.1", "ports": [{"port": 70000}]})),
            "Service shop/web: spec.ports.port: 70000 is not a port; ports are 1 to 65535"
        );
        assert_eq!(
            error(json!({"clusterIP": "10.96.0.1", "externalTrafficPolicy": "local"})),
            "Service shop/web: spec.externalTrafficPolicy: `local` is neither Cluster nor Local"
        );
        assert_eq!(
            error(json!({"clusterIP": "10.96.0.1", "ports": [{"port": 1}, {"port": 2}]})),
            "Service shop/web: spec.ports: two TCP ports are named ``; give each a name of its own"
        );
    }
}
