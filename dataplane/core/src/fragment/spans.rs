//! Which bytes of a datagram were seen.

/// How many separate stretches a datagram may have at once. A datagram of 64 KiB in fragments of 1,280 bytes has 53, so that even if
/// every other one comes first they are 27.
const SPANS_MAX: usize = 28;

/// The stretches of a datagram's payload that were seen: sorted, disjoint, not touching.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spans {
    spans: [(u16, u16); SPANS_MAX],
    count: u8,
    /// Where the datagram ends, once its last fragment was seen.
    end: Option<u16>,
}

/// What a fragment is to those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// All of it is new.
    New,
    /// All of it was seen before.
    Duplicate,
    /// It overlaps others in part, or contradicts where the datagram ends.
    Conflict,
    /// It fits, but there is no room to note it.
    Full,
}

impl Spans {
    pub(super) const EMPTY: Spans = Spans { spans: [(0, 0); SPANS_MAX], count: 0, end: None };

    /// Notes the bytes from `start` to before `end`, which are the datagram's last unless `more` follow.
    pub(super) fn note(&mut self, start: u16, end: u16, more: bool) -> Fit {
        let seen = &self.spans[..usize::from(self.count)];
        // As inet_frag_queue_insert: what lies within one stretch was seen, whatever fragments it was made of.
        if seen.iter().any(|&(from, to)| from <= start && end <= to) {
            return Fit::Duplicate;
        }
        let beyond_end = self.end.is_some_and(|last| end > last || (!more && end != last));
        let before_seen = !more && seen.last().is_some_and(|&(_, to)| to > end);
        if beyond_end || before_seen || seen.iter().any(|&(from, to)| start < to && from < end) {
            return Fit::Conflict;
        }
        let at = seen.partition_point(|&(from, _)| from < start);
        let joins_left = at > 0 && self.spans[at - 1].1 == start;
        let joins_right = at < seen.len() && self.spans[at].0 == end;
        let count = seen.len();
        match (joins_left, joins_right) {
            (true, true) => {
                self.spans[at - 1].1 = self.spans[at].1;
                self.spans.copy_within(at + 1..count, at);
                self.count -= 1;
            }
            (true, false) => self.spans[at - 1].1 = end,
            (false, true) => self.spans[at].0 = start,
            (false, false) if count == SPANS_MAX => return Fit::Full,
            (false, false) => {
                self.spans.copy_within(at..count, at + 1);
                self.spans[at] = (start, end);
                self.count += 1;
            }
        }
        if !more {
            self.end = Some(end);
        }
        Fit::New
    }

    /// Whether every byte was seen.
    pub(super) fn complete(&self) -> bool {
        self.count == 1 && self.end.is_some_and(|end| self.spans[0] == (0, end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fragments_in_any_order_complete_the_datagram() {
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2]] {
            let mut spans = Spans::EMPTY;
            for (nth, piece) in order.into_iter().enumerate() {
                assert!(!spans.complete());
                assert_eq!(spans.note(piece * 8, piece * 8 + 8, piece < 3), Fit::New, "{order:?} {nth}");
            }
            assert!(spans.complete());
        }
    }

    #[test]
    fn overlaps_and_contradicting_ends_are_conflicts_and_repetitions_are_not() {
        let mut spans = Spans::EMPTY;
        assert_eq!(spans.note(0, 16, true), Fit::New);
        assert_eq!(spans.note(16, 32, true), Fit::New);
        assert_eq!(spans.note(16, 32, true), Fit::Duplicate);
        assert_eq!(spans.note(8, 24, true), Fit::Duplicate);
        assert_eq!(spans.note(24, 40, true), Fit::Conflict);
        assert_eq!(spans.note(8, 28, false), Fit::Duplicate);
        assert_eq!(spans.note(40, 48, false), Fit::New);
        assert_eq!(spans.note(48, 56, true), Fit::Conflict, "beyond the end");
        assert_eq!(spans.note(32, 36, false), Fit::Conflict, "another end");
        assert!(!spans.complete());
        assert_eq!(spans.note(32, 40, true), Fit::New);
        assert!(spans.complete());
    }

    #[test]
    fn too_many_separate_stretches_are_refused() {
        let mut spans = Spans::EMPTY;
        for piece in 0..SPANS_MAX as u16 {
            assert_eq!(spans.note(piece * 16, piece * 16 + 8, true), Fit::New);
        }
        assert_eq!(spans.note(60_000, 60_008, true), Fit::Full);
        assert_eq!(spans.note(8, 16, true), Fit::New, "what joins others still fits");
    }
}
