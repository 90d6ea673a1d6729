//! Who works on a table at once, or dies over it: a crash after each step, two insertions of one flow, four threads.

use std::sync::atomic::AtomicUsize;

use super::*;

/// Runs an insertion up to and including step `last` of 0 to 5, and then stops as if the process had been killed.
fn insert_until(table: FlowTable<'_>, new: &NewFlow, worker: WorkerId, last: usize) {
    let insertion = table.claim(new, worker, &mut Cursor::default()).unwrap();
    let steps: [&dyn Fn(); 5] = [
        &|| insertion.write(Now(0)),
        &|| assert!(insertion.place(Direction::Original)),
        &|| assert!(insertion.settle(Direction::Original).is_ok()),
        &|| assert!(insertion.place(Direction::Reply)),
        &|| assert!(insertion.settle(Direction::Reply).is_ok()),
    ];
    steps.iter().take(last).for_each(|step| step());
}

#[test]
fn after_a_crash_at_any_step_of_an_insertion_every_flow_lives_and_the_table_is_whole() {
    for last in 0..=5 {
        let flows = OwnedFlows::new(16, KEY);
        let table = flows.table();
        // The record has a past, so its words are another flow's until they are written.
        let past = insert(table, &service(9), Now(0)).unwrap();
        table.end(past.at);
        insert_until(table, &service(1), W, last);
        let kept = insert(table, &service(2), Now(0)).unwrap();
        assert_eq!(table.lookup(&service(1).original), None, "step {last}: a reader passes over it");
        assert_eq!(table.lookup(&service(1).reply), None);
        assert_eq!(table.recover(), Recovered { live: 1, unfinished: 1, discarded: 0 }, "step {last}");
        assert_whole(table);
        assert_eq!(table.lookup(&service(2).original), Some(kept), "under the same reference");
        insert(table, &service(1), Now(0)).expect("the tuples are free again");
        assert_whole(table);
    }
}

#[test]
fn a_dead_workers_insertion_is_abandoned_at_any_step_while_others_go_on() {
    for last in 0..=5 {
        let flows = OwnedFlows::new(16, KEY);
        let table = flows.table();
        let past = insert(table, &service(1), Now(0)).unwrap();
        table.end(past.at);
        insert_until(table, &service(1), WorkerId(5), last);
        insert(table, &service(2), Now(0)).unwrap();
        assert_eq!(table.abandon(WorkerId(4)), 0);
        assert_eq!(table.abandon(WorkerId(5)), 1);
        assert_whole(table);
        insert(table, &service(1), Now(0)).unwrap();
        assert_whole(table);
    }
}

#[test]
fn after_a_crash_in_the_middle_of_an_end_the_flow_is_gone() {
    let flows = OwnedFlows::new(16, KEY);
    let table = flows.table();
    let flow = insert(table, &service(1), Now(0)).unwrap();
    table.mark_dying(flow.at).unwrap();
    assert_eq!(table.lookup(&flow.original), None);
    insert(table, &service(1), Now(0)).expect("a dying flow is no rival");
    assert_eq!(table.recover(), Recovered { live: 1, unfinished: 1, discarded: 0 });
    assert_whole(table);
}

#[test]
fn recovery_rebuilds_an_index_that_was_lost_and_discards_nonsense() {
    let flows = OwnedFlows::new(64, KEY);
    let table = flows.table();
    let mut cursor = Cursor::default();
    for n in 0..40 {
        table.insert(&service(n), W, Now(u64::from(n)), &mut cursor).unwrap();
    }
    let before: Vec<_> = table.views(Now(50)).collect();
    table.index.clear();
    // A record that says it is live but holds the tuples of another.
    let claimed = table.claim(&service(7), W, &mut cursor).unwrap();
    claimed.write(Now(0));
    claimed.commit().unwrap();
    assert_eq!(table.recover(), Recovered { live: 40, unfinished: 0, discarded: 1 });
    assert_eq!(table.views(Now(50)).collect::<Vec<_>>(), before);
    assert_whole(table);
}

#[test]
fn of_two_insertions_of_one_flow_the_smaller_record_wins_whichever_comes_first() {
    let flows = OwnedFlows::new(16, KEY);
    let table = flows.table();
    let mut cursor = Cursor::default();
    let small = table.claim(&service(1), W, &mut cursor).unwrap();
    let large = table.claim(&service(1), WorkerId(4), &mut cursor).unwrap();
    for insertion in [&small, &large] {
        insertion.write(Now(0));
        assert!(insertion.place(Direction::Original));
    }
    assert!(large.settle(Direction::Original).is_err(), "it sees the smaller one and gives way");
    assert!(small.settle(Direction::Original).is_ok(), "it sees the larger one and aborts it");
    assert_eq!(large.commit(), Err(InsertError::Raced));
    assert!(small.place(Direction::Reply) && small.settle(Direction::Reply).is_ok());
    small.commit().unwrap();
    assert_whole(table);
}

