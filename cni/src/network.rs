//! The network configuration that a plugin reads from its standard input (CNI SPEC.md, section 1; capabilities: CONVENTIONS.md).
//!
//! Read in two parts. [`Network`] is what every command needs. [`Settings`] is what an attachment is to have, and ADD's alone (STATUS
//! reads it too, to tell of its errors early): a container whose settings were wrong was never attached, and its DEL must not fail for them.
//! Keys that are not known here are other plugins' or a later version's, and are passed over.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use podgate_cni::protocol::{AttachMode, Bandwidth, PortMapping, Valid};
use podgate_cni::result::{Route, VERSIONS};
use serde_json::{Map, Value};

use crate::environment::{Args, Command, check_name};
use crate::error::Error;
use crate::section::Section;

/// How long a command may take unless `timeoutSeconds` says otherwise. Kubelet gives up on a sandbox after minutes; 20 s cover a restart of
/// the daemon several times over.
const TIMEOUT_SECONDS: u64 = 20;

/// The longest time that `timeoutSeconds` may ask for.
const TIMEOUT_SECONDS_MAX: u64 = 300;

/// The capability by which containerd and CRI-O hand over a pod's annotations: a key of `runtimeConfig`.
const POD_ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// A pod's own say in how it is attached: `veth` or `tun`.
const ATTACH_ANNOTATION: &str = "podgate.io/attach";

/// Where addresses come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ipam {
    /// The daemon's own allocator.
    Own {
        /// `ipam.pool`.
        pool: Option<String>,
    },
    /// The plugin of this file name.
    Delegated(String),
}

/// What every command needs to know of a network.
#[derive(Clone, Debug)]
pub struct Network {
    /// `cniVersion`, one of [`VERSIONS`].
    pub version: &'static str,
    /// `name`.
    pub name: String,
    /// `socket`.
    pub socket: PathBuf,
    /// `timeoutSeconds`.
    pub timeout: Duration,
    /// `ipam`.
    pub ipam: Ipam,
    /// `disableCheck`.
    pub disable_check: bool,
    /// `disableGC`.
    pub disable_gc: bool,
    config: Map<String, Value>,
}

/// What an attachment is to have.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// `ipMasq`.
    pub masquerade: Option<bool>,
    /// From `isDefaultGateway` and `isGateway`.
    pub default_route: Option<bool>,
    /// `mtu`, in bytes.
    pub mtu: Option<u32>,
    /// `mac`.
    pub mac: Option<String>,
    /// `routes`.
    pub routes: Vec<Route>,
    /// `runtimeConfig.portMappings`.
    pub port_mappings: Vec<PortMapping>,
    /// `runtimeConfig.bandwidth`.
    pub bandwidth: Option<Bandwidth>,
    /// `attach`, or the pod's annotation [`ATTACH_ANNOTATION`].
    pub mode: Option<AttachMode>,
    /// The addresses that the runtime asks for.
    pub wanted: Vec<IpAddr>,
    /// `dns`, with what it knows.
    pub dns: Map<String, Value>,
}

/// The version to answer in, while the configuration is not yet known to be sound.
pub fn version_to_answer_in(config: &Value) -> &'static str {
    let asked = config.get("cniVersion").and_then(Value::as_str);
    VERSIONS.into_iter().find(|version| Some(*version) == asked).unwrap_or(VERSIONS[VERSIONS.len() - 1])
}

impl Network {
    /// Parses `config` for `command`.
    pub fn parse(config: Value, command: Command) -> Result<Network, Error> {
        let Value::Object(config) = config else {
            return Err(Error::Undecodable { what: "the network configuration".into(), problem: "it is not a JSON object".into() });
        };
        let top = Section::top(&config);
        let version = parse_version(top.string("cniVersion")?, command)?;
        let name = top.string("name")?.filter(|name| !name.is_empty()).ok_or_else(|| top.error("name", "is missing: the network's name"))?;
        check_name(name).map_err(|problem| top.error("name", format!("is not a network's name: {problem}")))?;
        top.string("type")?;
        let socket = PathBuf::from(top.string("socket")?.unwrap_or(podgate_cni::DEFAULT_SOCKET));
        if !socket.is_absolute() || socket.file_name().is_none() {
            return Err(top.error("socket", "is not the absolute path of a socket"));
        }
        top.bool("loadOnlyInlinedPlugins")?;
        if let Some(capabilities) = top.section("capabilities")? {
            for key in capabilities.keys() {
                capabilities.bool(key)?;
            }
        }
        let network = Network {
            version,
            name: name.into(),
            socket,
            timeout: Duration::from_secs(top.number("timeoutSeconds", 1, TIMEOUT_SECONDS_MAX)?.unwrap_or(TIMEOUT_SECONDS)),
            ipam: parse_ipam(&top)?,
            disable_check: top.bool("disableCheck")?.unwrap_or(false),
            disable_gc: top.bool("disableGC")?.unwrap_or(false),
            config: Map::new(),
        };
        Ok(Network { config, ..network })
    }

