//! Every finding from facts as they come, one change of a healthy node at a time.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;

use super::*;
use crate::config::HostFacts;
use crate::daemon::machine::Machine;
use crate::doctor::facts::*;
use crate::doctor::firewall::{Tool, read};
use crate::netlink::{Family, RouteSpec, Rule, RuleAction, RuleSpec, TABLE_LOCAL, TABLE_MAIN};
use crate::routing::{CLUSTER_TABLE, HOST_TABLE};

const TEXT: &str = "node: node-1\nunderlay: {address: 192.0.2.1}\npodCIDRs: [10.244.0.0/16]\nserviceCIDRs: [10.96.0.0/16]\n";

fn configured(source: &str) -> Configuration {
    let host = HostFacts { name: "node-1".into(), ephemeral_ports: 32768..=60999 };
    let text = format!("{TEXT}source: {source}\n");
    Configuration::Read(Box::new(crate::config::Config::parse("podgate.yaml".as_ref(), &text, &host).unwrap()))
}

fn rule(pref: u32, action: RuleAction) -> Rule {
    Rule { spec: RuleSpec::new(Family::V4, pref, action), exact: true }
}

fn net(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

fn host() -> Host {
    let sysctls = [
        ("net/ipv4/conf/podgate/rp_filter", "2"),
        ("net/ipv4/conf/podgate/accept_local", "1"),
        ("net/ipv4/conf/podgate/forwarding", "1"),
        ("net/ipv4/conf/eth0/forwarding", "1"),
        ("net/ipv6/conf/all/forwarding", "0"),
        ("net/ipv4/ip_local_reserved_ports", "22,30000-32767,61000-65534"),
    ];
    let mut iif = rule(0, RuleAction::Lookup(TABLE_LOCAL));
    iif.spec.iif = Some("podgate".into());
    Host {
        links: [("lo", ""), ("eth0", "veth"), ("podgate", "tun")].map(|(name, kind)| (name.into(), kind.into())).into(),
        addresses: vec![("eth0".into(), net("192.0.2.1/24")), ("podgate".into(), net("169.254.1.2/32"))],
        rules: vec![
            iif,
            rule(0, RuleAction::Lookup(TABLE_LOCAL)),
            rule(100, RuleAction::Lookup(TABLE_LOCAL)),
            rule(101, RuleAction::Lookup(CLUSTER_TABLE)),
            rule(32766, RuleAction::Lookup(TABLE_MAIN)),
        ],
        routes: vec![
            RouteSpec::unicast(TABLE_MAIN, net("0.0.0.0/0"), "eth0"),
            RouteSpec::unicast(TABLE_MAIN, net("192.0.2.0/24"), "eth0"),
            RouteSpec::unicast(HOST_TABLE, net("0.0.0.0/0"), "podgate"),
            RouteSpec::unicast(CLUSTER_TABLE, net("10.244.0.0/16"), "podgate"),
        ],
        sysctls: sysctls.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        machine: Some(Ok(Machine {
            addresses: vec!["192.0.2.1".parse().unwrap()],
            underlay: vec!["192.0.2.1".parse().unwrap()],
            underlay_mtu: 1500,
            uplinks: vec!["eth0".into()],
        })),
        gateway_netns: Some("/run/podgate/netns".into()),
    }
}

fn tables() -> Tables {
    Tables {
        status: json!({
            "version": env!("CARGO_PKG_VERSION"), "node": "node-1", "ready": true, "generation": 7, "pending": null, "podMtu": 1464,
            "source": {"kind": "directory", "connected": true}, "problems": [],
            "checks": [{"name": "pods IPv4", "ok": true, "detail": "0.5 ms"}, {"name": "forward IPv4", "ok": true, "detail": "0.2 ms"}],
        }),
        workers: json!({"workers": [{"worker": 0, "state": "running", "restarts": 0}, {"worker": 1, "state": "running", "restarts": 0}]}),
        peers: json!({"peers": [{"node": "node-2", "underlay": "192.0.2.2:4790", "mtu": 1464, "podCIDRs": ["10.244.2.0/24"]}]}),
    }
}

fn peer() -> Peer {
    let took = Some(Duration::from_micros(300));
    Peer {
        node: "node-2".into(),
        gateway: "10.244.2.1".parse().unwrap(),
        underlay: "192.0.2.2:4790".parse().unwrap(),
        small: took,
        full: took,
        size: 1464,
        beside: None,
    }
}

fn healthy() -> Facts {
    let socket = "/run/podgate/podgate.sock";
    let conf = crate::install_cni::configuration(socket.as_ref()).to_string();
    Facts {
        stage: Stage::Installed,
        kernel: Kernel {
            release: "6.18.44-generic".into(),
            capabilities: Ok(0x1ff_ffff_ffff),
            user: 0,
            device: Device::Opens,
            trials: Ok(Trials { tun: Ok((true, true)), veth: Ok(()), port_rule: Ok(()), segments: Ok(()) }),
        },
        configuration: configured("{directory: /etc/podgate/cluster.d}"),
        host: Ok(host()),
        sockets: Ok(Vec::new()),
        rooms: vec![Room { path: "/run/podgate".into(), key: "runtimeDir", needed: 1 << 20, free: Ok((1 << 30, 10_000)) }],
        firewall: Firewall::default(),
        origin: Some(Origin::Directory("/etc/podgate/cluster.d".into(), Ok(2))),
        cni: Cni {
            plugin: "/opt/cni/bin/podgate-cni".into(),
            found: Plugin::Answers(Some(Same::Alike)),
            configuration: "/etc/cni/net.d/10-podgate.conflist".into(),
            text: Some(Ok(conf)),
            before: Vec::new(),
            others: Vec::new(),
        },
        daemon: Daemon::Answers(Box::new(tables())),
        peers: Some(Ok(vec![peer()])),
    }
}

fn tables_of(facts: &mut Facts) -> &mut Tables {
    let Daemon::Answers(tables) = &mut facts.daemon else { panic!("it answers") };
    tables
}

fn host_of(facts: &mut Facts) -> &mut Host {
    facts.host.as_mut().unwrap()
}

fn trials_of(facts: &mut Facts) -> &mut Trials {
    facts.kernel.trials.as_mut().unwrap()
}

/// Nobody answers, and nothing is left: a machine before its first start.
fn bare(facts: &mut Facts) {
    facts.daemon = Daemon::Down("/run/podgate/podgate.sock".into());
    let host = host_of(facts);
    host.rules.retain(|rule| !is_gateways(rule));
    host.routes.retain(|route| route.table == TABLE_MAIN);
    host.links.retain(|(name, _)| name != "podgate");
    host.gateway_netns = None;
}

fn is_gateways(rule: &Rule) -> bool {
    rule.spec.iif.is_some() || rule.spec.pref == 100 || rule.spec.pref == 101
}

fn bad(facts: &Facts) -> Vec<Finding> {
    findings(facts).into_iter().filter(|finding| finding.status != Status::Ok).collect()
}

#[test]
fn of_a_healthy_node_every_line_is_fine_and_each_check_has_one() {
    let facts = healthy();
    assert_eq!(bad(&facts), []);
    let mut names: Vec<&str> = findings(&facts).iter().map(|finding| finding.check).collect();
    let lines = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), lines, "{names:?}");
    assert!(lines >= 28, "{names:?}");
}

