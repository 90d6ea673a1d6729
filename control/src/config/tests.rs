//! Every way to get a configuration wrong, with the words it is refused in.

use super::*;

const OK: &str = "underlay: {address: 192.0.2.1}\nsource: {directory: /etc/podgate/cluster.d}\n";

fn host() -> HostFacts {
    HostFacts { name: "node-1".into(), ephemeral_ports: 32768..=60999 }
}

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse("podgate.yaml".as_ref(), text, &host())
}

/// The error of a good file with `extra` in it.
#[track_caller]
fn error(extra: &str) -> String {
    parse(&format!("{OK}{extra}\n")).expect_err(extra).to_string()
}

#[test]
fn the_documented_example_is_read_whole() {
    let text = "
node: node-1                       # default: the host's name
underlay: {address: 192.0.2.1}     # or {interface: eth0}; one or two addresses for dual stack
overlay: {port: 4790, vni: 1}
podCIDRs: [10.244.0.0/16]          # the cluster's; default 10.32.0.0/12
serviceCIDRs: [10.96.0.0/16]
nodePorts: 30000-32767
nodePortAddresses: primary         # or CIDRs
masquerade: {ports: [61000-65534]} # or false; only for traffic that leaves the cluster
externalIPs: {allow: []}
health: {address: 0.0.0.0:10256}
metrics: {address: 127.0.0.1:10249}
source:                            # exactly one
  directory: /etc/podgate/cluster.d
runtimeDir: /run/podgate           # socket, flow table
stateDir: /var/lib/podgate         # address journal
attach: veth                       # or tun
workers: {count: 2, cpus: [2, 3]}  # default: chosen from the machine
outsideToPods: allow               # or drop
devices: {pods: pods, host: podgate}
ipam: {exclude: [], reserve: {}, pools: {}, cooldown: 60s}
";
    let config = parse(text).unwrap();
    assert_eq!(config.pod_cidrs, ["10.244.0.0/16".parse().unwrap()]);
    assert_eq!(config.node_ports, 30000..=32767);
    assert_eq!(config.masquerade, Some(vec![61000..=65534]));
    assert_eq!(config.workers, Some(Workers { count: 2, cpus: vec![2, 3] }));
    // Everything but the pod range and the workers is the default.
    let defaults = parse(OK).unwrap();
    assert_eq!(defaults.pod_cidrs, ["10.32.0.0/12".parse().unwrap()]);
    assert_eq!(defaults.flows.capacity, 262_144);
    assert_eq!(Config { pod_cidrs: defaults.pod_cidrs.clone(), workers: None, ..config }, defaults);
}

#[test]
fn the_other_forms_are_read_too() {
    let text = "underlay: {address: [192.0.2.1, '2001:db8::1']}
source: {etcd: {endpoints: ['http://192.0.2.10:2379'], user: 'root:secret'}}
nodePortAddresses: [192.0.2.0/24]
masquerade: false
workers: {cpus: [1]}
attach: tun
outsideToPods: drop
";
    let config = parse(text).unwrap();
    assert_eq!(config.underlay, Underlay::Addresses(vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()]));
    assert_eq!((config.attach, config.outside_to_pods), (podgate_cni::protocol::AttachMode::Tun, OutsideToPods::Drop));
    assert_eq!(config.masquerade, None);
    assert_eq!(config.workers, Some(Workers { count: 1, cpus: vec![1] }));
    assert_eq!(config.node_port_addresses, NodePortAddresses::Within(vec!["192.0.2.0/24".parse().unwrap()]));
    assert_eq!(config.source.kind(), "etcd");
    assert!(!format!("{config:?}").contains("secret"), "a password never reaches a log");
}

