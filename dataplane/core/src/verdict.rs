//! What becomes of a packet: one [`Verdict`] each, and a name for every drop.

use std::num::NonZeroU32;

use crate::packet::Network;

/// What becomes of a packet. Its bytes are edited where the verdict says to write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Write it to the TUN `pods`.
    ToPods,
    /// Write it to the TUN inside a pod's namespace.
    ToPod(TunId),
    /// Write it to the TUN `host`: for the node itself, or out through the node's own routing.
    ToHost,
    /// Encapsulate it to a peer, in this network.
    ToPeer(PeerId, Network),
    /// It is for a gateway address: give it to the gateway's own network stack.
    ToNetstack,
    /// A fragment whose datagram another worker looks after.
    HandOff(WorkerId),
    /// Nothing of it goes on: what takes its place (its fragments), if anything, is in the outbox, or it is held until the head of its
    /// datagram arrives.
    Consumed(Consumed),
    /// It ends here, counted under its reason.
    Drop(DropReason),
}

/// Why a packet goes no further although it was not dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consumed {
    /// A fragment kept until its datagram's head arrives.
    Held,
    /// Cut into fragments, which are in the outbox.
    Fragmented,
    /// A copy of something that the node itself has dealt with (an echo reply to the node's own ping).
    NotOurs,
    /// A probe of this gateway's own came back: it is noted and ends here.
    Probe,
}

/// A peer's place in [`crate::snapshot::Snapshot::peers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u32);

/// A pod's own TUN (attach mode tun): the number of its attachment, which no other has in the same boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TunId(NonZeroU32);

impl TunId {
    /// By its number, which is less than `u32::MAX`.
    pub const fn new(number: u32) -> TunId {
        // Kept upside down, so that what has a TUN or none takes no more room than a number.
        TunId(NonZeroU32::new(!number).expect("there are not so many attachments in a boot"))
    }

    /// Its number.
    pub const fn number(self) -> u32 {
        !self.0.get()
    }
}

/// A worker's number, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u16);

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $help:literal;)*) => {
        /// Why a packet was dropped. The counters, the command line, the metrics and the documentation all come from this one list.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum DropReason { $($(#[$doc])* #[doc = $help] $variant,)* }

        impl DropReason {
            /// Every reason, in the order of its number.
            pub const ALL: &[DropReason] = &[$(DropReason::$variant,)*];

            /// The name that operators see, in snake_case.
            pub const fn name(self) -> &'static str {
                match self { $(DropReason::$variant => $name,)* }
            }

            /// One sentence: what it means and what to look at.
            pub const fn help(self) -> &'static str {
                match self { $(DropReason::$variant => $help,)* }
            }
        }
    };
}

