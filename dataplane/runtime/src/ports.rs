//! The thread beside the workers: the gateway's own stack, and the sockets on the node that bring what no port rule can.
//!
//! It is no worker: it may allocate and take its time. What it makes or receives goes to worker 0 through that worker's inbox. It counts
//! into counters of its own, which stand behind the workers'.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use podgate_core::addr::{Tuple, protocol};
use podgate_core::counters::Counters;
use podgate_core::flow::FlowRef;
use podgate_core::packet::{Ingress, Offload};
use podgate_core::pipeline::{Bind, MasqueradePort};
use podgate_core::snapshot::Snapshot;
use podgate_core::verdict::DropReason;
use podgate_core::wire::ip::Family;

use socket2::Socket;

use crate::clock::Instant;
use crate::dhcp::{DhcpClient, Relay, Served};
use crate::netstack::{Netstack, StatusPage};
use crate::publish::Reader;
use crate::sockets::{IcmpError, IcmpSocket, PACKET_LEN_MAX, PortSockets, bind_port};
use crate::worker::handoff::Origin;
use crate::worker::shared::Shared;

/// What the thread wakes up for at the latest: addresses of a new snapshot.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// How often sockets whose flows are over are released, and ports that were taken are tried again.
const HOUSEKEEPING_MS: u64 = 5_000;

/// Masquerade ports that have a socket at once. Beyond that, replies that come in fragments are lost, and counted.
pub const MASQUERADE_SOCKETS_MAX: usize = 4_096;

/// Packets taken from one kind of socket before the others get their turn.
const TURN: usize = 64;

const WAKER: Token = Token(usize::MAX);
const UDP: Token = Token(0);
const ICMP: Token = Token(1);
const DHCP: Token = Token(2);

/// A port of the node that is not served as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortProblem {
    /// What is not served: `UDP 192.0.2.1:30053`, `ICMP`.
    pub what: String,
    /// Why, and what to do.
    pub why: String,
}

/// What the control side and the thread tell each other. Neither is a worker, so a lock is in order.
#[derive(Default)]
pub(crate) struct Wishes {
    udp_ports: Mutex<Option<Vec<SocketAddr>>>,
    dhcp: Mutex<Option<DhcpWish>>,
    problems: Mutex<Vec<PortProblem>>,
    pub(crate) kernel_drops: AtomicU64,
}

impl Wishes {
    /// Control: these ports are to have sockets, and no others but masquerade's.
    pub(crate) fn set_udp_ports(&self, ports: Vec<SocketAddr>) {
        *lock(&self.udp_ports) = Some(ports);
    }

    /// Control: these DHCP clients are to be served, and no others.
    pub(crate) fn set_dhcp(&self, wish: DhcpWish) {
        let mut waiting = lock(&self.dhcp);
        // Sockets that the thread has not taken over yet must not be lost.
        let before = waiting.take().map_or(Vec::new(), |wish| wish.news);
        let news = before.into_iter().chain(wish.news).collect();
        *waiting = Some(DhcpWish { news, ..wish });
    }

    /// Control: what is not served.
    pub(crate) fn problems(&self) -> Vec<PortProblem> {
        lock(&self.problems).clone()
    }
}

/// What the DHCP relay is to do from now on.
pub(crate) struct DhcpWish {
    /// The servers to ask.
    pub(crate) servers: Vec<Ipv4Addr>,
    /// Everybody who is to be served.
    pub(crate) clients: Vec<DhcpClient>,
    /// Those of them that are new.
    pub(crate) news: Vec<Served>,
}

/// Each value under these locks is replaced whole, so a panic elsewhere leaves it good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What the thread is given.
pub(crate) struct Ports {
    shared: Arc<Shared>,
    wishes: Arc<Wishes>,
    poll: Poll,
    stack: Netstack,
    relay: Relay,
    sockets: PortSockets,
    icmp: Vec<IcmpSocket>,
    icmp_problems: Vec<PortProblem>,
    /// Node ports and host ports, as control wants them.
    wanted: Vec<SocketAddr>,
    /// Masquerade ports and the flows that use each.
    masqueraded: HashMap<SocketAddr, Vec<FlowRef>>,
    buffer: Box<[u8]>,
}

