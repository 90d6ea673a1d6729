//! What was changed on the host, so that it can be put back: `<stateDir>/host-state.json`.
//!
//! Every change of a sysctl is written down *before* it is made, with the value found. [`HostState::undo`] puts a value back only
//! if it is still ours, and says what it could not restore; [`cleanup`] takes every trace off the host. After a reboot nothing of
//! ours is left on the host, so a file of another boot says nothing.

use crate::gateway_ns::{self, GatewayNsError};
use crate::netlink::sysctl::{self, Key, SysctlError};
use crate::netlink::{Netlink, NetlinkError, RuleSpec};
use crate::routing::apply::{Ours, Side, withdraw};
use crate::routing::{Desired, RoutingError};
use podgate_runtime::netns::Netns;
use podgate_runtime::tun::{Removed, Tun, TunError};
use serde::{Deserialize, Serialize};
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

const FILE: &str = "host-state.json";
const RESERVED_PORTS: &str = "net/ipv4/ip_local_reserved_ports";

/// Why the host's state could not be noted down or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostStateError {
    /// The file could not be read or written.
    #[error("cannot {operation} {path}: {source}; it keeps what was changed on this host, so nothing is changed without it", path = path.display())]
    File {
        /// "read", "write".
        operation: &'static str,
        /// Which file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file is not what was written.
    #[error("{path} is damaged: {source}; restore it, or delete it to forget what was changed on this host", path = path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where.
        source: serde_json::Error,
    },
    /// A sysctl could not be read or set.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
}

