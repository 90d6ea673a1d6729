//! Attaching a pod's network namespace, and detaching it.
//!
//! A veth pair, one end in the pod, the other (`VETH`) in the gateway's namespace. Neither end learns neighbours: both have
//! permanent entries, so no packet of a pod's makes one in the table that all namespaces of the machine share. The pod has its
//! address as /32 or /128 and everything else behind 169.254.1.1 and fe80::1, which exist as neighbours only.
//!
//! A veth without rules reaches nothing (the namespace is closed at pref 30), so rules are added last but one, before the link
//! goes up, and removed first. Rules of a deleted veth would attach themselves to the next interface of that name, so a name is
//! never used twice within a boot.
//!
//! Every attachment is written to `<stateDir>/pods.json` before the kernel is touched: a successor of a killed daemon finds its
//! pods there, and undoes what was half done.

use crate::gateway_ns::GatewayNs;
use crate::host_state::{boot_id, read_if_any, write_atomically};
use crate::netlink::sysctl::{self, Key, SysctlError};
use crate::netlink::{
    AddrGenMode, AddressSpec, Family, LinkKind, LinkSettings, Mac, MissingIsFine, NeighbourSpec, Netlink, NetlinkError, NewLink, ORIGIN_BOOT,
    RouteSpec, TABLE_MAIN,
};
use crate::routing::devices::POD_GATEWAY_V4;
use crate::routing::{PREF_POD, PodRoute, whole};
use ipnetwork::IpNetwork;
use nix::fcntl::{Flock, FlockArg};
use podgate_runtime::netns::Netns;
use serde::{Deserialize, Serialize};
use std::fs::OpenOptions;
use std::io::{self, Read, Seek, Write};
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};

/// The record's name in the state directory.
pub const FILE: &str = "pods.json";
/// The name, in the runtime directory, of the file that holds the number of the last veth of this boot.
pub const COUNTER_FILE: &str = "veth-counter";
/// What the host ends of veths are called, with a number behind it.
const VETH_PREFIX: &str = "pg";
/// The pods' IPv6 next hop.
pub const POD_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Why a pod could not be attached or detached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PodError {
    /// The pod has such an interface already.
    #[error("the pod has an interface {ifname} already: detach it first, or choose another name")]
    InterfaceExists {
        /// The interface.
        ifname: String,
    },
    /// The attachment exists already.
    #[error("{id} is attached already, by {veth}")]
    AttachedAlready {
        /// Which attachment.
        id: String,
        /// Its interface.
        veth: String,
    },
    /// An address belongs to another pod.
    #[error("address {address} belongs to {owner}, which is attached by {veth}")]
    AddressTaken {
        /// The address.
        address: IpAddr,
        /// The other attachment.
        owner: String,
        /// Its interface.
        veth: String,
    },
    /// No address was given.
    #[error("{id}: a pod needs at least one address")]
    NoAddress {
        /// Which attachment.
        id: String,
    },
    /// The kernel refused.
    #[error("{id}: {source}")]
    Netlink {
        /// Which attachment.
        id: String,
        /// What and why.
        source: NetlinkError,
    },
    /// A sysctl could not be set.
    #[error("{id}: {source}")]
    Sysctl {
        /// Which attachment.
        id: String,
        /// What and why.
        source: SysctlError,
    },
    /// A file of ours could not be read or written.
    #[error("cannot {operation} {path}: {source}", path = path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// What a pod shall have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachSpec {
    /// What names this attachment for ever after, for instance container id and interface.
    pub id: String,
    /// The pod's `namespace/name`, for people.
    pub name: String,
    /// The interface's name in the pod.
    pub ifname: String,
    /// Its addresses, at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// Its Ethernet address; the kernel's choice where none is given.
    pub mac: Option<Mac>,
    /// Its MTU.
    pub mtu: u32,
    /// The largest frame handed over for segmentation: about 62,000 fits one send of the overlay (design D2).
    pub gso_max_size: u32,
    /// What the pod reaches through it; empty for everything.
    pub routes: Vec<IpNetwork>,
}

/// A pod that is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attached {
    /// See [`AttachSpec::id`].
    pub id: String,
    /// The pod's `namespace/name`.
    pub name: String,
    /// The interface's name in the pod.
    pub ifname: String,
    /// The other end's name, in the gateway's namespace.
    pub veth: String,
    /// Its index there.
    pub veth_index: u32,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// The pod's Ethernet address.
    #[serde(with = "text")]
    pub pod_mac: Mac,
    /// The Ethernet address of the veth, which the pod sends everything to.
    #[serde(with = "text")]
    pub gateway_mac: Mac,
    /// The MTU.
    pub mtu: u32,
    /// Device and inode of the pod's namespace.
    pub netns: (u64, u64),
}

