//! What a packet does to the stage of its flow.
//!
//! The kernel's `nf_conntrack_proto_tcp.c` tells ten states apart and checks windows. Of that a gateway needs the lifetime, and whether the
//! handshake was completed (so that half-open flows can be evicted first). Where we differ from its table:
//!
//! - SYN_SENT and SYN_RECV are one stage, `Opening`: it ends when the reply direction has acknowledged something and the original direction
//!   then acknowledges. A connection met in the middle (`nf_conntrack_tcp_loose`) gets there with its first two segments.
//! - FIN_WAIT, CLOSE_WAIT, LAST_ACK and TIME_WAIT are one stage, `Closing`, with one lifetime. Traffic still refreshes it, so a half-closed
//!   connection that goes on sending lives on.
//! - Sequence numbers are not checked. A forged RST therefore shortens a flow's lifetime to that of `Reset` between packets, and no more:
//!   the flow still translates, and its endpoints ignore the RST (RFC 5961 §3).
//!
//! Stages only ever advance. A fresh SYN after the end ([`opens_anew`]) is a new flow in a new record.

use super::{Direction, Kind, Stage};

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// What a flow has lived through: one word of its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Life {
    /// Its stage.
    pub stage: Stage,
    /// Bits of `Life`.
    pub seen: u8,
}

impl Life {
    /// The life of a flow that was just created. Where replies pass another node, what they would show here is taken as shown: the opener's
    /// second packet establishes, and its FIN is as good as both.
    pub const fn of(kind: Kind) -> Life {
        let seen = match kind {
            Kind::DirectReturn => Life::ANSWERED | Life::FIN_REPLY,
            Kind::Service | Kind::Masquerade | Kind::OutsideToPod | Kind::Relayed => 0,
        };
        Life { stage: Stage::Opening, seen }
    }

    /// The reply direction acknowledged something.
    const ANSWERED: u8 = 1;
    /// A FIN from the opener.
    const FIN_ORIGINAL: u8 = 2;
    /// A FIN to the opener.
    const FIN_REPLY: u8 = 4;

    /// The life after a packet in `direction`, which has these TCP flags (`None`: it is no TCP segment with a header).
    #[inline(always)]
    pub fn after(mut self, direction: Direction, tcp_flags: Option<u8>) -> Life {
        let Some(flags) = tcp_flags else {
            if self.stage == Stage::Opening && (direction == Direction::Reply || self.seen & Life::ANSWERED != 0) {
                self.stage = Stage::Established;
            }
            return self;
        };
        if flags & RST != 0 {
            self.stage = Stage::Reset;
        }
        if self.stage == Stage::Reset {
            return self;
        }
        if self.stage == Stage::Opening && flags & ACK != 0 {
            match direction {
                Direction::Reply => self.seen |= Life::ANSWERED,
                Direction::Original if self.seen & Life::ANSWERED != 0 => self.stage = Stage::Established,
                Direction::Original => {}
            }
        }
        // A FIN during the handshake changes nothing (sIV in the kernel's table for SYN_SENT): it must not buy a half-open flow a longer life.
        if flags & (FIN | SYN) == FIN && self.stage != Stage::Opening {
            self.stage = Stage::Closing;
            self.seen |= match direction {
                Direction::Original => Life::FIN_ORIGINAL,
                Direction::Reply => Life::FIN_REPLY,
            };
        }
        self
    }

    /// Whether a segment of the opener with these flags opens a new connection on this flow's tuple: a SYN alone, after a reset or after
    /// both FINs (CLOSE and TIME_WAIT to sSS in the kernel's table). On a connection that one side still uses it may be forged, and
    /// the endpoint answers it (RFC 5961 §4); while the handshake lasts it is a retransmission.
    pub fn opens_anew(self, direction: Direction, tcp_flags: u8) -> bool {
        let over = Life::FIN_ORIGINAL | Life::FIN_REPLY;
        direction == Direction::Original
            && tcp_flags & (SYN | ACK | RST | FIN) == SYN
            && (self.stage == Stage::Reset || self.stage == Stage::Closing && self.seen & over == over)
    }
}

