//! The dataplane as the control side sees it: start it, publish snapshots to it, read from it, stop it.
//!
//! [`Runtime::start`] starts one thread for each worker and one for the port sockets and the gateway's own stack. Stopping leaves the
//! devices and the flow table as they are, for a successor: what workers have read goes its way, what they have not waits in the kernel.

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::utils::CachePadded;
use podgate_core::counters::Counters;
use podgate_core::flow::FlowTable;
use podgate_core::snapshot::{Generation, Snapshot};
use podgate_core::verdict::{TunId, WorkerId};

use crate::clock;
use crate::dhcp::Served;
pub use crate::dhcp::{DhcpClient, DhcpError};
use crate::flow_file::{FlowFile, HugePages};
use crate::huge_pages;
use crate::netns::Netns;
use crate::netstack::StatusPage;
use crate::pod_tun::Patchbay;
pub use crate::pod_tun::{PodTun, PodTunError, PodTunStatus};
pub use crate::ports::PortProblem;
use crate::ports::{DhcpWish, Ports, Wishes};
use crate::publish::{self, Publisher};
use crate::tun::{Attachment, Queue, Tun, TunError};
use crate::udp::Overlay;
use crate::vnet::VnetHeader;
pub use crate::worker::features::{FeatureState, FeatureStatus};
use crate::worker::handoff::{Inbox, Pool};
pub use crate::worker::latency::Latency;
use crate::worker::shared::Shared;
use crate::worker::{self, Station};

/// What a dataplane is made of.
pub struct Options {
    /// For each worker the CPU that it is to run on, if any.
    pub workers: Vec<Option<usize>>,
    /// For how long a worker that has nothing to do looks for more before it sleeps, at most. Worth it where there are processors to spare.
    pub spin: Duration,
    /// The TUN `pods`, up, with as many queues as there are workers.
    pub pods: Tun,
    /// Its namespace.
    pub pods_netns: Netns,
    /// The pods that have a TUN of their own, by the numbers that the snapshot names.
    pub pod_tuns: Vec<(TunId, PodTun)>,
    /// The TUN `host`, up, with as many queues as there are workers.
    pub host: Tun,
    /// The overlay's sockets, for as many workers.
    pub overlay: Overlay,
    /// The flow table.
    pub flows: FlowFile,
    /// The first snapshot: known before the first packet is read.
    pub snapshot: Arc<Snapshot>,
    /// What pods see at `http://GATEWAY/`.
    pub status_page: StatusPage,
    /// Memory for packets on their way between threads.
    pub reserve: Reserve,
}

/// Memory that takes longer to be had than everything else (16 MiB, some 20 ms): to be reserved before packets wait.
#[derive(Default)]
pub struct Reserve(Pool);

/// Why the dataplane did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No worker, or more than there can be.
    #[error("{0} workers were asked for: configure between 1 and {max}", max = u16::MAX)]
    WorkerCount(usize),
    /// A TUN has not one queue for each worker, or the overlay not its sockets.
    #[error("{name} has {queues} queues for {workers} workers: open it with one for each")]
    Queues {
        /// The device.
        name: String,
        /// Its queues.
        queues: usize,
        /// The workers.
        workers: usize,
    },
    /// The pods' own TUNs.
    #[error(transparent)]
    PodTuns(#[from] PodTunError),
    /// The kernel refused a descriptor or a thread.
    #[error("cannot {step}: {source}; look at the limits of open files and threads (`ulimit -n -u`)")]
    System {
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// One worker, for status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerStatus {
    /// The CPU that it was given.
    pub cpu: Option<usize>,
    /// Whether it runs there.
    pub pinned: bool,
    /// Whether its thread runs.
    pub alive: bool,
    /// Milliseconds since it last looked at all its sources. An idle one looks every 50 ms; more than a second means that it is stuck.
    pub silent_ms: u64,
    /// How often it was started again after a panic.
    pub restarts: u64,
    /// The generation that it used last.
    pub generation: Generation,
    /// Batches that it processed.
    pub batches: u64,
    /// Frames that it read.
    pub frames: u64,
    /// errno of the last read that failed for another reason than that there was nothing to read; 0 if none did. EBADFD (77) means
    /// that a TUN was deleted.
    pub read_error: i32,
}

/// What the kernel dropped on our devices and sockets: rows beside the named drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct KernelDrops {
    /// Frames for the TUN `pods`, and for those inside pods, that found their queue full.
    pub pods_queue: u64,
    /// Frames for the TUN `host` that found its queue full.
    pub host_queue: u64,
    /// Datagrams from peers that found a socket's buffer full.
    pub overlay_sockets: u64,
    /// Datagrams and ICMP messages that found a port socket's buffer full.
    pub port_sockets: u64,
}

