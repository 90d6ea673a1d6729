//! Every path a packet can take through the cluster, who must answer on it, and whom the answering server must see.
//!
//! The rules for the client's address are those of the Kubernetes service proxies, with SNAT inside the cluster by a gateway's own
//! address: what comes from outside (another node is outside) or from a pod to a node port is seen as the dialled node's gateway; a node
//! that dials its own node port is seen as itself, unless the answer would then go past the gateway. See [`Lab::paths`], which is a table.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use serde::Serialize;

use super::manifest::SERVICE_PORT;
use super::program::{Answer, ExchangeError, PORT, client, median, ping};
use super::{Dual, Lab, LabError, Machine};
use crate::netlink::Family;

/// One thing that was tried.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// What belongs together.
    pub group: String,
    /// What was tried: unique in a run.
    pub name: String,
    /// Whether it held.
    pub ok: bool,
    /// What was seen.
    pub detail: String,
    /// The median of a few round trips.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_micros: Option<u64>,
}

/// A way from a client to a server.
#[derive(Clone, Debug)]
pub struct Path {
    /// What belongs together.
    pub group: &'static str,
    /// What it is.
    pub name: String,
    /// The machine that dials.
    pub client: String,
    /// What it dials.
    pub target: Dual,
    /// The port it dials.
    pub port: u16,
    /// Which server must answer.
    pub server: String,
    /// Which client the server must see.
    pub seen: Dual,
    /// What a ping of the same address meets.
    pub echo: EchoBy,
}

/// Who answers an echo request to a path's target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EchoBy {
    /// The server's machine, which must see the same client as for TCP and UDP.
    Server,
    /// The gateway, for a VIP.
    Gateway,
    /// The node that was dialled, for a node port.
    Node,
}

/// A protocol, and how much of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A connection that carries 300,000 bytes there and back.
    Tcp,
    /// A datagram that fits a packet.
    Udp,
    /// A datagram of 9,000 bytes, in fragments.
    UdpFragments,
    /// An echo request.
    Icmp,
    /// An echo request of 9,000 bytes, in fragments.
    IcmpFragments,
}

/// How large the data of a TCP exchange are: several superframes.
const TCP_LEN: usize = 300_000;
const UDP_LEN: usize = 1000;
const FRAGMENTED_LEN: usize = 9000;
const PATIENCE: Duration = Duration::from_secs(2);
const TRIES: u32 = 2;
/// How many round trips make a median.
const SAMPLES: usize = 5;

impl Probe {
    /// Every one.
    pub const ALL: [Probe; 5] = [Probe::Tcp, Probe::Udp, Probe::UdpFragments, Probe::Icmp, Probe::IcmpFragments];

    /// Its name in checks.
    pub const fn name(self) -> &'static str {
        match self {
            Probe::Tcp => "TCP",
            Probe::Udp => "UDP",
            Probe::UdpFragments => "UDP in fragments",
            Probe::Icmp => "ICMP",
            Probe::IcmpFragments => "ICMP in fragments",
        }
    }
}

