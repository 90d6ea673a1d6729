//! The whole dataplane on real devices: two nodes with their gateways, pods in namespaces of their own, real sockets at the ends.
//!
//! Skipped, with the reason printed, where namespaces or TUN devices are not permitted, or there is no `ip` (iproute2).

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use podgate_core::addr::protocol;
use podgate_core::counters::Counters;
use podgate_core::fib::{Pod, PodTable, PrefixMap};
use podgate_core::service::{Backend, Face, Frontend, FrontendKey, Place, ServicePort, ServiceTable, TrafficPolicy};
use podgate_core::snapshot::{Generation, Masquerade, NodeTables, OutsideToPods, Peer, Snapshot};
use podgate_core::verdict::{DropReason, WorkerId};
use podgate_runtime::flow_file::FlowFile;
use podgate_runtime::netns::Netns;
use podgate_runtime::runtime::{Options, Runtime, StartError};
use podgate_runtime::tun::{Feature, Tun};

const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
/// Room for the overlay's headers within 1,500 bytes of underlay.
const POD_MTU: u32 = 1420;

/// Runs `ip` with these arguments, here.
fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().expect("ip runs");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn sysctl(path: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/{path}"), value).unwrap_or_else(|error| panic!("{path}: {error}"));
}

/// The family of the nodes' own network.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wire {
    V4,
    V6,
}

/// One node: its own namespace, its gateway's, and two pods'.
struct Node {
    number: u8,
    wire: Wire,
    workers: u16,
    netns: Netns,
    gateway: Netns,
    pods: [Netns; 2],
    flows: PathBuf,
}

impl Node {
    fn new(number: u8, wire: Wire) -> Result<Node, Box<dyn std::error::Error>> {
        let flows = std::env::temp_dir().join(format!("podgate-test-{}-{:?}-{number}.flows", std::process::id(), thread::current().id()));
        let pods = [Netns::anonymous()?, Netns::anonymous()?];
        Ok(Node { number, wire, workers: 2, netns: Netns::anonymous()?, gateway: Netns::anonymous()?, pods, flows })
    }

    fn underlay(&self) -> IpAddr {
        match self.wire {
            Wire::V4 => [192, 0, 2, self.number].into(),
            Wire::V6 => [0x2001, 0xdb8, 0, 0, 0, 0, 0, self.number.into()].into(),
        }
    }

    fn pod(&self, index: usize, v4: bool) -> IpAddr {
        let host = 2 + index as u16;
        if v4 { [10, 244, self.number, host as u8].into() } else { [0xfd00, 0x244, self.number.into(), 0, 0, 0, 0, host].into() }
    }

    fn gateway_address(&self, v4: bool) -> IpAddr {
        if v4 { [10, 244, self.number, 1].into() } else { [0xfd00, 0x244, self.number.into(), 0, 0, 0, 0, 1].into() }
    }

    fn cidrs(&self) -> [ipnetwork::IpNetwork; 2] {
        [format!("10.244.{}.0/24", self.number).parse().unwrap(), format!("fd00:244:{}::/48", self.number).parse().unwrap()]
    }

