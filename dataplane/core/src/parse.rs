//! One look at a packet's headers: what everything behind needs to know, checked once.
//!
//! A packet that passes has lengths that agree with each other and with what arrived, every header that [`Parsed`] speaks of within
//! [`Packet::head`], a source that can be somebody's, and, if a peer sent it, a right IPv4 header checksum (the kernel has seen to
//! that of packets it forwards itself). Whether the destination is one to forward to is the pipeline's to say, see [`Scope`].
//!
//! Read first: RFC 791 §3.1, RFC 8200 §4, RFC 9293 §3.1, RFC 768, RFC 792, RFC 4443; RFC 3128 and RFC 7112 for small fragments.

use crate::addr::{Addr, Tuple, protocol};
use crate::packet::{Ingress, Packet};
use crate::verdict::DropReason;
use crate::wire::checksum::Sum;
use crate::wire::ip::Scope;
use crate::wire::{icmp, ipv4, ipv6, tcp, udp};

/// What `parse` found. Offsets are from the IP header's first byte and lie within `Packet::head`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// Addresses, ports and protocol; the ports of a fragment that is not the first are 0.
    pub tuple: Tuple,
    /// Where the transport header starts (IPv6: behind the extension headers).
    pub transport: u16,
    /// The packet's length, headers and payload, in bytes: as the IP header says and no more than what arrived. Bytes behind it are padding.
    pub len: u32,
    /// TTL or hop limit.
    pub ttl: u8,
    /// DSCP and ECN: IPv4's second octet, IPv6's traffic class.
    pub traffic_class: u8,
    /// IPv4: the DF flag. IPv6: always true, since no router may cut a packet of it (RFC 8200 §5).
    pub dont_fragment: bool,
    /// Present if it is a fragment (not for an IPv6 atomic fragment, RFC 6946, which is a whole packet).
    pub fragment: Option<Fragment>,
    /// What the transport header says.
    pub transport_kind: Transport,
}

/// A fragment's place in its datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Identification (16 bits in IPv4).
    pub id: u32,
    /// Offset of its payload in the datagram's payload, in bytes.
    pub offset: u32,
    /// Payload bytes in this fragment.
    pub len: u32,
    /// Whether more follow.
    pub more: bool,
    /// IPv6: where the fragment header starts; IPv4: 0.
    pub header: u16,
}

/// The transport header, as far as the gateway cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A TCP segment with a header that is whole and within the packet.
    Tcp {
        /// The flags octet (CWR ECE URG ACK PSH RST SYN FIN).
        flags: u8,
        /// Header length in bytes, options included.
        header_len: u8,
    },
    /// A UDP datagram; its length field is consistent with the packet.
    Udp,
    /// An ICMP or ICMPv6 echo request; the tuple's source port is the identifier.
    EchoRequest,
    /// An ICMP or ICMPv6 echo reply; the tuple's destination port is the identifier.
    EchoReply,
    /// An ICMP or ICMPv6 error that quotes a packet: the offset of the quoted IP header.
    IcmpError {
        /// From the outer IP header's first byte.
        quoted: u16,
    },
    /// Any other ICMP or ICMPv6 message: its type.
    IcmpOther(u8),
    /// A fragment that is not the first: no transport header in it.
    Tail,
    /// Another protocol: forwarded by address alone.
    Other,
}

/// The longest datagram that fragments can make, in bytes (RFC 791 §3.1, RFC 8200 §4.5).
const DATAGRAM_LEN_MAX: u32 = 65_535;

/// Looks at a packet's headers.
#[inline]
pub fn parse(packet: &Packet<'_>) -> Result<Parsed, DropReason> {
    match packet.head.first().map(|first| first >> 4) {
        Some(4) => parse_v4(packet.head, packet.len(), packet.ingress),
        Some(6) => parse_v6(packet.head, packet.len()),
        Some(_) => Err(DropReason::BadHeader),
        None => Err(DropReason::Truncated),
    }
}

