//! A bare machine publishes its own services: active checks become conditions of its endpoints, here and on the other nodes.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podgate::lab::program::client;
use podgate::lab::{ClusterRanges, Lab, LabError, Machine, NodeSettings, wait_until};
use podgate_testbed::{Bed, Need, Outcome, etcd, run};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
const ETCD: Need = Need::All(&[Need::Program("etcd"), Need::Program("etcdctl")]);
/// Where a process says over HTTP whether it works, beside the server of the lab at 8080.
const HEALTH_PORT: u16 = 8081;
const LEASE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    run(|tests| {
        tests.add_if(ETCD, "a process whose health path fails is ready on no node, and its endpoint goes with its node", on_etcd);
        tests.add("with a directory a node serves its own processes and pods as their TCP checks say", on_a_directory);
    })
}

/// Says over HTTP at `/healthz` of `web.example` whether it is well; everything else is not found.
struct HealthPath(Arc<AtomicBool>);

impl HealthPath {
    fn start(machine: &Machine) -> Result<HealthPath, Box<dyn std::error::Error>> {
        let listener = machine.run(|| TcpListener::bind(("::", HEALTH_PORT)))??;
        let well = Arc::new(AtomicBool::new(true));
        let says = well.clone();
        thread::spawn(move || listener.incoming().flatten().for_each(|stream| drop(answer(&stream, &says))));
        Ok(HealthPath(well))
    }

    fn set(&self, well: bool) {
        // Relaxed: it orders nothing.
        self.0.store(well, Ordering::Relaxed);
    }
}

fn answer(mut stream: &TcpStream, well: &AtomicBool) -> std::io::Result<()> {
    let lines: Vec<String> = BufReader::new(stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
    let known = lines.first().is_some_and(|line| line == "GET /healthz HTTP/1.1") && lines.iter().any(|line| line == "host: web.example");
    let status = match (known, well.load(Ordering::Relaxed)) {
        (false, _) => "404 Not Found",
        (true, true) => "200 OK",
        (true, false) => "503 Service Unavailable",
    };
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
}

fn service(name: &str, vip: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {vip}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n"
    )
}

/// Who answers a client on `machine` at `vip`, or why nobody does.
fn dial(machine: &Machine, vip: &str) -> Result<Result<String, String>, LabError> {
    let vip: SocketAddr = vip.parse().expect("an address");
    machine.run(|| client::tcp(vip, 1, Duration::from_secs(2)).map(|answer| answer.server).map_err(|error| error.to_string()))
}

fn wait(what: &str, look: impl FnMut() -> Result<Option<String>, LabError>) -> Outcome {
    Ok(wait_until(PATIENCE, || what.to_owned(), look)?)
}

fn wait_served(machine: &Machine, vip: &str, by: &str) -> Outcome {
    wait(&format!("{by} at {vip}, as seen from {}", machine.name()), || {
        let answer = dial(machine, vip)?;
        Ok((answer != Ok(by.to_owned())).then(|| format!("{answer:?}")))
    })
}

/// Refused, not silent: a service without a ready endpoint answers with a reset.
fn wait_refused(machine: &Machine, vip: &str) -> Outcome {
    wait(&format!("a refusal at {vip}, as seen from {}", machine.name()), || {
        let answer = dial(machine, vip)?;
        Ok((!answer.as_ref().is_err_and(|said| said.contains("Connection refused"))).then(|| format!("{answer:?}")))
    })
}

/// The machines, and etcd on one of its own; it ends with this.
struct Cluster {
    lab: Lab,
    etcd: Child,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.etcd.kill().and_then(|()| self.etcd.wait());
    }
}

impl Cluster {
    fn start(bed: &Bed, published: &str) -> Result<Cluster, Box<dyn std::error::Error>> {
        let lab = Lab::builder(bed.sandbox(), &bed.binary()).nodes(2).named("publish").machines()?;
        let host = lab.add_machine("etcd", 250)?;
        let etcd = etcd::start(&host, &lab.directory().join("data"), &["http://192.0.2.250:2379"], &[])?;
        let cluster = Cluster { lab, etcd };
        let ranges = ClusterRanges { pods: "[10.244.0.0/24, \"fd00:77::/64\"]".into(), services: Lab::ranges().services };
        let source = format!("etcd: {{endpoints: ['http://192.0.2.250:2379'], lease: {}s}}", LEASE.as_secs());
        for (node, extra) in cluster.lab.nodes().iter().zip([published, ""]) {
            let settings = NodeSettings { source: Some(source.clone()), extra: extra.into(), ..NodeSettings::default() };
            node.configure(&settings, &ranges)?;
            node.prepare()?;
            node.launch(&settings)?;
        }
        cluster.lab.nodes().iter().try_for_each(|node| node.wait_ready())?;
        Ok(cluster)
    }

    /// `podgate WORDS --config …` on node-2.
    fn podgate(&self, words: &[&str]) -> Result<String, LabError> {
        let node = self.lab.node(2);
        node.podgate(&[words, &["--config", &node.config().display().to_string()]].concat())
    }

