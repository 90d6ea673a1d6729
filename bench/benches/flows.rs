//! The flow table by itself. `cargo bench -p podgate-bench --bench flows`

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use podgate_bench::cpu_time::{self, CpuTime, thread_cpu_time};
use podgate_core::addr::{Addr, Tuple, protocol};
use podgate_core::balance::LoadSlot;
use podgate_core::flow::{Cursor, Kind, NewFlow, Now, Opener, OwnedFlows};
use podgate_core::verdict::WorkerId;
use podgate_runtime::flow_file::Prefetch;

const BATCH: usize = 64;
const KEY: [u64; 2] = [1, 2];

criterion_group!(name = benches; config = cpu_time::criterion(); targets = lookups, insertions);
criterion_main!(benches);

fn new_flow(n: u32) -> NewFlow {
    let client = Addr::from_v4([10, 32, (n >> 22) as u8, 7]);
    let original =
        Tuple { src: client, dst: Addr::from_v4([10, 96, (n >> 14 & 0xff) as u8, 1]), src_port: n as u16, dst_port: 80, protocol: protocol::UDP };
    let backend = Addr::from_v4([10, 33, (n >> 16) as u8, 9]);
    let reply = Tuple { src: backend, dst: client, src_port: 8080, dst_port: n as u16, protocol: protocol::UDP };
    NewFlow { original, reply, kind: Kind::Service, opener: Opener::Pod, service: 1, load: LoadSlot::NONE }
}

/// Every tuple of both directions, in an order that no cache foresees.
fn filled(count: u32) -> (OwnedFlows, Vec<Tuple>) {
    let flows = OwnedFlows::new(count as usize * 5 / 4, KEY);
    let mut cursor = Cursor::default();
    let mut tuples = Vec::new();
    for n in 0..count {
        // An odd multiplier visits every number below a power of two once.
        let new = new_flow(n.wrapping_mul(0x9e37_79b1) & 0x3f_ffff);
        flows.table().insert(&new, WorkerId(0), Now(1), &mut cursor).expect("room for a flow");
        tuples.extend([new.original, new.reply]);
    }
    let mut state = 1u64;
    for at in (1..tuples.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        tuples.swap(at, (state >> 33) as usize % (at + 1));
    }
    (flows, tuples)
}

fn lookups(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("flow lookup");
    for (name, count) in [("10 k", 10_000), ("1 M", 1_000_000)] {
        let (flows, tuples) = filled(count);
        let table = flows.table();
        group.throughput(Throughput::Elements(BATCH as u64));
        let mut batches = tuples.chunks_exact(BATCH).cycle();
        group.bench_function(format!("{name} flows, one by one"), |b| {
            b.iter(|| {
                for tuple in batches.next().expect("a cycle has no end") {
                    black_box(table.lookup(tuple).expect("a known flow"));
                }
            })
        });
        group.bench_function(format!("{name} flows, fetched by batch"), |b| {
            b.iter(|| {
                let tuples = batches.next().expect("a cycle has no end");
                let hashes: [_; BATCH] = std::array::from_fn(|n| table.hash(&tuples[n]));
                hashes.iter().for_each(|hash| table.warm::<Prefetch>(*hash));
                let likely = hashes.map(|hash| table.likely(hash));
                tuples.iter().zip(likely).for_each(|(tuple, likely)| table.warm_record::<Prefetch>(tuple, likely));
                for (tuple, likely) in tuples.iter().zip(likely) {
                    black_box(table.hit(tuple, likely).expect("a known flow").to());
                }
            })
        });
        let strangers: Vec<Tuple> = tuples.iter().map(|tuple| Tuple { dst_port: 443, src_port: 1, ..*tuple }).collect();
        let mut batches = strangers.chunks_exact(BATCH).cycle();
        group.bench_function(format!("{name} flows, unknown"), |b| {
            b.iter(|| {
                for tuple in batches.next().expect("a cycle has no end") {
                    assert!(black_box(table.lookup(tuple)).is_none());
                }
            })
        });
    }
}

fn insertions(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("flow insert");
    for (name, count) in [("10 k", 10_000), ("1 M", 1_000_000)] {
        let flows = OwnedFlows::new(count * 5 / 4, KEY);
        let new: Vec<NewFlow> = (0..count as u32).map(|n| new_flow(n.wrapping_mul(0x9e37_79b1) & 0x3f_ffff)).collect();
        let mut cursor = Cursor::default();
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("into room for {name}"), |b| {
            b.iter_custom(|iterations| {
                let (mut spent, mut left) = (Duration::ZERO, iterations as usize);
                while left > 0 {
                    flows.table().end_matching(|_| true);
                    let run = left.min(new.len());
                    let start = thread_cpu_time();
                    for new in &new[..run] {
                        black_box(flows.table().insert(new, WorkerId(0), Now(1), &mut cursor).expect("room for a flow"));
                    }
                    spent += thread_cpu_time() - start;
                    left -= run;
                }
                spent
            })
        });
    }
}