impl Lab {
    /// Every path. With one node, those that need another are missing.
    pub fn paths(&self) -> Result<Vec<Path>, LabError> {
        let pod = |name: &str| self.pod(name).map(|pod| pod.machine().addresses());
        let node = |number: usize| self.node(number).machine().addresses();
        let gateway = |number: usize| self.node(number).gateway();
        let outside = self.outside().addresses();
        let (one_pod, one_host, local) = (self.service("one-pod")?, self.service("one-host")?, self.service("local")?);
        let (a1, b1) = (pod("a1")?, pod("b1")?);
        use EchoBy::{Gateway, Node, Server};
        let row = |group, name: &str, client: &str, target, port, server: &str, seen, echo| Path {
            group,
            name: name.to_owned(),
            client: client.to_owned(),
            target,
            port,
            server: server.to_owned(),
            seen,
            echo,
        };
        const PODS: &str = "pods and nodes, no NAT";
        const VIP: &str = "service VIPs";
        const NODE_PORT: &str = "node ports";
        const OUT: &str = "to the outside, masqueraded";
        let mut paths = vec![
            row(PODS, "pod to pod, same node", "b1", a1, PORT, "a1", b1, Server),
            row(PODS, "node to its pod", "node-1", a1, PORT, "a1", node(1), Server),
            row(PODS, "pod to its node", "a1", node(1), PORT, "node-1", a1, Server),
            row(VIP, "pod to VIP, backend on the same node", "b1", one_pod.vips, SERVICE_PORT, "a1", b1, Gateway),
            row(VIP, "pod to VIP, backend the client itself", "a1", one_pod.vips, SERVICE_PORT, "a1", gateway(1), Gateway),
            row(VIP, "pod to VIP, backend a process on its node", "a1", one_host.vips, SERVICE_PORT, "node-1", a1, Gateway),
            row(VIP, "node to VIP, backend its pod", "node-1", one_pod.vips, SERVICE_PORT, "a1", node(1), Gateway),
            row(VIP, "node to VIP, backend a process on itself", "node-1", one_host.vips, SERVICE_PORT, "node-1", gateway(1), Gateway),
            row(NODE_PORT, "outside to node port, backend on that node", "outside", node(1), one_pod.node_port, "a1", gateway(1), Node),
            row(NODE_PORT, "outside to node port, backend a process there", "outside", node(1), one_host.node_port, "node-1", gateway(1), Node),
            row(NODE_PORT, "outside to node port, policy Local", "outside", node(1), local.node_port, "a1", outside, Node),
            row(NODE_PORT, "node to its own node port, backend its pod", "node-1", node(1), one_pod.node_port, "a1", node(1), Node),
            row(
                NODE_PORT,
                "node to its own node port, backend a process on itself",
                "node-1",
                node(1),
                one_host.node_port,
                "node-1",
                gateway(1),
                Node,
            ),
            row(NODE_PORT, "pod to its node's node port, backend on the same node", "b1", node(1), one_pod.node_port, "a1", gateway(1), Node),
            row(NODE_PORT, "pod to its node's node port, backend the client itself", "a1", node(1), one_pod.node_port, "a1", gateway(1), Node),
            row(OUT, "pod to the outside", "a1", outside, PORT, "outside", node(1), Server),
        ];
        if self.nodes().len() > 1 {
            let a2 = pod("a2")?;
            paths.extend([
                row(PODS, "pod to pod, other node", "a2", a1, PORT, "a1", a2, Server),
                row(PODS, "node to a pod of another node", "node-2", a1, PORT, "a1", node(2), Server),
                row(PODS, "pod to another node", "a1", node(2), PORT, "node-2", a1, Server),
                row(VIP, "pod to VIP, backend on another node", "a2", one_pod.vips, SERVICE_PORT, "a1", a2, Gateway),
                row(VIP, "pod to VIP, backend a process on another node", "a2", one_host.vips, SERVICE_PORT, "node-1", a2, Gateway),
                row(VIP, "node to VIP, backend a pod of another node", "node-2", one_pod.vips, SERVICE_PORT, "a1", node(2), Gateway),
                row(VIP, "node to VIP, backend a process on another node", "node-2", one_host.vips, SERVICE_PORT, "node-1", gateway(2), Gateway),
                row(NODE_PORT, "outside to node port, backend on another node", "outside", node(2), one_pod.node_port, "a1", gateway(2), Node),
                row(
                    NODE_PORT,
                    "outside to node port, backend a process on another node",
                    "outside",
                    node(2),
                    one_host.node_port,
                    "node-1",
                    gateway(2),
                    Node,
                ),
                row(NODE_PORT, "node to its own node port, backend on another node", "node-2", node(2), one_pod.node_port, "a1", node(2), Node),
                row(NODE_PORT, "node to another node's node port", "node-2", node(1), one_pod.node_port, "a1", gateway(1), Node),
                row(NODE_PORT, "pod to its node's node port, backend on another node", "a2", node(2), one_pod.node_port, "a1", gateway(2), Node),
                row(NODE_PORT, "pod to another node's node port, backend there", "a2", node(1), one_pod.node_port, "a1", gateway(1), Node),
                row(NODE_PORT, "pod to another node's node port, backend on its own node", "b1", node(2), one_pod.node_port, "a1", gateway(2), Node),
                row(OUT, "pod of another node to the outside", "a2", outside, PORT, "outside", node(2), Server),
            ]);
        }
        paths.sort_by_key(|path| [PODS, VIP, NODE_PORT, OUT].iter().position(|group| *group == path.group));
        Ok(paths)
    }

    /// Runs `work` for the machine called `name`.
    pub fn with_machine<T>(&self, name: &str, work: impl FnOnce(&Machine) -> T) -> Result<T, LabError> {
        if name == super::OUTSIDE {
            return Ok(work(self.outside()));
        }
        if let Some(node) = self.nodes().iter().find(|node| node.name() == name) {
            return Ok(work(node.machine()));
        }
        Ok(work(self.pod(name)?.machine()))
    }

    /// Takes `path` with `probe` over `family` and compares what came of it with what must.
    pub fn check_path(&self, path: &Path, family: Family, probe: Probe) -> Result<Check, LabError> {
        let to = SocketAddr::new(path.target.of(family), path.port);
        let outcome = self.with_machine(&path.client, |machine| machine.run(|| self.try_path(path, family, probe, to)))???;
        let name = format!("{}, {} {family}", path.name, probe.name());
        Ok(match outcome {
            Ok((detail, latency)) => {
                Check { group: path.group.to_owned(), name, ok: true, detail, latency_micros: latency.map(|latency| latency.as_micros() as u64) }
            }
            Err(detail) => {
                Check { group: path.group.to_owned(), name, ok: false, detail: format!("{} to {to}: {detail}", path.client), latency_micros: None }
            }
        })
    }

