//! The whole pipeline in memory: packets per second of one core. `cargo bench -p podgate-bench --bench pipeline`

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use podgate_bench::cpu_time::{self, CpuTime, thread_cpu_time};
use podgate_bench::world::{Family, Traffic, World, from_peer, packet, to_peers, to_pods, to_services};
use podgate_core::addr::protocol;
use podgate_core::packet::{Checksum, Gso, Ingress, Offload};
use podgate_core::testing::flags::{ACK, SYN};
use podgate_core::verdict::Verdict;

const PLAIN: Offload = Offload { checksum: Checksum::Full, gso: Gso::None };

criterion_group!(name = benches; config = cpu_time::criterion(); targets = flow_hits, flows, workers, plain, opened, superframes);
criterion_main!(benches);

fn bench<const N: usize>(group: &mut BenchmarkGroup<'_, CpuTime>, name: &str, world: &mut World, traffic: &mut Traffic) {
    group.throughput(Throughput::Elements(N as u64));
    group.bench_function(format!("{name}/batch {N}"), |b| b.iter(|| black_box(world.run(&mut traffic.next_batch::<N>()).len())));
}

/// Packets of flows that are known: 10,000 of them, 64 bytes each, translated to a backend.
fn flow_hits(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("flow hit, 10 k flows, 64 B");
    for family in [Family::V4, Family::V6] {
        for (name, protocol) in [("udp", protocol::UDP), ("tcp", protocol::TCP)] {
            let (mut world, mut traffic) = known(family, protocol, 10_000);
            let name = format!("{name} {}", family.name());
            bench::<32>(&mut group, &name, &mut world, &mut traffic);
            bench::<64>(&mut group, &name, &mut world, &mut traffic);
        }
    }
}

/// The same by the number of flows: from one, whose record is in the first cache, to a million, most of them out of every cache.
fn flows(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("flow hit by flows, 64 B");
    for count in [1, 100, 1_000, 10_000, 100_000, 1_000_000] {
        let (mut world, mut traffic) = known(Family::V4, protocol::UDP, count);
        bench::<32>(&mut group, &format!("{count} flows"), &mut world, &mut traffic);
    }
}

/// The same by the number of workers, each with flows of its own in one table. Each thread's own CPU time for its packets, so that equal
/// figures mean that workers do not hinder one another.
fn workers(c: &mut Criterion<CpuTime>) {
    const FLOWS: u32 = 10_000;
    let mut group = c.benchmark_group("flow hit by workers, 64 B");
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u16);
    for count in 1..=cores {
        let mut first = World::new(FLOWS as usize * 5 / 4);
        let packets = |flags| to_services(Family::V4, protocol::TCP, FLOWS, 64, flags);
        first.send_all::<64>(&mut Traffic::new(packets(SYN), PLAIN, Ingress::Pods), |verdict| *verdict == Verdict::ToPods);
        let mut worlds: Vec<World> = (1..count).map(|worker| first.another(worker)).collect();
        worlds.push(first);
        let packets = packets(ACK);
        let traffics = packets.chunks_exact((FLOWS / u32::from(count)) as usize).map(|own| Traffic::new(own.to_vec(), PLAIN, Ingress::Pods));
        let mut all: Vec<(World, Traffic)> = worlds.into_iter().zip(traffics).collect();
        group.throughput(Throughput::Elements(32));
        group.bench_function(format!("{count} workers"), |b| {
            b.iter_custom(|iterations| {
                let spent: Duration = std::thread::scope(|scope| {
                    let threads: Vec<_> = all
                        .iter_mut()
                        .map(|(world, traffic)| {
                            scope.spawn(move || {
                                let start = thread_cpu_time();
                                for _ in 0..iterations {
                                    black_box(world.run(&mut traffic.next_batch::<32>()).len());
                                }
                                thread_cpu_time() - start
                            })
                        })
                        .collect();
                    threads.into_iter().map(|thread| thread.join().expect("a worker does not panic")).sum()
                });
                spent / u32::from(count)
            })
        });
    }
}

