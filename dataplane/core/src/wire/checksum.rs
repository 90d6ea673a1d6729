//! The Internet checksum: running sums, stored complements, and the change of one when a field changes.
//!
//! Byte order is settled here once. A [`Sum`] is a sum of 16-bit words whose first byte is the more significant, as RFC 1071 §1
//! defines it, kept wide and folded at the end. Slices are summed in the machine's own order and swapped once afterwards, which
//! RFC 1071 §2 (B) allows. A [`Stored`] is what a header field holds: the folded sum's complement, except in packets whose checksum
//! the kernel left half done ([`crate::packet::Checksum::Partial`]), which hold the folded sum itself; the two are apart by type.
//!
//! One's complement has two zeros. A sum that is not of zeros alone folds to 0xffff, never to 0, and so does the result of an
//! update (RFC 1624 §3, eqn. 3, made to avoid the wrong zero of eqn. 4): incremental and full results are the same bytes.
//!
//! Read first: RFC 1071, RFC 1624, RFC 768 and RFC 8200 §8.1 for UDP's zero.

use std::ops::{Add, AddAssign};

use crate::addr::Addr;

/// A running sum of 16-bit words, not complemented, not folded.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

/// What a checksum field holds: a folded sum's complement, in host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored(pub u16);

/// The change of a sum when fields change, to be applied to what is stored.
#[derive(Clone, Copy, Debug, Default)]
pub struct Delta(u64);

/// A [`Delta`] in 16 bits: what is applied to many packets is folded once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Folded(pub u16);

/// Bytes summed per step: eight accumulators of 64 bits, so that the compiler uses whole vector registers.
const BLOCK_LEN: usize = 32;

impl Sum {
    /// The sum of nothing.
    pub const ZERO: Sum = Sum(0);

    /// The sum of `bytes`, which begin at an even offset of what is summed; an odd last byte is padded with zero (RFC 1071 §1).
    #[inline]
    pub fn of(bytes: &[u8]) -> Sum {
        // 32-bit words into 64-bit lanes: no carry to keep, and 2^32 ≡ 1 modulo 0xffff, so folding later loses nothing.
        let (blocks, rest) = bytes.as_chunks::<BLOCK_LEN>();
        let mut lanes = [0u64; BLOCK_LEN / 4];
        for block in blocks {
            for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<4>().0) {
                *lane += u64::from(u32::from_ne_bytes(*word));
            }
        }
        let mut sum: u64 = lanes.iter().sum();
        let (words, rest) = rest.as_chunks::<4>();
        for word in words {
            sum += u64::from(u32::from_ne_bytes(*word));
        }
        let (words, rest) = rest.as_chunks::<2>();
        for word in words {
            sum += u64::from(u16::from_ne_bytes(*word));
        }
        if let [last] = rest {
            sum += u64::from(u16::from_ne_bytes([*last, 0]));
        }
        Sum(u64::from(u16::from_be(fold(sum))))
    }

    /// The sum of a fixed header, all of it known to be there.
    #[inline]
    pub fn of_words(words: &[u16]) -> Sum {
        Sum(words.iter().map(|word| u64::from(*word)).sum())
    }

    /// The sum of an address: its four or sixteen octets.
    #[inline]
    pub fn addr(addr: Addr) -> Sum {
        if addr.is_v4() { Sum(u64::from(addr.0 as u32)) } else { Sum(lanes(addr.0)) }
    }

    /// The same bytes' sum where they begin at an odd offset of what is summed (RFC 1071 §2 (B)).
    #[inline]
    #[must_use]
    pub fn at_odd_offset(self) -> Sum {
        Sum(u64::from(fold(self.0).swap_bytes()))
    }

    /// The sum folded into 16 bits, not complemented: what a [`crate::packet::Checksum::Partial`] field holds.
    #[inline]
    pub fn folded(self) -> u16 {
        fold(self.0)
    }

    /// What the checksum field holds. Not for UDP, see [`Sum::finish_udp`].
    #[inline]
    pub fn finish(self) -> Stored {
        Stored(!fold(self.0))
    }

    /// What UDP's checksum field holds: never 0, which means that there is none (RFC 768).
    #[inline]
    pub fn finish_udp(self) -> Stored {
        self.finish().for_udp()
    }

    /// Whether the sum over a packet with its checksum field in place says that it is whole.
    #[inline]
    pub fn is_whole(self) -> bool {
        fold(self.0) == 0xffff
    }

    /// The sum after a change.
    #[inline]
    #[must_use]
    pub fn changed(self, delta: impl Into<Folded>) -> Sum {
        Sum(u64::from(fold(self.0)) + u64::from(delta.into().0))
    }
}

