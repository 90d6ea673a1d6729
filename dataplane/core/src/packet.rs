//! A packet on its way through the pipeline: borrowed bytes, where they came in, and what the kernel said of them.

use crate::addr::Addr;
use crate::verdict::TunId;

/// Where a packet came in. Arrival is known, not guessed: each side has a descriptor of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ingress {
    /// The TUN `pods`, in the gateway's namespace: sent by a pod of this node that hangs there by a veth.
    Pods,
    /// The TUN inside a pod's own namespace: sent by that pod, and by nobody else.
    Pod(TunId),
    /// The TUN `host`, on the node: sent by the node itself or from outside.
    Host,
    /// A socket on the node that brings what no port rule can (reassembled datagrams, ICMP): otherwise as `Host`. Its sender cut it,
    /// or could have, so it may be cut again, IPv6 included.
    Socket,
    /// The overlay's socket: sent by a peer; not trusted before `decap` has looked at it.
    Overlay(Outer),
}

/// What is kept of the outer headers of a packet that came over the overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outer {
    /// The underlay address that sent it.
    pub src: Addr,
    /// The ECN field of the outer header (the two low bits of the traffic class), RFC 6040.
    pub ecn: u8,
    /// Which of the overlay's networks it came by.
    pub network: Network,
}

/// The overlay's networks, told apart by their VNIs: what a packet's source and destination may be depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Pods and nodes speak for themselves.
    Cluster,
    /// A node hands on what a client outside sent to a service, as it came, to the node of the backend, which answers the client directly.
    DirectReturn,
}

/// The state of the transport checksum of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Checksum {
    /// The field holds the full checksum (it may be wrong: only its sender vouches for it).
    #[default]
    Full,
    /// The field holds the uncomplemented sum of the pseudo header, and whoever puts the packet on a wire completes it
    /// (`VIRTIO_NET_HDR_F_NEEDS_CSUM`): a change of addresses or length updates it, a change of ports does not.
    Partial,
}

/// Whether a packet stands for several segments (`virtio_net_hdr.gso_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Gso {
    /// One packet.
    #[default]
    None,
    /// TCP, cut into segments of `size` payload bytes.
    Tcp {
        /// Payload bytes of each segment but the last.
        size: u16,
        /// CWR belongs to the first segment alone (`VIRTIO_NET_HDR_GSO_ECN`).
        ecn: bool,
    },
    /// UDP datagrams of `size` payload bytes (`VIRTIO_NET_HDR_GSO_UDP_L4`).
    Udp {
        /// Payload bytes of each datagram but the last.
        size: u16,
    },
}

/// What travels beside a packet's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Offload {
    /// The state of the transport checksum.
    pub checksum: Checksum,
    /// Whether it stands for several segments.
    pub gso: Gso,
}

/// A packet and what is known of it. The pipeline edits headers in place and never moves payload.
#[derive(Debug)]
pub struct Packet<'a> {
    /// From the IP header on: always every header, and the whole packet unless `tail_len` says that payload follows elsewhere.
    pub head: &'a mut [u8],
    /// Payload bytes that follow `head` in other buffers (a frame merged from several segments). The pipeline never reads them.
    pub tail_len: usize,
    /// What the kernel left to be done.
    pub offload: Offload,
    /// Where it came in.
    pub ingress: Ingress,
}

impl Packet<'_> {
    /// The packet's length in bytes, headers and payload.
    pub fn len(&self) -> usize {
        self.head.len() + self.tail_len
    }

    /// Whether there is not one byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
