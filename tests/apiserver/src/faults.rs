//! What goes wrong, by chance and by seed.

use std::time::Duration;

/// The faults of a server. All chances are in thousandths; what each is a chance of is said with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Faults {
    /// Decides which faults come when. The same seed, asked the same, answers the same.
    pub seed: u64,
    /// Of a request to be refused with 429, 500 or 503.
    pub refused: u16,
    /// Of a page of a list to break off in the midst.
    pub torn_page: u16,
    /// Of a list's next page to be no longer there (410).
    pub expired_page: u16,
    /// Of a page to hold fewer objects than it could, and more to follow.
    pub short_page: u16,
    /// Of a watch to begin with 410 Gone, or to meet it at an event.
    pub gone: u16,
    /// Of a watch to break off in the midst of an event's line.
    pub cut: u16,
    /// Of a watch to end in good order after an event.
    pub ended: u16,
    /// Of an event to be sent twice.
    pub repeated: u16,
    /// Of a bookmark after an event.
    pub bookmark: u16,
    /// Of a watch to fall silent for ever at an event, with its connection open.
    pub silent: u16,
    /// Of an answer or an event to be held back, for up to [`Faults::slow_max`].
    pub slow: u16,
    /// How long one is held back at most.
    pub slow_max: Duration,
}

impl Faults {
    /// None at all.
    pub fn none(seed: u64) -> Faults {
        Faults {
            seed,
            refused: 0,
            torn_page: 0,
            expired_page: 0,
            short_page: 0,
            gone: 0,
            cut: 0,
            ended: 0,
            repeated: 0,
            bookmark: 0,
            silent: 0,
            slow: 0,
            slow_max: Duration::ZERO,
        }
    }

    /// Something of everything.
    pub fn all(seed: u64) -> Faults {
        Faults {
            seed,
            refused: 60,
            torn_page: 60,
            expired_page: 60,
            short_page: 200,
            gone: 30,
            cut: 60,
            ended: 60,
            repeated: 100,
            bookmark: 100,
            silent: 20,
            slow: 100,
            slow_max: Duration::from_secs(2),
        }
    }
}

/// The faults and their chance: xorshift64 (Marsaglia 2003, p. 4).
pub(crate) struct Dice {
    pub faults: Faults,
    state: u64,
}

impl Dice {
    pub fn new(faults: Faults) -> Dice {
        // Neighbouring seeds are to differ from the first number on.
        Dice { faults, state: faults.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).max(1) }
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % end.max(1)
    }

    /// Whether something with this chance happens now.
    pub fn hit(&mut self, chance: impl FnOnce(&Faults) -> u16) -> bool {
        let chance = chance(&self.faults);
        // A chance of none throws no die, so that a server without faults is the same whatever its seed.
        chance > 0 && self.below(1000) < chance.into()
    }

    /// How long something is held back now.
    pub fn delay(&mut self) -> Duration {
        if !self.hit(|faults| faults.slow) {
            return Duration::ZERO;
        }
        let millis = u64::try_from(self.faults.slow_max.as_millis()).unwrap_or(u64::MAX);
        Duration::from_millis(self.below(millis + 1))
    }
}
