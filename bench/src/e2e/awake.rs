//! Processors that never sleep, as with the kernel's parameter `idle=poll`: on each runs a program of the idle class, which gives way to any other
//! at once (sched(7), `SCHED_IDLE`).
//!
//! On a virtual machine a processor that sleeps has to be woken by the host, which may take many times what a packet costs; a row in which
//! packets come one at a time then measures the host.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::Context;

/// The programs, which end with this value.
#[derive(Debug)]
pub struct Awake(());

static PROGRAMS: Mutex<Vec<Child>> = Mutex::new(Vec::new());

fn programs() -> std::sync::MutexGuard<'static, Vec<Child>> {
    PROGRAMS.lock().expect("nobody panics with it")
}

impl Awake {
    /// One for each of `cpus`.
    pub fn keep(cpus: &[usize]) -> anyhow::Result<Awake> {
        let awake = Awake(());
        for cpu in cpus {
            let mut program = Command::new("chrt");
            program.args(["--idle", "0", "taskset", "--cpu-list", &cpu.to_string(), "sh", "-c", "while :; do :; done"]);
            let child = program.stdin(Stdio::null()).spawn().context("cannot start chrt, which keeps a processor awake (Debian: util-linux)")?;
            programs().push(child);
        }
        Ok(awake)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        for mut program in programs().drain(..) {
            // It has no end of its own, so there is one to be killed.
            let _ = program.kill();
            let _ = program.wait();
        }
    }
}

/// What they have spent so far, which nobody's packets have cost.
pub fn spent() -> Duration {
    programs().iter().map(|program| cpu_time_of(program.id()).unwrap_or_default()).sum()
}

/// User and system time of a process (proc(5), fields 14 and 15 of `stat`).
fn cpu_time_of(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, behind_the_name) = stat.rsplit_once(") ")?;
    let ticks: u64 = behind_the_name.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    // USER_HZ, which is 100 on every architecture of today.
    Some(Duration::from_millis(ticks * 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_is_kept_awake_until_the_end_and_its_time_is_known() {
        let awake = Awake::keep(&[0]).unwrap();
        let pid = programs()[0].id();
        while spent() < Duration::from_millis(50) {
            std::thread::yield_now();
        }
        drop(awake);
        assert_eq!(spent(), Duration::ZERO);
        assert!(cpu_time_of(pid).is_none(), "it has ended");
    }
}
