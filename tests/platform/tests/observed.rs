//! What others see of a running gateway: load balancers that ask for a service's health, probes, Prometheus, and an operator who asks what
//! changed.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use podgate::lab::program::client;
use podgate::lab::{Lab, LabError, Machine, manifest, wait_until};
use podgate::netlink::Family;
use podgate_testbed::{Bed, Outcome, run};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(5);

/// Within the node ports, as an API server gives it out: packets to it pass the gateway.
const CHECK_PORT: u16 = 32100;

fn main() -> ExitCode {
    run(|tests| {
        tests.add("a load balancer is told which node has a ready endpoint, as services and endpoints change", load_balancer);
        tests.add("a health check's port that is taken is named in status until it is free", busy_check_port);
        tests.add("a node that is about to go fails /healthz and not /livez, and stays ready", leaving);
        tests.add("Prometheus finds kube-proxy's metrics and the gateway's own, and they count", metrics);
        tests.add("`podgate diff` says what changed since a generation, object by object", diff);
    })
}

/// An answer over HTTP: its status, its head and its body.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

fn get(from: &Machine, at: SocketAddr, path: &str) -> Result<Answer, String> {
    let fetch = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let text = from.run(fetch).map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or("no end of the head")?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or("no status")?;
    Ok(Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() })
}

/// Waits until `path` is answered with `status`; the answer.
fn expect(from: &Machine, at: SocketAddr, path: &str, status: u16) -> Result<Answer, Box<dyn Error>> {
    let mut answer = Err("nobody asked".to_owned());
    wait_until(
        PATIENCE,
        || format!("{status} from {at}{path}"),
        || {
            answer = get(from, at, path);
            Ok(match &answer {
                Ok(answer) if answer.status == status => None,
                Ok(answer) => Some(format!("{} {}", answer.status, answer.body)),
                Err(e) => Some(e.clone()),
            })
        },
    )?;
    Ok(answer?)
}

/// A load balancer's service with one endpoint, a pod of the first node.
fn service(lab: &Lab, conditions: &str) -> Result<String, Box<dyn Error>> {
    let address = lab.pod("a1")?.machine().addresses().v4;
    let node = lab.node(1).name();
    Ok(format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: lb, namespace: default}}\nspec:\n  type: LoadBalancer\n  clusterIP: 10.96.7.7\n  \
         externalTrafficPolicy: Local\n  healthCheckNodePort: {CHECK_PORT}\n  ports: [{{port: 80, nodePort: 32101}}]\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: lb-1, namespace: default, labels: {{kubernetes.io/service-name: lb}}}}\n\
         addressType: IPv4\nports: [{{port: 80}}]\nendpoints:\n- {{addresses: [{address}], nodeName: {node}, conditions: {conditions}}}\n"
    ))
}

fn write_everywhere(lab: &Lab, text: &str) -> Outcome {
    for node in lab.nodes() {
        node.write_manifest("lb.yaml", text)?;
    }
    Ok(())
}

fn remove_everywhere(lab: &Lab) -> Outcome {
    for node in lab.nodes() {
        node.remove_manifest("lb.yaml")?;
    }
    for node in lab.nodes() {
        let known = || -> Result<String, LabError> { Ok(node.query(&["services"])?.to_string()) };
        wait_until(PATIENCE, || "the service to go".into(), || known().map(|all| all.contains("default/lb").then_some(all)))?;
    }
    Ok(())
}