#[test]
fn an_unknown_key_is_refused_with_its_place_and_near_matches() {
    assert_eq!(error("podCidrs: [10.0.0.0/8]"), "podgate.yaml:3:1: unknown key `podCidrs`; did you mean `podCIDRs`?");
    assert_eq!(error("overlay: {port: 4790, vnl: 1}"), "podgate.yaml:3:23: unknown key `vnl`; did you mean `vni`?");
    assert_eq!(error("flows: {size: 1}"), "podgate.yaml:3:9: unknown key `size`; the keys here are `capacity`, `timeouts`");
    assert_eq!(error("masquerade: {port: [61000-65534]}"), "podgate.yaml:3:14: unknown key `port`; did you mean `ports`?");
}

#[test]
fn a_malformed_value_is_refused_with_its_place() {
    for (extra, place) in [
        ("podCIDRs: [10.244.0.0/33]", "podgate.yaml:3:12: "),
        ("nodePorts: 32767-30000", "podgate.yaml:3:12: "),
        ("nodePorts: many", "podgate.yaml:3:12: "),
        ("attach: bridge", "podgate.yaml:3:9: "),
        ("health: {address: 10256}", "podgate.yaml:3:19: "),
        ("nodePortAddresses: all", "podgate.yaml:3:20: "),
        ("overlay: [", "podgate.yaml:"),
        ("node: a\nnode: b", "podgate.yaml:4:1: "),
    ] {
        let error = error(extra);
        assert!(error.starts_with(place), "{extra}: {error}");
    }
    assert!(error("nodePorts: 32767-30000").contains("`32767-30000` runs backwards; write 30000-32767"));
    assert!(error("nodePortAddresses: all").contains("`all` is neither `primary` nor a list of ranges such as [192.0.2.0/24]"));
}

#[test]
fn ranges_that_overlap_are_named_both() {
    assert_eq!(
        error("podCIDRs: [10.96.0.0/12]"),
        "podgate.yaml: podCIDRs and serviceCIDRs: pod range 10.96.0.0/12 overlaps service range 10.96.0.0/16; choose ranges that do not overlap"
    );
    assert_eq!(
        error("podCIDRs: [192.0.0.0/16]"),
        "podgate.yaml: underlay and podCIDRs: the node's address 192.0.2.1 lies in the pod range 192.0.0.0/16; choose a pod range that holds no node"
    );
    assert_eq!(
        error("serviceCIDRs: [192.0.2.0/24]"),
        "podgate.yaml: underlay and serviceCIDRs: the node's address 192.0.2.1 lies in the service range 192.0.2.0/24; \
         choose a service range that holds no node"
    );
    assert_eq!(error("podCIDRs: [10.0.0.0/24, 10.0.0.128/25]"), "podgate.yaml: podCIDRs: 10.0.0.0/24 overlaps 10.0.0.128/25; keep ranges apart");
    assert_eq!(error("podCIDRs: [10.244.0.1/16]"), "podgate.yaml: podCIDRs: 10.244.0.1/16 has bits set behind its prefix; write 10.244.0.0/16");
}

#[test]
fn ports_that_could_be_taken_for_one_another_are_refused() {
    assert_eq!(
        error("masquerade: {ports: [61000-65535]}"),
        "podgate.yaml: masquerade.ports: 61000-65535 ends above 65534; write 61000-65534: a routing rule takes no higher port"
    );
    assert_eq!(
        error("masquerade: {ports: [32000-32700]}"),
        "podgate.yaml: masquerade.ports and nodePorts: 32000-32700 overlaps 30000-32767; \
         keep them apart: a reply could not be told from a new connection"
    );
    assert_eq!(
        error("masquerade: {ports: [60000-65534]}"),
        "podgate.yaml: masquerade.ports: 60000-65534 overlaps the host's ephemeral range 32768-60999 (net.ipv4.ip_local_port_range); \
         choose ports outside it, or narrow that range with sysctl"
    );
    assert_eq!(error("overlay: {port: 30001}"), "podgate.yaml: nodePorts and overlay.port: 30000-32767 holds port 30001; move one of them");
    assert_eq!(
        error("masquerade: {ports: [62000-63000, 61000-62000]}"),
        "podgate.yaml: masquerade.ports: 61000-62000 overlaps 62000-63000; keep ranges apart"
    );
    assert_eq!(
        error("metrics: {address: 127.0.0.1:10256}"),
        "podgate.yaml: health.address and metrics.address: both use port 10256; give each a port of its own"
    );
    assert!(error("nodePorts: 1-32767").contains("starts below 1024"));
}

