//! Attaching a pod's network namespace, and detaching it.
//!
//! A veth pair, one end in the pod, the other (`VETH`) in the gateway's namespace. Neither end learns neighbours: both have
//! permanent entries, so no packet of a pod's makes one in the table that all namespaces of the machine share. The pod has its
//! address as /32 or /128 and everything else behind 169.254.1.1 and fe80::1, which exist as neighbours only.
//!
//! A pod's first interface has its default route. Each further one has a table of its own in the pod, `from ADDRESS lookup TABLE`: what
//! is sent from its address, replies above all, leaves by it, and would be dropped as a false source anywhere else.
//!
//! A veth without rules reaches nothing (the namespace is closed at pref 30), so rules are added last but one, before the link
//! goes up, and removed first. Rules of a deleted veth would attach themselves to the next interface of that name, so a name is
//! never used twice within a boot.
//!
//! Every attachment has a file in `<stateDir>/pods`, written before the kernel is touched: a successor of a killed daemon finds its
//! pods there, and undoes what was half done. The files need not survive the machine, only the process: no pod outlives a boot.
//!
//! In mode tun there is none of this but the record: the pod has a TUN of its own, which `own_tun` makes, opens again and takes away.
//! `kernel` has a veth's pod's side, link by link.

mod error;
mod kernel;
mod own_tun;

use crate::gateway_ns::GatewayNs;
use crate::host_state::{boot_id, read_if_any, write_atomically};
use crate::netlink::{Family, Mac, MissingIsFine, Netlink, NetlinkError};
use crate::routing::{PREF_POD, PodRoute};
pub use error::PodError;
use ipnetwork::IpNetwork;
pub use kernel::{POD_GATEWAY_V6, gateway_of};
pub use own_tun::remove_all as remove_tuns;
use podgate_cni::protocol::{AttachMode, Bandwidth, PortMapping};
use podgate_cni::result::Route;
use podgate_core::verdict::TunId;
use podgate_runtime::netns::Netns;
use podgate_runtime::pod_tun::PodTun;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// The records' directory in the state directory.
pub const DIRECTORY: &str = "pods";
/// The name, in the runtime directory, of the file that holds the number of the last veth of this boot.
pub const COUNTER_FILE: &str = "veth-counter";
/// What the host ends of veths are called, with a number behind it.
const VETH_PREFIX: &str = "pg";

/// What a pod shall have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachSpec {
    /// What names this attachment for ever after, for instance container id and interface.
    pub id: String,
    /// The pod's `namespace/name`, for people.
    pub name: String,
    /// The CNI network; none for an attachment by hand.
    pub network: Option<String>,
    /// See [`podgate_cni::protocol::AttachRequest::attempt`].
    pub attempt: u64,
    /// How it is attached.
    pub mode: AttachMode,
    /// The path of the pod's namespace: for people, and in mode tun for a successor.
    pub netns_path: String,
    /// The interface's name in the pod.
    pub ifname: String,
    /// Its addresses, at most one of each family. Without any the interface is made and waits for [`Pods::assign`].
    pub addresses: Vec<IpAddr>,
    /// Its Ethernet address; the kernel's choice where none is given. A TUN has none.
    pub mac: Option<Mac>,
    /// Its MTU.
    pub mtu: u32,
    /// The largest frame handed over for segmentation: about 62,000 fits one send of the overlay (design D2).
    pub gso_max_size: u32,
    /// Whether it has the pod's default route.
    pub default_route: DefaultRoute,
    /// What else the pod reaches through it.
    pub targets: Vec<Target>,
    /// What the dataplane does for it.
    pub options: PodOptions,
}

/// Whether an interface has its pod's default route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultRoute {
    /// If the pod has none yet.
    IfFree,
    /// It must.
    Yes,
    /// It must not.
    No,
}

/// What a pod reaches through an interface: a route, whose next hop is always the gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The destination.
    pub destination: IpNetwork,
    /// The path's MTU, in bytes.
    pub mtu: Option<u32>,
    /// The largest TCP segment that is announced, in bytes.
    pub advmss: Option<u32>,
    /// The metric.
    pub metric: Option<u32>,
    /// The table, if not `main`.
    pub table: Option<u32>,
    /// `RT_SCOPE_…`.
    pub scope: Option<u8>,
}

impl From<IpNetwork> for Target {
    fn from(destination: IpNetwork) -> Target {
        Target { destination, mtu: None, advmss: None, metric: None, table: None, scope: None }
    }
}

