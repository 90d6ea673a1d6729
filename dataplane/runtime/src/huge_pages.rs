//! The thread that puts the flow table on huge pages once the workers run.
//!
//! Not before, since packets wait at a start and a table of a million flows takes a fifth of a second of a processor. While one huge page is filled,
//! a packet whose flow lies there waits: some two milliseconds, and longer if the thread that fills it waits for a processor itself.
//! So it has the priority of any other thread, and rests between two pages. At worst, with a thread on the same processor that looks up flows all the
//! while, 232 pages took 13 ms each; one of them made a lookup wait for it, for 6 ms, and the processor itself was away for up to 30.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::flow_file::FlowFile;

/// How much longer it rests than it worked: it takes a tenth of one processor at most.
const REST: u32 = 9;

/// How long before it tries again what the kernel refused for want of memory, or because somebody else used the page.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// How often it tries what was refused. Memory that is in pieces for so long stays so.
const TRIES: usize = 3;

/// Puts all of `flows` on huge pages, as far as the kernel does. Unpark the thread when `stop` is set.
pub(crate) fn run(flows: &FlowFile, stop: &AtomicBool) {
    let mut left: Vec<usize> = (0..flows.huge_pages().room).collect();
    for attempt in 0..TRIES {
        if attempt > 0 && !left.is_empty() {
            rest(TRY_AGAIN, stop);
        }
        let mut refused = Vec::new();
        for n in std::mem::take(&mut left) {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let started = Instant::now();
            match flows.collapse(n) {
                Ok(()) => {}
                Err(error) if is_for_good(&error) => return,
                Err(_) => refused.push(n),
            }
            rest(started.elapsed() * REST, stop);
        }
        left = refused;
    }
}

/// Whether the kernel does not do this at all: it is older, or the file is not on a tmpfs.
fn is_for_good(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EPERM))
}

fn rest(time: Duration, stop: &AtomicBool) {
    let until = Instant::now() + time;
    while !stop.load(Ordering::Relaxed) {
        match until.checked_duration_since(Instant::now()) {
            Some(left) => thread::park_timeout(left),
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// On a tmpfs, which has a name for as long as it takes to open it.
    fn table(test: &str) -> FlowFile {
        let path = format!("/dev/shm/podgate-huge-{}-{test}", std::process::id());
        let (flows, _) = FlowFile::open(&path, 60_000).unwrap();
        fs::remove_file(path).unwrap();
        flows
    }

    #[test]
    fn a_whole_table_becomes_huge_pages() {
        let flows = table("whole");
        if let Err(error) = flows.collapse(0) {
            return eprintln!("skipped: {error}");
        }
        let flows = table("whole");
        run(&flows, &AtomicBool::new(false));
        assert_eq!(flows.huge_pages().used, flows.huge_pages().room);
    }

    #[test]
    fn a_stop_ends_the_rest_between_two_pages() {
        let (flows, stop) = (table("stop"), AtomicBool::new(false));
        let started = Instant::now();
        thread::scope(|scope| {
            let resting = scope.spawn(|| rest(Duration::from_secs(3_600), &stop));
            stop.store(true, Ordering::Relaxed);
            resting.thread().unpark();
        });
        run(&flows, &stop);
        assert_eq!(flows.huge_pages().used, 0);
        assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    }
}