    /// What an attachment is to have, `args` being what `CNI_ARGS` asks for. Where several places ask for addresses, the first of
    /// `runtimeConfig`, `args` and `CNI_ARGS` is heard, as CONVENTIONS.md says, and for an Ethernet address `mac` last of all.
    pub fn settings(&self, args: &Args) -> Result<Settings, Error> {
        let top = Section::top(&self.config);
        let runtime = top.section("runtimeConfig")?;
        let cni_args = top.section("args")?.map(|args| args.section("cni")).transpose()?.flatten();
        let (ip_masq, is_masq) = (top.bool("ipMasq")?, top.bool("isMasq")?);
        if ip_masq.zip(is_masq).is_some_and(|(one, other)| one != other) {
            return Err(top.error("isMasq", "contradicts `ipMasq`, of which it is another name: leave one of them out"));
        }
        let default_route = match (top.bool("isDefaultGateway")?, top.bool("isGateway")?) {
            (Some(given), _) => Some(given),
            (None, Some(false)) => Some(false),
            (None, _) => None,
        };
        let mac = |section: &Section<'_>| match section.string("mac")?.filter(|mac| !mac.is_empty()) {
            Some(mac) => parse_mac(mac).map(Some).map_err(|problem| section.error("mac", format!("is not usable: {problem}"))),
            None => Ok(None),
        };
        let annotations = runtime.as_ref().map_or(Ok(None), |runtime| runtime.section(POD_ANNOTATIONS))?;
        let of_pod = annotations.as_ref().map_or(Ok(None), |annotations| parse_mode(annotations, ATTACH_ANNOTATION))?;
        let of_config = mac(&top)?;
        let of_args = cni_args.as_ref().map_or(Ok(None), mac)?;
        let of_runtime = runtime.as_ref().map_or(Ok(None), mac)?;
        let mut wanted = args.ips.clone();
        for section in [cni_args.as_ref(), runtime.as_ref()].into_iter().flatten() {
            let ips = section
                .strings("ips")?
                .into_iter()
                .map(|(path, ip)| parse_ip(ip).map_err(|problem| Error::config(&path, format!("`{path}`: {problem}"))))
                .collect::<Result<Vec<_>, _>>()?;
            wanted = if ips.is_empty() { wanted } else { ips };
        }
        Ok(Settings {
            masquerade: ip_masq.or(is_masq),
            default_route,
            mtu: parse_mtu(&top)?,
            mac: of_runtime.or(of_args).or(args.mac.clone()).or(of_config),
            routes: top.sections("routes")?.iter().map(parse_route).collect::<Result<_, _>>()?,
            port_mappings: runtime.as_ref().map_or(Ok(Vec::new()), parse_port_mappings)?,
            bandwidth: runtime.as_ref().map_or(Ok(None), parse_bandwidth)?,
            mode: of_pod.or(parse_mode(&top, "attach")?),
            wanted,
            dns: parse_dns(&top)?,
        })
    }

    /// `prevResult`: what the plugins before this one made (ADD), or what the whole chain did (CHECK).
    pub fn previous(&self) -> Result<Option<&Map<String, Value>>, Error> {
        let top = Section::top(&self.config);
        let Some(previous) = top.section("prevResult")? else { return Ok(None) };
        for list in ["interfaces", "ips", "routes"] {
            previous.sections(list)?;
        }
        previous.section("dns")?;
        Ok(self.config.get("prevResult").and_then(Value::as_object))
    }

    /// The attachments that are to stay, of a GC. With the key absent it is not known which those are, so nothing can be taken away.
    pub fn valid_attachments(&self) -> Result<Vec<Valid>, Error> {
        let top = Section::top(&self.config);
        // Runtimes with libcni 1.1 send the second name, beside the first or alone.
        let keys = ["cni.dev/valid-attachments", "cni.dev/attachments"];
        let Some(key) = keys.into_iter().find(|key| self.config.contains_key(*key)) else {
            return Err(top.error(keys[0], "is missing: without the list of attachments that are still valid, every one would be taken away"));
        };
        let named = |section: &Section<'_>, key: &str| {
            let value = section.string(key)?.filter(|value| !value.is_empty());
            value.map(str::to_owned).ok_or_else(|| section.error(key, "is missing"))
        };
        let valid = |section: &Section<'_>| Ok(Valid { sandbox: named(section, "containerID")?, ifname: named(section, "ifname")? });
        top.sections(key)?.iter().map(valid).collect()
    }
}

