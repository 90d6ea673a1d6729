//! Rows, a map as the oracle, a flood, a crash half way, and four threads at once.

use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::testing::addr;

const KEY: [u64; 2] = [3, 4];
const W: WorkerId = WorkerId(0);
const TIMEOUT: Duration = Duration::from_secs(10);
const WEB: u64 = 7;

fn memory(buckets: usize) -> Vec<Bucket> {
    (0..buckets).map(|_| Bucket::default()).collect()
}

fn client(n: u32) -> Addr {
    Addr::from_v4((0x0a20_0000 + n).to_be_bytes())
}

fn id(port: u16) -> BackendId {
    BackendId::new(client(0), port)
}

fn visit(client: Addr, service: u64, now_s: u64) -> Visit {
    Visit { client, service, timeout: TIMEOUT, now: Now(now_s * 1_000) }
}

fn at(now_s: u64) -> Now {
    Now(now_s * 1_000)
}

/// A visit that takes whatever it is given.
fn stick(table: AffinityTable<'_>, visit: &Visit, choice: u16) -> BackendId {
    table.stick(visit, id(choice), W, |_| true)
}

#[test]
fn a_client_sticks_until_its_time_is_up_and_each_connection_begins_it_anew() {
    let memory = memory(4);
    let table = AffinityTable::new(KEY, &memory);
    assert_eq!(table.lookup(client(1), WEB, at(0)), None);
    assert_eq!(stick(table, &visit(client(1), WEB, 100), 1), id(1));
    assert_eq!(table.lookup(client(1), WEB, at(100)), Some(Sticky { backend: id(1), left_s: 10 }));
    assert_eq!(stick(table, &visit(client(1), WEB, 109), 2), id(1), "still remembered");
    assert_eq!(table.lookup(client(1), WEB, at(118)), Some(Sticky { backend: id(1), left_s: 1 }), "refreshed");
    assert_eq!(table.lookup(client(1), WEB, at(119)), None);
    assert_eq!(stick(table, &visit(client(1), WEB, 119), 2), id(2), "chosen anew");
    assert_eq!(table.len(at(119)), 1);
}

#[test]
fn no_client_is_forgotten_early_for_the_sake_of_whole_seconds() {
    let memory = memory(1);
    let table = AffinityTable::new(KEY, &memory);
    stick(table, &Visit { now: Now(1_999), ..visit(client(1), WEB, 0) }, 1);
    assert!(table.lookup(client(1), WEB, Now(11_998)).is_some());
    assert!(table.lookup(client(1), WEB, Now(12_000)).is_none());
}

#[test]
fn clients_of_both_families_and_services_are_apart() {
    let memory = memory(4);
    let table = AffinityTable::new(KEY, &memory);
    let keys = [(client(1), WEB), (client(2), WEB), (client(1), 8), (addr("fd00::1"), WEB), (addr("fd00::2"), 8)];
    for (port, (client, service)) in (1..).zip(keys) {
        assert_eq!(stick(table, &visit(client, service, 0), port), id(port));
    }
    for (port, (client, service)) in (1..).zip(keys) {
        assert_eq!(table.lookup(client, service, at(1)).unwrap().backend, id(port));
    }
}

#[test]
fn a_backend_that_is_not_usable_is_replaced_at_the_next_connection() {
    let memory = memory(1);
    let table = AffinityTable::new(KEY, &memory);
    stick(table, &visit(client(1), WEB, 0), 1);
    assert_eq!(table.stick(&visit(client(1), WEB, 1), id(2), W, |backend| backend != id(1)), id(2));
    assert_eq!(table.lookup(client(1), WEB, at(1)).unwrap().backend, id(2));
}

#[test]
fn what_an_endpoint_leaves_behind_is_forgotten_and_nothing_else() {
    let memory = memory(16);
    let table = AffinityTable::new(KEY, &memory);
    for n in 0..100 {
        stick(table, &visit(client(n), WEB + u64::from(n % 2), 0), (n % 5) as u16);
    }
    assert_eq!(table.forget(|service, backend| service == WEB && backend == id(2)), 10);
    assert_eq!(table.len(at(0)), 90);
    assert_eq!(table.lookup(client(2), WEB, at(0)), None);
    assert_eq!(table.lookup(client(7), WEB + 1, at(0)).unwrap().backend, id(2));
    assert_eq!(stick(table, &visit(client(2), WEB, 1), 4), id(4));
}

