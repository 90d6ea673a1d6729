//! `publish`: services that run on this node, and how it finds out whether they work.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use podgate_core::fib::within;

use super::raw::{OneOrMore, Seconds};
use super::validate::Check as Checker;
use super::{Config, ConfigError, SourceConfig};
use crate::model::{ObjectName, Protocol, SlicePort};

/// An endpoint of a service that this node publishes, one of each address family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    /// The Service that it belongs to.
    pub service: ObjectName,
    /// Where it listens. A port's name joins it to the Service's port.
    pub ports: Vec<SlicePort>,
    /// Its addresses.
    pub place: Place,
    /// How to find out whether it works; without, it is taken to.
    pub check: Option<Check>,
}

/// Where a published endpoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// At the node's own underlay addresses.
    Node,
    /// At these addresses, at most one of each family.
    Addresses(Vec<IpAddr>),
    /// At the addresses of the pod of this `namespace/name`, while it is attached here.
    Pod(String),
}

/// An active check of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What is tried.
    pub probe: Probe,
    /// From the beginning of one try to that of the next.
    pub interval: Duration,
    /// How long a try may take.
    pub timeout: Duration,
    /// An endpoint that does not work works again after so many tries in a row.
    pub healthy: u32,
    /// One that works does not after so many failures in a row.
    pub unhealthy: u32,
}

/// What a check tries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// To connect to this port.
    Tcp(u16),
    /// To get a path over HTTP/1.1.
    Http {
        /// The port.
        port: u16,
        /// The path, with its query.
        path: String,
        /// The `Host` header; the endpoint's address and port without it.
        host: Option<String>,
    },
}

