//! Which endpoints a service port uses: semantics rows 1 to 3.
//!
//! Upstream: Kubernetes `pkg/proxy/topology.go` (the choice) and `pkg/proxy/endpointslicecache.go` (joining slices).

use std::collections::BTreeMap;
use std::sync::Arc;

use podgate_core::addr::Addr;
use podgate_core::service::{Backend, Place};
use podgate_core::wire::ip::Scope;

use super::node::Locator;
use crate::model::{Endpoint, Protocol, Slices};

/// An endpoint of a service port, before the choice.
#[derive(Clone, Debug)]
pub(super) struct Candidate<'a> {
    pub backend: Backend,
    pub endpoint: &'a Endpoint,
    /// Whether it counts for the Local policy.
    pub local: Locality,
}

/// Whether an endpoint is on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Locality {
    Here,
    Elsewhere,
}

/// Whose topology hints decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    Any,
    SameNode,
    SameZone,
}

/// What became of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    Used,
    /// Ready, but the hints give it to another node or zone.
    HintedElsewhere,
    NotReady,
    /// Still serves, on its way out, while ready ones exist.
    Terminating,
}

/// The lists that a service port has, each sorted by address and port.
pub(super) struct Chosen {
    pub cluster: List,
    pub local: List,
}

/// A list of endpoints.
#[derive(Default)]
pub(super) struct List {
    pub backends: Vec<Backend>,
    /// Their weights, in the same order.
    pub weights: Vec<u16>,
}

/// Joins the slices' endpoints for one service port in one family.
pub(super) fn candidates<'a>(slices: Option<&'a Slices>, port: &str, protocol: Protocol, v4: bool, node: &str, at: &Locator) -> Vec<Candidate<'a>> {
    let mut found: BTreeMap<(Addr, u16), Candidate<'a>> = BTreeMap::new();
    for slice in slices.into_iter().flat_map(|s| s.values()) {
        for slice_port in slice.ports.iter().filter(|p| &*p.name == port && p.protocol == protocol) {
            for endpoint in slice.endpoints.iter().filter(|e| e.address.is_ipv4() == v4) {
                // An API server takes no loopback, link-local or multicast endpoints; manifests are not asked before they come here.
                if Scope::of(endpoint.address.into()) != Scope::Unicast {
                    continue;
                }
                let addr = Addr::from(endpoint.address);
                let place = at.place(addr);
                // Upstream goes by nodeName alone. Hand-written slices often lack it: then the address tells.
                let here = match endpoint.node.as_deref() {
                    Some(name) => name == node,
                    None => matches!(place, Place::LocalPod | Place::ThisNode),
                };
                let local = if here { Locality::Here } else { Locality::Elsewhere };
                let candidate = Candidate { backend: Backend { addr, port: slice_port.port, place }, endpoint, local };
                found
                    .entry((addr, slice_port.port))
                    .and_modify(|known| {
                        // An endpoint that moves between slices is in both for a while.
                        if known.endpoint.terminating && !endpoint.terminating {
                            *known = candidate.clone();
                        }
                    })
                    .or_insert(candidate);
            }
        }
    }
    found.into_values().collect()
}

fn topology(candidates: &[Candidate<'_>], node: &str, zone: Option<&Arc<str>>) -> Topology {
    let ready = || candidates.iter().filter(|c| c.endpoint.ready);
    let all_and_one = |hints: fn(&Endpoint) -> &[Arc<str>], mine: Option<&str>| {
        let all = ready().next().is_some() && ready().all(|c| !hints(c.endpoint).is_empty());
        all && mine.is_some_and(|mine| ready().any(|c| hints(c.endpoint).iter().any(|h| &**h == mine)))
    };
    if all_and_one(|e| &e.node_hints, Some(node)) {
        Topology::SameNode
    } else if all_and_one(|e| &e.zone_hints, zone.map(|z| &**z)) {
        Topology::SameZone
    } else {
        Topology::Any
    }
}

/// What becomes of each candidate of the cluster-wide list, in order.
pub(super) fn cluster_choice(candidates: &[Candidate<'_>], node: &str, zone: Option<&Arc<str>>) -> Vec<Choice> {
    let topology = topology(candidates, node, zone);
    let hinted = |e: &Endpoint| match topology {
        Topology::Any => true,
        Topology::SameNode => e.node_hints.iter().any(|h| &**h == node),
        Topology::SameZone => e.zone_hints.iter().any(|h| Some(h) == zone),
    };
    let any_ready = candidates.iter().any(|c| c.endpoint.ready && hinted(c.endpoint));
    let choose = |e: &Endpoint| match e {
        e if e.ready && hinted(e) => Choice::Used,
        e if e.ready => Choice::HintedElsewhere,
        e if e.serving && e.terminating && !any_ready => Choice::Used,
        e if e.serving && e.terminating => Choice::Terminating,
        _ => Choice::NotReady,
    };
    candidates.iter().map(|c| choose(c.endpoint)).collect()
}

/// What becomes of each candidate of the list of this node, in order; hints do not count here.
pub(super) fn local_choice(candidates: &[Candidate<'_>]) -> Vec<Option<Choice>> {
    let here = |c: &&Candidate<'_>| c.local == Locality::Here;
    let any_ready = candidates.iter().filter(here).any(|c| c.endpoint.ready);
    let choose = |e: &Endpoint| match e {
        e if e.ready => Choice::Used,
        e if e.serving && e.terminating && !any_ready => Choice::Used,
        e if e.serving && e.terminating => Choice::Terminating,
        _ => Choice::NotReady,
    };
    candidates.iter().map(|c| here(&c).then(|| choose(c.endpoint))).collect()
}

pub(super) fn choose(candidates: &[Candidate<'_>], node: &str, zone: Option<&Arc<str>>) -> Chosen {
    let cluster = cluster_choice(candidates, node, zone);
    let local = local_choice(candidates);
    let pick = |used: &dyn Fn(usize) -> bool| {
        let used = candidates.iter().enumerate().filter(|(i, _)| used(*i));
        let (backends, weights) = used.map(|(_, c)| (c.backend, c.endpoint.weight)).unzip();
        List { backends, weights }
    };
    Chosen { cluster: pick(&|i| cluster[i] == Choice::Used), local: pick(&|i| local[i] == Some(Choice::Used)) }
}
