//! Two nodes with their gateways, pods in namespaces of their own, real sockets at the ends: what the tests of the whole dataplane share.

// Each test binary uses its part of it.
#![allow(dead_code)]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use podgate_core::counters::Counters;
use podgate_core::fib::{Pod, PodTable, PrefixMap};
use podgate_core::service::ServiceTable;
use podgate_core::shape::Limits;
use podgate_core::snapshot::{Generation, NodeTables, OutsideToPods, Peer, Snapshot};
use podgate_core::verdict::{DropReason, TunId};
use podgate_runtime::flow_file::FlowFile;
use podgate_runtime::netns::Netns;
use podgate_runtime::runtime::{Options, PodTun, Reserve, Runtime};
use podgate_runtime::tun::Tun;
use podgate_runtime::udp::Overlay;

pub const MIB: usize = 1 << 20;
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Room for the overlay's headers within 1,500 bytes of underlay.
pub const POD_MTU: u32 = 1420;

/// Runs `ip` with these arguments, here.
pub fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().expect("ip runs");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

pub fn sysctl(path: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/{path}"), value).unwrap_or_else(|error| panic!("{path}: {error}"));
}

/// The family of the nodes' own network.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    V4,
    V6,
}

/// How a pod is attached.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Attach {
    Veth,
    Tun,
}

/// One node: its own namespace, its gateway's, and two pods'.
pub struct Node {
    pub number: u8,
    pub wire: Wire,
    pub workers: u16,
    pub netns: Netns,
    pub gateway: Netns,
    pub pods: [Netns; 2],
    /// How they are attached.
    pub attach: [Attach; 2],
    /// The pods' limits.
    pub limits: [Option<Arc<Limits>>; 2],
    flows: PathBuf,
}

impl Node {
    pub fn new(number: u8, wire: Wire) -> Result<Node, Box<dyn std::error::Error>> {
        let flows = std::env::temp_dir().join(format!("podgate-test-{}-{:?}-{number}.flows", std::process::id(), thread::current().id()));
        let pods = [Netns::anonymous()?, Netns::anonymous()?];
        Ok(Node {
            number,
            wire,
            workers: 2,
            netns: Netns::anonymous()?,
            gateway: Netns::anonymous()?,
            pods,
            attach: [Attach::Veth; 2],
            limits: [None, None],
            flows,
        })
    }

    pub fn underlay(&self) -> IpAddr {
        match self.wire {
            Wire::V4 => [192, 0, 2, self.number].into(),
            Wire::V6 => [0x2001, 0xdb8, 0, 0, 0, 0, 0, self.number.into()].into(),
        }
    }

    pub fn pod(&self, index: usize, v4: bool) -> IpAddr {
        let host = 2 + index as u16;
        if v4 { [10, 244, self.number, host as u8].into() } else { [0xfd00, 0x244, self.number.into(), 0, 0, 0, 0, host].into() }
    }

    pub fn gateway_address(&self, v4: bool) -> IpAddr {
        if v4 { [10, 244, self.number, 1].into() } else { [0xfd00, 0x244, self.number.into(), 0, 0, 0, 0, 1].into() }
    }

    pub fn cidrs(&self) -> [ipnetwork::IpNetwork; 2] {
        [format!("10.244.{}.0/24", self.number).parse().unwrap(), format!("fd00:244:{}::/48", self.number).parse().unwrap()]
    }

