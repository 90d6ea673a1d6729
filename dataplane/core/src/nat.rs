//! Translation in place: addresses, ports and echo identifiers, with every checksum that covers them.
//!
//! Checksums change by the difference alone (RFC 1624), so that a superframe costs what a small packet does and a packet that
//! arrived broken leaves broken, for its receiver to see. The old values are read from the packet itself: a packet may be
//! translated twice with one [`Parsed`].
//!
//! Which checksum covers what:
//!
//! | | pseudo header | ports or identifier |
//! |---|---|---|
//! | TCP, UDP, full | yes | yes |
//! | TCP, UDP, [`Checksum::Partial`] | yes (the field holds nothing else) | no |
//! | ICMP | no | yes |
//! | ICMPv6 | yes | yes |
//! | SCTP and others | left alone | none |
//!
//! Read first: RFC 1624 §3, RFC 3022 §4, RFC 5508 §4 for the quotes of ICMP errors, Linux `include/linux/skbuff.h` on `CHECKSUM_PARTIAL`.

use crate::addr::{Addr, Tuple, protocol};
use crate::packet::Checksum;
use crate::parse::{Parsed, Transport};
use crate::wire::checksum::{Delta, Folded, Stored, Sum};
use crate::wire::ip::{self, Family};
use crate::wire::{icmp, ipv4, ipv6, set_u16, tcp, u16_at, udp};

/// Makes `to` of the packet's addresses and of its ports, or of its echo identifier (a request's is the source port, a reply's the
/// destination port). What has no ports to write keeps what it has.
#[inline]
pub fn translate(head: &mut [u8], parsed: &Parsed, checksum: Checksum, to: &Tuple) {
    let addresses = ip::set_addresses(head, to.src, to.dst);
    let at = usize::from(parsed.transport);
    match parsed.transport_kind {
        Transport::Tcp { .. } => {
            let ports = set_ports(&mut head[at..], to.src_port, to.dst_port);
            match checksum {
                Checksum::Full => change(head, at + tcp::CHECKSUM, addresses + ports),
                Checksum::Partial => change_partial(head, at + tcp::CHECKSUM, addresses),
            }
        }
        Transport::Udp => {
            let ports = set_ports(&mut head[at..], to.src_port, to.dst_port);
            match checksum {
                Checksum::Full => change_udp(head, at + udp::CHECKSUM, addresses + ports),
                Checksum::Partial => change_partial(head, at + udp::CHECKSUM, addresses),
            }
        }
        Transport::EchoRequest => translate_echo(head, at, addresses, to.src_port),
        Transport::EchoReply => translate_echo(head, at, addresses, to.dst_port),
        Transport::IcmpError { .. } | Transport::IcmpOther(_) => change(head, at + icmp::CHECKSUM, icmp_pseudo_header(head, addresses)),
        // A tail's datagram has its checksum in the head. SCTP's CRC does not cover addresses (RFC 9260 §6.8).
        Transport::Tail | Transport::Other => {}
    }
}

/// What a translation from one tuple to another changes in the sums of a packet, worked out once for all packets of a flow: of addresses in the
/// low 16 bits, of ports in the high ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change(pub(crate) u32);

impl Change {
    /// From the tuple that packets come with to the one that they leave with, both of one family.
    pub fn new(from: &Tuple, to: &Tuple) -> Change {
        let addresses = Delta::addr(from.src, to.src) + Delta::addr(from.dst, to.dst);
        let ports = Delta::word(from.src_port, to.src_port) + Delta::word(from.dst_port, to.dst_port);
        let [addresses, ports] = [addresses, ports].map(|delta| u32::from(Folded::from(delta).0));
        Change(addresses | ports << 16)
    }

    #[inline]
    fn addresses(self) -> Folded {
        Folded(self.0 as u16)
    }

    #[inline]
    fn ports(self) -> Folded {
        Folded((self.0 >> 16) as u16)
    }
}