/// The sum of the pseudo header of TCP, UDP and ICMPv6 (RFC 9293 §3.1, RFC 768, RFC 8200 §8.1). `len` is that of the transport
/// header and its payload.
#[inline]
pub fn pseudo_header(src: Addr, dst: Addr, protocol: u8, len: u32) -> Sum {
    Sum::addr(src) + Sum::addr(dst) + Sum(u64::from(protocol)) + Sum(u64::from(len))
}

impl Stored {
    /// From a header's two octets.
    #[inline]
    pub const fn from_bytes(bytes: [u8; 2]) -> Stored {
        Stored(u16::from_be_bytes(bytes))
    }

    /// A header's two octets.
    #[inline]
    pub const fn to_bytes(self) -> [u8; 2] {
        self.0.to_be_bytes()
    }

    /// What the field holds after a change. Not for UDP, see [`Stored::changed_udp`].
    #[inline]
    #[must_use]
    pub fn changed(self, delta: impl Into<Folded>) -> Stored {
        // RFC 1624 §3, eqn. 3: HC' = ~(~HC + ~m + m').
        let Folded(sum) = Folded(!self.0) + delta.into();
        Stored(!sum)
    }

    /// The same for UDP: 0 says that there is no checksum and stays, and a result of 0 is written as 0xffff (RFC 768).
    #[inline]
    #[must_use]
    pub fn changed_udp(self, delta: impl Into<Folded>) -> Stored {
        if self.0 == 0 { self } else { self.changed(delta).for_udp() }
    }

    #[inline]
    fn for_udp(self) -> Stored {
        if self.0 == 0 { Stored(0xffff) } else { self }
    }
}

impl Delta {
    /// No change.
    pub const NONE: Delta = Delta(0);

    /// A 16-bit field at an even offset.
    #[inline]
    pub fn word(old: u16, new: u16) -> Delta {
        Delta(u64::from(!old) + u64::from(new))
    }

    /// An address; both of one family.
    #[inline]
    pub fn addr(old: Addr, new: Addr) -> Delta {
        // The prefix of the mapped form is in both and adds a multiple of 0xffff.
        Delta(lanes(!old.0) + lanes(new.0))
    }

    /// A length, or another 32-bit number at an even offset.
    #[inline]
    pub fn long(old: u32, new: u32) -> Delta {
        Delta(u64::from(!old) + u64::from(new))
    }

    /// A region whose sum was `old` and is `new`.
    #[inline]
    pub fn sums(old: Sum, new: Sum) -> Delta {
        Delta::word(fold(old.0), fold(new.0))
    }
}

impl From<Delta> for Folded {
    #[inline]
    fn from(delta: Delta) -> Folded {
        Folded(fold(delta.0))
    }
}

impl Add for Folded {
    type Output = Folded;

    /// One's complement addition: the carry comes back in below (RFC 1071 §2 (C)). Only two zeros make 0.
    #[inline]
    fn add(self, other: Folded) -> Folded {
        let (sum, carry) = self.0.overflowing_add(other.0);
        Folded(sum + u16::from(carry))
    }
}

impl Add for Sum {
    type Output = Sum;

    /// Joins sums of which each begins at an even offset.
    #[inline]
    fn add(self, other: Sum) -> Sum {
        Sum(self.0 + other.0)
    }
}

impl AddAssign for Sum {
    #[inline]
    fn add_assign(&mut self, other: Sum) {
        self.0 += other.0;
    }
}

impl Add for Delta {
    type Output = Delta;

    #[inline]
    fn add(self, other: Delta) -> Delta {
        Delta(self.0 + other.0)
    }
}

impl AddAssign for Delta {
    #[inline]
    fn add_assign(&mut self, other: Delta) {
        self.0 += other.0;
    }
}

/// The sum of a 128-bit number's four 32-bit words.
#[inline]
const fn lanes(number: u128) -> u64 {
    (number >> 96) as u64 + (number >> 64) as u32 as u64 + (number >> 32) as u32 as u64 + number as u32 as u64
}

