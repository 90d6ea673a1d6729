//! Session affinity as clients meet it (semantics row 9): whichever address they dial, whichever worker meets them, for as long as it holds.

use std::collections::BTreeSet;
use std::time::Duration;

use super::*;
use crate::affinity::{BackendId, Visit};
use crate::balance::{Maglev, Pick};
use crate::trace::trace;

const TIMEOUT: Duration = Duration::from_secs(100);
const WEB: u64 = 50;
const FACES: &[(Face, &str, &str, u16)] = &[
    (Face::ClusterIp, "10.96.0.50", "fd00:96::50", 80),
    (Face::NodePort, "192.0.2.1", "2001:db8::1", 30050),
    (Face::LoadBalancer, "198.51.100.80", "2001:db8:f::80", 80),
    (Face::ExternalIp, "198.51.100.81", "2001:db8:f::81", 80),
];

/// `count` pods of the other node, of the family of `client`.
fn pods(client: &str, count: u32) -> Vec<Backend> {
    let prefix = if client.contains(':') { "fd00:32:2::" } else { "10.32.2." };
    (10..10 + count).map(|n| backend(&format!("{prefix}{n}"), 8080, Place::RemotePod)).collect()
}

/// Puts a service with affinity and these endpoints behind all four faces of both families' addresses.
fn serve(world: &mut World, backends: Vec<Backend>, pick: Pick) {
    let mut port = (*service(WEB, TrafficPolicy::Cluster, backends)).clone();
    (port.affinity, port.balance.cluster) = (Some(TIMEOUT), pick);
    let port = Arc::new(port);
    for (face, v4, v6, number) in FACES {
        for address in [v4, v6] {
            for protocol in [protocol::TCP, protocol::UDP] {
                let key = FrontendKey { addr: addr(address), port: *number, protocol };
                world.snapshot.services = world.snapshot.services.with([(key, Some(Frontend { face: *face, service: port.clone() }))]);
            }
        }
    }
}

/// A new connection; the address that it is led to.
fn dial(world: &mut World, client: &str, from_port: u16, face: usize) -> Addr {
    let (_, v4, v6, port) = FACES[face];
    let v4_client = !client.contains(':');
    let at = |ip: &str, port: u16| std::net::SocketAddr::new(ip.parse().unwrap(), port).to_string();
    let ingress = if client.starts_with("10.32.1.") || client.starts_with("fd00:32:1:") { Ingress::Pods } else { Ingress::Host };
    let bytes = opener(protocol::TCP, &at(client, from_port), &at(if v4_client { v4 } else { v6 }, port));
    world.leaves(ingress, bytes, TO_PEER).dst
}

/// Has the client stick to `backend` from now on, as an earlier connection would have.
fn stuck(world: &World, client: &str, backend: &Backend) {
    let visit = Visit { client: addr(client), service: WEB, timeout: TIMEOUT, now: world.now };
    world.flows.table().affinity().stick(&visit, BackendId::of(backend), WorkerId(9), |_| true);
}

#[test]
fn a_client_meets_one_backend_by_whatever_address_it_dials_and_whichever_worker_it_meets() {
    for client in ["10.32.1.11", "203.0.113.9", "192.0.2.1", "fd00:32:1::11", "2001:db8:9::9"] {
        for pick in [Pick::Even, Pick::Maglev(Maglev::new(&pods(client, 8), &[]).into()), Pick::LeastLoaded(None)] {
            let mut world = World::new();
            let mut other_worker = Pipeline::new(WorkerId(1), 8);
            serve(&mut world, pods(client, 8), pick);
            let mut met = BTreeSet::new();
            for n in 0..40 {
                met.insert(dial(&mut world, client, 5_000 + n, usize::from(n) % FACES.len()));
                std::mem::swap(&mut world.pipeline, &mut other_worker);
            }
            assert_eq!(met.len(), 1, "{client} meets {met:?}");
        }
    }
}

