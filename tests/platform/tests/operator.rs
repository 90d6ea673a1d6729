//! What an operator meets at three in the morning: a machine that lacks something, a port that somebody else has, a second gateway; and
//! whether the host is as it was found when the gateway is taken off again. All of it with the real binary.

use std::fs;
use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::Signal;
use podgate::lab::program::client;
use podgate::lab::{Lab, LabError, Node, NodeSettings, manifest, wait_until};
use podgate::netlink::{Family, TABLE_LOCAL, TABLE_MAIN};
use podgate::routing::{CLUSTER_TABLE, HOST_TABLE};
use podgate_testbed::cni::{Container, Plugin, Verb};
use podgate_testbed::{Bed, Need, Outcome, run};
use serde_json::Value;

fn main() -> ExitCode {
    run(|tests| {
        tests.add("without /dev/net/tun the daemon says what to load or to pass in", no_tun);
        let setpriv = Need::Program("setpriv");
        tests.add_if(setpriv, "without a capability the daemon names it before it touches anything", no_capability);
        tests.add("a busy overlay port is named, with what finds its holder, and nothing else is wrong", busy_overlay_port);
        tests.add("a busy health port is named, with the key that moves it", busy_health_port);
        tests.add("an underlay address that the machine does not have is named beside those that it has", foreign_address);
        tests.add("a second gateway is refused, in the same directory and in one of its own", second_gateway);
        tests.add("every table that scripts read has its keys, from a daemon with traffic", tables);
        tests.add("install-cni puts a plugin and a configuration in place by which a runtime attaches, and takes them away again", install_cni);
        tests.add("cleanup leaves the host as it was before the gateway came", cleanup);
    })
}

/// The files that `install-cni` made are what a runtime reads: the plugin runs from where it lies, with the configuration as it stands.
fn install_cni(bed: &Bed) -> Outcome {
    let (lab, settings) = prepared(bed, "install", "")?;
    let node = lab.node(1);
    let (bin, conf) = (lab.directory().join("bin"), lab.directory().join("net.d"));
    let places = ["install-cni", "--bin-dir", &bin.display().to_string(), "--conf-dir", &conf.display().to_string()].map(str::to_owned);
    let install = |further: &[&str]| node.podgate_output(&places.iter().map(String::as_str).chain(further.iter().copied()).collect::<Vec<_>>());
    let plugin = bed.plugin().display().to_string();
    let files = |directory: &Path| -> Vec<String> {
        let found = fs::read_dir(directory).into_iter().flatten().flatten();
        found.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };

    // Without a daemon the configuration would be a promise that nobody keeps.
    let output = install(&["--plugin", &plugin])?;
    assert_eq!((output.status.code(), files(&bin), files(&conf)), (Some(4), vec!["podgate-cni".to_owned()], Vec::new()), "{output:?}");

    node.prepare()?;
    node.launch(&settings)?;
    let output = install(&["--plugin", &plugin, "--wait=20"])?;
    assert_eq!((output.status.code(), files(&conf)), (Some(0), vec!["10-podgate.conflist".to_owned()]), "{output:?}");
    let list: Value = serde_json::from_slice(&fs::read(conf.join("10-podgate.conflist"))?)?;
    let mut config = list["plugins"][0].clone();
    (config["name"], config["cniVersion"]) = (list["name"].clone(), list["cniVersion"].clone());
    let runtime = Plugin::new(bin.join("podgate-cni"), std::slice::from_ref(&bin), node.machine().netns())?;
    let container = Container::new(&lab.directory().join("containers"), "installed")?;
    let result = runtime.call(Verb::Add, &container.target("eth0"), &config)?.success()?;
    assert_eq!((&result["cniVersion"], &result["interfaces"][1]["name"]), (&Value::from("1.0.0"), &Value::from("eth0")), "{result}");
    runtime.call(Verb::Del, &container.target("eth0"), &config)?.success()?;

    let output = install(&["--remove"])?;
    assert_eq!((output.status.code(), files(&bin), files(&conf)), (Some(0), Vec::new(), Vec::new()), "{output:?}");
    Ok(())
}

