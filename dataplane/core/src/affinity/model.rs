//! The table under loom, as `flow/model.rs` has the flow table; buckets have two places here.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p podgate-core --lib affinity::model`

use loom::sync::Arc;
use loom::thread;

use super::*;

const WEB: u64 = 7;

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.max_branches = 10_000;
    builder.max_duration = Some(std::time::Duration::from_secs(20));
    builder.check(model);
}

fn visit(now: Now) -> Visit {
    Visit { client: Addr(1), service: WEB, timeout: Duration::from_secs(10), now }
}

fn id(port: u16) -> BackendId {
    BackendId::new(Addr(2), port)
}

/// Two workers meet one client at once, each with a choice of its own.
fn agree(before: impl Fn(AffinityTable<'_>) + Sync + Send + 'static, meanwhile: impl Fn(AffinityTable<'_>) + Clone + Sync + Send + 'static) {
    check(move || {
        let memory = Arc::new([Bucket::default()]);
        before(AffinityTable::new([1, 2], &*memory));
        let workers = [1, 2].map(|worker: u16| {
            let (memory, meanwhile) = (memory.clone(), meanwhile.clone());
            thread::spawn(move || {
                let table = AffinityTable::new([1, 2], &*memory);
                if worker == 1 {
                    meanwhile(table);
                }
                table.stick(&visit(Now(20_000)), id(worker), WorkerId(worker), |backend| backend != id(9))
            })
        });
        let said = workers.map(|worker| worker.join().unwrap());
        let table = AffinityTable::new([1, 2], &*memory);
        let sticky = table.lookup(Addr(1), WEB, Now(20_000)).expect("the client is remembered");
        assert_eq!(said, [sticky.backend; 2]);
        assert_eq!(table.len(Now(20_000)), 1);
    });
}

#[test]
fn two_workers_that_meet_a_new_client_agree() {
    agree(|_| {}, |_| {});
}

#[test]
fn two_workers_agree_while_a_lower_place_comes_free() {
    let other = Visit { client: Addr(5), ..visit(Now(20_000)) };
    let before = move |table: AffinityTable<'_>| {
        table.stick(&other, id(8), WorkerId(0), |_| true);
    };
    let meanwhile = |table: AffinityTable<'_>| {
        table.forget(|_, backend| backend == id(8));
    };
    agree(before, meanwhile);
}

#[test]
fn two_workers_agree_on_a_client_whose_time_is_up() {
    let before = |table: AffinityTable<'_>| {
        table.stick(&visit(Now(0)), id(8), WorkerId(0), |_| true);
    };
    agree(before, |_| {});
}

#[test]
fn two_workers_agree_on_a_client_whose_backend_left() {
    let before = |table: AffinityTable<'_>| {
        table.stick(&visit(Now(20_000)), id(9), WorkerId(0), |_| true);
    };
    agree(before, |_| {});
}