/// What the dataplane does for a pod beside forwarding.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodOptions {
    /// Whether what leaves the cluster is masqueraded; `None` leaves it to the node.
    pub masquerade: Option<bool>,
    /// Ports of the node that lead to it.
    pub port_mappings: Vec<PortMapping>,
    /// Limits.
    pub bandwidth: Option<Bandwidth>,
}

/// A pod that is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attached {
    /// See [`AttachSpec::id`].
    pub id: String,
    /// The pod's `namespace/name`.
    pub name: String,
    /// The CNI network; none for an attachment by hand.
    #[serde(default)]
    pub network: Option<String>,
    /// See [`AttachSpec::attempt`].
    #[serde(default)]
    pub attempt: u64,
    /// How it is attached.
    #[serde(default)]
    pub mode: AttachMode,
    /// The path of the pod's namespace.
    #[serde(default)]
    pub netns_path: String,
    /// Whether this process found the namespace by that path. If not, that nothing is there says nothing.
    #[serde(default)]
    pub netns_seen: bool,
    /// The interface's name in the pod.
    pub ifname: String,
    /// The other end's name, in the gateway's namespace. In mode tun there is no such interface, and the name is the attachment's alone.
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
    /// Its routes, as a CNI result tells them.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// Whether its addresses are leased over the interface itself, so that its DHCP client is to be served.
    #[serde(default)]
    pub leases: bool,
    /// What the dataplane does for it.
    #[serde(default)]
    pub options: PodOptions,
}

impl Attached {
    /// The number of its own TUN; none in mode veth.
    pub fn tun(&self) -> Option<TunId> {
        let number = self.veth.strip_prefix(VETH_PREFIX).and_then(|number| number.parse().ok());
        number.filter(|_| self.mode == AttachMode::Tun).map(TunId::new)
    }

    /// The pod as routing sees it, if it hangs in the gateway's namespace.
    pub fn routed(&self) -> Option<PodRoute> {
        (self.mode == AttachMode::Veth).then(|| self.route())
    }

    fn route(&self) -> PodRoute {
        PodRoute { veth: self.veth.clone(), addresses: self.addresses.clone() }
    }
}

/// What [`Pods::detach`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detached {
    /// The pod, now gone.
    Gone(Box<Attached>),
    /// Nothing: it was detached before, or never attached.
    Absent,
}

/// Whether an attachment is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Stage {
    Attaching,
    Whole,
    /// Its rules are gone, its veth goes with those of others that leave; never written.
    Leaving,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    stage: Stage,
    #[serde(flatten)]
    pod: Attached,
}

/// What an entry's file holds.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    schema_version: u32,
    boot_id: String,
    #[serde(flatten)]
    entry: Entry,
}

/// The pods of this node.
#[derive(Debug)]
pub struct Pods {
    gateway: GatewayNs,
    netlink: Netlink,
    directory: PathBuf,
    boot_id: String,
    counter: PathBuf,
    veths_are_hosts: bool,
    /// The number of the last veth, once it has been read.
    last_number: Option<u64>,
    entries: Vec<Entry>,
    /// What was asked for those that wait for their addresses. A successor undoes them instead.
    waiting: Vec<AttachSpec>,
    /// How many queues a pod's TUN has: one for each worker.
    workers: u16,
    /// The namespaces of pods in mode tun, as far as they are at hand, by the attachment's name.
    namespaces: BTreeMap<String, Netns>,
    /// TUNs that were opened and that nobody has taken into use yet.
    opened: Vec<(TunId, PodTun)>,
    /// Why a pod's TUN could not be opened, by the attachment's name.
    closed: BTreeMap<String, PodError>,
}

