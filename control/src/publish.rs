//! A node's own services: the EndpointSlices that it publishes, and how the results of checks become their conditions.
//!
//! Without a controller nobody says which endpoints of a Service work. A node says it of those that `publish` in `podgate.yaml` names: it
//! writes a slice of its own for each Service and address family, `<service>-<node>-<family>`, whose one endpoint is ready and serving as long
//! as its check passes. Everything here is pure but for [`check`], which tries.
//!
//! Read first: Kubernetes `discovery/v1` EndpointSlice, KEP-752.

pub mod check;

use std::net::IpAddr;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};

use crate::config::{Check, Publish};
use crate::model::{Object, ObjectName, PUBLISHER_ANNOTATION};

/// What is known of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No try has ended yet.
    Unknown,
    /// It works.
    Healthy,
    /// It does not.
    Unhealthy,
}

/// What the tries of one check come to.
///
/// The first one decides by itself: a service that is up is not kept waiting for it. After that it takes several in a row, so that one lost
/// packet does not move every client and one lucky answer does not bring them back.
#[derive(Clone, Debug)]
pub struct Course {
    verdict: Verdict,
    /// Tries in a row that contradict the verdict.
    contrary: u32,
    healthy: u32,
    unhealthy: u32,
}

impl Course {
    /// With the thresholds of `check`.
    pub fn new(check: &Check) -> Course {
        Course { verdict: Verdict::Unknown, contrary: 0, healthy: check.healthy, unhealthy: check.unhealthy }
    }

    /// What is known now.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Takes note of how a try ended; the new verdict, if it is another one.
    pub fn note<E>(&mut self, result: &Result<(), E>) -> Option<Verdict> {
        let (says, enough) = match result {
            Ok(()) => (Verdict::Healthy, self.healthy),
            Err(_) => (Verdict::Unhealthy, self.unhealthy),
        };
        if says == self.verdict {
            self.contrary = 0;
            return None;
        }
        self.contrary += 1;
        if self.verdict != Verdict::Unknown && self.contrary < enough {
            return None;
        }
        (self.verdict, self.contrary) = (says, 0);
        Some(says)
    }
}

/// A slice that this node publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Its namespace and name.
    pub name: ObjectName,
    /// All of it, as JSON.
    pub text: String,
    /// As the gateway knows it.
    pub object: Object,
}

/// The slice of `publish` on `node` for its endpoint at `address`. What is not known to fail is taken to work.
pub fn slice(publish: &Publish, node: &str, address: IpAddr, verdict: Verdict) -> Published {
    let service = &publish.service;
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    let name = ObjectName { namespace: service.namespace.clone(), name: format!("{}-{node}-{}", service.name, family.to_lowercase()).into() };
    let works = verdict != Verdict::Unhealthy;
    let ports: Vec<Value> =
        publish.ports.iter().map(|port| json!({"name": &*port.name, "protocol": port.protocol.to_string(), "port": port.port})).collect();
    let value = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": &*name.name,
            "namespace": &*name.namespace,
            "labels": {"kubernetes.io/service-name": &*service.name, "endpointslice.kubernetes.io/managed-by": "podgate"},
            "annotations": {PUBLISHER_ANNOTATION: node},
        },
        "addressType": family,
        "ports": ports,
        "endpoints": [{
            "addresses": [address.to_string()],
            "nodeName": node,
            "conditions": {"ready": works, "serving": works, "terminating": false},
        }],
    });
    let text = value.to_string();
    let parsed: EndpointSlice = serde_json::from_value(value).expect("it has the form of a slice");
    let object = Object::from_slice(&parsed).expect("configuration was checked");
    Published { name, text, object }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Place, Probe};
    use crate::model::{Protocol, SlicePort};
    use std::time::Duration;

    fn course() -> Course {
        let second = Duration::from_secs(1);
        Course::new(&Check { probe: Probe::Tcp(80), interval: second, timeout: second, healthy: 2, unhealthy: 3 })
    }

    /// Each letter is a try, `+` or `-`; the verdict after each.
    fn verdicts(tries: &str) -> String {
        let mut course = course();
        tries
            .chars()
            .map(|c| {
                let before = course.verdict();
                let told = course.note(&if c == '+' { Ok(()) } else { Err(()) });
                assert_eq!(told, (course.verdict() != before).then_some(course.verdict()), "{tries}: it tells of changes and of nothing else");
                match course.verdict() {
                    Verdict::Unknown => '?',
                    Verdict::Healthy => 'H',
                    Verdict::Unhealthy => 'U',
                }
            })
            .collect()
    }

    #[test]
    fn the_first_try_decides_by_itself() {
        assert_eq!(course().verdict(), Verdict::Unknown);
        assert_eq!(verdicts("+"), "H");
        assert_eq!(verdicts("-"), "U");
    }

    #[test]
    fn it_takes_three_failures_in_a_row_to_fall_and_two_successes_to_rise() {
        assert_eq!(verdicts("+---"), "HHHU");
        assert_eq!(verdicts("-++"), "UUH");
        assert_eq!(verdicts("+--+--+---"), "HHHHHHHHHU");
        assert_eq!(verdicts("-+-+-++"), "UUUUUUH");
    }

    #[test]
    fn after_a_change_counting_begins_anew() {
        assert_eq!(verdicts("+---+-++--+---"), "HHHUUUUHHHHHHU");
    }

    #[test]
    fn a_slice_has_the_services_ports_and_the_checks_conditions_and_names_its_node() {
        let ports = vec![
            SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 },
            SlicePort { name: "stats".into(), protocol: Protocol::Udp, port: 8125 },
        ];
        let publish = Publish { service: ObjectName::new("shop", "web"), ports: ports.clone(), place: Place::Node, check: None };
        for (address, name, verdict, works) in [
            ("192.0.2.1", "web-node-1-ipv4", Verdict::Healthy, true),
            ("192.0.2.1", "web-node-1-ipv4", Verdict::Unknown, true),
            ("2001:db8::1", "web-node-1-ipv6", Verdict::Unhealthy, false),
        ] {
            let published = slice(&publish, "node-1", address.parse().unwrap(), verdict);
            assert_eq!(published.name, ObjectName::new("shop", name));
            let Object::EndpointSlice(slice) = &published.object else { panic!("{:?}", published.object) };
            assert_eq!((&slice.name, slice.service.as_ref(), &slice.ports), (&published.name, Some(&publish.service), &ports));
            let [endpoint] = &slice.endpoints[..] else { panic!("{slice:?}") };
            assert_eq!((endpoint.address.to_string().as_str(), endpoint.node.as_deref()), (address, Some("node-1")));
            assert_eq!((endpoint.ready, endpoint.serving, endpoint.terminating), (works, works, false));
            assert_eq!(slice.publisher.as_deref(), Some("node-1"));
            let written: EndpointSlice = serde_json::from_str(&published.text).unwrap();
            assert_eq!(Object::from_slice(&written).unwrap(), published.object, "others read what this node knows");
        }
    }
}
