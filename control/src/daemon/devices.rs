//! The kernel's side of the gateway: its two TUNs, its namespaces, and the workers on them.

use std::sync::Arc;

use podgate_core::verdict::TunId;
use podgate_runtime::flow_file::FlowFile;
use podgate_runtime::netns::Netns;
use podgate_runtime::pod_tun::PodTun;
use podgate_runtime::runtime::{Options, Runtime};
use podgate_runtime::tun::Tun;
use tokio::sync::watch;

use super::Inner;
use super::demands::routing_plan;
use super::machine::Machine;
use crate::compile::Compiled;
use crate::config::Config;
use crate::host_state::HostState;
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
    /// Opens both TUNs with a queue for each worker, and sets them up.
    pub(super) fn open(&self, config: &Config, queues: u16) -> anyhow::Result<(Tun, Tun)> {
        routing::devices::prepare_gateway(&self.gateway_netns, &self.gateway_netlink)?;
        let pods = Tun::open(&config.devices.pods, queues, &self.gateway_netns)?;
        routing::devices::settle_pods_device(&self.gateway_netns, &self.gateway_netlink, &config.devices.pods)?;
        let host = Tun::open(&config.devices.host, queues, &self.node_netns)?;
        routing::devices::settle_host_device(&self.node_netns, &self.node_netlink, &config.devices.host)?;
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
    cpus: &[Option<usize>],
    flows: FlowFile,
    (compiled, pod_tuns): (&Compiled, Vec<(TunId, PodTun)>),
) -> anyhow::Result<Runtime> {
    let node = config.node.clone();
    Ok(Runtime::start(Options {
        workers: cpus.to_vec(),
        spin: super::machine::spin(config),
        pods,
        pod_tuns,
        pods_netns: devices.gateway_netns.try_clone()?,
        host,
        underlay: machine.underlay.clone(),
        overlay_port: config.overlay.port,
        flows,
        snapshot: Arc::new(compiled.snapshot.clone()),
        status_page: Arc::new(move || format!("podgate {} on node {node}: forwarding\n", env!("CARGO_PKG_VERSION"))),
    })?)
}
