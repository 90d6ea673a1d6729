//! The image, run as the manifest says: two nodes, pods that come by CNI, services; then, under traffic, gateways that are killed and a roll-out, and
//! the clean-up.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podgate::lab::manifest::{self as objects, EndpointSpec, SERVICE_PORT, ServiceSpec, TrafficPolicy};
use podgate::lab::program::client;
use podgate::lab::{Dual, Lab, LabError, Machine, Node, wait_until};
use podgate::netlink::Family;
use podgate_apiserver::{ApiServer, Rule};
use podgate_testbed::cni::{Container, Plugin, Verb};
use podgate_testbed::runtime::Runtime;
use podgate_testbed::traces::Host;
use podgate_testbed::{Bed, Outcome};
use serde_json::Value;

use crate::cluster::{Kubectl, address, serve};
use crate::kubelet::Kubelet;
use crate::manifest::MANIFEST;
use crate::{Try, deploy, workspace};

/// The gateways' token.
const GATEWAY: &str = "hush-hush-4711";
/// As the manifest names it: what the layout holds goes by this name in podman's storage.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// A request that has no answer by then has failed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Packs what is to be shipped, with static programs of the tests' own profile or those in the directory that `PODGATE_STATIC` names, and gives
/// the directory of the package.
pub fn pack(what: &str, directory: &Path) -> Try<PathBuf> {
    let own = std::env::current_exe()?;
    let profile = own.parent().and_then(Path::parent).ok_or("a test program lies in target/PROFILE/deps")?;
    let release = profile.file_name().is_some_and(|name| name == "release");
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.env("CARGO_TARGET_DIR", profile.parent().unwrap_or(profile)).current_dir(workspace(""));
    command.args(["run", "--quiet", "-p", "podgate-package", "--", what, "--output"]).arg(directory);
    match std::env::var_os("PODGATE_STATIC").map(PathBuf::from) {
        Some(programs) => {
            command.arg("--podgate").arg(programs.join("podgate")).arg("--podgate-cni").arg(programs.join("podgate-cni"));
        }
        None => {
            command.args(["--profile", if release { "release" } else { "dev" }]);
        }
    }
    let output = command.output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(directory.to_owned())
}

/// The manifest with its ConfigMap edited as its first lines tell, as the documents stand.
fn edited(server: SocketAddr) -> Try<String> {
    let text = deploy(MANIFEST)?;
    let edited = text
        .replace("https://192.0.2.10:6443", &format!("http://{server}"))
        .replace("    - 10.244.0.0/16\n", "    - 10.244.0.0/16\n    - fd00:77::/32\n")
        .replace("    - 10.96.0.0/16\n", "    - 10.96.0.0/16\n    - fd00:96::/112\n");
    assert_eq!(edited.lines().count(), text.lines().count() + 2);
    Ok(edited)
}

