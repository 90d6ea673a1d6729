//! Cache lines before they are needed: a batch's lookups wait for memory together, not one after the other.

use super::sync::{AtomicU64, Ordering};

/// Brings the cache line of a word nearer, for whoever needs it soon. A processor has an instruction for that which waits for nothing, and the
/// language none that is safe: [`Touch`] does without it. A type, so that it is no call.
pub trait Fetch {
    /// Brings it nearer.
    fn fetch(word: &AtomicU64);
}

/// Reads the word. Where several reads stand together, their waits overlap.
#[derive(Debug)]
pub enum Touch {}

impl Fetch for Touch {
    #[inline]
    fn fetch(word: &AtomicU64) {
        // The value does not matter, so Relaxed; `black_box` keeps the load.
        std::hint::black_box(word.load(Ordering::Relaxed));
    }
}
