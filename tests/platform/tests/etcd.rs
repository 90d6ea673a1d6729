//! Three bare machines that share a real etcd: how they come and go, what becomes of their blocks of addresses, and what they do without it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use nix::sys::signal::Signal;
use podgate::lab::manifest;
use podgate::lab::program::bulk::Ticker;
use podgate::lab::program::client;
use podgate::lab::{ClusterRanges, Lab, LabError, Machine, Node, wait_until};
use podgate::netlink::Family;
use podgate_testbed::need::program;
use podgate_testbed::tool::Running;
use podgate_testbed::{Bed, Need, Outcome, etcd, run};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);
/// As every node of this cluster has it: short, so that a test can wait for it.
const LEASE: Duration = Duration::from_secs(5);
const GRACE: Duration = Duration::from_secs(14);
/// A silent connection must be noticed within this.
const SILENCE: Duration = Duration::from_secs(35);
const ETCD: Need = Need::All(&[Need::Program("etcd"), Need::Program("etcdctl"), Need::Program("bridge")]);

static CLUSTER: OnceLock<Cluster> = OnceLock::new();

fn main() -> ExitCode {
    run(|tests| {
        tests.add_if(ETCD, "three nodes register, each has blocks of its own, and pods talk across nodes", join);
        tests.add_if(ETCD, "objects are applied, listed and deleted as with kubectl", objects);
        tests.add_if(ETCD, "a node that needs more addresses claims another block", demand);
        tests.add_if(ETCD, "a node that dies is missed by the others, and has its blocks again when it comes back in time", leave);
        tests.add_if(ETCD, "a partitioned node is fenced, loses its blocks after the grace period, and rejoins with others", partition);
        tests.add_if(ETCD, "a node that missed compacted history lists everything and is right again", compaction);
        tests.add_if(ETCD, "etcd is killed and restarted under traffic without loss, and a node that restarts meanwhile serves what it knew", outage);
        tests.add_if(
            Need::All(&[ETCD, Need::Program("openssl")]),
            "etcd with TLS, client certificates and users is spoken to, and refusals say what to do",
            secured,
        );
    })
}

/// The machines, and etcd on one of its own.
struct Cluster {
    lab: Lab,
    host: Machine,
    etcd: Mutex<Option<Child>>,
}

/// The cluster, with etcd and every daemon running whatever the test before came to.
fn cluster(bed: &Bed) -> Result<&'static Cluster, Box<dyn std::error::Error>> {
    if CLUSTER.get().is_none() {
        let lab = Lab::builder(bed.sandbox(), &bed.binary()).nodes(3).named("etcd").machines()?;
        let host = lab.add_machine("etcd", 250)?;
        let cluster = Cluster { lab, host, etcd: Mutex::new(None) };
        cluster.start_etcd()?;
        for node in cluster.lab.nodes() {
            cluster.configure(node)?;
            node.prepare()?;
        }
        // Tests run one after the other, so nobody else has set it.
        let _ = CLUSTER.set(cluster);
    }
    let cluster = CLUSTER.get().expect("it was set just now");
    cluster.heal()?;
    cluster.start_etcd()?;
    for node in cluster.lab.nodes().iter().filter(|node| !node.running()) {
        node.launch(cluster.lab.settings())?;
    }
    cluster.wait("every node among the nodes", || {
        let nodes = cluster.nodes()?;
        Ok((nodes.len() != 3 || nodes.values().any(|blocks| blocks.len() < 2)).then(|| format!("{nodes:?}")))
    })?;
    for node in cluster.lab.nodes() {
        node.wait_ready()?;
    }
    Ok(cluster)
}

