//! What the gateway itself says: ICMP errors, TCP resets, echo replies, and how often.
//!
//! Answers are made from the packet as its sender knows it, so call these before it is translated. They are whole packets with full
//! checksums, TTL 64, appended to a buffer that never grows. Nothing is said where a standard forbids it: about an ICMP error, a fragment
//! that is not the first, to or from an address that stands for nobody or for many.
//!
//! Read first: RFC 792, RFC 1122 §3.2.2 and RFC 1812 §4.3 (ICMP), RFC 4443 §2.4 (ICMPv6), RFC 9293 §3.10.7.1 (resets).

use crate::addr::{Addr, protocol};
use crate::flow::Now;
use crate::offload::Template;
use crate::packet::{Checksum, Gso, Packet};
use crate::parse::{Parsed, Transport};
use crate::wire::checksum::{Sum, pseudo_header};
use crate::wire::icmp::{v4 as icmpv4, v6 as icmpv6};
use crate::wire::ip::{self, Scope};
use crate::wire::tcp::{ACK, FIN, RST, SYN};
use crate::wire::{icmp, ipv4, ipv6, set_u16, set_u32, tcp, u16_at, u32_at};

const TTL: u8 = 64;
/// An ICMP error is at most so long (RFC 1812 §4.3.2.3).
const ERROR_BYTES_MAX_V4: usize = 576;
/// An ICMPv6 error is at most so long (RFC 4443 §2.4 (c)).
const ERROR_BYTES_MAX_V6: usize = ipv6::MTU_MIN as usize;
/// Precedence "internetwork control" for ICMP errors (RFC 1812 §4.3.2.5).
const ERROR_TOS: u8 = 0xc0;

/// What is wrong with a packet, for an ICMP or ICMPv6 error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// TTL or hop limit used up.
    TimeExceeded,
    /// Too long for the next hop's `mtu`: "fragmentation needed", or "packet too big".
    FragmentationNeeded {
        /// The longest packet that the path takes, in bytes.
        mtu: u32,
    },
    /// Nobody listens there.
    PortUnreachable,
    /// The address is known to be nobody's now.
    HostUnreachable,
    /// There is no way to the address.
    NoRoute,
    /// Forbidden by the operator.
    AdminProhibited,
}

/// Why nothing was said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// A standard forbids an answer to this packet, or it cannot be answered so.
    Forbidden,
    /// The buffer is full.
    NoRoom,
}

impl Answer {
    /// Type, code, and what the four octets behind the checksum hold.
    fn message_v4(self) -> (u8, u8, u32) {
        match self {
            Answer::TimeExceeded => (icmpv4::TIME_EXCEEDED, 0, 0),
            // RFC 1191 §4: the next hop's MTU in the low 16 bits.
            Answer::FragmentationNeeded { mtu } => (icmpv4::UNREACHABLE, icmpv4::CODE_FRAGMENTATION_NEEDED, mtu.min(0xffff)),
            Answer::PortUnreachable => (icmpv4::UNREACHABLE, icmpv4::CODE_PORT, 0),
            Answer::HostUnreachable => (icmpv4::UNREACHABLE, icmpv4::CODE_HOST, 0),
            // Code 0, network unreachable.
            Answer::NoRoute => (icmpv4::UNREACHABLE, 0, 0),
            Answer::AdminProhibited => (icmpv4::UNREACHABLE, icmpv4::CODE_PROHIBITED, 0),
        }
    }

    /// The same for ICMPv6 (RFC 4443 §3).
    fn message_v6(self) -> (u8, u8, u32) {
        match self {
            Answer::TimeExceeded => (icmpv6::TIME_EXCEEDED, 0, 0),
            Answer::FragmentationNeeded { mtu } => (icmpv6::PACKET_TOO_BIG, 0, mtu),
            Answer::PortUnreachable => (icmpv6::UNREACHABLE, icmpv6::CODE_PORT, 0),
            Answer::HostUnreachable => (icmpv6::UNREACHABLE, icmpv6::CODE_ADDRESS, 0),
            Answer::NoRoute => (icmpv6::UNREACHABLE, icmpv6::CODE_NO_ROUTE, 0),
            Answer::AdminProhibited => (icmpv6::UNREACHABLE, icmpv6::CODE_PROHIBITED, 0),
        }
    }
}

