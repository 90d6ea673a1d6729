//! Attaching and detaching namespaces: address, tables and veth, in that order, and all of it undone where one fails.
//!
//! What comes in was written by a pod's author (port mappings, limits), by a plugin (delegated addresses) or by a shim of another
//! version: it is checked here and trusted afterwards. `upkeep` keeps records, interfaces and addresses in step with each other.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use ipnetwork::IpNetwork;
use podgate_cni::protocol::{Addresses, AttachMode, AttachRequest, Given};
use podgate_cni::result::{self, Interface, Ip, Route};
use podgate_cni::{Attachment, Response};
use podgate_core::addr::Addr;
use podgate_runtime::netns::{Netns, NetnsError};
use podgate_runtime::pod_tun::{PODS_MAX, PodTunError};
use serde_json::{Value, json};

use super::Daemon;
use super::answers::error;
use crate::ipam::{Holder, IpamError, Owner, Wish};
use crate::netlink::Mac;
use crate::pods::{AttachSpec, Attached, DefaultRoute, Detached, PodError, PodOptions, Pods, Target};
use crate::routing::{self, DEVICE_MTU};

/// The largest frame that pods hand over: one send of the overlay takes 65,507 bytes, replicated headers included (design D2).
pub(super) const GSO_MAX_SIZE: u32 = 62_000;

/// CNI SPEC.md, "Error": the container is unknown.
const UNKNOWN_CONTAINER: u32 = 3;
/// "Invalid necessary environment variables".
const INVALID_ENVIRONMENT: u32 = 4;
/// "Invalid network config".
const INVALID_CONFIG: u32 = 7;
/// "Try again later".
const TRY_AGAIN: u32 = 11;
/// "The plugin is not available".
const NOT_AVAILABLE: u32 = 50;
/// "The plugin is not available, and existing containers may have limited connectivity".
const LIMITED_CONNECTIVITY: u32 = 51;
/// Our own: the kernel or a file refused.
const FAILED: u32 = 100;

/// The smallest MTU of a pod: below it there is no IPv6 (RFC 8200 §5).
const MTU_MIN: u32 = 1280;

impl Daemon {
    /// Attaches a namespace: address, tables, veth, in that order, so that its first packet meets the right tables.
    pub(super) async fn attach(&self, request: &AttachRequest, netns: OwnedFd) -> Result<Value, Response> {
        let attachment = &request.attachment;
        let netns = self.pod_netns(attachment, netns)?;
        if crate::config::check_device_name(&attachment.ifname).is_err() {
            let name = &attachment.ifname;
            let message = format!("`{name}` cannot be an interface's name; write 1 to 15 characters without `/`, `:` and blanks");
            return Err(error(INVALID_ENVIRONMENT, message));
        }
        let id = id_of(attachment);
        self.wait_for_leaving(&id).await;
        if let Some(pod) = self.inner.borrow().pods.find(&id) {
            if request.attempt != 0 && pod.attempt == request.attempt {
                return Ok(self.result(attachment, pod));
            }
            let message = format!("{} of {} is attached already; detach it first", attachment.ifname, attachment.sandbox);
            return Err(error(INVALID_ENVIRONMENT, message));
        }
        if self.inner.borrow().compiled.snapshot.node.node_pod_cidrs.is_empty() {
            return Err(error(TRY_AGAIN, "this node has no pod range yet; `podgate status` says what is missing".into()));
        }
        let mut spec = self.spec(request, id)?;
        let owner = owner_of(attachment);
        spec.addresses = self.addresses(&owner, &request.addresses)?;
        if let Err(refused) = self.may_give_out(&spec.addresses) {
            self.release(&owner);
            return Err(refused);
        }
        match self.plug(&spec, &netns).await {
            Ok(attached) if attached.leases => match self.relay_dhcp() {
                Ok(()) => Ok(self.result(attachment, &attached)),
                Err(e) => {
                    self.unplug(&attached.id, None).await.map_err(refusal)?;
                    Err(error(FAILED, e.to_string()))
                }
            },
            Ok(attached) => {
                tracing::info!(pod = %attached.name, addresses = ?attached.addresses, mode = attached.mode.name(), by = %attached.veth, "attached");
                Ok(self.result(attachment, &attached))
            }
            Err(e) => {
                self.release(&owner);
                Err(refusal(e))
            }
        }
    }