impl Cluster {
    /// Small ranges, so that blocks are small: 10.244.0.0/24 has 16 of /28.
    fn configure(&self, node: &Node) -> Outcome {
        let ranges = ClusterRanges { pods: "[10.244.0.0/24, \"fd00:77::/64\"]".into(), services: Lab::ranges().services };
        node.configure(self.lab.settings(), &ranges)?;
        let text = fs::read_to_string(node.config())?;
        let directory = format!("source:\n  directory: {}\n", node.manifests().display());
        // Nobody listens at the first of the two.
        let etcd = format!(
            "source:\n  etcd: {{endpoints: ['http://192.0.2.250:2399', 'http://192.0.2.250:2379'], lease: {}s, grace: {}s}}\n",
            LEASE.as_secs(),
            GRACE.as_secs()
        );
        assert!(text.contains(&directory), "{text}");
        fs::write(node.config(), text.replace(&directory, &etcd))?;
        Ok(())
    }

    fn directory(&self) -> PathBuf {
        self.lab.directory().join("data")
    }

    fn start_etcd(&self) -> Outcome {
        let mut running = self.etcd.lock().unwrap_or_else(PoisonError::into_inner);
        if running.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None))) {
            return Ok(());
        }
        *running = Some(etcd::start(&self.host, &self.directory(), &["http://192.0.2.250:2379", "http://127.0.0.1:2379"], &[])?);
        drop(running);
        self.wait("an answer of etcd", || Ok(self.etcdctl(&["endpoint", "health"]).err().map(|error| error.to_string())))
    }

    fn kill_etcd(&self) -> Outcome {
        if let Some(mut child) = self.etcd.lock().unwrap_or_else(PoisonError::into_inner).take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    fn etcdctl(&self, arguments: &[&str]) -> Result<String, Box<dyn std::error::Error>> {
        let mut command = Command::new(program("etcdctl").ok_or("no etcdctl")?);
        command.env("ETCDCTL_API", "3").args(arguments);
        Ok(self.host.run(|| Running::start(command, b"").and_then(|running| running.end(PATIENCE)))??.success()?)
    }

    fn wait(&self, what: &str, look: impl FnMut() -> Result<Option<String>, LabError>) -> Outcome {
        Ok(wait_until(PATIENCE, || what.to_owned(), look)?)
    }

    /// `podgate WORDS --config …` on a node.
    fn podgate(&self, node: usize, words: &[&str]) -> Result<String, LabError> {
        let node = self.lab.node(node);
        node.podgate(&[words, &["--config", &node.config().display().to_string()]].concat())
    }

    /// The same where it must fail: what it says.
    fn refusal(&self, node: usize, words: &[&str]) -> Result<String, LabError> {
        let node = self.lab.node(node);
        let output = node.podgate_output(&[words, &["--config", &node.config().display().to_string()]].concat())?;
        assert!(!output.status.success(), "`podgate {}` succeeds: {}", words.join(" "), String::from_utf8_lossy(&output.stdout));
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn apply(&self, text: &str) -> Result<String, LabError> {
        let path = self.lab.directory().join("objects.yaml");
        fs::write(&path, text).map_err(|source| LabError::File { path: path.clone(), source })?;
        self.podgate(1, &["apply", "-f", &path.display().to_string()])
    }

    /// The nodes that are there and their blocks, which are nobody else's.
    fn nodes(&self) -> Result<BTreeMap<String, Vec<IpNetwork>>, LabError> {
        let list: Value = serde_json::from_str(&self.podgate(1, &["get", "nodes", "-o", "json"])?).expect("a list is JSON");
        let texts = |value: &Value| value.as_array().into_iter().flatten().filter_map(|v| v.as_str()?.parse().ok()).collect::<Vec<IpNetwork>>();
        let nodes = list["items"].as_array().into_iter().flatten();
        let nodes: BTreeMap<String, Vec<IpNetwork>> =
            nodes.map(|node| (node["metadata"]["name"].as_str().unwrap_or_default().to_owned(), texts(&node["spec"]["podCIDRs"]))).collect();
        let all: Vec<&IpNetwork> = nodes.values().flatten().collect();
        for (at, block) in all.iter().enumerate() {
            let twice = all[at + 1..].iter().find(|other| other.contains(block.network()) || block.contains(other.network()));
            assert!(twice.is_none(), "{block} is there twice: {nodes:?}");
        }
        Ok(nodes)
    }

    /// The ledger, as etcd has it: who holds which block.
    fn ledger(&self) -> Result<BTreeMap<String, String>, Box<dyn std::error::Error>> {
        let text = self.etcdctl(&["get", "--prefix", "/podgate/blocks/"])?;
        let lines: Vec<&str> = text.lines().collect();
        let node =
            |line: &str| serde_json::from_str::<Value>(line).ok().and_then(|value| Some(value["node"].as_str()?.to_owned())).unwrap_or_default();
        Ok(lines.chunks(2).filter(|pair| pair.len() == 2).map(|pair| (pair[0].to_owned(), node(pair[1]))).collect())
    }

    /// Keeps etcd and a node apart, silently: frames between the two ports of the bridge are dropped, all others pass.
    fn isolate(&self, node: &str, on: bool) -> Outcome {
        for port in [node, "etcd"] {
            let mut command = Command::new("bridge");
            command.args(["link", "set", "dev", port, "isolated", if on { "on" } else { "off" }]);
            self.lab.underlay().netns().run(|| Running::start(command, b"").and_then(|running| running.end(PATIENCE)))??.success()?;
        }
        Ok(())
    }

    fn heal(&self) -> Outcome {
        self.lab.nodes().iter().try_for_each(|node| self.isolate(node.name(), false))
    }

    /// A pod of that name, with a server; there already or made now.
    fn pod(&self, node: usize, name: &str) -> Result<std::sync::Arc<podgate::lab::Pod>, LabError> {
        let pod = match self.lab.pod(name) {
            Ok(pod) => pod,
            Err(_) => self.lab.attach(node - 1, name)?,
        };
        pod.machine().serve()?;
        Ok(pod)
    }

    /// a1, a2 and a3 behind the service `web`.
    fn web(&self) -> Outcome {
        for number in 1..=3 {
            self.pod(number, &format!("a{number}"))?;
        }
        let web = self.lab.standard_services().into_iter().find(|service| service.name == "web").ok_or("no web")?;
        let endpoints = ["a1", "a2", "a3"].map(|name| self.lab.pod(name).map(|pod| pod.machine().addresses()));
        let endpoints = endpoints.into_iter().collect::<Result<Vec<_>, _>>()?;
        let mut web = web;
        web.endpoints.retain(|endpoint| endpoints.contains(&endpoint.addresses));
        self.apply(&manifest::service(&web))?;
        for number in 1..=3 {
            self.wait_backends(number, &["a1", "a2", "a3"])?;
        }
        Ok(())
    }

    /// Which pods answer at the VIP of `web`, of 40 connections from a pod of that node, each of which must succeed.
    fn answering(&self, node: usize) -> Result<Result<BTreeSet<String>, String>, LabError> {
        let vip: SocketAddr = "10.96.0.10:80".parse().expect("an address");
        let pod = self.lab.pod(&format!("a{node}"))?;
        pod.machine().run(|| (0..40).map(|_| client::tcp(vip, 1, Duration::from_secs(2)).map(|a| a.server).map_err(|e| e.to_string())).collect())
    }

    fn wait_backends(&self, node: usize, names: &[&str]) -> Outcome {
        let wanted: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).collect();
        self.wait(&format!("{names:?} and no others at the VIP, as seen from node-{node}"), || {
            let answering = self.answering(node)?;
            Ok((answering.as_ref() != Ok(&wanted)).then(|| format!("{answering:?}")))
        })
    }

    /// Pods reach each other, on every node and over both families.
    fn all_talk(&self) -> Outcome {
        let names = ["a1", "a2", "a3"];
        for (from, to) in names.iter().flat_map(|from| names.map(|to| (*from, to))).filter(|(from, to)| from != to) {
            for family in Family::BOTH {
                let (client, server) = (self.lab.pod(from)?, self.lab.pod(to)?);
                let answer = client.machine().run(|| client::tcp(server.machine().addresses().server(family), 1000, PATIENCE))??;
                assert_eq!((answer.server.as_str(), answer.seen.ip()), (to, client.machine().address(family)), "{from} to {to}, {family}");
            }
        }
        Ok(())
    }

    fn status(&self, node: usize) -> Result<Value, LabError> {
        self.lab.node(node).query(&["status"])
    }

    fn wait_connected(&self, node: usize, connected: bool, patience: Duration) -> Outcome {
        let what = || format!("node-{node} {}", if connected { "sees etcd" } else { "misses etcd" });
        Ok(wait_until(patience, what, || {
            let status = self.status(node)?;
            Ok((status["source"]["connected"] != connected).then(|| status["source"].to_string()))
        })?)
    }
}

