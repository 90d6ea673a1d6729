//! Test data that both ends can make: any damage, loss, repetition or exchange of segments shows, and comparing costs no more than
//! a `memcmp`, so that it does not become the thing that is measured.
//!
//! The stream is one pseudo-random block, repeated. The block's length is a prime, so that no segment, page or superframe
//! boundary ever falls on the same place of the block twice running.

/// A prime just below 1 MiB.
const BLOCK_LEN: usize = 1_048_573;

/// An endless stream of bytes that a seed determines.
#[derive(Clone)]
pub struct Pattern {
    block: Vec<u8>,
}

impl Pattern {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Pattern {
        let mut state = seed;
        let mut block = Vec::with_capacity(BLOCK_LEN + 8);
        while block.len() < BLOCK_LEN {
            // SplitMix64 (Steele, Lea, Flood 2014): every seed is a good one.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            block.extend_from_slice(&(z ^ (z >> 31)).to_le_bytes());
        }
        block.truncate(BLOCK_LEN);
        Pattern { block }
    }

    /// The bytes from `offset` on, as many as lie together.
    pub fn at(&self, offset: u64) -> &[u8] {
        let start = (offset % BLOCK_LEN as u64) as usize;
        &self.block[start..]
    }

    /// The first `len` bytes.
    pub fn take(&self, len: usize) -> Vec<u8> {
        self.block.iter().copied().cycle().take(len).collect()
    }

    /// Where `data`, which begins at `offset`, first differs.
    pub fn first_difference(&self, offset: u64, mut data: &[u8]) -> Option<u64> {
        let mut at = offset;
        while !data.is_empty() {
            let expected = self.at(at);
            let len = expected.len().min(data.len());
            if expected[..len] != data[..len] {
                let place = expected.iter().zip(data).position(|(a, b)| a != b).expect("the slices differ");
                return Some(at + place as u64);
            }
            at += len as u64;
            data = &data[len..];
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_equals_itself_across_the_block_boundary() {
        let pattern = Pattern::new(7);
        let data = pattern.take(3 * BLOCK_LEN);
        assert_eq!(pattern.first_difference(0, &data), None);
        assert_eq!(pattern.first_difference(1000, &data[1000..]), None);
    }

    #[test]
    fn a_flipped_bit_and_a_lost_byte_are_found_where_they_are() {
        let pattern = Pattern::new(7);
        let mut data = pattern.take(2 * BLOCK_LEN);
        data[1_500_000] ^= 1;
        assert_eq!(pattern.first_difference(0, &data), Some(1_500_000));
        data.remove(1_400_000);
        assert!(pattern.first_difference(0, &data).is_some_and(|at| (1_400_000..1_400_016).contains(&at)));
    }

    #[test]
    fn other_seeds_make_other_streams() {
        assert_eq!(Pattern::new(1).first_difference(0, Pattern::new(2).at(0)), Some(0));
    }
}