/// [`parse`] of what nearly every packet is, at fixed offsets: TCP or UDP behind an IP header without options, extensions or fragments. `None`:
/// it is something else, or something is the matter with it, and [`parse`] says what.
#[inline(always)]
pub fn parse_plain(packet: &Packet<'_>) -> Option<Parsed> {
    let (header, body): (&ipv4::Header, _) = packet.head.split_first_chunk()?;
    if header[0] >> 4 == 6 {
        return parse_plain_v6(packet);
    }
    let flags_offset = ipv4::flags_offset(header);
    let (len, src) = (usize::from(ipv4::total_len(header)), ipv4::src(header));
    let plain = header[0] == 0x45 && flags_offset & !ipv4::DONT_FRAGMENT == 0;
    if !plain || len > packet.len() || Scope::of(src) != Scope::Unicast {
        return None;
    }
    if matches!(packet.ingress, Ingress::Overlay(_)) && !Sum::of(header).is_whole() {
        return None;
    }
    let protocol = header[ipv4::PROTOCOL];
    let transport_kind = plain_transport(body, len.checked_sub(ipv4::HEADER_LEN)?, protocol)?;
    let (src_port, dst_port) = ports(*body.first_chunk()?);
    Some(Parsed {
        tuple: Tuple { src, dst: ipv4::dst(header), src_port, dst_port, protocol },
        transport: ipv4::HEADER_LEN as u16,
        len: len as u32,
        ttl: header[ipv4::TTL],
        traffic_class: header[ipv4::TRAFFIC_CLASS],
        dont_fragment: flags_offset != 0,
        fragment: None,
        transport_kind,
    })
}

#[inline(always)]
fn parse_plain_v6(packet: &Packet<'_>) -> Option<Parsed> {
    let (header, body): (&ipv6::Header, _) = packet.head.split_first_chunk()?;
    let payload_len = usize::from(ipv6::payload_len(header));
    let len = ipv6::HEADER_LEN + payload_len;
    let (src, dst) = (ipv6::src(header), ipv6::dst(header));
    if len > packet.len() || src.is_v4() || dst.is_v4() || Scope::of(src) != Scope::Unicast {
        return None;
    }
    let protocol = header[ipv6::NEXT_HEADER];
    let transport_kind = plain_transport(body, payload_len, protocol)?;
    let (src_port, dst_port) = ports(*body.first_chunk()?);
    Some(Parsed {
        tuple: Tuple { src, dst, src_port, dst_port, protocol },
        transport: ipv6::HEADER_LEN as u16,
        len: len as u32,
        ttl: header[ipv6::HOP_LIMIT],
        traffic_class: ipv6::traffic_class(header),
        dont_fragment: true,
        fragment: None,
        transport_kind,
    })
}

/// What the TCP or UDP header in `body` says, which is what is at hand of a payload of `payload_len` bytes.
#[inline(always)]
fn plain_transport(body: &[u8], payload_len: usize, protocol: u8) -> Option<Transport> {
    let start: &[u8; udp::HEADER_LEN] = body.first_chunk()?;
    match protocol {
        protocol::UDP => {
            let datagram_len = usize::from(u16::from_be_bytes([start[udp::LEN], start[udp::LEN + 1]]));
            if !(udp::HEADER_LEN..=payload_len).contains(&datagram_len) {
                return None;
            }
            Some(Transport::Udp)
        }
        protocol::TCP => {
            let header: &[u8; tcp::HEADER_LEN] = body.first_chunk()?;
            let header_len = header[tcp::DATA_OFFSET] >> 4 << 2;
            if !(tcp::HEADER_LEN..=payload_len.min(body.len())).contains(&usize::from(header_len)) {
                return None;
            }
            Some(Transport::Tcp { flags: header[tcp::FLAGS], header_len })
        }
        _ => None,
    }
}

#[inline]
fn parse_v4(head: &[u8], arrived_len: usize, ingress: Ingress) -> Result<Parsed, DropReason> {
    let header = head.first_chunk::<{ ipv4::HEADER_LEN }>().ok_or(DropReason::Truncated)?;
    let transport = ipv4::header_len(header);
    let len = usize::from(ipv4::total_len(header));
    if transport < ipv4::HEADER_LEN || len < transport {
        return Err(DropReason::BadHeader);
    }
    if len > arrived_len {
        return Err(DropReason::Truncated);
    }
    // Everything from here on sees the packet without padding.
    let bytes = &head[..len.min(head.len())];
    if bytes.len() < transport {
        return Err(DropReason::Truncated);
    }
    if matches!(ingress, Ingress::Overlay(_)) && !Sum::of(&bytes[..transport]).is_whole() {
        return Err(DropReason::BadChecksum);
    }
    let (src, dst) = (ipv4::src(header), ipv4::dst(header));
    check_source(src)?;

    let flags_offset = ipv4::flags_offset(header);
    let payload_len = (len - transport) as u32;
    let fragment = if flags_offset & (ipv4::MORE_FRAGMENTS | ipv4::OFFSET_MASK) == 0 {
        None
    } else {
        let fragment = Fragment {
            id: u32::from(ipv4::id(header)),
            offset: u32::from(flags_offset & ipv4::OFFSET_MASK) * 8,
            len: payload_len,
            more: flags_offset & ipv4::MORE_FRAGMENTS != 0,
            header: 0,
        };
        check_fragment(&fragment, transport as u32)?;
        Some(fragment)
    };
    let protocol = header[ipv4::PROTOCOL];
    let upper = upper(bytes, transport, payload_len, protocol, protocol::ICMP, fragment.as_ref())?;
    Ok(Parsed {
        tuple: Tuple { src, dst, src_port: upper.src_port, dst_port: upper.dst_port, protocol },
        transport: transport as u16,
        len: len as u32,
        ttl: header[ipv4::TTL],
        traffic_class: header[ipv4::TRAFFIC_CLASS],
        dont_fragment: flags_offset & ipv4::DONT_FRAGMENT != 0,
        fragment,
        transport_kind: upper.kind,
    })
}