fn join(bed: &Bed) -> Outcome {
    let cluster = cluster(bed)?;
    let nodes = cluster.nodes()?;
    assert_eq!(nodes.keys().collect::<Vec<_>>(), ["node-1", "node-2", "node-3"]);
    for (name, blocks) in &nodes {
        assert!(blocks.iter().any(IpNetwork::is_ipv4) && blocks.iter().any(IpNetwork::is_ipv6), "{name} has {blocks:?}");
    }
    let ledger = cluster.ledger()?;
    assert_eq!(ledger.len(), nodes.values().map(Vec::len).sum::<usize>(), "{ledger:?} {nodes:?}");
    cluster.web()?;
    cluster.all_talk()
}

fn objects(bed: &Bed) -> Outcome {
    let cluster = cluster(bed)?;
    let service = |ip: &str| format!("apiVersion: v1\nkind: Service\nmetadata: {{name: shop}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n");
    assert_eq!(cluster.apply(&service("10.96.0.77"))?, "service/shop created\n");
    assert_eq!(cluster.apply(&service("10.96.0.77"))?, "service/shop unchanged\n");
    assert_eq!(cluster.apply(&service("10.96.0.78"))?, "service/shop configured\n");
    let table = cluster.podgate(2, &["get", "svc", "shop"])?;
    assert!(
        table.starts_with("NAME   TYPE        CLUSTER-IP   EXTERNAL-IP   PORT(S)   AGE\nshop   ClusterIP   10.96.0.78   -             80/TCP"),
        "{table}"
    );
    let one: Value = serde_json::from_str(&cluster.podgate(2, &["get", "service", "shop", "-o", "json"])?)?;
    assert_eq!((&one["metadata"]["namespace"], &one["spec"]["clusterIP"]), (&"default".into(), &"10.96.0.78".into()));
    cluster.wait("the service on every node", || {
        let missing = (1..=3).find(|node| !cluster.lab.node(*node).podgate(&["services"]).is_ok_and(|text| text.contains("10.96.0.78")));
        Ok(missing.map(|node| format!("node-{node} does not have it")))
    })?;
    // What is wrong is named with its place, and nothing of the file is written.
    let bad = cluster.lab.directory().join("bad.yaml");
    fs::write(&bad, format!("{}---\nkind: Service\napiVersion: v1\nmetadata: {{name: x}}\nspec: {{clusterIP: oops}}\n", service("10.96.0.79")))?;
    let said = cluster.refusal(1, &["apply", "-f", &bad.display().to_string()])?;
    assert!(said.contains("bad.yaml:5: Service default/x: spec.clusterIPs: `oops` is not an IP address\nnothing was changed"), "{said}");
    assert!(cluster.podgate(1, &["get", "svc", "shop"])?.contains("10.96.0.78"));
    // A value that was written past us is reported by every node, and the last good one stays in force.
    cluster.etcdctl(&["put", "/podgate/objects/Service/default/shop", "{\"kind\": \"Service\""])?;
    cluster.wait("a word about the broken object", || {
        let status = cluster.status(3)?.to_string();
        Ok((!status.contains("/podgate/objects/Service/default/shop")).then_some(status))
    })?;
    assert!(cluster.lab.node(3).podgate(&["services"])?.contains("10.96.0.78"));
    assert_eq!(cluster.podgate(1, &["delete", "svc", "shop"])?, "service \"shop\" deleted\n");
    let said = cluster.refusal(1, &["delete", "svc", "shop"])?;
    assert!(said.contains("service \"shop\" not found"), "{said}");
    assert_eq!(cluster.podgate(1, &["delete", "svc", "shop", "--ignore-not-found"])?, "");
    cluster.wait("its end on every node", || {
        let there = (1..=3).find(|node| cluster.lab.node(*node).podgate(&["services"]).is_ok_and(|text| text.contains("10.96.0.78")));
        Ok(there.map(|node| format!("node-{node} still has it")))
    })?;
    let said = cluster.refusal(1, &["delete", "node", "node-2"])?;
    assert!(said.contains("node \"node-2\" registers itself"), "{said}");
    // With another source there is nothing to apply to.
    let directory = cluster.lab.directory().join("directory.yaml");
    fs::write(&directory, "underlay: {address: 192.0.2.1}\nsource: {directory: /etc/podgate/cluster.d}\n")?;
    let output = cluster.lab.node(1).podgate_output(&["get", "svc", "--config", &directory.display().to_string()])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("the cluster's objects are the files in /etc/podgate/cluster.d"), "{said}");
    Ok(())
}