/// Appends the error `kind` about `packet` to its sender, from `source`.
///
/// The quote is what a sender would have put on a wire: a checksum left to offloads is completed, and of a superframe the first segment
/// is quoted, with its own length. A receiver matches addresses, ports and the sequence number, which are those of the superframe.
pub fn error(out: &mut Vec<u8>, kind: Answer, source: Addr, packet: &Packet<'_>, parsed: &Parsed) -> Result<(), Silence> {
    let v4 = parsed.tuple.is_v4();
    if !answerable(parsed) || !speaks_for_itself(parsed) || source.is_v4() != v4 {
        return Err(Silence::Forbidden);
    }
    let (ip_len, longest) = if v4 { (ipv4::HEADER_LEN, ERROR_BYTES_MAX_V4) } else { (ipv6::HEADER_LEN, ERROR_BYTES_MAX_V6) };
    // What `parse` measured, without padding, as far as it is here.
    let quoted = &packet.head[..packet.head.len().min(parsed.len as usize)];
    let first = Template::new(packet, parsed).ok().filter(|_| packet.offload.checksum == Checksum::Partial || packet.offload.gso != Gso::None);
    let segment_len = first.as_ref().map_or(quoted.len(), |first| first.header_len + first.payload_len(0)).min(quoted.len());
    let quote_len = segment_len.min(longest - ip_len - icmp::HEADER_LEN);
    let len = ip_len + icmp::HEADER_LEN + quote_len;
    let (message, reply_protocol) = if v4 { (kind.message_v4(), protocol::ICMP) } else { (kind.message_v6(), protocol::ICMPV6) };
    let at = start(out, len, source, parsed.tuple.src, reply_protocol, if v4 { ERROR_TOS } else { 0 })?;
    let body = &mut out[at + ip_len..];
    (body[icmp::TYPE], body[icmp::CODE]) = (message.0, message.1);
    set_u32(body, 4, message.2);
    let quote = &mut body[icmp::HEADER_LEN..];
    quote.copy_from_slice(&quoted[..quote_len]);
    if let Some(first) = first
        && first.header_len <= quote_len
    {
        let payload = &quoted[first.header_len..segment_len];
        first.write(&mut quote[..first.header_len], 0, payload.len(), Sum::of(payload));
    }
    let pseudo = if v4 { Sum::ZERO } else { pseudo_header(source, parsed.tuple.src, protocol::ICMPV6, body.len() as u32) };
    let checksum = (pseudo + Sum::of(body)).finish();
    set_u16(body, icmp::CHECKSUM, checksum.0);
    Ok(())
}

/// Appends a TCP reset in answer to `packet`, from the address and port that it was sent to.
pub fn reset(out: &mut Vec<u8>, packet: &Packet<'_>, parsed: &Parsed) -> Result<(), Silence> {
    let Transport::Tcp { flags, header_len } = parsed.transport_kind else { return Err(Silence::Forbidden) };
    let tuple = &parsed.tuple;
    if flags & RST != 0 || parsed.fragment.is_some() || !answerable(parsed) {
        return Err(Silence::Forbidden);
    }
    let ip_len = if tuple.is_v4() { ipv4::HEADER_LEN } else { ipv6::HEADER_LEN };
    let theirs = packet.head.get(parsed.transport.into()..).filter(|segment| segment.len() >= tcp::HEADER_LEN).ok_or(Silence::Forbidden)?;
    // RFC 9293 §3.10.7.1: if the segment has an acknowledgement, the reset takes its sequence number from there, and acknowledges
    // nothing; else it has sequence number 0 and acknowledges the segment. SYN and FIN take a number each.
    let (seq, ack, answer) = if flags & ACK != 0 {
        (u32_at(theirs, tcp::ACKNOWLEDGEMENT), 0, RST)
    } else {
        let payload = parsed.len.saturating_sub(u32::from(parsed.transport) + u32::from(header_len));
        let len = payload + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        (0, u32_at(theirs, tcp::SEQUENCE).wrapping_add(len), RST | ACK)
    };
    let at = start(out, ip_len + tcp::HEADER_LEN, tuple.dst, tuple.src, protocol::TCP, 0)?;
    let segment = &mut out[at + ip_len..];
    set_u16(segment, tcp::PORTS, tuple.dst_port);
    set_u16(segment, tcp::PORTS + 2, tuple.src_port);
    set_u32(segment, tcp::SEQUENCE, seq);
    set_u32(segment, tcp::ACKNOWLEDGEMENT, ack);
    segment[tcp::DATA_OFFSET] = 5 << 4;
    segment[tcp::FLAGS] = answer;
    let checksum = (pseudo_header(tuple.dst, tuple.src, protocol::TCP, tcp::HEADER_LEN as u32) + Sum::of(segment)).finish();
    set_u16(segment, tcp::CHECKSUM, checksum.0);
    Ok(())
}

/// Turns an echo request whose addresses have changed places into the reply, in place: a fragment as well, since only the first has the
/// type and only it has the checksum.
pub fn turn_into_reply(head: &mut [u8], parsed: &Parsed) {
    ip::set_ttl(head, TTL);
    if parsed.transport_kind != Transport::EchoRequest {
        return;
    }
    let reply = if parsed.tuple.is_v4() { icmpv4::ECHO_REPLY } else { icmpv6::ECHO_REPLY };
    let body = &mut head[parsed.transport.into()..];
    // RFC 1624 §3, eqn. 3, and not a sum made afresh: a payload that came damaged must stay recognizable as damaged. Source and
    // destination of ICMPv6's pseudo header change places, which their sum does not notice.
    let (was, is) = (u16::from(body[icmp::TYPE]) << 8, u16::from(reply) << 8);
    body[icmp::TYPE] = reply;
    let checksum = Sum::of_words(&[!u16_at(body, icmp::CHECKSUM), !was, is]).finish();
    set_u16(body, icmp::CHECKSUM, checksum.0);
}

