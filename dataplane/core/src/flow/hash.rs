//! A tuple's keyed hash: NH, a sum of products of keyed words, folded to 64 bits by one more product.
//!
//! Whoever may open connections chooses tuples; a key drawn at each boot keeps them from choosing buckets. Two different tuples have the same
//! NH with a probability of 2^-64 over the key, whatever they are ("UMAC: Fast and Secure Message Authentication", Black, Halevi, Krawczyk,
//! Krovetz, Rogaway, theorem 4.2 with 64-bit words). The last step spreads it over all bits; like the fold of wyhash and foldhash it
//! has no proof, but it has a key of its own, and nothing of its outcome can be seen from outside: a lookup looks at two buckets whatever they
//! hold, and a tuple that finds both full is refused as if the table were. SipHash, made for hashes that are seen, costs six times as much.

use crate::addr::Tuple;
use crate::balance::finalize;

/// A tuple's hash under the table's key: which two buckets it may sit in, and its tag there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hash(pub(super) u64);

impl Hash {
    /// All of it, for the table of session affinity.
    #[inline]
    pub(crate) const fn word(self) -> u64 {
        self.0
    }

    /// The part that an index entry keeps, 16 bits and never 0; no bit of it takes part in the choice of buckets while there are 2^24 at most.
    #[inline]
    pub(super) const fn tag(self) -> u16 {
        let tag = (self.0 >> 48) as u16;
        if tag == 0 { 1 } else { tag }
    }

    /// The first of the two buckets among `buckets` (a power of two, at least 2): most keys sit there.
    #[inline]
    pub(super) const fn bucket(self, buckets: usize) -> usize {
        self.0 as usize & (buckets - 1)
    }

    /// The second bucket. It is not the first, since an odd distance is never zero.
    #[inline]
    pub(super) const fn second_bucket(self, buckets: usize) -> usize {
        (self.0 ^ (self.0 >> 24 | 1)) as usize & (buckets - 1)
    }
}

/// A tuple as five words; the same words stand in a record.
#[inline]
pub(super) const fn tuple_words(tuple: &Tuple) -> [u64; 5] {
    [
        (tuple.src.0 >> 64) as u64,
        tuple.src.0 as u64,
        (tuple.dst.0 >> 64) as u64,
        tuple.dst.0 as u64,
        tuple.src_port as u64 | (tuple.dst_port as u64) << 16 | (tuple.protocol as u64) << 32,
    ]
}

/// The words that a hash is keyed with, from the two that are drawn at each boot.
#[derive(Clone, Copy)]
pub(crate) struct Key([u64; 8]);

impl Key {
    /// Spreads two secret words over eight: each is the seed of a SplitMix64.
    #[inline]
    pub fn new(secret: [u64; 2]) -> Key {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        Key(std::array::from_fn(|n| finalize(secret[n % 2].wrapping_add(STEP.wrapping_mul(n as u64 / 2)))))
    }

    /// The tuple's hash.
    #[inline]
    pub fn hash(&self, tuple: &Tuple) -> Hash {
        let Key(key) = self;
        let [src_high, src_low, dst_high, dst_low, ports] = tuple_words(tuple);
        let src = product(src_high.wrapping_add(key[0]), src_low.wrapping_add(key[1]));
        let dst = product(dst_high.wrapping_add(key[2]), dst_low.wrapping_add(key[3]));
        let nh = src.wrapping_add(dst).wrapping_add(product(ports.wrapping_add(key[4]), key[5]));
        let folded = product((nh >> 64) as u64 ^ key[6], nh as u64 ^ key[7]);
        Hash((folded >> 64) as u64 ^ folded as u64)
    }
}

#[inline]
fn product(a: u64, b: u64) -> u128 {
    u128::from(a) * u128::from(b)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::addr::{Addr, protocol};

    const KEY: [u64; 2] = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];

    fn tuple(src: u128, dst: u128, src_port: u16, dst_port: u16) -> Tuple {
        Tuple { src: Addr(src), dst: Addr(dst), src_port, dst_port, protocol: protocol::TCP }
    }

    proptest! {
        #[test]
        fn the_two_buckets_of_a_key_differ_and_exist(hash: u64, log2 in 1u32..24) {
            let pair = [Hash(hash).bucket(1 << log2), Hash(hash).second_bucket(1 << log2)];
            prop_assert!(pair[0] != pair[1] && pair.iter().all(|n| *n < 1 << log2));
        }

        #[test]
        fn a_tuple_that_differs_in_one_bit_has_another_hash(src: u128, dst: u128, src_port: u16, dst_port: u16, bit in 0usize..288) {
            let one = tuple(src, dst, src_port, dst_port);
            let mut other = one;
            match bit {
                0..128 => other.src.0 ^= 1 << bit,
                128..256 => other.dst.0 ^= 1 << (bit - 128),
                256..272 => other.src_port ^= 1 << (bit - 256),
                _ => other.dst_port ^= 1 << (bit - 272),
            }
            let key = Key::new(KEY);
            prop_assert_ne!(key.hash(&one), key.hash(&other));
            prop_assert_ne!(key.hash(&one), key.hash(&one.reversed()));
        }
    }

    #[test]
    fn another_key_gives_another_hash() {
        let tuple = tuple(1, 2, 3, 4);
        let hashes: HashSet<u64> = [[1, 2], [1, 3], [2, 2], [2, 1]].into_iter().map(|key| Key::new(key).hash(&tuple).word()).collect();
        assert_eq!(hashes.len(), 4);
    }

    /// Tuples as a network makes them, one counted up after the other: the sum of squares of a bucket's load over its mean is that of a
    /// random choice (the number of buckets, with a standard deviation of the root of twice that), for either bucket and for the tag.
    #[test]
    fn tuples_in_a_row_spread_over_buckets_and_tags() {
        const PLACES: usize = 4096;
        let v4 = |n: u32| Addr::from_v4((0x0a20_0000 + n).to_be_bytes()).0;
        let v6 = |n: u32| 0xfd00_0032_0001_0000_0000_0000_0000_0000 + u128::from(n);
        type Make<'a> = &'a dyn Fn(u32) -> Tuple;
        let makes: [Make<'_>; 6] = [
            &|n| tuple(v4(7), v4(9), n as u16, (n >> 16) as u16),
            &|n| tuple(v4(n), v4(9), 5000, 80),
            &|n| tuple(v4(9), v4(n << 8), 80, 5000),
            &|n| tuple(v4(n & 0xff), v4(n >> 8 & 0xff), (n >> 16) as u16, 80),
            &|n| tuple(v6(n), v6(9), 5000, 80),
            &|n| tuple(u128::from(n) << 64, v6(n), n as u16, 80),
        ];
        for key in [KEY, [0, 0], [1, 2]].map(Key::new) {
            for (which, make) in makes.iter().enumerate() {
                let mut counts = vec![[0u32; PLACES]; 3];
                for n in 0..PLACES as u32 * 16 {
                    let hash = key.hash(&make(n));
                    for (counts, place) in counts.iter_mut().zip([hash.bucket(PLACES), hash.second_bucket(PLACES), hash.tag() as usize % PLACES]) {
                        counts[place] += 1;
                    }
                }
                for counts in counts {
                    let chi = counts.iter().map(|count| (f64::from(*count) - 16.0).powi(2) / 16.0).sum::<f64>();
                    let spread = (2.0 * PLACES as f64).sqrt();
                    assert!((chi - PLACES as f64).abs() < 6.0 * spread, "{which}: {chi}");
                }
            }
        }
    }
}
