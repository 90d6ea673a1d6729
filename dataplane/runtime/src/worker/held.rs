//! Packets that wait for a pod's bandwidth limit: copied, kept in the order in which they are due, and carried out then.
//!
//! All memory is there from the worker's start, as addresses; pages are taken when they are first used, and stay. Frames lie in places of
//! three lengths, so that what is put in and taken out in any order leaves no gaps. No pod can take all the places of one length: each
//! limiter has at most as many as are still free (the dynamic threshold of Choudhury and Hahne, 1998), so one alone gets half of them.
//!
//! A frame goes where its verdict said, if that still holds: the tables may have changed while it waited, see [`Frame::verdict_by`].

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use podgate_core::fib::Pod;
use podgate_core::packet::{Ingress, Offload};
use podgate_core::shape::Wait;
use podgate_core::snapshot::{Generation, Snapshot};
use podgate_core::verdict::{DropReason, PeerId, Verdict};

use super::batch::{Buffers, Slot};
use super::destination;
use super::handoff::PACKET_LEN_MAX;

/// Lengths of places and how many there are of each: 16 MiB in all. At 1 Gbit/s one pod alone has room for some 15 ms of full packets and
/// for 30 ms of superframes. The stride of the longest is no power of two, so that the headers in them do not share a few sets of the caches.
const PLACES: [(usize, usize); CLASSES] = [(2 * 1024, 3072), (16 * 1024 + 64, 128), (PACKET_LEN_MAX.next_multiple_of(64) + 64, 128)];

const CLASSES: usize = 3;

const PLACES_COUNT: usize = PLACES[0].1 + PLACES[1].1 + PLACES[2].1;

const _: () = assert!(PLACES_COUNT <= u16::MAX as usize, "a place has a number of 16 bits");

/// Limiters that are told apart; others share with one of these.
const LIMITERS: usize = 256;

/// Places of one length.
struct Class {
    len: usize,
    free: Vec<u16>,
    /// How many each limiter has.
    used: Box<[u16; LIMITERS]>,
}

/// A frame that waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    len: usize,
    offload: Offload,
    ingress: Ingress,
    verdict: Verdict,
    /// The tables that the verdict was given by.
    generation: Generation,
    limiter: u8,
}

/// One worker's waiting packets.
pub(super) struct Held {
    memory: Memory,
    /// Where each place begins.
    starts: Box<[usize]>,
    classes: [Class; CLASSES],
    /// What lies in each place, if anything does.
    frames: Box<[Option<Frame>]>,
    /// `(due, order of arrival, place)`.
    queue: BinaryHeap<Reverse<(u64, u64, u16)>>,
    arrivals: u64,
    /// Places of frames that were taken out and may still be read from.
    taken: Vec<u16>,
}

impl Held {
    pub(super) fn new() -> Held {
        let mut starts = Vec::with_capacity(PLACES_COUNT);
        let mut end = 0;
        let classes = PLACES.map(|(len, count)| {
            let first = starts.len();
            starts.extend((0..count).map(|index| end + index * len));
            end += count * len;
            // The first places are the first to be used, again and again.
            Class { len, free: (first..starts.len()).rev().map(|place| place as u16).collect(), used: Box::new([0; LIMITERS]) }
        });
        Held {
            memory: Memory(vec![0; end].into_boxed_slice()),
            starts: starts.into(),
            classes,
            frames: vec![None; PLACES_COUNT].into(),
            queue: BinaryHeap::with_capacity(PLACES_COUNT),
            arrivals: 0,
            taken: Vec::with_capacity(PLACES_COUNT),
        }
    }