#[inline]
fn parse_v6(head: &[u8], arrived_len: usize) -> Result<Parsed, DropReason> {
    let header = head.first_chunk::<{ ipv6::HEADER_LEN }>().ok_or(DropReason::Truncated)?;
    let len = ipv6::HEADER_LEN + usize::from(ipv6::payload_len(header));
    // A jumbogram (RFC 2675) says 0; the kernel makes them only where an interface's gso_max_size asks for it.
    if ipv6::payload_len(header) == 0 && header[ipv6::NEXT_HEADER] == ipv6::HOP_BY_HOP {
        return Err(DropReason::BadHeader);
    }
    if len > arrived_len {
        return Err(DropReason::Truncated);
    }
    // Everything from here on sees the packet without padding.
    let bytes = &head[..len.min(head.len())];
    let (src, dst) = (ipv6::src(header), ipv6::dst(header));
    // RFC 4291 §2.5.5.2 does not mean the mapped form for the wire, and the tables mean IPv4 by it.
    if src.is_v4() {
        return Err(DropReason::MartianSource);
    }
    if dst.is_v4() {
        return Err(DropReason::MartianDestination);
    }
    check_source(src)?;

    let chain = ipv6::walk(bytes)?;
    let payload_len = (len - chain.at) as u32;
    let fragment = match chain.fragment {
        None => None,
        Some(found) => {
            let start = found.at + ipv6::FRAGMENT_HEADER_LEN;
            let fragment = Fragment { id: found.id, offset: found.offset, len: (len - start) as u32, more: found.more, header: found.at as u16 };
            check_fragment(&fragment, (found.at - ipv6::HEADER_LEN) as u32)?;
            Some(fragment)
        }
    };
    let upper = upper(bytes, chain.at, payload_len, chain.protocol, protocol::ICMPV6, fragment.as_ref())?;
    Ok(Parsed {
        tuple: Tuple { src, dst, src_port: upper.src_port, dst_port: upper.dst_port, protocol: chain.protocol },
        transport: chain.at as u16,
        len: len as u32,
        ttl: header[ipv6::HOP_LIMIT],
        traffic_class: ipv6::traffic_class(header),
        dont_fragment: true,
        fragment,
        transport_kind: upper.kind,
    })
}

#[inline]
fn check_source(src: Addr) -> Result<(), DropReason> {
    match Scope::of(src) {
        // Link-local sources are the pipeline's to judge: NodeLocal DNS and a mesh's probes have them.
        Scope::Unicast | Scope::LinkLocal => Ok(()),
        Scope::Unspecified | Scope::Loopback | Scope::Multicast | Scope::Broadcast => Err(DropReason::MartianSource),
    }
}

/// `unfragmentable_len` is what stands before the fragmentable part and counts towards the datagram's length.
#[inline]
fn check_fragment(fragment: &Fragment, unfragmentable_len: u32) -> Result<(), DropReason> {
    let uneven = fragment.more && !fragment.len.is_multiple_of(8);
    if fragment.len == 0 || uneven || unfragmentable_len + fragment.offset + fragment.len > DATAGRAM_LEN_MAX {
        return Err(DropReason::FragmentBad);
    }
    Ok(())
}

struct Upper {
    src_port: u16,
    dst_port: u16,
    kind: Transport,
}

