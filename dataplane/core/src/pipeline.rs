//! A packet's way through the gateway, stage by stage. Start here.
//!
//! A worker reads a batch of packets and calls [`Pipeline::run`]. For each packet, in this order:
//!
//! 1. `parse`: one look at the headers ([`crate::parse`]).
//! 2. `admit`: may it claim to come from where it says, on this side ([`crate::admit`])?
//! 3. fragments: a tail follows what its head decided ([`crate::fragment`]).
//! 4. `decide`: known flow, new flow, plain or refused, by flow table, services and FIB ([`crate::decide`]).
//! 5. `open`: a new flow takes its place in the table, and its SNAT port with it (`open`, [`crate::flow`]).
//! 6. `departure`, where a pod has a bandwidth limit: refused, at once or later ([`crate::shape`])?
//! 7. `send`: TTL and MTU of the way ahead, answered in the sender's terms; then translation in place ([`crate::nat`]).
//!
//! What most packets are, in the middle of a known flow with nothing the matter, takes stages 2 to 7 at once (`known`), to the same end.
//!
//! The worker acts on the verdict; on that of a packet that waits, when it is due. What the gateway says itself (ICMP errors, resets) and
//! what it cut (fragments) is in the [`Outbox`]; an echo request to a VIP is turned round in place and leaves as any packet does.

use crate::addr::{Addr, Tuple};
use crate::admit::{self, Sender};
use crate::affinity::{BackendId, Visit};
use crate::counters::Counters;
use crate::decide::{self, Decision, Hop, Opening, Say, Source, decide};
use crate::encap;
use crate::fib::within;
use crate::flow::{Cursor, Fetch, Flow, FlowTable, Hash, Kind, Likely, Now};
use crate::fragment::{FragmentKey, FragmentLimits, FragmentTable, Tail};
use crate::icmp::{self, Answer, Silence, TokenBucket};
use crate::nat;
use crate::offload;
use crate::packet::{Gso, Ingress, Network, Offload, Packet};
use crate::parse::{Parsed, Transport, parse, parse_plain};
use crate::shape::{self, Exceeded, Limits, Wait};
use crate::snapshot::Snapshot;
use crate::verdict::{Consumed, DropReason, Verdict, WorkerId};
use crate::wire::ip;

mod known;
mod open;
mod outbox;

use known::follow_known;
use open::SEARCHES_PER_SECOND;
pub use outbox::{Bind, Egress, MasqueradePort, Outbox};

/// What a batch is judged by.
#[derive(Clone, Copy)]
pub struct Env<'a> {
    /// The tables, pinned for the batch.
    pub snapshot: &'a Snapshot,
    /// The flow table.
    pub flows: FlowTable<'a>,
    /// The time, read once for the batch.
    pub now: Now,
    /// The same moment in nanoseconds, for bandwidth limits.
    pub now_ns: u64,
    /// This worker's counters.
    pub counters: &'a Counters,
}

/// How many packets one batch may hold.
pub const BATCH_LEN_MAX: usize = 256;

/// One worker's pipeline: the state that is its own.
#[derive(Debug)]
pub struct Pipeline {
    worker: WorkerId,
    /// The place in its batch of the packet that is being judged.
    at: usize,
    /// The batch's packets as the loops of `run` find them, at their places in the batch.
    met: Box<[Result<Met, DropReason>]>,
    fragments: FragmentTable<Result<Onward, DropReason>>,
    /// Where free records are looked for; known with the first flow, since it begins in this worker's own part of the table.
    free_records: Option<Cursor>,
    sweep_at: usize,
    answers: TokenBucket,
    searches: TokenBucket,
    /// A held fragment while it is sent after its head.
    scratch: Vec<u8>,
    /// Identification of the IPv6 datagrams that are cut here.
    fragment_id: u32,
}

/// A packet before it is judged.
#[derive(Clone, Copy, Debug)]
struct Met {
    parsed: Parsed,
    /// Of its tuple.
    hash: Hash,
    /// Its flow, as far as one look at the index tells.
    likely: Likely,
}