impl Ports {
    /// Opens the ICMP sockets in the calling thread's namespace; what comes in through the interface `host` is not for them.
    pub(crate) fn new(shared: Arc<Shared>, wishes: Arc<Wishes>, snapshot: &Snapshot, page: StatusPage, host: &str) -> io::Result<Ports> {
        let poll = Poll::new()?;
        shared.netstack.set_waker(Waker::new(poll.registry(), WAKER)?);
        let ignored = vec![nix::net::if_::if_nametoindex(host)?];
        let sockets = PortSockets::new(ignored.clone())?;
        poll.registry().register(&mut SourceFd(&sockets.as_raw_fd()), UDP, Interest::READABLE)?;
        let (mut icmp, mut icmp_problems) = (Vec::new(), Vec::new());
        for (family, what) in [(Family::V4, "ICMP"), (Family::V6, "ICMPv6")] {
            match IcmpSocket::open(family, ignored.clone()) {
                Ok(socket) => {
                    poll.registry().register(&mut SourceFd(&socket.as_raw_fd()), ICMP, Interest::READABLE)?;
                    icmp.push(socket);
                }
                // A node without IPv6 misses nothing.
                Err(IcmpError::NoFamily(_)) => {}
                Err(error) => icmp_problems.push(PortProblem { what: what.to_owned(), why: error.to_string() }),
            }
        }
        *lock(&wishes.problems) = icmp_problems.clone();
        // Answers are as long as what they answer, so they fit wherever that came from; what was reassembled is cut to fit the uplinks.
        let mtu = snapshot.node.outside_mtu.clamp(1280, 9000) as usize;
        let stack = Netstack::new(mtu, page, Instant::read().ms());
        let (wanted, masqueraded) = (Vec::new(), HashMap::new());
        let buffer = vec![0; PACKET_LEN_MAX].into_boxed_slice();
        let relay = Relay::default();
        Ok(Ports { shared, wishes, poll, stack, relay, sockets, icmp, icmp_problems, wanted, masqueraded, buffer })
    }

    /// Binds the ports of flows that a predecessor masqueraded. It reads the whole flow table, and workers need not wait for that.
    fn adopt_flows(&mut self, snapshot: &Snapshot) {
        let shared = Arc::clone(&self.shared);
        let node = &snapshot.node;
        // A service's endpoint outside the cluster is spoken to in the same way as the outside.
        let is_ours = |reply: &Tuple| {
            let ranges = node.masquerade.iter().flat_map(|masquerade| &masquerade.ports);
            reply.protocol == protocol::UDP && node.owns(reply.dst) && ranges.clone().any(|range| range.contains(&reply.dst_port))
        };
        let live = shared.flows.table().views(Instant::read().now()).map(|view| view.flow);
        for flow in live.filter(|flow| is_ours(&flow.reply)) {
            self.serve_masqueraded(MasqueradePort { flow: flow.at, reply: flow.reply, bind: Bind::Soon }, None);
        }
        self.shared.masquerade_sockets.store(self.masqueraded.len() as u64, Ordering::Relaxed);
    }

    /// The thread's work, until it is told to stop.
    pub(crate) fn run(mut self, reader: &Reader) {
        let mut session = reader.enter();
        self.adopt_flows(session.refresh());
        let mut events = Events::with_capacity(16);
        let mut timeout = Duration::ZERO;
        let mut housekeeping_ms = 0;
        while !self.shared.stop.load(Ordering::Relaxed) {
            // An interrupted or failed wait is a wait that was short.
            let _ = self.poll.poll(&mut events, Some(timeout.min(WAIT_MAX)));
            self.shared.netstack.looked();
            let now_ms = Instant::read().ms();
            let due = now_ms >= housekeeping_ms;
            if due {
                housekeeping_ms = now_ms + HOUSEKEEPING_MS;
            }
            // First, so that a port whose last flow is over keeps its socket if a new flow has taken it.
            self.bind_masqueraded();
            if due {
                self.release();
            }
            self.bind_wanted(due);
            // Each turn is bounded; whatever may have more is looked at again at once.
            let busy = self.receive_udp() | self.receive_icmp() | self.receive_dhcp(session.refresh());
            // Behind its turn, so that the last words of a client that is to go (its release) are heard.
            self.serve_dhcp();
            let stack = self.stack(session.refresh()).unwrap_or(WAIT_MAX);
            timeout = if busy { Duration::ZERO } else { stack };
        }
    }

