//! Nodes: whose pod ranges and addresses are where, and how to reach the gateway there.

use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1;

use super::{Blame, ModelError};
use crate::config::Overlay;

/// The annotation by which a gateway announces its underlay addresses, separated by commas.
pub const UNDERLAY_ANNOTATION: &str = "podgate.io/underlay";

/// The annotation by which a gateway announces its overlay: `port=4790,vni=1,mtu=1500`, with `directReturnVni=2` where it takes part in direct
/// return; or `none`.
pub const OVERLAY_ANNOTATION: &str = "podgate.io/overlay";

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// The taint that the cluster autoscaler puts on a node that it is about to delete (Kubernetes `pkg/proxy/healthcheck/proxy_health.go`).
const TO_BE_DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: Arc<str>,
    /// Its pod ranges.
    pub pod_cidrs: Vec<IpNetwork>,
    /// Its `InternalIP`s, in the order given: the first of a family is the primary one.
    pub addresses: Vec<IpAddr>,
    /// Its zone (`topology.kubernetes.io/zone`).
    pub zone: Option<Arc<str>>,
    /// What its gateway announced.
    pub announcement: Announcement,
    /// Why load balancers are to send it nothing new, if they are not to.
    pub leaving: Option<Leaving>,
}

/// Why a node is about to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// Its object is being deleted.
    Deleted,
    /// The cluster autoscaler's taint says so.
    Autoscaler,
}

/// What a node's gateway says of its overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Announcement {
    /// Nothing. Where announcements are optional (a directory source), the node is a peer with this node's own port and VNI if it has pod
    /// ranges and an `InternalIP`; elsewhere it is outside.
    Silent,
    /// It is not a peer, whatever else is known of it.
    None,
    /// Its overlay.
    Overlay {
        /// Underlay addresses; empty means the `InternalIP`s.
        underlay: Vec<IpAddr>,
        /// UDP port.
        port: Option<u16>,
        /// VNI.
        vni: Option<u32>,
        /// MTU of its underlay, in bytes.
        mtu: Option<u32>,
        /// The VNI by which it takes what is handed on for direct return, if it does.
        direct_return_vni: Option<u32>,
    },
}

impl Announcement {
    /// The annotations, by name, that say this of a gateway: its underlay addresses, its overlay, and its underlay's MTU in bytes.
    pub fn annotations(underlay: &[IpAddr], overlay: &Overlay, mtu: u32) -> [(&'static str, String); 2] {
        let addresses = underlay.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let Overlay { port, vni, direct_return_vni } = overlay;
        let direct = direct_return_vni.map(|vni| format!(",directReturnVni={vni}")).unwrap_or_default();
        [(UNDERLAY_ANNOTATION, addresses), (OVERLAY_ANNOTATION, format!("port={port},vni={vni},mtu={mtu}{direct}"))]
    }
}

impl Node {
    /// From the Kubernetes object.
    pub fn from_k8s(node: &v1::Node) -> Result<Node, ModelError> {
        let name = node.metadata.name.clone().unwrap_or_default();
        let blame = Blame { kind: "Node", name: &name };
        if name.is_empty() {
            return Err(blame.error("metadata.name", "is missing; write the name that the node's gateway runs under"));
        }
        let spec = node.spec.as_ref();
        let listed = spec.and_then(|s| s.pod_cidrs.clone()).unwrap_or_default();
        let single = spec.and_then(|s| s.pod_cidr.clone()).filter(|c| !c.is_empty());
        let cidrs = if listed.is_empty() { single.into_iter().collect() } else { listed };
        let pod_cidrs = cidrs.iter().map(|c| blame.cidr("spec.podCIDRs", c)).collect::<Result<Vec<_>, _>>()?;
        let mut addresses = Vec::new();
        for address in node.status.as_ref().and_then(|s| s.addresses.as_ref()).into_iter().flatten() {
            if address.type_ == "InternalIP" {
                let ip = blame.ip("status.addresses", &address.address)?;
                if !addresses.contains(&ip) {
                    addresses.push(ip);
                }
            }
        }
        let label = |key: &str| node.metadata.labels.as_ref().and_then(|l| l.get(key)).filter(|v| !v.is_empty());
        let annotation = |key: &str| node.metadata.annotations.as_ref().and_then(|a| a.get(key)).map(|v| v.trim());
        let announcement = announcement(&blame, annotation(UNDERLAY_ANNOTATION), annotation(OVERLAY_ANNOTATION))?;
        let tainted = spec.and_then(|s| s.taints.as_ref()).into_iter().flatten().any(|taint| taint.key == TO_BE_DELETED_TAINT);
        let leaving = match &node.metadata.deletion_timestamp {
            Some(_) => Some(Leaving::Deleted),
            None => tainted.then_some(Leaving::Autoscaler),
        };
        let zone = label(ZONE_LABEL).map(|z| z.as_str().into());
        Ok(Node { zone, name: name.as_str().into(), pod_cidrs, addresses, announcement, leaving })
    }