const INTERVAL_S: u64 = 5;
const TIMEOUT_S: u64 = 1;
const HEALTHY: u32 = 2;
const UNHEALTHY: u32 = 3;
/// An hour, in seconds: who looks less often does not look.
const INTERVAL_MAX_S: u64 = 3600;
/// Of a label of DNS (RFC 1035 §2.3.4), which a Service's name and a namespace are.
const LABEL_LEN_MAX: usize = 63;
/// Of an object's name (Kubernetes `DNS1123SubdomainMaxLength`).
const NAME_LEN_MAX: usize = 253;

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawPublish {
    name: String,
    namespace: Option<String>,
    ports: Vec<RawPort>,
    addresses: Option<OneOrMore<IpAddr>>,
    pod: Option<String>,
    check: Option<RawCheck>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPort {
    #[serde(default)]
    name: String,
    protocol: Option<RawProtocol>,
    port: u16,
}

#[derive(Clone, Copy, serde::Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum RawProtocol {
    Tcp,
    Udp,
    Sctp,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCheck {
    tcp: Option<u16>,
    http: Option<RawHttp>,
    interval: Option<Seconds>,
    timeout: Option<Seconds>,
    healthy: Option<u32>,
    unhealthy: Option<u32>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHttp {
    port: u16,
    path: Option<String>,
    host: Option<String>,
}

/// What `config`, which is whole but for it, publishes.
pub(super) fn publish(check: &Checker<'_>, given: Option<Vec<RawPublish>>, config: &Config) -> Result<Vec<Publish>, ConfigError> {
    let given = given.unwrap_or_default();
    if let (SourceConfig::Kubernetes { .. }, false) = (&config.source, given.is_empty()) {
        let problem = "with an API server it is kubelet's probes and the EndpointSlice controller that say which endpoints are ready";
        return check.fail("publish and source.kubernetes", problem, "leave `publish` out: give the pod a readinessProbe and the Service a selector");
    }
    let mut names = BTreeSet::new();
    let mut published = Vec::new();
    for (at, raw) in given.into_iter().enumerate() {
        let one = one(check, at, raw, config)?;
        if !names.insert(one.service.clone()) {
            let problem = format!("{} is published twice", one.service);
            return check.fail(format!("publish[{at}]"), problem, "keep one: a node has one slice of a service and family");
        }
        published.push(one);
    }
    Ok(published)
}

fn one(check: &Checker<'_>, at: usize, raw: RawPublish, config: &Config) -> Result<Publish, ConfigError> {
    let key = |name: &str| format!("publish[{at}].{name}");
    let namespace = raw.namespace.unwrap_or_else(|| "default".into());
    for (field, name) in [("name", &raw.name), ("namespace", &namespace)] {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || name.len() > LABEL_LEN_MAX || !name.chars().all(fits) || name.starts_with('-') || name.ends_with('-') {
            return check.fail(key(field), format!("`{name}` cannot be one"), "write up to 63 lower-case letters, digits and `-`");
        }
    }
    // As `crate::publish` puts it together.
    if raw.name.len() + config.node.len() + "--ipv4".len() > NAME_LEN_MAX {
        let problem = format!("with the node's name it makes a slice's name of more than {NAME_LEN_MAX} characters");
        return check.fail(key("name"), problem, "choose a shorter name for the Service or the node");
    }
    let place = match (raw.addresses, raw.pod) {
        (None, None) => Place::Node,
        (None, Some(pod)) => Place::Pod(pod),
        (Some(addresses), None) => Place::Addresses(addresses.0),
        (Some(_), Some(_)) => {
            return check.fail(format!("publish[{at}]"), "has both addresses and pod", "keep one of them, or none for the node's own");
        }
    };
    if let Place::Addresses(addresses) = &place {
        let of = |v4: bool| addresses.iter().filter(|a| a.is_ipv4() == v4).count();
        if addresses.is_empty() || of(true) > 1 || of(false) > 1 {
            let problem = format!("has {} IPv4 and {} IPv6 addresses", of(true), of(false));
            return check.fail(key("addresses"), problem, "write one, or one of each family; leave it out for the node's own");
        }
        let nowhere = |a: &&IpAddr| a.is_unspecified() || a.is_loopback() || a.is_multicast() || within(&config.service_cidrs, (**a).into());
        if let Some(bad) = addresses.iter().find(nowhere) {
            let remedy = "write the address at which other nodes reach it; leave it out for the node's own";
            return check.fail(key("addresses"), format!("{bad} is nobody's address to other nodes"), remedy);
        }
    }
    Ok(Publish {
        service: ObjectName::new(&namespace, &raw.name),
        ports: ports(check, &key("ports"), raw.ports)?,
        place,
        check: raw.check.map(|given| health(check, &key("check"), given)).transpose()?,
    })
}

fn ports(check: &Checker<'_>, key: &str, given: Vec<RawPort>) -> Result<Vec<SlicePort>, ConfigError> {
    let mut ports: Vec<SlicePort> = Vec::new();
    for raw in given {
        let protocol = match raw.protocol {
            None | Some(RawProtocol::Tcp) => Protocol::Tcp,
            Some(RawProtocol::Udp) => Protocol::Udp,
            Some(RawProtocol::Sctp) => Protocol::Sctp,
        };
        if raw.port == 0 {
            return check.fail(key, "0 is not a port", "write the port on which it listens");
        }
        if ports.iter().any(|other| *other.name == *raw.name) {
            let remedy = "give each the name of the Service's port that it belongs to";
            return check.fail(key, format!("two ports have the name `{}`", raw.name), remedy);
        }
        ports.push(SlicePort { name: raw.name.into(), protocol, port: raw.port });
    }
    if ports.is_empty() {
        return check.fail(key, "is an empty list", "name the ports on which it listens, as in [{port: 8080}]");
    }
    Ok(ports)
}

fn health(check: &Checker<'_>, key: &str, given: RawCheck) -> Result<Check, ConfigError> {
    let probe = match (given.tcp, given.http) {
        (Some(port), None) => Probe::Tcp(port),
        (None, Some(RawHttp { port, path, host })) => Probe::Http { port, path: path.unwrap_or_else(|| "/".into()), host },
        (tcp, _) => {
            let problem = if tcp.is_some() { "has both tcp and http" } else { "has neither tcp nor http" };
            return check.fail(key, problem, "write exactly one, as in {tcp: 5432} or {http: {port: 8080, path: /healthz}}");
        }
    };
    if let Probe::Tcp(0) | Probe::Http { port: 0, .. } = probe {
        return check.fail(key, "0 is not a port", "write the port that is to be tried");
    }
    if let Probe::Http { path, host, .. } = &probe {
        if !path.starts_with('/') || path.parse::<http::uri::PathAndQuery>().is_err() {
            return check.fail(format!("{key}.http.path"), format!("`{path}` is not a path"), "write one as /healthz");
        }
        if let Some(host) = host.as_ref().filter(|host| host.parse::<http::uri::Authority>().is_err()) {
            return check.fail(format!("{key}.http.host"), format!("`{host}` is not a host's name"), "write one as www.example.org");
        }
    }
    let seconds = |given: Option<Seconds>, default| given.map_or(default, |given| given.0);
    let (interval, timeout) = (seconds(given.interval, INTERVAL_S), seconds(given.timeout, TIMEOUT_S));
    if !(1..=INTERVAL_MAX_S).contains(&interval) {
        return check.fail(format!("{key}.interval"), format!("{interval} s is not between 1 s and 1 h"), "5s is the default");
    }
    if timeout == 0 || timeout > interval {
        let problem = format!("{timeout} s is not between 1 s and the interval ({interval} s)");
        return check.fail(format!("{key}.timeout"), problem, "1s is the default: tries must not overlap");
    }
    let (healthy, unhealthy) = (given.healthy.unwrap_or(HEALTHY), given.unhealthy.unwrap_or(UNHEALTHY));
    if healthy == 0 || unhealthy == 0 {
        return check.fail(format!("{key}.healthy and {key}.unhealthy"), "0 tries decide nothing", "write 1 or more; 2 and 3 are the defaults");
    }
    Ok(Check { probe, interval: Duration::from_secs(interval), timeout: Duration::from_secs(timeout), healthy, unhealthy })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HostFacts;

    const UNDERLAY: &str = "underlay: {address: 192.0.2.1}\n";
    const DIRECTORY: &str = "source: {directory: /etc/podgate/cluster.d}\n";

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let host = HostFacts { name: "node-1".into(), ephemeral_ports: 32768..=60999 };
        Config::parse("podgate.yaml".as_ref(), text, &host)
    }

    #[test]
    fn the_example_of_the_readme_is_read_whole() {
        let readme = include_str!("../../../README.md");
        let start = readme.find("    publish:\n").expect("the README has an example");
        let text: String = readme[start..].lines().take_while(|line| !line.is_empty()).map(|line| format!("{}\n", &line[4..])).collect();
        let published = parse(&format!("{UNDERLAY}{DIRECTORY}{text}")).unwrap().publish;
        let [web, db, cache] = &published[..] else { panic!("{published:?}") };
        let check = web.check.as_ref().unwrap();
        assert_eq!(check.probe, Probe::Http { port: 8081, path: "/healthz".into(), host: Some("web.example".into()) });
        assert_eq!((check.interval, check.timeout, check.healthy, check.unhealthy), (Duration::from_secs(5), Duration::from_secs(1), 2, 3));
        assert_eq!((&web.service, &web.place), (&ObjectName::new("default", "web"), &Place::Node));
        let check = db.check.as_ref().unwrap();
        assert_eq!((&check.probe, check.interval, check.timeout), (&Probe::Tcp(5432), Duration::from_secs(10), Duration::from_secs(2)));
        assert_eq!((check.healthy, check.unhealthy, &db.service), (1, 5, &ObjectName::new("shop", "db")));
        assert_eq!(db.place, Place::Addresses(vec!["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()]));
        assert_eq!(db.ports, [SlicePort { name: "".into(), protocol: Protocol::Tcp, port: 5432 }]);
        let udp = format!("{UNDERLAY}{DIRECTORY}publish: [{{name: dns, ports: [{{name: dns, protocol: UDP, port: 53}}]}}]\n");
        assert_eq!(parse(&udp).unwrap().publish[0].ports, [SlicePort { name: "dns".into(), protocol: Protocol::Udp, port: 53 }]);
        assert_eq!((&cache.place, &cache.check), (&Place::Pod("default/cache-0".into()), &None));
    }

    #[test]
    fn with_an_api_server_it_is_refused() {
        let text = format!("{UNDERLAY}source: {{kubernetes: {{}}}}\npublish: [{{name: web, ports: [{{port: 80}}]}}]\n");
        assert_eq!(
            parse(&text).unwrap_err().to_string(),
            "podgate.yaml: publish and source.kubernetes: with an API server it is kubelet's probes and the EndpointSlice controller that say which \
             endpoints are ready; leave `publish` out: give the pod a readinessProbe and the Service a selector"
        );
    }

    #[test]
    fn what_cannot_be_published_is_refused_with_its_key() {
        let error = |publish: &str| parse(&format!("{UNDERLAY}{DIRECTORY}publish: [{publish}]\n")).expect_err(publish).to_string();
        assert_eq!(error("{name: web, port: 80}"), "podgate.yaml:3:23: unknown key `port`; did you mean `ports`?");
        assert!(
            error("{name: web, ports: [{port: 80}], check: {tcp: 80, intervall: 5s}}").contains("unknown key `intervall`; did you mean `interval`?")
        );
        assert!(error("{name: web, ports: [{port: 80, protocol: ICMP}]}").contains("`ICMP` is not known here"));
        let web = |more: &str| error(&format!("{{name: web, ports: [{{port: 80}}], {more}}}"));
        for (said, expected) in [
            (error("{name: Web, ports: [{port: 80}]}"), "publish[0].name: `Web` cannot be one"),
            (error("{name: web, namespace: a.b, ports: [{port: 80}]}"), "publish[0].namespace: `a.b` cannot be one"),
            (error("{name: web, ports: []}"), "publish[0].ports: is an empty list"),
            (error("{name: web, ports: [{port: 0}]}"), "publish[0].ports: 0 is not a port"),
            (error("{name: web, ports: [{port: 80}, {port: 81}]}"), "publish[0].ports: two ports have the name ``"),
            (error("{name: web, ports: [{port: 80}]}, {name: web, ports: [{port: 81}]}"), "publish[1]: default/web is published twice"),
            (web("addresses: 192.0.2.7, pod: a/b"), "publish[0]: has both addresses and pod"),
            (web("addresses: [192.0.2.7, 192.0.2.8]"), "publish[0].addresses: has 2 IPv4 and 0 IPv6 addresses"),
            (web("addresses: 127.0.0.1"), "publish[0].addresses: 127.0.0.1 is nobody's address to other nodes"),
            (web("addresses: 10.96.0.7"), "publish[0].addresses: 10.96.0.7 is nobody's address to other nodes"),
            (web("check: {}"), "publish[0].check: has neither tcp nor http"),
            (web("check: {tcp: 80, http: {port: 80}}"), "publish[0].check: has both tcp and http"),
            (web("check: {tcp: 0}"), "publish[0].check: 0 is not a port"),
            (web("check: {http: {port: 80, path: healthz}}"), "publish[0].check.http.path: `healthz` is not a path"),
            (web("check: {http: {port: 80, path: '/a b'}}"), "publish[0].check.http.path: `/a b` is not a path"),
            (web("check: {http: {port: 80, host: 'a b'}}"), "publish[0].check.http.host: `a b` is not a host's name"),
            (web("check: {tcp: 80, interval: 0}"), "publish[0].check.interval: 0 s is not between 1 s and 1 h"),
            (web("check: {tcp: 80, timeout: 6s}"), "publish[0].check.timeout: 6 s is not between 1 s and the interval (5 s)"),
            (web("check: {tcp: 80, unhealthy: 0}"), "publish[0].check.healthy and publish[0].check.unhealthy: 0 tries decide nothing"),
        ] {
            assert!(said.starts_with(&format!("podgate.yaml: {expected}; ")), "{said}");
        }
    }
}