/// A node that is described and prepared, without a daemon. Each test has its own.
fn prepared(bed: &Bed, name: &str, extra: &str) -> Result<(Lab, NodeSettings), Box<dyn std::error::Error>> {
    let lab = Lab::builder(bed.sandbox(), &bed.binary()).named(name).nodes(1).machines()?;
    let settings = NodeSettings { extra: extra.to_owned(), ..NodeSettings::default() };
    lab.node(1).configure(&settings, &Lab::ranges())?;
    lab.node(1).write_manifest("nodes.yaml", &manifest::node(lab.node(1).spec()))?;
    Ok((lab, settings))
}

/// `podgate run` on `node`, started through `wrapper`, must end by itself with exit code 1 and a last line that holds all of `words`.
fn refused(bed: &Bed, node: &Node, wrapper: &[&str], config: &Path, words: &[&str]) -> Outcome {
    let binary = bed.binary();
    let mut command = match wrapper.split_first() {
        None => Command::new(&binary),
        Some((program, arguments)) => {
            let mut command = Command::new(program);
            command.args(arguments).arg(&binary);
            command
        }
    };
    command.arg("run").arg("--config").arg(config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // Whatever comes of it, it does not outlive this function.
    struct Ended(Child);
    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = self.0.kill().and_then(|()| self.0.wait());
        }
    }
    let mut child = Ended(node.machine().run(|| command.spawn())??);
    let failed = |source: io::Error| LabError::Program { what: "a look at the daemon".into(), source };
    wait_until(
        Duration::from_secs(10),
        || "the end of a daemon that cannot work".into(),
        || Ok(child.0.try_wait().map_err(failed)?.is_none().then(|| "it runs".into())),
    )?;
    let mut said = String::new();
    child.0.stderr.take().ok_or("no stderr")?.read_to_string(&mut said)?;
    assert_eq!(child.0.wait()?.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap_or_default();
    eprintln!("    {last}");
    for word in words {
        assert!(last.starts_with("podgate: ") && last.contains(word), "{word:?} is not in the last line of:\n{said}");
    }
    Ok(())
}

/// A tmpfs over `/dev/net`, seen by the sandbox alone, until this is dropped.
struct WithoutTun;

impl WithoutTun {
    fn new() -> nix::Result<WithoutTun> {
        mount(Some("none"), "/dev/net", Some("tmpfs"), MsFlags::empty(), None::<&str>).map(|()| WithoutTun)
    }
}

impl Drop for WithoutTun {
    fn drop(&mut self) {
        // What stays mounted goes with the sandbox.
        let _ = umount("/dev/net");
    }
}

fn no_tun(bed: &Bed) -> Outcome {
    let (lab, _) = prepared(bed, "no-tun", "")?;
    let node = lab.node(1);
    node.prepare()?;
    let hidden = WithoutTun::new()?;
    let outcome = refused(bed, node, &[], &node.config(), &["/dev/net/tun is missing", "modprobe tun", "--device /dev/net/tun"]);
    drop(hidden);
    outcome
}

fn no_capability(bed: &Bed) -> Outcome {
    let (lab, _) = prepared(bed, "no-capability", "")?;
    let node = lab.node(1);
    node.prepare()?;
    let before = host(node)?;
    for (capability, name) in [("net_admin", "CAP_NET_ADMIN"), ("sys_admin", "CAP_SYS_ADMIN")] {
        let without = format!("-{capability}");
        let wrapper = ["setpriv", "--bounding-set", &without, "--inh-caps", "-all"];
        refused(bed, node, &wrapper, &node.config(), &[name, "run it as root", "AmbientCapabilities"])?;
    }
    same(&host(node)?, &before)
}

fn busy_overlay_port(bed: &Bed) -> Outcome {
    let (lab, settings) = prepared(bed, "busy-overlay", "")?;
    let node = lab.node(1);
    node.prepare()?;
    for family in Family::BOTH {
        let address = SocketAddr::new(node.machine().address(family), 4790);
        let holder = node.machine().run(|| UdpSocket::bind(address))??;
        refused(bed, node, &[], &node.config(), &[&format!("{address} (UDP) is in use"), "ss -ulnp", "another overlay port"])?;
        drop(holder);
    }
    node.launch(&settings)?;
    Ok(node.wait_ready()?)
}

