//! One look at a packet's headers: what everything behind needs to know, checked once.

use crate::addr::Tuple;
use crate::packet::Packet;
use crate::verdict::DropReason;

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