/// What was changed on the host.
#[derive(Debug)]
pub struct HostState {
    path: PathBuf,
    data: Data,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Data {
    schema_version: u32,
    boot_id: String,
    /// In the order in which they were changed.
    sysctls: Vec<SysctlChange>,
    /// Ports that we added to the reserved ones.
    reserved_ports: Vec<(u16, u16)>,
    /// Rules in exactly our form that were there before us.
    found_rules: Option<Vec<RuleSpec>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SysctlChange {
    key: Key,
    before: String,
    ours: String,
}

impl HostState {
    /// Reads what an earlier run in this boot noted down, or starts anew.
    pub fn load(state_dir: &Path) -> Result<HostState, HostStateError> {
        let path = state_dir.join(FILE);
        let fresh = Data { schema_version: 1, boot_id: boot_id(), ..Data::default() };
        let data = match read_if_any(&path).map_err(|source| HostStateError::File { operation: "read", path: path.clone(), source })? {
            None => fresh,
            Some(bytes) => {
                let data: Data = serde_json::from_slice(&bytes).map_err(|source| HostStateError::Damaged { path: path.clone(), source })?;
                if data.boot_id == fresh.boot_id { data } else { fresh }
            }
        };
        Ok(HostState { path, data })
    }

    /// Sets a sysctl and remembers what it was.
    pub fn set(&mut self, netns: &Netns, key: &Key, value: &str) -> Result<(), HostStateError> {
        self.set_with(netns, key, value, [])
    }

    /// Sets a sysctl that changes others as well, all of which are remembered.
    pub fn set_with(&mut self, netns: &Netns, key: &Key, value: &str, also: impl IntoIterator<Item = Key>) -> Result<(), HostStateError> {
        let before = sysctl::read(netns, key)?;
        if before == value {
            return Ok(());
        }
        let mut noted = vec![(key.clone(), before)];
        for also in also {
            match sysctl::read(netns, &also) {
                Ok(before) if before != value => noted.push((also, before)),
                Err(error) if !error.is_missing() => return Err(error.into()),
                _ => {}
            }
        }
        for (key, before) in noted {
            if !self.data.sysctls.iter().any(|change| change.key == key) {
                self.data.sysctls.push(SysctlChange { key, before, ours: value.to_owned() });
            }
        }
        self.save()?;
        Ok(sysctl::write(netns, key, value)?)
    }

    /// Adds ports to those that the kernel does not give out by itself, and remembers which were not there before.
    pub fn reserve_ports(&mut self, netns: &Netns, ports: &[RangeInclusive<u16>]) -> Result<(), HostStateError> {
        let key = Key::new(RESERVED_PORTS);
        let mut reserved = PortSet::parse(&sysctl::read(netns, &key)?);
        let added: Vec<u16> = ports.iter().cloned().flatten().filter(|port| !reserved.contains(*port)).collect();
        if added.is_empty() {
            return Ok(());
        }
        let mut ours = PortSet::of(&self.data.reserved_ports);
        for port in added {
            ours.insert(port);
            reserved.insert(port);
        }
        self.data.reserved_ports = ours.ranges();
        self.save()?;
        Ok(sysctl::write(netns, &key, &reserved.to_string())?)
    }

    /// Which of the wanted rules others made before us, decided once per installation: they stay when we go.
    pub fn spare_found_rules(&mut self, netlink: &Netlink, desired: &Desired) -> Result<Vec<RuleSpec>, HostStateError> {
        if self.data.found_rules.is_none() {
            let rules = crate::netlink::Family::BOTH.iter().filter_map(|family| netlink.rules(*family).ok()).flatten();
            let found = rules.filter(|rule| rule.spec.pref != 0 && desired.rules.iter().any(|wanted| rule.is(wanted)));
            self.data.found_rules = Some(found.map(|rule| rule.spec).collect());
            self.save()?;
        }
        Ok(self.spared())
    }

    /// Rules in our form that are others'.
    pub fn spared(&self) -> Vec<RuleSpec> {
        self.data.found_rules.clone().unwrap_or_default()
    }

    /// Puts everything back that is still as we left it, and forgets it. Gives what could not be restored.
    pub fn undo(&mut self, netns: &Netns) -> Vec<String> {
        let mut kept = Vec::new();
        // All are looked at before the first is written: a switch for all interfaces changes each of them.
        let found: Vec<(SysctlChange, Result<String, SysctlError>)> =
            self.data.sysctls.drain(..).map(|change| (change.clone(), sysctl::read(netns, &change.key))).collect();
        for (change, now) in found {
            match now {
                Ok(now) if now == change.ours => {
                    if let Err(error) = sysctl::write(netns, &change.key, &change.before) {
                        kept.push(error.to_string());
                    }
                }
                Ok(now) if now == change.before => {}
                Ok(now) => kept.push(format!(
                    "sysctl {} is \"{now}\": we had set it to \"{}\" and found \"{}\", somebody has changed it since",
                    change.key, change.ours, change.before
                )),
                Err(error) if error.is_missing() => {} // its interface is gone
                Err(error) => kept.push(error.to_string()),
            }
        }
        if !self.data.reserved_ports.is_empty() {
            kept.extend(self.release_ports(netns).err().map(|error| error.to_string()));
        }
        self.data.found_rules = None;
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => kept.push(format!("{}: {error}", self.path.display())),
            _ => {}
        }
        kept
    }

    fn release_ports(&mut self, netns: &Netns) -> Result<(), SysctlError> {
        let key = Key::new(RESERVED_PORTS);
        let mut reserved = PortSet::parse(&sysctl::read(netns, &key)?);
        for (first, last) in self.data.reserved_ports.drain(..) {
            (first..=last).for_each(|port| reserved.remove(port));
        }
        // An empty list is written as a line break: the kernel ignores a write of nothing.
        let text = reserved.to_string();
        sysctl::write(netns, &key, if text.is_empty() { "\n" } else { &text })
    }

    fn save(&self) -> Result<(), HostStateError> {
        let error = |source| HostStateError::File { operation: "write", path: self.path.clone(), source };
        let bytes = serde_json::to_vec_pretty(&self.data).expect("plain data is always JSON");
        write_atomically(&self.path, &bytes).map_err(error)
    }
}

/// Writes a file so that whoever reads it finds the old bytes or the new ones, never a part, even if this process is killed. It
/// is not synced to the disk: what is written with it is of one boot, so that a power failure makes it worthless anyway.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, bytes)?;
    std::fs::rename(&fresh, path)
}

/// Reads such a file. An empty one is what a power failure may leave of it, so it counts as none.
pub(crate) fn read_if_any(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes).filter(|bytes| !bytes.is_empty())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What tells this boot from others (`Documentation/admin-guide/sysctl/kernel.rst`).
pub(crate) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// A set of ports in the form of `ip_local_reserved_ports`: `1,2-4,10-10`.
struct PortSet(Vec<bool>);