pub fn rolled(bed: &Bed) -> Outcome {
    let lab = Lab::builder(bed.sandbox(), &bed.binary()).named("image").nodes(2).machines()?;
    let package = pack("image", &lab.directory().join("package"))?;
    let server = ApiServer::default();
    let _serving = serve(&server, lab.outside())?;
    let kubectl = Kubectl::new(lab.outside(), lab.directory())?;
    kubectl.ok(&["apply", "-f", "-"], &edited(address(lab.outside()))?)?;
    kubectl.ok(&["create", "-f", "-"], &lab.nodes().iter().map(|node| objects::node(node.spec())).collect::<String>())?;
    // From now on tokens are asked for, and the gateways' may do what was applied.
    server.allow(GATEWAY, Some(Rule::of_manifest(&deploy(MANIFEST)?)?));
    let [set] = &server.objects("daemonsets")[..] else { return Err("not one DaemonSet".into()) };
    let map = server.objects("configmaps").into_iter().find(|map| map["metadata"]["name"] == "podgate").ok_or("no ConfigMap")?;
    // What kubelet mounts: the ConfigMap's files, and the service account's token with the authority that signed the server's certificate.
    let authority = rcgen::generate_simple_self_signed(vec!["kubernetes".to_owned()])?.cert.pem();
    let mut before = Vec::new();
    let mut kubelets = Vec::new();
    for node in lab.nodes() {
        before.push(Host::of(node.machine())?);
        // The gateways' containers are on the node's own network; podman wants some directory of plugins all the same.
        let runtime = Runtime::new(bed.sandbox(), node, &[], std::slice::from_ref(&package))?;
        let kubelet = Kubelet::new(node, runtime, &package.join("oci"), VERSION)?;
        kubelet.give("podgate", &[("podgate.yaml", map["data"]["podgate.yaml"].as_str().unwrap_or_default())])?;
        kubelet.give("token", &[("token", GATEWAY), ("ca.crt", &authority), ("namespace", "kube-system")])?;
        kubelets.push(kubelet);
    }
    for (node, kubelet) in lab.nodes().iter().zip(&kubelets) {
        assert!(!conflist(kubelet).exists());
        kubelet.run(set, "first").map_err(|error| format!("{}: {error}", node.name()))?;
    }
    for (node, kubelet) in lab.nodes().iter().zip(&kubelets) {
        ready(node, kubelet, "first")?;
        wait_until(
            PATIENCE,
            || format!("the CNI configuration of {}", node.name()),
            || Ok((!conflist(kubelet).exists()).then(|| "it is not there".into())),
        )?;
    }
    let pods = lab.nodes().iter().enumerate().map(|(at, _)| lab.attach(at, &format!("a{}", at + 1))).collect::<Result<Vec<_>, _>>()?;
    let mut endpoints = Vec::new();
    for (pod, node) in pods.iter().zip(lab.nodes()) {
        pod.machine().serve()?;
        endpoints.push(EndpointSpec { addresses: pod.machine().addresses(), node: node.name().to_owned() });
    }
    let vips = Dual { v4: "10.96.0.50".parse()?, v6: "fd00:96::50".parse()? };
    let web = ServiceSpec { name: "web".into(), vips, node_port: 30050, policy: TrafficPolicy::Cluster, endpoints };
    let objects: Vec<Value> = serde_saphyr::from_multiple(&objects::service(&web)).map_err(|error| error.to_string())?;
    objects.into_iter().filter(|object| !object.is_null()).for_each(|object| server.put(object));
    for node in lab.nodes() {
        wait_until(
            PATIENCE,
            || format!("the service on {}", node.name()),
            || Ok((node.podgate(&["backends"])?.matches("10.244.").count() < 2).then(|| "it has not both endpoints".into())),
        )?;
    }
    for (node, kubelet) in lab.nodes().iter().zip(&kubelets) {
        by_cni(node, kubelet, lab.directory(), vips)?;
    }

    let stop = AtomicBool::new(false);
    let node_port = |node: &Node| SocketAddr::new(node.machine().address(Family::V4), web.node_port);
    let vip = SocketAddr::new(vips.v4.into(), SERVICE_PORT);
    let ways: Vec<(&str, &Machine, SocketAddr)> = vec![
        ("pod on node-1 to the VIP", pods[0].machine(), vip),
        ("pod on node-2 to the VIP", pods[1].machine(), vip),
        ("outside to node-1's port", lab.outside(), node_port(lab.node(1))),
        ("outside to node-2's port", lab.outside(), node_port(lab.node(2))),
        ("node-1 to the VIP", lab.node(1).machine(), vip),
    ];
    let (mut requests, mut failed, mut longest) = (0, 0, Duration::ZERO);
    std::thread::scope(|scope| -> Outcome {
        let stop = &stop;
        let clients: Vec<_> = ways.iter().map(|(name, from, to)| (*name, scope.spawn(move || from.run(|| ask(*to, stop))))).collect();
        let (from, to) = (pods[0].machine(), pods[1].machine().addresses().server(Family::V4));
        let connection: ScopedJoinHandle<'_, _> = scope.spawn(move || from.run(|| talk(to, stop)));
        let rolled = lab.nodes().iter().zip(&kubelets).try_for_each(|(node, kubelet)| {
            crash(node, kubelet)?;
            roll(node, kubelet, set)
        });
        stop.store(true, Ordering::Relaxed);
        for (name, client) in clients {
            let Tally { asked, unanswered, slowest } = client.join().map_err(|_| "a client panicked")??;
            eprintln!("    {name}: {asked} requests, {} failed, the slowest took {} ms", unanswered.len(), slowest.as_millis());
            unanswered.iter().for_each(|why| eprintln!("      {why}"));
            (requests, failed, longest) = (requests + asked, failed + unanswered.len(), longest.max(slowest));
        }
        rolled?;
        let gap = connection.join().map_err(|_| "the connection's client panicked")???;
        eprintln!("    one connection between nodes lived through both, with a pause of {} ms", gap.as_millis());
        Ok(())
    })?;
    eprintln!("    killed and rolled two nodes: {failed} of {requests} requests failed, the longest took {} ms", longest.as_millis());
    assert!(requests > 100, "too few to tell");
    assert_eq!(failed, 0);
    assert!(longest < Duration::from_millis(950), "a SYN was lost, and sent again after a second");
    let used = server.used();
    let allowed: std::collections::BTreeSet<_> = Rule::of_manifest(&deploy(MANIFEST)?)?.iter().flat_map(Rule::uses).collect();
    assert_eq!(used, allowed, "what the gateways made use of is not what the manifest allows");

    // Everything goes as the clean-up's manifest takes it.
    let documents = crate::manifest::documents(&deploy("kubernetes/cleanup.yaml")?)?;
    let cleanup = &documents["DaemonSet podgate-cleanup"];
    for ((node, kubelet), before) in lab.nodes().iter().zip(&kubelets).zip(before) {
        kubelet.end("second")?;
        kubelet.give("podgate-cleanup", &[("podgate.yaml", "source: {kubernetes: {}}\n")])?;
        kubelet.run(cleanup, "cleanup")?;
        wait_until(
            Duration::from_secs(20),
            || format!("the clean-up of {}", node.name()),
            || {
                let said = kubelet.logs("cleanup").unwrap_or_default();
                Ok((!said.contains("waiting for SIGTERM")).then_some(said))
            },
        )?;
        assert!(kubelet.is_running("cleanup")?, "{}", kubelet.logs("cleanup")?);
        kubelet.end("cleanup")?;
        let said = kubelet.logs("cleanup")?;
        assert!(!said.contains("not restored"), "{said}");
        let left = Host::of(node.machine())?.differs(&before);
        assert!(left.is_empty(), "{}: {left:#?} {said}", node.name());
        assert!(!conflist(kubelet).exists() && !kubelet.host("/opt/cni/bin/podgate-cni").exists(), "{said}");
    }
    Ok(())
}