#[cfg(test)]
mod tests {
    use super::Direction::{Original, Reply};
    use super::*;

    fn run(segments: &[(Direction, u8)]) -> Life {
        segments.iter().fold(Life::of(Kind::Service), |life, (direction, flags)| life.after(*direction, Some(*flags)))
    }

    const HANDSHAKE: [(Direction, u8); 3] = [(Original, SYN), (Reply, SYN | ACK), (Original, ACK)];

    #[test]
    fn a_handshake_establishes_with_its_third_segment() {
        assert_eq!(run(&HANDSHAKE[..2]).stage, Stage::Opening);
        assert_eq!(run(&HANDSHAKE).stage, Stage::Established);
    }

    #[test]
    fn the_opener_alone_never_establishes() {
        assert_eq!(run(&[(Original, SYN), (Original, ACK), (Original, ACK), (Original, FIN | ACK)]).stage, Stage::Opening);
    }

    #[test]
    fn a_connection_met_in_the_middle_establishes_when_both_have_spoken() {
        assert_eq!(run(&[(Reply, ACK), (Original, ACK)]).stage, Stage::Established);
    }

    #[test]
    fn a_fin_from_either_side_closes() {
        for direction in [Original, Reply] {
            let mut segments = HANDSHAKE.to_vec();
            segments.push((direction, FIN | ACK));
            assert_eq!(run(&segments).stage, Stage::Closing);
            segments.push((Original, ACK));
            assert_eq!(run(&segments).stage, Stage::Closing, "and traffic does not open it again");
        }
    }

    #[test]
    fn a_reset_wins_over_everything_and_stays() {
        for n in 0..=3 {
            let mut segments = HANDSHAKE[..n].to_vec();
            segments.push((Reply, RST | ACK));
            segments.push((Original, FIN | ACK));
            assert_eq!(run(&segments).stage, Stage::Reset);
        }
    }

    #[test]
    fn a_syn_opens_anew_after_both_fins_or_a_reset_but_not_before() {
        let mut segments = HANDSHAKE.to_vec();
        assert!(!run(&segments[..1]).opens_anew(Original, SYN), "a retransmission");
        assert!(!run(&segments).opens_anew(Original, SYN));
        segments.push((Original, FIN | ACK));
        assert!(!run(&segments).opens_anew(Original, SYN), "half-closed: the other side may still send");
        segments.push((Reply, FIN | ACK));
        assert!(run(&segments).opens_anew(Original, SYN));
        assert!(!run(&segments).opens_anew(Original, SYN | ACK));
        assert!(!run(&segments).opens_anew(Reply, SYN));
        assert!(run(&[(Original, SYN), (Reply, RST | ACK)]).opens_anew(Original, SYN));
    }

    #[test]
    fn without_tcp_flags_an_answer_establishes() {
        assert_eq!(Life::of(Kind::Service).after(Original, None).stage, Stage::Opening);
        assert_eq!(Life::of(Kind::Service).after(Reply, None).stage, Stage::Established);
    }

    #[test]
    fn where_replies_pass_another_node_the_opener_alone_lives_through_all_stages() {
        let run = |flags: &[u8]| flags.iter().fold(Life::of(Kind::DirectReturn), |life, flags| life.after(Original, Some(*flags)));
        assert_eq!(run(&[SYN, SYN]).stage, Stage::Opening, "retransmissions are no connection");
        assert_eq!(run(&[SYN, ACK]).stage, Stage::Established);
        let over = run(&[SYN, ACK, FIN | ACK]);
        assert_eq!(over.stage, Stage::Closing);
        assert!(over.opens_anew(Original, SYN));
        assert!(!run(&[SYN, ACK]).opens_anew(Original, SYN));
        assert_eq!(Life::of(Kind::DirectReturn).after(Original, None).stage, Stage::Established, "a second datagram");
    }
}