fn busy_health_port(bed: &Bed) -> Outcome {
    let (lab, _) = prepared(bed, "busy-health", "")?;
    let node = lab.node(1);
    node.prepare()?;
    let _holder = node.machine().run(|| TcpListener::bind("0.0.0.0:10256"))??;
    refused(bed, node, &[], &node.config(), &["0.0.0.0:10256", "Another program has the port", "`health.address`"])
}

fn foreign_address(bed: &Bed) -> Outcome {
    let (lab, _) = prepared(bed, "foreign-address", "")?;
    let node = lab.node(1);
    node.prepare()?;
    let own = node.machine().addresses().v4.to_string();
    let wrong = node.config().with_file_name("wrong.yaml");
    fs::write(&wrong, fs::read_to_string(node.config())?.replacen(&own, "192.0.2.99", 1))?;
    refused(bed, node, &[], &wrong, &["underlay.address: 192.0.2.99 is not an address of this machine", &own, "{interface: eth0}"])
}

fn second_gateway(bed: &Bed) -> Outcome {
    let (lab, settings) = prepared(bed, "second", "")?;
    let node = lab.node(1);
    node.prepare()?;
    node.launch(&settings)?;
    node.wait_ready()?;
    refused(bed, node, &[], &node.config(), &["a running podgate holds", "stop it first"])?;
    let other = node.config().with_file_name("other.yaml");
    let own = fs::read_to_string(node.config())?;
    let text = own.replace("/run\n", "/run2\n").replace("/state\n", "/state2\n");
    assert_ne!(own, text);
    fs::write(&other, text + "devices: {pods: pods2, host: other}\noverlay: {port: 4791}\nhealth: {address: 0.0.0.0:10257}\n")?;
    refused(bed, node, &[], &other, &["has a gateway already", "`podgate`", "podgate cleanup"])?;
    let beside = node.podgate_output(&["cleanup", "--config", &node.config().display().to_string()])?;
    let said = String::from_utf8_lossy(&beside.stderr);
    assert!(beside.status.code() == Some(1) && said.contains("stop it first"), "{said}");
    // The first one never noticed.
    Ok(node.wait_ready()?)
}

fn tables(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let (node, pod) = (lab.node(1), lab.pod("b1")?);
    let vip = SocketAddr::new(lab.service("one-pod")?.vips.of(Family::V4), 80);
    pod.machine().run(|| client::tcp(vip, 1000, Duration::from_secs(2)))??;
    let status = node.query(&["status"])?;
    for key in ["node", "ready", "generation", "workers", "source", "attachMode", "offloads", "schemaVersion"] {
        assert!(!status[key].is_null(), "status has no {key}: {status}");
    }
    assert!(status["source"]["kind"] == "directory" && status["source"]["connected"] == true, "{status}");
    assert!(status["workers"].is_u64() && status["offloads"].is_object(), "{status}");
    for (table, keys) in [
        ("flows", &["protocol", "client", "dialled", "backend", "state", "service", "idleSeconds"][..]),
        ("drops", &["reason", "packets", "help"]),
        ("services", &[]),
        ("backends", &[]),
        ("peers", &[]),
        ("ipam", &[]),
        ("workers", &[]),
        ("routes", &[]),
    ] {
        let answer = node.query(&[table])?;
        let rows = answer[table].as_array().filter(|rows| !rows.is_empty() && answer["schemaVersion"].is_u64());
        for row in rows.ok_or_else(|| format!("no {table}: {answer}"))? {
            assert!(keys.iter().all(|key| row.get(key).is_some()), "{table} must have {keys:?}: {row}");
        }
        // What a person reads has the same rows, below its heading.
        let text = node.podgate(&[table])?;
        assert!(text.lines().count() >= 2, "{text}");
    }
    let flows = node.query(&["flows"])?;
    let dialled = flows["flows"].as_array().into_iter().flatten().find(|flow| flow["dialled"] == vip.to_string().as_str());
    let flow = dialled.ok_or_else(|| format!("the connection to {vip} is no flow: {flows}"))?;
    assert_eq!(flow["protocol"], "TCP", "{flow}");
    let from = pod.machine().addresses().v4.to_string();
    let trace = node.query(&["trace", "--from", &from, "--to", &vip.to_string()])?;
    assert_eq!(
        trace["verdict"],
        trace["steps"].as_array().and_then(|steps| steps.last()).map_or(Value::Null, |step| step["detail"].clone()),
        "{trace}"
    );
    Ok(())
}

