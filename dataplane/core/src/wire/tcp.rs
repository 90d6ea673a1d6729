//! The TCP header.
//!
//! Read first: RFC 9293 §3.1 and §3.2.

/// Bytes of a header without options.
pub const HEADER_LEN: usize = 20;

/// Offset of the source port; the destination port follows.
pub const PORTS: usize = 0;
/// Offset of the sequence number.
pub const SEQUENCE: usize = 4;
/// Offset of the acknowledgement number.
pub const ACKNOWLEDGEMENT: usize = 8;
/// Offset of the octet whose upper half is the header length in 32-bit words.
pub const DATA_OFFSET: usize = 12;
/// Offset of the flags.
pub const FLAGS: usize = 13;
/// Offset of the window.
pub const WINDOW: usize = 14;
/// Offset of the checksum.
pub const CHECKSUM: usize = 16;
/// Offset of the urgent pointer.
pub const URGENT: usize = 18;

/// Flag: no more data.
pub const FIN: u8 = 0x01;
/// Flag: a connection begins.
pub const SYN: u8 = 0x02;
/// Flag: a connection is reset.
pub const RST: u8 = 0x04;
/// Flag: data for the reader at once.
pub const PSH: u8 = 0x08;
/// Flag: the acknowledgement number counts.
pub const ACK: u8 = 0x10;
/// Flag: the urgent pointer counts.
pub const URG: u8 = 0x20;
/// Flag: congestion was met (RFC 3168).
pub const ECE: u8 = 0x40;
/// Flag: the congestion window was reduced (RFC 3168).
pub const CWR: u8 = 0x80;

const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;
const OPTION_MSS_LEN: u8 = 4;

/// Where the value of the maximum segment size option stands in `options`, if it is there and well formed.
pub fn mss_value_at(options: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        match options.get(at..)? {
            [] | [OPTION_END, ..] => return None,
            [OPTION_NOP, ..] => at += 1,
            [OPTION_MSS, OPTION_MSS_LEN, _, _, ..] => return Some(at + 2),
            [_, len, ..] if *len >= 2 => at += usize::from(*len),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_segment_size_option_is_found_wherever_it_stands() {
        for (options, at) in [
            (&[2, 4, 5, 180][..], Some(2)),
            (&[1, 1, 4, 2, 2, 4, 5, 180], Some(6)),
            (&[1, 2, 4, 5, 180, 0, 0, 0], Some(3)),
            (&[3, 3, 7, 2, 4, 5, 180, 0], Some(5)),
            (&[], None),
            (&[1, 1, 1, 1], None),
            (&[0, 2, 4, 5, 180], None),
            (&[2, 4, 5], None),
            (&[2, 3, 5, 180], None),
            (&[8, 0, 2, 4], None),
            (&[8, 1, 2, 4], None),
            (&[8], None),
            (&[8, 40, 2, 4], None),
        ] {
            assert_eq!(mss_value_at(options), at, "{options:?}");
        }
    }
}
