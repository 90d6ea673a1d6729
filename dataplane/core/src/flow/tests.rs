//! The table as a whole, with one at work: rows, and a HashMap as the oracle. `together` has several at work.
#![expect(clippy::result_large_err, reason = "as in `insert`")]
#![expect(clippy::disallowed_methods, reason = "a stress test runs for a time")]

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::record::State;
use super::*;
use crate::addr::Addr;
use crate::balance::LoadSlot;
use crate::verdict::WorkerId;

mod together;

const KEY: [u64; 2] = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
const W: WorkerId = WorkerId(3);
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;

fn tuple(src: u32, src_port: u16, dst: u32, dst_port: u16, protocol: u8) -> Tuple {
    Tuple { src: Addr::from_v4(src.to_be_bytes()), dst: Addr::from_v4(dst.to_be_bytes()), src_port, dst_port, protocol }
}

/// Client `n` to a VIP, translated to a backend, its source to a gateway address and port `n`.
fn service(n: u32) -> NewFlow {
    let original = tuple(0x0a20_0000 + (n >> 12), 1024 + (n & 0xfff) as u16, 0x0a60_0001, 443, protocol::TCP);
    let reply = tuple(0x0a20_ff02, 8443, 0x0a20_0001 + (n >> 16), n as u16, protocol::TCP);
    NewFlow { original, reply, kind: Kind::Service, opener: Opener::Pod, service: 7, load: LoadSlot::NONE }
}

fn udp(n: u32) -> NewFlow {
    let mut new = service(n);
    new.original.protocol = protocol::UDP;
    new.reply.protocol = protocol::UDP;
    new
}

fn insert(table: FlowTable<'_>, new: &NewFlow, now: Now) -> Result<Flow, InsertError> {
    table.insert(new, W, now, &mut Cursor::default())
}

fn reply_of(table: FlowTable<'_>, new: &NewFlow) -> Flow {
    table.lookup(&new.reply).expect("the reply tuple finds the flow")
}

/// A small generator, so that a thread's history follows from its number (xorshift64*, Vigna 2016).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}

/// Everything that must hold when nobody is at work: each live flow is found by both tuples, once each; nothing else is in the index; no
/// record is held; no tuple belongs to two flows.
fn assert_whole(table: FlowTable<'_>) {
    let mut keys = HashSet::new();
    for view in table.views(Now(0)) {
        let flow = view.flow;
        assert_eq!(table.lookup(&flow.original), Some(Flow { direction: Direction::Original, ..flow }));
        assert_eq!(table.lookup(&flow.reply), Some(Flow { direction: Direction::Reply, ..flow }));
        assert!(keys.insert(flow.original) && keys.insert(flow.reply), "{flow:?} shares a tuple");
    }
    assert_eq!(table.index.taken(), keys.len(), "every entry is of a live flow, and there are two of each");
    for (index, record) in table.records.iter().enumerate() {
        let state = record.ctrl(Ordering::Relaxed).state();
        assert!(matches!(state, State::Free | State::Live), "record {index} is {state:?}");
    }
    assert_eq!(table.len() * 2, keys.len());
    assert_eq!(table.is_empty(), keys.is_empty());
}

#[test]
fn a_flow_is_found_by_both_tuples_with_all_that_was_put_in() {
    let flows = OwnedFlows::new(16, KEY);
    let table = flows.table();
    let new = NewFlow {
        original: Tuple { src: Addr(u128::MAX), dst: Addr(1 << 127 | 5), src_port: 0xffff, dst_port: 0x8001, protocol: 255 },
        reply: Tuple { src: Addr(3 << 64), dst: Addr(9), src_port: 2, dst_port: 0xfffe, protocol: 255 },
        kind: Kind::Relayed,
        opener: Opener::Peer,
        service: u64::MAX,
        load: LoadSlot::NONE,
    };
    let flow = insert(table, &new, Now(5)).unwrap();
    assert_eq!(table.lookup(&new.original), Some(flow));
    assert_eq!(reply_of(table, &new), Flow { direction: Direction::Reply, ..flow });
    assert_eq!((flow.original, flow.reply, flow.kind, flow.opener, flow.service), (new.original, new.reply, new.kind, new.opener, new.service));
    assert_eq!((flow.stage, flow.direction), (Stage::Opening, Direction::Original));
    assert_eq!(table.views(Now(105)).collect::<Vec<_>>(), [FlowView { flow, idle_ms: 100, age_ms: 100 }]);
    assert_eq!(table.lookup(&new.original.reversed()), None);
    assert_whole(table);
}

