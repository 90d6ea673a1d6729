//! The daemon: brings the node's gateway up, and keeps it as the cluster and the machine want it.
//!
//! One thread, no locks. [`run`] takes the stages in the order in which they depend on each other; from then on `Daemon::refresh` is
//! called whenever anything changed (the cluster's objects, the machine's addresses, the pods), and compares desired with published
//! state: it never trusts a delta.

mod answers;
mod attachments;
mod demands;
mod devices;
pub(crate) mod flows;
mod heralds;
mod host_ports;
mod limits;
mod lock;
pub(crate) mod machine;
mod metrics;
mod pod_tuns;
mod probe;
mod progress;
mod published;
mod succession;
mod upkeep;
mod views;
mod watchers;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use podgate_cni::Response;
use podgate_runtime::flow_file::{FlowFile, Opened};
use podgate_runtime::netns::Netns;
use podgate_runtime::runtime::{DhcpClient, DhcpError, Reserve, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, watch};

use crate::api;
use crate::compile::{Compiled, LocalNode, Warning, compile, pod_mtu};
use crate::config::{Config, SourceConfig};
use crate::diff::History;
use crate::gateway_ns;
use crate::health::services::ServiceHealth;
use crate::health::{self, Health};
use crate::host_state::{HostState, boot_id};
use crate::install_cni::Places;
use crate::ipam::{Ipam, SystemClock};
use crate::keeper::{Store, names};
use crate::metrics::Programming;
use crate::model::ClusterState;
use crate::netlink::Netlink;
use crate::notify::Notifier;
use crate::pods::{Attached, Pods};
use crate::publish::Published;
use crate::routing::{self, RoutingPlan};
use crate::selftest::Check;
use crate::source::{self, FirstLook, NodeReport, SourceStatus, Tenure};
use demands::{local_node, report, routing_plan, udp_ports};
use devices::{Devices, start_dataplane};
use limits::PodLimits;
pub use lock::{Lock, lock};
use machine::Machine;
use pod_tuns::Plugged;
use progress::Known;
use published::Publisher;
pub use succession::{Predecessor, SOCKET as HANDOVER_SOCKET};
use succession::{Successor, Successors};

/// How often everything is compared again though nothing said that it changed.
const AUDIT_INTERVAL: Duration = Duration::from_secs(30);

/// How long a path is taken to be narrow (RFC 1191 §6.3).
const PATH_MTU_LIFETIME: Duration = Duration::from_secs(600);

/// How a gateway is started.
#[derive(Debug)]
pub struct Start {
    /// What is done about one that runs already.
    pub predecessor: Predecessor,
    /// What an earlier one left, and where what the next one needs is kept.
    pub store: Store,
    /// Where the CNI configuration goes when the node is ready, if that is this process's to do.
    pub cni: Option<Places>,
}

/// Refuses where the node's namespace has another gateway's routes: two would take each other's away for ever. So would a cleanup.
pub fn refuse_beside_another(netlink: &Netlink, host_device: &str) -> anyhow::Result<()> {
    for family in crate::netlink::Family::BOTH {
        for route in netlink.routes(family, routing::HOST_TABLE)? {
            if let Some(other) = route.spec.device.filter(|other| other != host_device) {
                anyhow::bail!(
                    "this network namespace has a gateway already: routing table {} leads to `{other}`, and `devices.host` is `{host_device}`. Use the \
                     podgate.yaml of that gateway; or stop it and run `podgate cleanup` with it first",
                    routing::HOST_TABLE
                );
            }
        }
    }
    Ok(())
}

/// `podgate run`: returns after SIGTERM or SIGINT, with everything left in place. One that has handed the node over waits for its turn again.
pub fn run(config: Config, start: Start) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        raise_file_limit();
        let mut stop = Stop { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? };
        tokio::spawn(heralds::watchdog(Notifier::from_environment()?));
        let mut start = Rc::new(start);
        loop {
            let local = tokio::task::LocalSet::new();
            let Some(successor) = local.run_until(run_here(config.clone(), start.clone(), &mut stop)).await? else { return Ok(()) };
            // Nobody but the successor has anything of the node's when it hears of it.
            drop(local);
            start.store.clear();
            start = Rc::new(Start {
                predecessor: Predecessor::Awaited,
                store: Store::new(Notifier::from_environment()?, Vec::new()),
                cni: start.cni.clone(),
            });
            drop(successor);
        }
    })
}

