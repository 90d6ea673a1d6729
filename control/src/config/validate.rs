//! What must hold between keys, and with the machine.

use std::fmt::Display;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnetwork::IpNetwork;
use podgate_cni::protocol::AttachMode;
use podgate_core::fib::bounds;
use podgate_core::flow::Timeouts;
use podgate_core::snapshot::OutsideToPods;

use super::raw::{
    PortRange, Raw, RawAttach, RawDevices, RawEtcd, RawFlows, RawMasquerade, RawNodePortAddresses, RawOutsideToPods, RawOverlay, RawSource,
    RawTimeouts, RawUnderlay, RawWorkers, Seconds,
};
use super::{
    Config, ConfigError, Devices, EtcdConfig, Flows, HostFacts, NodePortAddresses, Overlay, SourceConfig, Underlay, Workers, addresses, publish,
};

/// Builds errors about one file.
pub(super) struct Check<'a> {
    file: &'a Path,
}

impl Check<'_> {
    pub(super) fn fail<T>(&self, key: impl Display, problem: impl Display, remedy: impl Display) -> Result<T, ConfigError> {
        Err(ConfigError::Invalid {
            file: self.file.display().to_string(),
            key: key.to_string(),
            problem: problem.to_string(),
            remedy: remedy.to_string(),
        })
    }
}

const NODE_PORTS: RangeInclusive<u16> = 30000..=32767;
/// A node that is gone is missed after so long, in seconds.
const ETCD_LEASE_S: u64 = 15;
/// Longer than a machine takes to start again, in seconds.
const ETCD_GRACE_S: u64 = 600;
const MASQUERADE_PORTS: RangeInclusive<u16> = 61000..=65534;
/// Rules of the kernel that match ports take at most this as their upper end (Linux `fib_rule_port_range_valid`).
const PORT_MAX: u16 = 65534;
/// IFNAMSIZ is 16 with the closing NUL (Linux `include/uapi/linux/if.h`).
const DEVICE_NAME_LEN_MAX: usize = 15;

pub(super) fn validate(file: &Path, raw: Raw, host: &HostFacts) -> Result<Config, ConfigError> {
    let check = Check { file };
    let pod_cidrs = ranges(&check, "podCIDRs", raw.pod_cidrs, "10.32.0.0/12")?;
    let mut config = Config {
        file: file.to_owned(),
        ipam: addresses::settings(&check, raw.ipam, &pod_cidrs)?,
        node: node(&check, raw.node, host)?,
        underlay: underlay(&check, raw.underlay)?,
        overlay: overlay(&check, raw.overlay)?,
        pod_cidrs,
        service_cidrs: ranges(&check, "serviceCIDRs", raw.service_cidrs, "10.96.0.0/16")?,
        node_ports: raw.node_ports.map_or(NODE_PORTS, |p| p.0),
        node_port_addresses: match raw.node_port_addresses {
            None | Some(RawNodePortAddresses::Primary) => NodePortAddresses::Primary,
            Some(RawNodePortAddresses::Within(within)) => NodePortAddresses::Within(ranges(&check, "nodePortAddresses", Some(within), "")?),
        },
        masquerade: masquerade(&check, raw.masquerade)?,
        external_ips: raw.external_ips.map(|e| e.allow.iter().map(network).collect()).unwrap_or_default(),
        health: raw.health.map_or(([0, 0, 0, 0], 10256).into(), |h| h.address),
        metrics: raw.metrics.map_or(([127, 0, 0, 1], 10249).into(), |m| m.address),
        source: source(&check, raw.source)?,
        runtime_dir: absolute(&check, "runtimeDir", raw.runtime_dir.unwrap_or_else(|| "/run/podgate".into()))?,
        state_dir: absolute(&check, "stateDir", raw.state_dir.unwrap_or_else(|| "/var/lib/podgate".into()))?,
        attach: raw.attach.map_or(AttachMode::Veth, |a| match a {
            RawAttach::Veth => AttachMode::Veth,
            RawAttach::Tun => AttachMode::Tun,
        }),
        spin: spin(&check, raw.workers.as_ref().and_then(|workers| workers.spin_microseconds))?,
        workers: workers(&check, raw.workers)?,
        outside_to_pods: raw.outside_to_pods.map_or(OutsideToPods::Allow, |o| match o {
            RawOutsideToPods::Allow => OutsideToPods::Allow,
            RawOutsideToPods::Drop => OutsideToPods::Drop,
        }),
        devices: devices(&check, raw.devices)?,
        flows: flows(&check, raw.flows)?,
        dhcp_servers: raw.dhcp.map(|dhcp| dhcp.servers).unwrap_or_default(),
        publish: Vec::new(),
    };
    config.publish = publish::publish(&check, raw.publish, &config)?;
    ranges_are_apart(&check, &config)?;
    ports_are_apart(&check, &config, host)?;
    Ok(config)
}