    /// The pods' interfaces, and the gateway's rules that lead their packets into the TUN: the devices are up already.
    fn wire_pods(&self) {
        self.gateway
            .run(|| {
                ip("link set lo up");
                sysctl("ipv4/ip_forward", "1");
                sysctl("ipv6/conf/all/forwarding", "1");
                sysctl("ipv4/conf/all/rp_filter", "0");
                sysctl("ipv4/conf/pods/rp_filter", "0");
                ip("address add 169.254.1.1/32 dev lo");
                for family in ["-4", "-6"] {
                    ip(&format!("{family} rule add pref 5 iif pods lookup main"));
                    ip(&format!("{family} route add default dev pods table 234"));
                }
            })
            .unwrap();
        for (index, pod) in self.pods.iter().enumerate() {
            let (v4, v6) = (self.pod(index, true), self.pod(index, false));
            // The peer is named by a descriptor of this process, which `ip` inherits no more: so it is made here and moved.
            let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(pod)));
            self.gateway
                .run(|| {
                    ip(&format!("link add veth{index} mtu {POD_MTU} type veth peer name eth0 mtu {POD_MTU}"));
                    ip(&format!("link set eth0 netns {path}"));
                    ip(&format!("link set veth{index} up"));
                    sysctl(&format!("ipv4/conf/veth{index}/rp_filter"), "0");
                    ip(&format!("-6 address add fe80::1/64 dev veth{index} nodad"));
                    for (family, address) in [("-4", v4), ("-6", v6)] {
                        ip(&format!("{family} route add {address} dev veth{index}"));
                        ip(&format!("{family} rule add pref 20 iif veth{index} from {address} lookup 234"));
                    }
                })
                .unwrap();
            pod.run(|| {
                ip("link set lo up");
                ip("link set eth0 up gso_max_size 62000");
                ip(&format!("address add {v4}/32 dev eth0"));
                ip(&format!("address add {v6}/128 dev eth0 nodad"));
                ip("route add 169.254.1.1 dev eth0 scope link");
                ip("route add default via 169.254.1.1");
                ip("-6 route add default via fe80::1 dev eth0");
            })
            .unwrap();
        }
    }

    fn snapshot(&self, generation: u64, peer: Option<&Node>) -> Arc<Snapshot> {
        let cluster = vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/32".parse().unwrap()];
        let pods = (0..2).flat_map(|index| [true, false].map(|v4| (self.pod(index, v4).into(), Pod::new(POD_MTU))));
        Arc::new(Snapshot {
            generation: Generation(generation),
            node: Arc::new(NodeTables {
                addresses: vec![self.underlay().into()],
                gateway_v4: Some(self.gateway_address(true).into()),
                gateway_v6: Some(self.gateway_address(false).into()),
                node_pod_cidrs: self.cidrs().to_vec(),
                cluster_pod_cidrs: cluster,
                service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
                node_ports: 30000..=32767,
                node_port_addresses: Vec::new(),
                masquerade: None,
                snat_ports: 1024..=65535,
                overlay_port: 4790,
                overlay_vni: 7,
                outside_mtu: 1500,
                outside_to_pods: OutsideToPods::Allow,
                timeouts: Default::default(),
                probe_token: 0x1234_5678_9abc_def0,
                workers: self.workers,
            }),
            services: ServiceTable::default(),
            pods: PodTable::new(pods),
            routes: Arc::new(PrefixMap::new(peer.iter().flat_map(|peer| peer.cidrs()).map(|cidr| (cidr, 0)))),
            peers: peer
                .iter()
                .map(|peer| Peer {
                    name: format!("node-{}", peer.number).into(),
                    underlay: peer.underlay(),
                    port: 4790,
                    mtu: POD_MTU,
                    prefixes: Arc::new(PrefixMap::new(peer.cidrs().map(|cidr| (cidr, ())))),
                })
                .collect(),
            peer_by_underlay: peer.iter().map(|peer| (peer.underlay().into(), 0)).collect(),
        })
    }

    /// Opens the devices, wires the pods and starts the workers.
    fn start(&self, peer: Option<&Node>, change: impl FnOnce(&mut Tun, &mut Tun)) -> Result<Runtime, StartError> {
        let mut pods = Tun::open("pods", self.workers, &self.gateway).unwrap();
        let mut host = Tun::open("podgate", self.workers, &self.netns).unwrap();
        for tun in [&mut pods, &mut host] {
            tun.set_mtu(65_535).unwrap();
            tun.bring_up().unwrap();
        }
        change(&mut pods, &mut host);
        self.wire_pods();
        let (flows, _) = FlowFile::open(&self.flows, 4096).unwrap();
        let options = Options {
            // The last one is pinned, to a CPU that every machine has.
            workers: (1..self.workers).map(|_| None).chain([Some(0)]).collect(),
            pods,
            pods_netns: self.gateway.try_clone().unwrap(),
            host,
            underlay: vec![self.underlay()],
            overlay_port: 4790,
            flows,
            snapshot: self.snapshot(1, peer),
            status_page: Arc::new(|| "the gateway is well\n".to_owned()),
        };
        self.netns.run(|| Runtime::start(options)).unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.flows);
    }
}