fn demand(bed: &Bed) -> Outcome {
    let cluster = cluster(bed)?;
    cluster.web()?;
    let v4 = |blocks: &[IpNetwork]| blocks.iter().filter(|block| block.is_ipv4()).count();
    let before = v4(&cluster.nodes()?["node-1"]);
    // A block of 16 has 12 for pods.
    let names: Vec<String> = (0..14).map(|number| format!("p{number}")).collect();
    for name in &names {
        // Between two blocks one may have to wait.
        cluster.wait(&format!("an address for {name}"), || Ok(cluster.pod(1, name).err().map(|error| error.to_string())))?;
    }
    let nodes = cluster.nodes()?;
    assert!(v4(&nodes["node-1"]) > before, "{nodes:?}");
    let last = cluster.lab.pod(&names[13])?;
    let a3 = cluster.lab.pod("a3")?;
    for family in Family::BOTH {
        let answer = last.machine().run(|| client::tcp(a3.machine().addresses().server(family), 1000, PATIENCE))??;
        assert_eq!(answer.seen.ip(), last.machine().address(family));
        let back = a3.machine().run(|| client::tcp(last.machine().addresses().server(family), 1000, PATIENCE))??;
        assert_eq!(back.server, names[13]);
    }
    names.iter().try_for_each(|name| cluster.lab.detach(name))?;
    Ok(())
}

