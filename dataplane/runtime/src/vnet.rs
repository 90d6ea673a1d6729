//! `struct virtio_net_hdr`, the ten bytes before each frame of a TUN opened with `IFF_VNET_HDR`: what the kernel left undone.
//!
//! Reading turns it into an [`Offload`], writing makes it from one. Nothing but flags, type and segment size is taken from a header
//! that was read: `hdr_len` is a hint that may be wrong, and on writing it and the checksum's place are computed from the parsed
//! packet.
//!
//! An unfinished checksum that is not the packet's own transport checksum (that of an inner packet, when a pod tunnels) is finished
//! on reading, since neither the pipeline nor the overlay knows of that place.
//!
//! Read first: linux/virtio_net.h; include/linux/virtio_net.h (what the kernel accepts); Virtio 1.2 §5.1.6. All fields are in
//! native byte order (`TUNSETVNETLE` and `TUNSETVNETBE` are left alone).

use podgate_core::addr::protocol;
use podgate_core::packet::{Checksum, Gso, Offload};
use podgate_core::parse::{Parsed, Transport};
use podgate_core::wire::checksum::{Stored, Sum};

/// The length of the header, which is what `TUNSETVNETHDRSZ` sets.
pub const VNET_HEADER_LEN: usize = 10;

/// Reading and writing of the header.
#[derive(Clone, Copy, Debug)]
pub struct VnetHeader;

/// Why a header that was read cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VnetError {
    /// A segmentation type that was never offered to the kernel.
    #[error("the kernel passed a frame of segmentation type {0:#04x}, which was not asked for")]
    GsoType(u8),
    /// Segmentation without a segment size.
    #[error("the kernel passed a frame to be segmented without a segment size")]
    GsoSize,
    /// The checksum's place lies outside the packet.
    #[error("the kernel passed a frame of {len} bytes whose unfinished checksum would lie at {at}")]
    ChecksumPlace {
        /// Where the checksum field would be.
        at: usize,
        /// The frame's length.
        len: usize,
    },
}

const F_NEEDS_CSUM: u8 = 1;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;
const HDR_LEN: usize = 2;
const GSO_SIZE: usize = 4;
const CSUM_START: usize = 6;
const CSUM_OFFSET: usize = 8;

/// Offsets of the checksum field in the transport header: RFC 9293 §3.1, RFC 768.
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;
const UDP_HEADER_LEN: usize = 8;

impl VnetHeader {
    /// What `header` says of `packet`, the bytes that follow it. A checksum that only this header could locate is finished in place.
    #[inline]
    pub fn parse(header: &[u8; VNET_HEADER_LEN], packet: &mut [u8]) -> Result<Offload, VnetError> {
        let size = field(header, GSO_SIZE);
        let gso = match header[GSO_TYPE] & !GSO_ECN {
            GSO_NONE => Gso::None,
            GSO_TCPV4 | GSO_TCPV6 => Gso::Tcp { size, ecn: header[GSO_TYPE] & GSO_ECN != 0 },
            GSO_UDP_L4 => Gso::Udp { size },
            other => return Err(VnetError::GsoType(other)),
        };
        if gso != Gso::None && size == 0 {
            return Err(VnetError::GsoSize);
        }
        if header[FLAGS] & F_NEEDS_CSUM == 0 {
            return Ok(Offload { checksum: Checksum::Full, gso });
        }
        let start = usize::from(field(header, CSUM_START));
        let at = start + usize::from(field(header, CSUM_OFFSET));
        if start >= packet.len() || at + 2 > packet.len() {
            return Err(VnetError::ChecksumPlace { at, len: packet.len() });
        }
        // Frames to be segmented keep theirs: the kernel segments tunnels itself for a TUN, which was not offered that.
        if gso == Gso::None && Some(at) != transport_checksum(packet) {
            finish(packet, start, at);
            return Ok(Offload { checksum: Checksum::Full, gso });
        }
        Ok(Offload { checksum: Checksum::Partial, gso })
    }

