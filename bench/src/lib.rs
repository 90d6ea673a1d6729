//! Podgate's benchmarks.
//!
//! Two layers: criterion benches of each stage and of the whole pipeline in memory (`benches/`), and `podgate-bench e2e`, which sends real
//! traffic through real devices beside what else could carry it. `podgate-bench attach` times attachments beside reference plugins,
//! `podgate-bench limits` holds bandwidth limits against what arrives. Results and how they were made are in `RESULTS.md`.

pub mod attach;
pub mod cpu_time;
pub mod e2e;
pub mod limits;
pub mod world;