    /// The exchanges of [`Lab::check_path`], in the client's namespace.
    #[allow(clippy::type_complexity, reason = "what was seen, or what was wrong; used in one place")]
    fn try_path(&self, path: &Path, family: Family, probe: Probe, to: SocketAddr) -> Result<Result<(String, Option<Duration>), String>, LabError> {
        if matches!(probe, Probe::Icmp | Probe::IcmpFragments) {
            return self.try_echo(path, family, probe, to.ip());
        }
        let (len, exchange): (usize, fn(SocketAddr, usize) -> Result<Answer, ExchangeError>) = match probe {
            Probe::Tcp => (TCP_LEN, |to, len| client::tcp(to, len, PATIENCE)),
            Probe::UdpFragments => (FRAGMENTED_LEN, |to, len| client::udp(to, len, TRIES, PATIENCE)),
            _ => (UDP_LEN, |to, len| client::udp(to, len, TRIES, PATIENCE)),
        };
        let answer = match exchange(to, len) {
            Ok(answer) => answer,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let expected = path.seen.of(family);
        if answer.server != path.server {
            return Ok(Err(format!("{} answered instead of {}", answer.server, path.server)));
        }
        if answer.seen.ip() != expected {
            return Ok(Err(format!("{} saw {} as the client, which should be {expected}", answer.server, answer.seen.ip())));
        }
        let small = if probe == Probe::Tcp { 1 } else { len };
        let samples = (1..SAMPLES).filter_map(|_| exchange(to, small).ok()).map(|answer| answer.latency).chain([answer.latency]).collect();
        Ok(Ok((format!("{} answered {len} bytes unharmed and saw {}", answer.server, answer.seen), median(samples))))
    }

    #[allow(clippy::type_complexity, reason = "as try_path")]
    fn try_echo(&self, path: &Path, family: Family, probe: Probe, to: IpAddr) -> Result<Result<(String, Option<Duration>), String>, LabError> {
        let len = if probe == Probe::IcmpFragments { FRAGMENTED_LEN } else { 56 };
        let first = ping::ping(to, len, PATIENCE).or_else(|_| ping::ping(to, len, PATIENCE));
        let reply = match first {
            Ok(reply) => reply,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let expected = path.seen.of(family);
        let seen = match path.echo {
            EchoBy::Server => {
                // The answer was made by the kernel; the server's note of the request may be a moment behind it.
                let look = || self.with_machine(&path.server, |machine| machine.server().and_then(|server| server.pinged_by(reply.mark)));
                let mut seen = look()?;
                for _ in 0..100 {
                    if seen.is_some() {
                        break;
                    }
                    thread::sleep(Duration::from_millis(5));
                    seen = look()?;
                }
                seen
            }
            EchoBy::Gateway | EchoBy::Node => None,
        };
        match (path.echo, seen) {
            (EchoBy::Server, None) => return Ok(Err(format!("an echo came back, but not from {}", path.server))),
            (EchoBy::Server, Some(seen)) if seen != expected => {
                return Ok(Err(format!("{} was pinged by {seen}, which should be {expected}", path.server)));
            }
            _ => {}
        }
        let samples = (1..SAMPLES).filter_map(|_| ping::ping(to, len, PATIENCE).ok()).map(|reply| reply.latency).chain([reply.latency]).collect();
        let who = match path.echo {
            EchoBy::Server => format!("{} answered and saw {expected}", path.server),
            EchoBy::Gateway => "the gateway answered for the VIP".to_owned(),
            EchoBy::Node => "the node answered".to_owned(),
        };
        Ok(Ok((format!("{who}, {len} bytes unharmed"), median(samples))))
    }

    /// Every path with every probe over both families, a few at a time; the order is the table's.
    pub fn check_paths(&self, paths: &[Path], probes: &[Probe], progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Vec<Check>, LabError> {
        let mut work = Vec::new();
        for path in paths {
            for family in Family::BOTH {
                work.extend(probes.iter().map(|probe| (path, family, *probe)));
            }
        }
        run_all(work, progress, |(path, family, probe)| self.check_path(path, family, probe))
    }
}

/// How many exchanges run at once: waiting for a lost answer must not hold up the others, yet latencies are to mean something.
const AT_ONCE: usize = 4;

/// Runs `run` on each of `work`, a few at a time, and gives the results in the order of the work.
pub fn run_all<W: Send, T: Send>(
    work: Vec<W>,
    progress: &(dyn Fn(usize, usize) + Sync),
    run: impl Fn(W) -> Result<T, LabError> + Sync,
) -> Result<Vec<T>, LabError> {
    let total = work.len();
    let queue = Mutex::new(work.into_iter().enumerate());
    let done: Mutex<BTreeMap<usize, Result<T, LabError>>> = Mutex::default();
    let count = AtomicUsize::new(0);
    let next = || queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
    thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(total) {
            scope.spawn(|| {
                while let Some((place, item)) = next() {
                    let result = run(item);
                    done.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(place, result);
                    progress(count.fetch_add(1, Ordering::Relaxed) + 1, total);
                }
            });
        }
    });
    done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).into_values().collect()
}
