//! A cluster on one machine: nodes, their underlay, pods and an outside client, each in a network namespace, with the real `podgate`
//! on every node and real programs that talk. `podgate demo`, the integration tests and the benchmarks are built on it.
//!
//! ```text
//!                         underlay 192.0.2.0/24, 2001:db8::/64 (a bridge)
//!        ┌──────────────────────┬───────────────┴──────┬──────────────────────┐
//!   node-1 .1              node-2 .2                node-N .N            outside .200
//!   podgate                podgate                  podgate
//!   pods a1 b1             pods a2 b2               pods aN bN
//! ```
//!
//! Each node has its own configuration and directory of manifests, and pods are attached by `podgate attach`, so that the way is the
//! one an operator goes. A lab lives in a [`Sandbox`], which leaves nothing behind whatever happens; no program but `podgate` itself
//! is needed.

pub mod checks;
mod live;
pub mod machine;
pub mod manifest;
pub mod matrix;
pub mod node;
pub mod program;
pub mod sandbox;

mod error;

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use nix::sys::signal::Signal;
use podgate_runtime::ethtool::{self, Switch};

pub use error::LabError;
pub use machine::{Dual, Machine};
pub use node::{ClusterRanges, Node, NodeSettings};
pub use sandbox::Sandbox;

use crate::netlink::{Family, Netlink};
use machine::{ETH0, Underlay, default_routes, fresh_netns};
use manifest::{EndpointSpec, NodeSpec, ServiceSpec, TrafficPolicy};

/// The name of the outside client.
pub const OUTSIDE: &str = "outside";

/// A running cluster.
pub struct Lab {
    directory: PathBuf,
    underlay: Underlay,
    nodes: Vec<Node>,
    outside: Machine,
    pods: Mutex<Vec<Arc<Pod>>>,
    services: Mutex<Vec<ServiceSpec>>,
    settings: NodeSettings,
}

/// A pod: a machine on a node.
pub struct Pod {
    machine: Machine,
    node: usize,
}

/// How a lab is to be.
#[derive(Clone, Debug)]
pub struct Builder {
    directory: PathBuf,
    binary: PathBuf,
    nodes: u8,
    pods: Vec<String>,
    mtu: u32,
    settings: NodeSettings,
}

/// What happens while a lab is built, for whoever watches.
pub type Progress<'a> = dyn Fn(&str) + 'a;

impl Builder {
    /// With so many nodes, 1 to 100; 2 unless told otherwise.
    pub fn nodes(mut self, nodes: u8) -> Builder {
        self.nodes = nodes.clamp(1, 100);
        self
    }