    /// Makes the sockets those that control wants, and tries again those that could not be had.
    fn bind_wanted(&mut self, retry: bool) {
        let news = lock(&self.wishes.udp_ports).take();
        let changed = news.is_some();
        if let Some(ports) = news {
            self.wanted = ports;
        }
        if !changed && !retry {
            return;
        }
        let all: Vec<SocketAddr> = self.wanted.iter().chain(self.masqueraded.keys()).copied().collect();
        let failed = self.sockets.set(&all);
        let problems = failed.into_iter().filter(|(address, _)| self.wanted.contains(address)).map(|(address, error)| PortProblem {
            what: format!("UDP {address}"),
            why: match error.raw_os_error() {
                Some(libc::EADDRINUSE) => {
                    format!("a program on this node has the port (`ss -ulnp` names it): datagrams in fragments go there; {error}")
                }
                _ => format!("datagrams in fragments are lost: {error}"),
            },
        });
        *lock(&self.wishes.problems) = self.icmp_problems.iter().cloned().chain(problems).collect();
        self.wishes.kernel_drops.store(
            self.sockets.kernel_drops() + self.icmp.iter().map(|socket| u64::from(socket.kernel_drops().unwrap_or(0))).sum::<u64>(),
            Ordering::Relaxed,
        );
    }

    /// Binds the ports of flows that have just been masqueraded.
    fn bind_masqueraded(&mut self) {
        // Those that are bound already come first: another flow may wait for one of these ports.
        let requests = std::iter::from_fn(|| self.shared.masquerade_ports.pop());
        let (bound, unbound): (Vec<_>, Vec<_>) = requests.partition(|(_, socket)| socket.is_some());
        for (port, socket) in bound.into_iter().chain(unbound) {
            self.serve_masqueraded(port, socket);
        }
        self.shared.masquerade_sockets.store(self.masqueraded.len() as u64, Ordering::Relaxed);
    }