impl Attached {
    /// The pod as routing sees it.
    pub fn route(&self) -> PodRoute {
        PodRoute { veth: self.veth.clone(), addresses: self.addresses.clone() }
    }
}

/// What [`Pods::detach`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detached {
    /// The pod, now gone.
    Gone(Attached),
    /// Nothing: it was detached before, or never attached.
    Absent,
}

/// Whether an attachment is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Stage {
    Attaching,
    Whole,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    stage: Stage,
    #[serde(flatten)]
    pod: Attached,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    schema_version: u32,
    boot_id: String,
    pods: Vec<Entry>,
}

/// The pods of this node.
#[derive(Debug)]
pub struct Pods {
    gateway: GatewayNs,
    netlink: Netlink,
    path: PathBuf,
    counter: PathBuf,
    entries: Vec<Entry>,
}

impl Pods {
    /// Finds the pods that an earlier run attached in this boot. What was half done is undone, and so is what hangs in the
    /// gateway's namespace without being recorded. Pods whose namespace is gone stay in [`Pods::lost`] until they are detached.
    pub fn open(gateway: GatewayNs, runtime_dir: &Path, state_dir: &Path) -> Result<Pods, PodError> {
        let path = state_dir.join(FILE);
        let file = |operation, source| PodError::File { operation, path: path.clone(), source };
        let entries = match read_if_any(&path).map_err(|source| file("read", source))? {
            None => Vec::new(),
            Some(bytes) => {
                let record: Record = serde_json::from_slice(&bytes).map_err(|error| file("understand", error.into()))?;
                if record.boot_id == boot_id() { record.pods } else { Vec::new() }
            }
        };
        let netlink = Netlink::open(gateway.netns()).map_err(of("the gateway's namespace"))?;
        let mut pods = Pods { gateway, netlink, path, counter: runtime_dir.join(COUNTER_FILE), entries };
        let unfinished: Vec<String> = pods.entries.iter().filter(|entry| entry.stage == Stage::Attaching).map(|entry| entry.pod.id.clone()).collect();
        for id in unfinished {
            pods.detach(&id)?;
        }
        pods.sweep().map_err(of("the gateway's namespace"))?;
        Ok(pods)
    }

    /// The namespace that the pods hang in.
    pub fn gateway(&self) -> &GatewayNs {
        &self.gateway
    }

    /// Every pod on record.
    pub fn list(&self) -> impl Iterator<Item = &Attached> {
        self.entries.iter().map(|entry| &entry.pod)
    }

    /// The pod of that attachment.
    pub fn find(&self, id: &str) -> Option<&Attached> {
        self.list().find(|pod| pod.id == id)
    }