/// What a fragment's head decided for its tails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Onward {
    /// The tuple it leaves with.
    to: Tuple,
    hop: Hop,
    change: Change,
}

/// What is changed in a packet beside where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// Addresses and ports, if they differ.
    Tuple,
    /// The same of an ICMP error, which quotes a packet that is given this tuple.
    Quoting(Tuple),
    /// It is an echo request to an address of the gateway's, and goes back as the reply.
    Reply,
}

/// What `resolve` makes of a decision.
enum Step {
    Onward(Onward),
    Done(Verdict),
}

/// Answers per second and worker: enough for any traceroute and for a storm of resets at a service's end, little enough to be no weapon.
const ANSWERS_PER_SECOND: u32 = 10_000;

/// The longest answer: an ICMPv6 error (RFC 4443 §2.4).
const ANSWER_LEN_MAX: usize = 1_280;

/// Records examined per tick: a table of a million is swept in half a minute at twenty ticks a second.
const SWEEP_RECORDS: usize = 2_048;

impl Pipeline {
    /// A pipeline for `worker`. All memory it will ever use is allocated here. `seed` keeps the fragments' table from being aimed at.
    pub fn new(worker: WorkerId, seed: u64) -> Pipeline {
        Pipeline {
            worker,
            at: 0,
            met: vec![Err(DropReason::Truncated); BATCH_LEN_MAX].into(),
            fragments: FragmentTable::new(FragmentLimits::default(), seed),
            free_records: None,
            sweep_at: 0,
            answers: TokenBucket::new(ANSWERS_PER_SECOND, ANSWERS_PER_SECOND),
            searches: TokenBucket::new(SEARCHES_PER_SECOND, SEARCHES_PER_SECOND),
            scratch: Vec::with_capacity(1 << 16),
            fragment_id: (worker.0 as u32) << 24,
        }
    }