#[test]
fn an_ended_flow_is_found_by_neither_tuple_and_ends_once() {
    let flows = OwnedFlows::new(16, KEY);
    let table = flows.table();
    let flow = insert(table, &service(1), Now(0)).unwrap();
    assert!(table.is_live(flow.at));
    assert!(table.end(flow.at));
    assert!(!table.end(flow.at));
    assert!(!table.is_live(flow.at));
    assert_eq!(table.lookup(&flow.original), None);
    assert_eq!(table.lookup(&flow.reply), None);
    assert!(table.is_empty());
    assert_whole(table);
}

#[test]
fn a_stale_reference_does_nothing_to_the_records_next_flow() {
    let flows = OwnedFlows::new(1, KEY);
    let table = flows.table();
    let old = insert(table, &udp(1), Now(0)).unwrap();
    table.end(old.at);
    let new = insert(table, &udp(2), Now(10)).unwrap();
    assert_eq!(new.at.index, old.at.index);
    table.touch(&Flow { direction: Direction::Reply, ..old }, Now(90_000), None);
    assert!(!table.end(old.at) && !table.is_live(old.at) && !table.opens_anew(&old, SYN));
    let view = table.views(Now(10)).next().unwrap();
    assert_eq!((view.flow, view.idle_ms), (new, 0), "neither seen nor established");
    assert!(!table.end(FlowRef { index: 99, version: 0 }), "a number out of range is as stale as any");
}

#[test]
fn the_same_original_again_is_told_which_flow_has_it() {
    let flows = OwnedFlows::new(16, KEY);
    let table = flows.table();
    let first = insert(table, &service(1), Now(0)).unwrap();
    let again = NewFlow { reply: service(2).reply, ..service(1) };
    assert_eq!(insert(table, &again, Now(0)), Err(InsertError::Exists(first)));
    assert_eq!(table.lookup(&again.reply), None, "nothing of the refused flow remains");
    assert_whole(table);
}

#[test]
fn a_reply_tuple_in_use_is_refused_whichever_direction_uses_it() {
    let flows = OwnedFlows::new(16, KEY);
    let table = flows.table();
    let first = insert(table, &service(1), Now(0)).unwrap();
    assert_eq!(insert(table, &NewFlow { reply: first.reply, ..service(2) }, Now(0)), Err(InsertError::ReplyTaken));
    assert_eq!(insert(table, &NewFlow { reply: first.original, ..service(2) }, Now(0)), Err(InsertError::ReplyTaken));
    let crossed = NewFlow { original: first.reply, ..service(2) };
    assert_eq!(insert(table, &crossed, Now(0)), Err(InsertError::Exists(Flow { direction: Direction::Reply, ..first })));
    assert_whole(table);
    table.end(first.at);
    insert(table, &NewFlow { reply: first.reply, ..service(2) }, Now(0)).expect("the port is free again");
    assert_whole(table);
}

#[test]
fn a_flow_that_is_its_own_answer_is_refused() {
    let flows = OwnedFlows::new(16, KEY);
    let land = tuple(1, 7, 1, 7, protocol::UDP);
    let new = NewFlow { original: land, reply: land, ..udp(1) };
    assert_eq!(insert(flows.table(), &new, Now(0)), Err(InsertError::ReplyTaken));
    assert_whole(flows.table());
}

#[test]
fn an_untranslated_flow_has_two_entries_like_any_other() {
    let flows = OwnedFlows::new(16, KEY);
    let original = service(1).original;
    let new = NewFlow { original, reply: original.reversed(), kind: Kind::OutsideToPod, opener: Opener::Host, service: 0, load: LoadSlot::NONE };
    let flow = insert(flows.table(), &new, Now(0)).unwrap();
    assert_eq!(flow.translated(), original);
    assert_whole(flows.table());
}

