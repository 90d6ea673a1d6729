//! Which flows end when the tables change, and which clients are forgotten. TCP flows to endpoints that left are not among them (semantics row 11).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use podgate_core::addr::protocol;
use podgate_core::affinity::BackendId;
use podgate_core::decide::still_serves;
use podgate_core::flow::{Flow, FlowTable, Kind, Opener};
use podgate_core::service::{Frontend, FrontendKey, ServicePort};
use podgate_core::snapshot::Snapshot;

/// Does both, and says so in the log.
pub fn tidy(flows: FlowTable<'_>, before: &Snapshot, now: &Snapshot) {
    let ended = end_stale(flows, before, now);
    if ended > 0 {
        tracing::info!(ended, "flows to endpoints, pods or addresses that are gone");
    }
    let forgotten = forget_stale(flows, before, now);
    if forgotten > 0 {
        tracing::info!(forgotten, "clients that stuck to endpoints that are gone");
    }
}

/// Ends the flows that `now` does not allow any more, and says how many.
///
/// A UDP flow whose endpoint serves no more ends, so that the client's next datagram gets a new one (row 10). Every flow of a pod that was taken
/// away ends before its address is used again, and every flow from or to a node or gateway address that is gone.
fn end_stale(flows: FlowTable<'_>, before: &Snapshot, now: &Snapshot) -> usize {
    let pod_left = |addr| before.pods.get(addr).is_some() && now.pods.get(addr).is_none();
    let address_left = |addr| before.node.owns(addr) && !now.node.owns(addr) || before.node.is_gateway(addr) && !now.node.is_gateway(addr);
    let over = |flow: &Flow| {
        let (client, backend) = (flow.original.src, flow.reply.src);
        let ends = [client, flow.original.dst, backend, flow.reply.dst];
        let endpoint_left = flow.kind == Kind::Service && flow.original.protocol == protocol::UDP && !still_serves(now, flow);
        endpoint_left || pod_left(backend) || flow.opener == Opener::Pod && pod_left(client) || ends.into_iter().any(address_left)
    };
    flows.end_matching(over)
}

/// Forgets the clients that stick to endpoints which are usable in `before` and not any more in `now` (semantics row 9), and says how many.
/// An endpoint that comes back gets its clients anew. What the tables share is not looked at.
pub(crate) fn forget_stale(flows: FlowTable<'_>, before: &Snapshot, now: &Snapshot) -> usize {
    let mut gone: HashMap<u64, HashSet<BackendId>> = HashMap::new();
    let sticks = |frontend: &Frontend| frontend.service.affinity.is_some();
    let same = |key: &FrontendKey, frontend: &Frontend| now.services.get(key).is_some_and(|now| Arc::ptr_eq(&now.service, &frontend.service));
    for (_, frontend) in before.services.unlike(&now.services).filter(|(key, frontend)| sticks(frontend) && !same(key, frontend)) {
        gone.entry(frontend.service.id).or_insert_with(|| usable(&frontend.service).collect());
    }
    if gone.is_empty() {
        return 0;
    }
    // Every frontend: a service may have lost one of its faces and live on behind another.
    for (_, frontend) in now.services.iter().filter(|(_, frontend)| sticks(frontend)) {
        if let Some(gone) = gone.get_mut(&frontend.service.id) {
            usable(&frontend.service).for_each(|id| {
                gone.remove(&id);
            });
        }
    }
    gone.retain(|_, gone| !gone.is_empty());
    if gone.is_empty() {
        return 0;
    }
    flows.affinity().forget(|service, id| gone.get(&service).is_some_and(|gone| gone.contains(&id)))
}

fn usable(service: &ServicePort) -> impl Iterator<Item = BackendId> {
    service.cluster.iter().chain(&*service.local).map(BackendId::of)
}