    /// The attachments of that namespace.
    pub fn of_netns<'a>(&'a self, netns: &Netns) -> impl Iterator<Item = &'a Attached> {
        let id = (netns.id().dev, netns.id().ino);
        self.list().filter(move |pod| pod.netns == id)
    }

    /// Pods on record whose interface is gone, with their namespace or by somebody's hand.
    pub fn lost(&self) -> Result<Vec<&Attached>, PodError> {
        let links = self.netlink.links().map_err(of("the gateway's namespace"))?;
        Ok(self.list().filter(|pod| !links.iter().any(|link| link.name == pod.veth)).collect())
    }

    /// Attaches `pod_ns`. On any failure everything done is undone.
    pub fn attach(&mut self, pod_ns: &Netns, spec: &AttachSpec) -> Result<Attached, PodError> {
        self.refuse(spec)?;
        let error = of(&spec.id);
        let pod_netlink = Netlink::open(pod_ns).map_err(&error)?;
        if pod_netlink.link(&spec.ifname).map_err(&error)?.is_some() {
            return Err(PodError::InterfaceExists { ifname: spec.ifname.clone() });
        }
        let pod = Attached {
            id: spec.id.clone(),
            name: spec.name.clone(),
            ifname: spec.ifname.clone(),
            veth: self.next_name()?,
            veth_index: 0,
            addresses: spec.addresses.clone(),
            pod_mac: Mac([0; 6]),
            gateway_mac: Mac([0; 6]),
            mtu: spec.mtu,
            netns: (pod_ns.id().dev, pod_ns.id().ino),
        };
        self.entries.push(Entry { stage: Stage::Attaching, pod: pod.clone() });
        let attached = self.save().and_then(|()| self.build(pod_ns, &pod_netlink, spec, pod));
        match attached {
            Ok(pod) => {
                let entry = Entry { stage: Stage::Whole, pod: pod.clone() };
                self.entries.retain(|entry| entry.pod.id != pod.id);
                self.entries.push(entry);
                if let Err(error) = self.save() {
                    let _ = self.detach(&spec.id);
                    return Err(error);
                }
                Ok(pod)
            }
            Err(error) => {
                // What the undoing says is of less use than why it came to it; the record keeps what remained.
                let _ = self.detach(&spec.id);
                Err(error)
            }
        }
    }

    /// Detaches a pod: its rules first, then its veth, which takes routes and neighbours with it. Succeeds twice, and with the
    /// pod's namespace gone.
    pub fn detach(&mut self, id: &str) -> Result<Detached, PodError> {
        let Some(pod) = self.find(id).cloned() else { return Ok(Detached::Absent) };
        let error = of(id);
        for rule in pod.route().rules() {
            self.netlink.delete_rule(&rule).or_missing().map_err(&error)?;
        }
        self.netlink.delete_link(&pod.veth).or_missing().map_err(&error)?;
        self.entries.retain(|entry| entry.pod.id != id);
        self.save()?;
        Ok(Detached::Gone(pod))
    }

    fn refuse(&self, spec: &AttachSpec) -> Result<(), PodError> {
        if spec.addresses.is_empty() {
            return Err(PodError::NoAddress { id: spec.id.clone() });
        }
        if let Some(pod) = self.find(&spec.id) {
            return Err(PodError::AttachedAlready { id: spec.id.clone(), veth: pod.veth.clone() });
        }
        for pod in self.list() {
            if let Some(address) = pod.addresses.iter().find(|address| spec.addresses.contains(address)) {
                return Err(PodError::AddressTaken { address: *address, owner: pod.id.clone(), veth: pod.veth.clone() });
            }
        }
        Ok(())
    }

    fn build(&self, pod_ns: &Netns, pod_netlink: &Netlink, spec: &AttachSpec, mut pod: Attached) -> Result<Attached, PodError> {
        let error = of(&spec.id);
        let sysctl_error = |source| PodError::Sysctl { id: spec.id.clone(), source };
        let settings = LinkSettings::new().mtu(spec.mtu).gso_max_size(spec.gso_max_size).addr_gen_mode(AddrGenMode::None);
        let peer_settings = LinkSettings { mac: spec.mac, ..settings.clone() };
        let kind = LinkKind::veth_into(&spec.ifname, pod_ns, peer_settings);
        self.netlink.create_link(&NewLink { name: &pod.veth, kind, settings }).map_err(|source| match source.is_present_already() {
            // Our own name is new, so it is the pod's.
            true => PodError::InterfaceExists { ifname: spec.ifname.clone() },
            false => error(source),
        })?;
        let link = self.netlink.expect_link(&pod.veth).map_err(&error)?;
        pod.veth_index = link.index;
        pod.gateway_mac = link.mac.unwrap_or(pod.gateway_mac);
        pod.pod_mac = pod_netlink.expect_link(&spec.ifname).map_err(&error)?.mac.unwrap_or(pod.pod_mac);

        // As a host (forwarding off) the interface answers no router solicitation and takes no neighbour from one.
        let ours = [(Key::v6(&pod.veth, "forwarding"), "0"), (Key::v6(&pod.veth, "accept_ra"), "0")];
        optional(sysctl::write_all(self.gateway.netns(), &ours)).map_err(sysctl_error)?;
        let theirs = [(Key::v6(&spec.ifname, "disable_ipv6"), "0"), (Key::v6(&spec.ifname, "accept_ra"), "0")];
        optional(sysctl::write_all(pod_ns, &theirs)).map_err(sysctl_error)?;

        let route = pod.route();
        for rule in route.rules() {
            self.netlink.add_rule(&rule).map_err(&error)?;
        }
        let up = LinkSettings::new().up();
        self.netlink.set_link(&pod.veth, &up).map_err(&error)?;
        for address in &spec.addresses {
            let neighbour = NeighbourSpec { device: pod.veth.clone(), address: *address, mac: pod.pod_mac };
            self.netlink.set_neighbour(&neighbour).map_err(&error)?;
        }
        for route in route.routes() {
            self.netlink.add_route(&route).map_err(&error)?;
        }
        furnish(pod_netlink, spec, pod.gateway_mac).map_err(&error)?;
        Ok(pod)
    }

    /// Removes veths and pods' rules that belong to no pod on record.
    fn sweep(&self) -> Result<(), NetlinkError> {
        let ours = |name: &str| self.list().any(|pod| pod.veth == name);
        let links = self.netlink.links()?;
        for family in Family::BOTH {
            let rules = match self.netlink.rules(family) {
                Err(error) if matches!(error.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => continue,
                other => other?,
            };
            let of_pods = rules.into_iter().filter(|rule| rule.spec.pref == PREF_POD);
            let stray = |veth: &str| !ours(veth) || !links.iter().any(|link| link.name == veth);
            for rule in of_pods.filter(|rule| rule.spec.iif.as_deref().is_none_or(stray)) {
                self.netlink.delete_rule(&rule.spec).or_missing()?;
            }
        }
        for link in links.iter().filter(|link| link.kind == "veth" && !ours(&link.name)) {
            self.netlink.delete_link(&link.name).or_missing()?;
        }
        Ok(())
    }

    /// A name that no veth had in this boot: the runtime directory does not outlive a boot, and if it does, numbers go on.
    fn next_name(&self) -> Result<String, PodError> {
        let file = |operation| {
            let path = self.counter.clone();
            move |source| PodError::File { operation, path, source }
        };
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&self.counter).map_err(file("open"))?;
        let mut locked = Flock::lock(open, FlockArg::LockExclusive).map_err(|(_, errno)| file("lock")(errno.into()))?;
        let mut text = String::new();
        locked.read_to_string(&mut text).map_err(file("read"))?;
        // A file that was cut short must not start again at 1 while there are veths.
        let of_kernel = self.netlink.links().map_err(of("the gateway's namespace"))?;
        let highest = of_kernel.iter().filter_map(|link| link.name.strip_prefix(VETH_PREFIX)?.parse::<u64>().ok()).max().unwrap_or(0);
        let number = text.trim().parse::<u64>().unwrap_or(0).max(highest) + 1;
        locked.rewind().and_then(|()| locked.write_all(format!("{number:020}\n").as_bytes())).map_err(file("write"))?;
        Ok(format!("{VETH_PREFIX}{number}"))
    }

    fn save(&self) -> Result<(), PodError> {
        let record = Record { schema_version: 1, boot_id: boot_id(), pods: self.entries.clone() };
        let bytes = serde_json::to_vec(&record).expect("plain data is always JSON");
        write_atomically(&self.path, &bytes).map_err(|source| PodError::File { operation: "write", path: self.path.clone(), source })
    }
}

