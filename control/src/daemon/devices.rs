//! The kernel's side of the gateway: its two TUNs, its namespaces, and the workers on them.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use podgate_core::verdict::TunId;
use podgate_runtime::flow_file::FlowFile;
use podgate_runtime::netns::Netns;
use podgate_runtime::pod_tun::PodTun;
use podgate_runtime::runtime::{Options, Reserve, Runtime};
use podgate_runtime::tun::Tun;
use podgate_runtime::udp::Overlay;
use tokio::sync::watch;

use super::demands::routing_plan;
use super::machine::Machine;
use super::{Daemon, Inner, pod_tuns};
use crate::compile::Compiled;
use crate::config::Config;
use crate::host_state::HostState;
use crate::keeper::{Keeper, Store, names};
use crate::netlink::Netlink;
use crate::routing::{self, Reconciler, RoutingPlan, Side};

/// The kernel's side of the gateway.
pub(super) struct Devices {
    pub(super) node_netns: Netns,
    pub(super) node_netlink: Netlink,
    pub(super) gateway_netns: Netns,
    pub(super) gateway_netlink: Netlink,
}

impl Devices {
    /// Opens both TUNs with a queue for each worker, a predecessor's if there are any, and sets them up.
    pub(super) fn open(&self, config: &Config, queues: u16, store: &Store) -> anyhow::Result<(Tun, Tun)> {
        routing::devices::prepare_gateway(&self.gateway_netns, &self.gateway_netlink)?;
        let pods = Tun::open_with(&config.devices.pods, queues, &self.gateway_netns, store.take(names::PODS))?;
        routing::devices::settle_pods_device(&self.gateway_netns, &self.gateway_netlink, &config.devices.pods)?;
        let host = Tun::open_with(&config.devices.host, queues, &self.node_netns, store.take(names::HOST))?;
        routing::devices::settle_host_device(&self.node_netns, &self.node_netlink, &config.devices.host)?;
        for (name, tun) in [(names::PODS, &pods), (names::HOST, &host)] {
            keep(store, name, tun.queues.iter().map(AsFd::as_fd));
        }
        Ok((pods, host))
    }

    /// Sets up rules and routes for the first time, so that what cannot be is told at the start, and gives back what keeps them so.
    pub(super) fn reconcile(&self, config: &Config, inner: &mut Inner) -> anyhow::Result<(watch::Sender<RoutingPlan>, Reconciler)> {
        let plan = routing_plan(config, inner);
        let spared = inner.host_state.spare_found_rules(&self.node_netlink, &routing::desired(&plan, Side::Node))?;
        let mut reconciler = Reconciler::new(&self.node_netns, &self.gateway_netns, &plan, spared)?;
        for side in [Side::Gateway, Side::Node] {
            let applied = reconciler.apply(side, &plan)?;
            for failed in &applied.changes.failed {
                tracing::error!(%side, "{failed}");
            }
        }
        Ok((watch::Sender::new(plan), reconciler))
    }

    pub(super) fn settle_node(&self, config: &Config, machine: &Machine, state: &mut HostState) -> anyhow::Result<()> {
        let ipv6 =
            if config.pod_cidrs.iter().any(|cidr| cidr.is_ipv6()) { routing::devices::Ipv6Use::InUse } else { routing::devices::Ipv6Use::Unused };
        routing::devices::settle_node(&self.node_netns, state, &machine.uplinks, ipv6)?;
        let mut ports = vec![config.node_ports.clone()];
        ports.extend(config.masquerade.iter().flatten().cloned());
        routing::devices::reserve_ports(&self.node_netns, state, &ports)?;
        Ok(())
    }
}

/// Starts the workers on the tables that were compiled last.
pub(super) fn start_dataplane(
    config: &Config,
    machine: &Machine,
    devices: &Devices,
    (pods, host): (Tun, Tun),
    (cpus, store, reserve): (&[Option<usize>], &Store, Reserve),
    flows: FlowFile,
    (compiled, pod_tuns): (&Compiled, Vec<(TunId, PodTun)>),
) -> anyhow::Result<Runtime> {
    let node = config.node.clone();
    let overlay = Overlay::open(&machine.underlay, config.overlay.port, cpus.len() as u16, store.take(names::OVERLAY))?;
    keep(store, names::OVERLAY, overlay.descriptors());
    Ok(Runtime::start(Options {
        workers: cpus.to_vec(),
        spin: super::machine::spin(config),
        pods,
        pod_tuns,
        pods_netns: devices.gateway_netns.try_clone()?,
        host,
        overlay,
        flows,
        snapshot: Arc::new(compiled.snapshot.clone()),
        status_page: Arc::new(move || format!("podgate {} on node {node}: forwarding\n", env!("CARGO_PKG_VERSION"))),
        reserve,
    })?)
}

impl Daemon {
    /// Opens lost TUNs again and starts the workers anew; flows are in their file. Rules and routes come back by the reconciler.
    pub(super) async fn replace_dataplane(&self) -> anyhow::Result<()> {
        let _alone = self.changes.write().await;
        let old = self.dataplane.borrow_mut().take();
        // A self-test may hold it for another second.
        while old.as_ref().is_some_and(|old| Arc::strong_count(old) > 1) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(old);
        self.open_dataplane(Reserve::default())
    }

    /// Starts workers where there are none.
    pub(super) fn open_dataplane(&self, reserve: Reserve) -> anyhow::Result<()> {
        let store = &self.start.store;
        let tuns = self.devices.open(&self.config, self.cpus.len() as u16, store)?;
        let (flows, _) = FlowFile::open(self.config.runtime_dir.join("flows"), self.config.flows.capacity as usize)?;
        let dataplane = {
            let mut inner = self.inner.borrow_mut();
            let pod_tuns = pod_tuns::begin(&mut inner.pods, store);
            inner.note_closed();
            start_dataplane(&self.config, &inner.machine, &self.devices, tuns, (&self.cpus, store, reserve), flows, (&inner.compiled, pod_tuns))?
        };
        *self.dataplane.borrow_mut() = Some(Arc::new(dataplane));
        self.serve_udp_ports();
        self.relay_dhcp()?;
        Ok(())
    }
}

/// Without what is kept, the next start costs what arrives meanwhile; that is no reason not to forward now.
fn keep<'a>(store: &Store, name: &str, fds: impl Iterator<Item = BorrowedFd<'a>>) {
    if let Err(error) = store.keep_all(name, fds, Keeper::Starter) {
        tracing::warn!(%error, name, "what is to outlive this process is not kept");
    }
}
