//! Addresses by delegation: `host-local`, `static` and `dhcp` of the reference plugins give them, our plugin asks, and the daemon refuses
//! what is not this node's to give.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use ipnetwork::IpNetwork;
use nix::sys::signal::Signal;
use podgate::lab::program::client;
use podgate::lab::{Lab, Node, NodeSettings, wait_until};
use podgate::netlink::{Family, RouteSpec, TABLE_MAIN};
use podgate_testbed::cni::{Answer, Container, Plugin, Verb, network, with_result};
use podgate_testbed::need::{plugin, plugin_directories, program};
use podgate_testbed::tool::Running;
use podgate_testbed::traces::Traces;
use podgate_testbed::{Bed, Need, Outcome, run};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(2);
/// The outside client's address: a DHCP server runs there.
const DHCP_SERVER: &str = "192.0.2.200";

type Try<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    run(|tests| {
        let settings = NodeSettings { extra: format!("dhcp: {{servers: [{DHCP_SERVER}]}}\n"), ..NodeSettings::default() };
        tests.configure(settings);
        let (host_local, fixed) = (Need::Plugin("host-local"), Need::Plugin("static"));
        tests.add_if(host_local, "host-local gives addresses of the node's ranges, in each version, and gets them back", given_by_host_local);
        tests.add_if(host_local, "an address of host-local's outside the node's ranges is error 7 and goes back", foreign_range);
        tests.add_if(host_local, "when host-local has no more its error is told and nothing is left", exhausted);
        tests.add_if(host_local, "without a daemon what host-local gave goes back", given_without_daemon);
        tests.add_if(host_local, "a container whose namespace is gone gives host-local's addresses back", deleted_without_namespace);
        tests.add_if(fixed, "static addresses and routes are given as written", given_by_static);
        let dhcp = Need::All(&[Need::Plugin("dhcp"), Need::Program("dnsmasq")]);
        tests.add_if(dhcp, "a DHCP server on the nodes' network gives a pod its address through the relay, and gets it back", given_by_dhcp);
        tests.add_if(fixed, "an address that a pod has already is given by no plugin a second time", taken);
    })
}

struct Stand<'a> {
    lab: &'a Lab,
    node: &'a Node,
    plugin: Plugin,
    before: Traces,
    data: PathBuf,
}