/// A running dataplane.
pub struct Runtime {
    shared: Arc<Shared>,
    wishes: Arc<Wishes>,
    publisher: Mutex<Publisher>,
    patchbay: Mutex<Patchbay>,
    cpus: Vec<Option<usize>>,
    pods_netns: Netns,
    host_netns: Netns,
    names: [String; 2],
    spares: Mutex<Vec<Option<Box<Latency>>>>,
    latency: Mutex<Latency>,
    dhcp_clients: Mutex<Vec<DhcpClient>>,
    threads: Vec<JoinHandle<()>>,
}

impl Runtime {
    /// Starts the workers. The calling thread is in the node's network namespace.
    pub fn start(options: Options) -> Result<Runtime, StartError> {
        let Options { workers: cpus, spin, mut pods, pods_netns, pod_tuns, mut host, overlay, flows, snapshot, status_page, reserve } = options;
        let count = u16::try_from(cpus.len()).ok().filter(|count| *count > 0).ok_or(StartError::WorkerCount(cpus.len()))?;
        let (pods_queues, host_queues) = (take_queues(&mut pods, count)?, take_queues(&mut host, count)?);
        let system = |step| move |source| StartError::System { step, source };
        let host_netns =
            Netns::current().map_err(|error| StartError::System { step: "find the node's network namespace", source: io::Error::other(error) })?;

        let Overlay { receivers, sender } = overlay;
        if receivers.len() != usize::from(count) {
            return Err(StartError::Queues { name: "overlay".to_owned(), queues: receivers.len(), workers: count.into() });
        }
        let shared = Arc::new(Shared::new(flows, pods_queues, host_queues, sender, reserve.0));
        let (pods_features, host_features) = (pods.features(), host.features());
        if !(pods_features.tso && host_features.tso) {
            shared.offers.tso.absent();
        }
        if !(pods_features.uso && host_features.uso) {
            shared.offers.uso.absent();
        }

        let mut patchbay = Patchbay::new(count);
        pod_tuns.into_iter().try_for_each(|(id, tun)| patchbay.insert(id, tun))?;
        let (publisher, mut readers) = publish::channel_with(Arc::clone(&snapshot), patchbay.table(), usize::from(count) + 1);
        let ports_reader = readers.pop().expect("one reader more than workers");
        // Everything that can fail is done before the first thread starts, but for the threads themselves.
        let mut stations = Vec::new();
        for (index, (reader, receivers)) in readers.into_iter().zip(receivers).enumerate() {
            let station = Station::new(&shared, WorkerId(index as u16), cpus[index], reader, receivers, spin);
            stations.push(station.map_err(system("make a worker's poll"))?);
        }
        let wishes = Arc::new(Wishes::default());
        let ports = Ports::new(Arc::clone(&shared), Arc::clone(&wishes), &snapshot, status_page, &host.name)
            .map_err(system("make the poll of the port sockets"))?;

        let mut runtime = Runtime {
            shared: Arc::clone(&shared),
            wishes,
            publisher: Mutex::new(publisher),
            patchbay: Mutex::new(patchbay),
            pods_netns,
            host_netns,
            names: [pods.name.clone(), host.name.clone()],
            spares: Mutex::new(cpus.iter().map(|_| Some(Box::default())).collect()),
            latency: Mutex::new(Latency::default()),
            dhcp_clients: Mutex::default(),
            cpus,
            threads: Vec::new(),
        };
        // If a thread cannot be had, dropping `runtime` stops those that run.
        for (index, station) in stations.into_iter().enumerate() {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(format!("worker-{index}"));
            runtime.threads.push(thread.spawn(move || worker::run(shared, station)).map_err(system("start a worker's thread"))?);
        }
        let thread = std::thread::Builder::new().name("ports".to_owned());
        runtime.threads.push(thread.spawn(move || ports.run(&ports_reader)).map_err(system("start the thread of the port sockets"))?);
        let thread = std::thread::Builder::new().name("huge-pages".to_owned());
        let run = move || huge_pages::run(&shared.flows, &shared.stop);
        runtime.threads.push(thread.spawn(run).map_err(system("start the thread of the huge pages"))?);
        Ok(runtime)
    }

    /// Makes `snapshot` the one that every batch from now on is judged by.
    ///
    /// # Panics
    /// If its generation is not above the one in force.
    pub fn publish(&self, snapshot: Arc<Snapshot>) {
        let tuns = self.patchbay().table();
        self.publisher().publish_with(snapshot, tuns);
        // Idle workers take note at once, so that control does not wait for their next tick.
        for inbox in &self.shared.inboxes {
            inbox.wake();
        }
        self.shared.netstack.wake();
    }