#[test]
fn a_bare_machine_is_fine_before_an_installation_and_the_daemon_is_no_line_of_its() {
    let mut facts = healthy();
    bare(&mut facts);
    facts.stage = Stage::Before;
    facts.configuration = Configuration::Missing("/etc/podgate/podgate.yaml".into());
    facts.cni.found = Plugin::Missing;
    facts.cni.text = None;
    (facts.origin, facts.peers) = (None, None);
    assert_eq!(bad(&facts), []);
    assert!(findings(&facts).iter().all(|finding| finding.group != "daemon" && finding.group != "peers"));
}

type Change = fn(&mut Facts);

/// What is wrong, and the line that it makes: its check, its status, and words of what is wrong and of what to do.
const FAULTS: &[(Change, &str, Status, &[&str])] = &[
    // kernel
    (|f| f.kernel.release = "4.19.0-26-amd64".into(), "kernel", Status::Failure, &["4.19.0-26-amd64 is too old", "5.0"]),
    (|f| f.kernel.release = "strange".into(), "kernel", Status::Warning, &["cannot be read"]),
    (|f| f.kernel.capabilities = Ok(1 << 21 | 1 << 13), "capabilities", Status::Failure, &["lacks CAP_NET_ADMIN", "AmbientCapabilities"]),
    (
        |f| (f.kernel.capabilities, f.kernel.user) = (Ok(0), 1000),
        "capabilities",
        Status::Warning,
        &["CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_NET_RAW", "not everything", "root"],
    ),
    (|f| f.kernel.capabilities = Err(Unseen("no /proc".into())), "capabilities", Status::Warning, &["no /proc"]),
    (|f| f.kernel.device = Device::Missing, "tun-device", Status::Failure, &["missing", "modprobe tun"]),
    (|f| f.kernel.device = Device::Denied, "tun-device", Status::Failure, &["may not be opened", "DeviceAllow"]),
    (|f| f.kernel.device = Device::Fails("ENODEV".into()), "tun-device", Status::Failure, &["ENODEV", "modprobe tun"]),
    (|f| f.kernel.trials = Err("ENOSPC".into()), "namespaces", Status::Failure, &["ENOSPC", "user.max_net_namespaces"]),
    (
        |f| (f.kernel.trials, f.kernel.capabilities, f.kernel.user) = (Err("EPERM".into()), Ok(0), 1000),
        "namespaces",
        Status::Warning,
        &["nothing was tried", "root"],
    ),
    (|f| trials_of(f).tun = Err("EINVAL".into()), "tun-queues", Status::Failure, &["two queues", "EINVAL"]),
    (|f| trials_of(f).tun = Ok((true, false)), "tun-offloads", Status::Warning, &["no UDP superframes", "6.2"]),
    (|f| trials_of(f).tun = Ok((false, false)), "tun-offloads", Status::Warning, &["no superframes"]),
    (|f| trials_of(f).veth = Err("EOPNOTSUPP".into()), "veth", Status::Failure, &["EOPNOTSUPP", "modprobe veth"]),
    (|f| trials_of(f).port_rule = Err("EINVAL".into()), "port-rules", Status::Failure, &["EINVAL", "CONFIG_IP_MULTIPLE_TABLES"]),
    (|f| trials_of(f).segments = Err("UDP_GRO: ENOPROTOOPT".into()), "udp-segments", Status::Warning, &["UDP_GRO: ENOPROTOOPT"]),
    // configuration
    (|f| f.configuration = Configuration::Missing("/e/p.yaml".into()), "config", Status::Failure, &["no /e/p.yaml", "--config"]),
    (|f| f.configuration = Configuration::Denied("/e/p.yaml".into()), "config", Status::Warning, &["not for this user", "root"]),
    (|f| f.configuration = Configuration::Refused("p.yaml: odd".into()), "config", Status::Failure, &["p.yaml: odd"]),
    (|f| host_of(f).machine = Some(Err("not an address of this machine".into())), "underlay", Status::Failure, &["not an address"]),
    (
        |f| host_of(f).addresses.push(("eth1".into(), net("10.96.3.4/24"))),
        "ranges",
        Status::Failure,
        &["10.96.3.4 of eth1", "service range 10.96.0.0/16", "another service range"],
    ),
    (
        |f| host_of(f).routes.push(RouteSpec::unicast(TABLE_MAIN, net("10.244.5.0/24"), "cni0")),
        "ranges",
        Status::Warning,
        &["pod range 10.244.0.0/16", "10.244.5.0/24 dev cni0"],
    ),
    (|f| host_of(f).routes.push(RouteSpec::unicast(100, net("10.0.0.0/8"), "vpn0")), "ranges", Status::Warning, &["10.0.0.0/8 dev vpn0", "hidden"]),
    (
        |f| f.cni.others.push(("/c/99-other.conflist".into(), vec![net("10.244.0.0/24")])),
        "ranges",
        Status::Warning,
        &["10.244.0.0/24", "/c/99-other.conflist"],
    ),
    // host
    (|f| f.host = Err(Unseen("EPERM".into())), "host", Status::Warning, &["EPERM"]),
    (
        |f| host_of(f).rules.retain(|rule| rule.spec.pref != 0),
        "local-rule",
        Status::Failure,
        &["\"pref 0 lookup local\" is missing", "pref 100", "ip -4 rule add pref 0 lookup local"],
    ),
    (|f| host_of(f).rules.push(rule(50, RuleAction::Lookup(77))), "early-rules", Status::Warning, &["pref 50 lookup 77", "above 101"]),
    (|f| host_of(f).routes[2].device = Some("other".into()), "other-gateway", Status::Failure, &["leads to `other`", "podgate cleanup"]),
    (
        |f| _ = host_of(f).sysctls.insert("net/ipv4/conf/podgate/rp_filter".into(), "1".into()),
        "sysctls",
        Status::Failure,
        &["net.ipv4.conf.podgate.rp_filter is 1", "sysctl -w net.ipv4.conf.podgate.rp_filter=2"],
    ),
    (|f| _ = host_of(f).sysctls.insert("net/ipv4/conf/podgate/accept_local".into(), "0".into()), "sysctls", Status::Failure, &["accept_local is 0"]),
    (
        |f| _ = host_of(f).sysctls.insert("net/ipv4/conf/eth0/forwarding".into(), "0".into()),
        "sysctls",
        Status::Failure,
        &["net.ipv4.conf.eth0.forwarding is 0", "sysctl -w net.ipv4.conf.eth0.forwarding=1"],
    ),
    (
        |f| _ = host_of(f).sysctls.insert("net/ipv4/ip_local_reserved_ports".into(), "30000-32767".into()),
        "sysctls",
        Status::Warning,
        &["lacks 61000-65534"],
    ),
    (|f| f.daemon = Daemon::Down("/s".into()), "leftovers", Status::Warning, &["1 routing rules, the interface podgate", "podgate cleanup"]),
    (
        |f| host_of(f).links.push(("flannel.1".into(), "vxlan".into())),
        "other-plugins",
        Status::Warning,
        &["flannel.1", "(flannel)", "ip link delete flannel.1"],
    ),
    (|f| host_of(f).links.push(("cni0".into(), "bridge".into())), "other-plugins", Status::Warning, &["cni0"]),
    (|f| host_of(f).links.push(("weave".into(), "bridge".into())), "other-plugins", Status::Warning, &["Weave Net"]),
    (|f| host_of(f).links.push(("cali12345".into(), "veth".into())), "other-plugins", Status::Warning, &["Calico"]),
    (
        |f| {
            host_of(f).links.push(("kube-ipvs0".into(), "dummy".into()));
            host_of(f).addresses.push(("kube-ipvs0".into(), net("10.96.0.1/32")));
        },
        "other-plugins",
        Status::Failure,
        &["IPVS", "kube-ipvs0 has 1 VIPs", "kube-proxy --cleanup"],
    ),
    (
        |f| {
            bare(f);
            f.sockets = Ok(vec![bound(Protocol::Udp, "192.0.2.1:4790")]);
        },
        "ports",
        Status::Failure,
        &["192.0.2.1:4790 (UDP) is taken", "ss -ulnp", "overlay.port"],
    ),
    (
        |f| {
            bare(f);
            f.sockets = Ok(vec![bound(Protocol::Tcp, "[::]:10256")]);
        },
        "ports",
        Status::Failure,
        &["health port", "ss -tlnp", "health.address"],
    ),
    (
        |f| {
            bare(f);
            f.sockets = Ok(vec![bound(Protocol::Tcp, "0.0.0.0:31000")]);
        },
        "ports",
        Status::Warning,
        &["0.0.0.0:31000, a node port", "nodePorts"],
    ),
    (|f| (bare(f), f.sockets = Err(Unseen("no /proc".into()))).1, "ports", Status::Warning, &["no /proc"]),
    (|f| f.rooms[0].free = Ok((1000, 10_000)), "room", Status::Failure, &["/run/podgate has 0 MiB left, and 1 MiB", "runtimeDir"]),
    (|f| f.rooms[0].free = Ok((1 << 30, 3)), "room", Status::Failure, &["3 more files", "runtimeDir"]),
    (|f| f.rooms[0].free = Err("EACCES".into()), "room", Status::Warning, &["EACCES"]),
    // firewall
    (
        |f| f.firewall.chains = read::save(Tool::Nftables, "ip", "*filter\n:FORWARD DROP [0:0]\n:INPUT ACCEPT [0:0]\nCOMMIT\n"),
        "forward",
        Status::Warning,
        &["policy of chain FORWARD (table ip filter) drops what pods send to the outside", "iptables -I FORWARD -i podgate -j ACCEPT"],
    ),
    (
        |f| f.firewall.chains = read::save(Tool::Legacy, "ip", "*filter\n:INPUT DROP [0:0]\n-A INPUT -i eth0 -j ACCEPT\nCOMMIT\n"),
        "input",
        Status::Warning,
        &["iptables-legacy: the policy of chain INPUT", "iptables-legacy -I INPUT -i podgate -j ACCEPT"],
    ),
    (
        |f| {
            f.firewall.chains = read::save(Tool::Legacy, "ip", "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -m rpfilter --invert -j DROP\nCOMMIT\n")
        },
        "reverse-path",
        Status::Warning,
        &["-m rpfilter --invert", "iptables-legacy -t raw -I PREROUTING -i podgate -j ACCEPT"],
    ),
    (
        |f| f.firewall.chains = read::nft(FIREWALLD).unwrap(),
        "forward",
        Status::Warning,
        &["filter_FORWARD", "firewall-cmd --permanent --zone=trusted --add-interface=podgate"],
    ),
    (
        |f| {
            f.firewall.chains = read::save(
                Tool::Nftables,
                "ip",
                "*filter\n:FORWARD DROP [0:0]\n:ufw-before-forward - [0:0]\n-A FORWARD -j ufw-before-forward\nCOMMIT\n",
            )
        },
        "forward",
        Status::Warning,
        &["ufw route allow in on podgate"],
    ),
    (
        |f| f.firewall.chains = read::save(Tool::Nftables, "ip", "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\nCOMMIT\n"),
        "kube-proxy",
        Status::Warning,
        &["chain KUBE-SERVICES", "kube-proxy --cleanup"],
    ),
    (
        |f| f.firewall.chains = read::nft(r#"{"nftables": [{"table": {"family": "ip", "name": "kube-proxy"}}]}"#).unwrap(),
        "kube-proxy",
        Status::Warning,
        &["table ip kube-proxy"],
    ),
    (|f| (bare(f), f.firewall.unread.push("there is no `nft`".into())).1, "firewall", Status::Warning, &["there is no `nft`", "`nft` installed"]),
    // cluster
    (|f| f.origin = Some(Origin::Directory("/d".into(), Err("ENOENT".into()))), "source", Status::Failure, &["/d", "ENOENT", "source.directory"]),
    (|f| f.origin = Some(Origin::Server("https://x".into(), Err("refused".into()))), "source", Status::Failure, &["https://x", "refused"]),
    (|f| f.origin = Some(Origin::Server("https://x".into(), Ok(Some(3600)))), "clock", Status::Warning, &["3600 s behind that of https://x"]),
    (|f| f.origin = Some(Origin::Server("https://x".into(), Ok(Some(-31)))), "clock", Status::Warning, &["31 s ahead of that of"]),
    // cni
    (|f| f.cni.before.push("/c/05-other.conflist".into()), "cni-order", Status::Warning, &["/c/05-other.conflist comes before", "--conf-name"]),
    (|f| f.cni.found = Plugin::Missing, "cni-plugin", Status::Failure, &["missing", "install-cni"]),
    (|f| f.cni.found = Plugin::NotExecutable, "cni-plugin", Status::Failure, &["not executable", "chmod 755"]),
    (|f| f.cni.found = Plugin::Fails("ENOEXEC".into()), "cni-plugin", Status::Failure, &["ENOEXEC", "install-cni"]),
    (|f| f.cni.found = Plugin::Answers(Some(Same::Different)), "cni-plugin", Status::Warning, &["another one", "install-cni"]),
    (|f| f.cni.text = None, "cni-config", Status::Failure, &["is missing", "install-cni"]),
    (|f| f.cni.text = Some(Err("EACCES".into())), "cni-config", Status::Failure, &["EACCES"]),
    (|f| f.cni.text = Some(Ok("{".into())), "cni-config", Status::Failure, &["is not JSON"]),
    (|f| f.cni.text = Some(Ok(r#"{"plugins": [{"type": "bridge"}]}"#.into())), "cni-config", Status::Failure, &["names no plugin podgate-cni"]),
    (|f| f.cni.text = Some(Ok(r#"{"plugins": [{"type": "podgate-cni"}]}"#.into())), "cni-config", Status::Failure, &["no name or no cniVersion"]),
    (
        |f| f.cni.text = Some(Ok(crate::install_cni::configuration("/other.sock".as_ref()).to_string())),
        "cni-config",
        Status::Failure,
        &["names the socket /other.sock", "/run/podgate/podgate.sock"],
    ),
    // daemon
    (|f| f.daemon = Daemon::Down("/s".into()), "daemon", Status::Failure, &["no daemon answers at /s", "podgate run"]),
    (|f| f.daemon = Daemon::Denied("/s".into()), "daemon", Status::Warning, &["not for this user", "root"]),
    (|f| f.daemon = Daemon::Mute("did not answer".into()), "daemon", Status::Failure, &["did not answer", "log"]),
    (|f| tables_of(f).status["version"] = json!("0.0.1"), "version", Status::Warning, &["of version 0.0.1", "restart the daemon"]),
    (|f| tables_of(f).status["ready"] = json!(false), "ready", Status::Failure, &["node-1 is not ready"]),
    (
        |f| {
            tables_of(f).status["checks"][0] =
                json!({"name": "pods IPv4", "ok": false, "detail": "no answer from 10.244.1.1:80 (EHOSTUNREACH): see the log"})
        },
        "self-test",
        Status::Failure,
        &["`pods IPv4` fails: no answer from 10.244.1.1:80 (EHOSTUNREACH)", "see the log"],
    ),
    (
        |f| {
            let detail = "a probe from 10.244.1.1 did not come back: iptables -I FORWARD -i podgate -j ACCEPT";
            tables_of(f).status["checks"][1] = json!({"name": "forward IPv4", "ok": false, "detail": detail});
            // The daemon says it again, which is not to be two lines.
            tables_of(f).status["problems"] = json!([format!("forward IPv4: {detail}")]);
        },
        "self-test",
        Status::Warning,
        &["did not come back", "iptables -I FORWARD"],
    ),
    (|f| tables_of(f).status["checks"] = json!([]), "self-test", Status::Warning, &["has not run yet"]),
    (|f| tables_of(f).status["source"]["connected"] = json!(false), "connected", Status::Warning, &["does not follow its source (directory)"]),
    (|f| tables_of(f).status["problems"] = json!(["source: web.yaml:3: odd"]), "problems", Status::Warning, &["web.yaml:3: odd"]),
    (
        |f| tables_of(f).status["pending"] = json!({"seconds": 61.0, "generation": 8, "workers": [1]}),
        "tables",
        Status::Failure,
        &["generation 8", "61 s for workers [1]", "hang"],
    ),
    (|f| tables_of(f).workers["workers"][1]["state"] = json!("down"), "workers", Status::Failure, &["worker 1 is down"]),
    // peers
    (|f| f.peers = Some(Err(Unseen("EPERM".into()))), "peers", Status::Warning, &["EPERM", "root"]),
    (
        |f| f.peers = Some(Ok(vec![Peer { small: None, full: None, beside: Some(Duration::ZERO), ..peer() }])),
        "peers",
        Status::Failure,
        &["node-2 does not answer through the overlay", "192.0.2.2 answers a ping", "UDP port 4790"],
    ),
    (
        |f| f.peers = Some(Ok(vec![Peer { small: None, full: None, ..peer() }])),
        "peers",
        Status::Failure,
        &["node-2 answers neither", "nor by a ping", "machine is up"],
    ),
    (|f| f.peers = Some(Ok(vec![Peer { full: None, ..peer() }])), "path-mtu", Status::Failure, &["not one of 1464 bytes", "192.0.2.2:4790"]),
    (|f| tables_of(f).peers["peers"][0]["mtu"] = json!(1364), "path-mtu", Status::Warning, &["node-2 carries packets of 1364 bytes", "1464"]),
];

/// What firewalld 1.3 makes, cut down to what decides.
const FIREWALLD: &str = r#"{"nftables": [{"table": {"family": "inet", "name": "firewalld"}},
    {"chain": {"family": "inet", "table": "firewalld", "name": "filter_FORWARD", "type": "filter", "hook": "forward", "prio": 10, "policy": "accept"}},
    {"chain": {"family": "inet", "table": "firewalld", "name": "filter_FWD_public"}},
    {"rule": {"family": "inet", "table": "firewalld", "chain": "filter_FORWARD", "expr": [{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}}, {"accept": null}]}},
    {"rule": {"family": "inet", "table": "firewalld", "chain": "filter_FORWARD", "expr": [{"jump": {"target": "filter_FWD_public"}}]}},
    {"rule": {"family": "inet", "table": "firewalld", "chain": "filter_FORWARD", "expr": [{"reject": {"type": "icmpx", "expr": "admin-prohibited"}}]}}]}"#;

fn bound(protocol: Protocol, address: &str) -> Bound {
    Bound { protocol, address: address.parse::<SocketAddr>().unwrap() }
}

#[test]
fn each_fault_makes_a_line_that_says_what_is_wrong_and_what_to_do() {
    for (change, check, status, words) in FAULTS {
        let mut facts = healthy();
        change(&mut facts);
        let found = bad(&facts);
        let line = found.iter().find(|finding| finding.check == *check && finding.status == *status);
        let line = line.unwrap_or_else(|| panic!("no {status:?} of {check} ({words:?}): {found:#?}"));
        let text = format!("{} → {}", line.detail, line.remedy.as_deref().expect("what is wrong has a remedy"));
        for word in *words {
            assert!(text.contains(word), "{check}: {word:?} is not in {text:?}");
        }
        let fine = findings(&facts).iter().any(|finding| finding.check == *check && finding.status == Status::Ok);
        assert!(!fine, "{check} is said to be fine as well");
    }
}

#[test]
fn a_self_test_that_fails_is_one_line_though_the_daemon_says_it_twice() {
    let mut facts = healthy();
    let detail = "a probe from 10.244.1.1 did not come back: do this";
    tables_of(&mut facts).status["checks"][1] = json!({"name": "forward IPv4", "ok": false, "detail": detail});
    tables_of(&mut facts).status["problems"] = json!([format!("forward IPv4: {detail}")]);
    assert_eq!(bad(&facts).len(), 1, "{:#?}", bad(&facts));
}

#[test]
fn a_firewall_that_cannot_be_read_is_no_worry_where_the_self_test_passes_it() {
    let mut facts = healthy();
    facts.firewall.unread.push("there is no `nft`".into());
    assert_eq!(bad(&facts), []);
    let line = findings(&facts).into_iter().find(|finding| finding.check == "firewall").unwrap();
    assert!(line.detail.contains("there is no `nft`") && line.detail.contains("test packets pass"), "{}", line.detail);
}

#[test]
fn bridges_of_container_engines_are_named_and_harmless() {
    let mut facts = healthy();
    host_of(&mut facts).links.push(("docker0".into(), "bridge".into()));
    assert_eq!(bad(&facts), []);
    let line = findings(&facts).into_iter().find(|finding| finding.check == "other-plugins").unwrap();
    assert!(line.detail.contains("docker0"), "{}", line.detail);
}

#[test]
fn kubelets_own_chains_are_in_nobodys_way() {
    let mut facts = healthy();
    let text = "*filter\n:FORWARD ACCEPT [0:0]\n:KUBE-FIREWALL - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n";
    facts.firewall.chains = read::save(Tool::Nftables, "ip", text);
    assert_eq!(bad(&facts), []);
}

#[test]
fn of_many_silent_nodes_some_are_named_and_the_others_counted() {
    let mut facts = healthy();
    let silent = |number: usize| Peer { node: format!("node-{number}"), small: None, full: None, ..peer() };
    facts.peers = Some(Ok((2..102).map(silent).collect()));
    let found = bad(&facts);
    assert_eq!(found.len(), 21);
    assert!(found[20].detail.contains("80 more nodes"), "{}", found[20].detail);
}

#[test]
fn a_cluster_of_one_and_a_bare_machine_without_the_plugin_are_fine() {
    let mut facts = healthy();
    facts.peers = Some(Ok(Vec::new()));
    tables_of(&mut facts).peers = json!({"peers": []});
    (facts.cni.found, facts.cni.text) = (Plugin::Missing, None);
    assert_eq!(bad(&facts), []);
    facts.configuration = configured("{kubernetes: {server: \"https://192.0.2.10:6443\"}}");
    let checks: Vec<&str> = bad(&facts).iter().map(|finding| finding.check).collect();
    assert_eq!(checks, ["cni-plugin", "cni-config"], "in a cluster of Kubernetes it is needed");
}

#[test]
fn the_cluster_of_another_family_is_not_asked_for() {
    let mut facts = healthy();
    // IPv6 is switched off, has no rules, and is not used.
    host_of(&mut facts).sysctls.insert("net/ipv6/conf/all/disable_ipv6".into(), "1".into());
    assert_eq!(bad(&facts), []);
    let Configuration::Read(config) = &mut facts.configuration else { panic!("it holds") };
    config.pod_cidrs.push(net("fd00:77::/32"));
    let found = bad(&facts);
    assert!(found.iter().any(|finding| finding.detail.contains("disable_ipv6")), "{found:#?}");
    assert!(found.iter().any(|finding| finding.detail.contains("net.ipv6.conf.all.forwarding is 0")), "{found:#?}");
}

#[test]
fn paths_are_shown_as_they_are_given() {
    let facts = Facts { configuration: Configuration::Missing(PathBuf::from("/some/where.yaml")), ..healthy() };
    assert!(bad(&facts).iter().any(|finding| finding.detail.contains("/some/where.yaml")));
}
