//! Packets for tests: built with smoltcp's emitters, whose code for lengths and checksums is not ours, and verified by them.
//!
//! Endpoints are written as text, `"10.0.0.1:80"` or `"[fd00::1]:80"`, addresses without a port as `"10.0.0.1"` or `"fd00::1"`;
//! everything here panics on what it cannot make, for that is a mistake in a test.

use std::net::{IpAddr, SocketAddr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4Packet, Icmpv6Packet};
use smoltcp::wire::{IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr, TcpPacket, TcpSeqNumber, UdpPacket};

use crate::addr::{Addr, Tuple, protocol};
use crate::packet::{Ingress, Offload, Packet};

/// TCP flags as `parse` gives them.
pub mod flags {
    /// No more data.
    pub const FIN: u8 = 0x01;
    /// A connection begins.
    pub const SYN: u8 = 0x02;
    /// A connection is reset.
    pub const RST: u8 = 0x04;
    /// Data for the reader at once.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
}

/// The TTL of every packet made here.
pub const TTL: u8 = 64;

/// A TCP segment without options; sequence number 1000, acknowledgement number 2000, window 30000.
pub fn tcp(src: &str, dst: &str, flags: u8, payload: &[u8]) -> Vec<u8> {
    tcp_with_options(src, dst, flags, &[], payload)
}

/// A TCP segment with options: a multiple of four bytes of them.
pub fn tcp_with_options(src: &str, dst: &str, flags: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let (src, dst) = (endpoint(src), endpoint(dst));
    assert!(options.len().is_multiple_of(4) && options.len() <= 40, "TCP options come in multiples of four bytes, 40 at most");
    let header_len = 20 + options.len();
    let mut bytes = vec![0; header_len + payload.len()];
    bytes[20..header_len].copy_from_slice(options);
    bytes[header_len..].copy_from_slice(payload);
    let mut segment = TcpPacket::new_unchecked(&mut bytes[..]);
    segment.set_src_port(src.port());
    segment.set_dst_port(dst.port());
    segment.set_seq_number(TcpSeqNumber(1000));
    segment.set_ack_number(TcpSeqNumber(if flags & flags::ACK != 0 { 2000 } else { 0 }));
    segment.set_header_len(header_len as u8);
    segment.set_window_len(30000);
    segment.into_inner()[13] = flags;
    TcpPacket::new_unchecked(&mut bytes[..]).fill_checksum(&src.ip().into(), &dst.ip().into());
    ip_from(src.ip(), dst.ip(), protocol::TCP, &bytes)
}

/// A UDP datagram with a checksum.
pub fn udp(src: &str, dst: &str, payload: &[u8]) -> Vec<u8> {
    let (src, dst) = (endpoint(src), endpoint(dst));
    let mut bytes = vec![0; 8 + payload.len()];
    bytes[8..].copy_from_slice(payload);
    let mut datagram = UdpPacket::new_unchecked(&mut bytes[..]);
    datagram.set_src_port(src.port());
    datagram.set_dst_port(dst.port());
    datagram.set_len(8 + payload.len() as u16);
    datagram.fill_checksum(&src.ip().into(), &dst.ip().into());
    ip_from(src.ip(), dst.ip(), protocol::UDP, &bytes)
}

/// A UDP datagram over IPv4 without a checksum.
pub fn udp_unsummed(src: &str, dst: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = udp(src, dst, payload);
    assert!(bytes[0] >> 4 == 4, "UDP over IPv6 has a checksum");
    bytes[26..28].fill(0);
    bytes
}

/// An echo request, ICMP or ICMPv6 as the addresses are.
pub fn echo_request(src: &str, dst: &str, id: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
    let kind = if address(dst).is_ipv4() { 8 } else { 128 };
    icmp(src, dst, kind, 0, u32::from(id) << 16 | u32::from(sequence), payload)
}

/// An echo reply, ICMP or ICMPv6 as the addresses are.
pub fn echo_reply(src: &str, dst: &str, id: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
    let kind = if address(dst).is_ipv4() { 0 } else { 129 };
    icmp(src, dst, kind, 0, u32::from(id) << 16 | u32::from(sequence), payload)
}

/// An ICMP or ICMPv6 error that quotes `quoted`; `rest` is what stands between the checksum and the quote (an MTU, a pointer).
pub fn icmp_error(src: &str, dst: &str, kind: u8, code: u8, rest: u32, quoted: &[u8]) -> Vec<u8> {
    icmp(src, dst, kind, code, rest, quoted)
}