fn leave(bed: &Bed) -> Outcome {
    let cluster = cluster(bed)?;
    cluster.web()?;
    let before = cluster.nodes()?;
    cluster.lab.node(3).end(Signal::SIGKILL)?;
    let start = Instant::now();
    cluster.wait("an end to node-3 among the nodes", || Ok(cluster.nodes()?.contains_key("node-3").then(|| "it is still there".into())))?;
    eprintln!("    node-3 was missed after {} ms", start.elapsed().as_millis());
    // Its endpoints go with it: no connection is sent to where nobody is.
    cluster.wait_backends(1, &["a1", "a2"])?;
    let peers = cluster.lab.node(1).podgate(&["peers"])?;
    assert!(peers.contains("node-2") && !peers.contains("node-3"), "{peers}");
    cluster.lab.node(3).launch(cluster.lab.settings())?;
    cluster.lab.node(3).wait_ready()?;
    cluster.wait("node-3 with the blocks it had", || {
        let now = cluster.nodes()?;
        Ok((now.get("node-3") != before.get("node-3")).then(|| format!("{now:?}")))
    })?;
    cluster.wait_backends(1, &["a1", "a2", "a3"])?;
    cluster.all_talk()
}

fn partition(bed: &Bed) -> Outcome {
    let cluster = cluster(bed)?;
    cluster.web()?;
    let local = cluster.pod(2, "b2")?;
    let before = cluster.nodes()?;
    let lost: BTreeSet<String> = cluster.ledger()?.into_iter().filter(|(_, node)| node == "node-2").map(|(key, _)| key).collect();
    cluster.isolate("node-2", true)?;
    let start = Instant::now();
    cluster.wait("an end to node-2 among the nodes", || Ok(cluster.nodes()?.contains_key("node-2").then(|| "it is still there".into())))?;
    cluster.wait_backends(1, &["a1", "a3"])?;
    cluster.wait_connected(2, false, SILENCE.saturating_sub(start.elapsed()))?;
    eprintln!("    node-2 noticed after {} ms", start.elapsed().as_millis());
    // It gives out no address that somebody else might have been given by then.
    let mut number = 0;
    cluster.wait("a refusal to attach", || {
        number += 1;
        let name = format!("late{number}");
        match cluster.lab.attach(1, &name) {
            Ok(_) => cluster.lab.detach(&name).map(|()| Some("it still attaches".into())),
            Err(error) if error.to_string().contains("cannot prove") => Ok(None),
            Err(error) => Err(error),
        }
    })?;
    let fenced = start.elapsed();
    eprintln!("    node-2 was fenced after {} ms", fenced.as_millis());
    assert!(fenced < LEASE + GRACE, "another node could have had its blocks by then");
    // What is attached goes on.
    let answer = cluster.lab.pod("a2")?.machine().run(|| client::tcp(local.machine().addresses().server(Family::V4), 1000, PATIENCE))??;
    assert_eq!(answer.server, "b2");
    wait_until(
        2 * PATIENCE,
        || "node-2's blocks are taken back".into(),
        || {
            let ledger =
                cluster.ledger().map_err(|error| LabError::Program { what: "etcdctl".into(), source: std::io::Error::other(error.to_string()) })?;
            Ok(ledger.values().any(|node| node == "node-2").then(|| format!("{ledger:?}")))
        },
    )?;
    assert!(start.elapsed() > LEASE + GRACE - Duration::from_secs(2), "they were taken back after {} ms", start.elapsed().as_millis());
    // Somebody else takes what it had, before it is back.
    for block in &lost {
        let line = r#"{"node":"node-9","machine":"elsewhere","term":1}"#;
        cluster.etcdctl(&["put", block, line])?;
    }
    cluster.isolate("node-2", false)?;
    cluster.wait("node-2 with other blocks", || {
        let nodes = cluster.nodes()?;
        let now = nodes.get("node-2").cloned().unwrap_or_default();
        Ok((now.len() < 2 || now.iter().any(|block| before["node-2"].contains(block))).then(|| format!("{nodes:?}")))
    })?;
    cluster.wait("a word about pods whose addresses are gone", || {
        let status = cluster.status(2)?.to_string();
        Ok((!status.contains("of a block that went to another node")).then_some(status))
    })?;
    for name in ["a2", "b2"] {
        cluster.lab.detach(name)?;
    }
    cluster.web()?;
    lost.iter().try_for_each(|block| cluster.etcdctl(&["del", block]).map(|_| ()))?;
    cluster.all_talk()
}

