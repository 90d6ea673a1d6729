//! Packets of known flows through the pipeline in memory, a fixed number of them: to compare two builds, and for callgrind and perf, which
//! criterion's own loops would get in the way of.
//!
//! `cargo build --release -p podgate-bench --example hits`, then for time, the least and the median of 30 rounds, of nanoseconds and of cycles:
//!
//!     taskset -c 1 target/release/examples/hits udp-v4 10000 30
//!
//! the same with the flow table in a file, as the daemon has it, on ordinary pages or with its memory put on huge ones:
//!
//!     taskset -c 1 target/release/examples/hits udp-v4 1000000 30 /dev/shm/hits [huge]
//!
//! and for instructions per packet, the difference of two runs, so that the opening of the flows does not count:
//!
//!     for rounds in 1 3; do valgrind --tool=callgrind --toggle-collect='*Pipeline*run*' target/release/examples/hits udp-v4 1000 $rounds; done

use std::hint::black_box;
use std::path::Path;

use podgate_bench::cpu_time::thread_cpu_time;
use podgate_bench::world::{Family, Flows, Traffic, World, to_services};
use podgate_core::addr::protocol;
use podgate_core::packet::{Checksum, Gso, Ingress, Offload};
use podgate_core::testing::flags::{ACK, SYN};
use podgate_core::verdict::Verdict;
use podgate_runtime::flow_file::FlowFile;

/// Packets of one batch.
const BATCH: usize = 32;
/// Packets of one round.
const ROUND: usize = 2_000 * BATCH;
const PLAIN: Offload = Offload { checksum: Checksum::Full, gso: Gso::None };

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, flows, rounds, memory @ ..] = &arguments[..] else { panic!("hits udp-v4|udp-v6|tcp-v4|tcp-v6 FLOWS ROUNDS [FILE [huge]]") };
    let protocol = if kind.starts_with("tcp") { protocol::TCP } else { protocol::UDP };
    let family = if kind.ends_with("v6") { Family::V6 } else { Family::V4 };
    let (flows, rounds): (u32, usize) = (flows.parse().expect("a number of flows"), rounds.parse().expect("a number of rounds"));

    let capacity = flows as usize * 5 / 4;
    let mut world = match memory {
        [] => World::new(capacity),
        [path, huge @ ..] => World::with_flows(Flows::File(in_file(Path::new(path), capacity, !huge.is_empty()))),
    };
    let packets = |flags| Traffic::new(to_services(family, protocol, flows, 64, flags), PLAIN, Ingress::Pods);
    let mut traffic = packets(ACK);
    world.send_all::<64>(&mut packets(SYN), |verdict| *verdict == Verdict::ToPods);
    world.send_all::<64>(&mut traffic, |verdict| *verdict == Verdict::ToPods);

    let mut ns_per_packet: Vec<f64> = (0..rounds)
        .map(|_| {
            per_step(ROUND, || {
                for _ in 0..ROUND / BATCH {
                    black_box(world.run(&mut traffic.next_batch::<BATCH>()).len());
                }
            })
        })
        .collect();
    ns_per_packet.sort_by(f64::total_cmp);
    let fixture = per_step(ROUND, || {
        for _ in 0..ROUND / BATCH {
            black_box(traffic.next_batch::<BATCH>());
        }
    });
    let (least, median, ns_per_cycle) = (ns_per_packet[0], ns_per_packet[rounds / 2], ns_per_cycle());
    println!(
        "{kind}, {flows} flows: {least:.1} ns at least, {median:.1} at the median ({fixture:.1} to copy the packet in), {:.0} cycles of {:.2} GHz, {:.1} M packets/s",
        least / ns_per_cycle,
        1.0 / ns_per_cycle,
        1e3 / least
    );
}

/// A table in a new file, which has no name any more.
fn in_file(path: &Path, capacity: usize, huge: bool) -> FlowFile {
    let (file, _) = FlowFile::open(path, capacity).expect("a flow table's file");
    std::fs::remove_file(path).expect("the file that was just made");
    if huge {
        let started = std::time::Instant::now();
        (0..file.huge_pages().room).for_each(|n| file.collapse(n).expect("a huge page"));
        println!("{} huge pages in {:?}", file.huge_pages().used, started.elapsed());
    }
    file
}

/// Nanoseconds of this thread's CPU time for each of `steps` steps of `work`.
fn per_step(steps: usize, work: impl FnOnce()) -> f64 {
    let start = thread_cpu_time();
    work();
    (thread_cpu_time() - start).as_secs_f64() * 1e9 / steps as f64
}

/// By a chain of multiplications (three cycles) and exclusive ors (one), each of which needs the one before.
fn ns_per_cycle() -> f64 {
    const LINKS: usize = 1 << 20;
    let chain = || {
        let factor = black_box(0x9e37_79b9_7f4a_7c15_u64);
        black_box((0..LINKS).fold(black_box(3_u64), |x, _| x.wrapping_mul(factor) ^ 1));
    };
    (0..20).map(|_| per_step(4 * LINKS, chain)).fold(f64::MAX, f64::min)
}
