//! What packets show of a service's rules (semantics rows 1, 4 to 6, 8 to 11 and 19), and backends that are replaced while clients use them.

use std::error::Error;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use podgate::lab::program::bulk::Ticker;
use podgate::lab::program::{ExchangeError, PORT, client};
use podgate::lab::{Lab, Machine, NodeSettings, wait_until};
use podgate::netlink::Family;
use podgate_testbed::{Bed, Outcome, run};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(10);
/// How long nothing must come for it to count as dropped.
const SILENCE: Duration = Duration::from_millis(400);
/// How long an exchange may take that is to succeed.
const ANSWER: Duration = Duration::from_secs(5);

const READY: &str = "ready";
const DRAINING: &str = "draining";
const GONE: &str = "gone";

fn main() -> ExitCode {
    run(|tests| {
        tests.configure(NodeSettings { extra: "externalIPs: {allow: [198.51.100.64/26]}\n".into(), ..NodeSettings::default() });
        tests.add("an endpoint that only drains serves when there is no ready one, and never beside one", terminating);
        tests.add("without endpoints clients are refused at once; by the Local policy without one here they hear nothing", refused_or_dropped);
        tests.add("a service address that nobody has is held back by name", unallocated);
        tests.add("TCP and UDP on one number are two services", two_protocols);
        tests.add("a service that another proxy serves is left alone", left_alone);
        tests.add("source ranges guard the load balancer's address and not the node port", source_ranges);
        tests.add("external IPs are served inside the allow-list alone", external_ips);
        tests.add("a client sticks to its endpoint over all faces of a service until that endpoint goes", affinity);
        tests.add("backends are replaced one by one under load, to none and back, and no client is lost", rolling);
    })
}

/// Where it runs and how it does.
type Backend<'a> = (&'a str, &'static str);

/// A service and its slices: IPv4 and IPv6, TCP and UDP, one node port, and what `spec` says beside.
fn documents(lab: &Lab, name: &str, number: u8, spec: &Value, labels: &Value, backends: &[Backend<'_>]) -> Result<String, Box<dyn Error>> {
    let port = |protocol: &str| json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": 80, "targetPort": PORT, "nodePort": 31000 + u16::from(number)});
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default", "labels": labels},
        "spec": {"type": "NodePort", "clusterIP": vip(number, Family::V4), "clusterIPs": [vip(number, Family::V4), vip(number, Family::V6)], "ports": [port("TCP"), port("UDP")]},
    });
    for (key, value) in spec.as_object().into_iter().flatten() {
        service["spec"][key] = value.clone();
    }
    if let Some(address) = spec["loadBalancerIP"].as_str() {
        service["status"] = json!({"loadBalancer": {"ingress": [{"ip": address}]}});
    }
    let mut text = format!("---\n{service}\n");
    for family in Family::BOTH {
        let mut endpoints = Vec::new();
        for (pod, state) in backends.iter().filter(|(_, state)| *state != GONE) {
            let pod = lab.pod(pod)?;
            let conditions = json!({"ready": *state == READY, "serving": true, "terminating": *state == DRAINING});
            endpoints
                .push(json!({"addresses": [pod.machine().address(family)], "nodeName": lab.nodes()[pod.node()].name(), "conditions": conditions}));
        }
        let ports: Vec<Value> = ["tcp", "udp"].iter().map(|name| json!({"name": name, "protocol": name.to_uppercase(), "port": PORT})).collect();
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family.to_string(), "ports": ports, "endpoints": endpoints,
            "metadata": {"name": format!("{name}-{}", family.to_string().to_lowercase()), "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
        });
        text.push_str(&format!("---\n{slice}\n"));
    }
    Ok(text)
}

fn vip(number: u8, family: Family) -> IpAddr {
    let text = if family == Family::V4 { format!("10.96.77.{number}") } else { format!("fd00:96::77{number:02x}") };
    text.parse().expect("an address")
}

fn at(number: u8, family: Family) -> SocketAddr {
    SocketAddr::new(vip(number, family), 80)
}

/// A service of a test's own; it goes when the test ends.
struct Declared<'a> {
    lab: &'a Lab,
    name: &'static str,
    number: u8,
    spec: Value,
    labels: Value,
}

