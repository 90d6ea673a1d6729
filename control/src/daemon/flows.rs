//! Which flows end when the tables change, and which clients are forgotten. TCP flows to endpoints that left are not among them (semantics row 11).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use podgate_core::addr::protocol;
use podgate_core::affinity::BackendId;
use podgate_core::decide::still_serves;
use podgate_core::flow::{Flow, FlowTable, Opener};
use podgate_core::service::{Backend, Frontend, FrontendKey, ServicePort, ServiceTable};
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

/// Ends the flows that `now` does not allow any more, and says how many. The whole table is read only if some flow can be among them: a pod
/// that comes ends none.
///
/// A UDP flow whose endpoint serves no more ends, so that the client's next datagram gets a new one (row 10). Every flow of a pod that was taken
/// away ends before its address is used again, and every flow from or to a node or gateway address that is gone.
fn end_stale(flows: FlowTable<'_>, before: &Snapshot, now: &Snapshot) -> usize {
    let pod_left = |addr| before.pods.get(addr).is_some() && now.pods.get(addr).is_none();
    let address_left = |addr| before.node.owns(addr) && !now.node.owns(addr) || before.node.is_gateway(addr) && !now.node.is_gateway(addr);
    if !any_can_end(before, now) {
        return 0;
    }
    let over = |flow: &Flow| {
        let (client, backend) = (flow.original.src, flow.reply.src);
        let ends = [client, flow.original.dst, backend, flow.reply.dst];
        let endpoint_left = flow.is_of_a_service() && flow.original.protocol == protocol::UDP && !still_serves(now, flow);
        endpoint_left || pod_left(backend) || flow.opener == Opener::Pod && pod_left(client) || ends.into_iter().any(address_left)
    };
    flows.end_matching(over)
}

/// Whether something left that a flow may have been to or from.
fn any_can_end(before: &Snapshot, now: &Snapshot) -> bool {
    let pod_left = before.pods.iter().any(|(addr, _)| now.pods.get(addr).is_none());
    let address_left =
        (&before.node.addresses, before.node.gateway_v4, before.node.gateway_v6) != (&now.node.addresses, now.node.gateway_v4, now.node.gateway_v6);
    pod_left || address_left || udp_backend_left(&before.services, &now.services)
}

/// Whether a UDP frontend or one of its backends is no longer there.
fn udp_backend_left(before: &ServiceTable, now: &ServiceTable) -> bool {
    before.unlike(now).filter(|(key, _)| key.protocol == protocol::UDP).any(|(key, old)| {
        let Some(new) = now.get(key).filter(|new| new.service.id == old.service.id) else { return true };
        let there = |backend: &Backend| new.service.cluster.contains(backend) || new.service.local.contains(backend);
        old.service.cluster.iter().chain(old.service.local.iter()).any(|backend| !there(backend))
    })
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use podgate_core::balance::Balance;
    use podgate_core::service::{Face, Frontend, FrontendKey, Place, ServicePort, TrafficPolicy};

    use super::*;

    fn table(backends: &[u8], protocol: u8) -> ServiceTable {
        let backend = |last: &u8| Backend { addr: std::net::IpAddr::from([10, 244, 1, *last]).into(), port: 53, place: Place::LocalPod };
        let backends: Arc<[Backend]> = backends.iter().map(backend).collect();
        let service = ServicePort {
            id: 7,
            name: "default/dns".into(),
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            cluster: backends.clone(),
            local: backends,
            affinity: None,
            balance: Balance::default(),
            source_ranges: Vec::new(),
        };
        let frontend = Frontend { face: Face::ClusterIp, service: Arc::new(service) };
        ServiceTable::default().with([(FrontendKey::new([10, 96, 0, 10].into(), 53, protocol), Some(frontend))])
    }

    #[test]
    fn only_a_udp_backend_that_leaves_can_end_a_flow() {
        let both = table(&[1, 2], protocol::UDP);
        assert!(!udp_backend_left(&both, &both.clone()));
        assert!(!udp_backend_left(&table(&[1], protocol::UDP), &both), "one more");
        assert!(udp_backend_left(&both, &table(&[2], protocol::UDP)), "one less");
        assert!(udp_backend_left(&both, &ServiceTable::default()), "none any more");
        assert!(!udp_backend_left(&table(&[1, 2], protocol::TCP), &table(&[2], protocol::TCP)), "TCP goes on");
    }
}
