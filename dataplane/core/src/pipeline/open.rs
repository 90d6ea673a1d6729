//! Stage 5: a new flow takes its place in the table, and its SNAT port with it.

use super::{Bind, Change, Env, MasqueradePort, Onward, Outbox, Pipeline, mtu_of};
use crate::addr::{Tuple, protocol};
use crate::admit::Sender;
use crate::decide::{self, Hop, Opening, Source};
use crate::flow::{Direction, InsertError, Kind, NewFlow, Stage};
use crate::offload;
use crate::packet::Packet;
use crate::parse::{Parsed, Transport};
use crate::verdict::DropReason;
use crate::wire::tcp::{ACK, SYN};

/// How many ports are tried before a flow is refused: enough to find one while 95 % are in use.
const PORT_ATTEMPTS: u32 = 256;

/// How many of them every packet may try. More needs one of [`SEARCHES_PER_SECOND`], so that whoever has used up a destination's ports
/// cannot use up the worker's time as well. With nine in ten in use 32 tries fail once in 30 times.
const PORT_ATTEMPTS_CHEAP: u32 = 32;

/// Long searches for a port, per second and worker: some 20 µs each.
pub(super) const SEARCHES_PER_SECOND: u32 = 2_000;

/// How often a lookup is repeated when workers create one flow at once.
const RACE_ATTEMPTS: u32 = 8;

impl Pipeline {
    /// Whether the replies to an untranslated packet would be taken for those of a flow: its sender has used the same port towards the
    /// same backend through a service, and not long ago. A connection that is over gives way (as one in TIME_WAIT does in nf_nat); another
    /// keeps its tuple, and the packet needs a source of ours.
    pub(super) fn claimed(&self, env: &Env<'_>, parsed: &Parsed) -> bool {
        let starts = match parsed.transport_kind {
            Transport::Tcp { flags, .. } => flags & (SYN | ACK) == SYN,
            Transport::Udp => true,
            _ => false,
        };
        starts && !self.is_free(env, &parsed.tuple.reversed())
    }

    /// Whether no flow has `reply` as the tuple of its answers, once a TCP connection that is over has given way.
    fn is_free(&self, env: &Env<'_>, reply: &Tuple) -> bool {
        match env.flows.lookup(reply) {
            Some(flow) if flow.direction == Direction::Reply => {
                let over = flow.original.protocol == protocol::TCP && matches!(flow.stage, Stage::Closing | Stage::Reset);
                over && env.flows.end(flow.at)
            }
            _ => true,
        }
    }

    /// Stage 5: a new flow. Inserting its reply tuple reserves the SNAT port.
    pub(super) fn open(
        &mut self,
        env: &Env<'_>,
        packet: &Packet<'_>,
        parsed: &Parsed,
        sender: Sender,
        opening: Opening,
        outbox: &mut Outbox,
    ) -> Result<Onward, DropReason> {
        let mut races = 0;
        let mut attempt = 0;
        // A client that keeps its source may, through two VIPs with one backend, need a port of ours after all.
        let (mut source, mut kind, mut hop) = (opening.source, opening.kind, opening.hop);
        loop {
            let (addr, port) = match source {
                Source::Keep => (parsed.tuple.src, Some(parsed.tuple.src_port)),
                Source::Gateway(addr) => (addr, decide::source_port(std::slice::from_ref(&env.snapshot.node.snat_ports), &parsed.tuple, attempt)),
                Source::Masquerade(addr) => {
                    let ranges = env.snapshot.node.masquerade.as_ref().map_or(&[][..], |m| &m.ports);
                    (addr, decide::source_port(ranges, &parsed.tuple, attempt))
                }
            };
            let Some(port) = port else {
                return Err(DropReason::SnatPortsExhausted);
            };
            // An echo's identifier is the source port; its destination port stays 0.
            let reply = Tuple { src: opening.to.0, src_port: opening.to.1, dst: addr, dst_port: port, protocol: parsed.tuple.protocol };
            let new = NewFlow { original: parsed.tuple, reply, kind, opener: opening.opener, service: opening.service, load: opening.load };
            // A look costs a fraction of an insertion that fails.
            if source != Source::Keep && env.flows.lookup(&reply).is_some() {
                attempt += 1;
                self.search_on(env, attempt)?;
                continue;
            }
            let cursor = self.free_records.get_or_insert_with(|| env.flows.cursor(self.worker, env.snapshot.node.workers));
            match env.flows.insert(&new, self.worker, env.now, cursor) {
                Ok(flow) => {
                    env.counters.flows_created.add(1);
                    if matches!(source, Source::Masquerade(_)) && reply.protocol == protocol::UDP {
                        let in_fragments = parsed.fragment.is_some() || offload::wire_len(packet, parsed) > mtu_of(env.snapshot, hop);
                        let bind = if in_fragments { Bind::BeforeSending } else { Bind::Soon };
                        outbox.masquerade_port(MasqueradePort { flow: flow.at, reply, bind });
                    }
                    return Ok(Onward { to: flow.translated(), hop, change: Change::Tuple });
                }
                Err(InsertError::Exists(flow)) if decide::gives_way(env.snapshot, &env.flows, &flow, parsed, sender) => {
                    env.flows.end(flow.at);
                }
                Err(InsertError::Exists(flow)) => return self.follow(env, &flow, parsed),
                Err(InsertError::ReplyTaken) => {
                    attempt += 1;
                    if source == Source::Keep && attempt == 1 && self.is_free(env, &reply) {
                        continue;
                    }
                    if source == Source::Keep {
                        if !decide::has_ports(parsed) {
                            return Err(DropReason::ProtocolUnsupported);
                        }
                        let gateway = env.snapshot.node.gateway_for(parsed.tuple.src).ok_or(DropReason::NoRouteFamily)?;
                        source = Source::Gateway(gateway);
                        if let Hop::DirectReturn(peer) = hop {
                            (kind, hop) = (Kind::Service, Hop::Peer(peer));
                        }
                    }
                    self.search_on(env, attempt)?;
                    continue;
                }
                Err(InsertError::Full) => return Err(DropReason::FlowTableFull),
                Err(InsertError::Raced) => {}
            }
            races += 1;
            if races == RACE_ATTEMPTS {
                return Err(DropReason::FlowRaced);
            }
        }
    }

    /// Whether the search for a free port may go on after `attempt` tries.
    fn search_on(&mut self, env: &Env<'_>, attempt: u32) -> Result<(), DropReason> {
        let over = attempt >= PORT_ATTEMPTS || attempt == PORT_ATTEMPTS_CHEAP && !self.searches.take(env.now);
        if over { Err(DropReason::SnatPortsExhausted) } else { Ok(()) }
    }
}