fn node(check: &Check<'_>, given: Option<String>, host: &HostFacts) -> Result<String, ConfigError> {
    let name = given.unwrap_or_else(|| host.name.clone());
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    // RFC 1123 subdomain, as Kubernetes asks of a node's name.
    if name.is_empty() || name.len() > 253 || !name.chars().all(fits) || name.starts_with(['-', '.']) || name.ends_with(['-', '.']) {
        return check.fail(
            "node",
            format!("`{name}` cannot be a node's name"),
            "write the name of its Node object: lower-case letters, digits, `-` and `.`",
        );
    }
    Ok(name)
}

fn underlay(check: &Check<'_>, given: Option<RawUnderlay>) -> Result<Underlay, ConfigError> {
    let remedy = "write {address: 192.0.2.1}, a list with one address of each family, or {interface: eth0}";
    match given.map(|u| (u.address, u.interface)) {
        None | Some((None, None)) => check.fail("underlay", "says neither address nor interface", remedy),
        Some((Some(_), Some(_))) => check.fail("underlay", "has both address and interface", "keep one of them"),
        Some((None, Some(interface))) => {
            device_name(check, "underlay.interface", &interface)?;
            Ok(Underlay::Interface(interface))
        }
        Some((Some(addresses), None)) => {
            let addresses = addresses.0;
            if let Some(bad) = addresses.iter().find(|a| a.is_unspecified() || a.is_loopback() || a.is_multicast()) {
                return check.fail("underlay.address", format!("{bad} is nobody's address to other nodes"), remedy);
            }
            let of = |v4: bool| addresses.iter().filter(|a| a.is_ipv4() == v4).count();
            if addresses.is_empty() || of(true) > 1 || of(false) > 1 {
                return check.fail("underlay.address", format!("has {} IPv4 and {} IPv6 addresses", of(true), of(false)), remedy);
            }
            Ok(Underlay::Addresses(addresses))
        }
    }
}

fn overlay(check: &Check<'_>, raw: Option<RawOverlay>) -> Result<Overlay, ConfigError> {
    let RawOverlay { port, vni, direct_return_vni } = raw.unwrap_or_default();
    // IANA: vxlan-gpe is 4790.
    let (port, vni) = (port.unwrap_or(4790), vni.unwrap_or(1));
    if port == 0 {
        return check.fail("overlay.port", "0 is not a port", "write one from 1 to 65535; 4790 is VXLAN-GPE's own");
    }
    for (key, vni) in [("overlay.vni", Some(vni)), ("overlay.directReturnVni", direct_return_vni)] {
        if let Some(vni) = vni.filter(|vni| *vni >= 1 << 24) {
            return check.fail(key, format!("{vni} does not fit 24 bits"), "write a number up to 16777215, the same on every node");
        }
    }
    if direct_return_vni == Some(vni) {
        return check.fail("overlay.directReturnVni", format!("{vni} is overlay.vni as well"), "write another number, the same on every node");
    }
    Ok(Overlay { port, vni, direct_return_vni })
}

/// The range without host bits, so that equal ones compare equal.
pub(super) fn network(cidr: &IpNetwork) -> IpNetwork {
    IpNetwork::new(cidr.network(), cidr.prefix()).expect("a network's own prefix length fits it")
}

fn ranges(check: &Check<'_>, key: &str, given: Option<Vec<IpNetwork>>, default: &str) -> Result<Vec<IpNetwork>, ConfigError> {
    let Some(given) = given else { return Ok(default.parse().into_iter().collect()) };
    if given.is_empty() {
        return check.fail(key, "is an empty list", "name at least one range, or leave the key out");
    }
    if let Some(bad) = given.iter().find(|c| network(c).ip() != c.ip()) {
        return check.fail(key, format!("{bad} has bits set behind its prefix"), format!("write {}", network(bad)));
    }
    for (i, a) in given.iter().enumerate() {
        if let Some(b) = given[i + 1..].iter().find(|b| overlap(a, b)) {
            return check.fail(key, format!("{a} overlaps {b}"), "keep ranges apart");
        }
    }
    Ok(given)
}

pub(super) fn overlap(a: &IpNetwork, b: &IpNetwork) -> bool {
    let ((a_first, a_last), (b_first, b_last)) = (bounds(*a), bounds(*b));
    a_first <= b_last && b_first <= a_last
}

