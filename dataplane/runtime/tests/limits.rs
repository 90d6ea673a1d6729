//! Pods with a bandwidth limit, on real devices: order, completeness below the limit, exact accounting above it, and the rate.
//!
//! That something takes at least so long is certain on any machine; that it takes no longer is not, and is not asserted.
//!
//! Skipped, with the reason printed, where namespaces or TUN devices are not permitted, or there is no `ip` (iproute2).

mod nodes;

use std::net::{SocketAddr, UdpSocket};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nodes::*;
use podgate_core::shape::{GRAIN_NS, Limits, Rate};
use podgate_core::snapshot::Generation;
use podgate_core::verdict::DropReason;
use podgate_runtime::netns::Netns;
use podgate_runtime::runtime::Runtime;

const MBIT: u64 = 1_000_000;

fn rate(bits_per_second: u64) -> Option<Rate> {
    // One full packet.
    Some(Rate { bits_per_second: NonZeroU64::new(bits_per_second).unwrap(), burst_bits: 12_000 })
}

fn limits(ingress: Option<Rate>, egress: Option<Rate>) -> Option<Arc<Limits>> {
    Some(Arc::new(Limits::new(ingress, egress)))
}

/// How long a limiter with [`rate`] needs at least for the last of so many packets of `len` bytes to leave.
fn takes(packets: u64, len: usize, bits_per_second: u64) -> Duration {
    let bits = (packets - 1) * len as u64 * 8 - 12_000;
    Duration::from_nanos(bits * 1_000_000_000 / bits_per_second - GRAIN_NS)
}

/// A socket in one pod that is connected to one in another.
fn sockets(from: &Netns, to: &Netns, address: std::net::IpAddr) -> (UdpSocket, UdpSocket) {
    let server = to.run(|| UdpSocket::bind((address, 0)).unwrap()).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let client = from.run(|| UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap()).unwrap();
    client.connect(server.local_addr().unwrap()).unwrap();
    (client, server)
}

/// Numbered datagrams of 1,000 bytes.
fn send(client: &UdpSocket, numbers: std::ops::Range<u32>) {
    for number in numbers {
        let mut payload = pattern(1000);
        payload[..4].copy_from_slice(&number.to_be_bytes());
        client.send(&payload).unwrap();
    }
}

fn number(server: &UdpSocket) -> u32 {
    let mut buffer = [0; 2000];
    let (len, _) = receive(server, &mut buffer);
    assert_eq!(len, 1000);
    let number = u32::from_be_bytes(*buffer.first_chunk().unwrap());
    assert!(buffer[4..1000] == pattern(1000)[4..]);
    number
}

#[test]
fn what_a_limited_pod_sends_or_receives_is_in_order_complete_and_no_faster_than_allowed() {
    const ROUNDS: u32 = 5;
    const BURST: u32 = 40;
    let Some((mut one, mut two)) = two_nodes() else { return };
    // 8 Mbit/s: a byte each microsecond, so that 40 datagrams stay within the 100 ms that packets may wait.
    one.limits[0] = limits(None, rate(8 * MBIT));
    two.limits[1] = limits(rate(8 * MBIT), None);
    let first = one.start(Some(&two), |_, _| {}).unwrap();
    let second = two.start(Some(&one), |_, _| {}).unwrap();
    for v4 in [true, false] {
        let len = 1000 + if v4 { 28 } else { 48 };
        for (from, to, address, why) in [
            (&one.pods[0], &one.pods[1], one.pod(1, v4), "sent, on one node"),
            (&one.pods[0], &two.pods[0], two.pod(0, v4), "sent, to a peer"),
            (&one.pods[1], &two.pods[1], two.pod(1, v4), "received, from a peer"),
            (&two.pods[0], &two.pods[1], two.pod(1, v4), "received, on one node"),
        ] {
            let (client, server) = sockets(from, to, address);
            let started = Instant::now();
            for round in 0..ROUNDS {
                send(&client, round * BURST..(round + 1) * BURST);
                let numbers: Vec<u32> = (0..BURST).map(|_| number(&server)).collect();
                assert!(numbers.iter().copied().eq(round * BURST..(round + 1) * BURST), "{why}: {numbers:?}");
            }
            // Those of the last round may have come as one superframe, which leaves when its first is due.
            let (took, least) = (started.elapsed(), takes(((ROUNDS - 1) * BURST + 1).into(), len, 8 * MBIT));
            assert!(took >= least, "{why}: {took:?} of at least {least:?}");
        }
    }
    for runtime in [&first, &second] {
        assert_eq!(drops(runtime).iter().filter(|(name, _)| name.starts_with("bandwidth")).count(), 0, "{:?}", drops(runtime));
    }
}