    /// Takes a pod's own TUN into use, read by one worker and written by all, with the next publication: that of the snapshot that names it.
    pub fn plug(&self, id: TunId, tun: PodTun) -> Result<(), PodTunError> {
        self.patchbay().insert(id, tun)
    }

    /// Takes it out of use with the next publication. Its descriptor is closed by [`Runtime::close_unplugged`], when no worker has it any more.
    pub fn unplug(&self, id: TunId) {
        self.patchbay().remove(id);
    }

    /// Closes the TUNs that were unplugged and that no worker has any more. Costs nothing where there is none.
    pub fn close_unplugged(&self) {
        let mut patchbay = self.patchbay();
        if patchbay.close_left() {
            // What was published before may still hold them.
            self.publisher().reclaim();
            patchbay.close_left();
        }
    }

    /// The pods' own TUNs in use.
    pub fn pod_tuns(&self) -> Vec<PodTunStatus> {
        self.patchbay().status()
    }

    /// Makes the snapshot in force the one that every batch from now on is judged by, with the pods' TUNs that were plugged and unplugged.
    pub fn publish_again(&self) {
        let tuns = self.patchbay().table();
        self.publisher().publish_again(tuns);
        self.shared.inboxes.iter().for_each(Inbox::wake);
    }

    /// The generation that each worker used last. A worker between two packets takes note of a new one within 50 ms.
    pub fn generations(&self) -> Vec<Generation> {
        let mut publisher = self.publisher();
        publisher.reclaim();
        let mut seen = publisher.seen();
        // The last reader is the port sockets' thread, which judges no packet.
        seen.truncate(self.cpus.len());
        seen
    }

