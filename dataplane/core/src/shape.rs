//! A pod's bandwidth limits: when a packet may leave.
//!
//! By earliest departure time, as Linux's `fq` paces (`net/sched/sch_fq.c`, `skb->tstamp`) and Cilium's bandwidth manager limits pods: a
//! [`Limiter`] gives each packet the time at which it may go, and whoever sends keeps it until then. Nothing is lost below the limit, and
//! above it packets wait in a queue of bounded time, which a TCP sender sees as a longer round trip. A policer, which drops whatever
//! exceeds the rate, would break TCP where round trips are tens of microseconds: its window collapses at every burst.
//!
//! A superframe is one packet: it counts as all its segments on a wire, and leaves as a whole when its first segment may. At low rates that
//! is a burst of up to 64 KiB, behind which everything waits the longer.
//!
//! The state of a limiter is one atomic, the time at which its link is free again; workers that share a limiter advance it by
//! compare-and-swap, so what they send together is exact. Read first: the `bandwidth` plugin of containernetworking/plugins, whose `tbf`
//! (tc-tbf(8)) this takes the place of.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};

/// How much before its time a packet may leave, in nanoseconds: what is due within a millisecond goes together, so that a worker wakes at
/// most a thousand times a second for its waiting packets, and a sender that keeps to its rate does not wait at all. Over any window this
/// adds one millisecond's worth of the rate to the burst, and nothing to the rate.
pub const GRAIN_NS: u64 = 1_000_000;

/// How long a packet may wait before it is refused, in nanoseconds, at least. The reference plugin gives its `tbf` 25 ms
/// (`latencyInMillis`) and the burst, which runtimes make gigabytes of. A TCP sender begins with the 64 KiB that its receiver offers, in
/// superframes: with room for 50 ms a stream of ten seconds lost up to 6 % of 10 Mbit/s to the timer that a lost first window waits for
/// (Reno and BBR), with 100 ms it is within 1 % and 4 %.
const HORIZON_MIN_NS: u64 = 100_000_000;

/// How long it may wait at most, in nanoseconds, where [`QUEUE_BITS_MIN`] take longer than the least: after a second a TCP sender has sent
/// it again (RFC 6298 §2).
const HORIZON_MAX_NS: u64 = 1_000_000_000;

/// What may wait in any case, in bits, as long as that is not for longer than [`HORIZON_MAX_NS`]: ten full packets, TCP's initial window
/// (RFC 6928). With room for two or three, a sender would lose the tail of every window and wait for its timer.
const QUEUE_BITS_MIN: u64 = 10 * 1_500 * 8;

/// The burst where none is given, in bits, at least: ten full packets.
const BURST_BITS_MIN: u64 = 10 * 1_500 * 8;

/// The burst where none is given, as a part of what the rate is per second: a hundredth, 10 ms.
const BURST_PART: u64 = 100;

/// Limiters count time in these parts of a nanosecond: a packet of 64 bytes takes 1.28 ns at 400 Gbit/s, and is to be counted to a
/// thousandth. 64 bits of them last nine years of uptime; behind that, limits no longer hold.
const TICKS_PER_NS: u64 = 64;

/// What a limit is configured as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bits per second of IP packets, headers included, as on a wire. 1 kbit/s to 400 Gbit/s make sense.
    pub bits_per_second: NonZeroU64,
    /// Bits that may leave at once after a pause, beside the packet that is being sent. 0, or [`BURST_BITS_UNSET`] and more: 10 ms of the
    /// rate, and 120,000 (ten full packets) at least.
    pub burst_bits: u64,
}

/// From here on a burst is as good as not given, in bits: container runtimes write `math.MaxUint32` (containerd) or eight times that
/// (CRI-O) where a pod's annotations name a rate alone. Taken at its word it would leave 10 Mbit/s unlimited for seven minutes.
pub const BURST_BITS_UNSET: u64 = u32::MAX as u64;

impl Rate {
    /// The burst that holds, in bits.
    pub fn burst(&self) -> u64 {
        match self.burst_bits {
            0 | BURST_BITS_UNSET.. => BURST_BITS_MIN.max(self.bits_per_second.get() / BURST_PART),
            bits => bits,
        }
    }
}

/// One direction's limit and its state, which workers share.
#[derive(Debug)]
// The atomic of one direction is not written to beside that of the other.
#[repr(align(64))]
pub struct Limiter {
    /// When all that was let through has left, in ticks. Relaxed throughout: it stands for itself, and no other memory depends on it.
    next: AtomicU64,
    bits_per_second: NonZeroU64,
    /// What the burst takes at the rate, in ticks.
    burst: u64,
    /// How far ahead a departure may lie, in ticks.
    horizon: u64,
    rate: Rate,
}

