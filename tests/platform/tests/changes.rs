//! What happens while traffic runs: a killed daemon, rules, routes and devices taken away by hand, endpoints that come and go.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use podgate::lab::matrix::Probe;
use podgate::lab::program::bulk::Ticker;
use podgate::lab::program::client;
use podgate::lab::{Lab, Node, wait_until};
use podgate::netlink::{Family, LinkState, MissingIsFine, Netlink, RouteSpec, RuleAction, RuleSpec, TABLE_LOCAL, TABLE_MAIN};
use podgate_runtime::netns::Netns;
use podgate_testbed::tickers::outlived;
use podgate_testbed::{Bed, Outcome, all_hold, run};

const PATIENCE: Duration = Duration::from_secs(3);
/// Within this everything of ours that somebody took away must be back.
const REPAIR: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    run(|tests| {
        tests.add("an endpoint added to the directory gets connections, one removed gets no more, and other connections live on", endpoints);
        tests.add("a manifest that does not parse changes nothing", bad_manifest);
        tests.add("TCP connections and UDP flows live through kill -9 of the daemon", |bed| restart(bed, Signal::SIGKILL));
        tests.add("TCP connections and UDP flows live through SIGTERM and a successor", |bed| restart(bed, Signal::SIGTERM));
        tests.add("rules that somebody deletes on the node come back", |bed| rules(bed, Place::Node));
        tests.add("rules that somebody deletes in the gateway's namespace come back", |bed| rules(bed, Place::Gateway));
        tests.add("routes that somebody deletes on the node come back", |bed| routes(bed, Place::Node));
        tests.add("routes that somebody deletes in the gateway's namespace come back", |bed| routes(bed, Place::Gateway));
        tests.add("a TUN that somebody deletes comes back", devices);
        tests.add("a link that somebody sets down comes up with its routes", links);
        tests.add("after `ip rule flush` the node is reachable and everything is repaired", flush);
        tests.add("every path still works", |bed| still_works(with_daemons(bed)?));
        tests.add("a detached pod's address is not reachable any more, and a new pod works", detach);
    })
}

#[derive(Clone, Copy)]
enum Place {
    Node,
    Gateway,
}

impl Place {
    fn netlink(self, lab: &Lab, node: &Node) -> Result<Netlink, Box<dyn std::error::Error>> {
        Ok(match self {
            Place::Node => node.machine().netlink()?,
            Place::Gateway => lab.gateway_netlink(node)?,
        })
    }
}

/// The cluster, with every daemon running whatever the test before came to.
fn with_daemons(bed: &Bed) -> Result<&Lab, Box<dyn std::error::Error>> {
    let lab = bed.lab()?;
    for node in lab.nodes() {
        if !node.running() {
            lab.restart(node, Signal::SIGKILL)?;
        }
    }
    Ok(lab)
}

/// One exchange on each path; the quickest proof that nothing is broken.
fn still_works(lab: &Lab) -> Outcome {
    all_hold(&lab.check_paths(&lab.paths()?, &[Probe::Tcp, Probe::Udp], &|_, _| {})?)
}

/// The same, but for exchanges that were lost while the repair was under way.
fn recovers(lab: &Lab) -> Outcome {
    let start = Instant::now();
    loop {
        match still_works(lab) {
            // An exchange that is lost takes its time to be given up.
            Err(_) if start.elapsed() < 4 * REPAIR => {}
            outcome => {
                eprintln!("    all works {} ms after the device was there again", start.elapsed().as_millis());
                return outcome;
            }
        }
    }
}

/// Paths that differ in what the gateways must remember.
const WATCHED: [&str; 5] = [
    "pod to pod, other node",
    "pod to VIP, backend on the same node",
    "pod to VIP, backend on another node",
    "outside to node port, backend on another node",
    "pod to the outside",
];

/// Connections on these paths.
fn tickers(lab: &Lab) -> Result<Vec<(String, Ticker)>, Box<dyn std::error::Error>> {
    let mut tickers = Vec::new();
    for path in lab.paths()?.into_iter().filter(|path| WATCHED.contains(&path.name.as_str())) {
        for family in Family::BOTH {
            let to = SocketAddr::new(path.target.of(family), path.port);
            let start = |machine: &podgate::lab::Machine| Ticker::start(machine.netns(), to, Duration::from_millis(10), Duration::from_secs(30));
            tickers.push((format!("{}, {family}", path.name), lab.with_machine(&path.client, start)??));
        }
    }
    Ok(tickers)
}

/// A UDP flow: a client's socket, and what the server said of itself and of the client when it was opened.
struct UdpFlow {
    name: String,
    socket: UdpSocket,
    opened: String,
}