/// Any ICMP or ICMPv6 message: type, code, the four octets behind the checksum, and what follows.
pub fn icmp(src: &str, dst: &str, kind: u8, code: u8, rest: u32, payload: &[u8]) -> Vec<u8> {
    let (src, dst) = (address(src), address(dst));
    let mut bytes = vec![kind, code, 0, 0];
    bytes.extend_from_slice(&rest.to_be_bytes());
    bytes.extend_from_slice(payload);
    match (src, dst) {
        (IpAddr::V4(_), IpAddr::V4(_)) => {
            Icmpv4Packet::new_unchecked(&mut bytes[..]).fill_checksum();
            ip_from(src, dst, protocol::ICMP, &bytes)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            Icmpv6Packet::new_unchecked(&mut bytes[..]).fill_checksum(&from, &to);
            ip_from(src, dst, protocol::ICMPV6, &bytes)
        }
        _ => panic!("{src} and {dst} are not of one family"),
    }
}

/// An IP packet with any payload.
pub fn ip(src: &str, dst: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    ip_from(address(src), address(dst), protocol, payload)
}

/// Puts an IPv6 extension header of type `kind` with `body` (6 bytes, or 6 and a multiple of 8) between the IPv6 header and what follows it.
pub fn with_extension(bytes: &[u8], kind: u8, body: &[u8]) -> Vec<u8> {
    assert!(bytes[0] >> 4 == 6 && body.len() % 8 == 6, "an IPv6 packet, and a header that is a multiple of 8 bytes long");
    let mut out = bytes[..40].to_vec();
    out.push(bytes[6]);
    out.push((body.len() / 8) as u8);
    out.extend_from_slice(body);
    out.extend_from_slice(&bytes[40..]);
    out[6] = kind;
    set_len_v6(&mut out);
    out
}

/// Cuts a packet without IPv6 extension headers into fragments of at most `mtu` bytes.
pub fn fragments(bytes: &[u8], mtu: usize, id: u32) -> Vec<Vec<u8>> {
    let v4 = bytes[0] >> 4 == 4;
    let header_len = if v4 { usize::from(bytes[0] & 15) * 4 } else { 40 };
    let room = (mtu - header_len - if v4 { 0 } else { 8 }) / 8 * 8;
    let payload = &bytes[header_len..];
    let count = payload.len().div_ceil(room);
    payload
        .chunks(room)
        .enumerate()
        .map(|(index, chunk)| fragment(bytes, id, index * room, chunk.len(), if index + 1 < count { More::Follow } else { More::None }))
        .collect()
}

/// Whether more fragments follow one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum More {
    /// It is not the last.
    Follow,
    /// It is the last.
    None,
}

/// One fragment of a packet without IPv6 extension headers: `len` bytes of its payload from `offset` on.
pub fn fragment(bytes: &[u8], id: u32, offset: usize, len: usize, more: More) -> Vec<u8> {
    let more = more == More::Follow;
    if bytes[0] >> 4 == 4 {
        let header_len = usize::from(bytes[0] & 15) * 4;
        let mut out = bytes[..header_len].to_vec();
        out.extend_from_slice(&bytes[header_len + offset..][..len]);
        let mut packet = Ipv4Packet::new_unchecked(&mut out[..]);
        packet.set_ident(id as u16);
        packet.set_dont_frag(false);
        packet.set_more_frags(more);
        packet.set_frag_offset(offset as u16);
        packet.set_total_len((header_len + len) as u16);
        packet.fill_checksum();
        out
    } else {
        let mut out = bytes[..40].to_vec();
        out.extend_from_slice(&[bytes[6], 0]);
        out.extend_from_slice(&(offset as u16 | u16::from(more)).to_be_bytes());
        out.extend_from_slice(&id.to_be_bytes());
        out.extend_from_slice(&bytes[40 + offset..][..len]);
        out[6] = 44;
        set_len_v6(&mut out);
        out
    }
}

