//! Each stage by itself, on packets that are in the cache. `cargo bench -p podgate-bench --bench stages`

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use podgate_bench::cpu_time::{self, CpuTime};
use podgate_bench::world::{Family, World, from_peer, packet};
use podgate_core::addr::{Addr, protocol};
use podgate_core::admit::{Sender, admit};
use podgate_core::affinity::{BackendId, Visit};
use podgate_core::balance::{self, Maglev, Pick, Weights};
use podgate_core::decap;
use podgate_core::decide::hop;
use podgate_core::encap;
use podgate_core::flow::{Now, OwnedFlows};
use podgate_core::nat;
use podgate_core::packet::{Checksum, Ingress};
use podgate_core::parse::parse;
use podgate_core::service::{Backend, Place};
use podgate_core::testing::{self, addr, flags};
use podgate_core::verdict::WorkerId;
use podgate_core::wire::checksum::Sum;
use podgate_core::wire::ip;

criterion_group!(name = benches; config = cpu_time::criterion(); targets = parsing, admission, routing, choosing, translation, checksums, overlay);
criterion_main!(benches);

fn endpoints(family: Family) -> (String, String) {
    (family.with_port(&family.pod(1), 5000), family.with_port(&family.pod(2), 80))
}

fn a_packet(family: Family, protocol: u8) -> Vec<u8> {
    let (src, dst) = endpoints(family);
    packet(family, protocol, &src, &dst, 64, flags::ACK)
}

fn parsing(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("parse");
    for family in [Family::V4, Family::V6] {
        for (name, protocol) in [("udp", protocol::UDP), ("tcp", protocol::TCP)] {
            let mut bytes = a_packet(family, protocol);
            let packet = testing::packet(&mut bytes, Ingress::Pods);
            group.bench_function(format!("{name} {}", family.name()), |b| b.iter(|| black_box(parse(black_box(&packet)))));
        }
        let mut bytes = a_packet(family, protocol::UDP);
        let packet = testing::packet(&mut bytes, from_peer());
        group.bench_function(format!("udp {} from a peer", family.name()), |b| b.iter(|| black_box(parse(black_box(&packet)))));
    }
}

fn admission(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("admit");
    let world = World::new(16);
    for family in [Family::V4, Family::V6] {
        let remote = family.with_port(&family.pod_of_peer(0, 3), 5000);
        let (local, to) = endpoints(family);
        for (name, src, ingress, sender) in [
            ("a pod's", &local, Ingress::Pods, Sender::Pod { limited: false }),
            ("a peer's", &remote, from_peer(), Sender::Peer(podgate_core::verdict::PeerId(0))),
        ] {
            let mut bytes = packet(family, protocol::UDP, src, &to, 64, 0);
            let mut packet = testing::packet(&mut bytes, ingress);
            let parsed = parse(&packet).expect("a good packet");
            assert_eq!(admit(&world.snapshot, &mut packet, &parsed), Ok(sender));
            group.bench_function(format!("{name} {}", family.name()), |b| {
                b.iter(|| black_box(admit(&world.snapshot, &mut packet, black_box(&parsed))))
            });
        }
    }
}

fn routing(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("hop");
    let world = World::new(16);
    for family in [Family::V4, Family::V6] {
        let outside = if family == Family::V4 { "198.51.100.7" } else { "2001:db8:ffff::7" };
        for (name, dst) in [("a pod", family.pod(3)), ("a peer's pod", family.pod_of_peer(50, 3)), ("outside", outside.to_string())] {
            let dst = addr(&dst);
            assert!(hop(&world.snapshot, dst).is_ok());
            group.bench_function(format!("{name} {}", family.name()), |b| b.iter(|| black_box(hop(&world.snapshot, black_box(dst)))));
        }
    }
}