    /// With pods of these names on each node, each followed by the node's number; `a` and `b` unless told otherwise.
    pub fn pods<'a>(mut self, names: impl IntoIterator<Item = &'a str>) -> Builder {
        self.pods = names.into_iter().map(str::to_owned).collect();
        self
    }

    /// With this MTU on the underlay; 1,500 unless told otherwise.
    pub fn mtu(mut self, mtu: u32) -> Builder {
        self.mtu = mtu;
        self
    }

    /// With daemons configured so.
    pub fn settings(mut self, settings: NodeSettings) -> Builder {
        self.settings = settings;
        self
    }

    /// In a directory of this name, for several labs in one sandbox.
    pub fn named(mut self, name: &str) -> Builder {
        self.directory.push(name);
        self
    }

    /// The machines and their network, without any daemon or pod.
    pub fn machines(self) -> Result<Lab, LabError> {
        let Builder { directory, binary, nodes, mtu, settings, .. } = self;
        let mounts = directory.join("netns");
        fs::create_dir_all(&mounts).map_err(|source| LabError::File { path: mounts.clone(), source })?;
        let underlay = Underlay::new(&mounts, mtu)?;
        let (netns, path) = fresh_netns(&mounts, OUTSIDE)?;
        let outside = Machine::new(OUTSIDE, netns, path, underlay_addresses(200));
        underlay.connect(&outside)?;
        let mut all = Vec::new();
        for number in 1..=nodes {
            let name = format!("node-{number}");
            let (netns, path) = fresh_netns(&mounts, &name)?;
            let machine = Machine::new(&name, netns, path, underlay_addresses(number));
            underlay.connect(&machine)?;
            default_routes(&machine, outside.addresses())?;
            let pod_cidrs = vec![format!("10.244.{number}.0/24"), format!("fd00:77:{number}::/64")];
            let spec = NodeSpec { name: name.clone(), addresses: machine.addresses(), pod_cidrs };
            let gateway = Dual { v4: Ipv4Addr::new(10, 244, number, 1), v6: Ipv6Addr::new(0xfd00, 0x77, number.into(), 0, 0, 0, 0, 1) };
            all.push(Node::new(machine, spec, gateway, directory.join(&name), binary.clone())?);
        }
        Ok(Lab { directory, underlay, nodes: all, outside, pods: Mutex::default(), services: Mutex::default(), settings })
    }

    /// The whole cluster: machines, daemons, pods, services and servers, ready to talk.
    pub fn build(self, progress: &Progress<'_>) -> Result<Lab, LabError> {
        let pods = self.pods.clone();
        progress(&format!("making {} nodes and an outside client, in namespaces on one underlay", self.nodes));
        let lab = self.machines()?;
        progress("starting podgate on each node");
        for node in &lab.nodes {
            node.configure(&lab.settings, &Lab::ranges())?;
            lab.write_nodes(node)?;
            node.prepare()?;
            node.launch(&lab.settings)?;
        }
        for node in &lab.nodes {
            node.wait_ready()?;
        }
        progress("attaching pods");
        for number in 0..lab.nodes.len() {
            for name in &pods {
                lab.attach(number, &format!("{name}{}", number + 1))?;
            }
        }
        progress("starting a server in every pod, on every node and outside");
        lab.outside.serve()?;
        for node in &lab.nodes {
            node.machine().serve()?;
        }
        for pod in lab.pods() {
            pod.machine.serve()?;
        }
        progress("declaring services");
        lab.set_services(lab.standard_services())?;
        Ok(lab)
    }
}

impl Lab {
    /// How to begin: in `sandbox`, with `binary` as the `podgate` program.
    pub fn builder(sandbox: &Sandbox, binary: &Path) -> Builder {
        Builder {
            directory: sandbox.directory().to_owned(),
            binary: binary.to_owned(),
            nodes: 2,
            pods: vec!["a".into(), "b".into()],
            mtu: 1500,
            settings: NodeSettings::default(),
        }
    }

    /// The cluster's ranges.
    pub fn ranges() -> ClusterRanges {
        ClusterRanges { pods: "[10.244.0.0/16, \"fd00:77::/32\"]".into(), services: "[10.96.0.0/16, \"fd00:96::/112\"]".into() }
    }

    /// Where its files are: `netns/` with every machine's namespace, and a directory for each node.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Every node.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node of this number, from 1, as in its name.
    ///
    /// # Panics
    /// If there is none.
    pub fn node(&self, number: usize) -> &Node {
        &self.nodes[number - 1]
    }

    /// The outside client.
    pub fn outside(&self) -> &Machine {
        &self.outside
    }

    /// The nodes' network.
    pub fn underlay(&self) -> &Underlay {
        &self.underlay
    }

    /// Every pod.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The pod called `name`.
    pub fn pod(&self, name: &str) -> Result<Arc<Pod>, LabError> {
        let pods = self.pods();
        let found = pods.iter().find(|pod| pod.name() == name).cloned();
        found.ok_or_else(|| LabError::NoSuchMachine { name: name.to_owned(), known: join(pods.iter().map(|pod| pod.name())) })
    }

    /// What the daemons were started with.
    pub fn settings(&self) -> &NodeSettings {
        &self.settings
    }

    /// The services as they are declared.
    pub fn services(&self) -> Vec<ServiceSpec> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The service called `name`.
    pub fn service(&self, name: &str) -> Result<ServiceSpec, LabError> {
        let services = self.services();
        let found = services.iter().find(|service| service.name == name).cloned();
        found.ok_or_else(|| LabError::NoSuchMachine { name: name.to_owned(), known: join(services.iter().map(|service| service.name.as_str())) })
    }

    /// Makes a pod's namespace and attaches it to the node of this index (from 0) with `podgate attach`.
    pub fn attach(&self, node: usize, name: &str) -> Result<Arc<Pod>, LabError> {
        self.attach_with(node, name, &[])
    }

