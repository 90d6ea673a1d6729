//! Attach mode tun: pods with a TUN inside their own namespace, on every path, beside pods with a veth, through the CNI plugin, and through
//! the ends and starts of the daemon.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use podgate::lab::machine::ETH0;
use podgate::lab::matrix::Probe;
use podgate::lab::node::NodeSettings;
use podgate::lab::program::bulk::Ticker;
use podgate::lab::program::route::{Hop, traceroute};
use podgate::lab::program::{ExchangeError, client, ping};
use podgate::lab::{Lab, wait_until};
use podgate::netlink::{Family, LinkState};
use podgate_testbed::cni::{Container, Plugin, Verb, network, with_result};
use podgate_testbed::tickers::outlived;
use podgate_testbed::traces::Traces;
use podgate_testbed::{Bed, Outcome, all_hold, run};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(3);
/// How many pods come and go at once.
const MANY: usize = 40;

type Try<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    run(|tests| {
        tests.configure(NodeSettings { attach: "tun".into(), ..NodeSettings::default() });
        tests.add("TCP, UDP and ICMP go every path, whole and in fragments, and the backend sees the right client", every_path);
        tests.add("a pod has a TUN, and the gateway's namespace has nothing of it", nothing_outside);
        tests.add("gateways answer ping, and a sender learns the path MTU", |bed| {
            all_hold(&[bed.lab()?.check_gateways()?, bed.lab()?.check_path_mtu()?].concat())
        });
        tests.add("from pod to pod is one hop, on one node and between two, and traceroute sees every hop", hops);
        tests.add("nothing is delivered that a pod sends from an address it does not own, and all of it is counted", |bed| {
            all_hold(&bed.lab()?.check_pod_spoofs("b1")?)
        });
        tests.add("a thousand destinations leave the neighbour table flat", destinations);
        tests.add("pods of both modes on one node talk, and neither can pretend to be the other", both_modes);
        tests.add("the plugin attaches, checks and detaches as configured and as the pod's annotation says", plugin);
        tests.add("what a TUN cannot have is refused", refusals);
        tests.add("connections and flows live through kill -9 of the daemon", |bed| restart(bed, Signal::SIGKILL));
        tests.add("connections and flows live through SIGTERM and a successor", |bed| restart(bed, Signal::SIGTERM));
        tests.add("the gateway's own TUN is deleted, and pods in mode tun are taken into use again", device_lost);
        tests.add("a pod whose namespace cannot be found after a start is named by status and can be detached", lost_namespace);
        tests.add("forty pods come at once, talk, and leave nothing", many);
        tests.add("cleanup takes the TUNs out of the pods", cleanup);
    })
}

fn every_path(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    all_hold(&lab.check_paths(&lab.paths()?, &Probe::ALL, &|_, _| {})?)
}

fn nothing_outside(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let (node, pod) = (lab.node(1), lab.pod("a1")?);
    let eth0 = pod.machine().netlink()?.expect_link(ETH0)?;
    assert_eq!((eth0.kind.as_str(), eth0.carrier, eth0.gso_max_size), ("tun", LinkState::Up, Some(62_000)));
    let gateway = lab.gateway_netlink(node)?;
    for family in Family::BOTH {
        let own = pod.machine().address(family);
        let rules = gateway.rules(family)?;
        assert!(!rules.iter().any(|rule| rule.spec.from.is_some_and(|from| from.ip() == own)), "a rule for {own}");
        let routes = gateway.routes(family, podgate::netlink::TABLE_MAIN)?;
        assert!(!routes.iter().any(|route| route.spec.destination.ip() == own), "a route to {own}");
        assert!(!gateway.neighbours()?.iter().any(|neighbour| neighbour.address == own), "a neighbour {own}");
    }
    let status = node.query(&["status"])?;
    assert_eq!((&status["attachMode"], &status["podsInTunMode"]), (&json!("tun"), &json!(2)), "{status}");
    Ok(())
}

