//! Containers of a real runtime (podman, with its CNI backend) on two nodes: they are attached by `podgate-cni`, which podman calls, reach
//! each other, services and the outside, and leave nothing behind.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::signal::Signal;
use podgate::lab::machine::Dual;
use podgate::lab::manifest::{EndpointSpec, ServiceSpec, TrafficPolicy};
use podgate::lab::program::server::Server;
use podgate::lab::program::{PORT, client, raw};
use podgate::lab::{Lab, Node, wait_until};
use podgate::netlink::{Family, Netlink};
use podgate_testbed::need::plugin_directories;
use podgate_testbed::runtime::{self, Container, Runtime};
use podgate_testbed::traces::Traces;
use podgate_testbed::{Bed, Outcome, run};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(2);
/// The network of the tests.
const NETWORK: &str = "podgate";
/// A second one, of the same kind.
const SECOND: &str = "second";
/// Starts this program as the one that lies, inside a container.
const LIAR: &str = "--send-false-sources";

type Try<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, mark, ends @ ..] = &arguments[..]
        && flag == LIAR
    {
        return lie(mark, ends);
    }
    run(|tests| {
        let need = runtime::NEEDED;
        tests.add_if(need, "containers on two nodes reach each other, both nodes and the outside", reach);
        tests.add_if(need, "what podman says of a container's interface is what the container has", inspected);
        tests.add_if(need, "containers are the backends of a service, from containers, nodes and the outside", service);
        tests.add_if(need, "a published port leads to its container from everywhere, and ends with it", published);
        tests.add_if(need, "two networks of one container have an address and a working way each", two_networks);
        tests.add_if(need, "stop, start, restart, kill and remove leave nothing behind", lifecycle);
        tests.add_if(need, "containers live through a killed daemon, and can be removed while there is none", without_daemon);
        tests.add_if(need, "nothing is delivered that a container sends from an address it does not own, and counters name it", false_sources);
    })
}

fn network(node: &Node, name: &str) -> Value {
    let capabilities = json!({"portMappings": true, "bandwidth": true, "ips": true, "mac": true});
    let plugin = json!({"type": "podgate-cni", "socket": node.socket(), "capabilities": capabilities});
    json!({"cniVersion": "1.0.0", "cniVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"], "name": name, "plugins": [plugin]})
}

/// Podman on both nodes.
fn runtimes(bed: &Bed) -> Try<[Runtime; 2]> {
    let lab = bed.lab()?;
    let mut plugins = plugin_directories();
    plugins.insert(0, bed.plugin().parent().ok_or("the plugin lies in no directory")?.to_owned());
    let on = |number| {
        let node = lab.node(number);
        Runtime::new(bed.sandbox(), node, &[network(node, NETWORK), network(node, SECOND)], &plugins)
    };
    let runtimes = [on(1)?, on(2)?];
    // What a test that failed left behind is not another's fault.
    runtimes.iter().try_for_each(|runtime| runtime.podman(&["rm", "--force", "--all", "--time=0"]).map(drop))?;
    Ok(runtimes)
}

/// A container with a web server that says its name.
fn web(runtime: &Runtime, name: &str, options: &[&str]) -> Try<Container> {
    let script = format!("echo \"$NAME\" >/www/index.html; exec httpd -f -p {PORT} -h /www");
    let container = runtime.run(name, &[&["--tmpfs=/www", "--cap-add=NET_RAW"], options].concat(), &["sh", "-c", &script])?;
    let own = addresses(&container, NETWORK)?;
    wait_until(
        PATIENCE,
        || format!("the web server of {name}"),
        || Ok(container.netns().run(|| fetch(own.server(Family::V4))).map_err(program)?.err().map(|error| error.to_string())),
    )?;
    Ok(container)
}

fn program(source: std::io::Error) -> podgate::lab::LabError {
    podgate::lab::LabError::Program { what: "something in a container".into(), source }
}

/// A container that does nothing itself; what serves in it is a thread of this process, which checks every byte.
fn idle(runtime: &Runtime, name: &str, options: &[&str]) -> Try<(Container, Server)> {
    let container = runtime.run(name, options, &["sleep", "100000"])?;
    let server = Server::start(name, container.netns())?;
    Ok((container, server))
}

/// The container's addresses, as podman knows them from the plugin's result.
fn addresses(container: &Container, network: &str) -> Try<Dual> {
    let network = container.network(network);
    let text = |key: &str| network[key].as_str().ok_or_else(|| format!("podman knows no {key}: {network}"));
    Ok(Dual { v4: text("IPAddress")?.parse()?, v6: text("GlobalIPv6Address")?.parse()? })
}