    /// The underlay addresses that its gateway is reached by.
    pub fn underlay(&self) -> &[IpAddr] {
        match &self.announcement {
            Announcement::Overlay { underlay, .. } if !underlay.is_empty() => underlay,
            _ => &self.addresses,
        }
    }
}

fn announcement(blame: &Blame<'_>, underlay: Option<&str>, overlay: Option<&str>) -> Result<Announcement, ModelError> {
    if overlay == Some("none") {
        return Ok(Announcement::None);
    }
    if underlay.is_none() && overlay.is_none() {
        return Ok(Announcement::Silent);
    }
    let underlay = underlay.unwrap_or_default().split(',').map(str::trim).filter(|a| !a.is_empty());
    let underlay = underlay.map(|a| blame.ip(UNDERLAY_ANNOTATION, a)).collect::<Result<Vec<_>, _>>()?;
    let (mut port, mut vni, mut mtu, mut direct_return_vni) = (None, None, None, None);
    for pair in overlay.unwrap_or_default().split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let malformed = || blame.error(OVERLAY_ANNOTATION, format!("`{pair}` is not understood; write port=4790,vni=1,mtu=1500, or none"));
        let (key, value) = pair.split_once('=').ok_or_else(malformed)?;
        let number: u32 = value.trim().parse().map_err(|_| malformed())?;
        match key.trim() {
            "port" => port = Some(u16::try_from(number).ok().filter(|p| *p != 0).ok_or_else(malformed)?),
            "vni" if number < 1 << 24 => vni = Some(number),
            "directReturnVni" if number < 1 << 24 => direct_return_vni = Some(number),
            // RFC 8200 §5: no link that carries IPv6 has a smaller one; and the outer packet's length is 16 bits.
            "mtu" if (1280..=65535).contains(&number) => mtu = Some(number),
            "vni" | "directReturnVni" | "mtu" => return Err(malformed()),
            // A newer gateway may announce more than this one knows.
            _ => {}
        }
    }
    Ok(Announcement::Overlay { underlay, port, vni, mtu, direct_return_vni })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(json: serde_json::Value) -> Result<Node, ModelError> {
        Node::from_k8s(&serde_json::from_value(json).unwrap())
    }

    #[test]
    fn a_node_is_read_with_its_ranges_addresses_zone_and_announcement() {
        let node = node(serde_json::json!({
            "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "a"}, "annotations": {
                "podgate.io/underlay": "192.0.2.1,2001:db8::1", "podgate.io/overlay": "port=4790,vni=7,mtu=9000,color=3"}},
            "spec": {"podCIDRs": ["10.244.1.9/24", "fd00:1::/64"]},
            "status": {"addresses": [{"type": "Hostname", "address": "n1"}, {"type": "InternalIP", "address": "192.0.2.9"}]}
        }))
        .unwrap();
        assert_eq!(node.pod_cidrs, ["10.244.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()]);
        assert_eq!(node.addresses, ["192.0.2.9".parse::<IpAddr>().unwrap()]);
        assert_eq!(node.zone.as_deref(), Some("a"));
        assert_eq!(node.underlay(), ["192.0.2.1".parse::<IpAddr>().unwrap(), "2001:db8::1".parse().unwrap()]);
        let Announcement::Overlay { port, vni, mtu, .. } = node.announcement else { panic!("announced") };
        assert_eq!((port, vni, mtu), (Some(4790), Some(7), Some(9000)));
    }

    #[test]
    fn what_a_gateway_announces_is_read_back_as_it_was_meant() {
        let underlay: Vec<IpAddr> = vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        for direct_return_vni in [None, Some(8)] {
            let overlay = Overlay { port: 4790, vni: 7, direct_return_vni };
            let annotations: std::collections::BTreeMap<_, _> = Announcement::annotations(&underlay, &overlay, 9000).into();
            let node = node(serde_json::json!({"metadata": {"name": "n1", "annotations": annotations}})).unwrap();
            let meant = Announcement::Overlay { underlay: underlay.clone(), port: Some(4790), vni: Some(7), mtu: Some(9000), direct_return_vni };
            assert_eq!(node.announcement, meant);
        }
    }

    #[test]
    fn podcidr_counts_where_podcidrs_is_absent() {
        let node = node(serde_json::json!({"metadata": {"name": "n1"}, "spec": {"podCIDR": "10.244.1.0/24"}})).unwrap();
        assert_eq!(node.pod_cidrs, ["10.244.1.0/24".parse().unwrap()]);
        assert_eq!(node.announcement, Announcement::Silent);
    }

    #[test]
    fn a_node_leaves_by_its_deletion_or_the_autoscalers_taint_and_by_no_other() {
        let leaving = |metadata: serde_json::Value, taints: serde_json::Value| {
            node(serde_json::json!({"metadata": metadata, "spec": {"taints": taints}})).unwrap().leaving
        };
        let here = || serde_json::json!({"name": "n1"});
        let taint = |key: &str| serde_json::json!([{"key": key, "effect": "NoSchedule"}]);
        assert_eq!(leaving(here(), serde_json::json!([])), None);
        assert_eq!(leaving(here(), taint("other")), None);
        assert_eq!(leaving(here(), taint("ToBeDeletedByClusterAutoscaler")), Some(Leaving::Autoscaler));
        let deleted = serde_json::json!({"name": "n1", "deletionTimestamp": "2026-11-25T12:00:00Z"});
        assert_eq!(leaving(deleted, serde_json::json!([])), Some(Leaving::Deleted));
    }

    #[test]
    fn errors_name_the_node_the_field_and_the_value() {
        let error = node(serde_json::json!({"metadata": {"name": "n1"}, "spec": {"podCIDRs": ["10.244.1"]}})).unwrap_err();
        assert_eq!(error.to_string(), "Node n1: spec.podCIDRs: `10.244.1` is not a CIDR; write one as 10.244.1.0/24 or fd00::/64");
        let error = node(serde_json::json!({"metadata": {"name": "n1", "annotations": {"podgate.io/overlay": "vni=16777216"}}})).unwrap_err();
        assert_eq!(error.to_string(), "Node n1: podgate.io/overlay: `vni=16777216` is not understood; write port=4790,vni=1,mtu=1500, or none");
    }
}
