//! The plugin driven by hand, as a runtime does it, on a node with the real daemon: every command and version, and results compared key by
//! key with what is in the namespaces.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use nix::sys::signal::Signal;
use podgate::lab::program::server::SPOOF_MARK;
use podgate::lab::program::{client, ping};
use podgate::lab::{Lab, Node, wait_until};
use podgate::netlink::{AddressSpec, Family, Link, Netlink, TABLE_MAIN};
use podgate_runtime::netns::Netns;
use podgate_testbed::cni::{Answer, Container, Plugin, Target, Verb, network, with_result};
use podgate_testbed::need::plugin_directories;
use podgate_testbed::traces::Traces;
use podgate_testbed::{Bed, Need, Outcome, run};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(2);
/// The versions of the specification that are spoken.
const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// In which ADD must have given up when no daemon answers, with room for a machine that is busy.
const ADD_GIVES_UP: Duration = Duration::from_secs(30);

type Try<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    run(|tests| {
        tests.add("VERSION names every version that is spoken", version);
        tests.add("ADD, CHECK and DEL in each version: the result is what the namespaces hold, and nothing is left", each_version);
        tests.add("a version that is not spoken is error 1, a missing variable error 4, nonsense error 6", wrong_calls);
        tests.add("commands that a version does not have are refused in it", commands_of_versions);
        tests.add("ADD on an interface that exists fails and changes nothing", existing_interface);
        tests.add("DEL succeeds twice, without a result, and with the namespace gone", deletions);
        tests.add("CHECK says what is missing", check_fails);
        tests.add("GC takes away what is not valid, and nothing else", collection);
        tests.add("STATUS says whether pods can be attached", status);
        tests.add("several networks of one container each have an address and a working way", several_networks);
        tests.add("requested addresses and Ethernet addresses are given, and none twice", requested);
        tests.add("without ipMasq the outside sees the pod's own address", without_masquerade);
        tests.add("mtu, routes and isDefaultGateway are as configured", options);
        tests.add_if(Need::Plugin("tuning"), "a plugin before and a plugin after it can be chained", chained);
        tests.add("a failed ADD leaves nothing", failed_add);
        tests.add("without a daemon ADD is error 11 in its time, DEL succeeds, and the next daemon puts it right", without_daemon);
    })
}

/// A node, the plugin on it and what was there before.
struct Stand<'a> {
    lab: &'a Lab,
    node: &'a Node,
    plugin: Plugin,
    before: Traces,
}