fn cleanup(bed: &Bed) -> Outcome {
    let (lab, settings) = prepared(bed, "cleanup", "")?;
    let node = lab.node(1);
    // The kernel makes a link's own routes when its carrier has come.
    let own_routes = ["route local 2001:db8::1/128", "route local fe80::"];
    wait_until(
        Duration::from_secs(5),
        || "the host's own routes".into(),
        || {
            let found =
                host(node).map_err(|error| LabError::Program { what: "a look at the host".into(), source: io::Error::other(error.to_string()) })?;
            Ok(own_routes.iter().find(|route| !found.iter().any(|line| line.contains(*route))).map(|route| format!("no {route}")))
        },
    )?;
    let before = host(node)?;
    node.prepare()?;
    node.launch(&settings)?;
    node.wait_ready()?;
    let pod = lab.attach(0, "a1")?;
    assert_ne!(host(node)?, before, "a gateway that leaves no trace while it runs");
    node.end(Signal::SIGTERM)?;
    let config = node.config().display().to_string();
    let done = node.podgate(&["cleanup", "--config", &config])?;
    assert!(done.contains("removed interface podgate"), "{done}");
    same(&host(node)?, &before)?;
    // The pod's interface is one end of a pair whose other end was in the gateway's namespace; the kernel takes that away in its own time.
    let netlink = pod.machine().netlink()?;
    let failed = |source| LabError::Netlink { machine: "a1".into(), source };
    wait_until(
        Duration::from_secs(5),
        || "the end of the pod's interface".into(),
        || Ok(netlink.link("eth0").map_err(failed)?.map(|_| "it is there".into())),
    )?;
    let run_directory = node.gateway_netns().with_file_name("");
    assert!(!run_directory.exists(), "{} is still there", run_directory.display());
    let again = node.podgate_output(&["cleanup", "--config", &config])?;
    assert!(again.status.success() && again.stdout.is_empty(), "a second cleanup found {}", String::from_utf8_lossy(&again.stdout));
    Ok(())
}

/// All of the host that a gateway may change: links, addresses, rules, routes, sysctls of the network, mounts.
fn host(node: &Node) -> Result<Vec<String>, Box<dyn std::error::Error>> {
    let netlink = node.machine().netlink()?;
    let mut found: Vec<String> = netlink.links()?.into_iter().map(|link| format!("link {} {:?} mtu {}", link.name, link.state, link.mtu)).collect();
    found.extend(netlink.addresses()?.into_iter().map(|address| format!("address {}", address.address)));
    for family in Family::BOTH {
        found.extend(netlink.rules(family)?.into_iter().map(|rule| format!("{family} {}", rule.spec)));
        for table in [TABLE_LOCAL, TABLE_MAIN, HOST_TABLE, CLUSTER_TABLE] {
            found.extend(netlink.routes(family, table)?.into_iter().map(|route| format!("{family} {}", route.spec)));
        }
    }
    found.extend(node.machine().run(|| {
        let mut sysctls = Vec::new();
        for root in ["/proc/sys/net/ipv4", "/proc/sys/net/ipv6"] {
            read_tree(root.into(), &mut sysctls);
        }
        sysctls
    })?);
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let own = node.config().with_file_name("").display().to_string();
    found.extend(mounts.lines().filter(|line| line.contains(&own)).map(|line| format!("mount {line}")));
    found.sort();
    Ok(found)
}

fn read_tree(path: PathBuf, found: &mut Vec<String>) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let path = entry.path();
        // Those that are random or that the kernel spends say nothing.
        if ["stable_secret", "tcp_fastopen_key"].iter().any(|name| path.ends_with(name)) {
            continue;
        }
        if path.is_dir() {
            read_tree(path, found);
        } else if let Ok(text) = fs::read_to_string(&path) {
            found.push(format!("{} = {}", path.display(), text.trim()));
        }
    }
}

fn same(after: &[String], before: &[String]) -> Outcome {
    let missing: Vec<_> = before.iter().filter(|line| !after.contains(line)).collect();
    let left: Vec<_> = after.iter().filter(|line| !before.contains(line)).collect();
    if missing.is_empty() && left.is_empty() { Ok(()) } else { Err(format!("left behind: {left:#?}; missing: {missing:#?}").into()) }
}