    /// The second half of an attachment whose addresses come from a plugin that needed the interface first.
    pub(super) async fn assign(&self, attachment: &Attachment, given: &Given, netns: OwnedFd) -> Result<Value, Response> {
        let netns = self.pod_netns(attachment, netns)?;
        let owner = owner_of(attachment);
        let id = id_of(attachment);
        if let Some(pod) = self.inner.borrow().pods.find(&id)
            && !pod.addresses.is_empty()
            && pod.addresses == addresses_of(given)?
        {
            // Asked again, because the answer was lost.
            return Ok(self.result(attachment, pod));
        }
        let targets = targets(&given.routes)?;
        let addresses = self.given(&owner, given)?;
        if let Err(refused) = self.may_give_out(&addresses) {
            self.release(&owner);
            return Err(refused);
        }
        let assigned = self.inner.borrow_mut().pods.assign(&netns, &id, &addresses, targets);
        match assigned {
            Ok(attached) => {
                self.route();
                self.refresh().await;
                tracing::info!(pod = %attached.name, addresses = ?attached.addresses, mode = attached.mode.name(), by = %attached.veth, "attached");
                Ok(self.result(attachment, &attached))
            }
            Err(e) => {
                self.release(&owner);
                Err(refusal(e))
            }
        }
    }

    /// Makes the pod known to the workers, then to the kernel.
    pub(super) async fn plug(&self, spec: &AttachSpec, netns: &Netns) -> Result<Attached, PodError> {
        let attached = self.inner.borrow_mut().pods.attach(netns, spec)?;
        // At once: the reconciler takes rules that it does not know for leftovers.
        self.route();
        self.refresh().await;
        Ok(attached)
    }

    /// Detaches; `netns` is the pod's namespace, where it is still at hand.
    pub(super) async fn detach(&self, attachment: &Attachment, netns: Option<OwnedFd>) -> Result<Value, Response> {
        let netns = netns.and_then(|netns| Netns::from_fd(netns).ok());
        let detached = self.unplug(&id_of(attachment), netns.as_ref()).await.map_err(refusal)?;
        if detached == Detached::Absent {
            // An address may have been given out by a daemon that was killed before it attached.
            self.inner.borrow_mut().ipam.release(&owner_of(attachment)).map_err(no_address)?;
        }
        Ok(json!({ "detached": detached != Detached::Absent }))
    }

    /// Takes an interface away, then gives its addresses back. Its flows end with the publication, before an address can be given to anybody
    /// else.
    pub(super) async fn unplug(&self, id: &str, netns: Option<&Netns>) -> Result<Detached, PodError> {
        let detached = self.inner.borrow_mut().pods.condemn(id, netns)?;
        let Detached::Gone(pod) = &detached else {
            self.wait_for_leaving(id).await;
            return Ok(detached);
        };
        self.leaving.set(self.leaving.get() + 1);
        self.route();
        self.refresh().await;
        self.leaving.set(self.leaving.get() - 1);
        if self.inner.borrow().pods.list().any(|other| other.veth == pod.veth) {
            return Err(PodError::Broken {
                id: id.to_owned(),
                what: format!("its interface ({}) could not be taken away; the log says why", pod.veth),
            });
        }
        // Another ADD may have come for it meanwhile (this DEL's shim was killed, and the next one found nothing): the addresses are its.
        if self.inner.borrow().pods.find(id).is_none() {
            self.release(&owner(pod));
        }
        if pod.leases
            && let Err(e) = self.relay_dhcp()
        {
            tracing::warn!(error = %e, "the DHCP relay");
        }
        tracing::info!(pod = %pod.name, addresses = ?pod.addresses, "detached");
        Ok(detached)
    }

    /// Waits until nobody of that name is on its way out: the interface that it leaves by is still there.
    async fn wait_for_leaving(&self, id: &str) {
        if self.inner.borrow().pods.is_leaving(id) {
            self.refresh().await;
        }
    }