/// Whoever wants this process to end.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Returns when it is to end; or with the successor that has the node, as soon as nobody here touches it any more.
async fn run_here(config: Config, start: Rc<Start>, stop: &mut Stop) -> anyhow::Result<Option<Successor>> {
    let notifier = Notifier::from_environment()?;
    let store = &start.store;
    let cpus = machine::workers(config.workers.as_ref())?;
    let resumes = store.names().iter().any(|name| name == names::LOCK);
    // Whoever takes over from a predecessor knows the cluster before it: the pause must not last as long as an API server takes to list, least
    // of all one that is away. In etcd a node cannot be registered twice, so there its turn comes first.
    let informed_first = start.predecessor != Predecessor::Refused && !resumes && !matches!(config.source, SourceConfig::Etcd(_));
    let mut turn = None;
    if !informed_first {
        // With etcd the whole start lies in the pause, which is too long for one that waits with its workers stopped.
        let predecessor = if start.predecessor == Predecessor::Relieved { Predecessor::Awaited } else { start.predecessor };
        turn = Some(tokio::select! {
            turn = succession::take(&config.runtime_dir, predecessor, store, cpus.len() as u16) => turn?,
            () = stop.asked() => return Ok(None),
        });
    }
    let node_netns = Netns::current()?;
    let node_netlink = Netlink::open(&node_netns)?;
    refuse_beside_another(&node_netlink, &config.devices.host)?;
    let mut machine = Machine::look(&node_netlink, &config)?;
    for address in &machine.addresses {
        config.accepts_node_address(*address)?;
    }
    // It tells other nodes of this one, and so needs to know it.
    let report = NodeReport { underlay: machine.underlay.clone(), underlay_mtu: machine.underlay_mtu, ..NodeReport::default() };
    // It may have to wait for its origin; whoever wants to end that must be heard.
    let look = if resumes { FirstLook::Briefly } else { FirstLook::ForNews };
    let mut source = tokio::select! {
        source = source::start(&config, report, look) => source?,
        () = stop.asked() => return Ok(None),
    };
    let token = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), std::process::id());
    let mut compiled = None;
    let reserve = Reserve::default();
    let turn = match turn {
        Some(turn) => turn,
        None => {
            // All tables but for the pods: what is compiled afterwards is little.
            let alone = Arc::new(local_node(&config, &machine, (Vec::new(), Vec::new()), BTreeMap::new(), token, cpus.len() as u16));
            compiled = Some(compile(&Compiled::empty(&alone), &source.state.borrow_and_update().clone(), &alone));
            let turn = tokio::select! {
                turn = succession::take(&config.runtime_dir, start.predecessor, store, cpus.len() as u16) => turn?,
                () = stop.asked() => return Ok(None),
            };
            // That may have taken long.
            machine = Machine::look(&node_netlink, &config)?;
            turn
        }
    };
    let succession::Turn { lock: _lock, predecessor } = turn;
    let gateway = gateway_ns::open_or_prepare(&config.runtime_dir, store.take(names::NETNS))?;
    let gateway_netns = gateway.netns().try_clone()?;
    let gateway_netlink = Netlink::open(&gateway_netns)?;
    let kept = store.keep(names::LOCK, &_lock).and_then(|()| store.keep(names::NETNS, &gateway_netns));
    if let Err(error) = kept {
        tracing::warn!(%error, "what is to outlive this process is not kept");
    }

    let mut pods = Pods::open(gateway, &config.runtime_dir, &config.state_dir, cpus.len() as u16).map_err(|error| {
        let remedy = "restore it, or run `podgate cleanup` and attach the pods again";
        anyhow::anyhow!("what is attached to this node is not known: {error}; {remedy}")
    })?;
    // Closed before anything is in it, then the devices, then what leads to them.
    let devices = Devices { node_netns, node_netlink, gateway_netns, gateway_netlink };
    let tuns = devices.open(&config, cpus.len() as u16, store)?;
    let mut pod_limits = PodLimits::default();
    let tables = pod_limits.tables(&pods);
    let local = Arc::new(local_node(&config, &machine, (tables, host_ports::of(&pods)), BTreeMap::new(), token, cpus.len() as u16));
    let source_state = source.state.borrow_and_update().clone();
    // A predecessor's flows to services of the node's own go on.
    let mut publisher = Publisher::default();
    let merged = published::merged(&mut publisher, &config, (&machine, &pods), &source_state);
    let compiled = compile(&compiled.unwrap_or_else(|| Compiled::empty(&local)), &merged.cluster, &local);
    let (flow_file, opened) = FlowFile::open(config.runtime_dir.join("flows"), config.flows.capacity as usize)?;
    if let Some(predecessor) = &predecessor {
        predecessor.in_time()?;
    }
    let pod_tuns = pod_tuns::begin(&mut pods, store);
    // Before anything leads to it: a port that is taken must not leave the node with rules that lead nowhere.
    let dataplane = start_dataplane(&config, &machine, &devices, tuns, (&cpus, store, reserve), flow_file, (&compiled, pod_tuns))?;
    if let Some(predecessor) = predecessor {
        predecessor.forwarding().await?;
        if let Err(error) = store.deposit() {
            tracing::warn!(%error, "what is to outlive this process is not kept");
        }
    }
    match &opened {
        Opened::Fresh => tracing::info!("flow table: new"),
        Opened::Recovered(found) => tracing::info!(flows = found.live, discarded = found.discarded, "flow table: taken over"),
        Opened::Replaced(reason) => tracing::warn!("flow table: the one found could not be used, so open flows are lost: {reason}"),
    }
    let mut host_state = HostState::load(&config.state_dir)?;
    let health = Arc::new(Health::new(SystemTime::now()));
    health::serve(config.health, &machine.addresses, health.clone()).await?;
    let listener = api::bind(&config.socket())?;
    let mut successors = Successors::listen(&config.runtime_dir)?;
    match store.forget_unknown() {
        Ok(unknown) => unknown.iter().for_each(|name| tracing::info!(name, "what an earlier gateway left under this name is of no use")),
        Err(error) => tracing::warn!(%error, "what an earlier gateway left is kept though it is of no use"),
    }

    let ranges = &compiled.snapshot.node.node_pod_cidrs;
    let (mut ipam, recovered) = Ipam::open(&config.state_dir, ranges, &config.ipam, &boot_id(), Box::new(SystemClock))?;
    for what in recovered {
        tracing::warn!("{what}");
    }
    // No problem of this node's: one file may serve all of them.
    for what in ipam.warnings() {
        tracing::info!("{what}");
    }
    // A predecessor may have been killed between giving out an address and attaching, or its journal been cut short since.
    for found in ipam.fix(&attachments::holders(&pods))? {
        tracing::warn!(address = %found.address, owner = %found.owner, fixed = found.fixed, "{}", found.problem);
    }
    devices.settle_node(&config, &machine, &mut host_state)?;
    let mut inner = Inner {
        machine,
        local,
        cluster: merged.cluster,
        source_state,
        published: merged.told,
        history: History::new(compiled.snapshot.generation.0),
        programming: Programming::new(SystemTime::now()),
        health_check_problems: BTreeSet::new(),
        compiled,
        pods,
        pod_limits,
        ipam,
        host_state,
        narrow_paths: BTreeMap::new(),
        source_status: source.status.borrow_and_update().clone(),
        checks: Vec::new(),
        problems: merged.problems,
        warned: BTreeSet::new(),
        warned_of: Arc::new([]),
    };
    inner.note_closed();
    let (plan, reconciler) = devices.reconcile(&config, &mut inner)?;
    let daemon = Rc::new(Daemon {
        changed: Notify::new(),
        ready: Cell::new(false),
        started: Instant::now(),
        token,
        cpus,
        devices,
        service_health: tokio::sync::Mutex::new(ServiceHealth::new(health.clone())),
        health,
        inner: RefCell::new(inner),
        plan,
        machine_is_stale: Cell::new(false),
        refreshes: Refreshes::default(),
        leaving: Cell::new(0),
        dataplane: RefCell::new(Some(Arc::new(dataplane))),
        cni: start.cni.clone(),
        start: start.clone(),
        changes: tokio::sync::RwLock::default(),
        notifier,
        tenure: source.tenure.clone(),
        report: source.report.clone(),
        forwards: source.forwards.clone(),
        publisher: RefCell::new(publisher),
        config,
    });
    daemon.log_changes();
    daemon.follow_source();
    daemon.serve_udp_ports();
    let known = Known::of(&daemon.inner.borrow());
    daemon.note_changes(&known);
    daemon.serve_health_checks().await;
    daemon.upkeep().await;
    daemon.relay_dhcp()?;
    source.announce(daemon.inner.borrow().machine.announced(&daemon.config));
    tokio::task::spawn_local(api::serve(listener, daemon.clone()));
    tokio::task::spawn_local(probe::run(daemon.clone()));
    tokio::task::spawn_local(watchers::watch_kernel(daemon.clone(), reconciler));
    tokio::task::spawn_local(watchers::watch_paths(daemon.clone()));
    tokio::task::spawn_local(metrics::run(daemon.clone()));
    tracing::info!(node = %daemon.config.node, socket = %daemon.config.socket().display(), "running");
    daemon.notifier.ready();
    daemon.notifier.status("proving that it forwards");

    let mut audit = tokio::time::interval(AUDIT_INTERVAL);
    let verdict_changed = daemon.publisher.borrow().changed();
    loop {
        tokio::select! {
            () = stop.asked() => break,
            Some(successor) = successors.next() => {
                if let Some(successor) = daemon.hand_over(successor).await {
                    daemon.notifier.status("handed the node over; waiting for its turn");
                    return Ok(Some(successor));
                }
            }
            changed = source.state.changed() => changed?,
            changed = source.status.changed() => changed?,
            () = verdict_changed.notified() => {}
            () = daemon.changed.notified() => daemon.machine_is_stale.set(true),
            _ = audit.tick() => {
                daemon.machine_is_stale.set(true);
                daemon.upkeep().await;
            }
        }
        {
            let inner = &mut *daemon.inner.borrow_mut();
            inner.source_state = source.state.borrow_and_update().clone();
            inner.source_status = source.status.borrow_and_update().clone();
        }
        daemon.refresh().await;
        source.announce(daemon.inner.borrow().machine.announced(&daemon.config));
    }
    daemon.notifier.stopping();
    tracing::info!("stopping; devices, rules, pods and flows stay for a successor (`podgate cleanup` removes them)");
    daemon.dataplane.borrow_mut().take();
    for socket in [&*daemon.config.socket(), successors.path()] {
        let _ = std::fs::remove_file(socket);
    }
    Ok(None)
}