    /// Judges `batch`: one verdict for each packet, in order, into `verdicts` (cleared first; give it room for the batch), and what the
    /// gateway itself has to say into `outbox`. Drops are counted here; traffic is counted by the caller, who reads and writes. `F` is how the flow
    /// table's cache lines are fetched.
    pub fn run<F: Fetch>(&mut self, env: &Env<'_>, batch: &mut [Packet<'_>], verdicts: &mut Vec<Verdict>, outbox: &mut Outbox) {
        debug_assert!(batch.len() <= BATCH_LEN_MAX);
        verdicts.clear();
        // Borrowed from `self` for the batch, so that packets are judged where they lie.
        let mut met = std::mem::take(&mut self.met);
        // Fetched in one loop, used in the next: the cache misses of a batch overlap with each other and with its work.
        for (packet, met) in batch.iter().zip(&mut met) {
            match parse_plain(packet) {
                Some(parsed) => *met = Ok(Met::new::<F>(env, parsed)),
                None => *met = parse_other::<F>(env, packet),
            }
        }
        for met in met[..batch.len()].iter_mut().flatten() {
            met.likely = env.flows.likely(met.hash);
            env.flows.warm_record::<F>(&met.parsed.tuple, met.likely);
        }
        verdicts.extend(batch.iter_mut().zip(&met).enumerate().map(|(at, (packet, met))| match met {
            Ok(Met { parsed, hash, likely }) => follow_known(env, packet, parsed, *likely).unwrap_or_else(|| {
                self.at = at;
                self.judge(env, packet, parsed, *hash, outbox).unwrap_or_else(|reason| {
                    env.counters.dropped(reason, offload::wire_packets(packet, parsed).into());
                    Verdict::Drop(reason)
                })
            }),
            Err(reason) => {
                env.counters.dropped(*reason, 1);
                Verdict::Drop(*reason)
            }
        }));
        self.met = met;
    }

    /// Work between batches: fragments whose time is up, a step of the flow table's sweep. Call it every 10 to 100 ms.
    pub fn tick(&mut self, env: &Env<'_>) {
        for (reason, packets) in self.fragments.expire(env.now).by_reason() {
            env.counters.dropped(reason, packets);
        }
        let swept = env.flows.sweep(&mut self.sweep_at, SWEEP_RECORDS, env.now, &env.snapshot.node.timeouts);
        env.counters.flows_expired.add(swept.expired as u64);
    }

    /// Stages 2 to 7 for one packet. `hash` is that of its tuple.
    fn judge(&mut self, env: &Env<'_>, packet: &mut Packet<'_>, parsed: &Parsed, hash: Hash, outbox: &mut Outbox) -> Result<Verdict, DropReason> {
        trim(packet, parsed);
        if let Some(number) = admit::probe(env.snapshot, packet, parsed) {
            env.counters.probes[number as usize % env.counters.probes.len()].add(1);
            return Ok(Verdict::Consumed(Consumed::Probe));
        }
        let sender = admit::admit(env.snapshot, packet, parsed)?;
        let Some(fragment) = parsed.fragment else {
            return match self.resolve(env, packet, parsed, hash, sender, outbox)? {
                Step::Onward(onward) => self.leave(env, packet, parsed, sender, &onward, outbox),
                Step::Done(verdict) => {
                    if let Some(wait) = departure(env, packet, parsed, sender, None)? {
                        outbox.wait_packet(self.at, wait);
                    }
                    Ok(verdict)
                }
            };
        };
        let key = FragmentKey::of(parsed, &fragment);
        let owner = WorkerId((encap::entropy(parsed) % env.snapshot.node.workers.max(1) as u32) as u16);
        if owner != self.worker {
            return Ok(Verdict::HandOff(owner));
        }
        if parsed.transport_kind == Transport::Tail {
            return match self.fragments.tail(key, &fragment, env.now, packet.head, packet.ingress) {
                Tail::Follow(onward) => self.leave(env, packet, parsed, sender, &onward?, outbox),
                Tail::Held => Ok(Verdict::Consumed(Consumed::Held)),
                Tail::Drop(reason) => Err(reason),
            };
        }
        let onward = match self.resolve(env, packet, parsed, hash, sender, outbox) {
            Ok(Step::Onward(onward)) => Ok(onward),
            // The gateway's own stack does not reassemble, and nothing else ends a datagram here.
            Ok(Step::Done(_)) => Err(DropReason::FragmentBad),
            Err(reason) => Err(reason),
        };
        self.fragments.head(key, &fragment, env.now, onward)?;
        self.send_held(env, key, sender, onward, outbox);
        self.leave(env, packet, parsed, sender, &onward?, outbox)
    }

    /// Stages 4 and 5: what the packet leaves as, and where to.
    fn resolve(
        &mut self,
        env: &Env<'_>,
        packet: &Packet<'_>,
        parsed: &Parsed,
        hash: Hash,
        sender: Sender,
        outbox: &mut Outbox,
    ) -> Result<Step, DropReason> {
        // What stage 6 would refuse opens no flow first; and the tails of a refused head follow it.
        if egress_limits(env, parsed, sender).and_then(|limits| limits.egress.as_ref()).is_some_and(|egress| egress.is_full(env.now_ns)) {
            return Err(DropReason::BandwidthExceeded);
        }
        let onward = match self.decide(env, packet, parsed, hash, sender) {
            Decision::Plain(hop) => match self.claimed(env, parsed).then(|| env.snapshot.node.gateway_for(parsed.tuple.dst)).flatten() {
                None => Onward { to: parsed.tuple, hop, change: Change::Tuple },
                Some(gateway) => {
                    let to = (parsed.tuple.dst, parsed.tuple.dst_port);
                    let source = Source::Gateway(gateway);
                    let opening = Opening::plain(Kind::Relayed, sender, to, source, hop);
                    self.open(env, packet, parsed, sender, opening, outbox)?
                }
            },
            Decision::Known(flow) => self.follow(env, &flow, parsed)?,
            Decision::Open(opening) => self.open(env, packet, parsed, sender, opening, outbox)?,
            Decision::Quoting(flow) => {
                let to = flow.translated();
                let arriving = flow.arriving();
                // An error that the other end itself sent must seem to come from what was dialled; a router on the way keeps its name,
                // but not a gateway towards the outside, where nobody knows it.
                let hop = decide::hop_of_flow(env.snapshot, &flow)?;
                let nameless = hop == Hop::Outside && within(&env.snapshot.node.cluster_pod_cidrs, parsed.tuple.src);
                let src = if parsed.tuple.src == arriving.src || nameless { to.src } else { parsed.tuple.src };
                let outer = Tuple { src, dst: to.dst, ..parsed.tuple };
                Onward { to: outer, hop, change: Change::Quoting(to.reversed()) }
            }
            Decision::Netstack => return Ok(Step::Done(Verdict::ToNetstack)),
            Decision::Echo(hop) => {
                env.counters.answers.add(1);
                // The identifier stays where it is: addresses alone change places.
                let to = Tuple { src: parsed.tuple.dst, dst: parsed.tuple.src, ..parsed.tuple };
                Onward { to, hop, change: Change::Reply }
            }
            Decision::NotOurs => return Ok(Step::Done(Verdict::Consumed(Consumed::NotOurs))),
            Decision::Refuse(reason, say) => {
                match say {
                    Say::Nothing => {}
                    Say::Reject => self.reject(env, packet, parsed, sender, outbox),
                    Say::NoRoute => self.say(env, packet, parsed, sender, Answer::NoRoute, outbox),
                }
                return Err(reason);
            }
        };
        Ok(Step::Onward(onward))
    }

    /// Stage 4, and what a new connection means for its client where clients stick to their backends.
    #[inline]
    fn decide(&self, env: &Env<'_>, packet: &Packet<'_>, parsed: &Parsed, hash: Hash, sender: Sender) -> Decision {
        let decision = decide(env.snapshot, &env.flows, packet, parsed, hash, sender, env.now);
        match decision {
            Decision::Open(Opening { affinity: Some(timeout), service, to, .. }) => {
                let visit = Visit { client: parsed.tuple.src, service, timeout, now: env.now };
                if self.stick(env, parsed, sender, &visit, BackendId::new(to.0, to.1)) {
                    return decision;
                }
                // Another worker met this client a moment ago and chose otherwise. Now its choice is known.
                decide(env.snapshot, &env.flows, packet, parsed, hash, sender, env.now)
            }
            _ => decision,
        }
    }

    /// Whether the client of a new connection sticks to `choice` from now on.
    #[cold]
    fn stick(&self, env: &Env<'_>, parsed: &Parsed, sender: Sender, visit: &Visit, choice: BackendId) -> bool {
        let usable = |id| id == choice || decide::reach(env.snapshot, parsed, sender).is_some_and(|reach| reach.find(id).is_some());
        env.flows.affinity().stick(visit, choice, self.worker, usable) == choice
    }

    /// A packet of a known flow.
    fn follow(&mut self, env: &Env<'_>, flow: &Flow, parsed: &Parsed) -> Result<Onward, DropReason> {
        let flags = match parsed.transport_kind {
            Transport::Tcp { flags, .. } => Some(flags),
            _ => None,
        };
        env.flows.touch(flow, env.now, flags);
        Ok(Onward { to: flow.translated(), hop: decide::hop_of_flow(env.snapshot, flow)?, change: Change::Tuple })
    }

    /// Stages 6 and 7. What stage 7 refuses has been counted against the limit: it was sent.
    fn leave(
        &mut self,
        env: &Env<'_>,
        packet: &mut Packet<'_>,
        parsed: &Parsed,
        sender: Sender,
        onward: &Onward,
        outbox: &mut Outbox,
    ) -> Result<Verdict, DropReason> {
        let Some(wait) = departure(env, packet, parsed, sender, Some(onward))? else {
            return self.send(env, packet, parsed, sender, onward, outbox);
        };
        let said = outbox.len();
        let verdict = self.send(env, packet, parsed, sender, onward, outbox)?;
        match verdict {
            Verdict::Consumed(_) => outbox.wait_said(said, wait),
            _ => outbox.wait_packet(self.at, wait),
        }
        Ok(verdict)
    }

    /// Stage 7: checks the way ahead while the packet is still as its sender knows it, then translates it in place.
    fn send(
        &mut self,
        env: &Env<'_>,
        packet: &mut Packet<'_>,
        parsed: &Parsed,
        sender: Sender,
        onward: &Onward,
        outbox: &mut Outbox,
    ) -> Result<Verdict, DropReason> {
        let ttl = TtlTaken::of(packet.ingress, onward.hop);
        if parsed.ttl <= ttl.by_all() && ttl.by_all() > 0 && onward.change != Change::Reply {
            self.say(env, packet, parsed, sender, Answer::TimeExceeded, outbox);
            return Err(DropReason::TtlExceeded);
        }
        let mtu = mtu_of(env.snapshot, onward.hop);
        let too_big = offload::wire_len(packet, parsed) > mtu;
        if too_big && !may_be_cut(packet, parsed) {
            self.say(env, packet, parsed, sender, Answer::FragmentationNeeded { mtu }, outbox);
            return Err(DropReason::PacketTooBig);
        }
        if let Transport::Tcp { flags, .. } = parsed.transport_kind
            && flags & 0x02 != 0
        {
            let way_back = match packet.ingress {
                Ingress::Overlay(_) => match sender {
                    Sender::Peer(peer) => env.snapshot.peers[peer.0 as usize].mtu,
                    _ => u32::MAX,
                },
                _ => u32::MAX,
            };
            nat::clamp_mss(packet.head, parsed, packet.offload.checksum, mss_for(mtu.min(way_back), parsed));
        }
        if ttl.by_us > 0 && onward.change != Change::Reply {
            ip::set_ttl(packet.head, parsed.ttl - ttl.by_us);
        }
        match onward.change {
            Change::Tuple if onward.to != parsed.tuple => nat::translate(packet.head, parsed, packet.offload.checksum, &onward.to),
            Change::Tuple => {}
            Change::Quoting(quoted) => nat::translate_quoted(packet.head, parsed, &onward.to, &quoted),
            Change::Reply => {
                nat::translate(packet.head, parsed, packet.offload.checksum, &onward.to);
                icmp::turn_into_reply(packet.head, parsed);
            }
        }
        if too_big {
            let sent = Parsed { tuple: onward.to, ..*parsed };
            self.fragment_id = self.fragment_id.wrapping_add(1);
            outbox.push_fragments(egress_of(onward.hop), packet, &sent, mtu, self.fragment_id)?;
            return Ok(Verdict::Consumed(Consumed::Fragmented));
        }
        Ok(verdict_of(onward.hop))
    }

    /// The tails that came before their head, now that it is known what becomes of them.
    fn send_held(&mut self, env: &Env<'_>, key: FragmentKey, sender: Sender, onward: Result<Onward, DropReason>, outbox: &mut Outbox) {
        let mut scratch = std::mem::take(&mut self.scratch);
        loop {
            scratch.clear();
            let Some(held) = self.fragments.release(key, &mut scratch) else {
                break;
            };
            let sent = held.and_then(|held| {
                let onward = onward?;
                let mut packet = Packet { head: &mut scratch, tail_len: 0, offload: Offload::default(), ingress: held.ingress };
                let parsed = parse(&packet)?;
                let wait = departure(env, &packet, &parsed, sender, Some(&onward))?;
                let said = outbox.len();
                match self.send(env, &mut packet, &parsed, sender, &onward, outbox)? {
                    Verdict::Consumed(_) => {}
                    _ => outbox.push(egress_of(onward.hop), packet.head.len(), |out| {
                        out.extend_from_slice(packet.head);
                        Ok(())
                    })?,
                }
                if let Some(wait) = wait {
                    outbox.wait_said(said, wait);
                }
                Ok(())
            });
            if let Err(reason) = sent {
                env.counters.dropped(reason, 1);
            }
        }
        self.scratch = scratch;
    }

    /// Tells the sender that nobody listens there.
    fn reject(&mut self, env: &Env<'_>, packet: &Packet<'_>, parsed: &Parsed, sender: Sender, outbox: &mut Outbox) {
        if let Transport::Tcp { .. } = parsed.transport_kind {
            self.put(env, outbox, back_to(packet.ingress, sender), |out| icmp::reset(out, packet, parsed));
        } else {
            self.say(env, packet, parsed, sender, Answer::PortUnreachable, outbox);
        }
    }

    /// Sends an ICMP error back to where the packet came from, in the terms in which it came.
    fn say(&mut self, env: &Env<'_>, packet: &Packet<'_>, parsed: &Parsed, sender: Sender, answer: Answer, outbox: &mut Outbox) {
        let node = &env.snapshot.node;
        let dst = parsed.tuple.dst;
        // Somebody outside can make nothing of a gateway's address: it hears from the node's address that it dialled. A reject always
        // comes from what was dialled.
        let at_a_node = sender == Sender::Outside && node.owns(dst) || matches!(sender, Sender::HandedOn(_));
        let dialled = answer == Answer::PortUnreachable || at_a_node;
        let Some(source) = (if dialled { Some(dst) } else { node.gateway_for(dst) }) else {
            return;
        };
        self.put(env, outbox, back_to(packet.ingress, sender), |out| icmp::error(out, answer, source, packet, parsed));
    }

    /// Puts an answer into the outbox, if the rate allows; what does not fit is counted, the packet it is about is counted by itself.
    fn put(&mut self, env: &Env<'_>, outbox: &mut Outbox, egress: Egress, build: impl FnOnce(&mut Vec<u8>) -> Result<(), Silence>) {
        match self.allow_answer(env).and_then(|()| outbox.push(egress, ANSWER_LEN_MAX, build)) {
            Ok(()) => env.counters.answers.add(1),
            Err(reason) => env.counters.dropped(reason, 1),
        }
    }

    fn allow_answer(&mut self, env: &Env<'_>) -> Result<(), DropReason> {
        if self.answers.take(env.now) { Ok(()) } else { Err(DropReason::RateLimited) }
    }
}

