//! Superframes cut and put together. Bytes are of payload, which is summed (its segments need checksums) but never copied.
//! `cargo bench -p podgate-bench --bench offload`

use std::hint::black_box;
use std::ops::Range;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use podgate_bench::cpu_time::{self, CpuTime};
use podgate_bench::world::{Family, packet};
use podgate_core::addr::protocol;
use podgate_core::encap;
use podgate_core::offload::{MergePlan, Merging, SplitPlan, merge, split};
use podgate_core::packet::{Checksum, Gso, Ingress, Offload, Packet};
use podgate_core::parse::parse;
use podgate_core::testing::{self, flags};

const SIZE: u16 = 1_400;

criterion_group!(name = benches; config = cpu_time::criterion(); targets = splitting, merging);
criterion_main!(benches);

/// A superframe as a pod leaves it to the device: `payload` bytes of TCP or UDP.
fn superframe(family: Family, protocol: u8, payload: usize) -> (Vec<u8>, Offload) {
    let (src, dst) = (family.with_port(&family.pod(1), 5000), family.with_port(&family.pod_of_peer(0, 2), 80));
    let headers = if family == Family::V4 { 20 } else { 40 } + if protocol == protocol::TCP { 20 } else { 8 };
    let bytes = testing::partial(&packet(family, protocol, &src, &dst, headers + payload, flags::ACK));
    let gso = if protocol == protocol::TCP { Gso::Tcp { size: SIZE, ecn: false } } else { Gso::Udp { size: SIZE } };
    (bytes, Offload { checksum: Checksum::Partial, gso })
}

fn splitting(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("split, 62,000 B");
    for family in [Family::V4, Family::V6] {
        for (name, protocol) in [("tcp", protocol::TCP), ("udp", protocol::UDP)] {
            let (mut bytes, offload) = superframe(family, protocol, 62_000 - 60);
            group.throughput(Throughput::Bytes(bytes.len() as u64));
            let packet = Packet { head: &mut bytes, tail_len: 0, offload, ingress: Ingress::Pods };
            let parsed = parse(&packet).expect("a good packet");
            let mut plan = SplitPlan::new(64, 64 * 100);
            group.bench_function(format!("{name} {}", family.name()), |b| {
                b.iter(|| {
                    plan.clear();
                    black_box(split(&packet, &parsed, encap::HEADER_LEN, &mut plan)).expect("room for all segments")
                })
            });
        }
    }
}

/// Forty segments as one receive with `UDP_GRO` brings them, each behind its encapsulation header.
fn merging(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("merge, 40 segments");
    for family in [Family::V4, Family::V6] {
        for (name, protocol) in [("tcp", protocol::TCP), ("udp", protocol::UDP)] {
            let (buffer, ranges) = received(family, protocol, 40);
            let mut plan = MergePlan::new(64, Merging::On, Merging::On);
            group.throughput(Throughput::Bytes(40 * u64::from(SIZE)));
            // `merge` edits the first segment's headers, so each measurement begins with fresh bytes; making them is not measured.
            group.bench_function(format!("{name} {}", family.name()), |b| {
                b.iter_batched_ref(|| buffer.clone(), |buffer| black_box(merge(buffer, &ranges, Checksum::Full, &mut plan)), BatchSize::SmallInput)
            });
            assert_eq!(plan.frames().len(), 1, "all segments in one frame");
        }
    }
}

fn received(family: Family, protocol: u8, segments: usize) -> (Vec<u8>, Vec<Range<usize>>) {
    let (mut bytes, offload) = superframe(family, protocol, segments * usize::from(SIZE));
    let packet = Packet { head: &mut bytes, tail_len: 0, offload, ingress: Ingress::Pods };
    let parsed = parse(&packet).expect("a good packet");
    let mut plan = SplitPlan::new(segments, segments * 100);
    let made = split(&packet, &parsed, encap::HEADER_LEN, &mut plan).expect("room for all segments");
    let (mut buffer, mut ranges) = (Vec::new(), Vec::new());
    for segment in &plan.segments()[made] {
        let start = buffer.len() + encap::HEADER_LEN;
        buffer.extend_from_slice(&plan.scratch()[segment.header.clone()]);
        buffer.extend_from_slice(&packet.head[segment.payload.clone()]);
        ranges.push(start..buffer.len());
    }
    (buffer, ranges)
}