drop_reasons! {
    Truncated = "truncated", "The packet is shorter than its own headers say.";
    BadHeader = "bad_header", "A header field contradicts the packet: version, header length, total length or an option.";
    BadChecksum = "bad_checksum", "The IPv4 header checksum, or the transport checksum of a segment that would have been merged, is wrong.";
    MartianSource = "martian_source", "The source can be nobody's: unspecified, loopback, multicast, broadcast, link-local or IPv4-mapped.";
    MartianDestination = "martian_destination", "The destination is not one that the gateway forwards to: multicast, broadcast, loopback or link-local.";
    SpoofedByPod = "spoofed_by_pod", "A packet from the pods' side has a source that its sender does not own.";
    SpoofedFromHost = "spoofed_from_host", "A packet from the node or from outside claims to come from a pod, a gateway address or a VIP.";
    IcmpForbidden = "icmp_forbidden", "A router advertisement, a redirect or a neighbour message was sent beyond its link.";
    OverlayUnknownPeer = "overlay_unknown_peer", "An overlay packet came from an underlay address that is no known peer's.";
    OverlayBadHeader = "overlay_bad_header", "An overlay packet's VXLAN-GPE header is malformed, has another VNI, or names another inner protocol than it carries.";
    OverlayForeignSource = "overlay_foreign_source", "A known peer sent an inner packet whose source belongs to somebody else.";
    OverlayForeignDestination = "overlay_foreign_destination", "A peer sent an inner packet for something that is not on this node: peers are not forwarded for.";
    OverlayCongestion = "overlay_congestion", "Congestion was marked on the outer header of a packet that does not understand ECN (RFC 6040 requires the drop).";
    DirectReturnRefused = "direct_return_refused", "A peer handed on what a client sent to a service, but no node port or load balancer here has that address and port, or none of its endpoints is on this node.";
    OverlayForged = "overlay_forged", "A pod, or somebody through a service, sent to the overlay port of a node.";
    NoBackendLocal = "no_backend_local", "The service has the Local traffic policy and no usable endpoint on this node.";
    NoBackendRejected = "no_backend_rejected", "The service has no usable endpoint, or its VIP has no such port; the sender was told.";
    UnallocatedVip = "unallocated_vip", "The destination lies in a service range but no service has it.";
    NotANodePort = "not_a_node_port", "The destination is a gateway or node address with a port that nothing answers.";
    SourceRangeDenied = "source_range_denied", "loadBalancerSourceRanges of the service does not include the client.";
    NoFlow = "no_flow", "It is neither the start of a connection nor part of a known one, and its destination is a VIP; a TCP sender was reset.";
    FlowTableFull = "flow_table_full", "No slot for a new flow: the table is full of live flows.";
    FlowRaced = "flow_raced", "Workers that created the same flow at once did not agree within the bounded number of tries; the sender's next packet will do.";
    SnatPortsExhausted = "snat_ports_exhausted", "Every masquerade port towards this destination is in use.";
    MasqueradeOff = "masquerade_off", "A pod spoke to the outside in a family in which this node has no address to masquerade with.";
    OutsideToPodDenied = "outside_to_pod_denied", "Somebody outside the cluster opened a connection to a pod, and outsideToPods is drop.";
    NoRoutePod = "no_route_pod", "The destination lies in this node's pod range but no pod has it.";
    NoRoutePeer = "no_route_peer", "The destination lies in the cluster's pod range but no known node has it.";
    NoRouteFamily = "no_route_family", "The peer has no underlay address of a family that this node can send to.";
    TtlExceeded = "ttl_exceeded", "The TTL or hop limit is used up; the sender was told.";
    PacketTooBig = "packet_too_big", "It is larger than the path takes and may not be cut; the sender was told.";
    FragmentOverlap = "fragment_overlap", "Fragments of one datagram overlap (RFC 5722).";
    FragmentTableFull = "fragment_table_full", "The bounded memory for fragments is full.";
    FragmentTimeout = "fragment_timeout", "The head of a fragmented datagram did not arrive in time.";
    FragmentBad = "fragment_bad", "A fragment is too short, reaches beyond 65,535 bytes, or cannot be translated.";
    IcmpErrorUnmatched = "icmp_error_unmatched", "An ICMP error quotes a packet of no known flow.";
    IcmpErrorForged = "icmp_error_forged", "An ICMP error quotes a packet that its sender cannot have met, or that its receiver did not send.";
    IcmpUnsupported = "icmp_unsupported", "An ICMP message that cannot be translated was sent to a VIP or a masqueraded address.";
    ProtocolUnsupported = "protocol_unsupported", "The protocol has no ports to translate, and the destination needs translation.";
    RateLimited = "rate_limited", "An answer (ICMP error or reset) was not sent because its rate is limited.";
    BandwidthExceeded = "bandwidth_exceeded", "A pod sends or receives more than its bandwidth limit allows, for longer than packets may wait (100 ms; more below 1.2 Mbit/s).";
    BandwidthQueueFull = "bandwidth_queue_full", "The bounded memory for packets that wait for a pod's bandwidth limit is full, or that pod has its share of it.";
    OutboxFull = "outbox_full", "More answers or fragments in one batch than the outbox holds.";
    HandOffFull = "hand_off_full", "The queue to the worker that looks after this fragment is full.";
    NetstackFull = "netstack_full", "The queue to the gateway's own network stack is full.";
    WritePods = "write_pods", "The kernel refused a write to the TUN `pods`.";
    WritePod = "write_pod", "The kernel refused a write to the TUN inside a pod's namespace: its interface is down or gone, or its queue is closed.";
    WriteHost = "write_host", "The kernel refused a write to the TUN `host`.";
    SendOverlay = "send_overlay", "The kernel refused a datagram to a peer.";
}