    /// Keeps a frame, given in pieces, for `verdict` that was given by the tables of `generation`; false if there is no room for it.
    pub(super) fn put<'b>(
        &mut self,
        wait: Wait,
        (verdict, generation): (Verdict, Generation),
        (offload, ingress): (Offload, Ingress),
        pieces: impl Iterator<Item = &'b [u8]> + Clone,
    ) -> bool {
        let len = pieces.clone().map(<[u8]>::len).sum();
        let limiter = wait.limiter as u8;
        let Some(place) = self.place(len, limiter) else { return false };
        let start = self.starts[usize::from(place)];
        let mut room = &mut self.memory.0[start..start + len];
        for piece in pieces {
            let (here, behind) = room.split_at_mut(piece.len());
            here.copy_from_slice(piece);
            room = behind;
        }
        self.frames[usize::from(place)] = Some(Frame { len, offload, ingress, verdict, generation, limiter });
        debug_assert!(self.queue.len() < self.queue.capacity(), "a worker does not allocate");
        self.queue.push(Reverse((wait.due_ns, self.arrivals, place)));
        self.arrivals += 1;
        true
    }

    /// A free place for `len` bytes, of the shortest that there are for this limiter.
    fn place(&mut self, len: usize, limiter: u8) -> Option<u16> {
        for class in self.classes.iter_mut().filter(|class| len <= class.len) {
            let used = &mut class.used[usize::from(limiter)];
            if usize::from(*used) < class.free.len() {
                *used += 1;
                return class.free.pop();
            }
        }
        None
    }

    /// When the first is due.
    #[inline]
    pub(super) fn due_ns(&self) -> Option<u64> {
        self.queue.peek().map(|Reverse((due_ns, ..))| *due_ns)
    }

    /// Takes out the next frame that is due by `by_ns`. Its bytes stay where they are until [`Held::free`].
    pub(super) fn take(&mut self, by_ns: u64) -> Option<(Frame, Slot)> {
        if self.due_ns()? > by_ns {
            return None;
        }
        let Reverse((_, _, place)) = self.queue.pop()?;
        self.taken.push(place);
        let (frame, start) = (self.frames[usize::from(place)]?, self.starts[usize::from(place)]);
        Some((frame, Slot::whole(0, start..start + frame.len, frame.offload, frame.ingress)))
    }

    /// The bytes of all frames.
    pub(super) fn memory(&mut self) -> &mut Memory {
        &mut self.memory
    }

    /// The places of the frames that were taken out are free again.
    pub(super) fn free(&mut self) {
        for place in self.taken.drain(..) {
            if let Some(frame) = self.frames[usize::from(place)].take() {
                let class = &mut self.classes[class_of(usize::from(place))];
                class.used[usize::from(frame.limiter)] -= 1;
                class.free.push(place);
            }
        }
    }
}

impl Frame {
    /// What is to become of the frame, whose bytes are `packet`, by the tables of now. A peer's number may be another's since it came, its
    /// pod may have gone or moved: the destination, which is translated already, is looked up again. What goes to the TUN `host` is routed
    /// by the node, which needs no table of ours.
    pub(super) fn verdict_by(&self, snapshot: &Snapshot, packet: &[u8]) -> Verdict {
        if self.generation == snapshot.generation {
            return self.verdict;
        }
        let Some(dst) = destination(packet) else { return Verdict::Drop(DropReason::BadHeader) };
        match self.verdict {
            Verdict::ToPods | Verdict::ToPod(_) => snapshot.pods.get(dst).map_or(Verdict::Drop(DropReason::NoRoutePod), Pod::verdict),
            Verdict::ToPeer(_, network) => match snapshot.routes.lookup(dst) {
                Some(peer) => Verdict::ToPeer(PeerId(*peer), network),
                None => Verdict::Drop(DropReason::NoRoutePeer),
            },
            verdict => verdict,
        }
    }
}

/// Which length a place has.
fn class_of(place: usize) -> usize {
    let (first, second) = (PLACES[0].1, PLACES[0].1 + PLACES[1].1);
    usize::from(place >= first) + usize::from(place >= second)
}

/// Where the frames lie: one buffer.
pub(super) struct Memory(Box<[u8]>);

impl Buffers for Memory {
    fn buffer(&self, _index: usize) -> &[u8] {
        &self.0
    }

    fn buffer_mut(&mut self, _index: usize) -> &mut [u8] {
        &mut self.0
    }