/// What a web server says.
fn fetch(to: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.trim().to_owned());
    body.ok_or_else(|| std::io::Error::other(format!("no answer of a web server: {answer}")))
}

fn remove(runtime: &Runtime, names: &[&str]) -> Outcome {
    names.iter().try_for_each(|name| runtime.podman(&["rm", "--force", "--time=0", name]).map(drop))?;
    Ok(())
}

fn reach(bed: &Bed) -> Outcome {
    let (lab, runtimes) = (bed.lab()?, runtimes(bed)?);
    let c1 = web(&runtimes[0], "c1", &[])?;
    let d1 = web(&runtimes[0], "d1", &[])?;
    let c2 = web(&runtimes[1], "c2", &[])?;
    let containers = [(&runtimes[0], &c1), (&runtimes[0], &d1), (&runtimes[1], &c2)];
    for family in Family::BOTH {
        for (runtime, from) in &containers {
            let nodes = lab.nodes().iter().flat_map(|node| [node.machine().address(family), node.gateway().of(family)]);
            let others = containers.iter().map(|(_, to)| addresses(to, NETWORK).map(|to| to.of(family))).collect::<Try<Vec<_>>>()?;
            let pods = lab.pods().into_iter().map(|pod| pod.machine().address(family));
            for to in nodes.chain(others).chain(pods).chain([lab.outside().address(family)]) {
                runtime.exec(from.name(), &["ping", "-c", "1", "-W", "2", &to.to_string()])?;
            }
            for (_, to) in &containers {
                let url = format!("http://{}/", addresses(to, NETWORK)?.server(family));
                let said = runtime.exec(from.name(), &["wget", "-q", "-O", "-", &url])?;
                assert_eq!(said.trim(), to.name(), "{} asked {url}", from.name());
            }
        }
        for node in lab.nodes() {
            for (_, to) in &containers {
                let to_address = addresses(to, NETWORK)?.server(family);
                assert_eq!(node.machine().run(|| fetch(to_address))??, to.name(), "{} asked {to_address}", node.name());
            }
        }
    }
    // Every byte is right, and nobody's address was changed on the way.
    for family in Family::BOTH {
        let (own, to) = (addresses(&c1, NETWORK)?.of(family), lab.pod("a2")?.machine().addresses().server(family));
        for answer in [c1.netns().run(|| client::tcp(to, 3_000_000, PATIENCE))?, c1.netns().run(|| client::udp(to, 9000, 2, PATIENCE))?] {
            assert_eq!(answer?.seen.ip(), own);
        }
    }
    remove(&runtimes[0], &["c1", "d1"])?;
    remove(&runtimes[1], &["c2"])
}

fn inspected(bed: &Bed) -> Outcome {
    let runtimes = runtimes(bed)?;
    let container = web(&runtimes[0], "c1", &["--mac-address=02:00:00:00:c1:01"])?;
    let said = container.network(NETWORK);
    let netlink = Netlink::open(container.netns())?;
    let eth0 = netlink.expect_link("eth0")?;
    assert_eq!(eth0.mac.map(|mac| mac.to_string()).as_deref(), said["MacAddress"].as_str());
    assert_eq!(said["MacAddress"], "02:00:00:00:c1:01");
    let mut has: Vec<IpAddr> =
        netlink.addresses()?.into_iter().filter(|address| address.index == eth0.index).map(|address| address.address.ip()).collect();
    has.sort_unstable();
    let own = addresses(&container, NETWORK)?;
    assert_eq!(has, [IpAddr::from(own.v4), own.v6.into()]);
    assert_eq!((said["IPPrefixLen"].as_u64(), said["GlobalIPv6PrefixLen"].as_u64()), (Some(32), Some(128)), "{said}");
    assert!(netlink.links()?.iter().any(|link| link.loopback && link.state == podgate::netlink::LinkState::Up), "loopback is down");
    // What people look at inside.
    let routes = runtimes[0].exec("c1", &["ip", "route"])?;
    assert!(routes.starts_with("default via 169.254.1.1 dev eth0"), "{routes}");
    remove(&runtimes[0], &["c1"])
}