#[test]
fn udp_and_icmp_live_longer_once_answered_and_expire_when_silent() {
    let flows = OwnedFlows::new(16, KEY);
    let table = flows.table();
    let timeouts = Timeouts::default();
    let sweep = |now| table.sweep(&mut 0, 16, Now(now), &timeouts).expired;
    let new = udp(1);
    insert(table, &new, Now(0)).unwrap();
    assert_eq!(sweep(30_999), 0);
    assert_eq!(table.touch(&reply_of(table, &new), Now(30_999), None), Stage::Established);
    assert_eq!(sweep(31_000 + 120_000 - 2), 0);
    assert_eq!(sweep(31_999 + 120_000), 1);
    insert(table, &new, Now(0)).unwrap();
    assert_eq!(sweep(31_000), 1, "unanswered: 30 s and the coarse step");
    assert_whole(table);
}

#[test]
fn a_tcp_flow_has_the_lifetime_of_its_stage() {
    let flows = OwnedFlows::new(16, KEY);
    let table = flows.table();
    let timeouts = Timeouts::default();
    let sweep = |now| table.sweep(&mut 0, 16, Now(now), &timeouts).expired;
    let new = service(1);
    let opened = insert(table, &new, Now(0)).unwrap();
    assert_eq!(table.touch(&opened, Now(0), Some(SYN)), Stage::Opening);
    assert_eq!(table.touch(&reply_of(table, &new), Now(0), Some(SYN | ACK)), Stage::Opening);
    assert_eq!(table.touch(&opened, Now(0), None), Stage::Opening, "a fragment's tail is no handshake");
    assert_eq!(table.touch(&opened, Now(0), Some(ACK)), Stage::Established);
    assert_eq!(table.lookup(&new.original).unwrap().stage, Stage::Established);
    let five_days = timeouts.tcp_established.as_millis() as u64;
    assert_eq!(sweep(five_days), 0);
    assert!(!table.opens_anew(&opened, SYN));
    assert_eq!(table.touch(&reply_of(table, &new), Now(five_days), Some(RST)), Stage::Reset);
    assert!(table.opens_anew(&opened, SYN));
    assert_eq!(sweep(five_days + 10_999), 0);
    assert_eq!(sweep(five_days + 11_000), 1);
    assert_whole(table);
}

#[test]
fn traffic_within_a_second_does_not_write_the_time_and_later_traffic_does() {
    let flows = OwnedFlows::new(16, KEY);
    let table = flows.table();
    let flow = insert(table, &udp(1), Now(1_000)).unwrap();
    let idle = |now| table.views(Now(now)).next().unwrap().idle_ms;
    table.touch(&flow, Now(1_999), None);
    assert_eq!(idle(1_999), 999);
    table.touch(&flow, Now(2_000), None);
    assert_eq!(idle(2_000), 0);
    table.touch(&flow, Now(500), None);
    assert_eq!(idle(2_000), 0, "a clock read earlier does not set it back");
}

#[test]
fn a_sweep_goes_on_where_the_last_one_stopped() {
    let flows = OwnedFlows::new(10, KEY);
    let table = flows.table();
    let mut cursor = Cursor::default();
    for n in 0..10 {
        table.insert(&udp(n), W, Now(0), &mut cursor).unwrap();
    }
    let mut at = 0;
    let late = Now(1_000_000);
    assert_eq!(table.sweep(&mut at, 4, late, &Timeouts::default()), Swept { expired: 4, examined: 4 });
    assert_eq!(table.sweep(&mut at, 4, late, &Timeouts::default()), Swept { expired: 4, examined: 4 });
    assert_eq!(table.sweep(&mut at, 4, late, &Timeouts::default()), Swept { expired: 2, examined: 4 });
    assert_whole(table);
}

#[test]
fn workers_that_start_again_and_again_beside_flows_that_stand_side_by_side_find_room() {
    let flows = OwnedFlows::new(8192, KEY);
    let table = flows.table();
    for start in 0..8 {
        let mut cursor = table.cursor(W, 2);
        for n in start * 300..(start + 1) * 300 {
            assert!(table.insert(&udp(n), W, Now(1), &mut cursor).is_ok(), "flow {n}");
            table.touch(&reply_of(table, &udp(n)), Now(1), None);
        }
        assert_eq!(cursor.evicted, 0);
        // One has ended: room for one, and none for a long way behind it.
        table.end(table.lookup(&udp(start * 300 + 3).original).unwrap().at);
        table.recover();
    }
    // Whoever comes upon them goes on elsewhere.
    let mut cursor = table.cursor(W, 2);
    for n in 2400..4400 {
        assert!(table.insert(&udp(n), W, Now(1), &mut cursor).is_ok(), "flow {n}");
        table.touch(&reply_of(table, &udp(n)), Now(1), None);
    }
    assert_eq!(cursor.evicted, 0);
    assert_whole(table);
}