impl Pods {
    /// Finds the pods that an earlier run attached in this boot. What was half done is undone, and so is what hangs in the
    /// gateway's namespace without being recorded. Pods whose namespace is gone stay in [`Pods::lost`] until they are detached.
    pub fn open(gateway: GatewayNs, runtime_dir: &Path, state_dir: &Path, workers: u16) -> Result<Pods, PodError> {
        let (directory, boot_id) = (state_dir.join(DIRECTORY), boot_id());
        let entries = read_records(&directory, &boot_id)?;
        let netlink = Netlink::open(gateway.netns()).map_err(of("the gateway's namespace"))?;
        let veths_are_hosts = kernel::veths_are_hosts(gateway.netns());
        let counter = runtime_dir.join(COUNTER_FILE);
        let (waiting, opened) = (Vec::new(), Vec::new());
        let (namespaces, closed) = (BTreeMap::new(), BTreeMap::new());
        let mut pods = Pods {
            gateway,
            netlink,
            directory,
            boot_id,
            counter,
            veths_are_hosts,
            last_number: None,
            entries,
            waiting,
            workers,
            namespaces,
            opened,
            closed,
        };
        let unfinished: Vec<String> = pods.entries.iter().filter(|entry| entry.stage == Stage::Attaching).map(|entry| entry.pod.id.clone()).collect();
        for id in unfinished {
            pods.detach(&id, None)?;
        }
        pods.sweep().map_err(of("the gateway's namespace"))?;
        Ok(pods)
    }

    /// The namespace that the pods hang in.
    pub fn gateway(&self) -> &GatewayNs {
        &self.gateway
    }

    /// Every pod on record, but those that leave.
    pub fn list(&self) -> impl Iterator<Item = &Attached> {
        self.entries.iter().filter(|entry| entry.stage != Stage::Leaving).map(|entry| &entry.pod)
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
        let is_lost = |pod: &&Attached| match pod.mode {
            AttachMode::Veth => !links.iter().any(|link| link.name == pod.veth),
            AttachMode::Tun => self.tun_is_lost(pod),
        };
        Ok(self.list().filter(is_lost).collect())
    }

    /// Attaches `pod_ns`. On any failure everything done is undone. Without addresses in `spec` it is done half, until [`Pods::assign`].
    pub fn attach(&mut self, pod_ns: &Netns, spec: &AttachSpec) -> Result<Attached, PodError> {
        if let Some(pod) = self.find(&spec.id) {
            return Err(PodError::AttachedAlready { id: spec.id.clone(), veth: pod.veth.clone() });
        }
        self.refuse_taken(&spec.addresses)?;
        let error = of(&spec.id);
        let pod_netlink = Netlink::open(pod_ns).map_err(&error)?;
        if pod_netlink.link(&spec.ifname).map_err(&error)?.is_some() {
            return Err(PodError::InterfaceExists { ifname: spec.ifname.clone() });
        }
        let pod = Attached {
            id: spec.id.clone(),
            name: spec.name.clone(),
            network: spec.network.clone(),
            attempt: spec.attempt,
            mode: spec.mode,
            netns_path: spec.netns_path.clone(),
            netns_seen: own_tun::at_path(&spec.netns_path).is_ok_and(|found| found == *pod_ns),
            ifname: spec.ifname.clone(),
            veth: self.next_name()?,
            veth_index: 0,
            addresses: spec.addresses.clone(),
            pod_mac: Mac([0; 6]),
            gateway_mac: Mac([0; 6]),
            mtu: spec.mtu,
            netns: (pod_ns.id().dev, pod_ns.id().ino),
            routes: Vec::new(),
            leases: spec.addresses.is_empty(),
            options: spec.options.clone(),
        };
        self.entries.push(Entry { stage: Stage::Attaching, pod: pod.clone() });
        let recorded = self.record(Stage::Attaching, &pod);
        let attached = recorded.and_then(|()| match spec.mode {
            AttachMode::Tun => self.make_tun(pod_ns, &pod_netlink, spec, pod),
            AttachMode::Veth => {
                let pod = self.make_link(pod_ns, &pod_netlink, spec, pod)?;
                if spec.addresses.is_empty() { Ok(pod) } else { self.join(&pod_netlink, spec, pod) }
            }
        });
        self.settle(attached, spec)
    }

    /// Gives an attachment that was made without addresses the addresses it waits for. On any failure it is detached.
    pub fn assign(&mut self, pod_ns: &Netns, id: &str, addresses: &[IpAddr], targets: Vec<Target>) -> Result<Attached, PodError> {
        let Some(pod) = self.find(id).cloned() else { return Err(PodError::NotAttached { id: id.to_owned() }) };
        let Some(at) = self.waiting.iter().position(|spec| spec.id == id) else {
            return Err(PodError::AssignedAlready { id: id.to_owned() });
        };
        let mut spec = self.waiting.swap_remove(at);
        spec.addresses = addresses.to_vec();
        spec.targets.extend(targets);
        let pod = Attached { addresses: spec.addresses.clone(), ..pod };
        let joined = self.refuse_assignment(&spec, pod_ns, &pod).and_then(|()| {
            // The record names the addresses before the kernel has rules for them.
            self.replace(Stage::Attaching, pod.clone())?;
            let pod_netlink = Netlink::open(pod_ns).map_err(of(id))?;
            self.join(&pod_netlink, &spec, pod)
        });
        self.settle(joined, &spec)
    }

