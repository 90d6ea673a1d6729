//! `ipam`: how addresses are given out. That a part of it lies outside this node's ranges is not known here, since they come from the source
//! and may change; that it lies outside every node's is.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::ConfigError;
use super::raw::RawIpam;
use super::validate::{Check, network, overlap};
use crate::ipam::IpamSettings;

/// A day: nobody means more.
const COOLDOWN_S_MAX: u64 = 86_400;

pub(super) fn settings(check: &Check<'_>, given: Option<RawIpam>, pod_cidrs: &[IpNetwork]) -> Result<IpamSettings, ConfigError> {
    let Some(given) = given else { return Ok(IpamSettings::default()) };
    let mut settings = IpamSettings { exclude: given.exclude, ..IpamSettings::default() };
    for cidr in &settings.exclude {
        inside(check, "ipam.exclude", cidr, pod_cidrs)?;
    }
    for (name, cidrs) in given.pools {
        pool(check, &name, &cidrs, &settings, pod_cidrs)?;
        settings.pools.insert(name, cidrs);
    }
    let mut kept: BTreeMap<IpAddr, String> = BTreeMap::new();
    for (pod, addresses) in given.reserve {
        let key = format!("ipam.reserve.{pod}");
        let (namespace, name) = pod.split_once('/').map_or((None, pod.as_str()), |(namespace, name)| (Some(namespace), name));
        let fits = |text: &str| !text.is_empty() && text != "-" && !text.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control());
        if !fits(name) || !namespace.is_none_or(fits) {
            return check.fail(key, format!("`{pod}` is no pod's name"), "write namespace/name, as in default/web-0");
        }
        if addresses.0.is_empty() {
            return check.fail(key, "is an empty list", "name an address, or leave the pod out");
        }
        for address in &addresses.0 {
            if let Some(cidr) = settings.exclude.iter().find(|cidr| cidr.contains(*address)) {
                let problem = format!("{address} is in the excluded {cidr}, and no excluded address is given to anybody");
                return check.fail(format!("{key} and ipam.exclude"), problem, "keep them apart: a reserved address is kept from others by itself");
            }
            inside(check, &key, &IpNetwork::from(*address), pod_cidrs)?;
            if let Some(other) = kept.insert(*address, pod.clone()) {
                let problem = format!("{address} is reserved twice");
                return check.fail(format!("{key} and ipam.reserve.{other}"), problem, "keep it for one pod");
            }
        }
        settings.reserve.insert(pod, addresses.0);
    }
    if let Some(cooldown) = given.cooldown {
        if cooldown.0 > COOLDOWN_S_MAX {
            return check.fail("ipam.cooldown", "is longer than a day", "write up to 24h; 60s is the default");
        }
        settings.cooldown_s = cooldown.0;
    }
    Ok(settings)
}

fn pool(check: &Check<'_>, name: &str, cidrs: &[IpNetwork], before: &IpamSettings, pod_cidrs: &[IpNetwork]) -> Result<(), ConfigError> {
    let key = format!("ipam.pools.{name}");
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 63 || !name.chars().all(fits) {
        return check.fail(&key, format!("`{name}` cannot be a pool's name"), "write up to 63 letters, digits, `-`, `_` and `.`");
    }
    if cidrs.is_empty() {
        return check.fail(&key, "is an empty list", "name at least one range, or leave the pool out");
    }
    for (at, cidr) in cidrs.iter().enumerate() {
        inside(check, &key, cidr, pod_cidrs)?;
        if let Some(other) = cidrs[..at].iter().find(|other| overlap(other, cidr)) {
            return check.fail(&key, format!("{other} overlaps {cidr}"), "keep ranges apart");
        }
        for (pool, others) in &before.pools {
            if let Some(other) = others.iter().find(|other| overlap(other, cidr)) {
                let problem = format!("{other} of one overlaps {cidr} of the other");
                return check.fail(format!("ipam.pools.{pool} and {key}"), problem, "an address belongs to one pool: keep them apart");
            }
        }
        if let Some(excluded) = before.exclude.iter().find(|excluded| excluded.prefix() <= cidr.prefix() && overlap(excluded, cidr)) {
            let problem = format!("all of {cidr} is in the excluded {excluded}, and no excluded address is given to anybody");
            return check.fail(format!("{key} and ipam.exclude"), problem, "keep them apart: a pool is kept from others by itself");
        }
    }
    Ok(())
}

/// Refuses a range with host bits, or one that no node can have.
fn inside(check: &Check<'_>, key: impl Display, cidr: &IpNetwork, pod_cidrs: &[IpNetwork]) -> Result<(), ConfigError> {
    if network(cidr).ip() != cidr.ip() {
        return check.fail(key, format!("{cidr} has bits set behind its prefix"), format!("write {}", network(cidr)));
    }
    if !pod_cidrs.iter().any(|pods| overlap(pods, cidr)) {
        let all = pod_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let single = cidr.prefix() == if cidr.is_ipv4() { 32 } else { 128 };
        let what = if single { cidr.ip().to_string() } else { cidr.to_string() };
        return check.fail(format!("{key} and podCIDRs"), format!("{what} lies outside {all}"), "no node of this cluster has it: mend either");
    }
    Ok(())
}