impl<'a> Stand<'a> {
    fn new(bed: &'a Bed, name: &str) -> Try<Stand<'a>> {
        let lab = bed.lab()?;
        let node = lab.node(1);
        let plugin = Plugin::new(bed.plugin(), &plugin_directories(), node.machine().netns())?;
        let data = lab.directory().join("host-local").join(name);
        fs::create_dir_all(&data)?;
        Ok(Stand { lab, node, plugin, before: Traces::of(lab, node)?, data })
    }

    fn container(&self, id: &str) -> Try<Container> {
        Ok(Container::new(&self.lab.directory().join("containers"), id)?)
    }

    /// With host-local's addresses from these ranges, each `[subnet, first, last]`.
    fn host_local(&self, version: &str, ranges: &[[&str; 3]]) -> Value {
        let ranges: Vec<Value> =
            ranges.iter().map(|[subnet, start, end]| json!([{"subnet": subnet, "rangeStart": start, "rangeEnd": end}])).collect();
        network(self.node, "given", version, &json!({"ipam": {"type": "host-local", "dataDir": self.data, "ranges": ranges}}))
    }

    fn fixed(&self, addresses: &[&str], routes: &Value) -> Value {
        let addresses: Vec<Value> = addresses.iter().map(|address| json!({"address": address})).collect();
        network(self.node, "given", "1.0.0", &json!({"ipam": {"type": "static", "addresses": addresses, "routes": routes}}))
    }

    fn refused(&self, container: &Container, config: &Value) -> Try<Answer> {
        let answer = self.plugin.call(Verb::Add, &container.target("eth0"), config)?;
        if answer.error().is_none() {
            return Err(format!("ADD should have failed with an error object: {answer:?}").into());
        }
        assert!(container.netlink()?.link("eth0")?.is_none(), "a refused ADD left an interface");
        assert_eq!(self.reserved()?, Vec::<String>::new(), "a refused ADD left addresses with host-local");
        self.nothing_left()?;
        Ok(answer)
    }

    /// The addresses that host-local has given: it keeps a file of each.
    fn reserved(&self) -> Try<Vec<String>> {
        let mut reserved = Vec::new();
        let directory = self.data.join("given");
        for entry in fs::read_dir(&directory).into_iter().flatten() {
            let name = entry?.file_name().to_string_lossy().into_owned();
            reserved.extend(name.parse::<IpAddr>().is_ok().then_some(name));
        }
        reserved.sort_unstable();
        Ok(reserved)
    }

    /// Everything it was given works, and comes from it.
    fn works(&self, container: &Container, addresses: &[IpAddr]) -> Outcome {
        for own in addresses {
            let to = self.lab.pod("a2")?.machine().addresses().server(Family::of(*own));
            assert_eq!(container.run(|| client::tcp(to, 100_000, PATIENCE))??.seen.ip(), *own);
        }
        Ok(())
    }

    fn nothing_left(&self) -> Outcome {
        let left = Traces::of(self.lab, self.node)?.beyond(&self.before);
        if left.is_empty() { Ok(()) } else { Err(format!("left behind: {}", left.join(", ")).into()) }
    }
}

/// The result's addresses, and that the interface has them.
fn addresses(container: &Container, result: &Value) -> Try<Vec<IpAddr>> {
    let texts = result["ips"].as_array().into_iter().flatten().filter_map(|ip| ip["address"].as_str());
    let mut said: Vec<IpAddr> = texts.map(|text| text.parse::<IpNetwork>().map(|network| network.ip())).collect::<Result<_, _>>()?;
    let netlink = container.netlink()?;
    let index = netlink.expect_link("eth0")?.index;
    let mut has: Vec<IpAddr> =
        netlink.addresses()?.into_iter().filter(|address| address.index == index).map(|address| address.address.ip()).collect();
    has.retain(|address| !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()));
    said.sort_unstable();
    has.sort_unstable();
    assert_eq!(said, has, "{result}");
    Ok(said)
}

const INSIDE: [[&str; 3]; 2] = [["10.244.1.0/24", "10.244.1.100", "10.244.1.110"], ["fd00:77:1::/64", "fd00:77:1::100", "fd00:77:1::110"]];

fn given_by_host_local(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed, "given")?;
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        let container = stand.container("given")?;
        let (target, config) = (container.target("eth0"), stand.host_local(version, &INSIDE));
        let result = stand.plugin.call(Verb::Add, &target, &config)?.success()?;
        let given = addresses(&container, &result)?;
        let mut files: Vec<IpAddr> = stand.reserved()?.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        files.sort_unstable();
        assert_eq!((given.len(), &given), (2, &files));
        stand.works(&container, &given)?;
        if version != "0.3.1" {
            stand.plugin.call(Verb::Check, &target, &with_result(&config, &result))?.success()?;
        }
        stand.plugin.call(Verb::Del, &target, &with_result(&config, &result))?.success()?;
        stand.plugin.call(Verb::Del, &target, &config)?.success()?;
        assert_eq!(stand.reserved()?, Vec::<String>::new(), "DEL was not delegated");
        stand.nothing_left()?;
    }
    Ok(())
}