/// [`translate`] of a whole TCP segment or UDP datagram that still has the tuple `change` was worked out for: nothing of it is read but
/// its checksums.
#[inline(always)]
pub fn translate_known(head: &mut [u8], parsed: &Parsed, checksum: Checksum, to: &Tuple, change: Change) {
    ip::replace_addresses(head, to.src, to.dst, change.addresses());
    let transport = &mut head[usize::from(parsed.transport)..];
    let ports = u32::from(to.src_port) << 16 | u32::from(to.dst_port);
    let is_tcp = matches!(parsed.transport_kind, Transport::Tcp { .. });
    // The header that parse found, as far as it is written.
    let field = if is_tcp {
        let header = transport.first_chunk_mut::<{ tcp::HEADER_LEN }>().expect("a TCP header that parse found");
        header[..4].copy_from_slice(&ports.to_be_bytes());
        &mut header[tcp::CHECKSUM..tcp::CHECKSUM + 2]
    } else {
        let header = transport.first_chunk_mut::<{ udp::HEADER_LEN }>().expect("a UDP header that parse found");
        header[..4].copy_from_slice(&ports.to_be_bytes());
        &mut header[udp::CHECKSUM..udp::CHECKSUM + 2]
    };
    match checksum {
        Checksum::Full if is_tcp => self::change(field, 0, change.addresses() + change.ports()),
        Checksum::Full => change_udp(field, 0, change.addresses() + change.ports()),
        Checksum::Partial => change_partial(field, 0, change.addresses()),
    }
}

/// Translates an ICMP error: writes `outer`'s addresses outside and makes `quoted_to` of the packet inside, which is quoted as it was
/// when it met the error's sender: with `quoted_to`'s source as its source. Leaves alone what is no ICMP error.
pub fn translate_quoted(head: &mut [u8], parsed: &Parsed, outer: &Tuple, quoted_to: &Tuple) {
    let Transport::IcmpError { .. } = parsed.transport_kind else { return };
    let addresses = ip::set_addresses(head, outer.src, outer.dst);
    let mut delta = icmp_pseudo_header(head, addresses);
    if let Some(quote) = Quote::of(head, parsed) {
        // The quote changes in up to seven places, and is no more than headers: the difference of its sums is simpler than theirs.
        // It begins at an even offset of the ICMP message.
        let old = Sum::of(&head[quote.start..quote.end]);
        quote.translate(head, quoted_to);
        delta += Delta::sums(old, Sum::of(&head[quote.start..quote.end]));
    }
    change(head, usize::from(parsed.transport) + icmp::CHECKSUM, delta);
}

/// Source and destination of the packet that an ICMP error quotes, whatever else of it the quote holds.
pub fn quoted_addresses(head: &[u8], parsed: &Parsed) -> Option<(Addr, Addr)> {
    let Transport::IcmpError { quoted } = parsed.transport_kind else { return None };
    let bytes = head.get(usize::from(quoted)..)?;
    match Family::of_packet(bytes)? {
        Family::V4 => bytes.first_chunk().map(|header| (ipv4::src(header), ipv4::dst(header))),
        Family::V6 => bytes.first_chunk().map(|header| (ipv6::src(header), ipv6::dst(header))),
    }
}

/// The tuple of the packet that an ICMP error quotes. `None` for what no flow can be found by: a fragment that is not the first, an
/// ICMP message that is no echo, a chain of headers that the quote cuts.
pub fn quoted_tuple(head: &[u8], parsed: &Parsed) -> Option<Tuple> {
    let quote = Quote::of(head, parsed)?;
    let (src, dst) = quote.addresses(head);
    let at = quote.transport;
    let (src_port, dst_port) = match quote.kind {
        QuotedKind::Tcp | QuotedKind::Udp => (u16_at(head, at), u16_at(head, at + 2)),
        QuotedKind::EchoRequest => (u16_at(head, at + icmp::ECHO_ID), 0),
        QuotedKind::EchoReply => (0, u16_at(head, at + icmp::ECHO_ID)),
        QuotedKind::IcmpOther | QuotedKind::Tail => return None,
        QuotedKind::Other => (0, 0),
    };
    Some(Tuple { src, dst, src_port, dst_port, protocol: quote.protocol })
}