/// Two nodes on one underlay, unless that is not permitted here.
fn two_nodes() -> Option<(Node, Node)> {
    two_nodes_over(Wire::V4)
}

fn two_nodes_over(wire: Wire) -> Option<(Node, Node)> {
    let nodes = || -> Result<(Node, Node), Box<dyn std::error::Error>> {
        Command::new("ip").arg("-V").output()?;
        let nodes = (Node::new(1, wire)?, Node::new(2, wire)?);
        Tun::open("probe", 1, &nodes.0.netns)?;
        Tun::remove("probe", &nodes.0.netns)?;
        Ok(nodes)
    };
    let (one, two) = nodes().inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&two.netns)));
    one.netns.run(|| ip(&format!("link add wire type veth peer name wire netns {path}"))).unwrap();
    for node in [&one, &two] {
        node.netns
            .run(|| {
                ip("link set lo up");
                match wire {
                    Wire::V4 => ip(&format!("address add {}/24 dev wire", node.underlay())),
                    Wire::V6 => ip(&format!("address add {}/64 dev wire nodad", node.underlay())),
                }
                ip("link set wire up");
            })
            .unwrap();
    }
    Some((one, two))
}

/// Bytes without a short period.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// Sends `len` bytes over TCP from one pod to another and compares what arrives.
fn stream(from: &Netns, to: &Netns, address: IpAddr, len: usize) {
    let listener = to.run(|| TcpListener::bind((address, 0)).unwrap()).unwrap();
    let target = listener.local_addr().unwrap();
    let sent = pattern(len);
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let (mut connection, _) = listener.accept().unwrap();
            connection.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut received = Vec::with_capacity(len);
            connection.read_to_end(&mut received).unwrap();
            received
        });
        let mut connection = from.run(|| TcpStream::connect_timeout(&target, PATIENCE).unwrap()).unwrap();
        connection.set_write_timeout(Some(PATIENCE)).unwrap();
        connection.write_all(&sent).unwrap();
        drop(connection);
        assert!(receiver.join().unwrap() == sent, "{len} bytes to {target}, byte for byte");
    });
}

/// The next datagram. A wait with a timeout is not taken up again after a signal (signal(7)).
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> (usize, SocketAddr) {
    loop {
        match socket.recv_from(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            received => return received.unwrap(),
        }
    }
}

/// A datagram there and back over connected sockets.
fn datagram(from: &Netns, to: &Netns, address: IpAddr, len: usize) {
    let server = to.run(|| UdpSocket::bind((address, 0)).unwrap()).unwrap();
    let target = server.local_addr().unwrap();
    let client = from
        .run(|| {
            let client = UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
            client.connect(target).unwrap();
            client
        })
        .unwrap();
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    let (sent, mut buffer) = (pattern(len), vec![0; 65_536]);
    client.send(&sent).unwrap();
    let (len, source) = receive(&server, &mut buffer);
    assert!(buffer[..len] == sent);
    server.send_to(&buffer[..len], source).unwrap();
    let (len, _) = receive(&client, &mut buffer);
    assert!(buffer[..len] == sent);
}