fn foreign_range(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed, "foreign")?;
    let container = stand.container("foreign")?;
    for ranges in [
        &[["172.30.0.0/24", "172.30.0.10", "172.30.0.20"]][..],
        // Of another node of the cluster.
        &[["10.244.2.0/24", "10.244.2.100", "10.244.2.110"]],
        // One inside, one not.
        &[INSIDE[0], ["fd00:99::/64", "fd00:99::100", "fd00:99::110"]],
        // The gateway's own.
        &[["10.244.1.0/30", "10.244.1.1", "10.244.1.1"]],
    ] {
        let mut config = stand.host_local("1.0.0", ranges);
        if ranges[0][1] == "10.244.1.1" {
            config["ipam"]["ranges"][0][0]["gateway"] = json!("10.244.1.2");
        }
        assert_eq!(stand.refused(&container, &config)?.error(), Some(7), "{ranges:?}");
    }
    Ok(())
}

fn exhausted(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed, "exhausted")?;
    let config = stand.host_local("1.0.0", &[["10.244.1.0/24", "10.244.1.120", "10.244.1.120"]]);
    let [first, second] = [stand.container("first")?, stand.container("second")?];
    stand.plugin.call(Verb::Add, &first.target("eth0"), &config)?.success()?;
    let answer = stand.plugin.call(Verb::Add, &second.target("eth0"), &config)?;
    assert!(answer.error().is_some() && answer.json.to_string().contains("no IP addresses available"), "{answer:?}");
    stand.plugin.call(Verb::Del, &first.target("eth0"), &config)?.success()?;
    stand.plugin.call(Verb::Add, &second.target("eth0"), &config)?.success()?;
    stand.plugin.call(Verb::Del, &second.target("eth0"), &config)?.success()?;
    assert_eq!(stand.reserved()?, Vec::<String>::new());
    stand.nothing_left()
}

fn given_without_daemon(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed, "without-daemon")?;
    let (stays, comes) = (stand.container("stays")?, stand.container("comes")?);
    let config = stand.host_local("1.0.0", &INSIDE);
    stand.plugin.call(Verb::Add, &stays.target("eth0"), &config)?.success()?;
    let with_one = stand.reserved()?;
    stand.node.end(Signal::SIGKILL)?;
    let answer = stand.plugin.call(Verb::Add, &comes.target("eth0"), &config)?;
    assert_eq!((answer.error(), stand.reserved()?), (Some(11), with_one), "{answer:?}");
    stand.plugin.call(Verb::Del, &stays.target("eth0"), &config)?.success()?;
    assert_eq!(stand.reserved()?, Vec::<String>::new(), "DEL was not delegated");
    stand.node.launch(stand.lab.settings())?;
    stand.node.wait_ready()?;
    stand.plugin.call(Verb::Del, &stays.target("eth0"), &config)?.success()?;
    stand.nothing_left()
}

fn deleted_without_namespace(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed, "without-namespace")?;
    let config = stand.host_local("1.0.0", &INSIDE);
    let container = stand.container("gone")?;
    stand.plugin.call(Verb::Add, &container.target("eth0"), &config)?.success()?;
    let target = podgate_testbed::cni::Target { netns: None, ..container.target("eth0") };
    drop(container);
    stand.plugin.call(Verb::Del, &target, &config)?.success()?;
    assert_eq!(stand.reserved()?, Vec::<String>::new(), "DEL was not delegated");
    stand.nothing_left()
}

fn given_by_static(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed, "static")?;
    let container = stand.container("static")?;
    let routes = json!([{"dst": "0.0.0.0/0"}, {"dst": "203.0.113.0/24"}, {"dst": "::/0"}]);
    let config = stand.fixed(&["10.244.1.201/24", "fd00:77:1::c9/64"], &routes);
    let result = stand.plugin.call(Verb::Add, &container.target("eth0"), &config)?.success()?;
    let given = addresses(&container, &result)?;
    assert_eq!(given, ["10.244.1.201".parse::<IpAddr>()?, "fd00:77:1::c9".parse()?]);
    let there = container.netlink()?.routes(Family::V4, TABLE_MAIN)?;
    let wanted: IpNetwork = "203.0.113.0/24".parse()?;
    assert!(there.iter().any(|route| route.spec.destination == wanted), "{there:?}");
    stand.works(&container, &given)?;
    stand.plugin.call(Verb::Del, &container.target("eth0"), &config)?.success()?;
    assert_eq!(stand.refused(&container, &stand.fixed(&["192.0.2.99/24"], &json!([])))?.error(), Some(7));
    stand.nothing_left()
}

