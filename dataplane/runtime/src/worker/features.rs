//! Offloads that the kernel promised, and what it did with them.
//!
//! Some kernels take the flags and then refuse every such write. One refusal proves nothing (a pod can craft a frame that the kernel
//! will not take), so the frame is cut in software, and an offload is switched off only when the kernel has refused it several times
//! and never once taken it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Refusals, without one success, after which an offload is off for good.
const REFUSALS_MAX: u32 = 8;

/// One offload in one direction.
#[derive(Debug, Default)]
pub(crate) struct Offer {
    taken: AtomicBool,
    off: AtomicBool,
    refusals: AtomicU32,
}

// All accesses are Relaxed: each is a hint for its own sake, and no other memory depends on it.
impl Offer {
    /// Whether to use it.
    #[inline]
    pub(crate) fn on(&self) -> bool {
        !self.off.load(Ordering::Relaxed)
    }

    /// The kernel took it.
    #[inline]
    pub(crate) fn took(&self) {
        if !self.taken.load(Ordering::Relaxed) {
            self.taken.store(true, Ordering::Relaxed);
        }
    }

    /// The kernel refused it; true if it is off from now on.
    #[cold]
    pub(crate) fn refused(&self) -> bool {
        let refusals = self.refusals.fetch_add(1, Ordering::Relaxed) + 1;
        if self.taken.load(Ordering::Relaxed) || refusals < REFUSALS_MAX {
            return false;
        }
        self.off.store(true, Ordering::Relaxed);
        true
    }

    /// The kernel never promised it.
    pub(crate) fn absent(&self) {
        self.off.store(true, Ordering::Relaxed);
    }

    pub(crate) fn refusals(&self) -> u32 {
        self.refusals.load(Ordering::Relaxed)
    }
}

/// What workers note of each offload.
#[derive(Debug, Default)]
pub(crate) struct Offers {
    /// TCP superframes to the TUNs.
    pub(crate) tso: Offer,
    /// UDP superframes to the TUNs.
    pub(crate) uso: Offer,
    /// `UDP_SEGMENT` to peers.
    pub(crate) udp_gso: Offer,
    /// `UDP_GRO` from peers.
    pub(crate) udp_gro: Offer,
}

/// Whether an offload is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureState {
    /// It is in use.
    pub on: bool,
    /// How often the kernel refused it at run time; frames were cut in software then.
    pub refusals: u32,
}

/// The offloads in use, for status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureStatus {
    /// TCP superframes from and to the TUNs.
    pub tso: FeatureState,
    /// UDP superframes from and to the TUNs (Linux 6.2).
    pub uso: FeatureState,
    /// Many segments to a peer in one send (`UDP_SEGMENT`).
    pub udp_gso: FeatureState,
    /// Many segments from a peer in one receive (`UDP_GRO`).
    pub udp_gro: FeatureState,
}

impl Offers {
    pub(crate) fn status(&self) -> FeatureStatus {
        let state = |offer: &Offer| FeatureState { on: offer.on(), refusals: offer.refusals() };
        FeatureStatus { tso: state(&self.tso), uso: state(&self.uso), udp_gso: state(&self.udp_gso), udp_gro: state(&self.udp_gro) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_alone_switch_an_offload_off() {
        let offer = Offer::default();
        for _ in 1..REFUSALS_MAX {
            assert!(!offer.refused());
        }
        assert!(offer.on());
        assert!(offer.refused());
        assert!(!offer.on());
    }

    #[test]
    fn an_offload_that_once_worked_survives_any_number_of_crafted_frames() {
        let offer = Offer::default();
        offer.took();
        for _ in 0..10 * REFUSALS_MAX {
            assert!(!offer.refused());
        }
        assert!(offer.on());
    }
}