fn masquerade(check: &Check<'_>, given: Option<RawMasquerade>) -> Result<Option<Vec<RangeInclusive<u16>>>, ConfigError> {
    let mut ports = match given {
        Some(RawMasquerade::Off) => return Ok(None),
        Some(RawMasquerade::On(ports)) => ports.ports.unwrap_or_else(|| vec![PortRange(MASQUERADE_PORTS)]),
        None => vec![PortRange(MASQUERADE_PORTS)],
    };
    if ports.is_empty() {
        return check.fail("masquerade.ports", "is an empty list", "name a range such as 61000-65534, or write `masquerade: false`");
    }
    ports.sort_by_key(|p| *p.0.start());
    if let Some(pair) = ports.windows(2).find(|pair| pair[1].0.start() <= pair[0].0.end()) {
        return check.fail("masquerade.ports", format!("{} overlaps {}", show(&pair[0].0), show(&pair[1].0)), "keep ranges apart");
    }
    Ok(Some(ports.into_iter().map(|p| p.0).collect()))
}

fn source(check: &Check<'_>, given: Option<RawSource>) -> Result<SourceConfig, ConfigError> {
    let remedy = "write exactly one, for example source: {directory: /etc/podgate/cluster.d}";
    let Some(given) = given else { return check.fail("source", "is missing", remedy) };
    match (given.directory, given.kubernetes, given.etcd) {
        (Some(directory), None, None) => Ok(SourceConfig::Directory(absolute(check, "source.directory", directory)?)),
        (None, Some(k), None) => Ok(SourceConfig::Kubernetes { server: k.server, kubeconfig: k.kubeconfig }),
        (None, None, Some(e)) => Ok(SourceConfig::Etcd(etcd(check, e)?)),
        (None, None, None) => check.fail("source", "names no source", remedy),
        (directory, kubernetes, etcd) => {
            let named = [("directory", directory.is_some()), ("kubernetes", kubernetes.is_some()), ("etcd", etcd.is_some())];
            let named: Vec<&str> = named.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
            check.fail("source", format!("names {}", named.join(" and ")), remedy)
        }
    }
}

fn etcd(check: &Check<'_>, given: RawEtcd) -> Result<EtcdConfig, ConfigError> {
    let RawEtcd { endpoints, prefix, ca, cert, key, user, lease, grace } = given;
    if endpoints.is_empty() {
        return check.fail("source.etcd.endpoints", "is an empty list", "name at least one URL");
    }
    if ca.is_none() && endpoints.iter().any(|url| url.starts_with("https:")) {
        let remedy = "name the PEM file with the certificate of the authority that signed etcd's";
        return check.fail("source.etcd.ca", "is missing, and there are https endpoints", remedy);
    }
    if cert.is_some() != key.is_some() {
        return check.fail("source.etcd.cert and source.etcd.key", "one is there without the other", "name both, or neither");
    }
    let prefix = prefix.unwrap_or_else(|| "/podgate".into());
    if !prefix.starts_with('/') || prefix.ends_with('/') {
        return check.fail("source.etcd.prefix", format!("`{prefix}` is not a path"), "write one as /podgate");
    }
    if user.as_deref().is_some_and(|user| !user.contains(':')) {
        return check.fail("source.etcd.user", "has no `:`", "write it as name:password");
    }
    let lease = Duration::from_secs(lease.map_or(ETCD_LEASE_S, |lease| lease.0));
    let grace = Duration::from_secs(grace.map_or(ETCD_GRACE_S, |grace| grace.0));
    // etcd grants no shorter ones than its elections take.
    if !(3..=3600).contains(&lease.as_secs()) {
        return check.fail("source.etcd.lease", format!("{} s is not between 3 s and 1 h", lease.as_secs()), "15s serves most clusters");
    }
    if grace < lease {
        let problem = format!("{} s is shorter than source.etcd.lease ({} s)", grace.as_secs(), lease.as_secs());
        return check.fail("source.etcd.grace", problem, "write the same on every node, and longer than a machine takes to start; 10m serves most");
    }
    Ok(EtcdConfig { endpoints, prefix, ca, cert, key, user, lease, grace })
}

fn absolute(check: &Check<'_>, key: &str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    if !path.is_absolute() {
        return check.fail(
            key,
            format!("`{}` is a relative path", path.display()),
            "write an absolute one: the daemon's working directory is nobody's choice",
        );
    }
    Ok(path)
}