/// Datagrams of `size` bytes and a shorter one behind them, sent as one superframe, arrive as they were meant.
fn superdatagram(from: &Netns, to: &Netns, address: IpAddr, size: u16, count: usize, last: usize) {
    let server = to.run(|| UdpSocket::bind((address, 0)).unwrap()).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let client = from.run(|| UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap()).unwrap();
    let segment = libc::c_int::from(size);
    let len = size_of_val(&segment) as libc::socklen_t;
    // SAFETY: the kernel reads an int of that length from a live value; the descriptor is the socket's.
    let set = unsafe { libc::setsockopt(client.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, (&raw const segment).cast(), len) };
    assert_eq!(set, 0);
    let sent = pattern(usize::from(size) * count + last);
    client.send_to(&sent, server.local_addr().unwrap()).unwrap();
    let mut buffer = vec![0; 65_536];
    for expected in sent.chunks(size.into()) {
        let (len, _) = receive(&server, &mut buffer);
        assert!(buffer[..len] == *expected, "{len} bytes for {}", expected.len());
    }
}

fn sum(runtime: &Runtime, value: impl Fn(&Counters) -> u64) -> u64 {
    runtime.counters().iter().map(|counters| value(counters)).sum()
}

fn drops(runtime: &Runtime) -> Vec<(&'static str, u64)> {
    DropReason::ALL.iter().map(|reason| (reason.name(), sum(runtime, |counters| counters.drops(*reason)))).filter(|(_, count)| *count > 0).collect()
}

/// Waits until `done` says so.
fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::yield_now();
    }
}

#[test]
fn pods_talk_on_one_node_and_between_two_in_superframes_by_one_worker() {
    pods_talk(1);
}

#[test]
fn pods_talk_on_one_node_and_between_two_in_superframes_by_three_workers() {
    pods_talk(3);
}

fn pods_talk(workers: u16) {
    let Some((mut one, mut two)) = two_nodes() else { return };
    (one.workers, two.workers) = (workers, workers);
    let first = one.start(Some(&two), |_, _| {}).unwrap();
    let second = two.start(Some(&one), |_, _| {}).unwrap();
    for v4 in [true, false] {
        datagram(&one.pods[0], &one.pods[1], one.pod(1, v4), 1000);
        datagram(&one.pods[0], &two.pods[1], two.pod(1, v4), 1000);
        // In fragments, which the kernel at either end cuts and joins.
        datagram(&one.pods[0], &one.pods[1], one.pod(1, v4), 9000);
        datagram(&one.pods[0], &two.pods[1], two.pod(1, v4), 9000);
        stream(&one.pods[0], &one.pods[1], one.pod(1, v4), 16 * MIB);
        stream(&one.pods[0], &two.pods[1], two.pod(1, v4), 16 * MIB);
        stream(&two.pods[0], &one.pods[1], one.pod(1, v4), 16 * MIB);
    }
    for (runtime, name) in [(&first, "first"), (&second, "second")] {
        let (frames, bytes) = (sum(runtime, |c| c.overlay_rx.frames.value()), sum(runtime, |c| c.overlay_rx.bytes.value()));
        let tx = (sum(runtime, |c| c.pods_tx.frames.value()), sum(runtime, |c| c.pods_tx.packets.value()), sum(runtime, |c| c.pods_tx.bytes.value()));
        let latency = runtime.latency();
        println!(
            "{name}: overlay {} B/frame, pods tx {:?} {} B/frame, {:?}, {:?}, p50 {} ns, pipeline p50 {} ns, batch p99 {}",
            bytes / frames.max(1),
            tx,
            tx.2 / tx.0.max(1),
            runtime.features(),
            drops(runtime),
            latency.packet_ns.value_at_quantile(0.5),
            latency.pipeline_ns.value_at_quantile(0.5),
            latency.batch_len.value_at_quantile(0.99)
        );
        assert!(!latency.packet_ns.is_empty() && latency.batch_len.len() == latency.packet_ns.len());
        assert!(tx.2 / tx.0 > 3 * u64::from(POD_MTU), "the pods are written superframes");
        let features = runtime.features();
        assert!(features.tso.on && features.udp_gso.on, "{features:?}");
        assert!(runtime.kernel_drops().is_ok());
        assert!(runtime.workers().iter().all(|worker| worker.alive && worker.restarts == 0 && worker.read_error == 0));
    }
    first.stop();
    second.stop();
}