    fn each_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        std::iter::once(&mut self.0[..])
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use podgate_core::fib::{PodTable, PrefixMap};
    use podgate_core::packet::{Checksum, Gso, Network};
    use podgate_core::service::ServiceTable;
    use podgate_core::snapshot::{NodeTables, OutsideToPods};
    use podgate_core::verdict::TunId;

    use super::*;

    const PLAIN: (Offload, Ingress) = (Offload { checksum: Checksum::Full, gso: Gso::None }, Ingress::Pods);

    fn put(held: &mut Held, due_ns: u64, limiter: u32, bytes: &[u8]) -> bool {
        held.put(Wait { due_ns, limiter }, (Verdict::ToPods, Generation(1)), PLAIN, [bytes].into_iter())
    }

    /// The first bytes of what is due by `by_ns`, in order.
    fn take(held: &mut Held, by_ns: u64) -> Vec<u8> {
        let mut taken = Vec::new();
        while let Some((_, slot)) = held.take(by_ns) {
            taken.push(held.memory().buffer(0)[slot.head.start]);
        }
        held.free();
        taken
    }

    #[test]
    fn frames_come_out_when_they_are_due_and_equal_ones_as_they_came() {
        let mut held = Held::new();
        assert_eq!((held.due_ns(), take(&mut held, u64::MAX)), (None, vec![]));
        for (due, byte) in [(30, 1), (10, 2), (20, 3), (10, 4), (10, 5), (20, 6)] {
            assert!(put(&mut held, due, 0, &[byte; 100]));
        }
        assert_eq!(held.due_ns(), Some(10));
        assert_eq!(take(&mut held, 9), []);
        assert_eq!(take(&mut held, 25), [2, 4, 5, 3, 6]);
        assert!(put(&mut held, 29, 0, &[7; 100]));
        assert_eq!(take(&mut held, 30), [7, 1]);
    }

    #[test]
    fn a_frame_keeps_its_bytes_in_one_piece_and_what_the_kernel_left_to_do() {
        let mut held = Held::new();
        let offload = Offload { checksum: Checksum::Partial, gso: Gso::Tcp { size: 1400, ecn: true } };
        let (head, tail) = (vec![1; 1452], vec![2; 60_000]);
        let verdict = (Verdict::ToPeer(PeerId(3), Network::Cluster), Generation(7));
        assert!(held.put(Wait { due_ns: 5, limiter: 1 }, verdict, (offload, Ingress::Host), [&head[..], &tail].into_iter()));
        let (frame, slot) = held.take(5).unwrap();
        assert_eq!((frame.verdict, frame.generation, slot.offload, slot.ingress), (verdict.0, verdict.1, offload, Ingress::Host));
        assert!(held.memory().buffer(0)[slot.head.clone()] == [head, tail].concat());
        assert_eq!(slot.packets(held.memory().buffer(0)), 44);
        assert!(held.put(Wait { due_ns: 5, limiter: 1 }, verdict, (offload, Ingress::Host), [&vec![9; 60_000][..]].into_iter()));
        assert_eq!(held.memory().buffer(0)[slot.head.start], 1, "a place is not used again before it is freed");
    }

    #[test]
    fn the_longest_packet_has_a_place_and_a_longer_one_has_none() {
        let mut held = Held::new();
        assert!(put(&mut held, 1, 0, &vec![1; PACKET_LEN_MAX]));
        assert!(!put(&mut held, 1, 0, &vec![1; PLACES[2].0 + 1]));
    }

    #[test]
    fn one_limiter_leaves_room_for_others_in_places_of_each_length() {
        let mut held = Held::new();
        for (len, places) in [(60_000, PLACES[2].1), (10_000, PLACES[1].1), (100, PLACES[0].1)] {
            let hog = (0..places).filter(|_| put(&mut held, 1, 7, &vec![1; len])).count();
            assert!(hog >= places / 2 && hog < places, "{hog} of {places}");
            assert!(put(&mut held, 1, 8, &vec![2; len]), "another pod's {len} bytes");
        }
        // All come out, and all places are free again.
        let before = take(&mut held, 1).len();
        for (len, places) in [(60_000, PLACES[2].1), (10_000, PLACES[1].1), (100, PLACES[0].1)] {
            let again = (0..places).filter(|_| put(&mut held, 1, 7, &vec![1; len])).count();
            assert!(again >= places / 2);
        }
        assert_eq!(take(&mut held, 1).len() + 3, before);
        assert!(held.classes.iter().zip(PLACES).all(|(class, (_, count))| class.free.len() == count && class.used.iter().all(|used| *used == 0)));
    }