fn parse_version(version: Option<&str>, command: Command) -> Result<&'static str, Error> {
    // A configuration without a version is of the first one (CNI SPEC.md 0.2.0).
    let asked = version.filter(|version| !version.is_empty()).unwrap_or("0.1.0");
    let shown: String = asked.chars().take(32).collect();
    let position = |wanted: &str| VERSIONS.iter().position(|version| *version == wanted);
    let Some(at) = position(asked) else {
        let problem = format!("`cniVersion` is {shown:?}, and this plugin speaks {}", VERSIONS.join(", "));
        return Err(Error::Version { version: shown, problem });
    };
    if position(command.since()).is_some_and(|since| at < since) {
        let problem = format!("config version does not allow {}: `cniVersion` must be {} or later", command.name(), command.since());
        return Err(Error::Version { version: shown, problem });
    }
    Ok(VERSIONS[at])
}

fn parse_ipam(top: &Section<'_>) -> Result<Ipam, Error> {
    let Some(ipam) = top.section("ipam")? else { return Ok(Ipam::Own { pool: None }) };
    match ipam.string("type")?.unwrap_or_default() {
        "" | "podgate" => Ok(Ipam::Own { pool: ipam.string("pool")?.filter(|pool| !pool.is_empty()).map(str::to_owned) }),
        name if matches!(name, "." | "..") || name.contains(['/', '\\', '\0']) => {
            Err(ipam.error("type", "is a path, but it takes the file name of a plugin on CNI_PATH"))
        }
        name => Ok(Ipam::Delegated(name.into())),
    }
}

/// `mtu`: 68 is the least that IPv4 allows (RFC 791). 0 is how the reference plugins write "by default".
fn parse_mtu(top: &Section<'_>) -> Result<Option<u32>, Error> {
    match top.number("mtu", 0, 65535)? {
        None | Some(0) => Ok(None),
        Some(mtu @ 1..68) => Err(top.error("mtu", format!("is {mtu}, but it takes 0 (by default) or 68 and more"))),
        Some(mtu) => Ok(Some(mtu as u32)),
    }
}

/// `attach`, or an annotation that says the same.
fn parse_mode(section: &Section<'_>, key: &str) -> Result<Option<AttachMode>, Error> {
    let Some(name) = section.string(key)?.filter(|name| !name.is_empty()) else { return Ok(None) };
    AttachMode::of(name).map(Some).ok_or_else(|| section.error(key, format!("is {name:?}, but it takes \"veth\" or \"tun\"")))
}

/// A route of `routes`, or of a delegated plugin's result.
pub fn parse_route(route: &Section<'_>) -> Result<Route, Error> {
    let dst = route.string("dst")?.ok_or_else(|| route.error("dst", "is missing: the route's destination"))?;
    check_cidr(dst).map_err(|problem| route.error("dst", format!("is not a destination: {problem}")))?;
    let number = |key: &str, max: u64| Ok(route.number(key, 0, max)?.map(|number| number as u32));
    Ok(Route {
        dst: dst.into(),
        gw: parse_optional_ip(route, "gw")?,
        mtu: number("mtu", 65535)?,
        advmss: number("advmss", 65535)?,
        priority: number("priority", u32::MAX.into())?,
        table: number("table", u32::MAX.into())?,
        scope: route.number("scope", 0, 255)?.map(|scope| scope as u8),
    })
}

/// An address that may be absent or, as the reference plugins have it, empty.
pub fn parse_optional_ip(section: &Section<'_>, key: &str) -> Result<Option<IpAddr>, Error> {
    let Some(ip) = section.string(key)?.filter(|ip| !ip.is_empty()) else { return Ok(None) };
    ip.parse().map(Some).map_err(|_| section.error(key, format!("is {ip:?}, but it takes an IP address")))
}

