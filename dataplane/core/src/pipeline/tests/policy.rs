//! Who dials which face of a service with which backend: what semantics row 7 and design D1 make of the source, reasoned afresh.
//!
//! Two things decide. Policy: kube-proxy's rules, as row 7 has them. And the reply's way: a backend answers the source it saw, and unless
//! that answer passes this gateway the client hears from an address that it never dialled. The model below says, from the node's rules
//! (design D1) and the peers' tables alone, where each backend's answer to each source goes; the pipeline must keep the client's source
//! exactly where both allow it.

use super::*;

/// A client: its address, where its packets come in, and where its answers leave.
struct Client {
    what: &'static str,
    addr: &'static str,
    ingress: Ingress,
    back: Verdict,
}

const CLIENTS: &[Client] = &[
    Client { what: "a pod", addr: "10.32.1.11", ingress: Ingress::Pods, back: Verdict::ToPods },
    Client { what: "the backend pod itself", addr: "10.32.1.10", ingress: Ingress::Pods, back: Verdict::ToPods },
    Client { what: "this node", addr: "192.0.2.1", ingress: Ingress::Host, back: Verdict::ToHost },
    Client { what: "somebody outside", addr: "203.0.113.9", ingress: Ingress::Host, back: Verdict::ToHost },
    Client { what: "the backend outside itself", addr: "198.51.100.53", ingress: Ingress::Host, back: Verdict::ToHost },
    Client { what: "a pod elsewhere", addr: "10.32.2.11", ingress: PEER, back: TO_PEER },
    Client { what: "the backend pod elsewhere itself", addr: "10.32.2.10", ingress: PEER, back: TO_PEER },
    Client { what: "another node, over the overlay", addr: "192.0.2.2", ingress: PEER, back: TO_PEER },
    Client { what: "another node, past the overlay", addr: "192.0.2.2", ingress: Ingress::Host, back: Verdict::ToHost },
];

const BACKENDS: &[(Place, &str)] = &[
    (Place::LocalPod, "10.32.1.10"),
    (Place::ThisNode, "192.0.2.1"),
    (Place::RemotePod, "10.32.2.10"),
    (Place::OtherNode, "192.0.2.2"),
    (Place::Outside, "198.51.100.53"),
];

const FACES: &[(Face, &str, u16)] = &[
    (Face::ClusterIp, "10.96.0.50", 80),
    (Face::NodePort, "192.0.2.1", 30050),
    (Face::LoadBalancer, "198.51.100.80", 80),
    (Face::ExternalIp, "198.51.100.81", 80),
];

fn is_cluster_pod(source: &str) -> bool {
    source.starts_with("10.32.")
}

/// Where a backend's answer to `source` (with this port) comes into this gateway, if it does.
fn answer_comes_in(place: Place, source: &str, port: u16) -> Option<Ingress> {
    let is_ours = source.starts_with("10.32.1.") || source == "192.0.2.1";
    match place {
        // All that a pod sends comes in from the pods' side.
        Place::LocalPod => Some(Ingress::Pods),
        // The node routes the pods' ranges to `host`; its own addresses by `local`, but for the ports that rules lead to `host`.
        Place::ThisNode if is_cluster_pod(source) => Some(Ingress::Host),
        Place::ThisNode => (source == "192.0.2.1" && port >= 61000).then_some(Ingress::Host),
        // The pod's own gateway sends what is ours over the overlay, keeps what is its own and masquerades the rest.
        Place::RemotePod => is_ours.then_some(PEER),
        // The other node routes pods' ranges to its gateway, which sends ours here; our node's address it reaches past both gateways.
        Place::OtherNode if source.starts_with("10.32.1.") => Some(PEER),
        Place::OtherNode => (source == "192.0.2.1" && port >= 61000).then_some(Ingress::Host),
        Place::Outside => (source == "192.0.2.1" && port >= 61000).then_some(Ingress::Host),
    }
}

/// Semantics row 7: whether kube-proxy would masquerade.
fn policy_masquerades(face: Face, policy: TrafficPolicy, client: &str) -> bool {
    match (face, policy) {
        (Face::ClusterIp, _) => !is_cluster_pod(client),
        (_, TrafficPolicy::Cluster) => true,
        (_, TrafficPolicy::Local) => client == "192.0.2.1",
    }
}