    /// CNI CHECK.
    pub(super) fn check(&self, attachment: &Attachment, addresses: &[String], netns: OwnedFd) -> Result<Value, Response> {
        let netns = self.pod_netns(attachment, netns)?;
        let addresses = addresses.iter().map(|text| address(text)).collect::<Result<Vec<_>, _>>()?;
        let id = id_of(attachment);
        self.inner.borrow().pods.check(&id, &netns, &addresses).map_err(|e| match e {
            PodError::NotAttached { .. } => error(UNKNOWN_CONTAINER, e.to_string()),
            e => refusal(e),
        })?;
        let inner = self.inner.borrow();
        let own = inner.pods.find(&id).into_iter().flat_map(|pod| &pod.addresses);
        match own.into_iter().find(|address| inner.compiled.snapshot.pods.get(Addr::from(**address)).is_none()) {
            Some(unknown) => Err(error(FAILED, format!("{id}: the workers do not know its address {unknown} yet"))),
            None => Ok(json!({})),
        }
    }

    /// CNI STATUS: whether a pod could be attached now.
    pub(super) fn readiness(&self) -> Result<Value, Response> {
        let inner = self.inner.borrow();
        let failed: Vec<String> =
            inner.checks.iter().filter(|check| check.vital && !check.ok).map(|check| format!("{}: {}", check.name, check.detail)).collect();
        if !failed.is_empty() {
            return Err(error(LIMITED_CONNECTIVITY, failed.join("; ")));
        }
        if inner.compiled.snapshot.node.node_pod_cidrs.is_empty() {
            return Err(error(NOT_AVAILABLE, "this node has no pod range yet; `podgate status` says what is missing".into()));
        }
        if inner.checks.is_empty() || !self.ready.get() {
            return Err(error(NOT_AVAILABLE, "the gateway is not ready yet; `podgate status` says what is missing".into()));
        }
        Ok(json!({}))
    }

    fn pod_netns(&self, attachment: &Attachment, netns: OwnedFd) -> Result<Netns, Response> {
        let sandbox = &attachment.sandbox;
        let netns = Netns::from_fd(netns).map_err(|e| match e {
            NetnsError::NotANetns { found, .. } => {
                let message = format!("{sandbox} is not a network namespace (found {found}); `ip netns add NAME` makes /run/netns/NAME");
                error(INVALID_ENVIRONMENT, message)
            }
            other => error(INVALID_ENVIRONMENT, format!("{sandbox}: {other}")),
        })?;
        for (own, whose) in [(&self.devices.node_netns, "the node's own"), (&self.devices.gateway_netns, "the gateway's own")] {
            if netns.id() == own.id() {
                let message = format!("{sandbox} is {whose} network namespace, not a pod's; `ip netns add NAME` makes one at /run/netns/NAME");
                return Err(error(INVALID_ENVIRONMENT, message));
            }
        }
        Ok(netns)
    }

    /// What is asked for, in our words; its addresses are found later.
    fn spec(&self, request: &AttachRequest, id: String) -> Result<AttachSpec, Response> {
        let inner = self.inner.borrow();
        let invalid = |message: String| error(INVALID_CONFIG, message);
        let mtu = request.mtu.unwrap_or_else(|| self.pod_mtu(&inner.machine));
        if !(MTU_MIN..=DEVICE_MTU).contains(&mtu) {
            return Err(invalid(format!("mtu {mtu} cannot be: write {MTU_MIN} to {DEVICE_MTU}, or leave it out for what the overlay takes")));
        }
        let mac = request.mac.as_ref().map(|text| text.parse::<Mac>().map_err(|e| invalid(format!("mac: {e}")))).transpose()?;
        if let Some(mac) = mac.filter(|mac| mac.0[0] & 1 != 0 || mac.0 == [0; 6]) {
            return Err(invalid(format!("mac {mac} is nobody's: write one of a single station, as in 02:00:00:00:00:01")));
        }
        let mode = request.mode.unwrap_or(self.config.attach);
        if mode == AttachMode::Tun && mac.is_some() {
            return Err(invalid("mac: an interface in mode tun has no Ethernet address; leave it out, or attach with mode veth".into()));
        }
        if mode == AttachMode::Tun && inner.pods.list().filter(|pod| pod.mode == AttachMode::Tun).count() >= PODS_MAX {
            return Err(error(FAILED, PodTunError::Full.to_string()));
        }
        if mode == AttachMode::Tun && request.addresses == Addresses::Later {
            return Err(invalid("ipam dhcp needs an interface that broadcasts, which one in mode tun does not; attach with mode veth".into()));
        }
        if request.masquerade == Some(true) && self.config.masquerade.is_none() {
            return Err(invalid("ipMasq: true, but `masquerade: false` in this node's podgate.yaml switches it off".into()));
        }
        let default_route = match request.default_route {
            None => DefaultRoute::IfFree,
            Some(true) => DefaultRoute::Yes,
            Some(false) => DefaultRoute::No,
        };
        let mut targets = targets(&request.routes)?;
        if let Addresses::Given(given) = &request.addresses {
            targets.extend(self::targets(&given.routes)?);
        }
        if default_route == DefaultRoute::No && targets.is_empty() {
            targets.extend(self.config.pod_cidrs.iter().copied().map(Target::from));
        }
        let options = PodOptions { masquerade: request.masquerade, port_mappings: request.port_mappings.clone(), bandwidth: request.bandwidth };
        super::host_ports::refuse(&options.port_mappings, &inner)?;
        super::limits::refuse(options.bandwidth.as_ref())?;
        Ok(AttachSpec {
            id,
            name: request.attachment.name.clone().unwrap_or_else(|| "-".into()),
            network: request.attachment.network.clone(),
            attempt: request.attempt,
            mode,
            netns_path: if request.netns.is_empty() { request.attachment.sandbox.clone() } else { request.netns.clone() },
            ifname: request.attachment.ifname.clone(),
            addresses: Vec::new(),
            mac,
            mtu,
            gso_max_size: GSO_MAX_SIZE,
            default_route,
            targets,
            options,
        })
    }