/// Stage 1 for what is not plain. Apart, so that what is plain is written at once where it is to lie.
#[inline(never)]
fn parse_other<F: Fetch>(env: &Env<'_>, packet: &Packet<'_>) -> Result<Met, DropReason> {
    parse(packet).map(|parsed| Met::new::<F>(env, parsed))
}

impl Met {
    /// What `parse` found with its tuple's hash, by which the index is fetched.
    #[inline]
    fn new<F: Fetch>(env: &Env<'_>, parsed: Parsed) -> Met {
        let hash = env.flows.hash(&parsed.tuple);
        env.flows.warm::<F>(hash);
        Met { parsed, hash, likely: Likely::NONE }
    }
}

/// Stage 6: when a packet may leave by the limits of its sender and, unless the gateway itself takes it, of its receiver. `None`: at once.
#[inline]
fn departure(env: &Env<'_>, packet: &Packet<'_>, parsed: &Parsed, sender: Sender, onward: Option<&Onward>) -> Result<Option<Wait>, DropReason> {
    let egress = egress_limits(env, parsed, sender);
    let ingress = match onward {
        Some(Onward { hop: Hop::Pod { limited: true, .. }, to, .. }) => limits_of(env, to.dst),
        _ => None,
    };
    if egress.is_none() && ingress.is_none() {
        return Ok(None);
    }
    let limiters = [egress.and_then(|limits| limits.egress.as_ref()), ingress.and_then(|limits| limits.ingress.as_ref())];
    shape::depart(limiters, offload::wire_bytes(packet, parsed), env.now_ns).map_err(|Exceeded| DropReason::BandwidthExceeded)
}