impl PortSet {
    fn empty() -> PortSet {
        PortSet(vec![false; 1 << 16])
    }

    fn of(ranges: &[(u16, u16)]) -> PortSet {
        let mut set = PortSet::empty();
        ranges.iter().for_each(|(first, last)| (*first..=*last).for_each(|port| set.insert(port)));
        set
    }

    fn parse(text: &str) -> PortSet {
        let ranges: Vec<(u16, u16)> = text
            .split(',')
            .filter_map(|part| {
                let (first, last) = part.trim().split_once('-').unwrap_or((part.trim(), part.trim()));
                Some((first.parse().ok()?, last.parse().ok()?))
            })
            .collect();
        PortSet::of(&ranges)
    }

    fn contains(&self, port: u16) -> bool {
        self.0[usize::from(port)]
    }

    fn insert(&mut self, port: u16) {
        self.0[usize::from(port)] = true;
    }

    fn remove(&mut self, port: u16) {
        self.0[usize::from(port)] = false;
    }

    fn ranges(&self) -> Vec<(u16, u16)> {
        let mut ranges: Vec<(u16, u16)> = Vec::new();
        for port in (0..=u16::MAX).filter(|port| self.contains(*port)) {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == port => *last = port,
                _ => ranges.push((port, port)),
            }
        }
        ranges
    }
}

impl std::fmt::Display for PortSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (position, (first, last)) in self.ranges().into_iter().enumerate() {
            let comma = if position == 0 { "" } else { "," };
            if first == last { write!(f, "{comma}{first}")? } else { write!(f, "{comma}{first}-{last}")? }
        }
        Ok(())
    }
}

/// Where a gateway's traces are.
#[derive(Clone, Debug)]
pub struct Traces<'a> {
    /// `<runtimeDir>`.
    pub runtime_dir: &'a Path,
    /// Names of files in it that others than this module made: the socket, the lock, the flow table.
    pub runtime_files: &'a [&'a str],
    /// `<stateDir>`.
    pub state_dir: &'a Path,
    /// The TUN on the node.
    pub host_device: &'a str,
}

/// What [`cleanup`] did.
#[derive(Debug, Default)]
pub struct Cleaned {
    /// What was taken away, a line each.
    pub removed: Vec<String>,
    /// What could not be restored, a line each, with the reason.
    pub kept: Vec<String>,
}

/// Why cleaning up could not even begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CleanupError {
    /// The kernel cannot be asked.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// What was changed is not known.
    #[error(transparent)]
    State(#[from] HostStateError),
}