fn hops(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let from = lab.pod("a1")?;
    for (to, family) in ["b1", "a2"].into_iter().flat_map(|to| Family::BOTH.map(|family| (to, family))) {
        let target = lab.pod(to)?.machine().addresses().server(family);
        let found = from.machine().run(|| traceroute(target, 8, PATIENCE))??;
        let gateway = lab.node(1).gateway().of(family);
        assert!(matches!(found[..], [Hop::Router(router), Hop::Destination] if router == gateway), "to {to}, {family}: {found:?}");
    }
    all_hold(&lab.check_traceroutes(&lab.paths()?)?)
}

/// Each destination of a device without next hops would be an entry in the table that the whole machine shares.
fn destinations(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let pod = lab.pod("a1")?;
    let entries = || -> Try<usize> { Ok(pod.machine().netlink()?.neighbours()?.len()) };
    let before = entries()?;
    pod.machine().run(|| -> Result<(), ExchangeError> {
        for number in 1..=1000u16 {
            client::send(SocketAddr::new(IpAddr::from([0x2001, 0xdb8, 0x99, 0, 0, 0, 0, number]), 9), b"x")?;
            client::send(SocketAddr::new(IpAddr::from([198, 18, (number >> 8) as u8, number as u8]), 9), b"x")?;
        }
        Ok(())
    })??;
    assert!(entries()? <= before + 2, "{before} entries became {}", entries()?);
    Ok(())
}

fn both_modes(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let veth = lab.attach_with(0, "veth1", &["--mode", "veth"])?;
    assert_eq!(veth.machine().netlink()?.expect_link(ETH0)?.kind, "veth");
    veth.machine().serve()?;
    let [near, far] = [lab.pod("a1")?, lab.pod("a2")?];
    for family in Family::BOTH {
        for (from, to) in [(&veth, &near), (&near, &veth), (&veth, &far), (&far, &veth)] {
            let target = to.machine().addresses().server(family);
            let own = from.machine().address(family);
            assert_eq!(from.machine().run(|| client::tcp(target, 300_000, PATIENCE))??.seen.ip(), own, "{} to {}", from.name(), to.name());
            assert_eq!(from.machine().run(|| client::udp(target, 9000, 2, PATIENCE))??.seen.ip(), own, "{} to {}", from.name(), to.name());
        }
    }
    // Both lie as each other among the rest.
    let checks = [lab.check_pod_spoofs("veth1")?, lab.check_pod_spoofs("a1")?].concat();
    lab.detach("veth1")?;
    all_hold(&checks)
}