fn service(bed: &Bed) -> Outcome {
    let (lab, runtimes) = (bed.lab()?, runtimes(bed)?);
    let c1 = web(&runtimes[0], "c1", &[])?;
    let c2 = web(&runtimes[1], "c2", &[])?;
    let endpoint =
        |container, node: usize| -> Try<_> { Ok(EndpointSpec { addresses: addresses(container, NETWORK)?, node: lab.node(node).name().to_owned() }) };
    let service = ServiceSpec {
        name: "containers".into(),
        vips: Dual { v4: "10.96.0.50".parse()?, v6: "fd00:96::50".parse()? },
        node_port: 30050,
        policy: TrafficPolicy::Cluster,
        endpoints: vec![endpoint(&c1, 1)?, endpoint(&c2, 2)?],
    };
    let standard = lab.services();
    lab.set_services([&standard[..], std::slice::from_ref(&service)].concat())?;
    for family in Family::BOTH {
        let vip = SocketAddr::new(service.vips.of(family), 80);
        let url = format!("http://{vip}/");
        for (runtime, name) in [(&runtimes[0], "c1"), (&runtimes[1], "c2")] {
            both(&|| Ok(runtime.exec(name, &["wget", "-q", "-O", "-", &url])?)).map_err(|error| format!("{name} to {vip}: {error}"))?;
        }
        for node in lab.nodes() {
            both(&|| Ok(node.machine().run(|| fetch(vip))??)).map_err(|error| format!("{} to {vip}: {error}", node.name()))?;
            let port = SocketAddr::new(node.machine().address(family), service.node_port);
            both(&|| Ok(lab.outside().run(|| fetch(port))??)).map_err(|error| format!("outside to {port}: {error}"))?;
        }
    }
    lab.set_services(standard)?;
    remove(&runtimes[0], &["c1"])?;
    remove(&runtimes[1], &["c2"])
}

/// Both backends answer within forty tries: that one of two is never chosen by chance is a matter of 2⁻³⁹.
fn both(ask: &dyn Fn() -> Try<String>) -> Outcome {
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..40 {
        seen.insert(ask()?.trim().to_owned());
        if seen.iter().eq(["c1", "c2"]) {
            return Ok(());
        }
    }
    Err(format!("only {seen:?} answered").into())
}

fn published(bed: &Bed) -> Outcome {
    let (lab, runtimes) = (bed.lab()?, runtimes(bed)?);
    let node = lab.node(1);
    let before = Traces::of(lab, node)?;
    let web_server = web(&runtimes[0], "c1", &["--publish=18080:8080", "--publish=192.0.2.1:18081:8080"])?;
    let (_, server) = idle(&runtimes[0], "e1", &["--publish=18090:8080", "--publish=18090:8080/udp"])?;
    let client_1 = web(&runtimes[0], "d1", &[])?;
    let client_2 = web(&runtimes[1], "d2", &[])?;
    for family in Family::BOTH {
        let to = |port| SocketAddr::new(node.machine().address(family), port);
        let fetched = |port| -> Try<Vec<(String, std::io::Result<String>)>> {
            let to = to(port);
            let mut answers = vec![("outside".to_owned(), lab.outside().run(|| fetch(to))?)];
            for machine in lab.nodes().iter().map(Node::machine) {
                answers.push((machine.name().to_owned(), machine.run(|| fetch(to))?));
            }
            for container in [&client_1, &client_2, &web_server] {
                answers.push((container.name().to_owned(), container.netns().run(|| fetch(to))?));
            }
            Ok(answers)
        };
        for (from, said) in fetched(18080)? {
            assert_eq!(said.map_err(|error| format!("{from} to {}: {error}", to(18080)))?, "c1");
        }
        // A mapping of one address of the node does not answer on another.
        for (from, said) in fetched(18081)? {
            assert_eq!(said.is_ok(), family == Family::V4, "{from} to {}: {said:?}", to(18081));
        }
        // Datagrams in fragments too: no port rule can match those.
        let outside = lab.outside();
        for answer in [
            outside.run(|| client::tcp(to(18090), 3_000_000, PATIENCE))?,
            outside.run(|| client::udp(to(18090), 1000, 2, PATIENCE))?,
            outside.run(|| client::udp(to(18090), 9000, 2, PATIENCE))?,
        ] {
            assert_eq!(answer?.server, "e1");
        }
    }
    drop(server);
    remove(&runtimes[0], &["c1", "e1", "d1"])?;
    remove(&runtimes[1], &["d2"])?;
    let gone = SocketAddr::new(node.machine().address(Family::V4), 18080);
    assert!(lab.outside().run(|| fetch(gone))?.is_err(), "the port of a container that is gone still answers");
    nothing_left(lab, node, &before)
}

