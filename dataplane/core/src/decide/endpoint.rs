//! Which endpoint a new connection to a service is led to: of which list, and which of it.

use crate::addr::{Addr, Tuple};
use crate::admit::Sender;
use crate::affinity::BackendId;
use crate::balance::{self, Pick, finalize};
use crate::fib::within;
use crate::flow::{FlowTable, Now};
use crate::service::{Backend, Face, Frontend, ServicePort, TrafficPolicy};
use crate::snapshot::NodeTables;

/// The endpoints that a frontend leads a sender to.
pub(crate) struct Reach<'a> {
    /// By which policy.
    pub policy: TrafficPolicy,
    /// The list.
    pub endpoints: &'a [Backend],
    /// How one of it is chosen.
    pub pick: &'a Pick,
    /// Whether policy wants the source replaced.
    pub masquerade: bool,
}

impl<'a> Reach<'a> {
    /// Semantics row 7 (kube-proxy's nftables/proxier.go).
    pub fn of(frontend: &'a Frontend, node: &NodeTables, src: Addr, sender: Sender) -> Reach<'a> {
        let service = &*frontend.service;
        let cluster = |masquerade| Reach { policy: TrafficPolicy::Cluster, endpoints: &service.cluster, pick: &service.balance.cluster, masquerade };
        let local = |masquerade| Reach { policy: TrafficPolicy::Local, endpoints: &service.local, pick: &service.balance.local, masquerade };
        let from_cluster_pod = within(&node.cluster_pod_cidrs, src);
        match (frontend.face, service.internal_policy, service.external_policy) {
            // Who handed it on knows that an endpoint is here.
            _ if matches!(sender, Sender::HandedOn(_)) => {
                Reach { policy: TrafficPolicy::Cluster, endpoints: &service.local, pick: &service.balance.local, masquerade: false }
            }
            (Face::ClusterIp, TrafficPolicy::Cluster, _) => cluster(!from_cluster_pod),
            (Face::ClusterIp, TrafficPolicy::Local, _) => local(!from_cluster_pod),
            (Face::HostPort, ..) => local(false),
            (_, _, TrafficPolicy::Cluster) => cluster(true),
            (_, _, TrafficPolicy::Local) if from_cluster_pod => cluster(false),
            (_, _, TrafficPolicy::Local) if sender == Sender::Node => cluster(true),
            (_, _, TrafficPolicy::Local) => local(false),
        }
    }

    /// The endpoint that the table of session affinity knows by `id`.
    pub fn find(&self, id: BackendId) -> Option<&'a Backend> {
        self.endpoints.iter().find(|backend| BackendId::of(backend) == id)
    }
}

/// How often an endpoint is chosen for a connection until one is free for it: one of two is missed once in 2^15 times.
const CHOICES: u64 = 16;

/// The endpoint for a new connection.
pub(super) fn choose<'a>(flows: &FlowTable<'_>, reach: &Reach<'a>, service: &ServicePort, tuple: &Tuple, now: Now) -> Option<&'a Backend> {
    let choice = |hash| reach.pick.choose(reach.endpoints, hash, flows.loads());
    if service.affinity.is_some() {
        let sticky = flows.affinity().lookup(tuple.src, service.id, now);
        if let Some(backend) = sticky.and_then(|sticky| reach.find(sticky.backend)) {
            return Some(backend);
        }
        // By the client alone, so that workers agree, and a client that was put out of a full table finds the same again.
        return choice(balance::of_client(tuple.src, service.id));
    }
    let hash = balance::of_connection(tuple);
    let first = choice(hash)?;
    if reach.pick.is_consistent() || is_free(flows, first, tuple) {
        return Some(first);
    }
    let mut others = (1..CHOICES).filter_map(|number| choice(finalize(hash.wrapping_add(number))));
    Some(others.find(|other| is_free(flows, other, tuple)).unwrap_or(first))
}

/// Whether no other flow is between this client's port and the endpoint: one through another VIP, as a rule, and over. The endpoint's kernel
/// would remember it (TIME_WAIT), find a SYN from the same port too old, since a client's timestamps differ by what it dials, and cost the
/// connection a timer (RFC 9293 §3.10.7.4, RFC 7323 §5). nf_nat would change the client's port.
fn is_free(flows: &FlowTable<'_>, backend: &Backend, tuple: &Tuple) -> bool {
    let reply = Tuple { src: backend.addr, src_port: backend.port, dst: tuple.src, dst_port: tuple.src_port, protocol: tuple.protocol };
    flows.lookup(&reply).is_none_or(|flow| flow.original == *tuple)
}

/// The endpoint of this node for a connection that a peer handed on. The peer chose of the whole list by the same hash: where both know
/// the same list this is the endpoint that it meant.
pub(super) fn choose_here<'a>(
    flows: &FlowTable<'_>,
    here: &Reach<'a>,
    frontend: &'a Frontend,
    node: &NodeTables,
    tuple: &Tuple,
    now: Now,
) -> Option<&'a Backend> {
    let whole = Reach::of(frontend, node, tuple.src, Sender::Outside);
    let meant = choose(flows, &whole, &frontend.service, tuple, now);
    meant.filter(|backend| here.endpoints.contains(backend)).or_else(|| choose(flows, here, &frontend.service, tuple, now))
}