/// Packets that need no flow.
fn plain(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("plain, 64 B");
    for family in [Family::V4, Family::V6] {
        let mut world = World::new(10_000);
        let mut traffic = Traffic::new(to_pods(family, 10_000, 64), PLAIN, Ingress::Pods);
        world.send_all::<64>(&mut traffic, |verdict| *verdict == Verdict::ToPods);
        bench::<64>(&mut group, &format!("pod to pod {}", family.name()), &mut world, &mut traffic);

        let mut traffic = Traffic::new(to_peers(family, 10_000, 64), PLAIN, Ingress::Pods);
        world.send_all::<64>(&mut traffic, |verdict| matches!(verdict, Verdict::ToPeer(..)));
        bench::<64>(&mut group, &format!("pod to peer {}", family.name()), &mut world, &mut traffic);

        let packets = (0..10_000).map(|n| {
            let (src, dst) = (family.with_port(&family.pod_of_peer(0, n), 5000), family.with_port(&family.pod(n / 7), 80));
            packet(family, protocol::UDP, &src, &dst, 64, 0)
        });
        let mut traffic = Traffic::new(packets.collect(), PLAIN, from_peer());
        world.send_all::<64>(&mut traffic, |verdict| *verdict == Verdict::ToPods);
        bench::<64>(&mut group, &format!("peer to pod {}", family.name()), &mut world, &mut traffic);
    }
}

/// First packets: an endpoint is chosen and a flow created. The table is emptied between measurements.
fn opened(c: &mut Criterion<CpuTime>) {
    const FLOWS: usize = 65_536;
    let mut group = c.benchmark_group("service open, 64 B");
    group.throughput(Throughput::Elements(64));
    for (name, protocol) in [("udp v4", protocol::UDP), ("tcp syn v4", protocol::TCP)] {
        let mut world = World::new(FLOWS);
        let mut traffic = Traffic::new(to_services(Family::V4, protocol, FLOWS as u32 / 2, 64, SYN), PLAIN, Ingress::Pods);
        let batches = traffic.len() / 64;
        group.bench_function(format!("{name}/batch 64"), |b| {
            b.iter_custom(|iterations| {
                let (mut spent, mut left) = (Duration::ZERO, iterations as usize);
                while left > 0 {
                    world.flows.table().end_matching(|_| true);
                    let run = left.min(batches);
                    let start = thread_cpu_time();
                    for _ in 0..run {
                        black_box(world.run(&mut traffic.next_batch::<64>()).len());
                    }
                    spent += thread_cpu_time() - start;
                    left -= run;
                }
                spent
            });
        });
        assert_eq!(world.drops(), [], "new flows found their place");
    }
}

/// Frames that stand for 42 segments each: what counts is that they cost what a small packet does.
fn superframes(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("superframe, 62,000 B");
    let offload = Offload { checksum: Checksum::Partial, gso: Gso::Tcp { size: 1412, ecn: false } };
    for (name, len) in [("flow hit", 1_000), ("flow hit, one flow", 1)] {
        let mut world = World::new(10_000);
        let syn = to_services(Family::V4, protocol::TCP, len, 64, SYN);
        world.send_all::<64>(&mut Traffic::new(syn, PLAIN, Ingress::Pods), |verdict| *verdict == Verdict::ToPods);
        let mut traffic = Traffic::new(to_services(Family::V4, protocol::TCP, len, 62_000, ACK), offload, Ingress::Pods);
        world.send_all::<64>(&mut traffic, |verdict| *verdict == Verdict::ToPods);
        bench::<32>(&mut group, name, &mut world, &mut traffic);
    }
}

/// A world in which `count` flows are open, and a packet of each.
fn known(family: Family, protocol: u8, count: u32) -> (World, Traffic) {
    let mut world = World::new(count as usize * 5 / 4);
    let mut openers = Traffic::new(to_services(family, protocol, count, 64, SYN), PLAIN, Ingress::Pods);
    world.send_all::<64>(&mut openers, |verdict| *verdict == Verdict::ToPods);
    let mut traffic = Traffic::new(to_services(family, protocol, count, 64, ACK), PLAIN, Ingress::Pods);
    world.send_all::<64>(&mut traffic, |verdict| *verdict == Verdict::ToPods);
    assert_eq!(world.flows.table().len(), count as usize, "each packet has a flow of its own");
    (world, traffic)
}
