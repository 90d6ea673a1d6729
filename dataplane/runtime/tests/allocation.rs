//! After its start a worker does not allocate: counted by the allocator itself, while real packets go through.
//!
//! A binary of its own, since an allocator is the process's. Skipped, with the reason printed, where TUN devices are not permitted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::net::UdpSocket;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use podgate_core::fib::{Pod, PodTable, PrefixMap};
use podgate_core::service::ServiceTable;
use podgate_core::shape::{Limits, Rate};
use podgate_core::snapshot::{Generation, Masquerade, NodeTables, OutsideToPods, Peer, Snapshot};
use podgate_core::verdict::{DropReason, TunId};
use podgate_runtime::flow_file::FlowFile;
use podgate_runtime::netns::Netns;
use podgate_runtime::runtime::{Options, PodTun, Reserve, Runtime};
use podgate_runtime::tun::Tun;
use podgate_runtime::udp::Overlay;

/// Counts what threads named `worker-…` ask for once it is armed.
struct Counting;

static ARMED: AtomicBool = AtomicBool::new(false);
static ASKED: AtomicU64 = AtomicU64::new(0);

fn note() {
    if ARMED.load(Ordering::Relaxed) {
        let mut name = [0u8; 16];
        // SAFETY: PR_GET_NAME writes at most 16 bytes, its terminator included.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        if name.starts_with(b"worker-") {
            ASKED.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: everything is passed on to the system's allocator as it came; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        note();
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().expect("ip runs");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn snapshot(generation: u64, limits: Option<&Arc<Limits>>) -> Arc<Snapshot> {
    let addr = |text: &str| text.parse::<std::net::IpAddr>().unwrap().into();
    let peer_prefix: ipnetwork::IpNetwork = "10.244.2.0/24".parse().unwrap();
    Arc::new(Snapshot {
        generation: Generation(generation),
        node: Arc::new(NodeTables {
            addresses: vec![addr("127.0.0.1")],
            gateway_v4: Some(addr("10.244.1.1")),
            gateway_v6: None,
            node_pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()],
            cluster_pod_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
            service_cidrs: Vec::new(),
            node_ports: 30000..=32767,
            node_port_addresses: Vec::new(),
            masquerade: Some(Masquerade { ports: vec![61000..=61999], source_v4: Some(addr("127.0.0.1")), source_v6: None }),
            snat_ports: 1024..=65535,
            overlay_port: 4790,
            overlay_vni: 1,
            direct_return: None,
            outside_mtu: 1500,
            outside_to_pods: OutsideToPods::Allow,
            timeouts: Default::default(),
            probe_token: 1,
            workers: 1,
        }),
        services: ServiceTable::default(),
        pods: PodTable::new([
            (addr("10.244.1.2"), Pod { limits: limits.cloned(), ..Pod::new(1400) }),
            (addr("10.244.1.3"), Pod { tun: Some(TunId::new(1)), ..Pod::new(1400) }),
        ]),
        routes: Arc::new(PrefixMap::new([(peer_prefix, 0)])),
        // The peer is this node itself, so what is sent to it comes back over the overlay and is dropped there by name.
        peers: Arc::new([Peer {
            name: "itself".into(),
            underlay: "127.0.0.1".parse().unwrap(),
            port: 4790,
            mtu: 1400,
            prefixes: Arc::new(PrefixMap::new([(peer_prefix, ())])),
            direct_return: false,
        }]),
        peer_by_underlay: Arc::new([(addr("127.0.0.1"), 0)]),
    })
}

#[test]
fn a_worker_that_has_started_does_not_allocate() {
    let (Ok(node), Ok(gateway)) = (Netns::anonymous(), Netns::anonymous()) else { return eprintln!("skipped: namespaces are not permitted") };
    if Command::new("ip").arg("-V").output().is_err() {
        return eprintln!("skipped: there is no ip (iproute2)");
    }
    let (mut pods, mut host) = match (Tun::open("pods", 1, &gateway), Tun::open("podgate", 1, &node)) {
        (Ok(pods), Ok(host)) => (pods, host),
        (Err(error), _) | (_, Err(error)) => return eprintln!("skipped: {error}"),
    };
    for tun in [&mut pods, &mut host] {
        tun.set_mtu(65_535).unwrap();
        tun.bring_up().unwrap();
    }
    // The pod is the gateway's namespace itself, behind the TUN: enough to make frames of every size.
    gateway.run(|| ["address add 10.244.1.2/32 dev pods", "route add default dev pods"].map(ip)).unwrap();
    node.run(|| ip("link set lo up")).unwrap();
    // Another has a TUN of its own.
    let own = Netns::anonymous().unwrap();
    let own_tun = PodTun::make("eth0", 1, &own).unwrap();
    own.run(|| ["link set eth0 up", "address add 10.244.1.3/32 dev eth0", "route add default dev eth0"].map(ip)).unwrap();
    let path = std::env::temp_dir().join(format!("podgate-allocation-{}.flows", std::process::id()));
    let (flows, _) = FlowFile::open(&path, 1024).unwrap();
    let overlay = node.run(|| Overlay::open(&["127.0.0.1".parse().unwrap()], 4790, 1, Vec::new())).unwrap().unwrap();
    let options = Options {
        workers: vec![None],
        pods,
        pod_tuns: vec![(TunId::new(1), own_tun)],
        pods_netns: gateway.try_clone().unwrap(),
        host,
        overlay,
        flows,
        snapshot: snapshot(1, None),
        spin: std::time::Duration::ZERO,
        status_page: Arc::new(|| String::from("page")),
        reserve: Reserve::default(),
    };
    let runtime = node.run(|| Runtime::start(options)).unwrap().unwrap();
    let socket = gateway.run(|| UdpSocket::bind("10.244.1.2:0").unwrap()).unwrap();
    let _ = (socket.as_fd(), socket.as_raw_fd());
    let seen = || runtime.counters()[0].pods_rx.frames.value();
    let wait = |frames: u64| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while seen() < frames {
            assert!(Instant::now() < deadline, "{} of {frames} frames", seen());
            std::thread::yield_now();
        }
    };
    let exceeded = || runtime.counters()[0].drops(DropReason::BandwidthExceeded);
    let until = |what: &str, done: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < deadline, "waited in vain: {what}");
            std::thread::yield_now();
        }
    };
    // To a peer, to nobody's address, to the gateway's own stack and outside; never more at once than the device's queue holds.
    let send = |rounds: u64| {
        let before = seen();
        for round in 0..rounds {
            for to in ["10.244.2.9:7", "10.244.1.9:7", "10.244.1.1:7", "192.0.2.9:7"] {
                socket.send_to(&vec![7; 10 + (round as usize * 37) % 1300], to).unwrap();
            }
            // A flow of its own that begins in fragments: the worker binds its masquerade port itself.
            socket.send_to(&[7; 3000], ("192.0.2.10", 1000 + round as u16)).unwrap();
            if round % 16 == 15 || round + 1 == rounds {
                wait(before + 5 * (round + 1));
            }
        }
    };
    send(32);
    ARMED.store(true, Ordering::Relaxed);
    send(400);
    for generation in 2..200 {
        runtime.publish(snapshot(generation, None));
        send(1);
    }
    // Pods with TUNs of their own send, come and go.
    let owner = own.run(|| UdpSocket::bind("10.244.1.3:0").unwrap()).unwrap();
    for round in 0..50 {
        let before = seen();
        for to in ["10.244.2.9:7", "10.244.1.2:7", "10.244.1.1:7", "192.0.2.9:7"] {
            owner.send_to(&[7; 900], to).unwrap();
        }
        wait(before + 4);
        socket.send_to(&[7; 900], "10.244.1.3:7").unwrap();
        wait(before + 5);
        runtime.plug(TunId::new(2 + round), PodTun::make("more", 1, &own).unwrap()).unwrap();
        runtime.publish_again();
        runtime.unplug(TunId::new(2 + round));
        runtime.publish_again();
        PodTun::remove("more", &own).unwrap();
    }
    // The same with packets that wait, and some that may not: what leaves is 5 Mbit/s.
    let rate = Rate { bits_per_second: NonZeroU64::new(5_000_000).expect("not zero"), burst_bits: 0 };
    let limits = Arc::new(Limits::new(Some(rate), Some(rate)));
    let sent = || runtime.counters()[0].host_tx.frames.value();
    for generation in 200..300 {
        runtime.publish(snapshot(generation, Some(&limits)));
        let before = sent();
        send(1);
        until("something has left", &|| sent() > before || exceeded() > 0);
    }
    until("some is too much", &|| {
        send(1);
        exceeded() > 0
    });
    let before = sent();
    until("and what waited leaves", &|| sent() > before);
    let latency = runtime.latency();
    ARMED.store(false, Ordering::Relaxed);
    assert!(!latency.packet_ns.is_empty());
    let (sockets, without) = runtime.masquerade_sockets();
    assert!(sockets > 200, "{sockets} sockets, {without} flows without");
    assert!(runtime.counters()[0].overlay_tx.frames.value() > 0 && runtime.counters()[0].overlay_rx.frames.value() > 0);
    assert_eq!(ASKED.load(Ordering::Relaxed), 0, "calls of the allocator by workers");
    runtime.stop();
    let _ = std::fs::remove_file(path);
}