#[test]
fn a_full_table_evicts_the_oldest_half_open_flow_and_never_an_established_one() {
    let flows = OwnedFlows::new(4, KEY);
    let table = flows.table();
    let mut cursor = table.cursor(W, 4);
    for n in 0..4 {
        table.insert(&service(n), W, Now(100 - u64::from(n)), &mut cursor).unwrap();
    }
    let establish = |n| {
        table.touch(&reply_of(table, &service(n)), Now(100), Some(SYN | ACK));
        assert_eq!(table.touch(&table.lookup(&service(n).original).unwrap(), Now(100), Some(ACK)), Stage::Established);
    };
    establish(3);
    table.insert(&service(4), W, Now(200), &mut cursor).unwrap();
    assert_eq!(cursor.evicted, 1);
    assert_eq!(table.lookup(&service(2).original), None, "the oldest of the half-open ones");
    assert!([0, 1, 3, 4].iter().all(|n| table.lookup(&service(*n).original).is_some()));
    for n in [0, 1, 4] {
        establish(n);
    }
    assert_eq!(table.insert(&service(5), W, Now(300), &mut cursor), Err(InsertError::Full));
    assert_eq!((cursor.evicted, table.len()), (1, 4));
    assert_whole(table);
}

#[test]
fn keys_that_collide_fill_both_buckets_and_then_the_table_is_full() {
    // Two buckets only: every key collides with every other.
    let flows = OwnedFlows::with_layout(64, 2, KEY);
    let table = flows.table();
    let mut cursor = Cursor::default();
    for n in 0..8 {
        table.insert(&service(n), W, Now(0), &mut cursor).unwrap();
    }
    assert_eq!(table.insert(&service(8), W, Now(0), &mut cursor), Err(InsertError::Full));
    assert_whole(table);
    table.end(table.lookup(&service(3).original).unwrap().at);
    table.insert(&service(8), W, Now(0), &mut cursor).expect("there is a place again");
    assert_whole(table);
}

#[test]
fn a_table_takes_as_many_flows_as_it_has_records_and_goes_on_taking_them_as_they_are_replaced() {
    let capacity = 16_384;
    assert_eq!(layout(capacity), (capacity, 8_192));
    assert_eq!(layout(capacity + 1).1, 16_384);
    for seed in 0..4 {
        let flows = OwnedFlows::new(capacity, [seed, KEY[1]]);
        let table = flows.table();
        let mut cursor = Cursor::default();
        for n in 0..4 * capacity as u32 {
            if let Some(oldest) = n.checked_sub(capacity as u32) {
                table.end(table.lookup(&service(oldest).reply).unwrap().at);
            }
            table.insert(&service(n), W, Now(0), &mut cursor).unwrap();
        }
        assert_eq!((table.len(), cursor.evicted), (capacity, 0));
        assert_whole(table);
    }
}

#[test]
fn a_million_flows_fit_in_256_mib() {
    let (records, buckets) = layout(1_000_000);
    assert!(records * size_of::<Record>() + buckets * size_of::<Bucket>() <= 256 << 20);
    assert_eq!(layout(0), (1, 2));
}

#[test]
fn end_matching_ends_those_and_no_others() {
    let flows = OwnedFlows::new(64, KEY);
    let table = flows.table();
    let mut cursor = Cursor::default();
    for n in 0..40 {
        table.insert(&service(n), W, Now(0), &mut cursor).unwrap();
    }
    assert_eq!(table.end_matching(|flow| flow.original.src_port % 2 == 0), 20);
    assert!(table.views(Now(0)).all(|view| view.flow.original.src_port % 2 == 1));
    assert_whole(table);
}

/// A small world of tuples, so that they meet.
#[derive(Clone, Debug)]
enum Op {
    Insert { original: u8, reply: u8 },
    Lookup { tuple: u8 },
    EndOf { tuple: u8 },
    EndNth { nth: usize },
    Touch { tuple: u8, flags: Option<u8> },
    Wait { ms: u64 },
    Recover,
}