    /// The pods' interfaces, and the gateway's rules that lead their packets into the TUN: the devices are up already.
    pub fn wire_pods(&self) {
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
        for (index, pod) in self.pods.iter().enumerate().filter(|(index, _)| self.attach[*index] == Attach::Veth) {
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

    pub fn snapshot(&self, generation: u64, peer: Option<&Node>) -> Arc<Snapshot> {
        let cluster = vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/32".parse().unwrap()];
        let tun = |index: usize| (self.attach[index] == Attach::Tun).then_some(TunId::new(index as u32));
        let entry = |index: usize| Pod { limits: self.limits[index].clone(), tun: tun(index), ..Pod::new(POD_MTU) };
        let pods = (0..2).flat_map(|index| [true, false].map(|v4| (self.pod(index, v4).into(), entry(index))));
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
                direct_return: None,
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
                    direct_return: false,
                })
                .collect(),
            peer_by_underlay: peer.iter().map(|peer| (peer.underlay().into(), 0)).collect(),
        })
    }

    /// Makes the TUNs inside pods that are to have one.
    pub fn pod_tuns(&self) -> Vec<(TunId, PodTun)> {
        let wanted = self.pods.iter().enumerate().filter(|(index, _)| self.attach[*index] == Attach::Tun);
        wanted
            .map(|(index, pod)| {
                let tun = PodTun::make("eth0", self.workers, pod).unwrap();
                self.furnish(index);
                (TunId::new(index as u32), tun)
            })
            .collect()
    }

    /// What a pod has beside its TUN.
    pub fn furnish(&self, index: usize) {
        let furnish = || {
            ip("link set lo up");
            ip(&format!("link set eth0 mtu {POD_MTU} gso_max_size 62000"));
            ip("link set eth0 addrgenmode none");
            ip("link set eth0 up");
            ip(&format!("address add {}/32 dev eth0", self.pod(index, true)));
            ip(&format!("address add {}/128 dev eth0 nodad", self.pod(index, false)));
            ip("route add default via 169.254.1.1 dev eth0 onlink");
            ip("-6 route add default via fe80::1 dev eth0 onlink");
        };
        self.pods[index].run(furnish).unwrap();
    }

    /// Opens the devices, wires the pods and starts the workers.
    pub fn start(&self, peer: Option<&Node>, change: impl FnOnce(&mut Tun, &mut Tun)) -> Result<Runtime, Box<dyn std::error::Error>> {
        self.start_on(peer, self.pod_tuns(), |pods, host| {
            change(pods, host);
            self.wire_pods();
        })
    }

    /// The same where the pods are wired already.
    pub fn start_with(&self, peer: Option<&Node>, pod_tuns: Vec<(TunId, PodTun)>) -> Result<Runtime, Box<dyn std::error::Error>> {
        self.start_on(peer, pod_tuns, |_, _| {})
    }

    /// The same where `change` is the last that happens to the devices before the workers start.
    pub fn start_on(
        &self,
        peer: Option<&Node>,
        pod_tuns: Vec<(TunId, PodTun)>,
        change: impl FnOnce(&mut Tun, &mut Tun),
    ) -> Result<Runtime, Box<dyn std::error::Error>> {
        let mut pods = Tun::open("pods", self.workers, &self.gateway).unwrap();
        let mut host = Tun::open("podgate", self.workers, &self.netns).unwrap();
        for tun in [&mut pods, &mut host] {
            tun.set_mtu(65_535).unwrap();
            tun.bring_up().unwrap();
        }
        change(&mut pods, &mut host);
        let (flows, _) = FlowFile::open(&self.flows, 4096).unwrap();
        let overlay = self.netns.run(|| Overlay::open(&[self.underlay()], 4790, self.workers, Vec::new())).unwrap()?;
        let options = Options {
            // The last one is pinned, to a CPU that every machine has.
            workers: (1..self.workers).map(|_| None).chain([Some(0)]).collect(),
            pods,
            pod_tuns,
            pods_netns: self.gateway.try_clone().unwrap(),
            host,
            overlay,
            flows,
            snapshot: self.snapshot(1, peer),
            spin: std::time::Duration::ZERO,
            status_page: Arc::new(|| "the gateway is well\n".to_owned()),
            reserve: Reserve::default(),
        };
        Ok(self.netns.run(|| Runtime::start(options)).unwrap()?)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.flows);
    }
}

/// Two nodes on one underlay, unless that is not permitted here.
pub fn two_nodes() -> Option<(Node, Node)> {
    two_nodes_over(Wire::V4)
}

pub fn two_nodes_over(wire: Wire) -> Option<(Node, Node)> {
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
pub fn pattern(len: usize) -> Vec<u8> {
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
pub fn stream(from: &Netns, to: &Netns, address: IpAddr, len: usize) {
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
pub fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> (usize, SocketAddr) {
    loop {
        match socket.recv_from(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            received => return received.unwrap(),
        }
    }
}

/// A datagram there and back over connected sockets.
pub fn datagram(from: &Netns, to: &Netns, address: IpAddr, len: usize) {
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
pub fn superdatagram(from: &Netns, to: &Netns, address: IpAddr, size: u16, count: usize, last: usize) {
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

pub fn sum(runtime: &Runtime, value: impl Fn(&Counters) -> u64) -> u64 {
    runtime.counters().iter().map(|counters| value(counters)).sum()
}

pub fn drops(runtime: &Runtime) -> Vec<(&'static str, u64)> {
    DropReason::ALL.iter().map(|reason| (reason.name(), sum(runtime, |counters| counters.drops(*reason)))).filter(|(_, count)| *count > 0).collect()
}

/// Waits until `done` says so.
pub fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::yield_now();
    }
}

/// The directories in `/proc` of this process's threads in that namespace whose names begin with `name`.
pub fn threads_in(netns: &Netns, name: &str) -> Vec<PathBuf> {
    let inode = |path: PathBuf| std::fs::read_link(path).unwrap();
    let wanted = netns.run(|| inode("/proc/thread-self/ns/net".into())).unwrap();
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let named = |task: &PathBuf| std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.starts_with(name));
    tasks.filter(named).filter(|task| std::fs::read_link(task.join("ns/net")).is_ok_and(|netns| netns == wanted)).collect()
}

/// The time that these threads have run.
pub fn cpu_time(threads: &[PathBuf]) -> Duration {
    let nanoseconds = |thread: &PathBuf| -> u64 {
        let text = std::fs::read_to_string(thread.join("schedstat")).unwrap();
        text.split(' ').next().unwrap().parse().unwrap()
    };
    Duration::from_nanos(threads.iter().map(nanoseconds).sum())
}