/// The endpoint of a new connection, of 25: for a service by default, for one that asks for a policy, for a client that is known.
fn choosing(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("choose");
    let pods = (0..25).map(|n| Backend { addr: addr(&Family::V4.pod(n)), port: 8080, place: Place::LocalPod });
    let endpoints: Vec<Backend> = pods.collect();
    let weights: Vec<u16> = (0..25).map(|n| n % 4 + 1).collect();
    let flows = OwnedFlows::new(1 << 16, [1, 2]);
    let (loads, affinity) = (flows.table().loads(), flows.table().affinity());
    for pick in [
        Pick::Even,
        Pick::Weighted(Arc::new(Weights::new(&weights).expect("they differ"))),
        Pick::Maglev(Arc::new(Maglev::new(&endpoints, &weights))),
        Pick::LeastLoaded(None),
    ] {
        let mut tuple = testing::tuple(protocol::TCP, &Family::V4.with_port(&Family::V4.pod(1), 5000), "10.96.0.1:80");
        group.bench_function(pick.name(), |b| {
            b.iter(|| {
                tuple.src_port = tuple.src_port.wrapping_add(1);
                black_box(pick.choose(&endpoints, balance::of_connection(&tuple), loads))
            })
        });
    }
    let mut client = 0u128;
    group.bench_function("of a known client", |b| {
        b.iter(|| {
            client = client % 1_000 + 1;
            let visit = Visit { client: Addr(client), service: 7, timeout: Duration::from_secs(10_800), now: Now(0) };
            let sticky = affinity.lookup(visit.client, visit.service, visit.now);
            let known = sticky.and_then(|sticky| endpoints.iter().find(|endpoint| BackendId::of(endpoint) == sticky.backend));
            let choice = known.or_else(|| Pick::Even.choose(&endpoints, balance::of_client(visit.client, visit.service), loads));
            black_box(affinity.stick(&visit, BackendId::of(choice.expect("there are endpoints")), WorkerId(0), |_| true))
        })
    });
    group.finish();
    let hundred: Vec<Backend> = (0..100).map(|n| Backend { addr: Addr::from_v4([10, 32, 7, n]), port: 8080, place: Place::RemotePod }).collect();
    c.bench_function("fill a Maglev table for 100 endpoints", |b| b.iter(|| black_box(Maglev::new(black_box(&hundred), &[]))));
}

/// To a backend and back again: two translations each time, and the packet is as it was.
fn translation(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("nat");
    group.throughput(Throughput::Elements(2));
    for family in [Family::V4, Family::V6] {
        for (name, protocol, checksum) in [
            ("tcp", protocol::TCP, Checksum::Full),
            ("udp", protocol::UDP, Checksum::Full),
            ("tcp, checksum left to the device,", protocol::TCP, Checksum::Partial),
        ] {
            let mut bytes = a_packet(family, protocol);
            let parsed = parse(&testing::packet(&mut bytes, Ingress::Pods)).expect("a good packet");
            let there = testing::tuple(protocol, &family.with_port(&family.pod(1), 5000), &family.with_port(&family.pod_of_peer(9, 9), 8080));
            group.bench_function(format!("{name} {}, there and back", family.name()), |b| {
                b.iter(|| {
                    nat::translate(&mut bytes, &parsed, checksum, black_box(&there));
                    nat::translate(&mut bytes, &parsed, checksum, black_box(&parsed.tuple));
                })
            });
        }
    }
}

fn checksums(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("checksum");
    for len in [20, 1_500, 65_536] {
        let bytes: Vec<u8> = (0..len).map(|n| (n * 7 + n / 251) as u8).collect();
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("{len} bytes"), |b| b.iter(|| black_box(Sum::of(black_box(&bytes)).finish())));
    }
}

fn overlay(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("overlay");
    for (family, inner) in [(Family::V4, ip::Family::V4), (Family::V6, ip::Family::V6)] {
        let mut header = [0; encap::HEADER_LEN];
        group.bench_function(format!("encap header {}", family.name()), |b| {
            b.iter(|| encap::write_header(black_box(&mut header), black_box(1), black_box(inner)))
        });
        let mut bytes = a_packet(family, protocol::UDP);
        let datagram = [&header[..], &bytes].concat();
        assert_eq!(decap::open(&datagram, 1), Ok(encap::HEADER_LEN));
        group.bench_function(format!("decap open {}", family.name()), |b| b.iter(|| black_box(decap::open(black_box(&datagram), 1))));
        let parsed = parse(&testing::packet(&mut bytes, Ingress::Pods)).expect("a good packet");
        group.bench_function(format!("entropy {}", family.name()), |b| b.iter(|| black_box(encap::entropy(black_box(&parsed)))));
    }
}