/// Sockets for masqueraded datagrams in fragments are many; the usual soft limit of 1,024 descriptors is there for select(2), which nobody
/// here calls.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// The running daemon.
pub(crate) struct Daemon {
    config: Config,
    token: u64,
    cpus: Vec<Option<usize>>,
    devices: Devices,
    health: Arc<Health>,
    service_health: tokio::sync::Mutex<ServiceHealth>,
    started: Instant,
    ready: Cell<bool>,
    /// Something changed that `refresh` is to look at.
    changed: Notify,
    /// The reconciler's plan.
    plan: watch::Sender<RoutingPlan>,
    inner: RefCell<Inner>,
    /// Whether addresses or links may be others than [`Inner::machine`] says: the kernel tells, and each audit looks.
    machine_is_stale: Cell<bool>,
    refreshes: Refreshes,
    /// How many attachments are being detached: their addresses are theirs until the workers know.
    leaving: Cell<usize>,
    /// Which addresses may be given out, where that depends on others.
    tenure: Option<watch::Receiver<Tenure>>,
    /// Where the CNI configuration goes when the node is ready.
    cni: Option<Places>,
    notifier: Notifier,
    /// How it was started; what is to outlive it is in the store.
    start: Rc<Start>,
    /// Whoever changes what is attached reads; whoever hands the node over, or opens its devices again, writes.
    changes: tokio::sync::RwLock<()>,
    /// What the source tells others of this node.
    report: watch::Sender<NodeReport>,
    /// Where it is said that the node forwards, as soon as it does.
    forwards: watch::Sender<bool>,
    publisher: RefCell<Publisher>,
    /// `None` only while it is being replaced.
    dataplane: RefCell<Option<Arc<Runtime>>>,
}

