//! Ranges that the API server gives services their addresses from.

use std::sync::Arc;

use ipnetwork::IpNetwork;
use k8s_openapi::api::networking::v1;

use super::{Blame, ModelError};

/// A `networking.k8s.io/v1` `ServiceCIDR`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceCidr {
    /// Its name.
    pub name: Arc<str>,
    /// Its ranges, at most one of each family.
    pub cidrs: Vec<IpNetwork>,
}

impl ServiceCidr {
    /// From the Kubernetes object.
    pub fn from_k8s(cidr: &v1::ServiceCIDR) -> Result<ServiceCidr, ModelError> {
        let name = cidr.metadata.name.clone().unwrap_or_default();
        let blame = Blame { kind: "ServiceCIDR", name: &name };
        if name.is_empty() {
            return Err(blame.error("metadata.name", "is missing; every object needs a name"));
        }
        let listed = cidr.spec.as_ref().and_then(|spec| spec.cidrs.clone()).unwrap_or_default();
        let cidrs = listed.iter().map(|cidr| blame.cidr("spec.cidrs", cidr)).collect::<Result<Vec<_>, _>>()?;
        Ok(ServiceCidr { name: name.as_str().into(), cidrs })
    }
}