#[test]
fn without_affinity_the_same_connections_are_spread_and_no_client_is_remembered() {
    let mut world = World::new();
    serve(&mut world, pods("", 8), Pick::Even);
    let key = FrontendKey { addr: addr("10.96.0.50"), port: 80, protocol: protocol::TCP };
    let mut port = (*world.snapshot.services.get(&key).unwrap().service).clone();
    port.affinity = None;
    world.snapshot.services = world.snapshot.services.with([(key, Some(Frontend { face: Face::ClusterIp, service: Arc::new(port) }))]);
    let met: BTreeSet<Addr> = (0..40).map(|n| dial(&mut world, "10.32.1.11", 5_000 + n, 0)).collect();
    assert_eq!(met.len(), 8);
    assert_eq!(world.flows.table().affinity().len(world.now), 0);
}

#[test]
fn clients_that_stick_are_spread_over_all_backends() {
    let mut world = World::new();
    serve(&mut world, pods("", 8), Pick::Even);
    let met: BTreeSet<Addr> = (1..100).map(|n| dial(&mut world, &format!("203.0.113.{n}"), 5_000, 1)).collect();
    assert_eq!(met.len(), 8);
}

#[test]
fn each_new_connection_holds_it_for_the_whole_time_again_and_then_it_is_over() {
    let (client, list) = ("203.0.113.9", pods("", 8));
    let mut world = World::new();
    serve(&mut world, list.clone(), Pick::Even);
    let chosen = dial(&mut world, client, 4_999, 1);
    world = World::new();
    serve(&mut world, list.clone(), Pick::Even);
    // What is remembered must be told from what would be chosen anew.
    let remembered = list.iter().find(|backend| backend.addr != chosen).unwrap();
    stuck(&world, client, remembered);
    for n in 0..5 {
        world.now.0 += 99_000;
        assert_eq!(dial(&mut world, client, 5_000 + n, 1), remembered.addr, "connection {n}");
    }
    // A packet of a known connection is no new connection.
    world.now.0 += 60_000;
    dial(&mut world, client, 5_004, 1);
    world.now.0 += 41_000;
    assert_eq!(dial(&mut world, client, 6_000, 1), chosen);
}

#[test]
fn it_is_forgotten_when_the_endpoint_leaves_and_the_next_one_is_kept() {
    let (client, list) = ("203.0.113.9", pods("", 8));
    let mut world = World::new();
    serve(&mut world, list.clone(), Pick::Even);
    let first = dial(&mut world, client, 5_000, 1);
    let rest: Vec<Backend> = list.iter().copied().filter(|backend| backend.addr != first).collect();
    serve(&mut world, rest, Pick::Even);
    let second = dial(&mut world, client, 5_001, 1);
    assert_ne!(first, second);
    // The first one is back: whoever was chosen meanwhile keeps the client.
    serve(&mut world, list, Pick::Even);
    assert_eq!(dial(&mut world, client, 5_002, 0), second);
    serve(&mut world, vec![], Pick::Even);
    let syn = opener(protocol::TCP, "203.0.113.9:5003", "192.0.2.1:30050");
    assert_eq!(world.send(Ingress::Host, syn).0, Verdict::Drop(DropReason::NoBackendRejected));
}

/// A worker still has the tables before the last: what the other remembered counts as long as it can be reached by both.
#[test]
fn workers_with_different_tables_agree_on_an_endpoint_that_both_have() {
    let (client, list) = ("203.0.113.9", pods("", 8));
    let mut world = World::new();
    serve(&mut world, list[..7].to_vec(), Pick::Even);
    let first = dial(&mut world, client, 5_000, 1);
    world.pipeline = Pipeline::new(WorkerId(1), 8);
    serve(&mut world, list, Pick::Even);
    assert_eq!(dial(&mut world, client, 5_001, 1), first);
}