impl<'a> Declared<'a> {
    fn new(lab: &'a Lab, name: &'static str, number: u8, spec: Value) -> Declared<'a> {
        Declared { lab, name, number, spec, labels: json!({}) }
    }

    /// Declares it with these backends, and waits until every node's workers have it so.
    fn with(&self, backends: &[Backend<'_>]) -> Outcome {
        let text = documents(self.lab, self.name, self.number, &self.spec, &self.labels, backends)?;
        for node in self.lab.nodes() {
            node.write_manifest(&format!("{}.yaml", self.name), &text)?;
        }
        let known = |rows: &Value| -> Vec<(String, bool)> {
            let own = rows["backends"].as_array().into_iter().flatten().filter(|row| row["service"] == format!("default/{}:tcp", self.name));
            let mut own: Vec<_> = own.map(|row| (row["address"].as_str().unwrap_or_default().to_owned(), row["ready"] == true)).collect();
            own.sort();
            own
        };
        let mut wanted = Vec::new();
        for (pod, state) in backends.iter().filter(|(_, state)| *state != GONE) {
            let pod = self.lab.pod(pod)?;
            wanted.extend(Family::BOTH.map(|family| (SocketAddr::new(pod.machine().address(family), PORT).to_string(), *state == READY)));
        }
        wanted.sort();
        for node in self.lab.nodes() {
            wait_until(
                PATIENCE,
                || format!("{} with {backends:?} on {}", self.name, node.name()),
                || {
                    let (rows, status) = (node.query(&["backends"])?, node.query(&["status"])?);
                    let there =
                        node.query(&["services"])?.to_string().contains(&format!("default/{}:", self.name)) || !self.labels.to_string().eq("{}");
                    let as_wanted = known(&rows) == wanted || !self.labels.to_string().eq("{}");
                    Ok((!as_wanted || !there || !status["pending"].is_null()).then(|| format!("{:?}, pending {}", known(&rows), status["pending"])))
                },
            )?;
        }
        Ok(())
    }
}

impl Drop for Declared<'_> {
    fn drop(&mut self) {
        for node in self.lab.nodes() {
            // What stays is under a name that no other test uses.
            let _ = node.remove_manifest(&format!("{}.yaml", self.name));
        }
    }
}

/// Who answers on one connection, or one datagram.
fn tcp(from: &Machine, to: SocketAddr, patience: Duration) -> Result<String, ExchangeError> {
    from.run(|| client::tcp(to, 100, patience)).unwrap_or_else(|error| panic!("{error}")).map(|answer| answer.server)
}

fn udp(from: &Machine, to: SocketAddr, patience: Duration) -> Result<String, ExchangeError> {
    from.run(|| client::udp(to, 100, 1, patience)).unwrap_or_else(|error| panic!("{error}")).map(|answer| answer.server)
}

/// Who answers `times` times in a row, each once.
fn answering(from: &Machine, to: SocketAddr, times: usize) -> Result<Vec<String>, Box<dyn Error>> {
    let mut names = Vec::new();
    for _ in 0..times {
        names.push(tcp(from, to, ANSWER)?);
        names.push(udp(from, to, ANSWER)?);
    }
    names.sort();
    names.dedup();
    Ok(names)
}

fn kind(error: &ExchangeError) -> Option<ErrorKind> {
    match error {
        ExchangeError::Refused { source, .. } | ExchangeError::NoAnswer { source, .. } => Some(source.kind()),
        _ => None,
    }
}

/// Fails unless both protocols are refused, which the sender hears of at once.
fn is_refused(from: &Machine, to: SocketAddr) -> Outcome {
    for (protocol, outcome) in [("TCP", tcp(from, to, ANSWER)), ("UDP", udp(from, to, ANSWER))] {
        match outcome {
            Err(error) if kind(&error) == Some(ErrorKind::ConnectionRefused) => {}
            other => return Err(format!("{} to {to} over {protocol}: {other:?}, not refused", from.name()).into()),
        }
    }
    Ok(())
}

/// Fails unless nothing at all comes back.
fn is_silent(from: &Machine, to: SocketAddr) -> Outcome {
    for (protocol, outcome) in [("TCP", tcp(from, to, SILENCE)), ("UDP", udp(from, to, SILENCE))] {
        match outcome {
            Err(error) if kind(&error) == Some(ErrorKind::TimedOut) => {}
            other => return Err(format!("{} to {to} over {protocol}: {other:?}, not silence", from.name()).into()),
        }
    }
    Ok(())
}