    /// The header for a packet that `parsed` describes.
    #[inline]
    pub fn of(offload: Offload, parsed: &Parsed) -> [u8; VNET_HEADER_LEN] {
        let mut header = [0; VNET_HEADER_LEN];
        let (checksum_offset, transport_len) = match parsed.transport_kind {
            Transport::Tcp { header_len, .. } => (TCP_CHECKSUM, usize::from(header_len)),
            Transport::Udp => (UDP_CHECKSUM, UDP_HEADER_LEN),
            // Only TCP and UDP checksums are ever left undone, and only TCP and UDP are cut.
            _ => return header,
        };
        if offload.checksum == Checksum::Partial {
            header[FLAGS] = F_NEEDS_CSUM;
            set(&mut header, CSUM_START, parsed.transport);
            set(&mut header, CSUM_OFFSET, checksum_offset as u16);
        }
        let (kind, size) = match offload.gso {
            Gso::None => return header,
            Gso::Tcp { size, ecn } => {
                let kind = if parsed.tuple.is_v4() { GSO_TCPV4 } else { GSO_TCPV6 };
                (if ecn { kind | GSO_ECN } else { kind }, size)
            }
            Gso::Udp { size } => (GSO_UDP_L4, size),
        };
        header[GSO_TYPE] = kind;
        set(&mut header, GSO_SIZE, size);
        set(&mut header, HDR_LEN, parsed.transport + transport_len as u16);
        header
    }

    /// The header for a whole packet with a full checksum, such as the gateway makes itself.
    pub const PLAIN: [u8; VNET_HEADER_LEN] = [0; VNET_HEADER_LEN];
}

#[inline]
fn field(header: &[u8; VNET_HEADER_LEN], at: usize) -> u16 {
    u16::from_ne_bytes([header[at], header[at + 1]])
}

#[inline]
fn set(header: &mut [u8; VNET_HEADER_LEN], at: usize, value: u16) {
    header[at..at + 2].copy_from_slice(&value.to_ne_bytes());
}

/// Where the packet's own transport checksum is, unless that takes more than a glance (IPv6 extension headers).
#[inline]
fn transport_checksum(packet: &[u8]) -> Option<usize> {
    let (transport, protocol) = match packet.first()? >> 4 {
        4 => (usize::from(packet[0] & 0xf) * 4, *packet.get(9)?),
        6 => (40, *packet.get(6)?),
        _ => return None,
    };
    match protocol {
        protocol::TCP => Some(transport + TCP_CHECKSUM),
        protocol::UDP => Some(transport + UDP_CHECKSUM),
        _ => None,
    }
}