fn compaction(bed: &Bed) -> Outcome {
    let cluster = cluster(bed)?;
    cluster.web()?;
    let service = |name: &str, ip: &str| {
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n---\n")
    };
    cluster.apply(&service("old", "10.96.0.81"))?;
    cluster.wait("the old service on node-3", || {
        Ok((!cluster.lab.node(3).podgate(&["services"])?.contains("10.96.0.81")).then(|| "it is not there".into()))
    })?;
    cluster.isolate("node-3", true)?;
    cluster.apply(&service("new", "10.96.0.82"))?;
    cluster.podgate(1, &["delete", "svc", "old"])?;
    cluster.apply(&service("newer", "10.96.0.83"))?;
    let status: Value = serde_json::from_str(&cluster.etcdctl(&["endpoint", "status", "-w", "json"])?)?;
    let revision = status[0]["Status"]["header"]["revision"].to_string();
    cluster.etcdctl(&["compact", &revision])?;
    cluster.wait_connected(3, false, SILENCE)?;
    cluster.isolate("node-3", false)?;
    cluster.wait("what was added, and no longer what was deleted", || {
        let services = cluster.lab.node(3).podgate(&["services"])?;
        let right = !services.contains("10.96.0.81") && services.contains("10.96.0.82") && services.contains("10.96.0.83");
        Ok((!right).then_some(services))
    })?;
    assert!(cluster.lab.node(3).log().contains("compacted"), "the history was still there:\n{}", cluster.lab.node(3).log_tail(30));
    cluster.podgate(1, &["delete", "svc", "new", "newer"])?;
    Ok(())
}