fn workers(check: &Check<'_>, given: Option<RawWorkers>) -> Result<Option<Workers>, ConfigError> {
    let Some(given) = given else { return Ok(None) };
    let count = match (given.count, given.cpus.len()) {
        (Some(count), _) => count,
        (None, 0) => return Ok(None),
        (None, cpus) => u16::try_from(cpus).unwrap_or(u16::MAX),
    };
    // A TUN has at most 256 queues (Linux `MAX_TAP_QUEUES`), and each worker has one of its own.
    if !(1..=256).contains(&count) {
        return check.fail("workers.count", format!("{count} is not between 1 and 256"), "one for each CPU that the gateway may use is plenty");
    }
    if !given.cpus.is_empty() && given.cpus.len() != usize::from(count) {
        return check.fail(
            "workers",
            format!("count is {count} but cpus lists {}", given.cpus.len()),
            "list one CPU for each worker, or leave cpus out",
        );
    }
    let mut sorted = given.cpus.clone();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return check.fail("workers.cpus", format!("CPU {} is listed twice", twice[0]), "give each worker a CPU of its own");
    }
    Ok(Some(Workers { count, cpus: given.cpus }))
}

fn spin(check: &Check<'_>, microseconds: Option<u32>) -> Result<Option<Duration>, ConfigError> {
    // A millisecond is longer than any worker takes to be woken.
    if let Some(microseconds) = microseconds.filter(|microseconds| *microseconds > 1000) {
        return check.fail("workers.spinMicroseconds", format!("{microseconds} is more than 1000"), "50 is plenty; 0 switches it off");
    }
    Ok(microseconds.map(|microseconds| Duration::from_micros(microseconds.into())))
}

fn devices(check: &Check<'_>, given: Option<RawDevices>) -> Result<Devices, ConfigError> {
    let (pods, host) = given.map_or((None, None), |d| (d.pods, d.host));
    let devices = Devices { pods: pods.unwrap_or_else(|| "pods".into()), host: host.unwrap_or_else(|| "podgate".into()) };
    device_name(check, "devices.pods", &devices.pods)?;
    device_name(check, "devices.host", &devices.host)?;
    if devices.pods == devices.host {
        let remedy = "give the two TUNs names of their own; they would be taken for one another in every listing";
        return check.fail("devices", format!("pods and host are both `{}`", devices.pods), remedy);
    }
    Ok(devices)
}

/// Whether the kernel takes `name` for an interface (Linux `dev_valid_name`).
pub(crate) fn check_device_name(name: &str) -> Result<(), ()> {
    let odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if name.is_empty() || name.len() > DEVICE_NAME_LEN_MAX || name == "." || name == ".." || name.contains(odd) { Err(()) } else { Ok(()) }
}

fn device_name(check: &Check<'_>, key: &str, name: &str) -> Result<(), ConfigError> {
    if check_device_name(name).is_err() {
        return check.fail(key, format!("`{name}` cannot be an interface's name"), "write 1 to 15 characters without `/`, `:` and blanks");
    }
    Ok(())
}

fn flows(check: &Check<'_>, raw: Option<RawFlows>) -> Result<Flows, ConfigError> {
    let (capacity, timeouts) = raw.map_or((None, None), |raw| (raw.capacity, raw.timeouts));
    let capacity = capacity.unwrap_or(262_144);
    // A record takes 128 bytes and its part of the index some more: the upper end is about 3 GiB of locked memory.
    if !(1024..=16_777_216).contains(&capacity) {
        return check.fail("flows.capacity", format!("{capacity} is not between 1024 and 16777216"), "262144 serves most nodes");
    }
    Ok(Flows { capacity, timeouts: timeouts.map_or_else(|| Ok(Timeouts::default()), |raw| self::timeouts(check, &raw))? })
}

/// A month, in seconds: nobody waits longer for somebody who is silent.
const TIMEOUT_S_MAX: u64 = 30 * 24 * 3600;

fn timeouts(check: &Check<'_>, raw: &RawTimeouts) -> Result<Timeouts, ConfigError> {
    let mut timeouts = Timeouts::default();
    for (key, given, timeout) in [
        ("tcpOpening", raw.tcp_opening, &mut timeouts.tcp_opening),
        ("tcpEstablished", raw.tcp_established, &mut timeouts.tcp_established),
        ("tcpClosing", raw.tcp_closing, &mut timeouts.tcp_closing),
        ("tcpReset", raw.tcp_reset, &mut timeouts.tcp_reset),
        ("udpUnreplied", raw.udp_unreplied, &mut timeouts.udp_unreplied),
        ("udpReplied", raw.udp_replied, &mut timeouts.udp_replied),
        ("icmp", raw.icmp, &mut timeouts.icmp),
        ("other", raw.other, &mut timeouts.other),
    ] {
        let Some(Seconds(seconds)) = given else { continue };
        // The time of the last packet is kept to the second.
        if !(2..=TIMEOUT_S_MAX).contains(&seconds) {
            return check.fail(
                format!("flows.timeouts.{key}"),
                format!("{seconds}s is not between 2s and 720h"),
                "write one in between, or leave the key out",
            );
        }
        *timeout = Duration::from_secs(seconds);
    }
    Ok(timeouts)
}