/// Adds the carries back in. Only 0 folds to 0.
#[inline]
const fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    sum as u16
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    /// RFC 1071 §4.1, word for word.
    fn slow(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn the_example_of_rfc_1071_section_3() {
        assert_eq!(Sum::of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]).folded(), 0xddf2);
    }

    #[test]
    fn the_example_of_rfc_1624_section_4_ends_in_the_right_zero() {
        // HC = 0xdd2f, a field goes from 0x5555 to 0x3285: 0x0000, where eqn. 4 gives 0xffff.
        assert_eq!(Stored(0xdd2f).changed(Delta::word(0x5555, 0x3285)), Stored(0x0000));
    }

    #[test]
    fn an_ipv4_header_from_the_wire_is_whole() {
        let header = [0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8, 0x00, 0x01, 0xc0, 0xa8, 0x00, 0xc7];
        assert!(Sum::of(&header).is_whole());
        let mut blank = header;
        blank[10..12].fill(0);
        assert_eq!(Sum::of(&blank).finish().to_bytes(), [0xb8, 0x61]);
    }

    #[test]
    fn the_longest_packet_of_ones_does_not_overflow() {
        assert_eq!(Sum::of(&vec![0xff; 1 << 17]).folded(), 0xffff);
    }

    #[test]
    fn udp_keeps_an_absent_checksum_and_never_writes_one() {
        let delta = Delta::word(1, 2);
        assert_eq!(Stored(0).changed_udp(delta), Stored(0));
        assert_eq!(Stored(1).changed(delta), Stored(0));
        assert_eq!(Stored(1).changed_udp(delta), Stored(0xffff));
        assert_eq!(Sum::of(&[0xff, 0xff]).finish_udp(), Stored(0xffff));
    }

    /// Three addresses of one family.
    fn addrs() -> impl Strategy<Value = [Addr; 3]> {
        prop_oneof![
            any::<[Ipv4Addr; 3]>().prop_map(|ips| ips.map(Addr::from)),
            any::<[Ipv6Addr; 3]>()
                .prop_filter("not mapped", |ips| ips.iter().all(|ip| ip.to_ipv4_mapped().is_none()))
                .prop_map(|ips| ips.map(Addr::from)),
        ]
    }

    proptest! {
        #[test]
        fn a_fast_sum_is_the_slow_sum(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert_eq!(Sum::of(&bytes).folded(), slow(&bytes));
        }

        #[test]
        fn sums_join_at_any_offset(bytes in proptest::collection::vec(any::<u8>(), 0..200), at in any::<prop::sample::Index>()) {
            let (front, back) = bytes.split_at(at.index(bytes.len() + 1));
            let back = if front.len() % 2 == 0 { Sum::of(back) } else { Sum::of(back).at_odd_offset() };
            prop_assert_eq!((Sum::of(front) + back).folded(), slow(&bytes));
        }

        #[test]
        fn an_incremental_change_is_the_full_sum(
            mut bytes in proptest::collection::vec(any::<u8>(), 4..100), at in any::<prop::sample::Index>(), new in any::<u16>()
        ) {
            // A protocol number in the pseudo header keeps real sums from being of zeros alone.
            bytes[1] = bytes[1].max(1);
            let at = 2 + at.index(bytes.len() / 2 - 1) * 2;
            let before = Sum::of(&bytes);
            let old = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
            bytes[at..at + 2].copy_from_slice(&new.to_be_bytes());
            prop_assert_eq!(before.finish().changed(Delta::word(old, new)), Sum::of(&bytes).finish());
            prop_assert_eq!(before.finish_udp().changed_udp(Delta::word(old, new)), Sum::of(&bytes).finish_udp());
            prop_assert_eq!(before.changed(Delta::word(old, new)).folded(), Sum::of(&bytes).folded());
            prop_assert_eq!(before.finish().changed(Delta::sums(before, Sum::of(&bytes))), Sum::of(&bytes).finish());
        }

        #[test]
        fn a_change_of_addresses_is_the_full_sum([old, new, other] in addrs(), protocol in 1u8.., len in 0u32..65536) {
            let before = pseudo_header(old, other, protocol, len);
            let after = pseudo_header(new, other, protocol, len);
            prop_assert_eq!(before.finish().changed(Delta::addr(old, new)), after.finish());
            prop_assert_eq!(before.changed(Delta::addr(old, new)).folded(), after.folded());
        }
    }
}