    /// The same with further arguments of `podgate attach`.
    pub fn attach_with(&self, node: usize, name: &str, further: &[&str]) -> Result<Arc<Pod>, LabError> {
        let (netns, path) = fresh_netns(&self.directory.join("netns"), name)?;
        let host = &self.nodes[node];
        let (path_text, full_name) = (path.display().to_string(), format!("{}/{name}", manifest::NAMESPACE));
        let arguments = [&["attach", "--netns", &path_text, "--name", &full_name], further].concat();
        // It prints the CNI result, which is JSON.
        let result = host.podgate(&arguments)?;
        let parsed = serde_json::from_str(&result).map_err(|error| error.to_string()).and_then(|value| addresses_of(&value));
        let addresses = parsed.map_err(|what| host.bad_output(&arguments, what, result))?;
        let pod = Arc::new(Pod { machine: Machine::new(name, netns, path, addresses), node });
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&pod));
        Ok(pod)
    }

    /// Takes a pod off its node with `podgate detach`.
    pub fn detach(&self, name: &str) -> Result<(), LabError> {
        let pod = self.pod(name)?;
        self.nodes[pod.node].podgate(&["detach", "--netns", &pod.machine.path().display().to_string()])?;
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| other.name() != name);
        Ok(())
    }

    /// Declares these services, and no others, on every node whose daemon runs, and waits until each knows them.
    pub fn set_services(&self, services: Vec<ServiceSpec>) -> Result<(), LabError> {
        let text: String = services.iter().map(manifest::service).collect();
        let running = || self.nodes.iter().filter(|node| node.running());
        for node in running() {
            node.write_manifest("services.yaml", &text)?;
        }
        for node in running() {
            self.wait_for_services(node, &services)?;
        }
        *self.services.lock().unwrap_or_else(PoisonError::into_inner) = services;
        Ok(())
    }

    /// The services with which every path can be taken: `web` (every pod), `one-pod` (the first pod), `one-host` (a process on node-1)
    /// and `local` (the first pod, policy Local).
    pub fn standard_services(&self) -> Vec<ServiceSpec> {
        let pods = self.pods();
        let endpoint = |pod: &Arc<Pod>| EndpointSpec { addresses: pod.machine.addresses(), node: self.nodes[pod.node].name().to_owned() };
        let first: Vec<EndpointSpec> = pods.first().map(endpoint).into_iter().collect();
        let host = &self.nodes[0];
        let process = EndpointSpec { addresses: host.machine().addresses(), node: host.name().to_owned() };
        let service = |name: &str, number: u8, policy, endpoints| ServiceSpec {
            name: name.to_owned(),
            vips: Dual { v4: Ipv4Addr::new(10, 96, 0, number), v6: Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number.into()) },
            node_port: 30000 + u16::from(number),
            policy,
            endpoints,
        };
        vec![
            service("web", 10, TrafficPolicy::Cluster, pods.iter().map(endpoint).collect()),
            service("one-pod", 20, TrafficPolicy::Cluster, first.clone()),
            service("one-host", 30, TrafficPolicy::Cluster, vec![process]),
            service("local", 40, TrafficPolicy::Local, first),
        ]
    }

    /// A further machine on the underlay, `number` (1 to 254) being the end of its addresses.
    pub fn add_machine(&self, name: &str, number: u8) -> Result<Machine, LabError> {
        let (netns, path) = fresh_netns(&self.directory.join("netns"), name)?;
        let machine = Machine::new(name, netns, path, underlay_addresses(number));
        self.underlay.connect(&machine)?;
        Ok(machine)
    }

    /// Switches offloads of a node's uplink, on both ends of its veth.
    pub fn set_offloads(&self, node: &Node, wanted: &[(&str, Switch)]) -> Result<(), LabError> {
        let failed = |source| LabError::Program { what: format!("the offloads of {}", node.name()), source };
        node.machine().run(|| ethtool::set_features(ETH0, wanted))?.map_err(failed)?;
        let port = self.underlay.netns().run(|| ethtool::set_features(node.name(), wanted)).map_err(failed)?;
        port.map_err(failed)
    }

    /// A handle on a node's gateway namespace.
    pub fn gateway_netlink(&self, node: &Node) -> Result<Netlink, LabError> {
        let netns = podgate_runtime::netns::Netns::open(node.gateway_netns())?;
        Netlink::open(&netns).map_err(|source| LabError::Netlink { machine: format!("the gateway of {}", node.name()), source })
    }

    /// Ends a node's daemon with `signal` and starts it again; returns when it is ready.
    pub fn restart(&self, node: &Node, signal: Signal) -> Result<Duration, LabError> {
        let start = Instant::now();
        node.end(signal)?;
        node.launch(&self.settings)?;
        node.wait_ready()?;
        Ok(start.elapsed())
    }

    fn write_nodes(&self, node: &Node) -> Result<(), LabError> {
        let text: String = self.nodes.iter().map(|node| manifest::node(node.spec())).collect();
        node.write_manifest("nodes.yaml", &text)
    }

    /// The tables are complete when `podgate backends` lists the endpoints of every service, and no other.
    fn wait_for_services(&self, node: &Node, services: &[ServiceSpec]) -> Result<(), LabError> {
        let patience = Duration::from_secs(10);
        let what = || format!("the declared services on {}", node.name());
        wait_until(patience, what, || {
            let listed = node.podgate(&["services", "-o", "json"])?;
            let backends = node.query(&["backends"])?;
            let differs = services.iter().find(|service| {
                let name = format!("{}/{}:tcp", manifest::NAMESPACE, service.name);
                let rows = backends["backends"].as_array().into_iter().flatten().filter(|row| row["service"] == *name);
                let known: BTreeSet<&str> = rows.filter_map(|row| row["address"].as_str()).collect();
                let addresses = |endpoint: &EndpointSpec| Family::BOTH.map(|family| endpoint.addresses.server(family).to_string());
                let wanted: BTreeSet<String> = service.endpoints.iter().flat_map(addresses).collect();
                !listed.contains(&service.name) || !known.iter().eq(wanted.iter())
            });
            Ok(differs.map(|service| format!("{}: `podgate backends` says {backends}", service.name)))
        })
    }
}

