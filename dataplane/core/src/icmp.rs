//! What the gateway itself says: ICMP errors, TCP resets, echo replies, and how often.
//!
//! Answers are made from the packet as its sender knows it, so call these before it is translated. They are whole packets with full
//! checksums, TTL 64, appended to a buffer that never grows. Nothing is said where a standard forbids it: about an ICMP error, a fragment
//! that is not the first, to or from an address that stands for nobody or for many.
//!
//! Read first: RFC 792, RFC 1122 §3.2.2 and RFC 1812 §4.3 (ICMP), RFC 4443 §2.4 (ICMPv6), RFC 9293 §3.10.7.1 (resets).

use crate::addr::{Addr, protocol};
use crate::flow::Now;
use crate::offload::{Template, be16, be32, put16, put32};
use crate::packet::{Checksum, Gso, Packet};
use crate::parse::{Parsed, Transport};
use crate::wire::checksum::{Sum, pseudo_header};

const TTL: u8 = 64;
/// An ICMP error is at most so long (RFC 1812 §4.3.2.3).
const ERROR_BYTES_MAX_V4: usize = 576;
/// An ICMPv6 error is at most so long: IPv6's least MTU (RFC 4443 §2.4 (c)).
const ERROR_BYTES_MAX_V6: usize = 1_280;
/// Precedence "internetwork control" for ICMP errors (RFC 1812 §4.3.2.5).
const ERROR_TOS: u8 = 0xc0;
const ICMP_HEADER_BYTES: usize = 8;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

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
            Answer::TimeExceeded => (11, 0, 0),
            // RFC 1191 §4: the next hop's MTU in the low 16 bits.
            Answer::FragmentationNeeded { mtu } => (3, 4, mtu.min(0xffff)),
            Answer::PortUnreachable => (3, 3, 0),
            Answer::HostUnreachable => (3, 1, 0),
            Answer::NoRoute => (3, 0, 0),
            Answer::AdminProhibited => (3, 13, 0),
        }
    }

    /// The same for ICMPv6 (RFC 4443 §3).
    fn message_v6(self) -> (u8, u8, u32) {
        match self {
            Answer::TimeExceeded => (3, 0, 0),
            Answer::FragmentationNeeded { mtu } => (2, 0, mtu),
            Answer::PortUnreachable => (1, 4, 0),
            Answer::HostUnreachable => (1, 3, 0),
            Answer::NoRoute => (1, 0, 0),
            Answer::AdminProhibited => (1, 1, 0),
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
    let (ip_len, longest) = if v4 { (20, ERROR_BYTES_MAX_V4) } else { (40, ERROR_BYTES_MAX_V6) };
    // What `parse` measured, without padding, as far as it is here.
    let quoted = &packet.head[..packet.head.len().min(parsed.len as usize)];
    let first = Template::new(packet, parsed).ok().filter(|_| packet.offload.checksum == Checksum::Partial || packet.offload.gso != Gso::None);
    let segment_len = first.as_ref().map_or(quoted.len(), |first| first.header_len + first.payload_len(0)).min(quoted.len());
    let quote_len = segment_len.min(longest - ip_len - ICMP_HEADER_BYTES);
    let len = ip_len + ICMP_HEADER_BYTES + quote_len;
    let (message, reply_protocol) = if v4 { (kind.message_v4(), protocol::ICMP) } else { (kind.message_v6(), protocol::ICMPV6) };
    let at = start(out, len, source, parsed.tuple.src, reply_protocol, if v4 { ERROR_TOS } else { 0 })?;
    let icmp = &mut out[at + ip_len..];
    icmp[..2].copy_from_slice(&[message.0, message.1]);
    put32(icmp, 4, message.2);
    let quote = &mut icmp[ICMP_HEADER_BYTES..];
    quote.copy_from_slice(&quoted[..quote_len]);
    if let Some(first) = first
        && first.header_len <= quote_len
    {
        let payload = &quoted[first.header_len..segment_len];
        first.write(&mut quote[..first.header_len], 0, payload.len(), Sum::of(payload));
    }
    finish_icmp(icmp, source, parsed.tuple.src);
    Ok(())
}

/// Appends a TCP reset in answer to `packet`, from the address and port that it was sent to.
pub fn reset(out: &mut Vec<u8>, packet: &Packet<'_>, parsed: &Parsed) -> Result<(), Silence> {
    let Transport::Tcp { flags, header_len } = parsed.transport_kind else { return Err(Silence::Forbidden) };
    let tuple = &parsed.tuple;
    if flags & RST != 0 || parsed.fragment.is_some() || !answerable(parsed) {
        return Err(Silence::Forbidden);
    }
    let ip_len = if tuple.is_v4() { 20 } else { 40 };
    let theirs = packet.head.get(parsed.transport.into()..).filter(|tcp| tcp.len() >= 20).ok_or(Silence::Forbidden)?;
    // RFC 9293 §3.10.7.1: if the segment has an acknowledgement, the reset takes its sequence number from there, and acknowledges
    // nothing; else it has sequence number 0 and acknowledges the segment. SYN and FIN take a number each.
    let (seq, ack, answer) = if flags & ACK != 0 {
        (be32(theirs, 8), 0, RST)
    } else {
        let payload = parsed.len.saturating_sub(u32::from(parsed.transport) + u32::from(header_len));
        let len = payload + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        (0, be32(theirs, 4).wrapping_add(len), RST | ACK)
    };
    let at = start(out, ip_len + 20, tuple.dst, tuple.src, protocol::TCP, 0)?;
    let tcp = &mut out[at + ip_len..];
    put16(tcp, 0, tuple.dst_port);
    put16(tcp, 2, tuple.src_port);
    put32(tcp, 4, seq);
    put32(tcp, 8, ack);
    tcp[12] = 5 << 4;
    tcp[13] = answer;
    let checksum = (pseudo_header(tuple.dst, tuple.src, protocol::TCP, 20) + Sum::of(tcp)).finish();
    put16(tcp, 16, checksum.0);
    Ok(())
}

/// Appends the reply to the echo request `packet`, from the address that it was sent to. Its length is the request's less IPv4 options
/// and IPv6 extension headers; a request that came in fragments cannot be answered.
pub fn echo_reply(out: &mut Vec<u8>, packet: &Packet<'_>, parsed: &Parsed) -> Result<(), Silence> {
    if parsed.transport_kind != Transport::EchoRequest || parsed.fragment.is_some() || !answerable(parsed) {
        return Err(Silence::Forbidden);
    }
    let tuple = &parsed.tuple;
    let v4 = tuple.is_v4();
    let request =
        packet.head.get(parsed.transport.into()..parsed.len as usize).filter(|icmp| icmp.len() >= ICMP_HEADER_BYTES).ok_or(Silence::Forbidden)?;
    let ip_len = if v4 { 20 } else { 40 };
    // DSCP as it came; ECN is the request's own (RFC 3168 §6.1.1 leaves non-ECN-capable answers at 0).
    let at = start(out, ip_len + request.len(), tuple.dst, tuple.src, tuple.protocol, parsed.traffic_class & 0xfc)?;
    if v4 && !parsed.dont_fragment {
        // It may have to be cut on its way, as the request might: the request's identification is as good as any, and DF as it was.
        let ip = &mut out[at..at + 20];
        ip[4..6].copy_from_slice(&packet.head[4..6]);
        put16(ip, 6, 0);
        put16(ip, 10, 0);
        let checksum = Sum::of(ip).finish();
        put16(ip, 10, checksum.0);
    }
    let icmp = &mut out[at + ip_len..];
    icmp.copy_from_slice(request);
    // RFC 1624 §3, eqn. 3, and not a sum made afresh: a payload that came damaged must stay recognizable as damaged. Source and
    // destination of ICMPv6's pseudo header change places, which their sum does not notice.
    let (was, is) = (u16::from(request[0]) << 8, if v4 { 0 } else { 129 << 8 });
    icmp[0] = (is >> 8) as u8;
    let checksum = (Sum::of_words(&[!be16(request, 2), !was, is])).finish();
    put16(icmp, 2, checksum.0);
    Ok(())
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
        ip[1] = traffic_class;
        put16(ip, 2, len as u16);
        // RFC 6864 §4: with DF set, a packet needs no identification.
        put16(ip, 6, 0x4000);
        ip[8] = TTL;
        ip[9] = protocol;
        ip[12..16].copy_from_slice(&src.v4_octets());
        ip[16..20].copy_from_slice(&dst.v4_octets());
        let checksum = Sum::of(&ip[..20]).finish();
        put16(ip, 10, checksum.0);
    } else {
        put16(ip, 0, 0x6000 | u16::from(traffic_class) << 4);
        put16(ip, 4, (len - 40) as u16);
        ip[6] = protocol;
        ip[7] = TTL;
        ip[8..24].copy_from_slice(&src.v6_octets());
        ip[24..40].copy_from_slice(&dst.v6_octets());
    }
    Ok(at)
}