#[test]
fn superframes_cross_an_underlay_of_ipv6_and_udps_keep_their_boundaries() {
    for wire in [Wire::V6, Wire::V4] {
        let Some((one, two)) = two_nodes_over(wire) else { return };
        let first = one.start(Some(&two), |_, _| {}).unwrap();
        let second = two.start(Some(&one), |_, _| {}).unwrap();
        for v4 in [true, false] {
            for (to, address) in [(&one.pods[1], one.pod(1, v4)), (&two.pods[1], two.pod(1, v4))] {
                datagram(&one.pods[0], to, address, 9000);
                for (size, count, last) in [(1000, 10, 300), (1000, 10, 0), (1300, 40, 1), (100, 63, 7)] {
                    superdatagram(&one.pods[0], to, address, size, count, last);
                }
                stream(&one.pods[0], to, address, 4 * MIB);
            }
        }
        for (from, to) in [(&first, &second), (&second, &first)] {
            let sent = || (sum(from, |c| c.overlay_tx.packets.value()), sum(from, |c| c.overlay_tx.bytes.value()));
            let received = || (sum(to, |c| c.overlay_rx.packets.value()), sum(to, |c| c.overlay_rx.bytes.value()));
            wait("what is sent is received", || sent() == received());
        }
        assert!(sum(&first, |c| c.overlay_tx.frames.value()) * 4 < sum(&first, |c| c.overlay_tx.packets.value()));
        for runtime in [&first, &second] {
            assert!(runtime.features().udp_gso.on && runtime.features().tso.on, "{:?}", runtime.features());
            assert_eq!(runtime.features().udp_gso.refusals + runtime.features().tso.refusals + runtime.features().uso.refusals, 0);
        }
        first.stop();
        second.stop();
    }
}

#[test]
fn where_the_kernel_takes_no_superframes_they_are_cut_in_software() {
    let Some((one, two)) = two_nodes() else { return };
    // The pods' TUN still brings superframes, and both are written as if the kernel refused them.
    let first = one
        .start(Some(&two), |_, host| {
            host.queues[0].disable(Feature::Tso).unwrap();
        })
        .unwrap();
    let second = two
        .start(Some(&one), |_, host| {
            host.queues[0].disable(Feature::Tso).unwrap();
        })
        .unwrap();
    assert!(!first.features().tso.on);
    for v4 in [true, false] {
        stream(&one.pods[0], &one.pods[1], one.pod(1, v4), 4 * MIB);
        stream(&one.pods[0], &two.pods[1], two.pod(1, v4), 4 * MIB);
    }
    for runtime in [&first, &second] {
        let (frames, packets) = (sum(runtime, |c| c.pods_tx.frames.value()), sum(runtime, |c| c.pods_tx.packets.value()));
        assert_eq!(frames, packets, "one packet in each frame");
        assert!(packets as usize > 4 * MIB / POD_MTU as usize);
    }
}

#[test]
fn a_pod_reads_the_status_page_at_the_gateways_address() {
    let Some((one, two)) = two_nodes() else { return };
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    for v4 in [true, false] {
        let gateway = SocketAddr::new(one.gateway_address(v4), 80);
        let mut connection = one.pods[0].run(|| TcpStream::connect_timeout(&gateway, PATIENCE).unwrap()).unwrap();
        connection.set_read_timeout(Some(PATIENCE)).unwrap();
        connection.write_all(b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n").unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nthe gateway is well\n"), "{answer}");
    }
    runtime.stop();
}

#[test]
fn a_worker_that_panics_comes_back_and_flows_go_on() {
    let Some((one, two)) = two_nodes() else { return };
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    let fastest = thread::scope(|scope| {
        let bulk = scope.spawn(|| stream(&one.pods[0], &one.pods[1], one.pod(1, true), 16 * MIB));
        let crash = |worker| {
            runtime.crash_worker(WorkerId(worker));
            let asked = Instant::now();
            wait("the worker is back", || runtime.workers()[usize::from(worker)].restarts == 1);
            println!("back after {:?}", asked.elapsed());
            asked.elapsed()
        };
        let fastest = [0, 1].map(crash).into_iter().min();
        bulk.join().unwrap();
        fastest
    });
    assert!(fastest < Some(Duration::from_millis(100)), "{fastest:?}");
    assert!(runtime.workers().iter().all(|worker| worker.alive));
    datagram(&one.pods[0], &one.pods[1], one.pod(1, true), 100);
}

