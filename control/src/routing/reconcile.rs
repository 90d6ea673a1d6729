//! Keeps policy routing as it should be, whoever changes it.
//!
//! [`Reconciler::run`] listens on both sides and applies the plan again when a rule, a route, an address or a device of ours
//! changes. It trusts no event: each is only a reason to compare everything (design D4). What it changes itself comes back as
//! events too; the comparison then finds nothing to do, and that is the end of it. Where somebody undoes our work at once, again
//! and again, the pauses between tries grow up to a second, so that the two do not fight at full speed.

use super::apply::{Changes, Ours, RoutingError, Side, apply};
use super::devices::{self, DeviceError};
use super::{CLUSTER_TABLE, HOST_TABLE, RoutingPlan, UP_TABLE, desired};
use crate::netlink::events::{Change, Events};
use crate::netlink::{Netlink, NetlinkError, RuleSpec, TABLE_MAIN};
use ipnetwork::IpNetwork;
use podgate_runtime::netns::Netns;
use std::io;
use std::net::IpAddr;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

/// Changes come in bursts (a link that goes down takes routes with it): wait this long for the rest.
const SETTLE: Duration = Duration::from_millis(10);
/// The longest pause between two tries, which keeps repairs within a second.
const PAUSE_MAX: Duration = Duration::from_millis(800);
/// After a comparison that found nothing to do, so many times what it took is left to others: while pods come by the dozen, each is a reason
/// to compare, and with many pods a comparison takes milliseconds.
const REST: u32 = 10;
/// But no longer than this.
const REST_MAX: Duration = Duration::from_millis(300);
/// Without any event, compare anyway this often.
const AUDIT: Duration = Duration::from_secs(10);

/// Something that the daemon has to know.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// Rules or routes were changed, because the plan or somebody else did; or could not be.
    Changed(Side, Changes),
    /// The TUN of that side is gone; it has to be opened again. Sent once for each loss.
    DeviceLost(Side),
    /// The TUN of that side is back and settled.
    DeviceBack(Side),
    /// The node's addresses are others now.
    NodeAddresses(Vec<NodeAddress>),
    /// A whole comparison failed; it is tried again.
    Failed(Side, ReconcileError),
}

/// Why a side could not be compared or listened to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReconcileError {
    /// Rules and routes.
    #[error(transparent)]
    Routing(#[from] RoutingError),
    /// The kernel's answers or events.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The TUN.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A handle on a namespace could not be had.
    #[error("cannot hold a network namespace: {0}")]
    Netns(#[from] io::Error),
}

/// An address of the node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeAddress {
    /// The address, with its prefix's length.
    pub address: IpNetwork,
    /// The interface that has it.
    pub device: String,
}

/// The node's usable addresses: not loopback, link-local, tentative or deprecated ones, and none of `except`, our own TUN.
pub fn node_addresses(netlink: &Netlink, except: &str) -> Result<Vec<NodeAddress>, NetlinkError> {
    let links = netlink.links()?;
    let local = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local() || ip.is_multicast(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local() || ip.is_multicast(),
    };
    let usable = netlink.addresses()?.into_iter().filter(|found| !found.tentative && !found.deprecated && !local(found.address.ip()));
    let mut addresses: Vec<NodeAddress> = usable
        .filter_map(|found| {
            let link = links.iter().find(|link| link.index == found.index)?;
            (link.name != except).then(|| NodeAddress { address: found.address, device: link.name.clone() })
        })
        .collect();
    addresses.sort();
    Ok(addresses)
}

/// One of the two sides.
#[derive(Debug)]
struct Half {
    netns: Netns,
    netlink: Netlink,
    ours: Ours,
    device: DeviceState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DeviceState {
    Unknown,
    There,
    Lost,
}

/// Keeps both sides as the plan says.
#[derive(Debug)]
pub struct Reconciler {
    gateway: Half,
    node: Half,
    addresses: Vec<NodeAddress>,
}

impl Reconciler {
    /// For the node's namespace and the gateway's. `spared` are rules in our form that are others', see
    /// [`crate::host_state::HostState::spare_found_rules`].
    pub fn new(node: &Netns, gateway: &Netns, plan: &RoutingPlan, spared: Vec<RuleSpec>) -> Result<Reconciler, ReconcileError> {
        let half = |netns: &Netns, side, device: &String, spared| -> Result<Half, ReconcileError> {
            let ours = Ours { side, device: device.clone(), spared };
            Ok(Half { netns: netns.try_clone()?, netlink: Netlink::open(netns)?, ours, device: DeviceState::Unknown })
        };
        let gateway = half(gateway, Side::Gateway, &plan.pods_device, Vec::new())?;
        let node = half(node, Side::Node, &plan.host_device, spared)?;
        let addresses = node_addresses(&node.netlink, &plan.host_device)?;
        Ok(Reconciler { gateway, node, addresses })
    }

    /// Settles the TUN of a side, if it is there, and makes its rules and routes as the plan says.
    pub fn apply(&mut self, side: Side, plan: &RoutingPlan) -> Result<Applied, ReconcileError> {
        let half = self.half(side);
        let there = half.netlink.link(&half.ours.device)?.is_some();
        let before = half.device;
        half.device = if there { DeviceState::There } else { DeviceState::Lost };
        if there {
            match side {
                Side::Gateway => devices::settle_pods_device(&half.netns, &half.netlink, &half.ours.device)?,
                Side::Node => devices::settle_host_device(&half.netns, &half.netlink, &half.ours.device)?,
            }
        }
        let changes = apply(&half.netlink, &half.ours, &desired(plan, side))?;
        let device = match (before, half.device) {
            (DeviceState::There | DeviceState::Unknown, DeviceState::Lost) => Some(Event::DeviceLost(side)),
            (DeviceState::Lost, DeviceState::There) => Some(Event::DeviceBack(side)),
            _ => None,
        };
        Ok(Applied { changes, device })
    }