impl<'a> Stand<'a> {
    fn new(bed: &'a Bed) -> Try<Stand<'a>> {
        let lab = bed.lab()?;
        let node = lab.node(1);
        let mut search = plugin_directories();
        search.insert(0, bed.plugin().parent().ok_or("the plugin lies in no directory")?.to_owned());
        let plugin = Plugin::new(bed.plugin(), &search, node.machine().netns())?;
        Ok(Stand { lab, node, plugin, before: Traces::of(lab, node)? })
    }

    fn container(&self, id: &str) -> Try<Container> {
        Ok(Container::new(&self.lab.directory().join("containers"), id)?)
    }

    fn network(&self, more: &Value) -> Value {
        network(self.node, "podgate", "1.1.0", more)
    }

    fn add(&self, target: &Target, config: &Value) -> Try<Value> {
        Ok(self.plugin.call(Verb::Add, target, config)?.success()?)
    }

    fn del(&self, target: &Target, config: &Value) -> Outcome {
        let answer = self.plugin.call(Verb::Del, target, config)?;
        assert_eq!(answer.clone().success()?, Value::Null, "DEL prints nothing");
        Ok(())
    }

    fn refused(&self, verb: Verb, target: &Target, config: &Value) -> Try<Answer> {
        let answer = self.plugin.call(verb, target, config)?;
        // CNI SPEC.md section 5, "Error": these two keys at least, and the caller's version.
        if answer.error().is_none() || answer.json["msg"].as_str().is_none_or(str::is_empty) || !answer.json["cniVersion"].is_string() {
            return Err(format!("{} should have failed with an error object: {answer:?}", verb.name()).into());
        }
        Ok(answer)
    }

    /// Nothing is there now that was not there at the start.
    fn nothing_left(&self) -> Outcome {
        let left = Traces::of(self.lab, self.node)?.beyond(&self.before);
        if left.is_empty() { Ok(()) } else { Err(format!("left behind: {}", left.join(", ")).into()) }
    }
}

/// The result's addresses.
fn addresses(result: &Value) -> Try<Vec<IpAddr>> {
    let texts = result["ips"].as_array().into_iter().flatten().filter_map(|ip| ip["address"].as_str());
    let addresses: Vec<IpAddr> = texts.map(|text| text.parse::<IpNetwork>().map(|network| network.ip())).collect::<Result<_, _>>()?;
    if addresses.is_empty() { Err(format!("there is no address in {result}").into()) } else { Ok(addresses) }
}

fn version(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    for version in VERSIONS {
        let said = stand.plugin.call(Verb::Version, &Target::default(), &json!({"cniVersion": version}))?.success()?;
        assert_eq!(said["cniVersion"], version);
        let supported: Vec<&str> = said["supportedVersions"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        assert!(VERSIONS.iter().all(|version| supported.contains(version)), "{said}");
    }
    Ok(())
}

fn each_version(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    for version in VERSIONS {
        let container = stand.container(&format!("v{version}"))?;
        let (target, config) = (container.target("eth0"), network(stand.node, "podgate", version, &json!({"dns": {"nameservers": ["10.96.0.10"]}})));
        let result = stand.add(&target, &config)?;
        compare(&stand, &container, version, &result)?;
        // It works: the neighbours and rules are there from the first packet on.
        for address in addresses(&result)? {
            let to = stand.lab.pod("a2")?.machine().addresses().server(Family::of(address));
            assert_eq!(container.run(|| client::tcp(to, 100_000, PATIENCE))??.seen.ip(), address);
        }
        let with_result = with_result(&config, &result);
        if version != "0.3.1" {
            let checked = stand.plugin.call(Verb::Check, &target, &with_result)?;
            assert_eq!(checked.success()?, Value::Null, "CHECK prints nothing");
        }
        stand.del(&target, &with_result)?;
        assert!(container.netlink()?.link("eth0")?.is_none(), "eth0 is still there");
        stand.nothing_left()?;
    }
    Ok(())
}

/// Key by key: what the result of `version` says, and what is there.
fn compare(stand: &Stand<'_>, container: &Container, version: &str, result: &Value) -> Outcome {
    let latest = version == "1.1.0";
    let keys = |value: &Value| value.as_object().map(|object| object.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
    assert_eq!(keys(result), ["cniVersion", "dns", "interfaces", "ips", "routes"], "{result}");
    assert_eq!(result["cniVersion"], version);
    assert_eq!(result["dns"], json!({"nameservers": ["10.96.0.10"]}));
    let inside = container.netlink()?;
    let gateway = stand.lab.gateway_netlink(stand.node)?;
    let interfaces = result["interfaces"].as_array().ok_or("no interfaces")?;
    let (host, own) = (&interfaces[0], &interfaces[1]);
    let veth = gateway.expect_link(host["name"].as_str().unwrap_or_default())?;
    let eth0 = inside.expect_link("eth0")?;
    let said = |link: &Link, sandbox: &std::path::Path| {
        let mut said = json!({"name": link.name, "mac": link.mac.map(|mac| mac.to_string()), "sandbox": sandbox});
        if latest {
            said["mtu"] = link.mtu.into();
        }
        said
    };
    assert_eq!(interfaces.len(), 2, "{result}");
    assert_eq!(own, &said(&eth0, container.path()));
    // The other end is not where a runtime would look for it, so its namespace is named; by whatever path.
    let sandbox = host["sandbox"].as_str().ok_or("the veth's namespace is not named")?;
    assert_eq!(host, &said(&veth, sandbox.as_ref()));
    assert_eq!(Netns::open(sandbox)?.id(), Netns::open(stand.node.gateway_netns())?.id(), "{sandbox} is not the gateway's namespace");
    assert_eq!((veth.peer, eth0.peer), (Some(eth0.index), Some(veth.index)), "they are not each other's ends");
    let global = |address: &IpNetwork| !matches!(address.ip(), IpAddr::V6(v6) if v6.is_unicast_link_local());
    let mut has: Vec<IpNetwork> = inside.addresses()?.into_iter().filter(|a| a.index == eth0.index).map(|a| a.address).filter(global).collect();
    has.sort_unstable();
    let ips = result["ips"].as_array().ok_or("no ips")?;
    let expected: Vec<Value> = has
        .iter()
        .map(|address| {
            let family = Family::of(address.ip());
            // The address's gateway is the node's own in that range, which answers pings.
            let mut ip = json!({"address": address.to_string(), "interface": 1, "gateway": stand.node.gateway().of(family).to_string()});
            if version.starts_with("0.") {
                ip["version"] = json!(if family == Family::V4 { "4" } else { "6" });
            }
            ip
        })
        .collect();
    let mut said = ips.clone();
    for (said, expected) in said.iter_mut().zip(&expected) {
        // A next hop by which it is reached is as good.
        if ["169.254.1.1", "fe80::1"].iter().any(|hop| said["gateway"] == *hop) {
            said["gateway"] = expected["gateway"].clone();
        }
    }
    assert_eq!(said, expected);
    assert_eq!(has.iter().map(|address| address.prefix()).collect::<Vec<_>>(), [32, 128]);
    compare_routes(&inside, &eth0, version, result)
}

fn compare_routes(inside: &Netlink, eth0: &Link, version: &str, result: &Value) -> Outcome {
    let routes = result["routes"].as_array().ok_or("no routes")?;
    assert_eq!(routes.len(), 2, "a default route of each family: {result}");
    for route in routes {
        let destination: IpNetwork = route["dst"].as_str().unwrap_or_default().parse()?;
        let family = Family::of(destination.ip());
        let there = inside.routes(family, TABLE_MAIN)?;
        let found = there.iter().find(|there| there.spec.destination == destination).ok_or_else(|| format!("no route to {destination}"))?;
        assert_eq!(found.spec.device.as_deref(), Some(eth0.name.as_str()));
        let gateway = route["gw"].as_str().map(str::parse::<IpAddr>).transpose()?;
        assert!(gateway.is_none() || gateway == found.spec.gateway, "{route} is {:?}", found.spec);
        let keys: Vec<&str> = route.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
        assert!(version == "1.1.0" || keys.iter().all(|key| ["dst", "gw"].contains(key)), "{version} has no {keys:?} of a route");
        if let Some(mtu) = route.get("mtu") {
            assert_eq!(mtu.as_u64(), found.spec.mtu.map(u64::from));
        }
        if let Some(priority) = route.get("priority") {
            assert_eq!(priority.as_u64(), Some(found.spec.metric.into()));
        }
    }
    Ok(())
}

fn wrong_calls(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    let container = stand.container("wrong")?;
    let target = container.target("eth0");
    for version in ["0.1.0", "0.2.0", "9.9.9"] {
        let answer = stand.refused(Verb::Add, &target, &network(stand.node, "podgate", version, &Value::Null))?;
        assert_eq!(answer.error(), Some(1), "{version}: {}", answer.json);
    }
    let config = stand.network(&Value::Null);
    let without = [
        Target { container: String::new(), ..target.clone() },
        Target { ifname: String::new(), ..target.clone() },
        Target { netns: None, ..target.clone() },
        Target { ifname: "longer-than-fifteen".into(), ..target.clone() },
        Target { ifname: "a/b".into(), ..target.clone() },
    ];
    for target in &without {
        assert_eq!(stand.refused(Verb::Add, target, &config)?.error(), Some(4), "{target:?}");
    }
    for nonsense in [json!("text"), json!([]), json!({"cniVersion": "1.0.0", "name": 5})] {
        let answer = stand.refused(Verb::Add, &target, &nonsense)?;
        assert!(matches!(answer.error(), Some(6 | 7)), "{nonsense}: {}", answer.json);
    }
    stand.nothing_left()
}

fn commands_of_versions(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    let container = stand.container("old")?;
    for (version, verbs) in
        [("0.3.1", &[Verb::Check, Verb::Gc, Verb::Status][..]), ("0.4.0", &[Verb::Gc, Verb::Status]), ("1.0.0", &[Verb::Gc, Verb::Status])]
    {
        for verb in verbs {
            let config = network(stand.node, "podgate", version, &json!({"prevResult": {}, "cni.dev/valid-attachments": []}));
            let answer = stand.refused(*verb, &container.target("eth0"), &config)?;
            assert_eq!(answer.error(), Some(1), "{} in {version}: {}", verb.name(), answer.json);
        }
    }
    Ok(())
}

fn existing_interface(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    let container = stand.container("twice")?;
    let (target, config) = (container.target("eth0"), stand.network(&Value::Null));
    let result = stand.add(&target, &config)?;
    let with_one = Traces::of(stand.lab, stand.node)?;
    stand.refused(Verb::Add, &target, &config)?;
    // Another container id for the same interface is no better.
    stand.refused(Verb::Add, &Target { container: "other".into(), ..target.clone() }, &config)?;
    assert_eq!(Traces::of(stand.lab, stand.node)?, with_one, "a refused ADD changed something");
    let address = addresses(&result)?[0];
    let to = stand.lab.pod("a2")?.machine().addresses().server(Family::of(address));
    assert_eq!(container.run(|| client::udp(to, 100, 2, PATIENCE))??.seen.ip(), address);
    stand.del(&target, &config)?;
    stand.nothing_left()
}

fn deletions(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    let config = stand.network(&Value::Null);
    let container = stand.container("deleted")?;
    let target = container.target("eth0");
    stand.del(&target, &config)?;
    let result = stand.add(&target, &config)?;
    stand.del(&target, &with_result(&config, &result))?;
    stand.del(&target, &with_result(&config, &result))?;
    stand.nothing_left()?;
    // The namespace is gone, in each way in which a runtime may say so.
    for netns in [Some(container.path().to_owned()), Some("".into()), None] {
        let container = stand.container("deleted")?;
        stand.add(&container.target("eth0"), &config)?;
        let target = Target { netns, ..container.target("eth0") };
        drop(container);
        stand.del(&target, &config)?;
        stand.del(&target, &config)?;
        stand.nothing_left()?;
    }
    Ok(())
}

fn check_fails(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    let container = stand.container("checked")?;
    let (target, config) = (container.target("eth0"), stand.network(&Value::Null));
    let result = stand.add(&target, &config)?;
    let with_result = with_result(&config, &result);
    stand.plugin.call(Verb::Check, &target, &with_result)?.success()?;
    let inside = container.netlink()?;
    let address = AddressSpec::new("eth0", IpNetwork::from(addresses(&result)?[0]));
    inside.delete_address(&address)?;
    stand.refused(Verb::Check, &target, &with_result)?;
    inside.add_address(&address)?;
    inside.delete_link("eth0")?;
    stand.refused(Verb::Check, &target, &with_result)?;
    stand.refused(Verb::Check, &container.target("eth7"), &with_result)?;
    stand.del(&target, &with_result)?;
    stand.refused(Verb::Check, &target, &with_result)?;
    stand.nothing_left()
}

fn collection(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    let containers: Vec<Container> = ["stays", "goes", "gone"].iter().map(|id| stand.container(id)).collect::<Try<_>>()?;
    let (config, other) = (stand.network(&Value::Null), network(stand.node, "another", "1.1.0", &Value::Null));
    for container in &containers {
        stand.add(&container.target("eth0"), &config)?;
    }
    // Of the same container: another interface, and another network's.
    stand.add(&containers[0].target("net1"), &config)?;
    stand.add(&containers[1].target("net2"), &other)?;
    let [stays, goes, gone] = <[Container; 3]>::try_from(containers).map_err(|_| "three containers")?;
    drop(gone);
    let valid = json!([{"containerID": "stays", "ifname": "eth0"}]);
    let mut collected = config.clone();
    collected["cni.dev/valid-attachments"] = valid;
    let said = stand.plugin.call(Verb::Gc, &Target::default(), &collected)?.success()?;
    assert_eq!(said, Value::Null, "GC prints nothing");
    let has = |container: &Container, ifname: &str| -> Try<bool> { Ok(container.netlink()?.link(ifname)?.is_some()) };
    assert_eq!((has(&stays, "eth0")?, has(&stays, "net1")?, has(&goes, "eth0")?, has(&goes, "net2")?), (true, false, false, true));
    stand.del(&stays.target("eth0"), &config)?;
    stand.del(&goes.target("net2"), &other)?;
    stand.nothing_left()
}

fn status(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    let config = stand.network(&Value::Null);
    assert_eq!(stand.plugin.call(Verb::Status, &Target::default(), &config)?.success()?, Value::Null, "STATUS prints nothing");
    stand.node.end(Signal::SIGTERM)?;
    let answer = stand.refused(Verb::Status, &Target::default(), &config)?;
    assert!(matches!(answer.error(), Some(50 | 51)), "{}", answer.json);
    stand.node.launch(stand.lab.settings())?;
    stand.node.wait_ready()?;
    stand.plugin.call(Verb::Status, &Target::default(), &config)?.success()?;
    Ok(())
}

fn several_networks(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    let container = stand.container("several")?;
    let other = stand.lab.pod("a2")?;
    let names = ["eth0", "net1", "net2"];
    let mut given = Vec::new();
    for (number, ifname) in names.iter().enumerate() {
        let config = network(stand.node, if number == 1 { "another" } else { "podgate" }, "1.0.0", &Value::Null);
        let result = stand.add(&container.target(ifname), &config)?;
        given.extend(addresses(&result)?);
    }
    other.machine().serve()?;
    for own in &given {
        let to = other.machine().addresses().server(Family::of(*own));
        let seen = container.run(|| seen_from(*own, to))??;
        assert_eq!(seen, *own, "what was sent from {own}");
        other.machine().run(|| ping::ping(*own, 56, PATIENCE))?.map_err(|error| format!("{own} does not answer: {error}"))?;
    }
    let mut unique = given.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), 2 * names.len(), "{given:?}");
    for (number, ifname) in names.iter().enumerate() {
        stand.del(&container.target(ifname), &network(stand.node, if number == 1 { "another" } else { "podgate" }, "1.0.0", &Value::Null))?;
        // What remains goes on.
        for own in &given[2 * (number + 1)..] {
            other.machine().run(|| ping::ping(*own, 56, PATIENCE))?.map_err(|error| format!("without {ifname} {own} is silent: {error}"))?;
        }
    }
    stand.nothing_left()
}

/// Sends one datagram from the address `own`; whom the server saw.
fn seen_from(own: IpAddr, to: SocketAddr) -> std::io::Result<IpAddr> {
    let socket = UdpSocket::bind(SocketAddr::new(own, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(to)?;
    socket.send(b"who am I")?;
    let mut buffer = [0; 200];
    let len = socket.recv(&mut buffer)?;
    let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
    let seen = text.split_whitespace().nth(1).and_then(|seen| seen.parse::<SocketAddr>().ok());
    seen.map(|seen| seen.ip()).ok_or_else(|| std::io::Error::other(text))
}

fn requested(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    let by_capability = json!({"runtimeConfig": {"ips": ["10.244.1.177/32", "fd00:77:1::b1/128"], "mac": "02:00:00:00:00:b1"}});
    let by_args = "IgnoreUnknown=1;IP=10.244.1.178;MAC=02:00:00:00:00:b1";
    for (more, args, wanted) in [(by_capability, "", &["10.244.1.177", "fd00:77:1::b1"][..]), (Value::Null, by_args, &["10.244.1.178"])] {
        let container = stand.container("wanted")?;
        let (target, config) = (Target { args: args.into(), ..container.target("eth0") }, stand.network(&more));
        let result = stand.add(&target, &config)?;
        let given = addresses(&result)?;
        for wanted in wanted {
            assert!(given.contains(&wanted.parse()?), "{wanted} is not in {result}");
        }
        assert_eq!(container.netlink()?.expect_link("eth0")?.mac.map(|mac| mac.to_string()).as_deref(), Some("02:00:00:00:00:b1"));
        let second = stand.container("wants-the-same")?;
        let same = Target { args: args.into(), ..second.target("eth0") };
        stand.refused(Verb::Add, &same, &config)?;
        assert!(second.netlink()?.link("eth0")?.is_none(), "a refused ADD left an interface");
        stand.del(&target, &config)?;
        // Its peers may still believe that it is the other's, so nobody else has it at once.
        assert_eq!(stand.refused(Verb::Add, &same, &config)?.error(), Some(11), "an address was given again at once");
        stand.nothing_left()?;
    }
    let outside = stand.container("wanted")?;
    let answer = stand.refused(Verb::Add, &outside.target("eth0"), &stand.network(&json!({"runtimeConfig": {"ips": ["192.0.2.77"]}})))?;
    assert_eq!(answer.error(), Some(7), "{}", answer.json);
    stand.nothing_left()
}

fn without_masquerade(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    let outside = stand.lab.outside();
    for (key, masquerades) in [("ipMasq", false), ("ipMasq", true), ("isMasq", false)] {
        let container = stand.container("plain")?;
        let (target, config) = (container.target("eth0"), stand.network(&json!({ key: masquerades })));
        let result = stand.add(&target, &config)?;
        for own in addresses(&result)? {
            let family = Family::of(own);
            let (to, text) = (outside.addresses().server(family), format!("{key} {masquerades} {family}"));
            container.run(|| client::send(to, &[SPOOF_MARK, text.as_bytes()].concat()))??;
            let expected = if masquerades { stand.node.machine().address(family) } else { own };
            wait_until(
                PATIENCE,
                || format!("\"{text}\" from {expected}"),
                || {
                    let seen = outside.serve()?.spoofs();
                    let seen: Vec<_> = seen.iter().filter(|seen| seen.text == text).map(|seen| seen.source).collect();
                    Ok((seen != [expected]).then(|| format!("it came from {seen:?}")))
                },
            )?;
        }
        stand.del(&target, &config)?;
    }
    stand.nothing_left()
}

fn options(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    let container = stand.container("options")?;
    let first = stand.network(&json!({"mtu": 1280, "isGateway": true}));
    let result = stand.add(&container.target("eth0"), &first)?;
    assert_eq!((container.netlink()?.expect_link("eth0")?.mtu, &result["interfaces"][1]["mtu"]), (1280, &json!(1280)));
    // A second network takes the default route only if it is told to.
    let default_device = || -> Try<Option<String>> {
        let routes = container.netlink()?.routes(Family::V4, TABLE_MAIN)?;
        let default = routes.into_iter().filter(|route| route.spec.destination.prefix() == 0).min_by_key(|route| route.spec.metric);
        Ok(default.and_then(|route| route.spec.device))
    };
    stand.add(&container.target("net1"), &stand.network(&Value::Null))?;
    assert_eq!(default_device()?.as_deref(), Some("eth0"));
    stand.del(&container.target("net1"), &stand.network(&Value::Null))?;
    stand.del(&container.target("eth0"), &first)?;
    let without = stand.network(&json!({"isDefaultGateway": false}));
    let result = stand.add(&container.target("eth0"), &without)?;
    assert_eq!(default_device()?, None, "{result}");
    stand.del(&container.target("eth0"), &without)?;
    stand.nothing_left()
}

fn chained(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    let container = stand.container("chained")?;
    let target = container.target("eth0");
    // One before it, which made an interface of its own and hands its result on.
    let earlier = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": container.path()}],
        "ips": [{"address": "127.0.0.1/8", "interface": 0}],
        "routes": [], "dns": {}
    });
    let config = network(stand.node, "podgate", "1.0.0", &Value::Null);
    let result = stand.add(&target, &with_result(&config, &earlier))?;
    let names: Vec<&str> = result["interfaces"].as_array().into_iter().flatten().filter_map(|interface| interface["name"].as_str()).collect();
    assert!(names.contains(&"lo") && names.contains(&"eth0"), "the result of the plugin before is lost: {result}");
    for ip in result["ips"].as_array().into_iter().flatten() {
        let interface = ip["interface"].as_u64().and_then(|number| names.get(number as usize));
        let expected = if ip["address"] == "127.0.0.1/8" { "lo" } else { "eth0" };
        assert_eq!(interface, Some(&expected), "{result}");
    }
    // One after it.
    let tuning = stand.plugin.sibling(podgate_testbed::need::plugin("tuning").ok_or("no tuning")?)?;
    let config_after = json!({"cniVersion": "1.0.0", "name": "podgate", "type": "tuning", "mtu": 1300, "prevResult": result});
    let after = tuning.call(Verb::Add, &target, &config_after)?.success()?;
    assert_eq!(after["ips"], result["ips"]);
    assert_eq!(container.netlink()?.expect_link("eth0")?.mtu, 1300);
    let to = stand.lab.pod("a2")?.machine().addresses().server(Family::V6);
    container.run(|| client::tcp(to, 100_000, PATIENCE))??;
    stand.del(&target, &with_result(&config, &after))?;
    stand.nothing_left()
}

fn failed_add(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    let container = stand.container("fails")?;
    let target = container.target("eth0");
    for more in [
        json!({"mtu": 10}),
        json!({"mtu": "much"}),
        json!({"runtimeConfig": {"mac": "not an address"}}),
        json!({"runtimeConfig": {"mac": "01:00:5e:00:00:01"}}),
        json!({"runtimeConfig": {"portMappings": [{"hostPort": 70000, "containerPort": 80, "protocol": "tcp"}]}}),
        json!({"runtimeConfig": {"portMappings": [{"hostPort": 18080, "containerPort": 80, "protocol": "carrier pigeon"}]}}),
        json!({"ipam": {"type": "no-such-plugin"}}),
    ] {
        let answer = stand.refused(Verb::Add, &target, &stand.network(&more))?;
        assert!(answer.error() != Some(11), "{more} will not be better later: {}", answer.json);
        assert!(container.netlink()?.link("eth0")?.is_none(), "{more} left an interface");
        stand.nothing_left().map_err(|error| format!("{more}: {error}"))?;
    }
    let missing = Target { netns: Some(container.path().with_file_name("nowhere")), ..target };
    stand.refused(Verb::Add, &missing, &stand.network(&Value::Null))?;
    stand.nothing_left()
}

fn without_daemon(bed: &Bed) -> Outcome {
    let stand = Stand::new(bed)?;
    let config = stand.network(&Value::Null);
    let [stays, goes, killed] = [stand.container("stays")?, stand.container("goes")?, stand.container("never-came")?];
    let result = stand.add(&stays.target("eth0"), &config)?;
    stand.add(&goes.target("eth0"), &config)?;
    stand.node.end(Signal::SIGKILL)?;
    let start = Instant::now();
    let answer = stand.refused(Verb::Add, &killed.target("eth0"), &config)?;
    assert_eq!(answer.error(), Some(11), "{}", answer.json);
    assert!(start.elapsed() < ADD_GIVES_UP, "ADD took {} s to give up", start.elapsed().as_secs());
    eprintln!("    ADD gave up after {} ms", start.elapsed().as_millis());
    stand.del(&goes.target("eth0"), &with_result(&config, &json!({})))?;
    stand.del(&killed.target("eth0"), &config)?;
    drop(goes);
    stand.node.launch(stand.lab.settings())?;
    stand.node.wait_ready()?;
    let own = addresses(&result)?[0];
    wait_until(
        Duration::from_secs(5),
        || "the end of what was deleted meanwhile".into(),
        || {
            let left = Traces::of(stand.lab, stand.node)?.beyond(&stand.before);
            let foreign: Vec<_> = left.into_iter().filter(|trace| trace.starts_with("lease") && !trace.contains("stays")).collect();
            Ok((!foreign.is_empty()).then(|| foreign.join(", ")))
        },
    )?;
    stand.lab.node(2).machine().run(|| ping::ping(own, 56, PATIENCE))??;
    stand.del(&stays.target("eth0"), &config)?;
    stand.nothing_left()
}
