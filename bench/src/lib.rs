//! Podgate's benchmarks.
//!
//! Two layers: criterion benches of each stage and of the whole pipeline in memory (`benches/`), and `podgate-bench e2e`, which sends real
//! traffic through real devices beside what else could carry it. `podgate-bench attach` times attachments beside reference plugins,
//! `podgate-bench limits` holds bandwidth limits against what arrives. Results and how they were made are in `RESULTS.md`.

pub mod attach;
pub mod cpu_time;
pub mod e2e;
pub mod limits;
pub mod programming;
pub mod world;

use std::process::ExitCode;

use podgate::lab::Sandbox;
use podgate::lab::sandbox::{self, Entered};

/// Runs `work` in a sandbox that leaves nothing behind, and says what failed. Must be called while the process has one thread only.
pub(crate) fn in_a_sandbox(work: impl FnOnce(&Sandbox) -> anyhow::Result<()>) -> ExitCode {
    let sandbox = match sandbox::enter() {
        Ok(Entered::Inside(sandbox)) => sandbox,
        Ok(Entered::Outside(code)) => return code,
        Err(error) => {
            eprintln!("podgate-bench: {error}");
            return ExitCode::FAILURE;
        }
    };
    match work(&sandbox) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("podgate-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