/// The gateway is killed in its container, whose process 1 starts the next one: with what the API server said before, since packets wait.
fn crash(node: &Node, kubelet: &Kubelet<'_>) -> Outcome {
    let supervisor = kubelet.pid("first")?;
    let children = || fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children")).unwrap_or_default();
    let gateway = children().split_whitespace().next().ok_or("the supervisor has no gateway")?.parse()?;
    let began = kubelet.logs("first")?.matches("readiness ready=true").count();
    let start = Instant::now();
    kill(Pid::from_raw(gateway), Signal::SIGKILL)?;
    wait_until(
        PATIENCE,
        || format!("the next gateway of {}", node.name()),
        || {
            let said = kubelet.logs("first").unwrap_or_default();
            Ok((said.matches("readiness ready=true").count() <= began).then_some(said))
        },
    )?;
    assert!(kubelet.pid("first")? == supervisor && children().split_whitespace().next() != Some(&gateway.to_string()));
    eprintln!("    {}: the next gateway was ready {} ms after the first was killed", node.name(), start.elapsed().as_millis());
    Ok(())
}

/// A new pod beside the old one, which hands the node over; when the node is healthy by its probes, the old one ends.
fn roll(node: &Node, kubelet: &Kubelet<'_>, set: &Value) -> Outcome {
    let start = Instant::now();
    kubelet.run(set, "second")?;
    wait_until(
        Duration::from_secs(20),
        || format!("the first gateway of {} to hand the node over", node.name()),
        || {
            let failed =
                |error: Box<dyn std::error::Error>| LabError::Program { what: "its log".into(), source: std::io::Error::other(error.to_string()) };
            let said = kubelet.logs("first").map_err(failed)?;
            Ok((!said.contains("handed the node over")).then(|| format!("{said}\n{}", kubelet.logs("second").unwrap_or_default())))
        },
    )?;
    ready(node, kubelet, "second")?;
    let paused = kubelet.logs("second")?;
    let paused = paused.lines().find_map(|line| line.split_once("pause_us=")).ok_or("no word of the pause")?.1.trim().to_owned();
    eprintln!(
        "    {}: the second gateway was ready {} ms after its start; the workers stood still for {paused} us",
        node.name(),
        start.elapsed().as_millis()
    );
    let probe = set["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"].clone();
    let at = SocketAddr::new(probe["host"].as_str().ok_or("no host")?.parse()?, probe["port"].as_u64().ok_or("no port")? as u16);
    let path = probe["path"].as_str().ok_or("no path")?.to_owned();
    let answer = node.machine().run(|| -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&at, PATIENCE)?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })??;
    assert!(answer.starts_with("HTTP/1.0 200") || answer.starts_with("HTTP/1.1 200"), "{answer}");
    kubelet.end("first")?;
    ready(node, kubelet, "second")
}