fn load_balancer(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let outside = lab.outside();
    write_everywhere(lab, &service(lab, "{ready: true}")?)?;
    for family in Family::BOTH {
        let at = |node: usize| SocketAddr::new(lab.node(node).machine().address(family), CHECK_PORT);
        let here = expect(outside, at(1), "/", 200)?;
        let body: Value = serde_json::from_str(&here.body)?;
        assert_eq!((&body["service"]["namespace"], &body["service"]["name"]), (&"default".into(), &"lb".into()), "{body}");
        assert_eq!((&body["localEndpoints"], &body["serviceProxyHealthy"]), (&1.into(), &true.into()), "{body}");
        assert!(here.head.contains("x-load-balancing-endpoint-weight: 1"), "{}", here.head);
        let elsewhere = expect(outside, at(2), "/", 503)?;
        assert!(elsewhere.head.contains("x-load-balancing-endpoint-weight: 0"), "{}", elsewhere.head);
    }
    let at = SocketAddr::new(lab.node(1).machine().address(Family::V4), CHECK_PORT);
    expect(lab.node(1).machine(), at, "/", 200)?;
    // It goes on serving what it has, and is to get nothing new: no snapshot changes by that, since it is used for want of a ready one.
    write_everywhere(lab, &service(lab, "{ready: false, serving: true, terminating: true}")?)?;
    expect(outside, at, "/", 503)?;
    remove_everywhere(lab)?;
    wait_until(PATIENCE, || "closed".into(), || Ok(get(outside, at, "/").ok().map(|answer| answer.body)))?;
    Ok(())
}

fn busy_check_port(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(1);
    let address = SocketAddr::new(node.machine().address(Family::V4), CHECK_PORT);
    let taken = node.machine().run(|| std::net::TcpListener::bind(address))??;
    write_everywhere(lab, &service(lab, "{ready: true}")?)?;
    let said = "Service default/lb: load balancers cannot ask for its health on healthCheckNodePort 32100";
    let problems = || -> Result<String, LabError> { Ok(node.query(&["status"])?["problems"].to_string()) };
    wait_until(PATIENCE, || "the problem in status".into(), || problems().map(|all| (!all.contains(said)).then_some(all)))?;
    drop(taken);
    // The next change of anything tries again.
    write_everywhere(lab, &service(lab, "{ready: true, serving: true}")?.replace("32101", "32102"))?;
    wait_until(PATIENCE, || "no problem in status".into(), || problems().map(|all| all.contains(said).then_some(all)))?;
    expect(lab.outside(), address, "/", 200)?;
    remove_everywhere(lab)
}

fn leaving(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(1);
    let at = SocketAddr::new(node.machine().address(Family::V4), 10256);
    let outside = lab.outside();
    let staying = expect(outside, at, "/healthz", 200)?;
    let body: Value = serde_json::from_str(&staying.body)?;
    assert!(body["nodeEligible"] == true && body["lastUpdated"].is_string() && body["currentTime"].is_string(), "{body}");
    let nodes: String = lab.nodes().iter().map(|node| manifest::node(node.spec())).collect();
    let name = format!("metadata: {{name: {}}}\nspec: {{", node.name());
    let tainted = nodes.replace(&name, &format!("{name}taints: [{{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}}], "));
    assert_ne!(nodes, tainted);
    node.write_manifest("nodes.yaml", &tainted)?;
    let going = expect(outside, at, "/healthz", 503)?;
    assert_eq!(serde_json::from_str::<Value>(&going.body)?["nodeEligible"], false, "{}", going.body);
    expect(outside, at, "/livez", 200)?;
    assert_eq!(node.query(&["status"])?["ready"], true);
    node.write_manifest("nodes.yaml", &nodes)?;
    expect(outside, at, "/healthz", 200)?;
    Ok(())
}