#[test]
fn a_flood_of_newcomers_puts_out_no_client_that_came_back() {
    let memory = memory(64);
    let table = AffinityTable::new(KEY, &memory);
    let residents = 0..300;
    for n in residents.clone() {
        stick(table, &visit(client(n), WEB, 0), 1);
        stick(table, &visit(client(n), WEB, 1), 1);
    }
    for n in 1_000..101_000 {
        assert_eq!(stick(table, &visit(client(n), WEB, 2), 2), id(2), "whoever finds no place has its choice all the same");
    }
    for n in residents {
        assert_eq!(table.lookup(client(n), WEB, at(2)).map(|sticky| sticky.backend), Some(id(1)), "client {n}");
    }
    assert_eq!(table.len(at(2)), table.capacity());
    // When their time is up, everybody's place is free again.
    for n in 0..1_000 {
        stick(table, &visit(client(200_000 + n), WEB, 100), 3);
    }
    assert!(table.len(at(100)) > 800, "{} of 1,000 newcomers have a place", table.len(at(100)));
}

#[test]
fn a_newcomer_takes_the_place_of_who_came_once_and_longest_ago() {
    let memory = memory(1);
    let table = AffinityTable::new(KEY, &memory);
    for n in 0..WAYS as u32 {
        stick(table, &visit(client(n), WEB, u64::from(n) + 1), 1);
    }
    stick(table, &visit(client(0), WEB, 2), 1);
    let newcomer = visit(client(99), WEB, 3);
    stick(table, &newcomer, 2);
    let left: Vec<u32> = (0..WAYS as u32).filter(|n| table.lookup(client(*n), WEB, at(3)).is_none()).collect();
    assert_eq!(left, [1], "client 0 came back, client 1 is the oldest of the others");
}

#[test]
fn half_done_places_of_a_crash_are_free_again_and_all_others_stay() {
    let memory = memory(1);
    let table = AffinityTable::new(KEY, &memory);
    stick(table, &visit(client(1), WEB, 0), 1);
    let (key, bucket) = table.key(client(2), WEB).unwrap();
    for (n, worker) in [(2, WorkerId(5)), (3, WorkerId(6))] {
        let Ok((way, found)) = room(bucket, key, at(0)) else { panic!("there is room") };
        let claimed = found.claimed_by(worker);
        assert!(change(bucket, way, found, claimed, Ordering::Acquire));
        if n == 3 {
            place(bucket, way, claimed, key, Life::new(id(2), &visit(client(2), WEB, 0)));
        }
    }
    assert_eq!(table.lookup(client(2), WEB, at(0)), None, "nobody reads what is not settled");
    let taken = || bucket.ctrl.iter().filter(|ctrl| Ctrl(ctrl.load(Ordering::Relaxed)).state() != State::Free).count();
    assert_eq!(taken(), 3);
    table.abandon(WorkerId(6));
    assert_eq!(taken(), 2);
    table.recover();
    assert_eq!(taken(), 1);
    assert_eq!(table.lookup(client(1), WEB, at(0)).unwrap().backend, id(1));
    assert_eq!(stick(table, &visit(client(2), WEB, 0), 3), id(3));
}

/// One connection, or something that happens between two.
#[derive(Clone, Debug)]
enum Step {
    Visit { client: u32, service: u64, choice: u16, unusable: u16, timeout_s: u64 },
    Wait { ms: u64 },
    Forget { service: u64, backend: u16 },
}

fn step(clients: u32) -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..clients, 0..2u64, 0..4u16, 0..8u16, 1..20u64)
            .prop_map(|(client, service, choice, unusable, timeout_s)| Step::Visit { client, service, choice, unusable, timeout_s }),
        2 => (1..8_000u64).prop_map(|ms| Step::Wait { ms }),
        1 => (0..2u64, 0..4u16).prop_map(|(service, backend)| Step::Forget { service, backend }),
    ]
}

/// A map from client and service to backend, until when, and whether it came back.
type Model = BTreeMap<(u32, u64), (u16, u64, bool)>;

