//! Which flows end when the tables change. TCP flows to endpoints that left are not among them (semantics row 11).

use podgate_core::addr::protocol;
use podgate_core::decide::still_serves;
use podgate_core::flow::{Flow, FlowTable, Kind, Opener};
use podgate_core::snapshot::Snapshot;

/// Ends the flows that `now` does not allow any more, and says how many.
///
/// A UDP flow whose endpoint serves no more ends, so that the client's next datagram gets a new one (row 10). Every flow of a pod that was taken
/// away ends before its address is used again, and every flow from or to a node or gateway address that is gone.
pub fn end_stale(flows: FlowTable<'_>, before: &Snapshot, now: &Snapshot) -> usize {
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