    fn apply(&self, text: &str) -> Result<String, LabError> {
        let path = self.lab.directory().join("objects.yaml");
        fs::write(&path, text).map_err(|source| LabError::File { path: path.clone(), source })?;
        self.podgate(&["apply", "-f", &path.display().to_string()])
    }

    /// The slices in etcd by name, and whether their endpoint is ready and serving.
    fn slices(&self) -> Result<Vec<(String, bool, bool)>, LabError> {
        let list: Value = serde_json::from_str(&self.podgate(&["get", "endpointslices", "-o", "json"])?).expect("a list is JSON");
        let row = |slice: &Value| {
            let conditions = &slice["endpoints"][0]["conditions"];
            let name = slice["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            (name, conditions["ready"] == true, conditions["serving"] == true)
        };
        Ok(list["items"].as_array().into_iter().flatten().map(row).collect())
    }

    fn wait_slices(&self, wanted: &[(&str, bool)]) -> Outcome {
        let wanted: Vec<_> = wanted.iter().map(|(name, works)| ((*name).to_owned(), *works, *works)).collect();
        wait(&format!("the slices {wanted:?}"), || {
            let slices = self.slices()?;
            Ok((slices != wanted).then(|| format!("{slices:?}")))
        })
    }
}

/// The conditions of the service's endpoints on a node, as `podgate backends` tells them.
fn backends(lab: &Lab, node: usize, service: &str) -> Result<Vec<(bool, String)>, LabError> {
    let rows = lab.node(node).query(&["backends"])?;
    let rows = rows["backends"].as_array().cloned().unwrap_or_default();
    let of = rows.iter().filter(|row| row["service"] == format!("default/{service}:http"));
    let ready = |row: &Value| row["conditions"].as_array().is_some_and(|all| all.iter().any(|condition| condition == "ready"));
    Ok(of.map(|row| (ready(row), row["address"].as_str().unwrap_or_default().to_owned())).collect())
}

fn on_etcd(bed: &Bed) -> Outcome {
    let published = "publish:\n- name: web\n  ports: [{name: http, port: 8080}]\n  check: {http: {port: 8081, path: /healthz, host: web.example}, \
                     interval: 1s, healthy: 2, unhealthy: 2}\n- name: taken\n  ports: [{name: http, port: 8080}]\n  addresses: 192.0.2.1\n";
    let cluster = Cluster::start(bed, published)?;
    let lab = &cluster.lab;
    // Nobody is there yet: both nodes say so, and the other service needs no check.
    cluster.wait_slices(&[("taken-node-1-ipv4", true), ("web-node-1-ipv4", false), ("web-node-1-ipv6", false)])?;
    let (vip, service) = ("10.96.0.10:80", service("web", "10.96.0.10"));
    cluster.apply(&service)?;
    let [first, second] = [lab.attach(0, "p1")?, lab.attach(1, "p2")?];
    let pods = [first.machine(), second.machine()];
    pods.iter().try_for_each(|pod| wait_refused(pod, vip))?;

    let host = lab.node(1).machine();
    host.serve()?;
    let health = HealthPath::start(host)?;
    pods.iter().try_for_each(|pod| wait_served(pod, vip, "node-1"))?;
    cluster.wait_slices(&[("taken-node-1-ipv4", true), ("web-node-1-ipv4", true), ("web-node-1-ipv6", true)])?;
    for node in 1..=2 {
        assert_eq!(backends(lab, node, "web")?, [(true, "192.0.2.1:8080".to_owned())], "on node-{node}");
    }

    // The server goes on; it only says that it is not well.
    health.set(false);
    let start = Instant::now();
    pods.iter().try_for_each(|pod| wait_refused(pod, vip))?;
    eprintln!("    a failing health path was refused on both nodes after {} ms", start.elapsed().as_millis());
    cluster.wait_slices(&[("taken-node-1-ipv4", true), ("web-node-1-ipv4", false), ("web-node-1-ipv6", false)])?;
    for node in 1..=2 {
        assert!(!backends(lab, node, "web")?.iter().any(|(ready, _)| *ready), "on node-{node}");
    }
    let said = "published default/web at 192.0.2.1: not ready: 192.0.2.1:8081/healthz answers 503 Service Unavailable";
    assert_eq!(lab.node(1).log().matches(said).count(), 1, "one line for one change:\n{}", lab.node(1).log_tail(30));
    health.set(true);
    pods.iter().try_for_each(|pod| wait_served(pod, vip, "node-1"))?;

    // What somebody takes away is put back; what somebody wrote under the same name is left, and told of.
    cluster.podgate(&["delete", "endpointslice", "web-node-1-ipv4"])?;
    cluster.wait_slices(&[("taken-node-1-ipv4", true), ("web-node-1-ipv4", true), ("web-node-1-ipv6", true)])?;
    cluster.apply(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: taken-node-1-ipv4}\naddressType: IPv4\nports: [{port: 1}]\n\
         endpoints: [{addresses: [192.0.2.9], conditions: {ready: false, serving: false}}]\n",
    )?;
    wait("a word about the name that is taken", || {
        let status = lab.node(1).query(&["status"])?.to_string();
        Ok((!status.contains("the EndpointSlice default/taken-node-1-ipv4 is there already")).then_some(status))
    })?;
    cluster.wait_slices(&[("taken-node-1-ipv4", false), ("web-node-1-ipv4", true), ("web-node-1-ipv6", true)])?;
    cluster.podgate(&["delete", "endpointslice", "taken-node-1-ipv4"])?;
    cluster.wait_slices(&[("taken-node-1-ipv4", true), ("web-node-1-ipv4", true), ("web-node-1-ipv6", true)])?;

