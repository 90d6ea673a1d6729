//! Limiters with literal times; a property over random traffic; several threads at one limiter.

use std::sync::atomic::AtomicU64;

use proptest::prelude::*;

use super::*;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;
const KBIT: u64 = 1_000;
const MBIT: u64 = 1_000 * KBIT;
const GBIT: u64 = 1_000 * MBIT;

fn limiter(bits_per_second: u64, burst_bits: u64) -> Limiter {
    Limiter::new(Rate { bits_per_second: NonZeroU64::new(bits_per_second).unwrap(), burst_bits })
}

/// 1,250 bytes at 10 Mbit/s take a millisecond.
#[test]
fn each_packet_leaves_when_the_one_before_has_and_the_first_at_once() {
    let limiter = limiter(10 * MBIT, 1);
    let start = 5 * SECOND;
    assert_eq!(limiter.depart(1250, start), Ok(start - 100), "a burst of one bit reaches 100 ns back");
    assert_eq!(limiter.depart(1250, start), Ok(start + MS - 100));
    assert_eq!(limiter.depart(2500, start), Ok(start + 2 * MS - 100));
    assert_eq!(limiter.depart(1250, start + MS), Ok(start + 4 * MS - 100), "it is longer");
    assert_eq!(limiter.depart(1250, start + 100 * MS), Ok(start + 100 * MS - 100), "after a pause nothing waits");
}

#[test]
fn after_a_pause_the_burst_and_one_packet_leave_at_once() {
    // 50,000 bits are five packets of 1,250 bytes.
    let limiter = limiter(10 * MBIT, 50_000);
    for start in [SECOND, 60 * SECOND] {
        let at_once = (0..20).filter(|_| limiter.depart(1250, start).unwrap() <= start).count();
        assert_eq!(at_once, 6);
    }
}

#[test]
fn a_burst_of_nothing_is_ten_milliseconds_and_ten_packets_at_least() {
    // Runtimes say one of these where nobody asked for a burst.
    for burst in [0, u32::MAX.into(), u64::from(u32::MAX) * 8 - 1] {
        let at_once = |rate| {
            let limiter = limiter(rate, burst);
            (0..).take_while(|_| limiter.depart(1500, SECOND).unwrap() <= SECOND).count()
        };
        assert_eq!(at_once(MBIT), 11);
        assert_eq!(at_once(GBIT), 834, "10 Mbit are 833.3 packets");
    }
}

#[test]
fn what_would_wait_beyond_the_horizon_is_refused_and_not_counted() {
    let limiter = limiter(10 * MBIT, 1);
    assert_eq!(limiter.horizon_ns(), 100 * MS);
    let start = SECOND;
    let taken = (0..1000).filter(|_| limiter.depart(1250, start).is_ok()).count();
    assert_eq!(taken, 101, "the first at once and one in each of 100 ms");
    assert!(limiter.is_full(start));
    assert_eq!(limiter.depart(1250, start + MS), Ok(start + 101 * MS - 100), "a place is free again, the refused ones took none");
}

#[test]
fn however_slow_the_rate_one_packet_of_any_length_always_fits() {
    for (rate, len) in [(KBIT, 65_535), (1, 65_535), (100 * GBIT, u32::MAX), (KBIT, u32::MAX)] {
        let limiter = limiter(rate, 1);
        let start = 3600 * SECOND;
        assert!(limiter.depart(len, start).unwrap() <= start);
        assert_eq!(limiter.depart(1, start), Err(Exceeded), "{len} bytes at {rate} bit/s are on their way");
    }
    // Ten full packets wait at 1 Mbit/s, a second at the most.
    assert_eq!(limiter(MBIT, 0).horizon_ns(), 120 * MS);
    assert_eq!(limiter(KBIT, 0).horizon_ns(), SECOND);
    assert_eq!(limiter(400 * GBIT, 0).horizon_ns(), 100 * MS);
}

/// Packets as fast as they come, for ten seconds of the limiter's clock.
#[test]
fn the_rate_is_exact_over_ten_seconds_from_1_kbit_to_400_gbit() {
    for (rate, len, step) in [
        (KBIT, 64, 10 * MS),
        (MBIT, 1500, MS),
        (10 * MBIT, 1500, MS / 10),
        (10 * MBIT, 64_000, MS),
        (GBIT, 1500, 5_000),
        (25 * GBIT, 64_000, 10_000),
        (400 * GBIT, 64_000, 1_000),
    ] {
        // From an hour's uptime, and from one at which the ticks are near their end.
        for start in [3600 * SECOND, 8 * 365 * 86_400 * SECOND] {
            let limiter = limiter(rate, 1);
            let (packet, end) = (u64::from(len) * 8, start + 10 * SECOND);
            let (mut bits, mut now) = (0, start);
            while now < end {
                while let Ok(due) = limiter.depart(len, now) {
                    bits += if due < end { packet } else { 0 };
                    if due > now {
                        break;
                    }
                }
                now += step;
            }
            let error = u64::abs_diff(bits, 10 * rate);
            assert!(error <= 10 * rate / 1000 + packet, "{rate} bit/s by {len} bytes: {bits} bits in ten seconds");
        }
    }
}

#[test]
fn small_packets_at_400_gbit_are_counted_to_a_thousandth() {
    let limiter = limiter(400 * GBIT, 1);
    let start = SECOND;
    let first = limiter.depart(64, start).unwrap();
    for _ in 1..10_000 {
        limiter.depart(64, start).unwrap();
    }
    // 64 bytes take 1.28 ns.
    let last = limiter.depart(64, start).unwrap();
    assert!((12_800..=12_813).contains(&(last - first)), "{}", last - first);
}