#[test]
fn a_larger_record_that_committed_in_time_beats_a_smaller_one_that_comes_late() {
    let flows = OwnedFlows::new(16, KEY);
    let table = flows.table();
    let mut cursor = Cursor::default();
    let small = table.claim(&service(1), W, &mut cursor).unwrap();
    let winner = table.insert(&service(1), WorkerId(4), Now(0), &mut cursor).unwrap();
    small.write(Now(0));
    assert!(small.place(Direction::Original));
    assert!(matches!(small.settle(Direction::Original), Err(insert::Lost::To(flow)) if flow == winner));
    small.undo();
    assert_whole(table);
}

#[test]
fn four_workers_at_once_never_share_a_tuple_nor_leak_a_record() {
    const FLOWS: u64 = 24;
    const CAPACITY: usize = 40;
    let flows = OwnedFlows::new(CAPACITY, KEY);
    let table = flows.table();
    let created = AtomicUsize::new(0);
    let ended = AtomicUsize::new(0);
    let until = Instant::now() + Duration::from_millis(1_500);
    std::thread::scope(|scope| {
        for worker in 0..4u16 {
            let (created, ended) = (&created, &ended);
            scope.spawn(move || {
                let mut random = Random(0x9e37_79b9 + u64::from(worker));
                let mut cursor = table.cursor(WorkerId(worker), 4);
                let mut swept = 0;
                for step in 0u64.. {
                    if step.is_multiple_of(256) && Instant::now() > until {
                        break;
                    }
                    let n = random.below(FLOWS) as u32;
                    // The workers choose different SNAT ports for one flow, and the same for different flows.
                    let new = NewFlow { reply: service(random.below(FLOWS) as u32).reply, ..service(n) };
                    match random.below(8) {
                        0..4 => match table.insert(&new, WorkerId(worker), Now(step), &mut cursor) {
                            Ok(flow) => {
                                created.fetch_add(1, Ordering::Relaxed);
                                assert_eq!((flow.original, flow.reply), (new.original, new.reply));
                            }
                            Err(InsertError::Exists(flow)) => assert_eq!(flow.original, new.original),
                            Err(InsertError::ReplyTaken | InsertError::Raced) => {}
                            Err(InsertError::Full) => panic!("{CAPACITY} records are enough for {FLOWS} flows and four workers"),
                        },
                        4..6 => {
                            if let Some(flow) = table.lookup(&new.original) {
                                assert_eq!((flow.original, flow.direction), (new.original, Direction::Original), "a torn read");
                                assert!(flow.reply.src_port == 8443, "a torn read");
                                table.touch(&flow, Now(step), Some(ACK));
                            }
                        }
                        6 => {
                            if let Some(flow) = table.lookup(&new.reply) {
                                assert_eq!((flow.reply, flow.direction), (new.reply, Direction::Reply), "a torn read");
                                ended.fetch_add(usize::from(table.end(flow.at)), Ordering::Relaxed);
                            }
                        }
                        _ => {
                            let timeouts = Timeouts { tcp_opening: Duration::ZERO, tcp_established: Duration::ZERO, ..Timeouts::default() };
                            let late = Now(step + 1_000 + random.below(2) * 1_000_000);
                            ended.fetch_add(table.sweep(&mut swept, 8, late, &timeouts).expired, Ordering::Relaxed);
                        }
                    }
                }
                assert_eq!(cursor.evicted, 0);
            });
        }
    });
    let (created, ended) = (created.into_inner(), ended.into_inner());
    assert!(created > 1_000, "only {created} flows were created");
    assert_eq!(created - ended, table.len(), "every flow ended once or lives");
    assert_whole(table);
}

#[test]
fn a_pair_of_tuples_appears_and_goes_as_one() {
    let flows = OwnedFlows::new(8, KEY);
    let table = flows.table();
    let new = service(1);
    let until = Instant::now() + Duration::from_millis(300);
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut cursor = Cursor::default();
            while Instant::now() < until {
                let flow = table.insert(&new, W, Now(0), &mut cursor).expect("nobody else inserts");
                table.end(flow.at);
            }
            done.store(1, Ordering::Relaxed);
        });
        while done.load(Ordering::Relaxed) == 0 {
            // If one version was found by its original tuple and is live afterwards, its reply tuple found it in between.
            if let Some(flow) = table.lookup(&new.original) {
                let reply = table.lookup(&new.reply);
                if table.is_live(flow.at) {
                    assert_eq!(reply, Some(Flow { direction: Direction::Reply, ..flow }));
                }
            }
        }
    });
    assert_whole(table);
}