fn plugin(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(1);
    let plugin = Plugin::new(bed.plugin(), &[], node.machine().netns())?;
    let before = Traces::of(lab, node)?;
    let annotated = |mode: &str| json!({"runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"podgate.io/attach": mode}}});
    // By the node's configuration, by the network's, and by the pod's own say, which is heard before both.
    let pod_over_network = {
        let mut both = annotated("tun");
        both["attach"] = json!("veth");
        both
    };
    let cases = [
        (json!({}), "tun"),
        (json!({"attach": "veth"}), "veth"),
        (json!({"attach": "tun"}), "tun"),
        (annotated("veth"), "veth"),
        (pod_over_network, "tun"),
    ];
    for (number, (more, mode)) in cases.iter().enumerate() {
        let container = Container::new(&lab.directory().join("containers"), &format!("mode-{number}"))?;
        let (target, config) = (container.target("eth0"), network(node, "podgate", "1.1.0", more));
        let result = plugin.call(Verb::Add, &target, &config)?.success()?;
        let link = container.netlink()?.expect_link("eth0")?;
        assert_eq!(link.kind, *mode, "{more}");
        if *mode == "tun" {
            // CNI SPEC.md, section 5, "Success": interfaces, each with its sandbox; addresses name theirs by index.
            let only = json!([{"name": "eth0", "mac": "00:00:00:00:00:00", "mtu": link.mtu, "sandbox": container.path()}]);
            assert_eq!(result["interfaces"], only, "{result}");
            assert!(result["ips"].as_array().is_some_and(|ips| ips.len() == 2 && ips.iter().all(|ip| ip["interface"] == 0)), "{result}");
        }
        let to = lab.pod("b1")?.machine().addresses().server(Family::V4);
        container.run(|| client::tcp(to, 100_000, PATIENCE))??;
        let whole = with_result(&config, &result);
        assert_eq!(plugin.call(Verb::Check, &target, &whole)?.success()?, Value::Null);
        if *mode == "tun" {
            container.netlink()?.set_link("eth0", &podgate::netlink::LinkSettings::new().down())?;
            let answer = plugin.call(Verb::Check, &target, &whole)?;
            assert!(answer.error().is_some() && answer.json.to_string().contains("eth0 is down"), "{answer:?}");
        }
        // With the namespace at hand and, every second time, without.
        let target = podgate_testbed::cni::Target { netns: target.netns.filter(|_| number % 2 == 0), ..target };
        plugin.call(Verb::Del, &target, &whole)?.success()?;
        plugin.call(Verb::Del, &target, &whole)?.success()?;
        assert!(container.netlink()?.link("eth0")?.is_none(), "eth0 is still there");
    }
    let left = Traces::of(lab, node)?.beyond(&before);
    assert!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

fn refusals(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(1);
    let plugin = Plugin::new(bed.plugin(), &[], node.machine().netns())?;
    let container = Container::new(&lab.directory().join("containers"), "refused")?;
    for (more, told) in [(json!({"mac": "02:00:00:00:00:01"}), "mode veth"), (json!({"attach": "bridge"}), "attach")] {
        let answer = plugin.call(Verb::Add, &container.target("eth0"), &network(node, "podgate", "1.0.0", &more))?;
        assert_eq!(answer.error(), Some(7), "{answer:?}");
        assert!(answer.json.to_string().contains(told), "{answer:?}");
        assert!(container.netlink()?.link("eth0")?.is_none(), "a refused ADD left eth0");
    }
    Ok(())
}

/// Paths that differ in what the gateways must remember.
const WATCHED: [&str; 5] = [
    "pod to pod, same node",
    "pod to pod, other node",
    "pod to VIP, backend on another node",
    "outside to node port, backend on another node",
    "pod to the outside",
];

fn restart(bed: &Bed, signal: Signal) -> Outcome {
    let lab = bed.lab()?;
    let mut tickers = Vec::new();
    for path in lab.paths()?.into_iter().filter(|path| WATCHED.contains(&path.name.as_str())) {
        for family in Family::BOTH {
            let to = SocketAddr::new(path.target.of(family), path.port);
            let start = |machine: &podgate::lab::Machine| Ticker::start(machine.netns(), to, Duration::from_millis(10), Duration::from_secs(30));
            tickers.push((format!("{}, {family}", path.name), lab.with_machine(&path.client, start)??));
        }
    }
    assert!(tickers.len() >= 8, "{} connections", tickers.len());
    let took = lab.restart(lab.node(1), signal)?;
    eprintln!("    the node was ready again {} ms after {signal}; the longest pause of each connection:", took.as_millis());
    let broken = outlived(tickers)?;
    assert!(broken.is_empty(), "{}", broken.join("; "));
    still_works(lab)
}

fn still_works(lab: &Lab) -> Outcome {
    all_hold(&lab.check_paths(&lab.paths()?, &[Probe::Tcp, Probe::Udp], &|_, _| {})?)
}

fn device_lost(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    lab.gateway_netlink(lab.node(1))?.delete_link("pods")?;
    let to = lab.pod("b1")?.machine().addresses().server(Family::V4);
    let pod = lab.pod("a1")?;
    let carrier = |state| {
        wait_until(
            Duration::from_secs(10),
            || format!("a1's carrier {state:?}"),
            || {
                let found =
                    pod.machine().netlink()?.expect_link(ETH0).map_err(|source| podgate::lab::LabError::Netlink { machine: "a1".into(), source })?;
                Ok((found.carrier != state).then(|| format!("{:?}", found.carrier)))
            },
        )
    };
    // The workers are started anew, and the pods' queues are opened again.
    carrier(LinkState::Up)?;
    wait_until(
        Duration::from_secs(10),
        || "an answer from a1 to b1".into(),
        || Ok(pod.machine().run(|| client::tcp(to, 1000, Duration::from_millis(500)))?.err().map(|error| error.to_string())),
    )?;
    lab.node(1).wait_ready()?;
    still_works(lab)
}

fn lost_namespace(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(1);
    let before = Traces::of(lab, node)?;
    let directory = lab.directory().join("vanishing");
    let container = Container::new(&directory, "gone")?;
    let path = container.path().display().to_string();
    node.podgate(&["attach", "--netns", &path, "--name", "demo/gone"])?;
    node.end(Signal::SIGKILL)?;
    // Mount and directory: whether the pod is gone or only out of sight cannot be told.
    drop(container);
    std::fs::remove_dir(&directory)?;
    node.launch(lab.settings())?;
    node.wait_ready()?;
    let status = node.query(&["status"])?;
    let named = |status: &Value| status["problems"].as_array().is_some_and(|all| all.iter().any(|problem| problem.to_string().contains("demo/gone")));
    assert!(named(&status), "{}", status["problems"]);
    node.podgate(&["detach", "--netns", &path])?;
    let status = node.query(&["status"])?;
    assert!(!named(&status), "{}", status["problems"]);
    let left = Traces::of(lab, node)?.beyond(&before);
    assert!(left.is_empty(), "left behind: {left:?}");
    still_works(lab)
}

fn many(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(1);
    let before = Traces::of(lab, node)?;
    let plugin = Plugin::new(bed.plugin(), &[], node.machine().netns())?;
    let config = network(node, "podgate", "1.0.0", &json!({}));
    let containers =
        (0..MANY).map(|number| Container::new(&lab.directory().join("containers"), &format!("many-{number}"))).collect::<Result<Vec<_>, _>>()?;
    let added: Vec<Try<Value>> = thread::scope(|scope| {
        let add = |container: &Container| plugin.call(Verb::Add, &container.target("eth0"), &config);
        let adding: Vec<_> = containers.iter().map(|container| scope.spawn(move || add(container))).collect();
        adding.into_iter().map(|thread| Ok(thread.join().expect("no panic")?.success()?)).collect()
    });
    let mut addresses = BTreeSet::new();
    for result in added {
        addresses.insert(result?["ips"][0]["address"].to_string());
    }
    assert_eq!(addresses.len(), MANY, "an address was given twice");
    let to = lab.pod("b1")?.machine().addresses().server(Family::V4);
    for (number, container) in containers.iter().enumerate() {
        container.run(|| client::tcp(to, 10_000, PATIENCE))??;
        container.run(|| ping::ping(node.gateway().v6.into(), 56, PATIENCE))??;
        if number % 3 == 0 {
            assert_eq!(container.netlink()?.expect_link("eth0")?.kind, "tun");
        }
    }
    thread::scope(|scope| {
        let deleting: Vec<_> = containers
            .iter()
            .map(|container| scope.spawn(|| plugin.call(Verb::Del, &container.target("eth0"), &config).map(|answer| answer.success())))
            .collect();
        deleting.into_iter().try_for_each(|thread| thread.join().expect("no panic").map(drop))
    })?;
    let left = Traces::of(lab, node)?.beyond(&before);
    assert!(left.is_empty(), "left behind: {left:?}");
    for container in &containers {
        assert!(container.netlink()?.link("eth0")?.is_none(), "{} has an eth0 still", container.id());
    }
    still_works(lab)
}

fn cleanup(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(2);
    node.end(Signal::SIGTERM)?;
    for name in ["a2", "b2"] {
        assert!(lab.pod(name)?.machine().netlink()?.link(ETH0)?.is_some(), "a daemon that stops leaves its pods");
    }
    let said = node.podgate(&["cleanup", "--config", &node.config().display().to_string()])?;
    for name in ["a2", "b2"] {
        assert!(lab.pod(name)?.machine().netlink()?.link(ETH0)?.is_none(), "{name} has a TUN after cleanup, which said: {said}");
        assert!(said.contains(name), "{said}");
    }
    Ok(())
}