/// Semantics rows 6 and 7: whether the only backend may be chosen at all.
fn may_choose(face: Face, policy: TrafficPolicy, client: &str, place: Place) -> bool {
    let is_local = matches!(place, Place::LocalPod | Place::ThisNode);
    match (face, policy) {
        (_, TrafficPolicy::Cluster) => true,
        (Face::ClusterIp, TrafficPolicy::Local) => is_local,
        (_, TrafficPolicy::Local) => is_local || is_cluster_pod(client) || client == "192.0.2.1",
    }
}

#[test]
fn every_client_face_policy_and_place() {
    let mut kept = 0;
    for protocol in [protocol::TCP, protocol::UDP] {
        for client in CLIENTS {
            for (face, dialled, dialled_port) in FACES {
                for policy in [TrafficPolicy::Cluster, TrafficPolicy::Local] {
                    for (place, backend_addr) in BACKENDS {
                        let what = format!("{} dials {face:?} of policy {policy:?} with a backend at {place:?}", client.what);
                        let mut world = World::new();
                        let mut port = (*service(50, policy, vec![backend(backend_addr, 8080, *place)])).clone();
                        port.internal_policy = policy;
                        let key = FrontendKey { addr: addr(dialled), port: *dialled_port, protocol };
                        world.snapshot.services = world.snapshot.services.with([(key, Some(Frontend { face: *face, service: Arc::new(port) }))]);
                        let (from, to) = (format!("{}:5000", client.addr), format!("{dialled}:{dialled_port}"));
                        let (verdict, left) = world.send(client.ingress, opener(protocol, &from, &to));
                        if !may_choose(*face, policy, client.addr, *place) {
                            assert_eq!(verdict, Verdict::Drop(DropReason::NoBackendLocal), "{what}");
                            continue;
                        }
                        let left = tuple_of(&left);
                        assert_eq!((left.dst, left.dst_port), (addr(backend_addr), 8080), "{what}: {verdict:?}");
                        let keeps = left.src == addr(client.addr) && left.src_port == 5000;
                        // By its own address the node is known as this node: policy asks no more than that.
                        let policy_allows = !policy_masquerades(*face, policy, client.addr) || client.addr == "192.0.2.1";
                        let hairpin = client.addr == *backend_addr;
                        let would_return = answer_comes_in(*place, client.addr, 5000).is_some();
                        assert_eq!(keeps, policy_allows && !hairpin && would_return && *place != Place::Outside, "{what}: the source {:?}", left);
                        let source = left.src.to_string();
                        let Some(way) = answer_comes_in(*place, &source, left.src_port) else {
                            panic!("{what}: the answer to {source}:{} goes past this gateway", left.src_port)
                        };
                        let answer = world.leaves(way, reply(protocol, &left), client.back);
                        assert_eq!(answer, testing::tuple(protocol, &from, &to).reversed(), "{what}");
                        kept += u32::from(keeps);
                    }
                }
            }
        }
    }
    assert!(kept > 100, "the table has rows of both kinds: {kept}");
}

/// A family that this node has no address of cannot be masqueraded in; the other is not touched.
#[test]
fn a_family_without_an_address_of_the_node_is_refused_by_name() {
    let mut world = World::new();
    let node = Arc::make_mut(&mut world.snapshot.node);
    node.masquerade.as_mut().unwrap().source_v6 = None;
    node.gateway_v6 = None;
    world.leaves(Ingress::Pods, opener(protocol::TCP, "10.32.1.11:1", "203.0.113.9:443"), Verdict::ToHost);
    let bytes = opener(protocol::TCP, "[fd00:32:1::11]:1", "[2001:db8:9::9]:443");
    assert_eq!(world.send(Ingress::Pods, bytes).0, Verdict::Drop(DropReason::MasqueradeOff));
    let bytes = opener(protocol::TCP, "[2001:db8:9::9]:1", "[2001:db8::1]:30080");
    assert_eq!(world.send(Ingress::Host, bytes).0, Verdict::Drop(DropReason::NoRouteFamily));
    world.leaves(Ingress::Pods, opener(protocol::TCP, "[fd00:32:1::11]:1", "[fd00:96::10]:80"), Verdict::ToPods);
}