/// Lowers the maximum segment size that a TCP SYN announces to `mss`, if it is higher (RFC 6691). A SYN without the option is left
/// alone: it means the smallest default already.
pub fn clamp_mss(head: &mut [u8], parsed: &Parsed, checksum: Checksum, mss: u16) {
    let Transport::Tcp { flags, header_len } = parsed.transport_kind else { return };
    if flags & tcp::SYN == 0 {
        return;
    }
    let start = usize::from(parsed.transport);
    let options = start + tcp::HEADER_LEN;
    let Some(at) = tcp::mss_value_at(&head[options..start + usize::from(header_len)]) else { return };
    let old = u16_at(head, options + at);
    if old <= mss {
        return;
    }
    set_u16(head, options + at, mss);
    match checksum {
        Checksum::Full => {
            // At an odd offset the two octets belong to two words, which sum to the swapped value.
            let delta = if at % 2 == 0 { Delta::word(old, mss) } else { Delta::word(old.swap_bytes(), mss.swap_bytes()) };
            change(head, start + tcp::CHECKSUM, delta);
        }
        // The header is summed later, by whoever completes the checksum.
        Checksum::Partial => {}
    }
}

#[inline]
fn translate_echo(head: &mut [u8], at: usize, addresses: Delta, id: u16) {
    let delta = icmp_pseudo_header(head, addresses) + Delta::word(u16_at(head, at + icmp::ECHO_ID), id);
    set_u16(head, at + icmp::ECHO_ID, id);
    change(head, at + icmp::CHECKSUM, delta);
}

/// What a change of addresses means to the ICMP checksum: nothing for IPv4, which has no pseudo header there.
#[inline]
fn icmp_pseudo_header(head: &[u8], addresses: Delta) -> Delta {
    match Family::of_packet(head) {
        Some(Family::V4) => Delta::NONE,
        _ => addresses,
    }
}

#[inline]
fn set_ports(transport: &mut [u8], src_port: u16, dst_port: u16) -> Delta {
    let ports = transport.first_chunk_mut::<4>().expect("a transport header that parse found");
    let new = u32::from(src_port) << 16 | u32::from(dst_port);
    let delta = Delta::long(u32::from_be_bytes(*ports), new);
    *ports = new.to_be_bytes();
    delta
}

#[inline]
fn change(head: &mut [u8], at: usize, delta: impl Into<Folded>) {
    let stored = Stored(u16_at(head, at)).changed(delta);
    set_u16(head, at, stored.0);
}

#[inline(always)]
fn change_udp(head: &mut [u8], at: usize, delta: impl Into<Folded>) {
    let stored = Stored(u16_at(head, at)).changed_udp(delta);
    set_u16(head, at, stored.0);
}

#[inline]
fn change_partial(head: &mut [u8], at: usize, delta: impl Into<Folded>) {
    let sum = Sum::of_words(&[u16_at(head, at)]).changed(delta);
    set_u16(head, at, sum.folded());
}