fn given_by_dhcp(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed, "dhcp")?;
    let outside = stand.lab.outside();
    // The server answers the relay, whose address is the gateway's in the node's range.
    let back = RouteSpec::unicast(TABLE_MAIN, "10.244.1.0/24".parse()?, "eth0").via(stand.node.machine().address(Family::V4));
    outside.netlink()?.replace_route(&back)?;
    let [leases, socket, pid] = ["leases", "dhcp.sock", "pid"].map(|name| stand.data.join(name));
    let mut server = Command::new(program("dnsmasq").ok_or("no dnsmasq")?);
    server.args(["--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--user=root", "--interface=eth0", "--bind-interfaces", "--log-dhcp"]);
    server.args(["--log-facility=-", "--dhcp-authoritative", "--dhcp-range=10.244.1.150,10.244.1.160,255.255.255.0,1h"]);
    server.arg(format!("--dhcp-leasefile={}", leases.display())).arg(format!("--pid-file={}", pid.display()));
    let mut server = outside.run(|| Running::start(server, b""))??;
    let mut client = Command::new(plugin("dhcp").ok_or("no dhcp")?);
    client.arg("daemon").arg("-socketpath").arg(&socket);
    let mut client = stand.node.machine().run(|| Running::start(client, b""))??;
    wait_until(PATIENCE, || "the DHCP client's socket".into(), || Ok((!socket.exists()).then(|| format!("no {}", socket.display()))))?;

    let config = network(stand.node, "given", "1.0.0", &json!({"ipam": {"type": "dhcp", "daemonSocketPath": socket}}));
    let container = stand.container("asks")?;
    let result = stand.plugin.call(Verb::Add, &container.target("eth0"), &config)?.success()?;
    let given = addresses(&container, &result)?;
    let leased = fs::read_to_string(&leases)?;
    let mac = container.netlink()?.expect_link("eth0")?.mac.map(|mac| mac.to_string()).unwrap_or_default();
    assert!(leased.contains(&mac) && leased.contains(&given[0].to_string()), "{given:?} is not among the server's leases: {leased}");
    stand.works(&container, &given)?;
    stand.plugin.call(Verb::Check, &container.target("eth0"), &with_result(&config, &result))?.success()?;
    stand.plugin.call(Verb::Del, &container.target("eth0"), &with_result(&config, &result))?.success()?;
    wait_until(
        PATIENCE,
        || "the release of the lease".into(),
        || Ok(fs::read_to_string(&leases).ok().filter(|text| text.contains(&mac)).map(|text| format!("the server has {text}"))),
    )?;
    server.kill()?;
    client.kill()?;
    outside.netlink()?.delete_route(&back)?;
    stand.nothing_left()
}

fn taken(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed, "taken")?;
    let container = stand.container("late")?;
    let pod = stand.lab.pod("a1")?;
    let of_a_pod = format!("{}/24", pod.machine().addresses().v4);
    stand.refused(&container, &stand.fixed(&[&of_a_pod], &json!([])))?;
    // And the other way round: what a plugin gave our own allocator does not.
    let first = stand.container("first")?;
    let config = stand.fixed(&["10.244.1.202/24"], &json!([]));
    stand.plugin.call(Verb::Add, &first.target("eth0"), &config)?.success()?;
    let wants = network(stand.node, "podgate", "1.0.0", &json!({"runtimeConfig": {"ips": ["10.244.1.202"]}}));
    let answer = stand.plugin.call(Verb::Add, &container.target("eth0"), &wants)?;
    assert!(answer.error().is_some(), "an address was given twice: {answer:?}");
    stand.plugin.call(Verb::Del, &first.target("eth0"), &config)?.success()?;
    stand.nothing_left()
}