    /// The addresses that the pod gets, recorded as its own. None where they come later.
    fn addresses(&self, owner: &Owner, wanted: &Addresses) -> Result<Vec<IpAddr>, Response> {
        match wanted {
            Addresses::Own { pool, wanted } => {
                let wish = Wish { pool: pool.clone(), wanted: wanted.clone() };
                Ok(self.inner.borrow_mut().ipam.allocate(owner, &wish).map_err(no_address)?.addresses)
            }
            Addresses::Given(given) => self.given(owner, given),
            Addresses::Later if self.config.dhcp_servers.is_empty() => {
                let message = "a pod has no link to a DHCP server, and there is none to relay to: name it in this node's podgate.yaml, as in `dhcp: {servers: [192.0.2.53]}`";
                Err(error(INVALID_CONFIG, message.into()))
            }
            Addresses::Later => Ok(Vec::new()),
        }
    }

    /// A plugin's addresses, once it is sure that they are this node's to give.
    fn given(&self, owner: &Owner, given: &Given) -> Result<Vec<IpAddr>, Response> {
        let addresses = addresses_of(given)?;
        for v4 in [true, false] {
            if addresses.iter().filter(|ip| ip.is_ipv4() == v4).count() > 1 {
                let message = format!("ipam {} gave more than one address of a family; a pod has one of each on an interface", given.plugin);
                return Err(error(INVALID_CONFIG, message));
            }
        }
        if addresses.is_empty() {
            return Err(error(INVALID_CONFIG, format!("ipam {} gave no address", given.plugin)));
        }
        self.inner.borrow_mut().ipam.claim(owner, &addresses, &given.plugin).map_err(no_address)?;
        Ok(addresses)
    }

    /// Whether it is sure that no other node gives out these addresses.
    fn may_give_out(&self, addresses: &[IpAddr]) -> Result<(), Response> {
        let Some(tenure) = &self.tenure else { return Ok(()) };
        match addresses.iter().find(|address| !tenure.borrow().covers(**address)) {
            None => Ok(()),
            Some(address) => {
                let message = format!(
                    "{address} is not given out: this node cannot prove to the cluster's etcd that the block is still its own. It is registered again as                      soon as etcd answers; `podgate status` says what is missing"
                );
                Err(error(TRY_AGAIN, message))
            }
        }
    }

    fn release(&self, owner: &Owner) {
        if let Err(e) = self.inner.borrow_mut().ipam.release(owner) {
            tracing::error!(%owner, error = %e, "an address could not be given back; `podgate ipam check --fix` tries again");
        }
    }