/// The moment between `decide` and the note: another worker was quicker.
#[test]
fn who_comes_second_follows_who_came_first() {
    let (client, list) = ("203.0.113.9", pods("", 8));
    let mut world = World::new();
    serve(&mut world, list.clone(), Pick::Even);
    let flows = world.flows.table();
    let env = Env { snapshot: &world.snapshot, flows, now: world.now, now_ns: 0, counters: &world.counters };
    let mut bytes = opener(protocol::TCP, "203.0.113.9:5000", "192.0.2.1:30050");
    let packet = testing::packet(&mut bytes, Ingress::Host);
    let parsed = parse(&packet).unwrap();
    let ours = match decide(env.snapshot, &flows, &packet, &parsed, flows.hash(&parsed.tuple), Sender::Outside, env.now) {
        Decision::Open(opening) => opening.to.0,
        other => panic!("{other:?}"),
    };
    let theirs = list.iter().find(|backend| backend.addr != ours).unwrap();
    stuck(&world, client, theirs);
    let visit = Visit { client: addr(client), service: WEB, timeout: TIMEOUT, now: env.now };
    assert!(!world.pipeline.stick(&env, &parsed, Sender::Outside, &visit, BackendId::new(ours, 8080)));
    match world.pipeline.decide(&env, &packet, &parsed, flows.hash(&parsed.tuple), Sender::Outside) {
        Decision::Open(opening) => assert_eq!(opening.to.0, theirs.addr),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_trace_says_what_the_client_sticks_to_and_by_which_policy_endpoints_are_chosen() {
    let mut world = World::new();
    serve(&mut world, pods("", 8), Pick::LeastLoaded(None));
    let steps = |world: &World, client: &str| -> Vec<String> {
        let steps = trace(&world.snapshot, &world.flows.table(), testing::tuple(protocol::TCP, client, "10.96.0.50:80"), world.now);
        steps.into_iter().filter(|s| matches!(s.stage, "affinity" | "balance")).map(|s| format!("{}: {}", s.stage, s.detail)).collect()
    };
    let policy = "balance: a new connection's endpoint is chosen by the policy least-loaded";
    assert_eq!(steps(&world, "10.32.1.11:1"), [policy, "affinity: 10.32.1.11 sticks to none yet; it will stick to its next one for 100 s"]);
    assert_eq!(world.flows.table().affinity().len(world.now), 0, "nothing is noted");
    let met = dial(&mut world, "10.32.1.11", 5_000, 0);
    world.now.0 += 30_000;
    assert_eq!(steps(&world, "10.32.1.11:1"), [policy.to_owned(), format!("affinity: 10.32.1.11 sticks to {met}:8080 for 70 s")]);
    let rest = pods("", 8).into_iter().filter(|backend| backend.addr != met).collect();
    serve(&mut world, rest, Pick::Even);
    let left = "affinity: 10.32.1.11 stuck to an endpoint that is not one of these; it will stick to its next one for 100 s";
    assert_eq!(steps(&world, "10.32.1.11:1"), [left]);
}

#[test]
fn flows_of_a_least_loaded_service_are_counted_from_their_first_packet_to_their_end() {
    let mut world = World::new();
    let list = pods("", 2);
    serve(&mut world, list.clone(), Pick::LeastLoaded(None));
    let clients = (1..=20).map(|n| format!("203.0.113.{n}"));
    let met: Vec<Addr> = clients.map(|client| dial(&mut world, &client, 5_000, 1)).collect();
    let loads = |world: &World| list.iter().map(|backend| world.flows.table().loads().of(backend)).collect::<Vec<_>>();
    assert_eq!(loads(&world), [10, 10], "of two the one with fewer: they take turns");
    let first = met[0];
    world.flows.table().end_matching(|flow| flow.reply.src == first);
    assert_eq!(loads(&world).iter().sum::<u64>(), 10);
    for n in 30..40 {
        assert_eq!(dial(&mut world, &format!("203.0.113.{n}"), 5_000, 1), first, "it has fewer");
    }
}