#[test]
fn a_panic_is_one_line_even_where_backtraces_are_asked_for() {
    if two_nodes().is_none() {
        return;
    }
    // The variable is read once for each process, so this is another.
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["a_worker_that_panics_comes_back_and_flows_go_on", "--exact", "--nocapture"])
        .env("RUST_BACKTRACE", "full")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stdout));
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("panic")).collect();
    assert!(lines.len() == 2 && lines.iter().all(|line| line.starts_with("worker-") && line.contains("/mod.rs:")), "{said}");
    assert!(!said.contains("backtrace"), "{said}");
}

#[test]
fn every_worker_takes_note_of_a_new_generation_and_its_pods() {
    let Some((one, two)) = two_nodes() else { return };
    let runtime = one.start(None, |_, _| {}).unwrap();
    let second = two.start(Some(&one), |_, _| {}).unwrap();
    wait("the first generation", || runtime.generations() == [Generation(1); 2]);
    runtime.publish(one.snapshot(2, Some(&two)));
    wait("the second generation", || runtime.generations() == [Generation(2); 2]);
    datagram(&one.pods[0], &two.pods[0], two.pod(0, true), 100);
    second.stop();
}

#[test]
fn a_path_that_shrinks_is_reported_and_senders_are_told_of_the_new_mtu() {
    let Some((one, two)) = two_nodes() else { return };
    let first = one.start(Some(&two), |_, _| {}).unwrap();
    let second = two.start(Some(&one), |_, _| {}).unwrap();
    stream(&one.pods[0], &two.pods[0], two.pod(0, true), MIB);
    for node in [&one, &two] {
        node.netns.run(|| ip("link set wire mtu 1300")).unwrap();
    }
    let sender = one.pods[0].run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    let mut reports = Vec::new();
    wait("a report of the path's MTU", || {
        sender.send_to(&[0; 1350], SocketAddr::new(two.pod(0, true), 9)).unwrap();
        reports = first.path_mtus();
        !reports.is_empty()
    });
    assert_eq!(reports[0], (two.underlay(), 1300));
    assert!(first.features().udp_gso.on);
    for (runtime, node, peer) in [(&first, &one, &two), (&second, &two, &one)] {
        let mut next = Snapshot::clone(&node.snapshot(2, Some(peer)));
        next.peers = next.peers.iter().cloned().map(|peer| Peer { mtu: 1300 - 36, ..peer }).collect();
        runtime.publish(Arc::new(next));
    }
    for v4 in [true, false] {
        stream(&one.pods[0], &two.pods[0], two.pod(0, v4), 4 * MIB);
    }
    assert!(first.features().udp_gso.on, "{:?}", first.features());
    let refused = one.pods[0].run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    // What was on its way when the MTU changed may have taught the kernel already: then a socket that lets it cut hears nothing.
    let never_cut = libc::IP_PMTUDISC_DO;
    let len = size_of_val(&never_cut) as libc::socklen_t;
    // SAFETY: the kernel reads an int of that length from a live value; the descriptor is the socket's.
    let set = unsafe { libc::setsockopt(refused.as_raw_fd(), libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, (&raw const never_cut).cast(), len) };
    assert_eq!(set, 0);
    refused.connect(SocketAddr::new(two.pod(0, true), 9)).unwrap();
    wait("the pod's own kernel has learnt the MTU", || refused.send(&[0; 1350]).is_err_and(|error| error.raw_os_error() == Some(libc::EMSGSIZE)));
    assert!(sum(&first, |c| c.answers.value()) > 0);
}