    /// The snapshot in force.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.publisher().current()
    }

    /// Each worker's counters, and behind them those of the thread beside the workers.
    pub fn counters(&self) -> &[CachePadded<Counters>] {
        &self.shared.counters
    }

    /// Each worker's state.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        let generations = self.generations();
        let seats = self.shared.seats.iter().zip(&self.cpus).zip(&self.shared.counters).zip(generations);
        seats
            .map(|(((seat, cpu), counters), generation)| WorkerStatus {
                cpu: *cpu,
                pinned: seat.pinned.load(Ordering::Relaxed),
                alive: seat.alive.load(Ordering::Relaxed),
                silent_ms: clock::Instant::read().ms().saturating_sub(seat.round_ms.load(Ordering::Relaxed)),
                restarts: seat.restarts.load(Ordering::Relaxed),
                generation,
                batches: counters.batches.value(),
                frames: counters.pods_rx.frames.value() + counters.host_rx.frames.value() + counters.overlay_rx.frames.value(),
                read_error: seat.read_error.load(Ordering::Relaxed),
            })
            .collect()
    }

    /// The flow table.
    pub fn flows(&self) -> FlowTable<'_> {
        self.shared.flows.table()
    }

    /// How much of the flow table's memory is on huge pages: all of it some seconds after the start, where the kernel does that.
    pub fn huge_pages(&self) -> HugePages {
        self.shared.flows.huge_pages()
    }

    /// The offloads in use.
    pub fn features(&self) -> FeatureStatus {
        self.shared.offers.status()
    }

    /// Paths that turned out narrower than their peer's MTU says, since the last call: the peer's underlay address and the MTU of the
    /// path to it, outer headers included. Publish a snapshot with the peer's MTU lowered, and its senders are told.
    pub fn path_mtus(&self) -> Vec<(IpAddr, u32)> {
        std::iter::from_fn(|| self.shared.path_mtus.pop()).collect()
    }

    /// The workers' histograms since the start. A worker that does not answer within 200 ms (it is stuck) is left out this time.
    pub fn latency(&self) -> Latency {
        let mut spares = self.spares.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut total = self.latency.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for ((seat, inbox), spare) in self.shared.seats.iter().zip(&self.shared.inboxes).zip(spares.iter_mut()) {
            seat.exchange.ask(spare);
            inbox.wake();
        }
        let deadline = Instant::now() + Duration::from_millis(200);
        loop {
            for (seat, spare) in self.shared.seats.iter().zip(spares.iter_mut()) {
                if let Some(full) = seat.exchange.answer() {
                    total.merge(&full);
                    *spare = Some(full);
                }
            }
            if spares.iter().all(Option::is_some) || Instant::now() >= deadline {
                return total.clone();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The UDP ports of the node whose fragmented datagrams are the gateway's: node ports and host ports, each with its address. Bound
    /// by and by; see [`Runtime::port_problems`].
    pub fn set_udp_ports(&self, ports: Vec<SocketAddr>) {
        self.wishes.set_udp_ports(ports);
        self.shared.netstack.wake();
    }

    /// Relays DHCP between these pods and these servers, and no others. Whoever is new is listened to before this returns.
    pub fn set_dhcp(&self, servers: Vec<Ipv4Addr>, clients: Vec<DhcpClient>) -> Result<(), DhcpError> {
        let mut known = self.dhcp_clients.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let news = clients.iter().filter(|client| !known.contains(client));
        let news = news.map(|client| Served::listen(&self.pods_netns, client)).collect::<Result<Vec<_>, _>>()?;
        known.clone_from(&clients);
        self.wishes.set_dhcp(DhcpWish { servers, clients, news });
        self.shared.netstack.wake();
        Ok(())
    }

    /// What is not served as it should be: UDP ports that a program of the node has, ICMP without the right to it.
    pub fn port_problems(&self) -> Vec<PortProblem> {
        self.wishes.problems()
    }

    /// Masquerade ports that have a socket, and how many flows have had to do without one.
    pub fn masquerade_sockets(&self) -> (u64, u64) {
        (self.shared.masquerade_sockets.load(Ordering::Relaxed), self.shared.masquerade_ports_lost.load(Ordering::Relaxed))
    }

    /// Writes a plain packet to the TUN `host`, as if the pipeline had sent it there: for probes.
    pub fn inject_host(&self, packet: &[u8]) -> io::Result<()> {
        self.shared.host[0].write(&VnetHeader::PLAIN, &[IoSlice::new(packet)])
    }

    /// Writes a plain packet to the TUN `pods`.
    pub fn inject_pods(&self, packet: &[u8]) -> io::Result<()> {
        self.shared.pods[0].write(&VnetHeader::PLAIN, &[IoSlice::new(packet)])
    }

    /// What the kernel dropped before a worker could read it.
    pub fn kernel_drops(&self) -> Result<KernelDrops, TunError> {
        let queue = |netns: &Netns, name: &str| Tun::losses(name, netns).map(|losses| losses.map_or(0, |losses| losses.queue_full));
        Ok(KernelDrops {
            pods_queue: queue(&self.pods_netns, &self.names[0])? + self.patchbay().queue_full(),
            host_queue: queue(&self.host_netns, &self.names[1])?,
            overlay_sockets: self.shared.seats.iter().map(|seat| seat.socket_drops.load(Ordering::Relaxed)).sum(),
            port_sockets: self.wishes.kernel_drops.load(Ordering::Relaxed),
        })
    }

    /// Takes a worker's queues off both devices, so that a stuck one loses no frames but those it holds, or puts them back.
    pub fn set_attachment(&self, worker: WorkerId, attachment: Attachment) -> io::Result<()> {
        let index = usize::from(worker.0);
        self.shared.pods[index].set_attachment(attachment)?;
        self.shared.host[index].set_attachment(attachment)
    }

    /// Takes the queues of all workers but the first `workers` off both devices: a successor with fewer has no use for them, and what would wait in
    /// them would be lost. What a worker has read of them goes its way.
    pub fn leave_queues(&self, workers: u16) {
        for worker in workers..self.cpus.len() as u16 {
            // One that stays attached loses what waits in it when the successor detaches it.
            let _ = self.set_attachment(WorkerId(worker), Attachment::Detached);
        }
    }

    /// Makes a worker panic, to see that it comes back and the others lose nothing.
    pub fn crash_worker(&self, worker: WorkerId) {
        let index = usize::from(worker.0);
        self.shared.seats[index].crash.store(true, Ordering::Relaxed);
        self.shared.inboxes[index].wake();
    }

    /// Stops all threads and waits for them. The devices, if persistent, and the flow table stay.
    pub fn stop(mut self) {
        self.join();
    }

    fn join(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for inbox in self.shared.inboxes.iter().chain([&self.shared.netstack]) {
            inbox.wake();
        }
        for thread in self.threads.drain(..) {
            // That of the huge pages rests parked.
            thread.thread().unpark();
            // A worker's panics are caught; that of another thread has been printed.
            let _ = thread.join();
        }
    }

    fn patchbay(&self) -> std::sync::MutexGuard<'_, Patchbay> {
        // Each of its changes is whole before anything can panic.
        self.patchbay.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn publisher(&self) -> std::sync::MutexGuard<'_, Publisher> {
        // A panic in `publish` (a generation used twice) leaves the publisher as it was.
        self.publisher.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        self.join();
    }
}

fn take_queues(tun: &mut Tun, workers: u16) -> Result<Vec<Queue>, StartError> {
    if tun.queues.len() != usize::from(workers) {
        return Err(StartError::Queues { name: tun.name.clone(), queues: tun.queues.len(), workers: workers.into() });
    }
    Ok(std::mem::take(&mut tun.queues))
}
