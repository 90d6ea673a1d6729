//! The flow table under loom, which tries the orders in which two threads' accesses may happen and the values that relaxed loads may see.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p podgate-core --lib flow::model`
//!
//! Buckets have four places here, a thread is interrupted at most twice and each model runs for at most 20 seconds.

use loom::sync::Arc;
use loom::thread;

use super::*;
use crate::addr::Addr;
use crate::balance::LoadSlot;
use crate::verdict::WorkerId;

fn tuple(n: u16) -> Tuple {
    Tuple { src: Addr(n.into()), dst: Addr(2), src_port: n, dst_port: 80, protocol: protocol::TCP }
}

fn flow(original: u16, reply: u16) -> NewFlow {
    NewFlow {
        original: tuple(original),
        reply: tuple(reply),
        kind: Kind::Service,
        opener: Opener::Pod,
        service: u64::from(original),
        load: LoadSlot::NONE,
    }
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.max_branches = 10_000;
    builder.max_duration = Some(std::time::Duration::from_secs(20));
    builder.check(model);
}

/// Two workers insert at once, each with a record of its own in reach first: one of them wins, whole, and the other leaves nothing. (Both
/// are spawned: loom explores few orders against the main thread.)
///
/// A third flow, whose entries stand before theirs in the bucket, ends at the same time. So the two need not take the same place, where the
/// exchange alone would make one see the other: the fence in `settle` has to.
fn one_of_two_wins(first: NewFlow, second: NewFlow) {
    check(move || {
        let flows = Arc::new(OwnedFlows::with_layout(3, 2, [1, 2]));
        let bucket = |n| flows.table().hash(&tuple(n)).bucket(2);
        let before = |n, from: u16| (from..).find(|other| bucket(*other) == bucket(n)).expect("half of all tuples");
        let in_the_way = flow(before(first.original.src_port, 10), before(first.original.src_port, 100));
        let third = flows.table().insert(&in_the_way, WorkerId(0), Now(0), &mut Cursor::default()).unwrap().at;
        let workers = [(first, 1), (second, 2)].map(|(new, worker)| {
            let flows = flows.clone();
            thread::spawn(move || {
                let table = flows.table();
                if worker == 1 {
                    assert!(table.end(third));
                }
                table.insert(&new, WorkerId(worker), Now(0), &mut table.cursor(WorkerId(worker), 3))
            })
        });
        let results = workers.map(|worker| worker.join().unwrap());
        let table = flows.table();
        let won: Vec<Flow> = results.iter().filter_map(|result| result.ok()).collect();
        assert_eq!(won.len(), 1, "{results:?}");
        assert_eq!(table.lookup(&won[0].original), Some(won[0]));
        assert_eq!(table.lookup(&won[0].reply), Some(Flow { direction: Direction::Reply, ..won[0] }));
        assert_eq!((table.len(), table.index.taken()), (1, 2));
    });
}

#[test]
fn of_two_creations_of_one_flow_one_wins() {
    one_of_two_wins(flow(1, 2), flow(1, 2));
}

#[test]
fn of_two_flows_with_one_reply_tuple_one_wins() {
    one_of_two_wins(flow(1, 3), flow(2, 3));
}

#[test]
fn of_two_flows_that_cross_each_others_tuples_one_wins() {
    one_of_two_wins(flow(1, 2), flow(2, 1));
}

#[test]
fn a_reader_never_sees_half_of_a_flow_while_its_record_changes_hands() {
    check(|| {
        let flows = Arc::new(OwnedFlows::with_layout(1, 2, [1, 2]));
        let old = flows.table().insert(&flow(1, 2), WorkerId(0), Now(0), &mut Cursor::default()).unwrap();
        let writer = thread::spawn({
            let flows = flows.clone();
            move || {
                assert!(flows.table().end(old.at));
                flows.table().insert(&flow(1, 3), WorkerId(0), Now(0), &mut Cursor::default()).unwrap()
            }
        });
        let reader = thread::spawn({
            let flows = flows.clone();
            move || flows.table().records[0].read_live().and_then(|(version, words)| words.flow(0, version, Direction::Original))
        });
        let seen = reader.join().unwrap();
        let new = writer.join().unwrap();
        assert!(seen.is_none() || seen == Some(old) || seen == Some(new), "{seen:?}");
        assert_eq!(flows.table().lookup(&tuple(1)), Some(new));
    });
}

#[test]
fn a_packet_of_a_known_flow_never_leaves_by_half_of_another_while_its_record_changes_hands() {
    check(|| {
        let flows = Arc::new(OwnedFlows::with_layout(1, 2, [1, 2]));
        let old = flows.table().insert(&flow(1, 2), WorkerId(0), Now(0), &mut Cursor::default()).unwrap();
        let writer = thread::spawn({
            let flows = flows.clone();
            move || {
                assert!(flows.table().end(old.at));
                flows.table().insert(&flow(1, 3), WorkerId(0), Now(0), &mut Cursor::default()).unwrap()
            }
        });
        let reader = thread::spawn({
            let flows = flows.clone();
            move || {
                let table = flows.table();
                let likely = table.likely(table.hash(&tuple(1)));
                table.hit(&tuple(1), likely).map(|hit| (*hit.to(), hit.change()))
            }
        });
        let seen = reader.join().unwrap();
        writer.join().unwrap();
        let leaves = |reply: u16| (tuple(reply).reversed(), crate::nat::Change::new(&tuple(1), &tuple(reply).reversed()));
        assert!(seen.is_none() || seen == Some(leaves(2)) || seen == Some(leaves(3)), "{seen:?}");
    });
}

#[test]
fn of_two_ends_of_one_flow_one_wins() {
    check(|| {
        let flows = Arc::new(OwnedFlows::with_layout(1, 2, [1, 2]));
        let at = flows.table().insert(&flow(1, 2), WorkerId(0), Now(0), &mut Cursor::default()).unwrap().at;
        let ends = [(); 2].map(|()| {
            let flows = flows.clone();
            thread::spawn(move || flows.table().end(at))
        });
        assert_eq!(ends.map(|end| usize::from(end.join().unwrap())).iter().sum::<usize>(), 1);
        assert_eq!((flows.table().len(), flows.table().index.taken()), (0, 0));
    });
}