fn outage(bed: &Bed) -> Outcome {
    let cluster = cluster(bed)?;
    cluster.web()?;
    let before = cluster.nodes()?;
    let mut tickers = Vec::new();
    for (from, to) in [("a1", "10.96.0.10:80".to_owned()), ("a2", "[fd00:96::a]:80".to_owned())] {
        for _ in 0..6 {
            let to: SocketAddr = to.parse()?;
            tickers
                .push((format!("{from} to {to}"), Ticker::start(cluster.lab.pod(from)?.machine().netns(), to, Duration::from_millis(10), PATIENCE)?));
        }
    }
    cluster.kill_etcd()?;
    for node in 1..=3 {
        cluster.wait_connected(node, false, SILENCE)?;
    }
    cluster.wait_backends(1, &["a1", "a2", "a3"])?;
    // Longer than any lease.
    let restarted = Instant::now();
    cluster.lab.restart(cluster.lab.node(3), Signal::SIGKILL)?;
    assert_eq!(cluster.status(3)?["source"]["connected"], false);
    wait_until(PATIENCE, || "a whole lease without etcd".into(), || Ok((restarted.elapsed() < 2 * LEASE).then(|| "not yet".into())))?;
    cluster.wait_backends(3, &["a1", "a2", "a3"])?;
    cluster.all_talk()?;
    let said = cluster.refusal(1, &["get", "svc"])?;
    assert!(said.contains("no endpoint of etcd answers: http://192.0.2.250:2399:"), "{said}");
    cluster.start_etcd()?;
    for node in 1..=3 {
        cluster.wait_connected(node, true, PATIENCE)?;
    }
    // What changes from now on arrives, and nobody lost a block.
    cluster.apply("apiVersion: v1\nkind: Service\nmetadata: {name: after}\nspec: {clusterIP: 10.96.0.91, ports: [{port: 80}]}\n")?;
    cluster.wait("a new service on every node", || {
        let missing = (1..=3).find(|node| !cluster.lab.node(*node).podgate(&["services"]).is_ok_and(|text| text.contains("10.96.0.91")));
        Ok(missing.map(|node| format!("node-{node} does not have it")))
    })?;
    cluster.podgate(1, &["delete", "svc", "after"])?;
    cluster.wait("the nodes with the blocks they had", || {
        let now = cluster.nodes()?;
        Ok((now != before).then(|| format!("{now:?}, before {before:?}")))
    })?;
    let mut broken = Vec::new();
    for (name, ticker) in tickers {
        let report = ticker.finish();
        eprintln!("      {name}: {} answers, the longest pause {} ms", report.answered, report.longest_gap.as_millis());
        broken.extend(report.broken.map(|why| format!("{name}: {why}")));
    }
    assert!(broken.is_empty(), "{}", broken.join("; "));
    Ok(())
}