#[test]
fn impossible_single_values_are_refused() {
    assert_eq!(
        error("overlay: {vni: 16777216}"),
        "podgate.yaml: overlay.vni: 16777216 does not fit 24 bits; write a number up to 16777215, the same on every node"
    );
    assert_eq!(
        error("overlay: {vni: 7, directReturnVni: 7}"),
        "podgate.yaml: overlay.directReturnVni: 7 is overlay.vni as well; write another number, the same on every node"
    );
    assert!(error("overlay: {directReturnVni: 16777216}").contains("overlay.directReturnVni: 16777216 does not fit 24 bits"));
    assert_eq!(
        error("devices: {pods: a-name-of-16-chr}"),
        "podgate.yaml: devices.pods: `a-name-of-16-chr` cannot be an interface's name; write 1 to 15 characters without `/`, `:` and blanks"
    );
    assert!(error("devices: {pods: podgate}").contains("pods and host are both `podgate`"));
    assert!(error("node: Node_1").contains("`Node_1` cannot be a node's name"));
    assert!(error("runtimeDir: run").contains("`run` is a relative path"));
    assert!(error("workers: {spinMicroseconds: 1001}").contains("1001 is more than 1000"));
    assert!(error("workers: {count: 0}").contains("0 is not between 1 and 256"));
    assert!(error("workers: {count: 3, cpus: [1, 2]}").contains("count is 3 but cpus lists 2"));
    assert!(error("workers: {cpus: [1, 1]}").contains("CPU 1 is listed twice"));
    let timeouts = parse(&format!("{OK}flows: {{timeouts: {{tcpEstablished: 24h, udpReplied: 180s}}}}\n")).unwrap().flows.timeouts;
    assert_eq!((timeouts.tcp_established.as_secs(), timeouts.udp_replied.as_secs(), timeouts.udp_unreplied.as_secs()), (86_400, 180, 30));
    assert_eq!(
        error("flows: {timeouts: {udpReplied: 0}}"),
        "podgate.yaml: flows.timeouts.udpReplied: 0s is not between 2s and 720h; write one in between, or leave the key out"
    );
    assert!(error("flows: {capacity: 10}").contains("10 is not between 1024 and 16777216"));
    assert!(error("podCIDRs: []").contains("podCIDRs: is an empty list"));
}

#[test]
fn addresses_are_given_out_as_the_file_says() {
    let text = "
podCIDRs: [10.244.0.0/16, fd00:77::/56]
ipam:
  exclude: [10.244.1.0/28, 10.244.2.7]
  reserve: {default/web-0: [10.244.1.50, 'fd00:77::50'], default/web-1: 10.244.1.51, vm: 10.244.1.52}
  pools: {blue: [10.244.1.128/25, 'fd00:77:0:1::/64'], green: [10.244.2.0/29]}
  cooldown: 1m30s
";
    let settings = parse(&format!("{OK}{text}")).unwrap().ipam;
    let ips = |list: &[&str]| list.iter().map(|a| a.parse().unwrap()).collect::<Vec<IpAddr>>();
    let cidrs = |list: &[&str]| list.iter().map(|c| c.parse().unwrap()).collect::<Vec<IpNetwork>>();
    assert_eq!(settings.exclude, cidrs(&["10.244.1.0/28", "10.244.2.7/32"]));
    assert_eq!(settings.reserve["default/web-0"], ips(&["10.244.1.50", "fd00:77::50"]));
    assert_eq!((&settings.reserve["default/web-1"], &settings.reserve["vm"]), (&ips(&["10.244.1.51"]), &ips(&["10.244.1.52"])));
    // A pool may have excluded addresses, as long as some are left.
    assert_eq!(settings.pools["green"], cidrs(&["10.244.2.0/29"]));
    assert_eq!(settings.pools["blue"], cidrs(&["10.244.1.128/25", "fd00:77:0:1::/64"]));
    assert_eq!(settings.cooldown_s, 90);
    assert_eq!(parse(OK).unwrap().ipam, crate::ipam::IpamSettings::default());
    for (text, seconds) in [("0", 0), ("0s", 0), ("60s", 60), ("5m", 300), ("24h", 86_400), ("1h30m", 5400)] {
        assert_eq!(parse(&format!("{OK}ipam: {{cooldown: {text}}}\n")).unwrap().ipam.cooldown_s, seconds, "{text}");
    }
}

