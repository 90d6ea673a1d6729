//! Podgate's benchmarks.
//!
//! Two layers: criterion benches of each stage and of the whole pipeline in memory (`benches/`), and `podgate-bench e2e`, which sends real
//! traffic through real devices beside what else could carry it. Results and how they were made are in `RESULTS.md`.

pub mod cpu_time;
pub mod e2e;
pub mod limits;
pub mod world;