    #[test]
    fn a_verdict_is_looked_up_again_when_the_tables_have_changed() {
        let addr = |text: &str| text.parse::<std::net::IpAddr>().unwrap().into();
        let snapshot = |generation, pods: &[&str], routes: &[(&str, u32)]| Snapshot {
            generation: Generation(generation),
            node: Arc::new(NodeTables {
                addresses: vec![],
                gateway_v4: None,
                gateway_v6: None,
                node_pod_cidrs: vec![],
                cluster_pod_cidrs: vec![],
                service_cidrs: vec![],
                node_ports: 30000..=32767,
                node_port_addresses: vec![],
                masquerade: None,
                snat_ports: 1024..=65535,
                overlay_port: 4790,
                overlay_vni: 1,
                direct_return: None,
                outside_mtu: 1500,
                outside_to_pods: OutsideToPods::Allow,
                timeouts: Default::default(),
                probe_token: 1,
                workers: 1,
            }),
            services: ServiceTable::default(),
            pods: PodTable::new(pods.iter().map(|pod| (addr(pod), Pod::new(1500)))),
            routes: Arc::new(PrefixMap::new(routes.iter().map(|(prefix, peer)| (prefix.parse().unwrap(), *peer)))),
            peers: Arc::new([]),
            peer_by_underlay: Arc::new([]),
        };
        // To 10.32.1.2, and to fd00::2.
        let mut v4 = [0; 20];
        v4[0] = 0x45;
        v4[16..20].copy_from_slice(&[10, 32, 1, 2]);
        let mut v6 = [0; 40];
        v6[0] = 0x60;
        v6[24..40].copy_from_slice(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        for (packet, pod, prefix) in [(&v4[..], "10.32.1.2", "10.32.1.0/24"), (&v6, "fd00::2", "fd00::/64")] {
            let frame = |verdict| Frame { len: 0, offload: PLAIN.0, ingress: PLAIN.1, verdict, generation: Generation(1), limiter: 0 };
            let (pods, peer, host) = (frame(Verdict::ToPods), frame(Verdict::ToPeer(PeerId(4), Network::Cluster)), frame(Verdict::ToHost));
            let empty = snapshot(1, &[], &[]);
            assert_eq!(peer.verdict_by(&empty, packet), Verdict::ToPeer(PeerId(4), Network::Cluster), "nothing has changed since");
            let gone = snapshot(2, &[], &[]);
            assert_eq!(pods.verdict_by(&gone, packet), Verdict::Drop(DropReason::NoRoutePod));
            assert_eq!(peer.verdict_by(&gone, packet), Verdict::Drop(DropReason::NoRoutePeer));
            assert_eq!(host.verdict_by(&gone, packet), Verdict::ToHost);
            let moved = snapshot(2, &[pod], &[(prefix, 9)]);
            assert_eq!(pods.verdict_by(&moved, packet), Verdict::ToPods);
            assert_eq!(peer.verdict_by(&moved, packet), Verdict::ToPeer(PeerId(9), Network::Cluster), "another number, the same peer");
            assert_eq!(frame(Verdict::ToPod(TunId::new(5))).verdict_by(&moved, packet), Verdict::ToPods, "attached anew, by a veth");
            let attached_anew =
                Snapshot { pods: PodTable::new([(addr(pod), Pod { tun: Some(TunId::new(6)), ..Pod::new(1500) })]), ..snapshot(2, &[], &[]) };
            assert_eq!(pods.verdict_by(&attached_anew, packet), Verdict::ToPod(TunId::new(6)), "attached anew, by a TUN");
            assert_eq!(frame(Verdict::ToPod(TunId::new(5))).verdict_by(&gone, packet), Verdict::Drop(DropReason::NoRoutePod));
        }
    }
}