#[test]
fn a_node_ports_datagrams_in_fragments_reach_the_backend_and_a_port_that_is_taken_is_named() {
    let Some((one, two)) = two_nodes() else { return };
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    let (ours, taken) = (SocketAddr::new(one.underlay(), 30053), SocketAddr::new(one.underlay(), 30054));
    let _holder = one.netns.run(|| UdpSocket::bind(taken).unwrap()).unwrap();
    runtime.set_udp_ports(vec![ours, taken]);
    wait("the port that is taken is named", || runtime.port_problems().len() == 1);
    assert_eq!(runtime.port_problems()[0].what, format!("UDP {taken}"));
    let server = one.pods[0].run(|| UdpSocket::bind((one.pod(0, true), 0)).unwrap()).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let backends: Arc<[Backend]> =
        Arc::new([Backend { addr: one.pod(0, true).into(), port: server.local_addr().unwrap().port(), place: Place::LocalPod }]);
    let service = Arc::new(ServicePort {
        id: 1,
        name: "default/echo".into(),
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        cluster: Arc::clone(&backends),
        local: backends,
        affinity: None,
        source_ranges: Vec::new(),
    });
    let mut next = Snapshot::clone(&one.snapshot(2, Some(&two)));
    Arc::make_mut(&mut next.node).node_port_addresses = vec![one.underlay().into()];
    let key = FrontendKey::new(ours.ip(), ours.port(), protocol::UDP);
    next.services = next.services.with([(key, Some(Frontend { face: Face::NodePort, service }))]);
    runtime.publish(Arc::new(next));
    wait("the service", || runtime.generations() == [Generation(2); 2]);
    let outside = two.netns.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    let sent = pattern(9000);
    outside.send_to(&sent, ours).unwrap();
    let mut buffer = vec![0; 65_536];
    let (len, from) = receive(&server, &mut buffer);
    assert!(buffer[..len] == sent);
    assert_eq!(from.ip(), one.gateway_address(true), "a client from outside is masqueraded by the gateway's own address");
}

#[test]
fn a_pods_first_datagram_to_the_outside_and_its_answer_both_in_fragments_arrive() {
    let Some((one, two)) = two_nodes() else { return };
    // The second node runs no gateway here: it is the outside.
    let outside: [IpAddr; 2] = [two.underlay(), "2001:db8::2".parse().unwrap()];
    let sources: [IpAddr; 2] = [one.underlay(), "2001:db8::1".parse().unwrap()];
    for (node, v6) in [(&one, sources[1]), (&two, outside[1])] {
        node.netns.run(|| ip(&format!("address add {v6}/64 dev wire nodad"))).unwrap();
    }
    let runtime = one.start(None, |_, _| {}).unwrap();
    one.netns
        .run(|| {
            // A device without an IPv4 address is strict whatever its rp_filter.
            ip("address add 169.254.1.1/32 dev podgate scope host");
            sysctl("ipv4/conf/podgate/rp_filter", "2");
            sysctl("ipv4/conf/podgate/accept_local", "1");
            sysctl("ipv4/conf/podgate/forwarding", "1");
            sysctl("ipv4/conf/wire/forwarding", "1");
            sysctl("ipv6/conf/all/forwarding", "1");
            for (family, source) in [("-4", sources[0]), ("-6", sources[1])] {
                ip(&format!("{family} route add default dev podgate table 234"));
                ip(&format!("{family} rule add pref 11 to {source} ipproto udp dport 61000-61999 lookup 234"));
                ip(&format!("{family} rule add pref 100 lookup local"));
                ip(&format!("{family} rule del pref 0"));
            }
        })
        .unwrap();
    let mut next = Snapshot::clone(&one.snapshot(2, None));
    let node = Arc::make_mut(&mut next.node);
    node.addresses = sources.map(Into::into).to_vec();
    node.masquerade = Some(Masquerade { ports: vec![61000..=61999], source_v4: Some(sources[0].into()), source_v6: Some(sources[1].into()) });
    runtime.publish(Arc::new(next));
    wait("the masquerade", || runtime.generations() == [Generation(2); 2]);
    for address in outside {
        datagram(&one.pods[0], &two.netns, address, 100);
        for _ in 0..20 {
            datagram(&one.pods[0], &two.netns, address, 9000);
        }
    }
    let (sockets, lost) = runtime.masquerade_sockets();
    // Flows to different ports of the outside may share one of ours.
    assert!((20..=42).contains(&sockets) && lost == 0, "{sockets} sockets, {lost} flows without");
    runtime.stop();
}