    fn refuse_assignment(&self, spec: &AttachSpec, pod_ns: &Netns, pod: &Attached) -> Result<(), PodError> {
        if spec.addresses.is_empty() {
            return Err(PodError::NoAddress { id: spec.id.clone() });
        }
        if pod.netns != (pod_ns.id().dev, pod_ns.id().ino) {
            return Err(PodError::Broken { id: spec.id.clone(), what: "its namespace is not the one that it was attached in".into() });
        }
        self.refuse_taken(&spec.addresses)
    }

    /// Records what came of an attachment, and undoes it where nothing did.
    fn settle(&mut self, attached: Result<Attached, PodError>, spec: &AttachSpec) -> Result<Attached, PodError> {
        let stage = if spec.addresses.is_empty() { Stage::Attaching } else { Stage::Whole };
        let recorded = attached.and_then(|pod| self.replace(stage, pod.clone()).map(|()| pod));
        match &recorded {
            Ok(_) if stage == Stage::Attaching => self.waiting.push(spec.clone()),
            Ok(_) => {}
            // What the undoing says is of less use than why it came to it; the record keeps what remained.
            Err(_) => drop(self.detach(&spec.id, None)),
        }
        recorded
    }

    fn replace(&mut self, stage: Stage, pod: Attached) -> Result<(), PodError> {
        self.entries.retain(|entry| entry.pod.veth != pod.veth);
        self.entries.push(Entry { stage, pod: pod.clone() });
        self.record(stage, &pod)
    }

    /// Detaches a pod: its rules first, then its veth, which takes routes and neighbours with it, and what is left in the pod's
    /// namespace, if that is at hand. Succeeds twice, and with the namespace gone.
    pub fn detach(&mut self, id: &str, pod_ns: Option<&Netns>) -> Result<Detached, PodError> {
        let detached = self.condemn(id, pod_ns)?;
        match self.sweep_leaving().pop() {
            Some(error) => Err(error),
            None => Ok(detached),
        }
    }

    /// The first half of [`Pods::detach`]: from now on nothing of the pod passes and it is not listed any more; its veth goes with the next
    /// [`Pods::sweep_leaving`]. Until then its address is taken.
    pub fn condemn(&mut self, id: &str, pod_ns: Option<&Netns>) -> Result<Detached, PodError> {
        self.waiting.retain(|spec| spec.id != id);
        let Some(pod) = self.find(id).cloned() else { return Ok(Detached::Absent) };
        let error = of(id);
        for rule in pod.routed().iter().flat_map(PodRoute::rules) {
            self.netlink.delete_rule(&rule).or_missing().map_err(&error)?;
        }
        if let Some(pod_ns) = pod_ns.filter(|pod_ns| (pod_ns.id().dev, pod_ns.id().ino) == pod.netns) {
            kernel::withdraw(pod_ns, &pod).map_err(&error)?;
            self.remember_namespace(&pod, pod_ns);
        }
        self.entries.iter_mut().filter(|entry| entry.pod.veth == pod.veth).for_each(|entry| entry.stage = Stage::Leaving);
        Ok(Detached::Gone(Box::new(pod)))
    }

    /// Whether a pod of that name is on its way out.
    pub fn is_leaving(&self, id: &str) -> bool {
        self.entries.iter().any(|entry| entry.stage == Stage::Leaving && entry.pod.id == id)
    }