fn conflist(kubelet: &Kubelet<'_>) -> PathBuf {
    kubelet.host("/etc/cni/net.d").join("10-podgate.conflist")
}

fn ready(node: &Node, kubelet: &Kubelet<'_>, pod: &str) -> Outcome {
    let asked = wait_until(
        Duration::from_secs(20),
        || format!("{} to be ready", node.name()),
        || Ok(node.podgate(&["status", "--wait=1"]).err().map(|error| error.to_string())),
    );
    asked.map_err(|error| format!("{error}\n{}", kubelet.logs(pod).unwrap_or_default()).into())
}

/// A pod as a container runtime makes one: with the plugin and the configuration that were installed.
fn by_cni(node: &Node, kubelet: &Kubelet<'_>, directory: &Path, vips: Dual) -> Outcome {
    let list: Value = serde_json::from_slice(&fs::read(conflist(kubelet))?)?;
    let mut config = list["plugins"][0].clone();
    (config["name"], config["cniVersion"]) = (list["name"].clone(), list["cniVersion"].clone());
    assert_eq!(config["socket"], "/run/podgate/podgate.sock");
    // Where that is in the lab.
    config["socket"] = kubelet.host("/run/podgate").join("podgate.sock").display().to_string().into();
    let bin = kubelet.host("/opt/cni/bin");
    let plugin = Plugin::new(bin.join("podgate-cni"), &[bin], node.machine().netns())?;
    let container = Container::new(&directory.join("containers"), &format!("cni-{}", node.name()))?;
    plugin.call(Verb::Add, &container.target("eth0"), &config)?.success()?;
    for vip in [IpAddr::V4(vips.v4), IpAddr::V6(vips.v6)] {
        container.netns().run(|| client::tcp(SocketAddr::new(vip, SERVICE_PORT), 20_000, PATIENCE))??;
    }
    plugin.call(Verb::Del, &container.target("eth0"), &config)?.success()?;
    Ok(())
}

/// What a client saw.
#[derive(Default)]
struct Tally {
    asked: usize,
    unanswered: Vec<String>,
    slowest: Duration,
}

/// Asks again and again, a new connection each time.
fn ask(to: SocketAddr, stop: &AtomicBool) -> Tally {
    let mut tally = Tally::default();
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        tally.asked += 1;
        if let Err(error) = client::tcp(to, 1000, PATIENCE) {
            tally.unanswered.push(error.to_string());
        }
        tally.slowest = tally.slowest.max(start.elapsed());
        // As many as a busy client makes; without a pause a second of it would use up the client's ports.
        std::thread::sleep(Duration::from_millis(5));
    }
    tally
}

/// One connection, on which something is said and answered all the time; the longest that an answer took.
fn talk(to: SocketAddr, stop: &AtomicBool) -> std::io::Result<Duration> {
    const LEN: usize = 8;
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"C")?;
    let (mut wanted, mut had, mut longest) = (0, 0, Duration::ZERO);
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        stream.write_all(&[b'x'; LEN])?;
        wanted += LEN;
        while had < wanted {
            match stream.read(&mut buffer)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                len => had += len,
            }
        }
        longest = longest.max(start.elapsed());
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(longest)
}