#[test]
fn workers_whose_tuns_are_deleted_say_so_and_rest() {
    let Some((one, two)) = two_nodes() else { return };
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    let second = two.start(Some(&one), |_, _| {}).unwrap();
    datagram(&one.pods[0], &one.pods[1], one.pod(1, true), 100);
    let workers = threads_in(&one.netns, "worker-");
    assert_eq!(workers.len(), 2);
    one.gateway.run(|| ip("link del pods")).unwrap();
    wait("every worker has noticed", || runtime.workers().iter().all(|worker| worker.read_error == libc::EBADFD));
    assert!(runtime.inject_pods(&[0x45; 20]).is_err());
    let far = two.pods[0].run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    far.send_to(&[0; 100], (one.pod(0, true), 9)).unwrap();
    wait("what cannot be written is a drop with a name", || sum(&runtime, |counters| counters.drops(DropReason::WritePods)) == 1);
    one.netns.run(|| ip("link del podgate")).unwrap();
    // Pods go on sending, which nobody reads; a worker that starts anew meets the same.
    runtime.crash_worker(WorkerId(0));
    wait("the worker is back", || runtime.workers()[0].restarts == 1);
    let sender = one.pods[0].run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    let (before, started) = (cpu_time(&workers), Instant::now());
    while started.elapsed() < Duration::from_millis(500) {
        let _ = sender.send_to(&[0; 100], (one.pod(1, true), 9));
        thread::sleep(Duration::from_millis(10));
    }
    let used = cpu_time(&workers) - before;
    assert!(used < Duration::from_millis(50), "{used:?} of CPU in half a second with nothing to do");
    assert!(runtime.workers().iter().all(|worker| worker.alive && worker.silent_ms < 1000));
    second.stop();
    let stopping = Instant::now();
    runtime.stop();
    assert!(stopping.elapsed() < Duration::from_secs(2), "{:?}", stopping.elapsed());
}

/// The directories in `/proc` of this process's threads in that namespace whose names begin with `name`.
fn threads_in(netns: &Netns, name: &str) -> Vec<PathBuf> {
    let inode = |path: PathBuf| std::fs::read_link(path).unwrap();
    let wanted = netns.run(|| inode("/proc/thread-self/ns/net".into())).unwrap();
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let named = |task: &PathBuf| std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.starts_with(name));
    tasks.filter(named).filter(|task| std::fs::read_link(task.join("ns/net")).is_ok_and(|netns| netns == wanted)).collect()
}

/// The time that these threads have run.
fn cpu_time(threads: &[PathBuf]) -> Duration {
    let nanoseconds = |thread: &PathBuf| -> u64 {
        let text = std::fs::read_to_string(thread.join("schedstat")).unwrap();
        text.split(' ').next().unwrap().parse().unwrap()
    };
    Duration::from_nanos(threads.iter().map(nanoseconds).sum())
}

#[test]
fn a_busy_overlay_port_is_named() {
    let Some((one, two)) = two_nodes() else { return };
    let _holder = one.netns.run(|| UdpSocket::bind(SocketAddr::new(one.underlay(), 4790)).unwrap()).unwrap();
    let error = one.start(Some(&two), |_, _| {}).err().expect("the port is taken");
    assert!(error.to_string().contains("192.0.2.1:4790"), "{error}");
}