    /// Has a socket for one flow's replies, if there is room for it: `socket`, if a worker has bound it already.
    fn serve_masqueraded(&mut self, port: MasqueradePort, socket: Option<Socket>) {
        let address = masquerade_address(&port);
        if let Some(flows) = self.masqueraded.get_mut(&address) {
            flows.push(port.flow);
            return;
        }
        let room = self.masqueraded.len() < MASQUERADE_SOCKETS_MAX;
        let bind = |sockets: &mut PortSockets| match socket {
            Some(socket) => sockets.adopt(address, socket),
            None => sockets.bind_one(address),
        };
        if room && bind(&mut self.sockets).is_ok() {
            self.masqueraded.insert(address, vec![port.flow]);
        } else {
            self.shared.masquerade_ports_lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Gives back the ports whose flows are all over.
    fn release(&mut self) {
        let table = self.shared.flows.table();
        let (sockets, wanted) = (&mut self.sockets, &self.wanted);
        self.masqueraded.retain(|address, flows| {
            flows.retain(|flow| table.is_live(*flow));
            if flows.is_empty() && !wanted.contains(address) {
                sockets.release(*address);
            }
            !flows.is_empty()
        });
    }

    /// A turn of the UDP sockets; whether they may have more.
    fn receive_udp(&mut self) -> bool {
        for _ in 0..TURN {
            match self.sockets.recv(&mut self.buffer) {
                Ok(Some(len)) => deliver(&self.shared, &self.buffer[..len]),
                Ok(None) => return false,
                // An error of one socket (an ICMP error that came back to it): the next may be good.
                Err(_) => {}
            }
        }
        true
    }

    /// A turn of the ICMP sockets; whether they may have more.
    fn receive_icmp(&mut self) -> bool {
        let mut more = false;
        for socket in &self.icmp {
            let mut left = TURN;
            while left > 0 {
                left -= 1;
                match socket.recv(&mut self.buffer) {
                    Ok(Some(len)) => deliver(&self.shared, &self.buffer[..len]),
                    Ok(None) => break,
                    Err(_) => {}
                }
            }
            more |= left == 0;
        }
        more
    }

    /// Takes over what control wants of the DHCP relay.
    fn serve_dhcp(&mut self) {
        let Some(wish) = lock(&self.wishes.dhcp).take() else { return };
        let DhcpWish { servers, clients, news } = wish;
        self.relay.set_servers(servers);
        for served in news {
            // One that cannot be waited for is looked at with every other event.
            let _ = self.poll.registry().register(&mut SourceFd(&served.as_raw_fd()), DHCP, Interest::READABLE);
            self.relay.add(served);
        }
        self.relay.keep(&clients);
    }

    /// A turn of the DHCP clients; whether one may have more.
    fn receive_dhcp(&mut self, snapshot: &Snapshot) -> bool {
        let shared = &self.shared;
        self.relay.requests(snapshot.node.gateway_v4, Instant::read().now(), |packet| send_own(shared, packet))
    }

    /// Lets the stack have its input and takes its output; says when it wants to be asked again.
    fn stack(&mut self, snapshot: &Snapshot) -> Option<Duration> {
        self.stack.set_addresses(snapshot.node.gateway_v4, snapshot.node.gateway_v6);
        let (shared, stack) = (&self.shared, &mut self.stack);
        let counters = own_counters(shared);
        while let Some(parcel) = shared.netstack.take() {
            if !self.relay.answer(parcel.bytes()) && !stack.input(parcel.bytes().to_vec()) {
                counters.dropped(DropReason::NetstackFull, 1);
            }
            shared.pool.give_back(parcel);
        }
        stack.poll(Instant::read().ms(), |packet| send_own(shared, packet))
    }
}

/// Hands a packet of the gateway's own to worker 0.
fn send_own(shared: &Shared, packet: &[u8]) {
    if !shared.inboxes[0].send(&shared.pool, std::iter::once(packet), Offload::default(), Origin::OwnStack) {
        own_counters(shared).dropped(DropReason::NetstackFull, 1);
    }
}

/// A worker asks for the sockets of `ports`, before it sends what opened these flows: so the thread beside it has a packet's whole way to
/// the other end and back to bind them. Where that may be too late the worker binds. It allocates nothing.
pub(crate) fn request_masqueraded(shared: &Shared, ports: &[MasqueradePort]) {
    if ports.is_empty() {
        return;
    }
    let mut lost = 0;
    for port in ports {
        let room = shared.masquerade_sockets.load(Ordering::Relaxed) < MASQUERADE_SOCKETS_MAX as u64;
        let socket = match port.bind {
            // If it is in use, another flow's socket is there already: ports are reused for other destinations. If not, the thread
            // tries as well, and counts.
            Bind::BeforeSending if room => bind_port(masquerade_address(port)).ok(),
            Bind::BeforeSending | Bind::Soon => None,
        };
        lost += u64::from(shared.masquerade_ports.push((*port, socket)).is_err());
    }
    shared.masquerade_ports_lost.fetch_add(lost, Ordering::Relaxed);
    shared.netstack.wake();
}

/// Where replies of a masqueraded flow arrive.
fn masquerade_address(port: &MasqueradePort) -> SocketAddr {
    SocketAddr::new(port.reply.dst.ip(), port.reply.dst_port)
}

/// Hands a packet from a socket to worker 0.
fn deliver(shared: &Shared, packet: &[u8]) {
    if !shared.inboxes[0].send(&shared.pool, std::iter::once(packet), Offload::default(), Origin::Ingress(Ingress::Socket)) {
        own_counters(shared).dropped(DropReason::HandOffFull, 1);
    }
}

/// The counters behind the workers', of which this thread is the only writer.
fn own_counters(shared: &Shared) -> &Counters {
    shared.counters.last().expect("there is one set of counters more than there are workers")
}