    /// Applies the plan to both sides, then again and again: when something changes, when `plan` gets a new value, and every ten
    /// seconds. Ends when the sender of `plan` or the receiver of `events` is dropped.
    pub async fn run(mut self, mut plan: watch::Receiver<RoutingPlan>, events: mpsc::Sender<Event>) -> Result<(), ReconcileError> {
        // Listening starts before the first look, so that nothing falls in between.
        let mut heard_in_gateway = Events::open(&self.gateway.netns)?;
        let mut heard_on_node = Events::open(&self.node.netns)?;
        let mut pause = SETTLE;
        // Whether more than the pods is to be otherwise: somebody waits for that, a pod's host port for one.
        let mut awaited = true;
        let mut due = [Some(Side::Gateway), Some(Side::Node)];
        let mut audit = Instant::now() + AUDIT;
        loop {
            let now = plan.borrow_and_update().clone();
            let mut quiet = true;
            let began = Instant::now();
            for side in std::mem::take(&mut due).into_iter().flatten() {
                match self.look(side, &now) {
                    Ok(told) => {
                        quiet &= told.iter().all(|event| !matches!(event, Event::Changed(..)));
                        for event in told {
                            if events.send(event).await.is_err() {
                                return Ok(());
                            }
                        }
                    }
                    Err(error) => {
                        quiet = false;
                        due[index(side)] = Some(side);
                        if events.send(Event::Failed(side, error)).await.is_err() {
                            return Ok(());
                        }
                    }
                }
            }
            pause = if quiet || awaited { (began.elapsed() * REST).clamp(SETTLE, REST_MAX) } else { (pause * 2).min(PAUSE_MAX) };
            let retry = Instant::now() + PAUSE_MAX;
            let failed = due.iter().any(Option::is_some);
            awaited = false;
            loop {
                tokio::select! {
                    changes = heard_in_gateway.changes() => self.note(Side::Gateway, &changes?, &mut due),
                    changes = heard_on_node.changes() => self.note(Side::Node, &changes?, &mut due),
                    changed = plan.changed() => {
                        if changed.is_err() {
                            return Ok(());
                        }
                        awaited |= !plan.borrow().is_but_for_pods(&now);
                        due = [Some(Side::Gateway), Some(Side::Node)];
                    }
                    () = sleep_until(audit) => {
                        audit = Instant::now() + AUDIT;
                        due = [Some(Side::Gateway), Some(Side::Node)];
                    }
                    () = sleep_until(retry), if failed => break,
                    () = events.closed() => return Ok(()),
                }
                if !failed && due.iter().any(Option::is_some) {
                    break;
                }
            }
            let rested = sleep(if awaited { SETTLE } else { pause });
            tokio::pin!(rested);
            loop {
                tokio::select! {
                    () = &mut rested => break,
                    changed = plan.changed() => {
                        if changed.is_err() {
                            return Ok(());
                        }
                        due = [Some(Side::Gateway), Some(Side::Node)];
                        if !awaited && !plan.borrow().is_but_for_pods(&now) {
                            awaited = true;
                            rested.as_mut().reset(Instant::now() + SETTLE);
                        }
                    }
                }
            }
        }
    }

    fn look(&mut self, side: Side, plan: &RoutingPlan) -> Result<Vec<Event>, ReconcileError> {
        let mut told = Vec::new();
        let Applied { changes, device } = self.apply(side, plan)?;
        told.extend(device);
        if !changes.is_empty() {
            told.push(Event::Changed(side, changes));
        }
        if side == Side::Node {
            let addresses = node_addresses(&self.node.netlink, &plan.host_device)?;
            if addresses != self.addresses {
                self.addresses.clone_from(&addresses);
                told.push(Event::NodeAddresses(addresses));
            }
        }
        Ok(told)
    }

    /// Marks the side as due, if the changes can concern us.
    fn note(&self, side: Side, changes: &[Change], due: &mut [Option<Side>; 2]) {
        let half = if side == Side::Gateway { &self.gateway } else { &self.node };
        let concerns = |change: &Change| match change {
            Change::LinkSet(link) => link.name == half.ours.device,
            Change::RouteSet(route) | Change::RouteGone(route) => match side {
                Side::Gateway => matches!(route.spec.table, TABLE_MAIN | UP_TABLE),
                Side::Node => matches!(route.spec.table, HOST_TABLE | CLUSTER_TABLE),
            },
            Change::LinkGone(_) | Change::AddressSet(_) | Change::AddressGone(_) | Change::RuleSet(_) | Change::RuleGone(_) | Change::Lost => true,
        };
        if changes.iter().any(concerns) {
            due[index(side)] = Some(side);
        }
    }

    fn half(&mut self, side: Side) -> &mut Half {
        match side {
            Side::Gateway => &mut self.gateway,
            Side::Node => &mut self.node,
        }
    }
}

/// What [`Reconciler::apply`] did.
#[derive(Debug)]
pub struct Applied {
    /// To rules and routes.
    pub changes: Changes,
    /// What there is to tell of the TUN.
    pub device: Option<Event>,
}

fn index(side: Side) -> usize {
    match side {
        Side::Gateway => 0,
        Side::Node => 1,
    }
}
