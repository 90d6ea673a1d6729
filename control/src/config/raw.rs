//! The file's shape, key by key, before anything is compared with anything else.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use ipnetwork::IpNetwork;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use super::ConfigError;
use super::publish::RawPublish;

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Raw {
    pub node: Option<String>,
    pub underlay: Option<RawUnderlay>,
    pub overlay: Option<RawOverlay>,
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Option<Vec<IpNetwork>>,
    #[serde(rename = "serviceCIDRs")]
    pub service_cidrs: Option<Vec<IpNetwork>>,
    pub node_ports: Option<PortRange>,
    pub node_port_addresses: Option<RawNodePortAddresses>,
    pub masquerade: Option<RawMasquerade>,
    #[serde(rename = "externalIPs")]
    pub external_ips: Option<RawExternalIps>,
    pub health: Option<RawListen>,
    pub metrics: Option<RawListen>,
    pub source: Option<RawSource>,
    pub runtime_dir: Option<PathBuf>,
    pub state_dir: Option<PathBuf>,
    pub attach: Option<RawAttach>,
    pub workers: Option<RawWorkers>,
    pub outside_to_pods: Option<RawOutsideToPods>,
    pub devices: Option<RawDevices>,
    pub flows: Option<RawFlows>,
    pub dhcp: Option<RawDhcp>,
    pub ipam: Option<RawIpam>,
    pub publish: Option<Vec<RawPublish>>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawUnderlay {
    pub address: Option<OneOrMore<IpAddr>>,
    pub interface: Option<String>,
}

#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct RawOverlay {
    pub port: Option<u16>,
    pub vni: Option<u32>,
    pub direct_return_vni: Option<u32>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawPorts {
    pub ports: Option<Vec<PortRange>>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawExternalIps {
    #[serde(default)]
    pub allow: Vec<IpNetwork>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawListen {
    pub address: SocketAddr,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSource {
    pub directory: Option<PathBuf>,
    pub kubernetes: Option<RawKubernetes>,
    pub etcd: Option<RawEtcd>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawKubernetes {
    pub server: Option<String>,
    pub kubeconfig: Option<PathBuf>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawEtcd {
    pub endpoints: Vec<String>,
    pub prefix: Option<String>,
    pub ca: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub user: Option<String>,
    pub lease: Option<Seconds>,
    pub grace: Option<Seconds>,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawAttach {
    Veth,
    Tun,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawOutsideToPods {
    Allow,
    Drop,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct RawWorkers {
    pub count: Option<u16>,
    #[serde(default)]
    pub cpus: Vec<u16>,
    pub spin_microseconds: Option<u32>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawDevices {
    pub pods: Option<String>,
    pub host: Option<String>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawFlows {
    pub capacity: Option<u32>,
    pub timeouts: Option<RawTimeouts>,
}

#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct RawTimeouts {
    pub tcp_opening: Option<Seconds>,
    pub tcp_established: Option<Seconds>,
    pub tcp_closing: Option<Seconds>,
    pub tcp_reset: Option<Seconds>,
    pub udp_unreplied: Option<Seconds>,
    pub udp_replied: Option<Seconds>,
    pub icmp: Option<Seconds>,
    pub other: Option<Seconds>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawDhcp {
    #[serde(default)]
    pub servers: Vec<Ipv4Addr>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawIpam {
    #[serde(default)]
    pub exclude: Vec<IpNetwork>,
    #[serde(default)]
    pub reserve: BTreeMap<String, OneOrMore<IpAddr>>,
    #[serde(default)]
    pub pools: BTreeMap<String, Vec<IpNetwork>>,
    pub cooldown: Option<Seconds>,
}

/// `60s`, `5m`, `1h30m`, or `0`: as Kubernetes writes durations (Go `time.ParseDuration`), in whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seconds(pub u64);

impl std::str::FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Seconds, String> {
        let odd = || format!("`{text}` is not a duration; write one as 60s, 5m or 1h30m");
        if text == "0" {
            return Ok(Seconds(0));
        }
        let (mut rest, mut seconds) = (text, None);
        while let Some(end) = rest.find(|c: char| !c.is_ascii_digit()) {
            let number: u64 = rest[..end].parse().map_err(|_| odd())?;
            let unit = match rest[end..].chars().next() {
                Some('s') => 1,
                Some('m') => 60,
                Some('h') => 3600,
                _ => return Err(odd()),
            };
            let part = number.checked_mul(unit).and_then(|part| part.checked_add(seconds.unwrap_or(0)));
            seconds = Some(part.ok_or_else(odd)?);
            rest = &rest[end + 1..];
        }
        seconds.filter(|_| rest.is_empty()).map(Seconds).ok_or_else(odd)
    }
}

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Seconds, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// `30000-32767`, or one port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PortRange(pub RangeInclusive<u16>);

impl std::str::FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<PortRange, String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| text.trim().parse::<u16>().ok().filter(|p| *p != 0);
        match (port(first), port(last)) {
            (Some(first), Some(last)) if first <= last => Ok(PortRange(first..=last)),
            (Some(first), Some(last)) => Err(format!("`{text}` runs backwards; write {last}-{first}")),
            _ => Err(format!("`{text}` is not a range of ports; write one as 30000-32767, each end from 1 to 65535")),
        }
    }
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PortRange, D::Error> {
        // A single port is a number in YAML; read as text it is the same to us.
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// One value, or a list of them.
pub(super) struct OneOrMore<T>(pub Vec<T>);

impl<'de, T: Deserialize<'de> + std::str::FromStr<Err: fmt::Display>> Deserialize<'de> for OneOrMore<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<OneOrMore<T>, D::Error> {
        struct Either<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de> + std::str::FromStr<Err: fmt::Display>> Visitor<'de> for Either<T> {
            type Value = OneOrMore<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address, or a list of one of each family")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                let value = text.parse().map_err(|error| E::custom(format!("`{text}`: {error}")))?;
                Ok(OneOrMore(vec![value]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(OneOrMore)
            }
        }
        deserializer.deserialize_any(Either(PhantomData))
    }
}

/// `primary`, or ranges.
pub(super) enum RawNodePortAddresses {
    Primary,
    Within(Vec<IpNetwork>),
}

impl<'de> Deserialize<'de> for RawNodePortAddresses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawNodePortAddresses, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = RawNodePortAddresses;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`primary`, or a list of ranges")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                match text {
                    "primary" => Ok(RawNodePortAddresses::Primary),
                    _ => Err(E::custom(format!("`{text}` is neither `primary` nor a list of ranges such as [192.0.2.0/24]"))),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(RawNodePortAddresses::Within)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// `false`, or its ports.
pub(super) enum RawMasquerade {
    Off,
    On(RawPorts),
}

impl<'de> Deserialize<'de> for RawMasquerade {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawMasquerade, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = RawMasquerade;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("false, or {ports: [61000-65534]}")
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<Self::Value, E> {
                Ok(if on { RawMasquerade::On(RawPorts { ports: None }) } else { RawMasquerade::Off })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                RawPorts::deserialize(MapAccessDeserializer::new(map)).map(RawMasquerade::On)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// Reads the shape, or says where it breaks.
pub(super) fn parse(file: &Path, text: &str) -> Result<Raw, ConfigError> {
    let options = serde_saphyr::options! { with_snippet: false };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| explain(file, text, &error))
}

fn explain(file: &Path, text: &str, error: &serde_saphyr::Error) -> ConfigError {
    let file = file.display().to_string();
    let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
    let inner = error.without_snippet();
    if let serde_saphyr::Error::SerdeUnknownField { field, expected, .. } = inner {
        return ConfigError::UnknownKey { file, line, column, key: field.clone(), help: suggest(field, expected) };
    }
    // The location stands before the problem already.
    let problem = inner.to_string();
    let problem = match problem.split_once(" at line ") {
        Some((problem, place)) if place.starts_with(|c: char| c.is_ascii_digit()) => problem.to_string(),
        _ => problem,
    };
    let problem = match (plainly(&problem), key_before(text, line, column)) {
        (Some(plain), Some(key)) => format!("{key}: {plain}"),
        (Some(plain), None) => plain,
        (None, _) => problem,
    };
    ConfigError::Malformed { file, line, column, problem }
}

/// What the parser says, where it speaks of Rust's types or its own options, in the words of whoever writes the file.
fn plainly(problem: &str) -> Option<String> {
    Some(match problem {
        "expected mapping start" => "expected keys and values here, as in `key: value`".into(),
        "expected sequence start" => "expected a list here, as in `[first, second]`".into(),
        "expected string scalar" => "expected a single value here".into(),
        "invalid u16" => "not a number from 0 to 65535".into(),
        "invalid u32" => "not a number from 0 to 4294967295".into(),
        "invalid socket address syntax" => "not an address with a port; write one as 127.0.0.1:10256 or [::1]:10256".into(),
        _ => {
            if let Some((odd, known)) = problem.strip_prefix("unknown variant ").and_then(|rest| rest.split_once(", expected one of ")) {
                return Some(format!("{odd} is not known here; write one of {known}"));
            }
            if let Some(address) = problem.strip_prefix("invalid address: ") {
                return Some(format!("`{address}` is not a range of addresses; write one as 10.244.0.0/16"));
            }
            let key = problem.strip_prefix("duplicate mapping key: ")?.split(',').next()?;
            return Some(format!("the key `{key}` is written twice; keep one"));
        }
    })
}

/// The key whose value begins at this place, if it stands on the same line.
fn key_before(text: &str, line: u64, column: u64) -> Option<String> {
    let line: Vec<char> = text.lines().nth(usize::try_from(line).ok()?.checked_sub(1)?)?.chars().collect();
    let before: String = line.iter().take(usize::try_from(column).ok()?.checked_sub(1)?).collect();
    let key = before.trim_end().trim_end_matches(['[', '"', '\'']).trim_end().strip_suffix(':')?;
    let start = key.rfind(|c: char| !c.is_ascii_alphanumeric()).map_or(0, |at| at + 1);
    Some(key[start..].to_owned()).filter(|key| !key.is_empty())
}

/// The known keys near `key`, or all of them.
fn suggest(key: &str, known: &[&'static str]) -> String {
    let quoted = |keys: Vec<&str>| keys.iter().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ");
    // By the letters alone: a wrong capital or underscore is the commonest slip.
    let plain = |text: &str| text.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_lowercase();
    let mut near: Vec<(f64, &str)> = known.iter().map(|k| (strsim::jaro_winkler(&plain(key), &plain(k)), *k)).filter(|(s, _)| *s >= 0.8).collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    match near.is_empty() {
        false => format!("did you mean {}?", quoted(near.into_iter().take(3).map(|(_, k)| k).collect()).replace(", ", " or ")),
        true => format!("the keys here are {}", quoted(known.to_vec())),
    }
}