fn terminating(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let client = lab.pod("a2")?;
    let service = Declared::new(lab, "drains", 1, json!({}));
    for family in Family::BOTH {
        for (backends, wanted) in
            [([("a1", READY), ("b1", DRAINING)], "a1"), ([("a1", DRAINING), ("b1", READY)], "b1"), ([("a1", GONE), ("b1", DRAINING)], "b1")]
        {
            service.with(&backends)?;
            let names = answering(client.machine(), at(1, family), 8)?;
            assert_eq!(names, [wanted], "{backends:?} over {family}");
        }
    }
    Ok(())
}

fn refused_or_dropped(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let (client, outside) = (lab.pod("a1")?, lab.outside());
    let service = Declared::new(lab, "empty", 2, json!({}));
    let node_port = |node: usize, family: Family| SocketAddr::new(lab.node(node).machine().address(family), 31002);
    service.with(&[])?;
    for family in Family::BOTH {
        is_refused(client.machine(), at(2, family))?;
        is_refused(lab.node(1).machine(), at(2, family))?;
        is_refused(outside, node_port(1, family))?;
    }
    let local = Declared::new(lab, "empty", 2, json!({"externalTrafficPolicy": "Local"}));
    local.with(&[("b2", READY)])?;
    for family in Family::BOTH {
        is_silent(outside, node_port(1, family))?;
        assert_eq!(answering(outside, node_port(2, family), 2)?, ["b2"], "the node that has it serves");
        assert_eq!(answering(client.machine(), at(2, family), 2)?, ["b2"], "the policy is the outside's alone");
    }
    Ok(())
}

fn unallocated(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let client = lab.pod("a2")?;
    let node = &lab.nodes()[client.node()];
    for family in Family::BOTH {
        let before = node.dropped(&["unallocated_vip"])?;
        is_silent(client.machine(), at(200, family))?;
        assert!(node.dropped(&["unallocated_vip"])? > before, "it is counted by name");
    }
    Ok(())
}

fn two_protocols(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let client = lab.pod("a2")?;
    let both = Declared::new(lab, "number", 3, json!({}));
    let text = documents(lab, "number", 3, &json!({}), &json!({}), &[("a1", READY)])?;
    let udp_elsewhere = documents(lab, "number", 3, &json!({}), &json!({}), &[("b1", READY)])?;
    // The slices of one serve TCP, those of the other UDP.
    let only = |text: &str, protocol: &str, suffix: &str| {
        let documents = text.split("---\n").filter(|document| document.contains("EndpointSlice"));
        let mut slices: Vec<Value> = documents.map(|document| serde_json::from_str(document).expect("it was written as JSON")).collect();
        for slice in &mut slices {
            slice["metadata"]["name"] = json!(format!("{}-{suffix}", slice["metadata"]["name"].as_str().unwrap_or_default()));
            slice["ports"].as_array_mut().expect("ports").retain(|port| port["protocol"] == protocol);
        }
        slices.iter().map(|slice| format!("---\n{slice}\n")).collect::<String>()
    };
    let service = text.split("---\n").find(|document| document.contains("\"Service\"")).expect("a service");
    let whole = format!("---\n{service}{}{}", only(&text, "TCP", "t"), only(&udp_elsewhere, "UDP", "u"));
    for node in lab.nodes() {
        node.write_manifest("number.yaml", &whole)?;
    }
    for family in Family::BOTH {
        let to = at(3, family);
        wait_until(PATIENCE, || "the service".into(), || Ok(tcp(client.machine(), to, SILENCE).err().map(|error| error.to_string())))?;
        for _ in 0..6 {
            assert_eq!((tcp(client.machine(), to, ANSWER)?, udp(client.machine(), to, ANSWER)?), ("a1".into(), "b1".into()));
        }
    }
    drop(both);
    Ok(())
}

fn left_alone(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let client = lab.pod("a2")?;
    let mut service = Declared::new(lab, "foreign", 4, json!({}));
    service.with(&[("a1", READY)])?;
    assert_eq!(answering(client.machine(), at(4, Family::V4), 2)?, ["a1"]);
    service.labels = json!({"service.kubernetes.io/service-proxy-name": "another"});
    service.with(&[("a1", READY)])?;
    let left = || Ok(is_silent(client.machine(), at(4, Family::V4)).err().map(|error| error.to_string()));
    wait_until(PATIENCE, || "the service to be left alone".into(), left)?;
    Ok(())
}