impl UdpFlow {
    fn open(lab: &Lab, client: &str, to: SocketAddr) -> Result<UdpFlow, Box<dyn std::error::Error>> {
        let any: SocketAddr = if to.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
        let socket = lab.with_machine(client, |machine| machine.run(|| UdpSocket::bind(any)))???;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        let mut flow = UdpFlow { name: format!("{client} to {to}"), socket, opened: String::new() };
        flow.opened = flow.ask().or_else(|_| flow.ask())?;
        Ok(flow)
    }

    /// The server's name, and the client's address and port as it sees them.
    fn ask(&self) -> io::Result<String> {
        self.socket.send(b"?")?;
        let mut reply = [0; 200];
        let len = self.socket.recv(&mut reply)?;
        Ok(String::from_utf8_lossy(&reply[..len]).lines().next().unwrap_or_default().to_owned())
    }
}

/// UDP flows on the same paths, and some of a service with several backends.
fn udp_flows(lab: &Lab) -> Result<Vec<UdpFlow>, Box<dyn std::error::Error>> {
    let (paths, web) = (lab.paths()?, lab.service("web")?);
    let mut flows = Vec::new();
    for family in Family::BOTH {
        for path in paths.iter().filter(|path| WATCHED.contains(&path.name.as_str())) {
            flows.push(UdpFlow::open(lab, &path.client, SocketAddr::new(path.target.of(family), path.port))?);
        }
        for _ in 0..8 {
            flows.push(UdpFlow::open(lab, "a1", SocketAddr::new(web.vips.of(family), 80))?);
        }
    }
    Ok(flows)
}

fn restart(bed: &Bed, signal: Signal) -> Outcome {
    let lab = with_daemons(bed)?;
    let udp_flows = udp_flows(lab)?;
    let tickers = tickers(lab)?;
    let node = lab.node(1);
    let took = lab.restart(node, signal)?;
    eprintln!("    the node was ready again {} ms after {signal}; the longest pause of each connection:", took.as_millis());
    let mut broken = outlived(tickers)?;
    // The same backend sees the same client: a flow that was opened anew would have another backend or another port.
    for flow in &udp_flows {
        match flow.ask().or_else(|_| flow.ask()) {
            Ok(now) if now == flow.opened => {}
            Ok(now) => broken.push(format!("UDP, {}: `{}` became `{now}`", flow.name, flow.opened)),
            Err(error) => broken.push(format!("UDP, {}: {error}", flow.name)),
        }
    }
    eprintln!("      {} UDP flows were asked as well", udp_flows.len());
    if broken.is_empty() { still_works(lab) } else { Err(broken.join("; ").into()) }
}

fn endpoints(bed: &Bed) -> Outcome {
    let lab = with_daemons(bed)?;
    let standard = lab.services();
    let with_web = |names: &[&str]| -> Result<Vec<_>, Box<dyn std::error::Error>> {
        let mut services = standard.clone();
        let addresses = names.iter().map(|name| lab.pod(name).map(|pod| pod.machine().addresses())).collect::<Result<Vec<_>, _>>()?;
        let web = services.iter_mut().find(|service| service.name == "web").ok_or("no web")?;
        web.endpoints.retain(|endpoint| addresses.contains(&endpoint.addresses));
        Ok(services)
    };
    let got = |client: &str| -> Result<Vec<String>, Box<dyn std::error::Error>> {
        let spread = lab.spread(client, 60)?;
        assert_eq!(spread.failed, 0, "{spread:?}");
        Ok(spread.backends.into_iter().filter(|(_, count)| *count > 0).map(|(name, _)| name).collect())
    };
    lab.set_services(with_web(&["a1"])?)?;
    // "Takes effect" is seen by clients; the tables say so a moment before.
    wait_until(
        PATIENCE,
        || "one backend alone".into(),
        || {
            let spread = lab.spread("b1", 20)?;
            Ok((spread.backends.get("a1") != Some(&20)).then(|| format!("{spread:?}")))
        },
    )?;
    let vip = SocketAddr::new(lab.service("web")?.vips.of(Family::V4), 80);
    let client = lab.pod("b2")?;
    let surviving = Ticker::start(client.machine().netns(), vip, Duration::from_millis(5), Duration::from_secs(5))?;
    lab.set_services(with_web(&["a1", "a2"])?)?;
    wait_until(
        PATIENCE,
        || "both backends".into(),
        || {
            let spread = lab.spread("b1", 20)?;
            Ok((spread.failed > 0 || spread.backends.values().filter(|count| **count > 0).count() < 2).then(|| format!("{spread:?}")))
        },
    )?;
    assert_eq!(got("b2")?, ["a1", "a2"]);
    lab.set_services(with_web(&["a2"])?)?;
    wait_until(
        PATIENCE,
        || "the other backend alone".into(),
        || {
            let spread = lab.spread("b2", 20)?;
            Ok((spread.backends.get("a2") != Some(&20)).then(|| format!("{spread:?}")))
        },
    )?;
    let before = surviving.answered();
    wait_until(
        PATIENCE,
        || "ticks to a backend that left the service".into(),
        || Ok((surviving.answered() < before + 5).then(|| format!("{} ticks", surviving.answered() - before))),
    )?;
    let report = surviving.finish();
    assert!(report.broken.is_none(), "a TCP connection was broken by a change of endpoints: {report:?}");
    lab.set_services(with_web(&[])?)?;
    wait_until(
        PATIENCE,
        || "a refusal without any backend".into(),
        || {
            let answer = client.machine().run(|| client::tcp(vip, 1, Duration::from_millis(500)))?;
            let refused = matches!(&answer, Err(error) if error.to_string().contains("refused"));
            Ok((!refused).then(|| format!("{answer:?}")))
        },
    )?;
    lab.set_services(standard.clone())?;
    wait_until(
        PATIENCE,
        || "all backends".into(),
        || {
            let spread = lab.spread("b1", 60)?;
            Ok((spread.failed > 0 || spread.backends.values().any(|count| *count == 0)).then(|| format!("{spread:?}")))
        },
    )?;
    Ok(())
}