fn op() -> impl Strategy<Value = Op> {
    let small = 0u8..48;
    prop_oneof![
        6 => (small.clone(), small.clone()).prop_map(|(original, reply)| Op::Insert { original, reply }),
        4 => small.clone().prop_map(|tuple| Op::Lookup { tuple }),
        2 => small.clone().prop_map(|tuple| Op::EndOf { tuple }),
        1 => any::<usize>().prop_map(|nth| Op::EndNth { nth }),
        4 => (small, prop_oneof![Just(None), any::<u8>().prop_map(Some)]).prop_map(|(tuple, flags)| Op::Touch { tuple, flags }),
        1 => (0u64..200_000).prop_map(|ms| Op::Wait { ms }),
        1 => Just(Op::Recover),
    ]
}

fn small_tuple(n: u8) -> Tuple {
    tuple(1, n.into(), 2, 80, [protocol::TCP, protocol::UDP][usize::from(n % 2)])
}

/// What the oracle knows of a flow.
#[derive(Clone, Copy)]
struct Known {
    flow: Flow,
    life: tcp::Life,
    seen: u64,
}

/// The obvious table: two maps and no concurrency.
#[derive(Default)]
struct Oracle {
    flows: HashMap<u32, Known>,
    keys: HashMap<Tuple, (u32, Direction)>,
}

impl Oracle {
    fn lookup(&self, key: &Tuple) -> Option<Flow> {
        let (index, direction) = *self.keys.get(key)?;
        let known = &self.flows[&index];
        Some(Flow { direction, stage: known.life.stage, ..known.flow })
    }