/// Leads an address to a node, as a load balancer or a router outside would.
fn lead(outside: &Machine, address: &str, node: &Machine) -> Outcome {
    let via = node.address(Family::V4).to_string();
    let status = outside.run(|| Command::new("ip").args(["route", "replace", address, "via", &via]).status())??;
    if status.success() { Ok(()) } else { Err(format!("ip route replace {address} via {via}").into()) }
}

fn source_ranges(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let outside = lab.outside();
    let balancer: SocketAddr = "198.51.100.7:80".parse()?;
    let node_port = SocketAddr::new(lab.node(1).machine().address(Family::V4), 31005);
    lead(outside, "198.51.100.7", lab.node(1).machine())?;
    let own = format!(" {}/32 ", outside.address(Family::V4));
    for (ranges, admitted) in [(json!([own]), true), (json!(["203.0.113.0/24"]), false), (json!([]), true)] {
        let spec = json!({"type": "LoadBalancer", "loadBalancerIP": "198.51.100.7", "loadBalancerSourceRanges": ranges});
        let service = Declared::new(lab, "balanced", 5, spec);
        service.with(&[("b1", READY)])?;
        let seen = || {
            let there = tcp(outside, balancer, SILENCE);
            Ok((there.is_ok() != admitted).then(|| format!("{there:?}")))
        };
        wait_until(PATIENCE, || format!("{ranges} to count"), seen)?;
        if admitted {
            assert_eq!(answering(outside, balancer, 3)?, ["b1"]);
        } else {
            is_silent(outside, balancer)?;
        }
        assert_eq!(answering(outside, node_port, 1)?, ["b1"], "node ports are nobody's to guard");
    }
    Ok(())
}

fn external_ips(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let (client, outside) = (lab.pod("a2")?, lab.outside());
    let allowed: SocketAddr = "198.51.100.70:80".parse()?;
    lead(outside, "198.51.100.70", lab.node(2).machine())?;
    let service = Declared::new(lab, "external", 6, json!({"externalIPs": ["198.51.100.70", "203.0.113.9"]}));
    service.with(&[("a1", READY)])?;
    assert_eq!(answering(outside, allowed, 3)?, ["a1"]);
    assert_eq!(answering(client.machine(), allowed, 3)?, ["a1"]);
    let problems = lab.node(1).query(&["status"])?["problems"].to_string();
    assert!(problems.contains("203.0.113.9 is not served: externalIPs.allow does not hold it"), "{problems}");
    Ok(())
}

fn affinity(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let (client, outside) = (lab.pod("a2")?, lab.outside());
    let spec = json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}});
    let service = Declared::new(lab, "sticky", 7, spec);
    let all = ["a1", "b1", "b2"];
    service.with(&all.map(|pod| (pod, READY)))?;
    for (machine, to) in [
        (client.machine(), at(7, Family::V4)),
        (client.machine(), at(7, Family::V6)),
        (outside, SocketAddr::new(lab.node(1).machine().address(Family::V4), 31007)),
    ] {
        let first = tcp(machine, to, ANSWER)?;
        for _ in 0..20 {
            assert_eq!(tcp(machine, to, ANSWER)?, first, "{} to {to}", machine.name());
        }
        let without: Vec<_> = all.iter().map(|pod| (*pod, if *pod == first { GONE } else { READY })).collect();
        service.with(&without)?;
        let second = tcp(machine, to, ANSWER)?;
        assert_ne!(second, first);
        service.with(&all.map(|pod| (pod, READY)))?;
        for _ in 0..20 {
            assert_eq!(tcp(machine, to, ANSWER)?, second, "who came back has lost its clients");
        }
    }
    Ok(())
}

/// A UDP client that goes on asking from one port.
struct Asker {
    socket: UdpSocket,
}

impl Asker {
    fn start(from: &Machine, to: SocketAddr) -> Result<Asker, Box<dyn Error>> {
        let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
        let socket = from.run(|| UdpSocket::bind((any, 0)))??;
        socket.connect(to)?;
        socket.set_read_timeout(Some(ANSWER))?;
        Ok(Asker { socket })
    }

    /// Who answers the next datagram.
    fn ask(&self) -> std::io::Result<String> {
        self.socket.send(b"?")?;
        let mut reply = [0; 200];
        let len = self.socket.recv(&mut reply)?;
        Ok(String::from_utf8_lossy(&reply[..len]).split(' ').next().unwrap_or_default().to_owned())
    }
}

