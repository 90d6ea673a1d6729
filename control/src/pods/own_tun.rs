//! Attach mode tun: the pod's interface is a TUN inside its own namespace.
//!
//! Nothing of it is in the gateway's namespace, and there is no other end. Its routes lead to the same next hops as a veth's, though nobody is
//! asked for them: a TUN has no neighbours to find, but with a default route without a next hop IPv6 would make an entry for every destination
//! in the neighbour table that the whole machine shares (`ip6_finish_output2` in net/ipv6/ip6_output.c).
//!
//! The device is persistent: when the daemon ends, it stays without a carrier, and its successor opens its queues again ([`Pods::open_tuns`]),
//! by the path of the namespace that the runtime named, or takes it over from whoever kept the descriptors ([`Pods::adopt`]). An open queue
//! keeps the namespace, so that one which everybody else has left is there until it is detached: [`Pods::lost`] finds such a pod by its path.

use std::os::fd::OwnedFd;
use std::path::Path;

use podgate_cni::protocol::AttachMode;
use podgate_core::verdict::TunId;
use podgate_runtime::netns::{Netns, NetnsError};
use podgate_runtime::pod_tun::PodTun;
use podgate_runtime::tun::TunError;

use super::kernel::{Neighbours, furnish, prepare_pod};
use super::{AttachSpec, Attached, DIRECTORY, PodError, Pods, of};
use crate::host_state::boot_id;
use crate::netlink::{AddrGenMode, LinkSettings, Netlink};

impl Pods {
    /// The TUN, with addresses and routes, up.
    pub(super) fn make_tun(&mut self, pod_ns: &Netns, pod_netlink: &Netlink, spec: &AttachSpec, mut pod: Attached) -> Result<Attached, PodError> {
        let error = of(&spec.id);
        let tun = PodTun::make(&spec.ifname, self.workers, pod_ns).map_err(|source| PodError::Tun { id: spec.id.clone(), source })?;
        let settings = LinkSettings::new().mtu(spec.mtu).gso_max_size(spec.gso_max_size).addr_gen_mode(AddrGenMode::None);
        pod_netlink.set_link(&spec.ifname, &settings).map_err(&error)?;
        prepare_pod(pod_ns, pod_netlink, spec)?;
        pod.routes = furnish(pod_netlink, spec, &pod, Neighbours::None)?;
        self.remember_namespace(&pod, pod_ns);
        self.opened.extend(pod.tun().map(|id| (id, tun)));
        Ok(pod)
    }

    /// The TUNs that were opened since the last call, for whoever reads and writes them.
    pub fn take_opened(&mut self) -> Vec<(TunId, PodTun)> {
        std::mem::take(&mut self.opened)
    }

    /// Opens again every TUN that is not in `in_use`: at a start all of them, later those that could not be opened then.
    pub fn open_tuns(&mut self, in_use: &[TunId]) {
        let wanted: Vec<Attached> = self.list().filter(|pod| pod.tun().is_some_and(|id| !self.is_open(id, in_use))).cloned().collect();
        for pod in wanted {
            match self.open_tun(&pod) {
                Ok(()) => drop(self.closed.remove(&pod.veth)),
                Err(error) => drop(self.closed.insert(pod.veth.clone(), error)),
            }
        }
        let of_pods: Vec<String> = self.list().map(|pod| pod.veth.clone()).collect();
        self.closed.retain(|name, _| of_pods.contains(name));
    }

    /// Takes over the queues of a pod's TUN from whoever kept them. Those of no pod on record are closed.
    pub fn adopt(&mut self, fds: Vec<OwnedFd>) -> Result<(), TunError> {
        let mut fds = fds.into_iter();
        let Some(first) = fds.next() else { return Ok(()) };
        let tun = PodTun::adopt(first, fds, self.workers)?;
        let key = (tun.netns().id().dev, tun.netns().id().ino);
        let is_it = |pod: &&Attached| pod.mode == AttachMode::Tun && pod.netns == key && pod.ifname == tun.name();
        let Some(pod) = self.list().find(is_it).cloned() else { return Ok(()) };
        self.remember_namespace(&pod, tun.netns());
        self.closed.remove(&pod.veth);
        self.opened.extend(pod.tun().map(|id| (id, tun)));
        Ok(())
    }

    /// Pods whose TUN could not be opened, and why: nothing reaches them.
    pub fn closed(&self) -> impl Iterator<Item = (&Attached, &PodError)> {
        self.closed.iter().filter_map(|(name, error)| Some((self.list().find(|pod| pod.veth == *name)?, error)))
    }

