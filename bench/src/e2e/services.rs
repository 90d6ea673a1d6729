//! A node of Podgate's with many services, each of which leads to every serving pod.

use std::fmt::Write;
use std::io::{Read, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::Context;
use podgate::lab::node::NodeSettings;
use podgate::lab::{Lab, LabError, Node, wait_until};
use podgate::netlink::Family;

use super::bed::Plan;
use super::load::{ANSWER_PORT, SERVICE_PORT, STREAM_PORT, STREAM_VIP, vip};
use super::subject::Subject;

/// How long a node has to read ten thousand services and act on them.
const PATIENCE: Duration = Duration::from_secs(60);

/// `subject`: one node with a client's pod, `plan.scale.endpoints` pods that serve, and `services` services of all of them.
pub fn cluster(plan: Plan<'_>, subject: Subject, services: u32) -> anyhow::Result<Lab> {
    let names: Vec<String> = ["client".to_owned()].into_iter().chain((1..=plan.scale.endpoints).map(|number| format!("server{number}x"))).collect();
    let settings = NodeSettings { workers: Some(plan.workers), attach: subject.attach().to_owned(), ..NodeSettings::default() };
    let builder = Lab::builder(plan.sandbox, plan.binary).named(&subject.name()).nodes(1);
    let lab = builder.pods(names.iter().map(String::as_str)).settings(settings).build(&|_| {})?;
    let addresses: Vec<String> = lab.pods()[1..].iter().map(|pod| pod.machine().address(Family::V4).to_string()).collect();
    let node = lab.node(1);
    let mut text = manifest("stream", &STREAM_VIP.to_string(), STREAM_PORT, &addresses[..1], node.name());
    for number in 0..services {
        text += &manifest(&format!("service-{number}"), &vip(number).to_string(), ANSWER_PORT, &addresses, node.name());
    }
    node.write_manifest("bench.yaml", &text)?;
    wait_until(
        PATIENCE,
        || format!("{services} services on {}", node.name()),
        || {
            let known = node.query(&["services"])?.to_string().matches("bench/").count();
            Ok((known <= services as usize).then(|| format!("{known} are known")))
        },
    )?;
    Ok(lab)
}

/// Changes one service, which is in a file of its own and which nobody dials: its endpoints are one pod or two, by turns.
pub fn change(lab: &Lab, node: &Node, turn: u64) -> Result<(), LabError> {
    let pods: Vec<String> = lab.pods()[1..].iter().map(|pod| pod.machine().address(Family::V4).to_string()).collect();
    let count = 1 + (turn % 2) as usize;
    node.write_manifest("changing.yaml", &manifest("changing", "10.96.0.101", ANSWER_PORT, &pods[..count.min(pods.len())], node.name()))
}

/// What a node's daemon has done so far.
#[derive(Clone, Copy, Debug)]
pub struct Synced {
    /// Events that the workers have.
    pub events: f64,
    /// From each event until the workers had it, in all.
    pub seconds: f64,
}

/// As the node's own metrics say.
pub fn synced(node: &Node) -> anyhow::Result<Synced> {
    const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
    let page = node.machine().run(|| -> std::io::Result<String> {
        let mut connection = TcpStream::connect(METRICS)?;
        connection.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut page = String::new();
        connection.read_to_string(&mut page)?;
        Ok(page)
    })??;
    let figure = |name: &str| {
        let line =
            page.lines().find_map(|line| line.strip_prefix("kubeproxy_sync_proxy_rules_duration_seconds_")?.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|figure| figure.trim().parse().ok()).with_context(|| format!("{} does not say how long its events take", node.name()))
    };
    Ok(Synced { events: figure("count")?, seconds: figure("sum")? })
}

/// A service of one TCP port, with its slice.
fn manifest(name: &str, vip: &str, port: u16, endpoints: &[String], node: &str) -> String {
    let mut text = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: bench}}\nspec:\n  clusterIP: {vip}\n  clusterIPs: [{vip}]\n  \
         ports: [{{name: p, protocol: TCP, port: {SERVICE_PORT}, targetPort: {port}}}]\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, namespace: bench, labels: {{kubernetes.io/service-name: {name}}}}}\n\
         addressType: IPv4\nports: [{{name: p, protocol: TCP, port: {port}}}]\nendpoints:\n"
    );
    for endpoint in endpoints {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "- {{addresses: [{endpoint}], nodeName: {node}, conditions: {{ready: true}}}}");
    }
    text
}