/// Takes every trace off the host: rules, routes, the TUN, the gateway's namespace with all pods' interfaces, sysctls, and the
/// files in the runtime directory and those of ours in the state directory but for the journal of addresses. Safe to repeat. The
/// daemon must be stopped, which the caller makes sure of by holding its lock.
pub fn cleanup(node: &Netns, traces: &Traces<'_>) -> Result<Cleaned, CleanupError> {
    let mut cleaned = Cleaned::default();
    let netlink = Netlink::open(node)?;
    let mut state = HostState::load(traces.state_dir)?;
    let ours = Ours { side: Side::Node, device: traces.host_device.to_owned(), spared: state.spared() };
    match withdraw(&netlink, &ours) {
        Ok(changes) => {
            cleaned.removed.extend(changes.removed);
            cleaned.kept.extend(changes.failed.iter().map(RoutingError::to_string));
        }
        Err(error) => cleaned.kept.push(error.to_string()),
    }
    match Tun::remove(traces.host_device, node) {
        Ok(Removed::Removed) => cleaned.removed.push(format!("interface {}", traces.host_device)),
        Ok(Removed::Absent) => {}
        Err(error @ TunError::WrongKind { .. }) => cleaned.kept.push(format!("{error}: not ours, left alone")),
        Err(error) => cleaned.kept.push(error.to_string()),
    }
    cleaned.kept.extend(state.undo(node));
    match gateway_ns::remove(traces.runtime_dir) {
        Ok(Some(removed)) => cleaned.removed.push(removed),
        Ok(None) => {}
        Err(error) => cleaned.kept.push(GatewayNsError::to_string(&error)),
    }
    let files = traces.runtime_files.iter().map(|name| traces.runtime_dir.join(name));
    let own = [
        traces.runtime_dir.join(crate::pods::COUNTER_FILE),
        traces.runtime_dir.join(podgate_cni::NOTES),
        traces.state_dir.join(crate::pods::DIRECTORY),
    ];
    let known = crate::source::KEPT_FILES.map(|name| traces.state_dir.join(name));
    for path in files.chain(own).chain(known) {
        let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        match removed {
            Ok(()) => cleaned.removed.push(path.display().to_string()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => cleaned.kept.push(format!("{}: {error}", path.display())),
        }
    }
    // Whatever else somebody keeps there is not ours to delete, nor is the directory then.
    if std::fs::remove_dir(traces.runtime_dir).is_ok() {
        cleaned.removed.push(traces.runtime_dir.display().to_string());
    }
    Ok(cleaned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("podgate-host-state-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn sysctls_come_back_unless_somebody_changed_them_since() {
        let Ok(netns) = Netns::anonymous().inspect_err(|error| eprintln!("skipped: {error}")) else { return };
        let directory = temporary("sysctls");
        let (mine, theirs) = (Key::v4("lo", "forwarding"), Key::v4("lo", "rp_filter"));
        let before = [sysctl::read(&netns, &mine).unwrap(), sysctl::read(&netns, &theirs).unwrap()];
        let flipped = |value: &str| if value == "1" { "0" } else { "1" };
        let mut state = HostState::load(&directory).unwrap();
        state.set(&netns, &mine, flipped(&before[0])).unwrap();
        state.set(&netns, &theirs, flipped(&before[1])).unwrap();
        sysctl::write(&netns, &theirs, "2").unwrap();
        let mut successor = HostState::load(&directory).unwrap();
        let kept = successor.undo(&netns);
        assert_eq!(sysctl::read(&netns, &mine).unwrap(), before[0]);
        assert_eq!(sysctl::read(&netns, &theirs).unwrap(), "2");
        assert!(kept.len() == 1 && kept[0].contains("net/ipv4/conf/lo/rp_filter"), "{kept:?}");
        assert!(!directory.join(FILE).exists());
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn only_our_reserved_ports_are_released() {
        let Ok(netns) = Netns::anonymous().inspect_err(|error| eprintln!("skipped: {error}")) else { return };
        let directory = temporary("ports");
        let key = Key::new(RESERVED_PORTS);
        sysctl::write(&netns, &key, "80,30000-30010").unwrap();
        let mut state = HostState::load(&directory).unwrap();
        state.reserve_ports(&netns, &[30_000..=32_767, 61_000..=65_534]).unwrap();
        assert_eq!(sysctl::read(&netns, &key).unwrap(), "80,30000-32767,61000-65534");
        state.reserve_ports(&netns, &[30_000..=32_767, 61_000..=65_534]).unwrap();
        assert!(HostState::load(&directory).unwrap().undo(&netns).is_empty());
        assert_eq!(sysctl::read(&netns, &key).unwrap(), "80,30000-30010");
        sysctl::write(&netns, &key, "\n").unwrap();
        let mut state = HostState::load(&directory).unwrap();
        state.reserve_ports(&netns, &[61_000..=65_534]).unwrap();
        assert!(state.undo(&netns).is_empty());
        assert_eq!(sysctl::read(&netns, &key).unwrap(), "");
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_damaged_file_is_refused_and_one_of_another_boot_is_forgotten() {
        let directory = temporary("files");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(FILE), "{\"bootId\":").unwrap();
        assert!(matches!(HostState::load(&directory), Err(HostStateError::Damaged { .. })));
        let other = Data {
            boot_id: "another".into(),
            sysctls: vec![SysctlChange { key: Key::new("a"), before: "0".into(), ours: "1".into() }],
            ..Data::default()
        };
        std::fs::write(directory.join(FILE), serde_json::to_vec(&other).unwrap()).unwrap();
        assert!(HostState::load(&directory).unwrap().data.sysctls.is_empty());
        std::fs::remove_dir_all(directory).unwrap();
    }
}