/// What the kernel's `skb_checksum_help` does: the field holds the pseudo header's sum, so the sum from `start` on is the whole one.
#[cold]
fn finish(packet: &mut [u8], start: usize, at: usize) {
    // Never 0, which UDP would take for none; for TCP the two zeros are equal.
    let Stored(checksum) = Sum::of(&packet[start..]).finish_udp();
    packet[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use podgate_core::addr::{Addr, Tuple};

    use super::*;

    fn parsed(v4: bool, transport: u16, protocol: u8, transport_kind: Transport) -> Parsed {
        let addr = if v4 { Addr::from_v4([10, 0, 0, 1]) } else { Addr::from_v6([0xfd; 16]) };
        Parsed {
            tuple: Tuple { src: addr, dst: addr, src_port: 1, dst_port: 2, protocol },
            transport,
            len: 4000,
            ttl: 64,
            traffic_class: 0,
            dont_fragment: true,
            fragment: None,
            transport_kind,
        }
    }

    fn header(flags: u8, gso_type: u8, fields: [u16; 4]) -> [u8; VNET_HEADER_LEN] {
        let mut header = [flags, gso_type, 0, 0, 0, 0, 0, 0, 0, 0];
        for (index, value) in fields.into_iter().enumerate() {
            set(&mut header, 2 + 2 * index, value);
        }
        header
    }

    #[test]
    fn a_tcp_superframe_names_its_headers_and_its_checksums_place() {
        let tcp = Transport::Tcp { flags: 0x10, header_len: 32 };
        let offload = Offload { checksum: Checksum::Partial, gso: Gso::Tcp { size: 1448, ecn: true } };
        assert_eq!(VnetHeader::of(offload, &parsed(true, 20, 6, tcp)), header(1, 0x81, [52, 1448, 20, 16]));
        assert_eq!(VnetHeader::of(offload, &parsed(false, 40, 6, tcp)), header(1, 0x84, [72, 1448, 40, 16]));
    }

    #[test]
    fn a_udp_superframe_is_udp_l4_in_both_families() {
        let offload = Offload { checksum: Checksum::Partial, gso: Gso::Udp { size: 1200 } };
        assert_eq!(VnetHeader::of(offload, &parsed(false, 48, 17, Transport::Udp)), header(1, 5, [56, 1200, 48, 6]));
    }

    #[test]
    fn a_plain_packet_has_a_header_of_zeros() {
        assert_eq!(VnetHeader::of(Offload::default(), &parsed(true, 20, 17, Transport::Udp)), VnetHeader::PLAIN);
        let partial = Offload { checksum: Checksum::Partial, gso: Gso::None };
        assert_eq!(VnetHeader::of(partial, &parsed(true, 20, 1, Transport::EchoRequest)), VnetHeader::PLAIN);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut packet = vec![0u8; 4000];
        packet[0] = 0x45;
        packet[9] = 6;
        let tcp = parsed(true, 20, 6, Transport::Tcp { flags: 0, header_len: 20 });
        for checksum in [Checksum::Full, Checksum::Partial] {
            for gso in [Gso::None, Gso::Tcp { size: 1, ecn: false }, Gso::Tcp { size: 1448, ecn: true }] {
                let offload = Offload { checksum, gso };
                assert_eq!(VnetHeader::parse(&VnetHeader::of(offload, &tcp), &mut packet), Ok(offload));
            }
        }
    }

    #[test]
    fn hdr_len_and_the_data_valid_flag_are_not_believed() {
        let mut packet = vec![0x45; 100];
        assert_eq!(VnetHeader::parse(&header(2, 0, [0xffff, 0, 0, 0]), &mut packet), Ok(Offload::default()));
    }

    #[test]
    fn what_was_never_offered_is_refused_by_name() {
        let mut packet = vec![0x45; 100];
        assert_eq!(VnetHeader::parse(&header(0, 3, [0, 1400, 0, 0]), &mut packet), Err(VnetError::GsoType(3)));
        assert_eq!(VnetHeader::parse(&header(1, 1, [0, 0, 20, 16]), &mut packet), Err(VnetError::GsoSize));
        assert_eq!(VnetHeader::parse(&header(1, 0, [0, 0, 90, 16]), &mut packet), Err(VnetError::ChecksumPlace { at: 106, len: 100 }));
    }

    #[test]
    fn an_inner_packets_unfinished_checksum_is_finished() {
        // IPIP: an outer header of protocol 4, an inner UDP datagram whose checksum field holds the pseudo header's sum.
        let mut packet = vec![0u8; 20 + 20 + 8 + 3];
        packet[0] = 0x45;
        packet[9] = 4;
        packet[20] = 0x45;
        packet[29] = 17;
        packet[32..40].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        packet[40..48].copy_from_slice(&[0, 53, 0, 54, 0, 11, 0, 0]);
        packet[48..].copy_from_slice(b"abc");
        let pseudo: u16 = 0x0a00 + 0x0001 + 0x0a00 + 0x0002 + 17 + 11;
        packet[46..48].copy_from_slice(&pseudo.to_be_bytes());
        assert_eq!(VnetHeader::parse(&header(1, 0, [0, 0, 40, 6]), &mut packet), Ok(Offload::default()));
        let sum = [0x0a00u32, 0x0001, 0x0a00, 0x0002, 17, 11].into_iter().sum::<u32>()
            + packet[40..].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]))).sum::<u32>();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "a receiver's sum over it");
    }
}