    /// The result of a CNI ADD.
    fn result(&self, attachment: &Attachment, pod: &Attached) -> Value {
        let sandbox = if pod.netns_path.is_empty() { &attachment.sandbox } else { &pod.netns_path };
        // Without an Ethernet address it has zeros, as the `loopback` plugin says it: podman refuses a result without any.
        let interface = |name: &str, mac: Mac, sandbox: String| Interface {
            name: name.to_owned(),
            mac: Some(mac.to_string()),
            mtu: Some(pod.mtu),
            sandbox: Some(sandbox),
        };
        let inner = self.inner.borrow();
        let gateway = |ip: &IpAddr| inner.compiled.snapshot.node.gateway_for(Addr::from(*ip)).map(|gateway| gateway.ip());
        let mut interfaces = Vec::new();
        if pod.mode == AttachMode::Veth {
            interfaces.push(interface(&pod.veth, pod.gateway_mac, self.config.netns().display().to_string()));
        }
        interfaces.push(interface(&pod.ifname, pod.pod_mac, sandbox.clone()));
        let own = interfaces.len() - 1;
        let ip = |ip: &IpAddr| Ip { address: routing::whole(*ip).to_string(), gateway: gateway(ip), interface: Some(own) };
        let attached = result::Attached { interfaces, ips: pod.addresses.iter().map(ip).collect(), routes: pod.routes.clone() };
        serde_json::to_value(attached).expect("plain data is always JSON")
    }
}

fn addresses_of(given: &Given) -> Result<Vec<IpAddr>, Response> {
    given.ips.iter().map(|ip| address(&ip.address)).collect()
}

/// An address with its prefix's length, as CNI results have it.
fn address(text: &str) -> Result<IpAddr, Response> {
    let parsed = text.parse::<IpNetwork>();
    parsed.map(|network| network.ip()).map_err(|e| error(INVALID_CONFIG, format!("{text:?} is not an address such as 10.244.1.5/32: {e}")))
}

fn targets(routes: &[Route]) -> Result<Vec<Target>, Response> {
    let target = |route: &Route| {
        let parsed = route.dst.parse::<IpNetwork>();
        let destination = parsed.map_err(|e| error(INVALID_CONFIG, format!("route to {:?}: {e}; write one as 198.51.100.0/24", route.dst)))?;
        let destination = IpNetwork::new(destination.network(), destination.prefix()).expect("the prefix of a valid network");
        Ok(Target { destination, mtu: route.mtu, advmss: route.advmss, metric: route.priority, table: route.table, scope: route.scope })
    };
    routes.iter().map(target).collect()
}

fn no_address(e: IpamError) -> Response {
    error(e.code(), e.to_string())
}

fn refusal(e: PodError) -> Response {
    let code = match e {
        PodError::InterfaceExists { .. } | PodError::AttachedAlready { .. } => INVALID_ENVIRONMENT,
        PodError::AddressTaken { .. } | PodError::NoAddress { .. } | PodError::DefaultRouteExists { .. } => INVALID_CONFIG,
        _ => FAILED,
    };
    error(code, e.to_string())
}

/// What names an attachment for ever after.
pub(super) fn id_of(attachment: &Attachment) -> String {
    format!("{}/{}", attachment.sandbox, attachment.ifname)
}

/// What is attached, as address management sees it. The self-test's own pod has an address that is never given out, and one that waits for
/// its addresses has none.
pub(super) fn holders(pods: &Pods) -> Vec<Holder> {
    let attached = pods.list().filter(|pod| pod.id != super::probe::ID && !pod.addresses.is_empty());
    attached.map(|pod| Holder { owner: owner(pod), addresses: pod.addresses.clone() }).collect()
}

/// Who has the addresses of an attachment.
fn owner(pod: &Attached) -> Owner {
    let (namespace, name) = pod.name.split_once('/').unwrap_or(("", &pod.name));
    let sandbox = pod.id.strip_suffix(&pod.ifname).and_then(|id| id.strip_suffix('/')).unwrap_or(&pod.id);
    Owner { namespace: namespace.into(), name: name.into(), netns: sandbox.into(), ifname: pod.ifname.clone() }
}

fn owner_of(attachment: &Attachment) -> Owner {
    let name = attachment.name.as_deref().unwrap_or("-");
    let (namespace, name) = name.split_once('/').unwrap_or(("", name));
    Owner { namespace: namespace.into(), name: name.into(), netns: attachment.sandbox.clone(), ifname: attachment.ifname.clone() }
}