/// Refreshes in their order: how many have been asked for, and up to which of them is done.
#[derive(Default)]
struct Refreshes {
    turn: tokio::sync::Mutex<()>,
    asked: Cell<u64>,
    done: Cell<u64>,
}

struct Inner {
    machine: Machine,
    local: Arc<LocalNode>,
    /// What the source says, with this node's own slices in it.
    cluster: Arc<ClusterState>,
    source_state: Arc<ClusterState>,
    /// Those of them that others are told of.
    published: Vec<Published>,
    compiled: Compiled,
    history: History,
    programming: Programming,
    pods: Pods,
    pod_limits: PodLimits,
    ipam: Ipam,
    host_state: HostState,
    /// Paths found to be narrower than the underlay, and when.
    narrow_paths: BTreeMap<IpAddr, (u32, Instant)>,
    source_status: SourceStatus,
    checks: Vec<Check>,
    /// What is wrong and does not come from the self-test.
    problems: BTreeSet<String>,
    /// Health check ports that cannot be served.
    health_check_problems: BTreeSet<String>,
    /// Warnings that have been logged.
    warned: BTreeSet<String>,
    /// What they were made from.
    warned_of: Arc<[Warning]>,
}

impl Inner {
    /// The MTU of each path that is known to be narrow. What was found long ago is forgotten: the path may have widened.
    fn path_mtus(&mut self) -> BTreeMap<IpAddr, u32> {
        self.narrow_paths.retain(|_, (_, found)| found.elapsed() < PATH_MTU_LIFETIME);
        self.narrow_paths.iter().map(|(peer, (mtu, _))| (*peer, *mtu)).collect()
    }
}