proptest! {
    #[test]
    fn a_table_with_room_for_all_does_what_a_map_does(steps in prop::collection::vec(step(8), 1..200)) {
        // Eight clients of two services: one bucket holds them all, the expired included.
        let memory = memory(1);
        let table = AffinityTable::new(KEY, &memory);
        let (mut model, mut now) = (Model::new(), Now(5_000));
        for step in steps {
            match step {
                Step::Wait { ms } => now.0 += ms,
                Step::Forget { service, backend } => {
                    let before = model.len();
                    model.retain(|(_, of), (known, ..)| *of != service || *known != backend);
                    prop_assert_eq!(table.forget(|of, known| of == service && known == id(backend)), before - model.len());
                }
                Step::Visit { client: n, service, choice, unusable, timeout_s } => {
                    let visit = Visit { client: client(n), service, timeout: Duration::from_secs(timeout_s), now };
                    let got = table.stick(&visit, id(choice), W, |backend| backend != id(unusable));
                    let keeps = model.get(&(n, service)).filter(|(known, until, _)| *until > now.0 / 1_000 && *known != unusable);
                    let backend = keeps.map_or(choice, |(known, ..)| *known);
                    let came_back = keeps.is_some();
                    prop_assert_eq!(got, id(backend));
                    model.insert((n, service), (backend, now.0.div_ceil(1_000) + timeout_s, came_back));
                }
            }
            for n in 0..8 {
                for service in 0..2 {
                    let expected = model.get(&(n, service)).and_then(|(backend, until, _)| {
                        let left_s = until.saturating_sub(now.0 / 1_000);
                        (left_s > 0).then_some(Sticky { backend: id(*backend), left_s })
                    });
                    prop_assert_eq!(table.lookup(client(n), service, now), expected);
                }
            }
        }
    }

    #[test]
    fn a_full_bucket_forgets_but_never_lies_and_never_loses_who_came_back(steps in prop::collection::vec(step(60), 1..400)) {
        let memory = memory(1);
        let table = AffinityTable::new(KEY, &memory);
        let (mut model, mut now) = (Model::new(), Now(5_000));
        for step in steps {
            let Step::Visit { client: n, service, choice, timeout_s, .. } = step else {
                if let Step::Wait { ms } = step {
                    now.0 += ms;
                }
                continue;
            };
            let visit = Visit { client: client(n), service, timeout: Duration::from_secs(timeout_s), now };
            let known = table.lookup(client(n), service, now);
            let got = table.stick(&visit, id(choice), W, |_| true);
            prop_assert_eq!(got, known.map_or(id(choice), |sticky| sticky.backend));
            let backend = (0..4).find(|port| id(*port) == got).unwrap();
            match table.lookup(client(n), service, now) {
                Some(_) => model.insert((n, service), (backend, now.0.div_ceil(1_000) + timeout_s, known.is_some())),
                None => model.remove(&(n, service)),
            };
            let live = model.iter().filter(|(_, (_, until, _))| *until > now.0 / 1_000);
            for ((n, service), (backend, _, came_back)) in live {
                let found = table.lookup(client(*n), *service, now);
                prop_assert!(found.is_some() || !came_back, "client {n} of {service} came back and is lost");
                prop_assert!(found.is_none_or(|sticky| sticky.backend == id(*backend)));
            }
            // What was put out is known to be.
            model.retain(|(n, service), _| table.lookup(client(*n), *service, now).is_some());
        }
    }
}

#[test]
fn workers_that_meet_the_same_clients_at_once_agree_on_each_and_leave_one_entry() {
    const CLIENTS: u32 = 20_000;
    let memory = memory(buckets_for(4 * 100_000));
    let table = AffinityTable::new(KEY, &memory);
    let answers: Vec<Vec<BackendId>> = std::thread::scope(|scope| {
        let workers = (0..4u16).map(|worker| {
            scope.spawn(move || {
                let visits = (0..CLIENTS).map(|n| visit(client(n), WEB, 0));
                visits.map(|visit| table.stick(&visit, id(worker), WorkerId(worker), |_| true)).collect()
            })
        });
        workers.collect::<Vec<_>>().into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    for n in 0..CLIENTS as usize {
        let said: HashSet<BackendId> = answers.iter().map(|of_worker| of_worker[n]).collect();
        assert_eq!(said.len(), 1, "client {n}");
        assert_eq!(table.lookup(client(n as u32), WEB, at(0)).unwrap().backend, answers[0][n]);
    }
    assert_eq!(table.len(at(0)), CLIENTS as usize);
}
