//! The kinds of objects that are read from the API server, where they are there, and what is kept of them.

use k8s_openapi::api::core::v1 as core_v1;
use k8s_openapi::api::discovery::v1 as discovery_v1;
use k8s_openapi::api::networking::v1 as networking_v1;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::condition::Network;
use crate::model::{ModelError, OVERLAY_ANNOTATION, Object, ObjectKey, ObjectName, UNDERLAY_ANNOTATION};

/// A kind of object in the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    /// As objects call it.
    pub name: &'static str,
    /// As rules call it (RBAC).
    pub resource: &'static str,
    /// Where the objects of every namespace are.
    pub path: &'static str,
    /// Whether names and labels are all that is asked for (`PartialObjectMetadata`).
    pub metadata_only: bool,
    /// Whether a server may be without it.
    pub optional: bool,
}

/// Every kind. `deploy/kubernetes/rbac.yaml` allows `list` and `watch` on exactly these.
pub(super) const KINDS: [Kind; 5] = [
    Kind { name: "Node", resource: "nodes", path: NODES, metadata_only: false, optional: false },
    Kind { name: "Service", resource: "services", path: "/api/v1/services", metadata_only: false, optional: false },
    Kind {
        name: "EndpointSlice",
        resource: "endpointslices.discovery.k8s.io",
        path: "/apis/discovery.k8s.io/v1/endpointslices",
        metadata_only: false,
        optional: false,
    },
    // Seen, not enforced: that one is there is all that is to be said of it.
    Kind {
        name: "NetworkPolicy",
        resource: "networkpolicies.networking.k8s.io",
        path: "/apis/networking.k8s.io/v1/networkpolicies",
        metadata_only: true,
        optional: true,
    },
    // Kubernetes 1.33 and later have it in v1.
    Kind {
        name: "ServiceCIDR",
        resource: "servicecidrs.networking.k8s.io",
        path: "/apis/networking.k8s.io/v1/servicecidrs",
        metadata_only: false,
        optional: true,
    },
];

/// Where nodes are.
pub(super) const NODES: &str = "/api/v1/nodes";

/// An object as it came, reduced to what forwarding needs.
#[derive(Debug)]
pub(super) struct Read {
    /// Which object.
    pub key: ObjectKey,
    /// What it says, or what is wrong with it.
    pub object: Result<Object, String>,
    /// What a node's annotations say of its gateway, word for word: underlay and overlay.
    pub announced: [Option<String>; 2],
    /// What a node says of its network.
    pub network: Option<Network>,
}

impl Kind {
    /// Reads an object of this kind. Without a name it is no object, and the whole answer is not to be trusted.
    pub fn read(&self, mut value: Value) -> Option<Read> {
        let key = self.key(&value)?;
        let network = (self.path == NODES).then(|| Network::of(&value));
        trim(&mut value);
        let annotation = |name: &str| value.pointer("/metadata/annotations")?.get(name)?.as_str().map(str::to_owned);
        let announced = if self.path == NODES { [annotation(UNDERLAY_ANNOTATION), annotation(OVERLAY_ANNOTATION)] } else { [None, None] };
        let object = match self.name {
            "Node" => decode(value, |node: core_v1::Node| Object::from_node(&node)),
            "Service" => decode(value, |service: core_v1::Service| Object::from_service(&service)),
            "EndpointSlice" => decode(value, |slice: discovery_v1::EndpointSlice| Object::from_slice(&slice)),
            "ServiceCIDR" => decode(value, |cidr: networking_v1::ServiceCIDR| Object::from_service_cidr(&cidr)),
            _ => Ok(Object::Unenforced(key.clone())),
        };
        Some(Read { key, object, announced, network })
    }

    /// The kind and name of an object of this kind.
    pub fn key(&self, value: &Value) -> Option<ObjectKey> {
        let metadata = value.get("metadata")?;
        let text = |key: &str| metadata.get(key).and_then(Value::as_str);
        let name = text("name").filter(|name| !name.is_empty())?;
        Some(ObjectKey { kind: self.name.into(), name: ObjectName::new(text("namespace").unwrap_or_default(), name) })
    }
}

/// Takes away what is large and not looked at before it is copied into types: field managers, images, volumes, conditions.
fn trim(value: &mut Value) {
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
        metadata.remove("ownerReferences");
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
        }
    }
    if let Some(status) = value.get_mut("status").and_then(Value::as_object_mut) {
        status.retain(|key, _| key == "addresses" || key == "loadBalancer");
    }
}

fn decode<T: DeserializeOwned>(value: Value, make: impl FnOnce(T) -> Result<Object, ModelError>) -> Result<Object, String> {
    let object = serde_json::from_value(value).map_err(|error| error.to_string())?;
    make(object).map_err(|error| format!("{}: {}", error.field, error.problem))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_node_keeps_its_addresses_and_loses_its_ballast() {
        let mut value = json!({
            "metadata": {"name": "n1", "managedFields": [{}], "annotations": {"podgate.io/overlay": "vni=x"}},
            "status": {"images": [{"names": ["a"]}], "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}], "conditions": 7}
        });
        trim(&mut value);
        assert_eq!(value["status"], json!({"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}));
        assert_eq!(value["metadata"], json!({"name": "n1", "annotations": {"podgate.io/overlay": "vni=x"}}));
        // A gateway's own announcement is seen even where the object as a whole makes no sense: it has to be mended.
        let read = KINDS[0].read(value).unwrap();
        assert_eq!(read.object.unwrap_err(), "podgate.io/overlay: `vni=x` is not understood; write port=4790,vni=1,mtu=1500, or none");
        assert_eq!(read.announced, [None, Some("vni=x".into())]);
        assert_eq!(read.network, Some(Network::default()));
        let conditions = json!([{"type": "Ready", "status": "True"}, {"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"}]);
        let read = KINDS[0].read(json!({"metadata": {"name": "n1", "uid": "7"}, "status": {"conditions": conditions}})).unwrap();
        assert_eq!(read.network, Some(Network { uid: "7".into(), status: Some("True".into()), reason: "NoRouteCreated".into() }));
    }

    #[test]
    fn an_answer_without_a_name_is_no_object() {
        assert!(KINDS[1].read(json!({"metadata": {"namespace": "default"}})).is_none());
        assert!(KINDS[1].read(json!({"spec": {}})).is_none());
    }
}