impl Daemon {
    fn dataplane(&self) -> Result<Arc<Runtime>, Response> {
        self.dataplane.borrow().clone().ok_or_else(|| answers::error(11, "the dataplane is being restarted; try again".into()))
    }

    /// Compiles what there is, publishes it if it differs, and brings rules, routes and sockets in step. Whoever asks while another's is
    /// under way shares the next one: a hundred pods that come at once cost a few publications, not a hundred.
    async fn refresh(&self) {
        let mine = self.refreshes.asked.get() + 1;
        self.refreshes.asked.set(mine);
        let _turn = self.refreshes.turn.lock().await;
        if self.refreshes.done.get() >= mine {
            return;
        }
        let covers = self.refreshes.asked.get();
        self.refresh_now().await;
        self.refreshes.done.set(covers);
    }

    async fn refresh_now(&self) {
        let start = Instant::now();
        let before = {
            let mut inner = self.inner.borrow_mut();
            // All that leave at once, before the tables and whoever waits learn that they have gone.
            for error in inner.pods.sweep_leaving() {
                tracing::error!(%error, "a pod that is to go");
            }
            if self.machine_is_stale.take() {
                self.look_at_machine(&mut inner);
            }
            let inner = &mut *inner;
            let path_mtus = inner.path_mtus();
            let pods = (inner.pod_limits.tables(&inner.pods), host_ports::of(&inner.pods));
            let local = local_node(&self.config, &inner.machine, pods, path_mtus, self.token, self.cpus.len() as u16);
            if *inner.local != local {
                inner.local = Arc::new(local);
            }
            published::merge(&mut self.publisher.borrow_mut(), &self.config, inner);
            let before = Known::of(inner);
            inner.compiled = compile(&inner.compiled, &inner.cluster, &inner.local);
            before
        };
        self.log_changes();
        self.route();
        let plugged = self.plug_tuns();
        let generation = self.inner.borrow().compiled.snapshot.generation;
        if generation == before.generation {
            if plugged == Plugged::Changed
                && let Ok(dataplane) = self.dataplane()
            {
                dataplane.publish_again();
            }
            self.note_changes(&before);
        } else {
            self.health.queued(start);
            self.publish(generation, &before).await;
        }
        self.settle();
        // Not sooner: a pod that has just come can be reached from now on.
        self.publisher.borrow_mut().begin(&self.config);
        self.serve_health_checks().await;
        self.follow_source();
    }

    fn look_at_machine(&self, inner: &mut Inner) {
        match Machine::look(&self.devices.node_netlink, &self.config) {
            Ok(machine) => {
                if machine != inner.machine {
                    tracing::info!(addresses = ?machine.addresses, uplinks = ?machine.uplinks, mtu = machine.underlay_mtu, "this node's addresses changed");
                    inner.machine = machine;
                    if let Err(error) = self.devices.settle_node(&self.config, &inner.machine, &mut inner.host_state) {
                        tracing::error!(%error, "uplinks");
                    }
                }
                inner.problems.retain(|problem| !problem.starts_with("underlay"));
            }
            // What was known stays in force: an address that is being moved comes back.
            Err(error) => {
                inner.problems.insert(format!("underlay: {error}"));
            }
        }
    }

