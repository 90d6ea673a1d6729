//! The alert rules and the dashboard, and the page of metrics, before a real Prometheus.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use podgate::lab::program::client;
use podgate::lab::{LabError, Machine, wait_until};
use podgate::netlink::Family;
use podgate_testbed::tool::Running;
use podgate_testbed::{Bed, Outcome};
use serde_json::Value;

use crate::{Try, deploy, workspace};

const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
const PROMETHEUS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9090);

pub fn rules(_: &Bed) -> Outcome {
    for words in [&["check", "rules", "alerts.yaml"][..], &["test", "rules", "alerts_test.yaml"]] {
        let mut command = Command::new("promtool");
        command.args(words).current_dir(workspace("deploy/monitoring"));
        Running::start(command, b"")?.end(Duration::from_secs(60))?.success()?;
    }
    // Nobody has a rule that is never tested.
    let alerts = deploy("monitoring/alerts.yaml")?;
    let tests = deploy("monitoring/alerts_test.yaml")?;
    for name in alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        assert!(tests.contains(&format!("alertname: {name}")), "no test of {name}");
    }
    Ok(())
}

/// The body of what a server on `machine` answers.
fn get(machine: &Machine, at: SocketAddr, path: &str) -> Try<String> {
    let answer = machine.run(|| -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })??;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("no end of the head")?;
    if head.split(' ').nth(1) == Some("200") { Ok(body.to_owned()) } else { Err(format!("{path}: {answer}").into()) }
}

pub fn prometheus(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let (node, pod) = (lab.node(1), lab.pod("a1")?);
    let vip = SocketAddr::new(lab.service("web")?.vips.of(Family::V4), 80);
    pod.machine().run(|| client::tcp(vip, 10_000, Duration::from_secs(2)))??;
    let page = get(node.machine(), METRICS, "/metrics")?;
    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]);
    let checked = Running::start(command, page.as_bytes())?.end(Duration::from_secs(30))?;
    // It exits with 1 for what it cannot read, and with 3 for names that are not as they should be: those that kube-proxy gave.
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{}", checked.printed());
    let odd: Vec<&str> = checked.stderr.lines().chain(checked.stdout.lines()).filter(|line| !line.starts_with("kubeproxy_")).collect();
    assert!(odd.is_empty(), "{odd:#?}");

    let directory = bed.sandbox().directory().join("prometheus");
    fs::create_dir_all(&directory)?;
    let config = directory.join("prometheus.yml");
    let rules = workspace("deploy/monitoring/alerts.yaml").canonicalize()?;
    fs::write(
        &config,
        format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [{}]\nscrape_configs:\n- job_name: podgate\n  static_configs: [{{targets: [\"{METRICS}\"]}}]\n",
            rules.display()
        ),
    )?;
    let mut command = Command::new("prometheus");
    command.arg(format!("--config.file={}", config.display())).arg(format!("--storage.tsdb.path={}", directory.join("data").display()));
    command.arg(format!("--web.listen-address={PROMETHEUS}")).stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(fs::File::create(directory.join("log"))?);
    struct Ended(std::process::Child);
    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = self.0.kill().and_then(|()| self.0.wait());
        }
    }
    let _server = Ended(node.machine().run(|| command.spawn())??);

    let dashboard: Value = serde_json::from_str(&deploy("monitoring/podgate-dashboard.json")?)?;
    let targets = dashboard["panels"].as_array().into_iter().flatten().flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let queries: BTreeSet<String> = targets
        .filter_map(|target| target["expr"].as_str())
        // What Grafana puts in place of its variables.
        .map(|expr| expr.replace("$instance", ".*").replace("$__rate_interval", "10s"))
        .collect();
    assert!(queries.len() > 15 && queries.iter().all(|query| !query.contains('$')), "{queries:?}");
    let mut asked = 0;
    for query in &queries {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let failed =
            |error: Box<dyn std::error::Error>| LabError::Program { what: "Prometheus".into(), source: std::io::Error::other(error.to_string()) };
        wait_until(
            Duration::from_secs(30),
            || format!("an answer to {query}"),
            || {
                // While it starts it does not answer, and a rate needs two samples.
                pod.machine().run(|| client::tcp(vip, 1_000, Duration::from_secs(2)))?.map_err(|error| failed(error.into()))?;
                let answer = match get(node.machine(), PROMETHEUS, &format!("/api/v1/query?query={encoded}")) {
                    Ok(answer) => answer,
                    Err(error) => return Ok(Some(error.to_string())),
                };
                let value: Value = serde_json::from_str(&answer).map_err(|error| failed(error.into()))?;
                let there = value["data"]["result"].as_array().is_some_and(|result| !result.is_empty());
                Ok((!there).then_some(answer))
            },
        )?;
        asked += 1;
    }
    eprintln!("    {asked} queries of the dashboard were answered");
    // The node is healthy, so nothing fires.
    let alerts: Value = serde_json::from_str(&get(node.machine(), PROMETHEUS, "/api/v1/alerts")?)?;
    let firing: Vec<&Value> = alerts["data"]["alerts"].as_array().into_iter().flatten().filter(|alert| alert["state"] == "firing").collect();
    assert!(firing.is_empty(), "{firing:#?}");
    Ok(())
}