fn ranges_are_apart(check: &Check<'_>, config: &Config) -> Result<(), ConfigError> {
    let remedy = "choose ranges that do not overlap";
    for pods in &config.pod_cidrs {
        if let Some(services) = config.service_cidrs.iter().find(|s| overlap(pods, s)) {
            return check.fail("podCIDRs and serviceCIDRs", format!("pod range {pods} overlaps service range {services}"), remedy);
        }
    }
    let Underlay::Addresses(addresses) = &config.underlay else { return Ok(()) };
    for address in addresses {
        apart_from_node(check, config, *address)?;
    }
    Ok(())
}

/// Refuses a node's address inside a pod or service range. The daemon asks again once it knows the addresses of an interface.
fn apart_from_node(check: &Check<'_>, config: &Config, address: IpAddr) -> Result<(), ConfigError> {
    let ranges = [("podCIDRs", "pod", &config.pod_cidrs), ("serviceCIDRs", "service", &config.service_cidrs)];
    for (key, kind, cidrs) in ranges {
        if let Some(cidr) = cidrs.iter().find(|c| c.contains(address)) {
            let problem = format!("the node's address {address} lies in the {kind} range {cidr}");
            return check.fail(format!("underlay and {key}"), problem, format!("choose a {kind} range that holds no node"));
        }
    }
    Ok(())
}

impl Config {
    /// Whether `address`, one of the node's own, keeps clear of the pod and service ranges. For addresses that the file does not name:
    /// those of `underlay.interface`.
    pub fn accepts_node_address(&self, address: IpAddr) -> Result<(), ConfigError> {
        apart_from_node(&Check { file: &self.file }, self, address)
    }
}

fn show(range: &RangeInclusive<u16>) -> String {
    format!("{}-{}", range.start(), range.end())
}

fn meet(a: &RangeInclusive<u16>, b: &RangeInclusive<u16>) -> bool {
    a.start() <= b.end() && b.start() <= a.end()
}

fn ports_are_apart(check: &Check<'_>, config: &Config, host: &HostFacts) -> Result<(), ConfigError> {
    if *config.node_ports.start() < 1024 {
        let remedy = "write a range from 1024 up: lower ports belong to the node's own services (ssh is at 22)";
        return check.fail("nodePorts", format!("{} starts below 1024", show(&config.node_ports)), remedy);
    }
    let masquerade = config.masquerade.as_deref().unwrap_or_default();
    let named = masquerade.iter().map(|r| ("masquerade.ports", r)).chain([("nodePorts", &config.node_ports)]);
    for (key, range) in named {
        if *range.end() > PORT_MAX {
            let remedy = format!("write {}-{PORT_MAX}: a routing rule takes no higher port", range.start().min(&PORT_MAX));
            return check.fail(key, format!("{} ends above {PORT_MAX}", show(range)), remedy);
        }
        // Replies to these would be taken from the node's own daemons and clients.
        let taken = [("overlay.port", config.overlay.port), ("health.address", config.health.port()), ("metrics.address", config.metrics.port())];
        if let Some((other, port)) = taken.iter().find(|(_, port)| range.contains(port)) {
            return check.fail(format!("{key} and {other}"), format!("{} holds port {port}", show(range)), "move one of them");
        }
    }
    for range in masquerade {
        if meet(range, &config.node_ports) {
            let problem = format!("{} overlaps {}", show(range), show(&config.node_ports));
            return check.fail("masquerade.ports and nodePorts", problem, "keep them apart: a reply could not be told from a new connection");
        }
        if meet(range, &host.ephemeral_ports) {
            let ephemeral = show(&host.ephemeral_ports);
            let problem = format!("{} overlaps the host's ephemeral range {ephemeral} (net.ipv4.ip_local_port_range)", show(range));
            return check.fail("masquerade.ports", problem, "choose ports outside it, or narrow that range with sysctl");
        }
    }
    for (key, port) in [("health.address", config.health.port()), ("metrics.address", config.metrics.port())] {
        if port == 0 {
            return check.fail(key, "port 0 is not a port", "write the port on which it is to be found");
        }
    }
    if config.health.port() == config.metrics.port() {
        let problem = format!("both use port {}", config.health.port());
        return check.fail("health.address and metrics.address", problem, "give each a port of its own");
    }
    Ok(())
}