    fn log_changes(&self) {
        let inner = &mut *self.inner.borrow_mut();
        for change in &*inner.compiled.changes {
            tracing::info!("{change}");
        }
        if Arc::ptr_eq(&inner.compiled.warnings, &inner.warned_of) {
            return;
        }
        let warnings: BTreeSet<String> = inner.compiled.warnings.iter().map(ToString::to_string).collect();
        for warning in warnings.difference(&inner.warned) {
            tracing::warn!("{warning}");
        }
        inner.warned = warnings;
        inner.warned_of = inner.compiled.warnings.clone();
    }

    /// Tells the reconciler what rules and routes there are to be.
    fn route(&self) {
        let plan = routing_plan(&self.config, &self.inner.borrow());
        self.plan.send_if_modified(|known| {
            let differs = *known != plan;
            *known = plan;
            differs
        });
    }

    /// The DHCP relay serves the pods whose addresses are leased.
    fn relay_dhcp(&self) -> Result<(), DhcpError> {
        let client = |pod: &Attached| DhcpClient { veth: pod.veth.clone(), mac: pod.pod_mac.0 };
        let clients: Vec<DhcpClient> = self.inner.borrow().pods.list().filter(|pod| pod.leases).map(client).collect();
        match self.dataplane() {
            Ok(dataplane) => dataplane.set_dhcp(self.config.dhcp_servers.clone(), clients),
            // Whoever replaces it asks again.
            Err(_) => Ok(()),
        }
    }

    /// Sockets for UDP node ports.
    fn serve_udp_ports(&self) {
        if let Ok(dataplane) = self.dataplane() {
            dataplane.set_udp_ports(udp_ports(&self.inner.borrow().compiled));
        }
    }

    /// Address pools follow this node's pod ranges.
    fn follow_source(&self) {
        let inner = &mut *self.inner.borrow_mut();
        let cidrs = inner.compiled.snapshot.node.node_pod_cidrs.clone();
        inner.problems.retain(|problem| !problem.starts_with("addresses"));
        let said = format!("Node {}:", self.config.node);
        if cidrs.is_empty() && inner.warned.iter().any(|warning| warning.starts_with(&said)) {
            // Said once is enough.
        } else if cidrs.is_empty() {
            let name = &self.config.node;
            inner.problems.insert(format!(
                "addresses: this node has no pod range yet; the source needs a Node {name} with spec.podCIDRs inside {}",
                self.config.pod_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            ));
        } else if let Err(error) = inner.ipam.set_ranges(&cidrs) {
            inner.problems.insert(format!("addresses: {error}"));
        }
        if self.tenure.is_some() && !cidrs.is_empty() {
            let lost = |address: &&IpAddr| !cidrs.iter().any(|cidr| cidr.contains(**address));
            let strangers = inner.pods.list().flat_map(|pod| pod.addresses.iter().filter(lost).map(move |address| (&pod.name, address)));
            let said = strangers.map(|(pod, address)| {
                format!("addresses: {pod} has {address}, of a block that went to another node while this one was away; detach it and attach it again")
            });
            inner.problems.extend(said.collect::<Vec<_>>());
        }
        if !self.report.is_closed() {
            let report = report(inner);
            self.report.send_if_modified(|known| std::mem::replace(known, report.clone()) != report);
        }
        inner.problems.retain(|problem| !problem.starts_with("source"));
        let errors: Vec<String> = inner.source_status.errors.iter().map(|error| format!("source: {error}")).collect();
        inner.problems.extend(errors);
    }

    /// Takes note of what the self-test found.
    fn note_checks(&self, checks: Vec<Check>) {
        let vital = checks.iter().filter(|check| check.vital).all(|check| check.ok);
        let ready = vital && !checks.is_empty() && self.inner.borrow().source_status.complete;
        for check in &checks {
            let known = self.inner.borrow().checks.iter().find(|old| old.name == check.name).map(|old| old.ok);
            match (known, check.ok) {
                (Some(true) | None, false) => tracing::error!("self-test {}: {}", check.name, check.detail),
                (Some(false), true) => tracing::info!("self-test {}: passes again", check.name),
                _ => {}
            }
        }
        if ready != self.ready.replace(ready) {
            tracing::info!(ready, "readiness");
            self.notifier.status(if ready { "forwarding" } else { "not ready: `podgate status` says what is missing" });
            if ready {
                self.promise();
                self.forwards.send_replace(true);
            }
        }
        self.inner.borrow_mut().checks = checks;
    }

    fn pod_mtu(&self, machine: &Machine) -> u32 {
        pod_mtu(&machine.underlay, machine.underlay_mtu)
    }
}