#[test]
fn addresses_that_contradict_each_other_are_refused() {
    let error = |ipam: &str| error(&format!("podCIDRs: [10.244.0.0/16]\nipam: {ipam}"));
    assert_eq!(error("{pool: {}}"), "podgate.yaml:4:8: unknown key `pool`; did you mean `pools`?");
    for (ipam, said) in [
        ("{exclude: [10.244.1.5/28]}", "ipam.exclude: 10.244.1.5/28 has bits set behind its prefix; write 10.244.1.0/28"),
        (
            "{exclude: [10.9.0.0/24]}",
            "ipam.exclude and podCIDRs: 10.9.0.0/24 lies outside 10.244.0.0/16; no node of this cluster has it: mend either",
        ),
        (
            "{reserve: {default/web-0: 10.9.0.1}}",
            "ipam.reserve.default/web-0 and podCIDRs: 10.9.0.1 lies outside 10.244.0.0/16; no node of this cluster has it: mend either",
        ),
        ("{reserve: {default/web-0: []}}", "ipam.reserve.default/web-0: is an empty list; name an address, or leave the pod out"),
        ("{reserve: {a/b/c: 10.244.1.9}}", "ipam.reserve.a/b/c: `a/b/c` is no pod's name; write namespace/name, as in default/web-0"),
        ("{reserve: {'-': 10.244.1.9}}", "ipam.reserve.-: `-` is no pod's name; write namespace/name, as in default/web-0"),
        (
            "{exclude: [10.244.1.0/28], reserve: {default/web-0: 10.244.1.9}}",
            "ipam.reserve.default/web-0 and ipam.exclude: 10.244.1.9 is in the excluded 10.244.1.0/28, and no excluded address is given to anybody; \
             keep them apart: a reserved address is kept from others by itself",
        ),
        (
            "{reserve: {default/web-0: 10.244.1.9, default/web-1: 10.244.1.9}}",
            "ipam.reserve.default/web-1 and ipam.reserve.default/web-0: 10.244.1.9 is reserved twice; keep it for one pod",
        ),
        ("{pools: {'a b': [10.244.1.0/28]}}", "ipam.pools.a b: `a b` cannot be a pool's name; write up to 63 letters, digits, `-`, `_` and `.`"),
        ("{pools: {blue: []}}", "ipam.pools.blue: is an empty list; name at least one range, or leave the pool out"),
        ("{pools: {blue: [10.244.1.0/28, 10.244.1.8/29]}}", "ipam.pools.blue: 10.244.1.0/28 overlaps 10.244.1.8/29; keep ranges apart"),
        (
            "{pools: {blue: [10.244.1.0/28], green: [10.244.0.0/17]}}",
            "ipam.pools.blue and ipam.pools.green: 10.244.1.0/28 of one overlaps 10.244.0.0/17 of the other; an address belongs to one pool: keep them \
             apart",
        ),
        (
            "{exclude: [10.244.1.0/24], pools: {blue: [10.244.1.0/28]}}",
            "ipam.pools.blue and ipam.exclude: all of 10.244.1.0/28 is in the excluded 10.244.1.0/24, and no excluded address is given to anybody; \
             keep them apart: a pool is kept from others by itself",
        ),
        ("{cooldown: 25h}", "ipam.cooldown: is longer than a day; write up to 24h; 60s is the default"),
    ] {
        assert_eq!(error(ipam), format!("podgate.yaml: {said}"), "{ipam}");
    }
    for text in ["60", "a minute", "1.5m", "-1s", "60ms", "s", "99999999999999999999s", "9999999999999999h"] {
        let error = error(&format!("{{cooldown: {text}}}"));
        let said = format!("podgate.yaml:4:18: `{text}` is not a duration; write one as 60s, 5m or 1h30m");
        assert!(error.replace("cooldown: ", "") == said, "{error}");
    }
}

