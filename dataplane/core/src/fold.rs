//! The hash of the tables that only the cluster's own objects fill: pods by address, frontends by what is dialled.
//!
//! Folded multiplication: both halves of a 128-bit product, so that every bit of the key reaches every bit of the hash. A key's hash costs
//! two or three multiplications, where the standard library's SipHash costs more than the rest of the lookup. It resists nobody who chooses
//! what is *in* a table; a sender of packets chooses only what is looked up, and a lookup is no longer than what is in the table makes it.
//! The flow table, which senders fill, has a keyed hash of its own ([`crate::flow`]).

use std::hash::{BuildHasherDefault, Hasher};

/// A map with this hash.
pub type FoldMap<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<FoldHasher>>;

/// The state of one hash.
#[derive(Clone, Copy, Debug, Default)]
pub struct FoldHasher(u64);

/// Odd, without a pattern: 2^64 divided by the golden ratio (Knuth 6.4), and the fraction of the square root of 3.
const FACTORS: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xbb67_ae85_84ca_a73b];

/// The hash of one address, in one multiplication.
#[inline]
pub fn hash_u128(value: u128) -> u64 {
    FoldHasher::mix((value >> 64) as u64 ^ value as u64 ^ FACTORS[1], FACTORS[0])
}

impl FoldHasher {
    #[inline]
    fn mix(a: u64, b: u64) -> u64 {
        let product = u128::from(a) * u128::from(b);
        (product >> 64) as u64 ^ product as u64
    }
}

impl Hasher for FoldHasher {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    #[inline]
    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }

    #[inline]
    fn write_u16(&mut self, value: u16) {
        self.write_u64(value.into());
    }

    #[inline]
    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }

    #[inline]
    fn write_u64(&mut self, value: u64) {
        self.0 = FoldHasher::mix(self.0 ^ value ^ FACTORS[1], FACTORS[0]);
    }

    #[inline]
    fn write_u128(&mut self, value: u128) {
        self.write_u64((value >> 64) as u64);
        self.write_u64(value as u64);
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::hash::BuildHasher;

    use super::*;
    use crate::addr::protocol;
    use crate::service::FrontendKey;
    use crate::testing::addr;

    fn hash(key: impl std::hash::Hash) -> u64 {
        BuildHasherDefault::<FoldHasher>::default().hash_one(key)
    }

    /// A map looks at the low bits for the place and at the high seven for the tag.
    #[test]
    fn neighbouring_addresses_spread_over_places_and_tags() {
        for network in ["10.32.1.", "fd00:32::"] {
            let (mut places, mut tags) = ([0; 64], [0; 128]);
            for host in 0..256 {
                let text = if network.contains(':') { format!("{network}{host:x}") } else { format!("{network}{host}") };
                let hash = hash(addr(&text));
                places[hash as usize % 64] += 1;
                tags[(hash >> 57) as usize] += 1;
            }
            // Four and two on average.
            assert!(places.iter().all(|count| *count <= 14), "{network} {places:?}");
            assert!(tags.iter().all(|count| *count <= 10), "{network} {tags:?}");
        }
    }

    #[test]
    fn ports_and_protocols_of_one_address_differ() {
        let mut seen = std::collections::HashSet::new();
        for protocol in [protocol::TCP, protocol::UDP, protocol::SCTP] {
            for port in 0..1000 {
                assert!(seen.insert(hash(FrontendKey { addr: addr("10.96.0.1"), port, protocol })));
            }
        }
    }
}