fn bad_manifest(bed: &Bed) -> Outcome {
    let lab = with_daemons(bed)?;
    let node = lab.node(1);
    node.write_manifest("bad.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: bad, namespace: default}\nspec: {ports: 17}\n")?;
    wait_until(
        PATIENCE,
        || "a word about bad.yaml in status".into(),
        || {
            let status = node.query(&["status"])?.to_string();
            Ok((!status.contains("bad.yaml")).then_some(status))
        },
    )?;
    let outcome = still_works(lab);
    node.remove_manifest("bad.yaml")?;
    outcome
}

/// Everything that is ours: what was not there before the daemon came has `protocol kernel` and is not the kernel's own.
fn our_rules(netlink: &Netlink, family: Family) -> Result<Vec<RuleSpec>, Box<dyn std::error::Error>> {
    let own = |spec: &RuleSpec| ![(0, RuleAction::Lookup(TABLE_LOCAL)), (32766, RuleAction::Lookup(TABLE_MAIN))].contains(&(spec.pref, spec.action));
    let mut rules: Vec<RuleSpec> = netlink.rules(family)?.into_iter().map(|rule| rule.spec).filter(|spec| own(spec) && spec.pref < 32766).collect();
    // Among rules of one preference that exclude each other, the order means nothing.
    rules.sort();
    Ok(rules)
}

fn rules(bed: &Bed, place: Place) -> Outcome {
    let lab = with_daemons(bed)?;
    let netlink = place.netlink(lab, lab.node(1))?;
    for family in Family::BOTH {
        let before = our_rules(&netlink, family)?;
        assert!(!before.is_empty(), "there are no rules of ours");
        for rule in &before {
            netlink.delete_rule(rule).or_missing()?;
            let start = Instant::now();
            wait_until(
                REPAIR,
                || format!("the return of {rule:?}"),
                || {
                    let now = our_rules(&netlink, family).map_err(|error| other(&error.to_string()))?;
                    Ok((now != before).then(|| format!("there are {now:?}")))
                },
            )?;
            eprintln!("    {family} pref {} was back after {} ms", rule.pref, start.elapsed().as_millis());
        }
    }
    still_works(lab)
}

fn other(what: &str) -> podgate::lab::LabError {
    podgate::lab::LabError::Program { what: "a look at the rules".into(), source: std::io::Error::other(what.to_owned()) }
}

fn routes(bed: &Bed, place: Place) -> Outcome {
    let lab = with_daemons(bed)?;
    let netlink = place.netlink(lab, lab.node(1))?;
    for family in Family::BOTH {
        // The tables that our rules name, but for the kernel's own ones of the node.
        let mut tables: Vec<u32> = our_rules(&netlink, family)?
            .into_iter()
            .filter_map(|rule| if let RuleAction::Lookup(table) = rule.action { Some(table) } else { None })
            .filter(|table| *table != TABLE_LOCAL && (*table != TABLE_MAIN || matches!(place, Place::Gateway)))
            .collect();
        tables.sort_unstable();
        tables.dedup();
        assert!(!tables.is_empty(), "our rules name no table");
        for table in tables {
            let before = listed(&netlink, family, table)?;
            for route in &before {
                netlink.delete_route(route).or_missing()?;
                wait_until(
                    REPAIR,
                    || format!("the return of {route:?}"),
                    || {
                        let now = listed(&netlink, family, table).map_err(|error| other(&error.to_string()))?;
                        Ok((!before.iter().all(|route| now.contains(route))).then(|| format!("there are {now:?}")))
                    },
                )?;
            }
            eprintln!("    {family} table {table}: {} routes came back", before.len());
        }
    }
    still_works(lab)
}