/// The same packet as a sender leaves it to offloads: its transport checksum field holds the uncomplemented sum of the pseudo header.
pub fn partial(bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    let view = View::of(bytes).expect("an IP packet");
    let at = view.transport + checksum_offset(view.protocol).expect("a protocol whose checksum the kernel offloads");
    let len = (bytes.len() - view.transport) as u32;
    let sum = smoltcp::wire::checksum::pseudo_header(&view.src.into(), &view.dst.into(), IpProtocol::from(view.protocol), len);
    out[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    out
}

/// What an offloading device does before it sends: turns a [`partial`] packet into a whole one.
pub fn complete(bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    let view = View::of(bytes).expect("an IP packet");
    let at = view.transport + checksum_offset(view.protocol).expect("a protocol whose checksum the kernel offloads");
    let sum = !smoltcp::wire::checksum::data(&bytes[view.transport..]);
    let sum = if view.protocol == protocol::UDP && sum == 0 { 0xffff } else { sum };
    out[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    out
}

/// Sets the TTL or hop limit.
pub fn with_ttl(mut bytes: Vec<u8>, ttl: u8) -> Vec<u8> {
    if bytes[0] >> 4 == 4 {
        let mut packet = Ipv4Packet::new_unchecked(&mut bytes[..]);
        packet.set_hop_limit(ttl);
        packet.fill_checksum();
    } else {
        Ipv6Packet::new_unchecked(&mut bytes[..]).set_hop_limit(ttl);
    }
    bytes
}

/// Sets DSCP and ECN.
pub fn with_traffic_class(mut bytes: Vec<u8>, traffic_class: u8) -> Vec<u8> {
    if bytes[0] >> 4 == 4 {
        bytes[1] = traffic_class;
        Ipv4Packet::new_unchecked(&mut bytes[..]).fill_checksum();
    } else {
        Ipv6Packet::new_unchecked(&mut bytes[..]).set_traffic_class(traffic_class);
    }
    bytes
}

/// Sets the DF flag of an IPv4 packet; packets made here do not have it.
pub fn with_dont_fragment(mut bytes: Vec<u8>) -> Vec<u8> {
    let mut packet = Ipv4Packet::new_unchecked(&mut bytes[..]);
    packet.set_dont_frag(true);
    packet.fill_checksum();
    bytes
}

/// The packet as the pipeline takes it, without offloads.
pub fn packet(bytes: &mut [u8], ingress: Ingress) -> Packet<'_> {
    Packet { head: bytes, tail_len: 0, offload: Offload::default(), ingress }
}

/// A tuple: `tuple(protocol::TCP, "10.0.0.1:80", "10.0.0.2:90")`.
pub fn tuple(protocol: u8, src: &str, dst: &str) -> Tuple {
    let (src, dst) = (endpoint(src), endpoint(dst));
    Tuple { src: src.ip().into(), dst: dst.ip().into(), src_port: src.port(), dst_port: dst.port(), protocol }
}

/// An address: `addr("fd00::1")`.
pub fn addr(text: &str) -> Addr {
    address(text).into()
}

/// Panics unless every length and checksum of a whole packet is right, those of an ICMP error's quote included as far as it goes.
/// Of a fragment only the IP header is looked at.
#[track_caller]
pub fn verify(bytes: &[u8]) {
    if let Err(what) = check(bytes) {
        panic!("{what} in {bytes:02x?}");
    }
}

/// What [`verify`] panics with.
pub fn check(bytes: &[u8]) -> Result<(), String> {
    let view = View::of(bytes)?;
    if view.len != bytes.len() {
        return Err(format!("the IP header says {} bytes of {}", view.len, bytes.len()));
    }
    if view.fragment {
        return Ok(());
    }
    let (src, dst): (IpAddress, IpAddress) = (view.src.into(), view.dst.into());
    let transport = &bytes[view.transport..];
    let whole = match view.protocol {
        protocol::TCP => TcpPacket::new_checked(transport).map_err(|_| "a malformed TCP header")?.verify_checksum(&src, &dst),
        protocol::UDP => {
            let datagram = UdpPacket::new_checked(transport).map_err(|_| "a malformed UDP header")?;
            if usize::from(datagram.len()) != transport.len() {
                return Err(format!("UDP says {} bytes of {}", datagram.len(), transport.len()));
            }
            datagram.verify_checksum(&src, &dst)
        }
        protocol::ICMP => {
            check_quote(&transport[8..], matches!(transport[0], 3 | 11 | 12))?;
            Icmpv4Packet::new_checked(transport).map_err(|_| "a malformed ICMP header")?.verify_checksum()
        }
        protocol::ICMPV6 => {
            check_quote(&transport[8..], matches!(transport[0], 1..=4))?;
            // Not through smoltcp's view, which refuses the types that it does not know.
            let sum = smoltcp::wire::checksum::combine(&[
                smoltcp::wire::checksum::pseudo_header(&src, &dst, IpProtocol::Icmpv6, transport.len() as u32),
                smoltcp::wire::checksum::data(transport),
            ]);
            sum == 0xffff
        }
        _ => true,
    };
    if whole { Ok(()) } else { Err(format!("a wrong checksum of protocol {}", view.protocol)) }
}

/// A quote may be cut short: its IPv4 header checksum is right, and its transport checksum if all of it is there.
fn check_quote(quote: &[u8], is_error: bool) -> Result<(), String> {
    if !is_error {
        return Ok(());
    }
    let view = View::of(quote).map_err(|what| format!("{what} of the quote"))?;
    if view.len == quote.len() { check(quote).map_err(|what| format!("{what} of the quote")) } else { Ok(()) }
}

struct View {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    transport: usize,
    len: usize,
    fragment: bool,
}

impl View {
    fn of(bytes: &[u8]) -> Result<View, String> {
        match bytes.first().map(|first| first >> 4) {
            Some(4) if bytes.len() >= 20 => {
                let packet = Ipv4Packet::new_unchecked(bytes);
                if bytes.len() < usize::from(packet.header_len()) || packet.header_len() < 20 {
                    return Err("an IPv4 header of a wrong length".into());
                }
                if !packet.verify_checksum() {
                    return Err("a wrong IPv4 header checksum".into());
                }
                Ok(View {
                    src: packet.src_addr().into(),
                    dst: packet.dst_addr().into(),
                    protocol: packet.next_header().into(),
                    transport: packet.header_len().into(),
                    len: packet.total_len().into(),
                    fragment: packet.more_frags() || packet.frag_offset() != 0,
                })
            }
            Some(6) if bytes.len() >= 40 => {
                let packet = Ipv6Packet::new_unchecked(bytes);
                let mut view = View {
                    src: packet.src_addr().into(),
                    dst: packet.dst_addr().into(),
                    protocol: packet.next_header().into(),
                    transport: 40,
                    len: packet.total_len(),
                    fragment: false,
                };
                while matches!(view.protocol, 0 | 43 | 44 | 60) {
                    let header = bytes.get(view.transport..view.transport + 8).ok_or("an IPv6 extension header that is cut short")?;
                    let len = if view.protocol == 44 { 8 } else { 8 + usize::from(header[1]) * 8 };
                    view.fragment |= view.protocol == 44 && (header[2] != 0 || header[3] & 0xf9 != 0);
                    view.protocol = header[0];
                    view.transport += len;
                }
                Ok(view)
            }
            _ => Err("neither an IPv4 nor an IPv6 header".into()),
        }
    }
}

fn checksum_offset(protocol: u8) -> Option<usize> {
    match protocol {
        protocol::TCP => Some(16),
        protocol::UDP => Some(6),
        _ => None,
    }
}

fn endpoint(text: &str) -> SocketAddr {
    text.parse().unwrap_or_else(|_| panic!("{text} is not an address and a port"))
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap_or_else(|_| panic!("{text} is not an address"))
}

fn ip_from(src: IpAddr, dst: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let next_header = IpProtocol::from(protocol);
    match (src, dst) {
        (IpAddr::V4(src_addr), IpAddr::V4(dst_addr)) => {
            let mut bytes = vec![0; 20 + payload.len()];
            bytes[20..].copy_from_slice(payload);
            let mut packet = Ipv4Packet::new_unchecked(&mut bytes[..]);
            let repr = Ipv4Repr { src_addr, dst_addr, next_header, payload_len: payload.len(), hop_limit: TTL };
            repr.emit(&mut packet, &ChecksumCapabilities::default());
            packet.set_dont_frag(false);
            packet.fill_checksum();
            bytes
        }
        (IpAddr::V6(src_addr), IpAddr::V6(dst_addr)) => {
            let mut bytes = vec![0; 40 + payload.len()];
            bytes[40..].copy_from_slice(payload);
            let repr = Ipv6Repr { src_addr, dst_addr, next_header, payload_len: payload.len(), hop_limit: TTL };
            repr.emit(&mut Ipv6Packet::new_unchecked(&mut bytes[..]));
            bytes
        }
        _ => panic!("{src} and {dst} are not of one family"),
    }
}

fn set_len_v6(bytes: &mut [u8]) {
    let len = u16::try_from(bytes.len() - 40).expect("an IPv6 payload that fits its length field");
    bytes[4..6].copy_from_slice(&len.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_packet_made_here_is_whole() {
        for (a, b) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            let port = |host: &str, port: u16| SocketAddr::new(address(host), port).to_string();
            let (from, to) = (port(a, 1234), port(b, 80));
            let segment = tcp_with_options(&from, &to, flags::SYN, &[2, 4, 5, 180], b"odd");
            verify(&segment);
            verify(&udp(&from, &to, b"data"));
            verify(&complete(&partial(&segment)));
            assert_eq!(complete(&partial(&segment)), segment);
            verify(&echo_request(a, b, 7, 1, b"ping"));
            verify(&echo_reply(a, b, 7, 1, b"ping"));
            verify(&icmp_error(b, a, 3, 1, 0, &segment));
            verify(&with_ttl(with_traffic_class(segment, 0x2e), 3));
            let whole = udp(&from, &to, &[7; 3000]);
            let cut = fragments(&whole, 1280, 9);
            assert_eq!(cut.len(), 3);
            cut.iter().for_each(|bytes| verify(bytes));
        }
        verify(&udp_unsummed("10.0.0.1:1", "10.0.0.2:2", b"x"));
        verify(&with_extension(&udp("[fd00::1]:1", "[fd00::2]:2", b"x"), 60, &[1, 4, 0, 0, 0, 0]));
    }

    #[test]
    fn one_wrong_bit_is_found() {
        let good = tcp("10.0.0.1:1", "10.0.0.2:2", flags::ACK, b"data");
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(check(&bad).is_err(), "bit {bit}");
        }
    }
}