/// Where things stand in the packet that an ICMP error quotes. Offsets are from the outer IP header's first byte.
#[derive(Clone, Copy, Debug)]
struct Quote {
    start: usize,
    /// Where the quoted packet ends, or the error, or what is at hand of it.
    end: usize,
    family: Family,
    transport: usize,
    protocol: u8,
    kind: QuotedKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum QuotedKind {
    Tcp,
    Udp,
    EchoRequest,
    EchoReply,
    IcmpOther,
    Tail,
    Other,
}

impl Quote {
    fn of(head: &[u8], parsed: &Parsed) -> Option<Quote> {
        let Transport::IcmpError { quoted } = parsed.transport_kind else { return None };
        let start = usize::from(quoted);
        let bytes = head.get(start..head.len().min(parsed.len as usize))?;
        let (family, len, upper, is_tail) = match Family::of_packet(bytes)? {
            Family::V4 => {
                let header = bytes.first_chunk::<{ ipv4::HEADER_LEN }>()?;
                let is_tail = ipv4::flags_offset(header) & ipv4::OFFSET_MASK != 0;
                let upper = ipv6::Upper { protocol: header[ipv4::PROTOCOL], at: ipv4::header_len(header), fragment: None };
                (Family::V4, usize::from(ipv4::total_len(header)), upper, is_tail)
            }
            Family::V6 => {
                let header = bytes.first_chunk::<{ ipv6::HEADER_LEN }>()?;
                let upper = ipv6::walk(bytes).ok()?;
                let is_tail = upper.fragment.is_some_and(|fragment| fragment.offset != 0);
                (Family::V6, ipv6::HEADER_LEN + usize::from(ipv6::payload_len(header)), upper, is_tail)
            }
        };
        // What RFC 4884 appends behind a quote is not the quote's. A quoted length of 0 or nonsense bounds nothing.
        let bytes = if len > upper.at { &bytes[..len.min(bytes.len())] } else { bytes };
        let body = bytes.get(upper.at..)?;
        let kind = match upper.protocol {
            _ if is_tail => QuotedKind::Tail,
            _ if body.len() < icmp::QUOTE_PAYLOAD_LEN_MIN => return None,
            protocol::TCP => QuotedKind::Tcp,
            protocol::UDP => QuotedKind::Udp,
            protocol::ICMP if family == Family::V4 => match body[icmp::TYPE] {
                icmp::v4::ECHO_REQUEST => QuotedKind::EchoRequest,
                icmp::v4::ECHO_REPLY => QuotedKind::EchoReply,
                _ => QuotedKind::IcmpOther,
            },
            protocol::ICMPV6 if family == Family::V6 => match body[icmp::TYPE] {
                icmp::v6::ECHO_REQUEST => QuotedKind::EchoRequest,
                icmp::v6::ECHO_REPLY => QuotedKind::EchoReply,
                _ => QuotedKind::IcmpOther,
            },
            _ => QuotedKind::Other,
        };
        Some(Quote { start, end: start + bytes.len(), family, transport: start + upper.at, protocol: upper.protocol, kind })
    }

    fn addresses(&self, head: &[u8]) -> (Addr, Addr) {
        let bytes = &head[self.start..];
        match self.family {
            Family::V4 => {
                let header = bytes.first_chunk().expect("a quoted IPv4 header that was found");
                (ipv4::src(header), ipv4::dst(header))
            }
            Family::V6 => {
                let header = bytes.first_chunk().expect("a quoted IPv6 header that was found");
                (ipv6::src(header), ipv6::dst(header))
            }
        }
    }

    fn translate(&self, head: &mut [u8], to: &Tuple) {
        let addresses = ip::set_addresses(&mut head[self.start..], to.src, to.dst);
        let at = self.transport;
        match self.kind {
            QuotedKind::Tcp => {
                let ports = set_ports(&mut head[at..], to.src_port, to.dst_port);
                // Eight bytes are all that RFC 792 promises: the checksum may not have made it into the quote.
                if at + tcp::CHECKSUM + 2 <= self.end {
                    change(head, at + tcp::CHECKSUM, addresses + ports);
                }
            }
            QuotedKind::Udp => {
                let ports = set_ports(&mut head[at..], to.src_port, to.dst_port);
                change_udp(head, at + udp::CHECKSUM, addresses + ports);
            }
            QuotedKind::EchoRequest | QuotedKind::EchoReply => {
                let id = if self.kind == QuotedKind::EchoRequest { to.src_port } else { to.dst_port };
                let pseudo_header = if self.family == Family::V4 { Delta::NONE } else { addresses };
                let delta = pseudo_header + Delta::word(u16_at(head, at + icmp::ECHO_ID), id);
                set_u16(head, at + icmp::ECHO_ID, id);
                change(head, at + icmp::CHECKSUM, delta);
            }
            QuotedKind::IcmpOther if self.family == Family::V6 => change(head, at + icmp::CHECKSUM, addresses),
            QuotedKind::IcmpOther | QuotedKind::Tail | QuotedKind::Other => {}
        }
    }
}

#[cfg(test)]
mod tests;