#[test]
fn exactly_one_source_and_one_kind_of_underlay_are_asked_for() {
    let error = |text: &str| parse(text).unwrap_err().to_string();
    let remedy = "write exactly one, for example source: {directory: /etc/podgate/cluster.d}";
    assert_eq!(error("underlay: {address: 192.0.2.1}"), format!("podgate.yaml: source: is missing; {remedy}"));
    assert_eq!(
        error("underlay: {address: 192.0.2.1}\nsource: {directory: /a, kubernetes: {}}"),
        format!("podgate.yaml: source: names directory and kubernetes; {remedy}")
    );
    let remedy = "write {address: 192.0.2.1}, a list with one address of each family, or {interface: eth0}";
    assert_eq!(error("source: {directory: /a}"), format!("podgate.yaml: underlay: says neither address nor interface; {remedy}"));
    assert_eq!(
        error("source: {directory: /a}\nunderlay: {address: [192.0.2.1, 192.0.2.2]}"),
        format!("podgate.yaml: underlay.address: has 2 IPv4 and 0 IPv6 addresses; {remedy}")
    );
    assert!(error("source: {directory: /a}\nunderlay: {address: 192.0.2.1, interface: eth0}").contains("has both address and interface"));
}

#[test]
fn etcd_is_asked_for_with_all_that_it_needs() {
    let parse = |etcd: &str| parse(&format!("underlay: {{address: 192.0.2.1}}\nsource: {{etcd: {{{etcd}}}}}\n"));
    let SourceConfig::Etcd(etcd) = parse("endpoints: ['http://a:2379'], lease: 5s").unwrap().source else { panic!("etcd") };
    assert_eq!((etcd.prefix.as_str(), etcd.lease.as_secs(), etcd.grace.as_secs()), ("/podgate", 5, 600));
    for (etcd, said) in [
        ("endpoints: []", "source.etcd.endpoints: is an empty list"),
        ("endpoints: ['https://a']", "source.etcd.ca: is missing, and there are https endpoints"),
        ("endpoints: ['http://a'], cert: /c", "source.etcd.cert and source.etcd.key: one is there without the other"),
        ("endpoints: ['http://a'], prefix: podgate", "source.etcd.prefix: `podgate` is not a path; write one as /podgate"),
        ("endpoints: ['http://a'], prefix: /", "source.etcd.prefix: `/` is not a path"),
        ("endpoints: ['http://a'], user: root", "source.etcd.user: has no `:`"),
        ("endpoints: ['http://a'], lease: 1s", "source.etcd.lease: 1 s is not between 3 s and 1 h"),
        ("endpoints: ['http://a'], grace: 10s", "source.etcd.grace: 10 s is shorter than source.etcd.lease (15 s)"),
    ] {
        let error = parse(etcd).unwrap_err().to_string();
        assert!(error.starts_with(&format!("podgate.yaml: {said}")), "{error}");
    }
}

#[test]
fn a_missing_file_is_named() {
    let error = Config::load("/nonexistent/podgate.yaml".as_ref()).unwrap_err().to_string();
    assert!(error.starts_with("/nonexistent/podgate.yaml: cannot be read: No such file"), "{error}");
}