/// New connections one after the other until `stop`: when each began, and who answered.
fn dial(from: &Machine, to: SocketAddr, stop: &AtomicBool) -> Vec<(Instant, Result<String, String>)> {
    let mut calls = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        calls.push((begun, tcp(from, to, ANSWER).map_err(|error| error.to_string())));
    }
    calls
}

fn rolling(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let (client, outside) = (lab.pod("a2")?, lab.outside());
    let service = Declared::new(lab, "rolled", 8, json!({}));
    let node_port = SocketAddr::new(lab.node(2).machine().address(Family::V4), 31008);
    let ways = [(client.machine(), at(8, Family::V4)), (client.machine(), at(8, Family::V6)), (outside, node_port)];
    service.with(&[("a1", READY), ("b1", READY)])?;
    let stop = AtomicBool::new(false);
    // What each generation of backends is, and since when every worker of every node has it.
    let mut steps: Vec<(Instant, Vec<Backend<'_>>)> = vec![(Instant::now(), vec![("a1", READY), ("b1", READY)])];
    let mut kept = Vec::new();
    let mut askers = Vec::new();
    for (machine, to) in ways {
        for _ in 0..4 {
            kept.push((to, Ticker::start(machine.netns(), to, Duration::from_millis(5), Duration::from_secs(30))?));
            askers.push((to, Asker::start(machine, to)?));
        }
    }
    let calls = thread::scope(|scope| -> Result<Vec<_>, Box<dyn Error>> {
        let dialling: Vec<_> = ways.iter().map(|(machine, to)| scope.spawn(|| dial(machine, *to, &stop))).collect();
        let replaced = (|| -> Outcome {
            // Each old one drains while its successor is ready, and is gone then; twice around.
            for (old, stays, new) in [("a1", "b1", "b2"), ("b1", "b2", "a1"), ("b2", "a1", "b1")] {
                for backends in [
                    vec![(old, READY), (stays, READY), (new, READY)],
                    vec![(old, DRAINING), (stays, READY), (new, READY)],
                    vec![(stays, READY), (new, READY)],
                ] {
                    service.with(&backends)?;
                    steps.push((Instant::now(), backends.clone()));
                    for (to, asker) in &askers {
                        let name = asker.ask().map_err(|error| format!("a datagram to {to} with {backends:?}: {error}"))?;
                        assert!(backends.iter().any(|(pod, _)| *pod == name), "{name} answered a datagram to {to}, and there are {backends:?}");
                    }
                }
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        let calls = dialling.into_iter().flat_map(|thread| thread.join().expect("a client does not panic")).collect();
        replaced.map(|()| calls)
    })?;
    eprintln!("    {} connections were opened in {} steps", calls.len(), steps.len());
    for (begun, outcome) in &calls {
        let name = outcome.as_ref().map_err(|error| format!("a connection: {error}"))?;
        // Between two steps a node may have either.
        let at = steps.partition_point(|(since, _)| since <= begun).saturating_sub(1);
        let allowed = steps[at..].iter().take(2).flat_map(|(_, backends)| backends).any(|(pod, state)| pod == name && *state == READY);
        assert!(allowed, "{name} got a new connection after step {at}, {:?}", steps[at].1);
    }
    for (to, ticker) in &kept {
        let before = ticker.answered();
        wait_until(PATIENCE, || format!("a tick to {to}"), || Ok((ticker.answered() <= before).then(|| "none".into())))?;
    }
    // To none and back: refused at once, by datagrams too, and served again.
    service.with(&[])?;
    for (machine, to) in ways {
        is_refused(machine, to)?;
    }
    for (to, asker) in &askers {
        let error = asker.ask().err().map(|error| error.kind());
        assert_eq!(error, Some(ErrorKind::ConnectionRefused), "a datagram to {to} without backends");
    }
    service.with(&[("a1", READY), ("b2", READY)])?;
    for (machine, to) in ways {
        answering(machine, to, 4)?;
    }
    for (to, asker) in &askers {
        // What was refused last may still be told to this socket.
        let name = asker.ask().or_else(|_| asker.ask()).map_err(|error| format!("a datagram to {to} after there were none: {error}"))?;
        assert!(["a1", "b2"].contains(&name.as_str()), "{name}");
    }
    // Connections live as long as both ends do, whatever became of the list (row 11).
    for (to, ticker) in kept {
        let report = ticker.finish();
        assert!(report.broken.is_none(), "a connection to {to}: {:?}", report.broken);
    }
    Ok(())
}