/// The limits of the pod that sent a packet, if they are to be looked at.
#[inline]
fn egress_limits<'a>(env: &Env<'a>, parsed: &Parsed, sender: Sender) -> Option<&'a Limits> {
    match sender {
        Sender::Pod { limited: true } => limits_of(env, parsed.tuple.src),
        _ => None,
    }
}

#[cold]
fn limits_of<'a>(env: &Env<'a>, pod: Addr) -> Option<&'a Limits> {
    env.snapshot.pods.get(pod)?.limits.as_deref()
}

/// Cuts off what lies behind the packet's own length (padding of a link).
fn trim(packet: &mut Packet<'_>, parsed: &Parsed) {
    let len = parsed.len as usize;
    if packet.tail_len == 0 && packet.head.len() > len {
        let head = std::mem::take(&mut packet.head);
        packet.head = &mut head[..len];
    }
}

/// Whether the packet may be cut into fragments on its way.
fn may_be_cut(packet: &Packet<'_>, parsed: &Parsed) -> bool {
    packet.offload.gso == Gso::None && packet.tail_len == 0 && (!parsed.dont_fragment || packet.ingress == Ingress::Socket)
}

/// The largest packet that the way to `hop` takes, in bytes.
fn mtu_of(snapshot: &Snapshot, hop: Hop) -> u32 {
    match hop {
        Hop::Pod { mtu, .. } => mtu.into(),
        Hop::Peer(peer) | Hop::DirectReturn(peer) => snapshot.peers[peer.0 as usize].mtu,
        Hop::Outside => snapshot.node.outside_mtu,
        Hop::Node => u32::MAX,
    }
}