    /// The second half, for all that leave at once: the kernel takes some 20 ms for a veth, and as much for a hundred. What could not be
    /// taken away stays attached, and is told.
    pub fn sweep_leaving(&mut self) -> Vec<PodError> {
        let leaving: Vec<Attached> = self.entries.iter().filter(|entry| entry.stage == Stage::Leaving).map(|entry| entry.pod.clone()).collect();
        let names: Vec<&str> = leaving.iter().filter(|pod| pod.mode == AttachMode::Veth).map(|pod| pod.veth.as_str()).collect();
        let together = names.len() > 1 && self.netlink.delete_links(&names).is_ok();
        let mut errors = Vec::new();
        for pod in leaving {
            let gone = match pod.mode {
                AttachMode::Tun => self.remove_tun(&pod),
                AttachMode::Veth if together => Ok(()),
                AttachMode::Veth => self.netlink.delete_link(&pod.veth).or_missing().map_err(of(&pod.id)),
            };
            if let Err(error) = gone.and_then(|()| self.forget(&pod.veth)) {
                self.entries.iter_mut().filter(|entry| entry.pod.veth == pod.veth).for_each(|entry| entry.stage = Stage::Whole);
                errors.push(error);
                continue;
            }
            self.entries.retain(|entry| entry.pod.veth != pod.veth);
        }
        errors
    }

    fn refuse_taken(&self, addresses: &[IpAddr]) -> Result<(), PodError> {
        for pod in self.entries.iter().map(|entry| &entry.pod) {
            if let Some(address) = pod.addresses.iter().find(|address| addresses.contains(address)) {
                return Err(PodError::AddressTaken { address: *address, owner: pod.id.clone(), veth: pod.veth.clone() });
            }
        }
        Ok(())
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
    /// Whoever has the lock of the runtime directory has the file to itself, so it is read once.
    fn next_name(&mut self) -> Result<String, PodError> {
        let file = |operation| {
            let path = self.counter.clone();
            move |source| PodError::File { operation, path, source }
        };
        let last = match self.last_number {
            Some(last) => last,
            None => {
                let bytes = read_if_any(&self.counter).map_err(file("read"))?.unwrap_or_default();
                // A file that was cut short must not start again at 1 while there are veths.
                let of_kernel = self.netlink.links().map_err(of("the gateway's namespace"))?;
                let highest = of_kernel.iter().filter_map(|link| link.name.strip_prefix(VETH_PREFIX)?.parse::<u64>().ok()).max().unwrap_or(0);
                String::from_utf8_lossy(&bytes).trim().parse::<u64>().unwrap_or(0).max(highest)
            }
        };
        let number = last + 1;
        // In place, so that no moment finds it empty: every number has as many digits.
        let open = OpenOptions::new().write(true).create(true).truncate(false).open(&self.counter);
        open.and_then(|mut file| file.write_all(format!("{number:020}\n").as_bytes())).map_err(file("write"))?;
        self.last_number = Some(number);
        Ok(format!("{VETH_PREFIX}{number}"))
    }

    fn record(&self, stage: Stage, pod: &Attached) -> Result<(), PodError> {
        let record = Record { schema_version: 1, boot_id: self.boot_id.clone(), entry: Entry { stage, pod: pod.clone() } };
        let bytes = serde_json::to_vec(&record).expect("plain data is always JSON");
        let path = self.file_of(&pod.veth);
        write_atomically(&path, &bytes).map_err(|source| PodError::File { operation: "write", path, source })
    }

    fn forget(&self, veth: &str) -> Result<(), PodError> {
        let path = self.file_of(veth);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(PodError::File { operation: "remove", path, source }),
            _ => Ok(()),
        }
    }

    fn file_of(&self, veth: &str) -> PathBuf {
        self.directory.join(format!("{veth}.json"))
    }
}

/// The entries of this boot. Files of another are removed: what they tell of is gone, and its veths' names are given anew.
fn read_records(directory: &Path, boot_id: &str) -> Result<Vec<Entry>, PodError> {
    let file = |operation, path: &Path, source| PodError::File { operation, path: path.to_owned(), source };
    let found = match std::fs::read_dir(directory) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|source| file("read", directory, source))?,
    };
    let mut entries = Vec::new();
    for path in found.flatten().map(|found| found.path()).filter(|path| path.extension().is_some_and(|extension| extension == "json")) {
        let Some(bytes) = read_if_any(&path).map_err(|source| file("read", &path, source))? else { continue };
        let record: Record = serde_json::from_slice(&bytes).map_err(|error| file("understand", &path, error.into()))?;
        if record.boot_id == boot_id {
            entries.push(record.entry);
        } else {
            std::fs::remove_file(&path).map_err(|source| file("remove", &path, source))?;
        }
    }
    entries.sort_by_key(|entry| entry.pod.veth_index);
    Ok(entries)
}

fn of(id: &str) -> impl Fn(NetlinkError) -> PodError {
    let id = id.to_owned();
    move |source| PodError::Netlink { id: id.clone(), source }
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
