//! A tuple's keyed hash: SipHash-1-3, as the standard library's maps use it.
//!
//! Whoever may open connections chooses tuples; a key drawn at each boot keeps them from choosing buckets. One round for each word and three
//! at the end is what the SipHash authors propose for hash tables ("SipHash: a fast short-input PRF", Aumasson and Bernstein, §2.3 for the
//! algorithm). A tuple is always five words, so the loop is unrolled and nothing is copied to bytes.

use crate::addr::Tuple;

/// A tuple's hash under the table's key: which two buckets it may sit in, and its tag there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hash(pub(super) u64);

impl Hash {
    /// All of it, for the table of session affinity.
    #[inline]
    pub(crate) const fn word(self) -> u64 {
        self.0
    }

    /// The part that an index entry keeps, 31 bits; no bit of it takes part in `buckets`' first choice (a table has far fewer than 2^32 buckets).
    #[inline]
    pub(super) const fn tag(self) -> u64 {
        self.0 >> 33
    }

    /// The two buckets among `buckets` (a power of two, at least 2). They differ.
    #[inline]
    pub(super) const fn buckets(self, buckets: usize) -> [usize; 2] {
        let mask = buckets - 1;
        let first = self.0 as usize & mask;
        // The distance to the second comes from the tag alone; the multiplier is 2^64 divided by the golden ratio (Knuth 6.4), and an odd
        // distance is never zero.
        let distance = (self.tag().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize | 1;
        [first, (first ^ distance) & mask]
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

/// SipHash-1-3 of the tuple's five words, little-endian.
#[inline]
pub(crate) fn hash(key: [u64; 2], tuple: &Tuple) -> Hash {
    // The initial state is "somepseudorandomlygeneratedbytes".
    let mut v = [key[0] ^ 0x736f_6d65_7073_6575, key[1] ^ 0x646f_7261_6e64_6f6d, key[0] ^ 0x6c79_6765_6e65_7261, key[1] ^ 0x7465_6462_7974_6573];
    for word in tuple_words(tuple) {
        v[3] ^= word;
        round(&mut v);
        v[0] ^= word;
    }
    // The last block holds the length in bytes, mod 256.
    const LAST: u64 = 40 << 56;
    v[3] ^= LAST;
    round(&mut v);
    v[0] ^= LAST;
    v[2] ^= 0xff;
    round(&mut v);
    round(&mut v);
    round(&mut v);
    Hash(v[0] ^ v[1] ^ v[2] ^ v[3])
}

#[inline(always)]
fn round(v: &mut [u64; 4]) {
    v[0] = v[0].wrapping_add(v[1]);
    v[2] = v[2].wrapping_add(v[3]);
    v[1] = v[1].rotate_left(13) ^ v[0];
    v[3] = v[3].rotate_left(16) ^ v[2];
    v[0] = v[0].rotate_left(32);
    v[2] = v[2].wrapping_add(v[1]);
    v[0] = v[0].wrapping_add(v[3]);
    v[1] = v[1].rotate_left(17) ^ v[2];
    v[3] = v[3].rotate_left(21) ^ v[0];
    v[2] = v[2].rotate_left(32);
}

#[cfg(test)]
mod tests {
    use std::hash::Hasher;

    use proptest::prelude::*;

    use super::*;
    use crate::addr::Addr;

    proptest! {
        #[test]
        #[allow(deprecated)]
        fn the_hash_is_the_standard_librarys_siphash_under_the_zero_key(src: u128, dst: u128, src_port: u16, dst_port: u16, protocol: u8) {
            let tuple = Tuple { src: Addr(src), dst: Addr(dst), src_port, dst_port, protocol };
            let mut oracle = std::collections::hash_map::DefaultHasher::new();
            for word in tuple_words(&tuple) {
                oracle.write(&word.to_le_bytes());
            }
            prop_assert_eq!(hash([0, 0], &tuple), Hash(oracle.finish()));
        }

        #[test]
        fn the_two_buckets_of_a_key_differ_and_exist(hash: u64, log2 in 1u32..24) {
            let [first, second] = Hash(hash).buckets(1 << log2);
            prop_assert!(first != second && first < 1 << log2 && second < 1 << log2);
        }
    }

    #[test]
    fn another_key_gives_another_hash() {
        let tuple = Tuple { src: Addr(1), dst: Addr(2), src_port: 3, dst_port: 4, protocol: 6 };
        assert_ne!(hash([1, 2], &tuple), hash([1, 3], &tuple));
    }
}