    /// Deletes a pod's TUN. A namespace that is not to be had any more has taken it along.
    pub(super) fn remove_tun(&mut self, pod: &Attached) -> Result<(), PodError> {
        self.opened.retain(|(id, _)| Some(*id) != pod.tun());
        self.closed.remove(&pod.veth);
        let removed = match self.namespace_of(pod) {
            Ok(netns) => PodTun::remove(&pod.ifname, &netns).map(drop),
            Err(_) => Ok(()),
        };
        self.namespaces.remove(&pod.veth);
        match removed {
            // The pod's own interface of that name, made after ours was deleted.
            Err(TunError::WrongKind { .. }) | Ok(()) => Ok(()),
            Err(source) => Err(PodError::Tun { id: pod.id.clone(), source }),
        }
    }

    /// Whether a pod's interface is gone, or its namespace from where it was.
    pub(super) fn tun_is_lost(&self, pod: &Attached) -> bool {
        if pod.netns_seen && is_gone(pod) {
            return true;
        }
        let Some(netns) = self.namespaces.get(&pod.veth) else { return false };
        let link = Netlink::open(netns).and_then(|inside| inside.link(&pod.ifname));
        // What cannot be asked is not taken for gone.
        link.is_ok_and(|link| link.is_none_or(|link| link.kind != "tun"))
    }

    pub(super) fn remember_namespace(&mut self, pod: &Attached, netns: &Netns) {
        if pod.mode == AttachMode::Tun
            && let Ok(netns) = netns.try_clone()
        {
            self.namespaces.insert(pod.veth.clone(), netns);
        }
    }

    fn is_open(&self, id: TunId, in_use: &[TunId]) -> bool {
        in_use.contains(&id) || self.opened.iter().any(|(opened, _)| *opened == id)
    }

    fn open_tun(&mut self, pod: &Attached) -> Result<(), PodError> {
        let netns = self.namespace_of(pod)?;
        let tun = PodTun::reopen(&pod.ifname, self.workers, &netns).map_err(|source| PodError::Tun { id: pod.id.clone(), source })?;
        self.namespaces.insert(pod.veth.clone(), netns);
        self.opened.extend(pod.tun().map(|id| (id, tun)));
        Ok(())
    }

    fn namespace_of(&self, pod: &Attached) -> Result<Netns, PodError> {
        let failed = |source| PodError::Namespace { id: pod.id.clone(), source };
        if let Some(netns) = self.namespaces.get(&pod.veth) {
            return netns.try_clone().map_err(|source| failed(NetnsError::Examine { what: pod.netns_path.clone(), source }));
        }
        let netns = at_path(&pod.netns_path).map_err(failed)?;
        if (netns.id().dev, netns.id().ino) != pod.netns {
            return Err(PodError::Broken { id: pod.id.clone(), what: format!("{} is another namespace now", pod.netns_path) });
        }
        Ok(netns)
    }
}

/// The namespace at a path as a runtime on the host names it. In an image without `/var/run` it is below `/run`, which is the same.
pub(super) fn at_path(path: &str) -> Result<Netns, NetnsError> {
    match (Netns::open(path), path.strip_prefix("/var/run/")) {
        (Err(NetnsError::Open { .. }), Some(rest)) => Netns::open(Path::new("/run").join(rest)),
        (found, _) => found,
    }
}

/// Whether where a pod's namespace was there is nothing, or another. A directory that is not there either tells nothing.
fn is_gone(pod: &Attached) -> bool {
    match at_path(&pod.netns_path) {
        Ok(netns) => (netns.id().dev, netns.id().ino) != pod.netns,
        Err(NetnsError::NotANetns { .. }) => true,
        Err(NetnsError::Open { source, path }) => {
            source.kind() == std::io::ErrorKind::NotFound && path.parent().is_some_and(|directory| directory.is_dir())
        }
        Err(_) => false,
    }
}

/// Deletes every TUN inside a pod that is on record in `state_dir`, for `podgate cleanup`: what was removed, and what could not be, a line each.
pub fn remove_all(state_dir: &Path) -> (Vec<String>, Vec<String>) {
    let (mut removed, mut kept) = (Vec::new(), Vec::new());
    let entries = match super::read_records(&state_dir.join(DIRECTORY), &boot_id()) {
        Ok(entries) => entries,
        Err(error) => return (removed, vec![error.to_string()]),
    };
    for pod in entries.into_iter().map(|entry| entry.pod).filter(|pod| pod.mode == AttachMode::Tun) {
        let is_it = |netns: &Netns| (netns.id().dev, netns.id().ino) == pod.netns;
        let what = format!("interface {} of {} ({})", pod.ifname, pod.name, pod.netns_path);
        match at_path(&pod.netns_path) {
            Ok(netns) if is_it(&netns) => match PodTun::remove(&pod.ifname, &netns) {
                Ok(podgate_runtime::tun::Removed::Removed) => removed.push(what),
                Ok(podgate_runtime::tun::Removed::Absent) => {}
                Err(error) => kept.push(format!("{what}: {error}")),
            },
            // With its namespace it went as well.
            _ if is_gone(&pod) => {}
            Ok(_) => {}
            Err(error) => kept.push(format!("{what}: {error}; without a gateway it leads nowhere, and it goes with the pod")),
        }
    }
    (removed, kept)
}
