//! The kinds that the server knows.

/// A kind, and what its paths are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource {
    /// The API group; empty for the core.
    pub group: &'static str,
    /// In paths.
    pub plural: &'static str,
    /// In `kubectl get SINGULAR`.
    pub singular: &'static str,
    /// In objects.
    pub kind: &'static str,
    /// Abbreviations that `kubectl` takes.
    pub short: &'static [&'static str],
    /// Whether its objects are in namespaces.
    pub namespaced: bool,
    /// Whether its status is written by a path of its own.
    pub status: bool,
}

const fn resource(group: &'static str, plural: &'static str, singular: &'static str, kind: &'static str) -> Resource {
    Resource { group, plural, singular, kind, short: &[], namespaced: true, status: false }
}

/// Every kind, each in version `v1` of its group.
pub static RESOURCES: [Resource; 11] = [
    Resource { short: &["ns"], namespaced: false, status: true, ..resource("", "namespaces", "namespace", "Namespace") },
    Resource { short: &["no"], namespaced: false, status: true, ..resource("", "nodes", "node", "Node") },
    Resource { short: &["svc"], status: true, ..resource("", "services", "service", "Service") },
    Resource { short: &["cm"], ..resource("", "configmaps", "configmap", "ConfigMap") },
    Resource { short: &["sa"], ..resource("", "serviceaccounts", "serviceaccount", "ServiceAccount") },
    Resource { short: &["ds"], status: true, ..resource("apps", "daemonsets", "daemonset", "DaemonSet") },
    Resource { namespaced: false, ..resource("rbac.authorization.k8s.io", "clusterroles", "clusterrole", "ClusterRole") },
    Resource { namespaced: false, ..resource("rbac.authorization.k8s.io", "clusterrolebindings", "clusterrolebinding", "ClusterRoleBinding") },
    resource("discovery.k8s.io", "endpointslices", "endpointslice", "EndpointSlice"),
    Resource { short: &["netpol"], ..resource("networking.k8s.io", "networkpolicies", "networkpolicy", "NetworkPolicy") },
    Resource { namespaced: false, status: true, ..resource("networking.k8s.io", "servicecidrs", "servicecidr", "ServiceCIDR") },
];

/// The groups beside the core.
pub const GROUPS: [&str; 4] = ["apps", "rbac.authorization.k8s.io", "discovery.k8s.io", "networking.k8s.io"];

impl Resource {
    /// `v1`, or `GROUP/v1`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { "v1".into() } else { format!("{}/v1", self.group) }
    }

    /// `services`, or `endpointslices.discovery.k8s.io`.
    pub fn qualified(&self) -> String {
        if self.group.is_empty() { self.plural.into() } else { format!("{}.{}", self.plural, self.group) }
    }
}

/// The resource of this group and plural.
pub fn find(group: &str, plural: &str) -> Option<&'static Resource> {
    RESOURCES.iter().find(|resource| resource.group == group && resource.plural == plural)
}