/// By how many datagrams are dropped for being too many.
fn exceeded(runtime: &Runtime) -> u64 {
    sum(runtime, |counters| counters.drops(DropReason::BandwidthExceeded))
}

#[test]
fn above_the_limit_every_datagram_is_either_dropped_by_name_or_arrives_in_order() {
    const SENT: u32 = 400;
    let Some((mut one, two)) = two_nodes() else { return };
    one.limits[0] = limits(None, rate(8 * MBIT));
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    let (client, server) = sockets(&one.pods[0], &one.pods[1], one.pod(1, true));
    server.set_nonblocking(true).unwrap();
    let (mut numbers, mut buffer) = (Vec::new(), [0; 2000]);
    let started = Instant::now();
    send(&client, 0..SENT);
    // Read as they come: the socket's buffer holds fewer than the gateway's queue.
    wait("each has met its end", || {
        while server.recv(&mut buffer).is_ok() {
            numbers.push(u32::from_be_bytes(*buffer.first_chunk().unwrap()));
        }
        numbers.len() as u64 + exceeded(&runtime) == u64::from(SENT)
    });
    let took = started.elapsed();
    assert!(exceeded(&runtime) > 0, "the queue holds no {SENT} of them");
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    assert!(took >= takes(numbers.len() as u64, 1028, 8 * MBIT), "{took:?} for {}", numbers.len());
    runtime.stop();
}

#[test]
fn streams_and_superdatagrams_of_limited_pods_arrive_as_they_were_meant() {
    const LEN: usize = 2 * MIB;
    const RATE: u64 = 50 * MBIT;
    let Some((mut one, mut two)) = two_nodes() else { return };
    one.limits[0] = limits(None, rate(RATE));
    two.limits[1] = limits(rate(RATE), None);
    let first = one.start(Some(&two), |_, _| {}).unwrap();
    let second = two.start(Some(&one), |_, _| {}).unwrap();
    for v4 in [true, false] {
        for (from, to, address) in
            [(&one.pods[0], &one.pods[1], one.pod(1, v4)), (&one.pods[0], &two.pods[0], two.pod(0, v4)), (&one.pods[1], &two.pods[1], two.pod(1, v4))]
        {
            let started = Instant::now();
            stream(from, to, address, LEN);
            let (took, least) = (started.elapsed(), Duration::from_nanos((LEN as u64 - 80_000) * 8 * 1000 / (RATE / MBIT)));
            assert!(took >= least, "{took:?} of at least {least:?}");
            println!("{LEN} bytes at {RATE} bit/s in {took:?}, at least {least:?}; {:?} {:?}", drops(&first), drops(&second));
            for _ in 0..4 {
                superdatagram(from, to, address, 1300, 20, 7);
            }
            datagram(from, to, address, 9000);
        }
    }
    let tx = (sum(&first, |c| c.pods_tx.frames.value()), sum(&first, |c| c.pods_tx.packets.value()));
    assert!(tx.1 > tx.0, "superframes stay whole while they wait: {tx:?}");
    first.stop();
    second.stop();
}

#[test]
fn what_waits_for_a_peer_that_goes_is_dropped_by_name_and_a_worker_sleeps_meanwhile() {
    let Some((mut one, two)) = two_nodes() else { return };
    // A datagram of 1,028 bytes takes 411 ms, and three may wait for no longer than a second.
    one.limits[0] = limits(None, Some(Rate { bits_per_second: NonZeroU64::new(20_000).unwrap(), burst_bits: 1 }));
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    let workers = threads_in(&one.netns, "worker-");
    let far = SocketAddr::new(two.pod(0, true), 9);
    let client = one.pods[0].run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    client.connect(far).unwrap();
    let before = cpu_time(&workers);
    send(&client, 0..3);
    wait("the second has left", || sum(&runtime, |counters| counters.overlay_tx.packets.value()) == 2);
    let used = cpu_time(&workers) - before;
    assert!(used < Duration::from_millis(150), "{used:?} of CPU in 400 ms of waiting");
    runtime.publish(one.snapshot(2, None));
    wait("the third has met its end", || sum(&runtime, |counters| counters.drops(DropReason::NoRoutePeer)) == 1);
    assert_eq!(runtime.generations(), [Generation(2); 2]);
    assert_eq!(sum(&runtime, |counters| counters.overlay_tx.packets.value()), 2);
    runtime.stop();
}