fn two_networks(bed: &Bed) -> Outcome {
    let (lab, runtimes) = (bed.lab()?, runtimes(bed)?);
    let before = Traces::of(lab, lab.node(1))?;
    let container = web(&runtimes[0], "c1", &["--network=podgate", "--network=second"])?;
    let (first, second) = (addresses(&container, NETWORK)?, addresses(&container, SECOND)?);
    let other = lab.pod("a2")?;
    for family in Family::BOTH {
        let to = other.machine().addresses().server(family);
        for own in [first, second] {
            assert_eq!(other.machine().run(|| fetch(own.server(family)))??, "c1");
            let seen = container.netns().run(|| ask_from(own.of(family), to))??;
            assert_eq!(seen, own.of(family), "what was sent from {own:?} to {to} arrived from another address");
        }
    }
    remove(&runtimes[0], &["c1"])?;
    nothing_left(lab, lab.node(1), &before)
}

/// One datagram from the address `own`; whom the server saw.
fn ask_from(own: IpAddr, to: SocketAddr) -> std::io::Result<IpAddr> {
    let socket = std::net::UdpSocket::bind(SocketAddr::new(own, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(to)?;
    socket.send(b"who am I")?;
    let mut buffer = [0; 200];
    let len = socket.recv(&mut buffer)?;
    let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
    let seen = text.split_whitespace().nth(1).and_then(|seen| seen.parse::<SocketAddr>().ok());
    seen.map(|seen| seen.ip()).ok_or_else(|| std::io::Error::other(text))
}

fn lifecycle(bed: &Bed) -> Outcome {
    let (lab, runtimes) = (bed.lab()?, runtimes(bed)?);
    let (node, runtime) = (lab.node(1), &runtimes[0]);
    let before = Traces::of(lab, node)?;
    let options = ["--publish=18080:8080"];
    web(runtime, "c1", &options)?;
    let running = Traces::of(lab, node)?;
    let answers = || -> Outcome {
        let container = runtime.container("c1")?;
        for family in Family::BOTH {
            let to = addresses(&container, NETWORK)?.server(family);
            let port = SocketAddr::new(node.machine().address(family), 18080);
            wait_until(
                PATIENCE,
                || "the restarted web server".into(),
                || Ok(lab.node(2).machine().run(|| fetch(to))?.err().map(|error| error.to_string())),
            )?;
            assert_eq!(lab.outside().run(|| fetch(port))??, "c1");
        }
        Ok(())
    };
    answers()?;
    runtime.podman(&["stop", "c1"])?;
    nothing_left(lab, node, &before)?;
    runtime.podman(&["start", "c1"])?;
    answers()?;
    runtime.podman(&["restart", "c1"])?;
    answers()?;
    let again = Traces::of(lab, node)?;
    for kind in ["gateway link", "gateway rule", "node rule", "lease"] {
        assert_eq!(again.count(kind), running.count(kind), "after a restart there are others of {kind}:\n{again}\nthan before:\n{running}");
    }
    // It dies by itself: what podman left behind to watch it calls the plugin.
    runtime.podman(&["kill", "c1"])?;
    nothing_left(lab, node, &before)?;
    runtime.podman(&["start", "c1"])?;
    answers()?;
    remove(runtime, &["c1"])?;
    nothing_left(lab, node, &before)
}

/// Waits for what is done after a command has returned, and no longer.
fn nothing_left(lab: &Lab, node: &Node, before: &Traces) -> Outcome {
    wait_until(
        Duration::from_secs(5),
        || format!("the end of all traces on {}", node.name()),
        || {
            let left = Traces::of(lab, node)?.beyond(before);
            Ok((!left.is_empty()).then(|| left.join(", ")))
        },
    )?;
    Ok(())
}

fn without_daemon(bed: &Bed) -> Outcome {
    let (lab, runtimes) = (bed.lab()?, runtimes(bed)?);
    let node = lab.node(1);
    let before = Traces::of(lab, node)?;
    let stays = web(&runtimes[0], "c1", &[])?;
    web(&runtimes[0], "d1", &[])?;
    node.end(Signal::SIGKILL)?;
    // A runtime must be able to clean up; the daemon does its part when it is back.
    remove(&runtimes[0], &["d1"])?;
    let refused = runtimes[0].run("e1", &[], &["sleep", "100000"]);
    let error = refused.err().ok_or("a container was started without any daemon")?.to_string();
    assert!(error.contains("podgate"), "the error does not say what is missing: {error}");
    node.launch(lab.settings())?;
    node.wait_ready()?;
    for family in Family::BOTH {
        let to = addresses(&stays, NETWORK)?.server(family);
        assert_eq!(lab.node(2).machine().run(|| fetch(to))??, "c1");
    }
    remove(&runtimes[0], &["c1", "e1"])?;
    nothing_left(lab, node, &before)
}

/// Runs inside a container: `ends` are pairs of a source and a target. Prints how many datagrams left.
fn lie(mark: &str, ends: &[String]) -> ExitCode {
    for end in ends.chunks(2) {
        let [source, to] = end else { return ExitCode::FAILURE };
        let (Ok(source), Ok(to)) = (source.parse(), to.parse()) else { return ExitCode::FAILURE };
        if let Err(error) = raw::spoof_udp(source, to, &format!("{mark} as {source}")) {
            eprintln!("from {source} to {to}: {error}");
            return ExitCode::FAILURE;
        }
    }
    println!("{}", ends.len() / 2);
    ExitCode::SUCCESS
}

fn false_sources(bed: &Bed) -> Outcome {
    // What names a source as false: the pipeline's reasons, and the kernel's own, from the rules of the gateway's namespace.
    // (`kernel_bad_header`: a loopback or multicast source of IPv6, which the kernel takes for an error of the header.)
    const NAMED: [&str; 4] = ["spoofed_by_pod", "martian_source", "kernel_refused_pod_source", "kernel_bad_header"];
    let (lab, runtimes) = (bed.lab()?, runtimes(bed)?);
    let node = lab.node(1);
    let (options, command) = Runtime::carry_self()?;
    let options: Vec<&str> = ["--cap-add=NET_RAW"].into_iter().chain(options.iter().map(String::as_str)).collect();
    let (liar, _) = idle(&runtimes[0], "liar", &options)?;
    let (near, near_server) = idle(&runtimes[0], "near", &[])?;
    let (far, far_server) = idle(&runtimes[1], "far", &[])?;
    let vips = lab.service("web")?.vips;
    let mut faults = Vec::new();
    for family in Family::BOTH {
        let [own, near, far] = [addresses(&liar, NETWORK)?, addresses(&near, NETWORK)?, addresses(&far, NETWORK)?].map(|dual| dual.of(family));
        let targets = [near, far, node.machine().address(family), lab.outside().address(family), lab.pod("a1")?.machine().address(family)];
        let made_up = match family {
            Family::V4 => [("loopback", "127.0.0.1"), ("link-local", "169.254.7.7"), ("multicast", "224.0.0.5"), ("foreign", "198.51.100.7")],
            Family::V6 => [("loopback", "::1"), ("link-local", "fe80::7"), ("multicast", "ff02::5"), ("foreign", "2001:db8:7::7")],
        };
        let mut sources = vec![
            ("another container's", near),
            ("a container's of another node", far),
            ("its node's", node.machine().address(family)),
            ("its gateway's", node.gateway().of(family)),
            ("a VIP", vips.of(family)),
        ];
        for (what, address) in made_up {
            sources.push((what, address.parse()?));
        }
        let tell = |source: IpAddr, mark: &str| -> Try<String> {
            let ends = targets.iter().flat_map(|to| [source.to_string(), SocketAddr::new(*to, PORT).to_string()]);
            let words: Vec<String> = command.iter().cloned().chain([LIAR.to_owned(), mark.to_owned()]).chain(ends).collect();
            Ok(runtimes[0].exec("liar", &words.iter().map(String::as_str).collect::<Vec<_>>())?)
        };
        let delivered = |mark: &str| -> Result<Vec<String>, podgate::lab::LabError> {
            let ours =
                [&near_server, &far_server].into_iter().flat_map(Server::spoofs).map(|spoof| format!("{} got \"{}\"", spoof.server, spoof.text));
            Ok(lab.spoofs_delivered()?.into_iter().chain(ours).filter(|text| text.contains(mark)).collect())
        };
        // The way is open: what it sends from its own address arrives everywhere.
        let honest = format!("honest {family}");
        assert_eq!(tell(own, &honest)?.trim(), targets.len().to_string());
        wait_until(
            PATIENCE,
            || format!("{} datagrams from {own}", targets.len()),
            || {
                let delivered = delivered(&honest)?;
                Ok((delivered.len() != targets.len()).then(|| delivered.join(", ")))
            },
        )?;
        for (what, source) in sources {
            let (mark, sent) = (format!("liar {family} {what}"), targets.len() as u64);
            let before = node.dropped(&NAMED)?;
            tell(source, &mark)?;
            let counted = wait_until(
                PATIENCE,
                || format!("{sent} drops of what a container sent as {what} ({source})"),
                || {
                    let counted = node.dropped(&NAMED)? - before;
                    Ok((counted < sent).then(|| format!("{counted} were counted")))
                },
            );
            faults.extend(counted.err().map(|error| error.to_string()));
            faults.extend(delivered(&mark)?);
        }
    }
    remove(&runtimes[0], &["liar", "near"])?;
    remove(&runtimes[1], &["far"])?;
    if faults.is_empty() { Ok(()) } else { Err(faults.join("\n").into()) }
}