fn parse_port_mappings(runtime: &Section<'_>) -> Result<Vec<PortMapping>, Error> {
    let mut mappings = Vec::new();
    for mapping in runtime.sections("portMappings")? {
        let port = |key: &str, min: u64| mapping.number(key, min, 65535);
        let container_port = port("containerPort", 1)?.ok_or_else(|| mapping.error("containerPort", "is missing"))?;
        let protocol = mapping.string("protocol")?.filter(|name| !name.is_empty()).unwrap_or("tcp").to_ascii_lowercase();
        if !matches!(protocol.as_str(), "tcp" | "udp" | "sctp") {
            return Err(mapping.error("protocol", "is neither tcp, udp nor sctp"));
        }
        let host_ip = parse_optional_ip(&mapping, "hostIP")?;
        // Kubernetes names every port of a container; those without a port of the host say 0.
        if let Some(host_port @ 1..) = port("hostPort", 0)? {
            mappings.push(PortMapping { host_port: host_port as u16, container_port: container_port as u16, protocol, host_ip });
        }
    }
    Ok(mappings)
}

fn parse_bandwidth(runtime: &Section<'_>) -> Result<Option<Bandwidth>, Error> {
    let Some(limits) = runtime.section("bandwidth")? else { return Ok(None) };
    let of = |key: &str| Ok(limits.number(key, 0, i64::MAX as u64)?.unwrap_or(0));
    let bandwidth = Bandwidth {
        ingress_rate: of("ingressRate")?,
        ingress_burst: of("ingressBurst")?,
        egress_rate: of("egressRate")?,
        egress_burst: of("egressBurst")?,
    };
    // As the reference plugin: one without the other is a slip.
    for (rate, burst, name) in
        [(bandwidth.ingress_rate, bandwidth.ingress_burst, "ingress"), (bandwidth.egress_rate, bandwidth.egress_burst, "egress")]
    {
        if (rate == 0) != (burst == 0) {
            return Err(limits.invalid(format!("sets one of {name}Rate and {name}Burst without the other")));
        }
    }
    Ok((bandwidth != Bandwidth::default()).then_some(bandwidth))
}

/// `dns` with the keys of the specification; empty ones are left out.
pub fn parse_dns(top: &Section<'_>) -> Result<Map<String, Value>, Error> {
    let mut known = Map::new();
    let Some(dns) = top.section("dns")? else { return Ok(known) };
    for key in ["nameservers", "search", "options"] {
        let list = dns.strings(key)?;
        if !list.is_empty() {
            known.insert(key.into(), list.into_iter().map(|(_, string)| string).collect());
        }
    }
    if let Some(domain) = dns.string("domain")?.filter(|domain| !domain.is_empty()) {
        known.insert("domain".into(), domain.into());
    }
    Ok(known)
}

/// An address that may have a prefix length, which the daemon knows better.
pub fn parse_ip(text: &str) -> Result<IpAddr, String> {
    match text.split_once('/') {
        None => text.parse().map_err(|_| format!("{text:?} is not an IP address")),
        Some((ip, _)) => check_cidr(text).and_then(|()| parse_ip(ip)),
    }
}

/// Checks an address with its prefix length.
pub fn check_cidr(text: &str) -> Result<(), String> {
    let problem = || format!("{text:?} is not an IP address with a prefix length");
    let (ip, prefix) = text.split_once('/').ok_or_else(problem)?;
    let max = if ip.parse::<IpAddr>().map_err(|_| problem())?.is_ipv4() { 32 } else { 128 };
    let digits = !prefix.is_empty() && prefix.bytes().all(|digit| digit.is_ascii_digit());
    if digits && prefix.parse::<u8>().is_ok_and(|prefix| prefix <= max) { Ok(()) } else { Err(problem()) }
}

/// A unicast Ethernet address of six octets, in small letters and with colons.
pub fn parse_mac(text: &str) -> Result<String, String> {
    let octet = |part: &str| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2 && !part.starts_with('+'));
    let octets: Option<Vec<u8>> = text.split([':', '-']).map(octet).collect();
    match octets.as_deref() {
        Some(octets @ [first, ..]) if octets.len() == 6 && first & 1 == 0 && octets.iter().any(|octet| *octet != 0) => {
            Ok(octets.iter().map(|octet| format!("{octet:02x}")).collect::<Vec<_>>().join(":"))
        }
        _ => Err(format!("{text:?} is not a unicast Ethernet address")),
    }
}