    // An etcd that is silent keeps no verdict from its own node; the others go by the last one.
    let etcd = Pid::from_raw(cluster.etcd.id() as i32);
    kill(etcd, Signal::SIGSTOP)?;
    health.set(false);
    wait_refused(first.machine(), vip)?;
    assert_eq!(dial(second.machine(), vip)?, Ok("node-1".to_owned()));
    kill(etcd, Signal::SIGCONT)?;
    wait_refused(second.machine(), vip)?;
    health.set(true);
    pods.iter().try_for_each(|pod| wait_served(pod, vip, "node-1"))?;
    cluster.wait_slices(&[("taken-node-1-ipv4", true), ("web-node-1-ipv4", true), ("web-node-1-ipv6", true)])?;

    // The process lives on, but nobody checks it any more.
    lab.node(1).end(Signal::SIGKILL)?;
    let start = Instant::now();
    cluster.wait_slices(&[])?;
    eprintln!("    the slices of a killed node were gone after {} ms", start.elapsed().as_millis());
    wait_refused(second.machine(), vip)?;
    // Its successor publishes again, and a quick restart is not even noticed.
    let settings = NodeSettings::default();
    lab.node(1).launch(&settings)?;
    wait_served(second.machine(), vip, "node-1")?;
    lab.node(1).wait_ready()?;
    lab.restart(lab.node(1), Signal::SIGKILL)?;
    let restarted = Instant::now();
    wait("two leases without a refusal", || {
        let answer = dial(second.machine(), vip)?;
        assert_eq!(answer, Ok("node-1".to_owned()), "{} ms after the restart", restarted.elapsed().as_millis());
        Ok((restarted.elapsed() < 2 * LEASE).then(|| "not yet".into()))
    })?;
    Ok(())
}

fn on_a_directory(bed: &Bed) -> Outcome {
    let extra = "publish:\n- name: process\n  ports: [{name: http, port: 8080}]\n  check: {tcp: 9000, interval: 1s, healthy: 1, unhealthy: 2}\n\
                 - name: pod\n  ports: [{name: http, port: 8080}]\n  pod: default/b1\n  check: {tcp: 8080, interval: 1s, healthy: 1, unhealthy: 1}\n";
    let settings = NodeSettings { extra: extra.into(), ..NodeSettings::default() };
    let lab = Lab::builder(bed.sandbox(), &bed.binary()).named("directory").nodes(1).pods(["a"]).settings(settings).build(&|_| {})?;
    let node = lab.node(1);
    node.write_manifest("own.yaml", &(service("process", "10.96.0.50") + &service("pod", "10.96.0.51")))?;
    let a1 = lab.pod("a1")?;
    wait_refused(a1.machine(), "10.96.0.50:80")?;
    // A check that passes says so, whatever is served.
    let checked = node.machine().run(|| TcpListener::bind(("::", 9000)))??;
    wait_served(a1.machine(), "10.96.0.50:80", "node-1")?;
    drop(checked);
    wait_refused(a1.machine(), "10.96.0.50:80")?;

    // A pod is published while it is attached.
    wait_refused(a1.machine(), "10.96.0.51:80")?;
    assert_eq!(backends(&lab, 1, "pod")?, []);
    let b1 = lab.attach(0, "b1")?;
    b1.machine().serve()?;
    wait_served(a1.machine(), "10.96.0.51:80", "b1")?;
    lab.detach("b1")?;
    wait_refused(a1.machine(), "10.96.0.51:80")?;
    assert_eq!(backends(&lab, 1, "pod")?, []);

    // Of a name that is in the files too, the files' counts.
    let taken = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: process-node-1-ipv4, labels: {kubernetes.io/service-name: process}}\n\
                 addressType: IPv4\nports: [{name: http, port: 8080}]\nendpoints: [{addresses: [192.0.2.1], nodeName: node-1}]\n";
    node.write_manifest("taken.yaml", taken)?;
    wait_served(a1.machine(), "10.96.0.50:80", "node-1")?;
    let status = node.query(&["status"])?.to_string();
    assert!(status.contains("the EndpointSlice default/process-node-1-ipv4 is there already"), "{status}");
    node.remove_manifest("taken.yaml")?;
    wait_refused(a1.machine(), "10.96.0.50:80")?;
    let status = node.query(&["status"])?.to_string();
    assert!(!status.contains("publish:"), "{status}");
    Ok(())
}
