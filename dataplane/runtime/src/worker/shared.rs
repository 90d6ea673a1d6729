//! What the workers, the port sockets' thread and the control side share: counters, queues, flags. No lock is taken here by a worker.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64};

use crossbeam::queue::ArrayQueue;
use crossbeam::utils::CachePadded;
use podgate_core::counters::Counters;
use podgate_core::pipeline::MasqueradePort;
use socket2::Socket;

use super::features::Offers;
use super::handoff::{Inbox, Pool};
use super::latency::Exchange;
use crate::flow_file::FlowFile;
use crate::tun::Queue;
use crate::udp::Sender;

/// Masqueraded ports that wait to be bound; more are not bound, and counted.
const MASQUERADE_PORTS_LEN: usize = 1024;

/// Reports of paths whose MTU shrank that wait to be read.
const PATH_MTUS_LEN: usize = 64;

/// Everything that threads share.
pub(crate) struct Shared {
    pub(crate) flows: FlowFile,
    /// Each worker's, and behind them those of the thread beside the workers.
    pub(crate) counters: Box<[CachePadded<Counters>]>,
    /// A queue of each TUN for each worker; also what probes are written to.
    pub(crate) pods: Box<[Queue]>,
    pub(crate) host: Box<[Queue]>,
    /// The overlay's sending sockets.
    pub(crate) sender: Sender,
    pub(crate) inboxes: Box<[Inbox]>,
    pub(crate) seats: Box<[CachePadded<Seat>]>,
    /// Packets for the gateway's own stack.
    pub(crate) netstack: Inbox,
    pub(crate) pool: Pool,
    pub(crate) offers: Offers,
    /// Paths found to be narrower than their peer's MTU says: the peer's underlay address and the path's MTU.
    pub(crate) path_mtus: ArrayQueue<(IpAddr, u32)>,
    /// UDP flows whose masquerade port wants a socket, or has one that a worker bound: the socket's own buffer holds what arrives until
    /// the thread of the port sockets takes it over.
    pub(crate) masquerade_ports: ArrayQueue<(MasqueradePort, Option<Socket>)>,
    pub(crate) masquerade_ports_lost: AtomicU64,
    /// Masquerade ports that have a socket.
    pub(crate) masquerade_sockets: AtomicU64,
    pub(crate) stop: AtomicBool,
}

/// What is known of one worker from outside. All accesses are Relaxed: each value stands for itself.
#[derive(Default)]
pub(crate) struct Seat {
    pub(crate) alive: AtomicBool,
    pub(crate) restarts: AtomicU64,
    /// When it last went round its loop, in milliseconds of the boot clock.
    pub(crate) round_ms: AtomicU64,
    /// Whether it runs on the CPU it was given.
    pub(crate) pinned: AtomicBool,
    /// It is to panic, for a test of what happens then.
    pub(crate) crash: AtomicBool,
    /// errno of the last read from a TUN or socket that failed for another reason than that there was nothing; 0 if none did.
    pub(crate) read_error: AtomicI32,
    pub(crate) exchange: Exchange,
    /// Datagrams that the kernel dropped at its overlay sockets.
    pub(crate) socket_drops: AtomicU64,
}

impl Shared {
    pub(crate) fn new(flows: FlowFile, pods: Vec<Queue>, host: Vec<Queue>, sender: Sender, pool: Pool) -> Shared {
        let workers = pods.len();
        Shared {
            flows,
            counters: (0..workers + 1).map(|_| CachePadded::default()).collect(),
            pods: pods.into(),
            host: host.into(),
            sender,
            inboxes: (0..workers).map(|_| Inbox::new()).collect(),
            seats: (0..workers).map(|_| CachePadded::default()).collect(),
            netstack: Inbox::new(),
            pool,
            offers: Offers::default(),
            path_mtus: ArrayQueue::new(PATH_MTUS_LEN),
            masquerade_ports: ArrayQueue::new(MASQUERADE_PORTS_LEN),
            masquerade_ports_lost: AtomicU64::new(0),
            masquerade_sockets: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        }
    }
}