/// Looks at the transport header at `at` in `bytes`, which end where the packet or its head does; `payload_len` is what the packet has
/// from there on. `icmp_protocol` is the number that ICMP has in this family.
#[inline]
fn upper(bytes: &[u8], at: usize, payload_len: u32, protocol: u8, icmp_protocol: u8, fragment: Option<&Fragment>) -> Result<Upper, DropReason> {
    let short = match fragment {
        None => DropReason::Truncated,
        Some(first) if first.offset == 0 => DropReason::FragmentBad,
        // RFC 3128: a second fragment that would write over the first one's TCP header.
        Some(tail) if protocol == protocol::TCP && tail.offset < tcp::HEADER_LEN as u32 => return Err(DropReason::FragmentBad),
        Some(_) => return Ok(Upper { src_port: 0, dst_port: 0, kind: Transport::Tail }),
    };
    let body = bytes.get(at..).ok_or(short)?;
    match protocol {
        protocol::TCP => {
            let header = body.first_chunk::<{ tcp::HEADER_LEN }>().ok_or(short)?;
            let header_len = header[tcp::DATA_OFFSET] >> 4 << 2;
            if usize::from(header_len) < tcp::HEADER_LEN {
                return Err(DropReason::BadHeader);
            }
            if usize::from(header_len) > body.len() {
                return Err(short);
            }
            let (src_port, dst_port) = ports([header[0], header[1], header[2], header[3]]);
            Ok(Upper { src_port, dst_port, kind: Transport::Tcp { flags: header[tcp::FLAGS], header_len } })
        }
        protocol::UDP => {
            let header = body.first_chunk::<{ udp::HEADER_LEN }>().ok_or(short)?;
            // Less than the packet has is allowed: RFC 9868 puts options there. A superframe's length is that of all its segments.
            let len = u32::from(u16::from_be_bytes([header[udp::LEN], header[udp::LEN + 1]]));
            if len < udp::HEADER_LEN as u32 {
                return Err(DropReason::BadHeader);
            }
            if len > payload_len && fragment.is_none() {
                return Err(DropReason::Truncated);
            }
            let (src_port, dst_port) = ports([header[0], header[1], header[2], header[3]]);
            Ok(Upper { src_port, dst_port, kind: Transport::Udp })
        }
        _ if protocol == icmp_protocol => upper_icmp(bytes, at, short, protocol),
        _ => Ok(Upper { src_port: 0, dst_port: 0, kind: Transport::Other }),
    }
}

fn upper_icmp(bytes: &[u8], at: usize, short: DropReason, protocol: u8) -> Result<Upper, DropReason> {
    let header = bytes[at..].first_chunk::<{ icmp::HEADER_LEN }>().ok_or(short)?;
    let id = u16::from_be_bytes([header[icmp::ECHO_ID], header[icmp::ECHO_ID + 1]]);
    let message = header[icmp::TYPE];
    let (request, reply, is_error) = if protocol == protocol::ICMP {
        let is_error = matches!(message, icmp::v4::UNREACHABLE | icmp::v4::TIME_EXCEEDED | icmp::v4::PARAMETER_PROBLEM);
        (icmp::v4::ECHO_REQUEST, icmp::v4::ECHO_REPLY, is_error)
    } else {
        (icmp::v6::ECHO_REQUEST, icmp::v6::ECHO_REPLY, matches!(message, icmp::v6::UNREACHABLE..=icmp::v6::PARAMETER_PROBLEM))
    };
    if message == request {
        return Ok(Upper { src_port: id, dst_port: 0, kind: Transport::EchoRequest });
    }
    if message == reply {
        return Ok(Upper { src_port: 0, dst_port: id, kind: Transport::EchoReply });
    }
    if !is_error {
        return Ok(Upper { src_port: 0, dst_port: 0, kind: Transport::IcmpOther(message) });
    }
    if short == DropReason::FragmentBad {
        // Errors are kept short so that they need not be cut (RFC 1812 §4.3.2.3, RFC 4443 §2.4 (c)); one that was cannot be translated.
        return Err(DropReason::FragmentBad);
    }
    let quoted = at + icmp::HEADER_LEN;
    check_quote(&bytes[quoted..], protocol)?;
    Ok(Upper { src_port: 0, dst_port: 0, kind: Transport::IcmpError { quoted: quoted as u16 } })
}

/// A quote is of the error's own family and has at least a whole IP header and eight bytes (RFC 792).
fn check_quote(quote: &[u8], icmp_protocol: u8) -> Result<(), DropReason> {
    let first = *quote.first().ok_or(DropReason::Truncated)?;
    let header_len = match (first >> 4, icmp_protocol) {
        (4, protocol::ICMP) => usize::from(first & 0x0f) * 4,
        (6, protocol::ICMPV6) => ipv6::HEADER_LEN,
        _ => return Err(DropReason::BadHeader),
    };
    if header_len < ipv4::HEADER_LEN {
        return Err(DropReason::BadHeader);
    }
    if quote.len() < header_len + icmp::QUOTE_PAYLOAD_LEN_MIN { Err(DropReason::Truncated) } else { Ok(()) }
}

#[inline]
fn ports(bytes: [u8; 4]) -> (u16, u16) {
    let both = u32::from_be_bytes(bytes);
    ((both >> 16) as u16, both as u16)
}

#[cfg(test)]
mod tests;