fn listed(netlink: &Netlink, family: Family, table: u32) -> Result<Vec<RouteSpec>, Box<dyn std::error::Error>> {
    let routes = netlink.routes(family, table)?.into_iter().map(|route| route.spec);
    // The kernel makes multicast and link-local routes by itself when a link comes up, and one for each address.
    let others = |route: &RouteSpec| route.device.as_deref() == Some("lo");
    Ok(routes
        .filter(|route| !others(route) && !route.destination.ip().is_multicast() && !route.destination.to_string().starts_with("fe80"))
        .collect())
}

fn devices(bed: &Bed) -> Outcome {
    let lab = with_daemons(bed)?;
    let node = lab.node(1);
    for (place, name) in [(Place::Node, "podgate"), (Place::Gateway, "pods")] {
        place.netlink(lab, node)?.delete_link(name)?;
        wait_until(
            Duration::from_secs(5),
            || format!("the return of the TUN {name}"),
            || {
                let netlink = place.netlink(lab, node).map_err(|error| other(&error.to_string()))?;
                let link = netlink.link(name).map_err(|error| other(&error.to_string()))?;
                Ok((!link.is_some_and(|link| link.state == LinkState::Up)).then(|| "it is not there".into()))
            },
        )?;
        recovers(lab)?;
    }
    Ok(())
}

fn links(bed: &Bed) -> Outcome {
    use podgate::netlink::LinkSettings;
    let lab = with_daemons(bed)?;
    let node = lab.node(1);
    for (place, name) in [(Place::Node, "podgate"), (Place::Gateway, "pods")] {
        let netlink = place.netlink(lab, node)?;
        netlink.set_link(name, &LinkSettings::new().down())?;
        wait_until(
            Duration::from_secs(5),
            || format!("{name} up again"),
            || {
                let link = netlink.link(name).map_err(|error| other(&error.to_string()))?;
                Ok((!link.is_some_and(|link| link.state == LinkState::Up)).then(|| "it is down".into()))
            },
        )?;
        wait_until(
            REPAIR,
            || "every path".into(),
            || {
                let a1 = lab.pod("a1")?;
                let to = lab.node(1).machine().addresses().server(Family::V6);
                Ok(a1.machine().run(|| client::udp(to, 10, 1, Duration::from_millis(200)))?.err().map(|error| error.to_string()))
            },
        )?;
        still_works(lab)?;
    }
    Ok(())
}

/// `ip rule flush` spares pref 0; an administrator then puts `main` back, or is locked out with or without us.
fn flush(bed: &Bed) -> Outcome {
    let lab = with_daemons(bed)?;
    let node = lab.node(1);
    let netlink = node.machine().netlink()?;
    for family in Family::BOTH {
        for rule in netlink.rules(family)?.into_iter().filter(|rule| rule.spec.pref != 0) {
            netlink.delete_rule(&rule.spec).or_missing()?;
        }
        netlink.add_rule(&RuleSpec::new(family, 32766, RuleAction::Lookup(TABLE_MAIN)))?;
    }
    for family in Family::BOTH {
        let to = node.machine().addresses().server(family);
        lab.outside().run(|| client::tcp(to, 1000, PATIENCE))??;
    }
    wait_until(
        REPAIR,
        || "a VIP after the flush".into(),
        || {
            let vip = SocketAddr::new(lab.service("one-pod")?.vips.of(Family::V4), 80);
            Ok(node.machine().run(|| client::tcp(vip, 1, Duration::from_millis(300)))?.err().map(|error| error.to_string()))
        },
    )?;
    still_works(lab)
}

fn detach(bed: &Bed) -> Outcome {
    let lab = with_daemons(bed)?;
    let pod = lab.attach(0, "c1")?;
    pod.machine().serve()?;
    let client = lab.pod("a2")?;
    for family in Family::BOTH {
        let to = pod.machine().addresses().server(family);
        client.machine().run(|| client::tcp(to, 1000, PATIENCE))??;
    }
    lab.detach("c1")?;
    let left: Netns = Netns::open(pod.machine().path())?;
    assert!(Netlink::open(&left)?.link("eth0")?.is_none(), "the pod's interface is still there");
    let to = pod.machine().addresses().server(Family::V4);
    assert!(client.machine().run(|| client::udp(to, 1, 1, Duration::from_millis(500)))?.is_err(), "the address still answers");
    still_works(lab)
}