fn secured(bed: &Bed) -> Outcome {
    let cluster = cluster(bed)?;
    let directory = cluster.lab.directory().join("tls");
    fs::create_dir_all(&directory)?;
    let openssl = |words: &str| -> Outcome {
        let mut command = Command::new("openssl");
        command.args(words.split(' ')).current_dir(&directory);
        Running::start(command, b"")?.end(PATIENCE)?.success()?;
        Ok(())
    };
    fs::write(directory.join("san"), "subjectAltName=IP:192.0.2.250\n")?;
    openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca")?;
    // With users, etcd's gateway takes no certificate with a common name.
    for (name, subject) in [("server", "/CN=server"), ("client", "/O=podgate"), ("named", "/CN=client")] {
        openssl(&format!("req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {name}.key -out {name}.csr -subj {subject}"))?;
        openssl(&format!("x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out {name}.pem -days 2 -extfile san"))?;
    }
    let file = |name: &str| directory.join(name).display().to_string();
    let arguments =
        ["--cert-file", &file("server.pem"), "--key-file", &file("server.key"), "--trusted-ca-file", &file("ca.pem"), "--client-cert-auth"];
    let mut etcd = etcd::start(&cluster.host, &directory.join("data"), &["https://192.0.2.250:2479"], &arguments)?;
    let config = |name: &str, further: &str| -> Result<String, std::io::Error> {
        let path = directory.join(name);
        let text = format!(
            "underlay: {{address: 192.0.2.1}}\nsource: {{etcd: {{endpoints: ['https://192.0.2.250:2479'], ca: {}{further}}}}}\n",
            file("ca.pem")
        );
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let credentials = format!(", cert: {}, key: {}", file("client.pem"), file("client.key"));
    let get = |config: &str| -> Result<(bool, String), LabError> {
        let output = cluster.lab.node(1).podgate_output(&["get", "svc", "--config", config])?;
        Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    let with_certificate = config("with.yaml", &credentials)?;
    let outcome = (|| -> Outcome {
        cluster.wait("an answer over TLS", || get(&with_certificate).map(|(ok, said)| (!ok).then_some(said)))?;
        let (ok, said) = get(&config("without.yaml", "")?)?;
        assert!(!ok && said.contains("https://192.0.2.250:2479: "), "without a client certificate: {said}");
        // Users: the first of all must be root.
        let etcdctl = |words: &[&str]| -> Outcome {
            let mut command = Command::new("etcdctl");
            let (ca, cert, key) = (file("ca.pem"), file("client.pem"), file("client.key"));
            command.env("ETCDCTL_API", "3").args(["--endpoints", "https://192.0.2.250:2479", "--cacert", &ca, "--cert", &cert, "--key", &key]);
            command.args(words);
            cluster.host.run(|| Running::start(command, b"").and_then(|running| running.end(PATIENCE)))??.success()?;
            Ok(())
        };
        etcdctl(&["user", "add", "root:secret"])?;
        etcdctl(&["user", "grant-role", "root", "root"])?;
        etcdctl(&["user", "add", "podgate:word"])?;
        etcdctl(&["role", "add", "podgate"])?;
        etcdctl(&["role", "grant-permission", "podgate", "--prefix=true", "readwrite", "/podgate/"])?;
        etcdctl(&["user", "grant-role", "podgate", "podgate"])?;
        etcdctl(&["auth", "enable"])?;
        let (ok, said) = get(&with_certificate)?;
        assert!(!ok && said.contains("write source.etcd.user as name:password"), "without a user: {said}");
        let named = format!(", cert: {}, key: {}, user: 'podgate:word'", file("named.pem"), file("named.key"));
        let (ok, said) = get(&config("named.yaml", &named)?)?;
        assert!(!ok && said.contains("no certificate with a common name: make one without for source.etcd.cert"), "with a name in it: {said}");
        let (ok, said) = get(&config("wrong.yaml", &format!("{credentials}, user: 'podgate:wrong'"))?)?;
        assert!(!ok && said.contains("check source.etcd.user") && !said.contains("wrong'"), "with a wrong password: {said}");
        let right = config("right.yaml", &format!("{credentials}, user: 'podgate:word'"))?;
        let (ok, said) = get(&right)?;
        assert!(ok, "with the right one: {said}");
        let elsewhere = config("elsewhere.yaml", &format!("{credentials}, user: 'podgate:word', prefix: /other"))?;
        let (ok, said) = get(&elsewhere)?;
        assert!(!ok && said.contains("grant the user's role read and write"), "under a prefix that is not its own: {said}");
        Ok(())
    })();
    etcd.kill()?;
    etcd.wait()?;
    outcome
}