impl Pod {
    /// Its machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.machine.name()
    }

    /// The index of its node, from 0.
    pub fn node(&self) -> usize {
        self.node
    }
}

/// Asks `look` again and again until it has nothing to object to.
pub fn wait_until(patience: Duration, what: impl Fn() -> String, mut look: impl FnMut() -> Result<Option<String>, LabError>) -> Result<(), LabError> {
    let start = Instant::now();
    loop {
        match look()? {
            None => return Ok(()),
            Some(detail) if start.elapsed() > patience => {
                return Err(LabError::TooLate { what: what(), seconds: patience.as_secs(), detail: format!(": {detail}") });
            }
            Some(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn underlay_addresses(number: u8) -> Dual {
    Dual { v4: Ipv4Addr::new(192, 0, 2, number), v6: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into()) }
}

/// From a CNI result: `ips: [{address: "10.244.1.2/32"}, …]`.
fn addresses_of(result: &serde_json::Value) -> Result<Dual, String> {
    let texts = result["ips"].as_array().into_iter().flatten().filter_map(|ip| ip["address"].as_str());
    let networks: Vec<IpNetwork> = texts.filter_map(|text| text.parse().ok()).collect();
    let v4 = networks.iter().find_map(|network| if let IpNetwork::V4(v4) = network { Some(v4.ip()) } else { None });
    let v6 = networks.iter().find_map(|network| if let IpNetwork::V6(v6) = network { Some(v6.ip()) } else { None });
    Ok(Dual { v4: v4.ok_or("no IPv4 address in ips")?, v6: v6.ok_or("no IPv6 address in ips")? })
}

fn join<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_from_a_cni_result() {
        let result = serde_json::json!({"cniVersion": "1.1.0", "ips": [{"address": "10.244.1.2/32"}, {"address": "fd00:77:1::2/128"}]});
        let dual = addresses_of(&result).unwrap();
        assert_eq!((dual.v4.to_string(), dual.v6.to_string()), ("10.244.1.2".into(), "fd00:77:1::2".into()));
        assert!(addresses_of(&serde_json::json!({"ips": []})).is_err());
    }
}