/// A packet cannot be sent within the time that one may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded;

impl Limiter {
    /// A limiter through which nothing has gone yet.
    pub fn new(rate: Rate) -> Limiter {
        let bits_per_second = rate.bits_per_second;
        let horizon_min = HORIZON_MIN_NS * TICKS_PER_NS;
        let horizon = ticks(QUEUE_BITS_MIN, bits_per_second).clamp(horizon_min, HORIZON_MAX_NS * TICKS_PER_NS);
        Limiter { next: AtomicU64::new(0), bits_per_second, burst: ticks(rate.burst(), bits_per_second), horizon, rate }
    }

    /// What it was made from.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// The longest that a packet waits, in nanoseconds.
    pub fn horizon_ns(&self) -> u64 {
        self.horizon / TICKS_PER_NS
    }

    /// Whether a packet at `now_ns` would be refused. Another worker may change that at any moment.
    #[inline]
    pub fn is_full(&self, now_ns: u64) -> bool {
        let now = now_ns.saturating_mul(TICKS_PER_NS);
        self.next.load(Ordering::Relaxed) > now.saturating_add(self.horizon)
    }

    /// Lets a packet of `bytes` bytes through, and says when it may leave, in nanoseconds of the clock that `now_ns` is read from: not
    /// after `now_ns` if it may at once. Refused, it is not counted. A packet of any length is let through whose turn comes within the
    /// horizon. Later calls get later times as long as `now_ns` does not go back.
    #[inline]
    pub fn depart(&self, bytes: u32, now_ns: u64) -> Result<u64, Exceeded> {
        let now = now_ns.saturating_mul(TICKS_PER_NS);
        let takes = ticks(u64::from(bytes) * 8, self.bits_per_second);
        // What was not used for longer than the burst takes is lost.
        let oldest = now.saturating_sub(self.burst);
        let mut next = self.next.load(Ordering::Relaxed);
        loop {
            let start = next.max(oldest);
            if start > now.saturating_add(self.horizon) {
                return Err(Exceeded);
            }
            match self.next.compare_exchange_weak(next, start.saturating_add(takes), Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(start.div_ceil(TICKS_PER_NS)),
                Err(other) => next = other,
            }
        }
    }
}

/// How long `bits` take, in ticks, rounded up: the rate is never exceeded.
fn ticks(bits: u64, bits_per_second: NonZeroU64) -> u64 {
    const TICKS_PER_SECOND: u128 = 1_000_000_000 * TICKS_PER_NS as u128;
    (u128::from(bits) * TICKS_PER_SECOND).div_ceil(u128::from(bits_per_second.get())).try_into().unwrap_or(u64::MAX)
}

/// A pod's limits. All its addresses share them, and all snapshots while its attachment lasts: a new one would start with its whole
/// burst.
#[derive(Debug)]
pub struct Limits {
    /// Of what the pod receives.
    pub ingress: Option<Limiter>,
    /// Of what the pod sends.
    pub egress: Option<Limiter>,
}

impl Limits {
    /// Limits of either direction, as a CNI plugin is told them (the capability `bandwidth`).
    pub fn new(ingress: Option<Rate>, egress: Option<Rate>) -> Limits {
        Limits { ingress: ingress.map(Limiter::new), egress: egress.map(Limiter::new) }
    }
}

/// A packet that is to leave later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// When it is due, in nanoseconds of the clock that the pipeline was given; [`GRAIN_NS`] before that will do.
    pub due_ns: u64,
    /// Whose limit it waits for: the same number for all that wait for one limiter, and hardly ever for those of two.
    pub limiter: u32,
}

/// Lets a packet of `bytes` bytes pass two limiters, those of its sender and of its receiver: it leaves when both allow it. `None`: at
/// once. If either is full neither counts it, unless another worker filled the second in this moment.
pub fn depart(limiters: [Option<&Limiter>; 2], bytes: u32, now_ns: u64) -> Result<Option<Wait>, Exceeded> {
    if limiters.iter().flatten().any(|limiter| limiter.is_full(now_ns)) {
        return Err(Exceeded);
    }
    let mut wait: Option<Wait> = None;
    for limiter in limiters.into_iter().flatten() {
        let due_ns = limiter.depart(bytes, now_ns)?;
        if due_ns > now_ns.saturating_add(GRAIN_NS) && wait.is_none_or(|other| other.due_ns < due_ns) {
            wait = Some(Wait { due_ns, limiter: number_of(limiter) });
        }
    }
    Ok(wait)
}

/// Where it lies in memory, mixed (Fibonacci hashing, Knuth vol. 3 §6.4).
fn number_of(limiter: &Limiter) -> u32 {
    let address = std::ptr::from_ref(limiter) as u64;
    (address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
}

#[cfg(test)]
mod tests;