#[test]
fn a_clock_at_its_end_lets_everything_pass_and_breaks_nothing() {
    let limiter = limiter(KBIT, 0);
    assert_eq!(limiter.depart(1500, 0), Ok(0));
    assert!(limiter.depart(1500, u64::MAX).is_ok());
    assert!(limiter.depart(u32::MAX, u64::MAX).is_ok());
    assert!(!limiter.is_full(u64::MAX));
}

#[test]
fn a_packet_that_passes_two_limiters_leaves_when_the_slower_allows_and_is_counted_by_neither_if_one_refuses() {
    let (slow, fast) = (limiter(10 * MBIT, 1), limiter(100 * MBIT, 1));
    let both = || depart([Some(&fast), Some(&slow)], 12_500, SECOND);
    assert_eq!(both(), Ok(None));
    let wait = both().unwrap().unwrap();
    assert_eq!(wait, Wait { due_ns: SECOND + 10 * MS - 100, limiter: number_of(&slow) });
    assert_ne!(number_of(&slow), number_of(&fast));
    while both().is_ok() {}
    let counted = fast.next.load(Ordering::Relaxed);
    assert_eq!(both(), Err(Exceeded));
    assert_eq!(fast.next.load(Ordering::Relaxed), counted);
    assert_eq!(depart([Some(&fast), None], 1, SECOND), Ok(Some(Wait { due_ns: SECOND + 11 * MS - 10, limiter: number_of(&fast) })));
    assert_eq!(depart([None, None], 1, SECOND), Ok(None));
}

#[test]
fn what_is_due_within_a_millisecond_does_not_wait() {
    let limiter = limiter(10 * MBIT, 1);
    let waits: Vec<bool> = (0..4).map(|_| depart([Some(&limiter), None], 625, SECOND).unwrap().is_some()).collect();
    assert_eq!(waits, [false, false, false, true], "at 0, 0.5, 1 and 1.5 ms");
}

/// The sum of what departs in any window, burst and packet aside, is within the rate.
fn check_windows(rate: u64, burst_bits: u64, departures: &[(u64, u32)]) {
    let mut departures = departures.to_vec();
    departures.sort_unstable();
    let longest = departures.iter().map(|(_, bytes)| u64::from(*bytes) * 8).max().unwrap_or(0);
    for (at, (from, _)) in departures.iter().enumerate() {
        let mut bits = 0;
        for (to, bytes) in &departures[at..] {
            bits += u64::from(*bytes) * 8;
            let allowed = u128::from(rate) * u128::from(to - from + 1) / u128::from(SECOND) + u128::from(burst_bits + longest);
            assert!(u128::from(bits) <= allowed, "{bits} bits in {} ns at {rate} bit/s with a burst of {burst_bits}", to - from);
        }
    }
}

proptest! {
    #[test]
    fn no_window_holds_more_than_the_rate_the_burst_and_one_packet(
        rate in prop_oneof![KBIT..MBIT, MBIT..GBIT, GBIT..400 * GBIT],
        burst in 1u64..10_000_000,
        packets in proptest::collection::vec((0u64..20 * MS, 20u32..65_536), 1..200),
    ) {
        let limiter = limiter(rate, burst);
        let mut now = SECOND;
        let mut departures = Vec::new();
        let mut last = 0;
        for (gap, bytes) in packets {
            now += gap;
            if let Ok(due) = limiter.depart(bytes, now) {
                prop_assert!(due >= last, "order is kept");
                prop_assert!(due <= now + limiter.horizon_ns() + 1);
                last = due;
                departures.push((due.max(now), bytes));
            }
        }
        check_windows(rate, burst, &departures);
    }

    /// A sender that keeps to the rate, packet by packet, never waits and loses nothing.
    #[test]
    fn a_sender_below_its_rate_never_waits(rate in 10 * KBIT..GBIT, bytes in 20u32..1500, count in 1u64..500) {
        let limiter = limiter(rate, 1);
        let gap = (u64::from(bytes) * 8 * SECOND).div_ceil(rate) + 1;
        for n in 0..count {
            let now = SECOND + n * gap;
            prop_assert!(limiter.depart(bytes, now).unwrap() <= now);
        }
    }
}

/// Four threads, each with a clock of its own that is a little behind or before the others', as workers' batches are.
#[test]
fn threads_that_share_a_limiter_do_not_exceed_it_together() {
    const THREADS: u64 = 4;
    const PER_THREAD: u64 = 20_000;
    let (rate, burst) = (GBIT, 120_000);
    let limiter = limiter(rate, burst);
    let clock = AtomicU64::new(SECOND);
    let mut departures: Vec<(u64, u32)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (limiter, clock) = (&limiter, &clock);
                scope.spawn(move || {
                    let mut sent = Vec::new();
                    for n in 0..PER_THREAD {
                        // Together they offer about twice the rate.
                        let now = clock.fetch_add(1_500, Ordering::Relaxed);
                        let bytes = 64 + ((n * 7 + thread * 131) % 1400) as u32 / 2;
                        if let Ok(due) = limiter.depart(bytes, now) {
                            sent.push((due, bytes));
                        }
                    }
                    sent
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    departures.sort_unstable();
    let refused = THREADS * PER_THREAD - departures.len() as u64;
    assert!(refused > 0 || departures.last().unwrap().0 > clock.load(Ordering::Relaxed), "it was offered more than it lets through");
    // No two were given the same stretch of the link: each begins where the one before has ended.
    for pair in departures.windows(2) {
        let takes = u64::from(pair[0].1) * 8;
        assert!(pair[1].0 + 1 >= pair[0].0 + takes, "{pair:?}");
    }
}
