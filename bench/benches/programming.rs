//! From objects to tables: a whole cluster, and one endpoint's change. `cargo bench -p podgate-bench --bench programming`

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use podgate_bench::programming::Programming;

criterion_group!(name = benches; config = Criterion::default().sample_size(10); targets = cold, change);
criterion_main!(benches);

const SERVICES: [u32; 3] = [10, 1_000, 10_000];

fn cold(c: &mut Criterion) {
    let mut group = c.benchmark_group("compiled from nothing");
    for services in SERVICES {
        let programming = Programming::new(services);
        group.bench_function(format!("{services} services of 25 endpoints"), |b| b.iter(|| black_box(programming.cold())));
    }
}

/// What must not grow with the total: from the event's bytes to the snapshot, and to the pin of the last of two workers.
fn change(c: &mut Criterion) {
    let mut group = c.benchmark_group("one endpoint changed");
    for services in SERVICES {
        let programming = Programming::new(services);
        let before = programming.cold();
        let event = programming.event(services / 2, 1);
        group.bench_function(format!("{services} services, to the snapshot"), |b| {
            b.iter(|| black_box(programming.apply(&before, &event).expect("an event that is right")))
        });
        group.bench_function(format!("{services} services, to the last worker's pin"), |b| {
            b.iter_custom(|iterations| {
                let times = programming.changes_to_pins(2, u32::try_from(iterations).expect("few changes"), None).expect("events that are right");
                Duration::from_secs_f64(times.iter().sum::<f64>() / 1e3)
            })
        });
    }
}