/// The largest TCP segment for an MTU: less the IP and TCP headers without options (RFC 6691).
fn mss_for(mtu: u32, parsed: &Parsed) -> u16 {
    let headers = if parsed.tuple.is_v4() { 40 } else { 60 };
    mtu.saturating_sub(headers).clamp(536, u16::MAX as u32) as u16
}

/// What a packet's TTL loses from here on.
#[derive(Clone, Copy)]
struct TtlTaken {
    /// On a pod's own TUN, where the gateway is the first router; on a veth the kernel has taken one on the way in.
    by_us: u8,
    /// Where it forwards from a TUN, to a veth or to an uplink. If it took the last one, it would name the wrong address.
    by_kernel: u8,
}

impl TtlTaken {
    #[inline]
    fn of(ingress: Ingress, hop: Hop) -> TtlTaken {
        TtlTaken {
            by_us: u8::from(matches!(ingress, Ingress::Pod(_))),
            by_kernel: u8::from(matches!(hop, Hop::Pod { tun: None, .. } | Hop::Outside)),
        }
    }

    #[inline]
    fn by_all(self) -> u8 {
        self.by_us + self.by_kernel
    }
}

/// The way back to a packet's sender.
fn back_to(ingress: Ingress, sender: Sender) -> Egress {
    match (ingress, sender) {
        (Ingress::Overlay(_), Sender::Peer(peer)) => Egress::Peer(peer, Network::Cluster),
        (Ingress::Pods, _) => Egress::Pods,
        (Ingress::Pod(tun), _) => Egress::Pod(tun),
        _ => Egress::Host,
    }
}

fn verdict_of(hop: Hop) -> Verdict {
    match hop {
        Hop::Pod { tun, .. } => tun.map_or(Verdict::ToPods, Verdict::ToPod),
        Hop::Node | Hop::Outside => Verdict::ToHost,
        Hop::Peer(peer) => Verdict::ToPeer(peer, Network::Cluster),
        Hop::DirectReturn(peer) => Verdict::ToPeer(peer, Network::DirectReturn),
    }
}

fn egress_of(hop: Hop) -> Egress {
    match hop {
        Hop::Pod { tun, .. } => tun.map_or(Egress::Pods, Egress::Pod),
        Hop::Node | Hop::Outside => Egress::Host,
        Hop::Peer(peer) => Egress::Peer(peer, Network::Cluster),
        Hop::DirectReturn(peer) => Egress::Peer(peer, Network::DirectReturn),
    }
}

#[cfg(test)]
mod tests;
