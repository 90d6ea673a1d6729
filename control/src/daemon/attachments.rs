//! Attaching and detaching namespaces: address, tables and veth, in that order, and all of it undone where one fails.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use podgate_cni::{Attachment, Response};
use podgate_core::addr::Addr;
use podgate_runtime::netns::{Netns, NetnsError};
use serde_json::{Value, json};

use super::Daemon;
use super::answers::error;
use crate::ipam::{Holder, Owner, Wish};
use crate::pods::{AttachSpec, Attached, Detached, Pods};
use crate::routing;

/// The largest frame that pods hand over: one send of the overlay takes 65,507 bytes, replicated headers included (design D2).
const GSO_MAX_SIZE: u32 = 62_000;

impl Daemon {
    /// Attaches a namespace: address, tables, veth, in that order, so that its first packet meets the right tables.
    pub(super) async fn attach(&self, attachment: &Attachment, netns: OwnedFd) -> Result<Value, Response> {
        let sandbox = &attachment.sandbox;
        let netns = Netns::from_fd(netns).map_err(|e| match e {
            NetnsError::NotANetns { found, .. } => {
                error(4, format!("{sandbox} is not a network namespace (found {found}); `ip netns add NAME` makes /run/netns/NAME"))
            }
            other => error(4, format!("{sandbox}: {other}")),
        })?;
        if crate::config::check_device_name(&attachment.ifname).is_err() {
            let name = &attachment.ifname;
            return Err(error(4, format!("`{name}` cannot be an interface's name; write 1 to 15 characters without `/`, `:` and blanks")));
        }
        for (own, whose) in [(&self.devices.node_netns, "the node's own"), (&self.devices.gateway_netns, "the gateway's own")] {
            if netns.id() == own.id() {
                return Err(error(
                    4,
                    format!("{sandbox} is {whose} network namespace, not a pod's; `ip netns add NAME` makes one at /run/netns/NAME"),
                ));
            }
        }
        let id = id_of(attachment);
        if self.inner.borrow().pods.find(&id).is_some() {
            return Err(error(4, format!("{} of {} is attached already; detach it first", attachment.ifname, attachment.sandbox)));
        }
        if self.inner.borrow().compiled.snapshot.node.node_pod_cidrs.is_empty() {
            return Err(error(11, "this node has no pod range yet; `podgate status` says what is missing".into()));
        }
        let owner = owner_of(attachment);
        let lease = self.inner.borrow_mut().ipam.allocate(&owner, &Wish::default()).map_err(|e| error(e.code(), e.to_string()))?;
        match self.plug(&id, attachment.name.as_deref().unwrap_or("-"), &attachment.ifname, lease.addresses.clone(), &netns).await {
            Ok(attached) => {
                tracing::info!(pod = %attached.name, addresses = ?attached.addresses, veth = %attached.veth, "attached");
                Ok(self.cni_result(attachment, &attached))
            }
            Err(e) => {
                if let Err(e) = self.inner.borrow_mut().ipam.release(&owner) {
                    tracing::error!(error = %e, "the address of a failed attachment could not be released");
                }
                Err(error(100, e.to_string()))
            }
        }
    }

    /// Makes the pod known to the workers, then to the kernel.
    pub(super) async fn plug(&self, id: &str, name: &str, ifname: &str, addresses: Vec<IpAddr>, netns: &Netns) -> anyhow::Result<Attached> {
        let spec = {
            let inner = self.inner.borrow();
            AttachSpec {
                id: id.to_owned(),
                name: name.to_owned(),
                ifname: ifname.to_owned(),
                addresses,
                mac: None,
                mtu: self.pod_mtu(&inner.machine),
                gso_max_size: GSO_MAX_SIZE,
                routes: Vec::new(),
            }
        };
        let attached = self.inner.borrow_mut().pods.attach(netns, &spec)?;
        // At once: the reconciler takes rules that it does not know for leftovers.
        self.route();
        self.refresh().await;
        Ok(attached)
    }

    pub(super) async fn detach(&self, attachment: &Attachment) -> Result<Value, Response> {
        let detached = self.inner.borrow_mut().pods.detach(&id_of(attachment)).map_err(|e| error(100, e.to_string()))?;
        // Its flows end with the publication, before its address can be given to anybody else.
        self.refresh().await;
        {
            // The caller need not know the pod's name any more: sandbox and interface tell whose lease it is.
            self.inner.borrow_mut().ipam.release(&owner_of(attachment)).map_err(|e| error(100, e.to_string()))?;
        }
        let gone = match detached {
            Detached::Gone(pod) => {
                tracing::info!(pod = %pod.name, addresses = ?pod.addresses, "detached");
                true
            }
            _ => false,
        };
        Ok(json!({ "detached": gone }))
    }

    /// The result of a CNI ADD, version 1.0.0 (CNI SPEC.md, "Success").
    fn cni_result(&self, attachment: &Attachment, attached: &Attached) -> Value {
        let ips = attached.addresses.iter().map(|ip| {
            let gateway = self.inner.borrow().compiled.snapshot.node.gateway_for(Addr::from(*ip)).map(|g| g.to_string());
            json!({"address": routing::whole(*ip).to_string(), "gateway": gateway, "interface": 1})
        });
        let routes = attached.addresses.iter().map(|ip| json!({"dst": if ip.is_ipv4() { "0.0.0.0/0" } else { "::/0" }}));
        json!({
            "cniVersion": "1.0.0",
            "interfaces": [
                {"name": attached.veth, "mac": attached.gateway_mac.to_string(), "sandbox": self.config.netns()},
                {"name": attached.ifname, "mac": attached.pod_mac.to_string(), "sandbox": attachment.sandbox},
            ],
            "ips": ips.collect::<Vec<_>>(),
            "routes": routes.collect::<Vec<_>>(),
            "dns": {},
        })
    }
}

fn id_of(attachment: &Attachment) -> String {
    format!("{}/{}", attachment.sandbox, attachment.ifname)
}

/// What is attached, as address management sees it. The self-test's own pod has an address that is never given out.
pub(super) fn holders(pods: &Pods) -> Vec<Holder> {
    let owner = |pod: &Attached| {
        let (namespace, name) = pod.name.split_once('/').unwrap_or(("", &pod.name));
        let sandbox = pod.id.strip_suffix(&pod.ifname).and_then(|id| id.strip_suffix('/')).unwrap_or(&pod.id);
        Owner { namespace: namespace.into(), name: name.into(), netns: sandbox.into(), ifname: pod.ifname.clone() }
    };
    let attached = pods.list().filter(|pod| pod.id != super::probe::ID);
    attached.map(|pod| Holder { owner: owner(pod), addresses: pod.addresses.clone() }).collect()
}

fn owner_of(attachment: &Attachment) -> Owner {
    let name = attachment.name.as_deref().unwrap_or("-");
    let (namespace, name) = name.split_once('/').unwrap_or(("", name));
    Owner { namespace: namespace.into(), name: name.into(), netns: attachment.sandbox.clone(), ifname: attachment.ifname.clone() }
}