/// Appends `len` bytes that begin with an IP header and are 0 behind it; gives back where.
fn start(out: &mut Vec<u8>, len: usize, src: Addr, dst: Addr, protocol: u8, traffic_class: u8) -> Result<usize, Silence> {
    let at = out.len();
    if out.capacity() - at < len {
        return Err(Silence::NoRoom);
    }
    out.resize(at + len, 0);
    let ip = &mut out[at..];
    if src.is_v4() {
        ip[0] = 0x45;
        ip[ipv4::TRAFFIC_CLASS] = traffic_class;
        set_u16(ip, ipv4::TOTAL_LEN, len as u16);
        // RFC 6864 §4: with DF set, a packet needs no identification.
        set_u16(ip, ipv4::FLAGS_OFFSET, ipv4::DONT_FRAGMENT);
        ip[ipv4::TTL] = TTL;
        ip[ipv4::PROTOCOL] = protocol;
        ip[ipv4::SRC..ipv4::DST].copy_from_slice(&src.v4_octets());
        ip[ipv4::DST..ipv4::HEADER_LEN].copy_from_slice(&dst.v4_octets());
        let checksum = Sum::of(&ip[..ipv4::HEADER_LEN]).finish();
        set_u16(ip, ipv4::CHECKSUM, checksum.0);
    } else {
        set_u16(ip, 0, 0x6000 | u16::from(traffic_class) << 4);
        ipv6::set_payload_len(ip, (len - ipv6::HEADER_LEN) as u16);
        ip[ipv6::NEXT_HEADER] = protocol;
        ip[ipv6::HOP_LIMIT] = TTL;
        ip[ipv6::SRC..ipv6::DST].copy_from_slice(&src.v6_octets());
        ip[ipv6::DST..ipv6::HEADER_LEN].copy_from_slice(&dst.v6_octets());
    }
    Ok(at)
}

/// Whether the packet's addresses are of one sender and one receiver (RFC 1122 §3.2.2, RFC 4443 §2.4 (e.3) to (e.6)).
fn answerable(parsed: &Parsed) -> bool {
    one_host(parsed.tuple.src) && one_host(parsed.tuple.dst)
}

fn one_host(addr: Addr) -> bool {
    match Scope::of(addr) {
        Scope::Unicast => true,
        // NodeLocal DNS and a mesh's probes have IPv4's; IPv6's would be of a link that nobody here is on.
        Scope::LinkLocal => addr.is_v4(),
        Scope::Unspecified | Scope::Loopback | Scope::Multicast | Scope::Broadcast => false,
    }
}

/// Whether a standard allows an ICMP error about the packet: it is no ICMP error itself, no redirect, and its datagram's first part.
fn speaks_for_itself(parsed: &Parsed) -> bool {
    let v4 = parsed.tuple.is_v4();
    let talks = match parsed.transport_kind {
        Transport::IcmpError { .. } | Transport::Tail => false,
        // Destination unreachable, source quench, redirect, time exceeded, parameter problem.
        Transport::IcmpOther(kind) if v4 => !matches!(kind, 3..=5 | 11 | 12),
        // RFC 4443 §2.1: types below 128 are errors.
        Transport::IcmpOther(kind) => kind >= 128 && kind != icmpv6::REDIRECT,
        _ => true,
    };
    talks && parsed.fragment.is_none_or(|fragment| fragment.offset == 0)
}

/// A limit on how often something is said: `burst` at once, `per_second` in the long run.
#[derive(Clone, Copy, Debug)]
pub struct TokenBucket {
    per_second: u64,
    /// In thousandths, so that a millisecond's share is a whole number.
    burst: u64,
    tokens: u64,
    last: Now,
}

impl TokenBucket {
    /// A full bucket.
    pub const fn new(per_second: u32, burst: u32) -> TokenBucket {
        let burst = burst as u64 * 1000;
        TokenBucket { per_second: per_second as u64, burst, tokens: burst, last: Now(0) }
    }

    /// Takes one token, if there is one.
    pub fn take(&mut self, now: Now) -> bool {
        let elapsed = now.0.saturating_sub(self.last.0);
        self.last = self.last.max(now);
        self.tokens = self.tokens.saturating_add(elapsed.saturating_mul(self.per_second)).min(self.burst);
        let enough = self.tokens >= 1000;
        if enough {
            self.tokens -= 1000;
        }
        enough
    }
}

#[cfg(test)]
mod tests;