fn metrics(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let (node, pod) = (lab.node(1), lab.pod("a1")?);
    let at = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
    let vip = SocketAddr::new(lab.service("one-pod")?.vips.of(Family::V4), 80);
    let page = || -> Result<String, Box<dyn Error>> { Ok(expect(node.machine(), at, "/metrics", 200)?.body) };
    let value = |page: &str, sample: &str| -> Result<f64, Box<dyn Error>> {
        let line = page.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        Ok(line.ok_or_else(|| format!("no {sample} in\n{page}"))?.parse()?)
    };
    let before = page()?;
    // Whatever else there is, every line is one of the format's.
    for line in before.lines().filter(|line| !line.starts_with("# ")) {
        let (name, number) = line.rsplit_once(' ').ok_or_else(|| format!("no sample: {line}"))?;
        assert!(name.starts_with(|c: char| c.is_ascii_lowercase()) && number.parse::<f64>().is_ok(), "{line}");
    }
    pod.machine().run(|| client::tcp(vip, 1000, Duration::from_secs(2)))??;
    let created = |page: &str| -> f64 {
        let samples = page.lines().filter(|line| line.starts_with("podgate_flows_created_total{"));
        samples.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    };
    assert!(created(&page()?) > created(&before), "a connection through a service is a flow");
    // An endpoint's change, said to have happened just now.
    let now = k8s_openapi::jiff::Timestamp::from_nanosecond(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos().try_into()?)?;
    let text = service(lab, "{ready: true}")?.replace(
        "metadata: {name: lb-1,",
        &format!("metadata: {{name: lb-1, annotations: {{endpoints.kubernetes.io/last-change-trigger-time: \"{now}\"}},"),
    );
    write_everywhere(lab, &text)?;
    let count = "kubeproxy_network_programming_duration_seconds_count";
    let known = value(&before, count)?;
    wait_until(
        PATIENCE,
        || format!("{count} to grow"),
        || {
            let page = page().map_err(|e| e.to_string());
            let now = page.and_then(|page| value(&page, count).map_err(|e| e.to_string()));
            Ok(match now {
                Ok(now) if now > known => None,
                other => Some(format!("{known}, then {other:?}")),
            })
        },
    )?;
    let after = page()?;
    assert!(value(&after, "kubeproxy_network_programming_duration_seconds_bucket{le=\"5\"}")? >= known + 1.0, "within seconds");
    for sample in ["kubeproxy_sync_proxy_rules_duration_seconds_count", "kubeproxy_sync_proxy_rules_endpoint_changes_total"] {
        assert!(value(&after, sample)? > value(&before, sample)?, "{sample}");
    }
    assert!(value(&after, "kubeproxy_sync_proxy_rules_last_timestamp_seconds")? > 1.7e9);
    assert_eq!(value(&after, "kubeproxy_sync_proxy_rules_endpoint_changes_pending")?, 0.0);
    assert_eq!(value(&after, "podgate_ready")?, 1.0);
    assert_eq!(value(&after, "podgate_update_pending_seconds")?, 0.0);
    assert!(value(&after, "podgate_packet_latency_seconds_count")? > 0.0);
    remove_everywhere(lab)
}

fn diff(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(1);
    let generation = || -> Result<u64, Box<dyn Error>> { Ok(node.query(&["status"])?["generation"].as_u64().ok_or("no generation")?) };
    let start = generation()?;
    write_everywhere(lab, &service(lab, "{ready: true}")?)?;
    let since = start.to_string();
    let changed = |name: &str, what: &str| {
        wait_until(
            PATIENCE,
            || format!("{name} {what}"),
            || {
                let value = node.query(&["diff", &since])?;
                let is = |row: &Value| row["name"] == name && row["change"] == what;
                Ok((!value["changes"].as_array().is_some_and(|rows| rows.iter().any(is))).then(|| value.to_string()))
            },
        )
    };
    changed("default/lb", "added")?;
    changed("default/lb-1", "added")?;
    write_everywhere(lab, &service(lab, "{ready: false, serving: true, terminating: true}")?)?;
    wait_until(
        PATIENCE,
        || "the endpoint's turn".into(),
        || {
            let text = node.podgate(&["diff", &since])?;
            Ok((!text.contains("ready on node-1 → terminating and serving on node-1")).then_some(text))
        },
    )?;
    remove_everywhere(lab)?;
    changed("default/lb", "removed")?;
    let ahead = node.podgate_output(&["diff", "1000000"])?;
    assert_eq!(ahead.status.code(), Some(1), "{ahead:?}");
    assert!(String::from_utf8_lossy(&ahead.stderr).contains("there is no generation 1000000 yet"), "{ahead:?}");
    Ok(())
}