/// The pod's own side: loopback, addresses, neighbours, routes.
fn furnish(netlink: &Netlink, spec: &AttachSpec, gateway_mac: Mac) -> Result<(), NetlinkError> {
    netlink.set_link("lo", &LinkSettings::new().up())?;
    netlink.set_link(&spec.ifname, &LinkSettings::new().up())?;
    for address in &spec.addresses {
        netlink.add_address(&AddressSpec::new(&spec.ifname, whole(*address)))?;
        let family = Family::of(*address);
        let gateway = gateway_of(family);
        netlink.set_neighbour(&NeighbourSpec { device: spec.ifname.clone(), address: gateway, mac: gateway_mac })?;
        let everything = [IpNetwork::new(family.unspecified(), 0).expect("0 is a prefix length of both families")];
        let targets = if spec.routes.is_empty() { &everything[..] } else { &spec.routes };
        for target in targets.iter().filter(|target| Family::of(target.ip()) == family) {
            let route = RouteSpec::unicast(TABLE_MAIN, *target, &spec.ifname).via(gateway).onlink().origin(ORIGIN_BOOT);
            netlink.add_route(&route)?;
        }
    }
    Ok(())
}

/// The next hop of every pod.
pub fn gateway_of(family: Family) -> IpAddr {
    match family {
        Family::V4 => POD_GATEWAY_V4.into(),
        Family::V6 => POD_GATEWAY_V6.into(),
    }
}

fn of(id: &str) -> impl Fn(NetlinkError) -> PodError {
    let id = id.to_owned();
    move |source| PodError::Netlink { id: id.clone(), source }
}

/// A kernel without IPv6 has none of its sysctls.
fn optional(done: Result<(), SysctlError>) -> Result<(), SysctlError> {
    match done {
        Err(error) if error.is_missing() => Ok(()),
        other => other,
    }
}

/// Ethernet addresses as people write them.
mod text {
    use super::Mac;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(mac: &Mac, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(mac)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Mac, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests;
