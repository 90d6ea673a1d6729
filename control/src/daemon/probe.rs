//! The self-test's own pod, and the task that runs the tests.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use podgate_cni::protocol::AttachMode;
use podgate_core::addr::Addr;
use podgate_runtime::netns::Netns;
use podgate_runtime::runtime::Runtime;

use super::Daemon;
use super::attachments::GSO_MAX_SIZE;
use crate::ipam;
use crate::pods::{AttachSpec, DefaultRoute, PodOptions};
use crate::selftest::{Family, Gateway, SelfTest};

/// The probe's attachment.
pub const ID: &str = "podgate/self-test";

/// Between two runs, once all is well.
const INTERVAL: Duration = Duration::from_secs(10);

/// Between two runs, as long as something that used to be or should be well is not.
const INTERVAL_FAILING: Duration = Duration::from_millis(500);

impl Gateway for Arc<Runtime> {
    fn inject_host(&self, packet: &[u8]) -> std::io::Result<()> {
        Runtime::inject_host(self, packet)
    }

    fn probes(&self, number: u8) -> u64 {
        self.counters().iter().map(|counters| counters.probes[usize::from(number)].value()).sum()
    }
}

/// Runs the self-test for as long as the daemon lives.
pub async fn run(daemon: Rc<Daemon>) {
    let mut probe: Option<(Netns, Vec<Family>)> = None;
    loop {
        let families = families(&daemon);
        if probe.as_ref().is_none_or(|(_, known)| *known != families) && !families.is_empty() {
            probe = match attach(&daemon, &families).await {
                Ok(netns) => Some((netns, families.clone())),
                Err(error) => {
                    tracing::error!(%error, "the self-test's own pod");
                    None
                }
            };
        }
        let mut failing = true;
        if let (Some((netns, families)), Ok(dataplane)) = (&probe, daemon.dataplane())
            && let (Ok(probe), Ok(node)) = (netns.try_clone(), daemon.devices.node_netns.try_clone())
        {
            let test = SelfTest {
                gateway: dataplane,
                probe,
                node,
                families: families.clone(),
                token: daemon.token,
                health_port: daemon.config.health.port(),
                own_port: daemon.config.masquerade.iter().flatten().next().map_or(*daemon.config.node_ports.start(), |range| *range.start()),
                device: daemon.config.devices.host.clone(),
            };
            // It blocks on sockets: not on the control thread.
            match tokio::task::spawn_blocking(move || test.run()).await {
                Ok(checks) => {
                    failing = checks.iter().any(|check| check.vital && !check.ok);
                    daemon.note_checks(checks);
                }
                Err(error) => tracing::error!(%error, "the self-test"),
            }
        }
        tokio::time::sleep(if failing { INTERVAL_FAILING } else { INTERVAL }).await;
    }
}

/// The families in which this node has both a gateway and an address.
fn families(daemon: &Daemon) -> Vec<Family> {
    let inner = daemon.inner.borrow();
    let node = &inner.compiled.snapshot.node;
    let gateways = [node.gateway_v4, node.gateway_v6].into_iter().flatten().map(Addr::ip);
    let of = |gateway: std::net::IpAddr| inner.machine.primary().into_iter().find(|ip| ip.is_ipv4() == gateway.is_ipv4());
    gateways.filter_map(|gateway| Some(Family { gateway, node: of(gateway)? })).collect()
}

async fn attach(daemon: &Daemon, families: &[Family]) -> anyhow::Result<Netns> {
    let _changes = daemon.changes.read().await;
    // That of a predecessor went with its namespace, or not quite.
    daemon.inner.borrow_mut().pods.detach(ID, None)?;
    let netns = Netns::anonymous()?;
    let cidrs = daemon.inner.borrow().compiled.snapshot.node.node_pod_cidrs.clone();
    let addresses = families.iter().filter_map(|family| {
        let cidr = cidrs.iter().find(|cidr| cidr.contains(family.gateway))?;
        ipam::probe_address(*cidr)
    });
    let spec = AttachSpec {
        id: ID.to_owned(),
        name: ID.to_owned(),
        network: None,
        attempt: 0,
        mode: AttachMode::Veth,
        netns_path: String::new(),
        ifname: "eth0".to_owned(),
        addresses: addresses.collect(),
        mac: None,
        mtu: daemon.pod_mtu(&daemon.inner.borrow().machine),
        gso_max_size: GSO_MAX_SIZE,
        default_route: DefaultRoute::IfFree,
        targets: Vec::new(),
        options: PodOptions::default(),
    };
    daemon.plug(&spec, &netns).await?;
    Ok(netns)
}