    fn end(&mut self, at: FlowRef) {
        let known = self.flows.remove(&at.index).unwrap();
        self.keys.remove(&known.flow.original);
        self.keys.remove(&known.flow.reply);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_history_agrees_with_a_hash_map(ops in prop::collection::vec(op(), 1..200)) {
        let flows = OwnedFlows::new(32, KEY);
        let table = flows.table();
        let timeouts = Timeouts::default();
        let mut oracle = Oracle::default();
        let mut cursor = Cursor::default();
        let mut now = 1_000_000;
        for op in ops {
            match op {
                Op::Insert { original, reply } => {
                    // Of one protocol.
                    let reply = reply & !1 | original & 1;
                    let new = NewFlow { original: small_tuple(original), reply: small_tuple(reply), ..service(0) };
                    let before = oracle.lookup(&new.original);
                    match table.insert(&new, W, Now(now), &mut cursor) {
                        Ok(flow) => {
                            prop_assert!(before.is_none() && oracle.lookup(&new.reply).is_none() && new.original != new.reply);
                            let known = Known { flow, life: tcp::Life::of(flow.kind), seen: now };
                            prop_assert!(oracle.flows.insert(flow.at.index, known).is_none());
                            oracle.keys.insert(new.original, (flow.at.index, Direction::Original));
                            oracle.keys.insert(new.reply, (flow.at.index, Direction::Reply));
                        }
                        Err(InsertError::Exists(flow)) => prop_assert_eq!(Some(flow), before),
                        Err(InsertError::ReplyTaken) => {
                            let own = new.original == new.reply;
                            prop_assert!(own || before.is_none() && oracle.lookup(&new.reply).is_some());
                        }
                        // 48 tuples are at most 24 flows, and there are 32 records.
                        Err(error) => prop_assert!(false, "{:?}", error),
                    }
                }
                Op::Lookup { tuple } => prop_assert_eq!(table.lookup(&small_tuple(tuple)), oracle.lookup(&small_tuple(tuple))),
                Op::EndOf { tuple } => {
                    if let Some(flow) = oracle.lookup(&small_tuple(tuple)) {
                        prop_assert!(table.end(flow.at));
                        prop_assert!(!table.end(flow.at));
                        oracle.end(flow.at);
                    }
                }
                Op::EndNth { nth } => {
                    if let Some(at) = table.views(Now(now)).nth(nth % 32).map(|view| view.flow.at) {
                        prop_assert!(table.end(at));
                        oracle.end(at);
                    }
                }
                Op::Touch { tuple, flags } => {
                    if let Some(flow) = oracle.lookup(&small_tuple(tuple)) {
                        let stage = table.touch(&flow, Now(now), flags);
                        let known = oracle.flows.get_mut(&flow.at.index).unwrap();
                        if now >= known.seen + 1_000 {
                            known.seen = now;
                        }
                        if flags.is_some() || flow.original.protocol != protocol::TCP {
                            known.life = known.life.after(flow.direction, flags);
                        }
                        prop_assert_eq!(stage, known.life.stage);
                    }
                }
                Op::Wait { ms } => {
                    now += ms;
                    let over: BTreeSet<u32> = oracle.flows.iter().filter(|(_, known)| {
                        let lifetime = timeouts.lifetime(known.flow.original.protocol, known.life.stage).as_millis() as u64;
                        now - known.seen >= lifetime + 1_000
                    }).map(|(index, _)| *index).collect();
                    let swept = table.sweep(&mut 0, usize::MAX, Now(now), &timeouts);
                    prop_assert_eq!(swept, Swept { expired: over.len(), examined: 32 });
                    for index in over {
                        oracle.end(oracle.flows[&index].flow.at);
                    }
                }
                Op::Recover => {
                    let recovered = table.recover();
                    prop_assert_eq!(recovered, Recovered { live: oracle.flows.len(), unfinished: 0, discarded: 0 });
                }
            }
            prop_assert_eq!(table.len(), oracle.flows.len());
        }
        assert_whole(table);
    }
}

/// Nanoseconds for each lookup, one by one and in batches of 32 with `warm`: run it with
/// `cargo test --release -p podgate-core flow::tests::lookup_figures -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a check"]
fn lookup_figures() {
    for count in [10_000u32, 1_000_000] {
        let flows = OwnedFlows::new(count as usize, KEY);
        let table = flows.table();
        let mut cursor = Cursor::default();
        let started = Instant::now();
        for n in 0..count {
            table.insert(&service(n), W, Now(0), &mut cursor).unwrap();
        }
        let insert_ns = started.elapsed().as_nanos() as f64 / f64::from(count);
        let mut random = Random(1);
        let keys: Vec<Tuple> = (0..1 << 20)
            .map(|n| {
                let new = service(random.below(count.into()) as u32);
                if n % 2 == 0 { new.original } else { new.reply }
            })
            .collect();
        let per_key = |started: Instant| started.elapsed().as_nanos() as f64 / keys.len() as f64;
        let mut best = [f64::MAX; 5];
        for _ in 0..5 {
            let started = Instant::now();
            let found = keys.iter().filter(|key| table.lookup(key).is_some()).count();
            best[0] = best[0].min(per_key(started));
            assert_eq!(found, keys.len());
            for (figure, passes) in [(1, 1), (2, 2)] {
                let started = Instant::now();
                let mut found = 0;
                for batch in keys.chunks(32) {
                    let mut hashes = [Hash(0); 32];
                    for (hash, key) in hashes.iter_mut().zip(batch) {
                        *hash = table.hash(key);
                        table.warm::<Touch>(*hash);
                    }
                    if passes == 2 {
                        batch.iter().zip(hashes).for_each(|(key, hash)| {
                            table.warm_record::<Touch>(key, table.likely(hash));
                        });
                    }
                    found += batch.iter().zip(hashes).filter(|(key, hash)| table.lookup_hashed(key, *hash).is_some()).count();
                }
                best[figure] = best[figure].min(per_key(started));
                assert_eq!(found, keys.len());
            }
            let started = Instant::now();
            let missed = keys.iter().filter(|key| table.lookup(&Tuple { protocol: 99, ..**key }).is_none()).count();
            best[3] = best[3].min(per_key(started));
            assert_eq!(missed, keys.len());
            let started = Instant::now();
            std::hint::black_box(keys.iter().fold(0, |sum, key| sum ^ table.hash(key).0));
            best[4] = best[4].min(per_key(started));
        }
        println!(
            "{count} flows: lookup {:.0} ns, batch of 32 warmed {:.0} ns, warmed twice {:.0} ns, miss {:.0} ns, hash {:.1} ns, insert {insert_ns:.0} ns",
            best[0], best[1], best[2], best[3], best[4]
        );
    }
}
