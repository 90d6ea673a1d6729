//! Pods as the workers see them, with their bandwidth limits.
//!
//! A limit's state is that of one attachment: it must outlive every snapshot, or each publication would give the pod its burst anew.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::Arc;

use podgate_cni::Response;
use podgate_cni::protocol::Bandwidth;
use podgate_core::fib::Pod;
use podgate_core::shape::{Limits, Rate};

use super::answers::error;
use crate::pods::Pods;

/// CNI SPEC.md, "Error": invalid network config.
const INVALID_CONFIG: u32 = 7;

/// The lowest limit, in bits per second: below it a single packet takes more than ten seconds.
const RATE_MIN: u64 = 1_000;

/// The limits of attached pods, by veth: its name is never used twice.
#[derive(Debug, Default)]
pub(super) struct PodLimits {
    by_veth: BTreeMap<String, Arc<Limits>>,
}

impl PodLimits {
    /// Every pod by its addresses.
    pub(super) fn tables(&mut self, pods: &Pods) -> Vec<(IpAddr, Pod)> {
        self.by_veth.retain(|veth, _| pods.list().any(|pod| pod.veth == *veth));
        let mut tables = Vec::new();
        for pod in pods.list() {
            let new = || pod.options.bandwidth.map(|bandwidth| Arc::new(limits_of(&bandwidth)));
            let limits = self.by_veth.get(&pod.veth).cloned().or_else(new);
            if let Some(limits) = &limits {
                self.by_veth.insert(pod.veth.clone(), limits.clone());
            }
            let masquerade = pod.options.masquerade.unwrap_or(true);
            tables.extend(pod.addresses.iter().map(|ip| (*ip, Pod { masquerade, limits: limits.clone(), tun: pod.tun(), ..Pod::new(pod.mtu) })));
        }
        tables
    }
}

fn limits_of(bandwidth: &Bandwidth) -> Limits {
    let rate = |bits: u64, burst_bits| NonZeroU64::new(bits).map(|bits_per_second| Rate { bits_per_second, burst_bits });
    Limits::new(rate(bandwidth.ingress_rate, bandwidth.ingress_burst), rate(bandwidth.egress_rate, bandwidth.egress_burst))
}

/// Refuses limits that nobody can have meant.
pub(super) fn refuse(bandwidth: Option<&Bandwidth>) -> Result<(), Response> {
    let rates = bandwidth.map(|bandwidth| [("ingressRate", bandwidth.ingress_rate), ("egressRate", bandwidth.egress_rate)]);
    match rates.into_iter().flatten().find(|(_, rate)| (1..RATE_MIN).contains(rate)) {
        Some((key, rate)) => {
            Err(error(INVALID_CONFIG, format!("bandwidth: {key} {rate} is below {RATE_MIN} bits per second; write more, or 0 for no limit")))
        }
        None => Ok(()),
    }
}