fn finish_icmp(icmp: &mut [u8], src: Addr, dst: Addr) {
    let pseudo = if src.is_v4() { Sum::ZERO } else { pseudo_header(src, dst, protocol::ICMPV6, icmp.len() as u32) };
    let checksum = (pseudo + Sum::of(icmp)).finish();
    put16(icmp, 2, checksum.0);
}

/// Whether the packet's addresses are of one sender and one receiver (RFC 1122 §3.2.2, RFC 4443 §2.4 (e.3) to (e.6)).
fn answerable(parsed: &Parsed) -> bool {
    one_host(parsed.tuple.src) && one_host(parsed.tuple.dst)
}

fn one_host(addr: Addr) -> bool {
    if addr.is_v4() {
        // 0/8, 127/8, multicast, the old class E and the broadcast address. A subnet's broadcast address is known to nobody here.
        !matches!(addr.v4_octets()[0], 0 | 127 | 224..)
    } else {
        let [first, second, ..] = addr.v6_octets();
        // ::/8 holds the unspecified, the loopback and the mapped addresses; ff00::/8 multicast; a link-local address is of no link here.
        first != 0 && first != 0xff && !(first == 0xfe && second & 0xc0 == 0x80)
    }
}

/// Whether a standard allows an ICMP error about the packet: it is no ICMP error itself, no redirect, and its datagram's first part.
fn speaks_for_itself(parsed: &Parsed) -> bool {
    let v4 = parsed.tuple.is_v4();
    let talks = match parsed.transport_kind {
        Transport::IcmpError { .. } | Transport::Tail => false,
        // Destination unreachable, source quench, redirect, time exceeded, parameter problem.
        Transport::IcmpOther(kind) if v4 => !matches!(kind, 3 | 4 | 5 | 11 | 12),
        // RFC 4443 §2.1: types below 128 are errors. 137 is redirect.
        Transport::IcmpOther(kind) => kind >= 128 && kind != 137,
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
