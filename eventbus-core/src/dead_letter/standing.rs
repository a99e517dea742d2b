//! What the log says of one letter: whether it is open, and whose claim on it counts.
//!
//! All notes about a letter are on one partition, and whoever folds them in their order comes to the
//! same result: the first claim wins, until it ends or its holder decides.

use super::letter::{Decision, DeskAction};
use super::record::Note;
use crate::clock::Timestamp;

/// Somebody's announcement to deal with a letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    /// Which run of which desk made it.
    pub(super) id: String,
    pub(super) until: Timestamp,
    pub(super) decision: Decision,
}

/// Whether a letter is open, and who has claimed it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Standing {
    is_open: bool,
    claim: Option<Claim>,
}

impl Standing {
    /// A letter that was stored just now.
    pub(super) fn open() -> Self {
        Self {
            is_open: true,
            claim: None,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.is_open
    }

    /// The claim that keeps others away now.
    pub(super) fn claim_at(&self, now: Timestamp) -> Option<&Claim> {
        self.claim.as_ref().filter(|claim| claim.until > now)
    }

    pub(super) fn is_claimed_by(&self, id: &str) -> bool {
        self.claim.as_ref().is_some_and(|claim| claim.id == id)
    }

    /// A letter stored twice after an unknown outcome is one letter; one that is stored after a
    /// decision is open again, because its event has failed again.
    pub(super) fn stored(&mut self) {
        if !self.is_open {
            *self = Self::open();
        }
    }

    pub(super) fn noted(&mut self, note: &Note) {
        let until = match note.action {
            DeskAction::Claimed { until } => until,
            _ => return *self = Self::default(),
        };
        let yields = |held: &Claim| held.id == note.claim || held.until <= note.decision.at;
        if self.is_open && self.claim.as_ref().is_none_or(yields) {
            self.claim = Some(Claim {
                id: note.claim.clone(),
                until,
                decision: note.decision.clone(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(action: DeskAction, claim: &str, at: i64) -> Note {
        Note {
            action,
            decision: Decision {
                by: claim.to_owned(),
                because: String::new(),
                at: Timestamp::from_micros(at),
            },
            claim: claim.to_owned(),
        }
    }

    fn claimed(by: &str, at: i64, until: i64) -> Note {
        let until = Timestamp::from_micros(until);
        note(DeskAction::Claimed { until }, by, at)
    }

    fn folded(notes: &[Note]) -> Standing {
        let mut standing = Standing::open();
        for note in notes {
            standing.noted(note);
        }
        standing
    }

    #[test]
    fn the_first_claim_counts_until_it_ends() {
        let both = folded(&[claimed("ann", 0, 10), claimed("bob", 0, 10)]);
        assert!(both.is_claimed_by("ann"));
        let early = folded(&[claimed("ann", 0, 10), claimed("bob", 9, 19)]);
        assert!(early.is_claimed_by("ann"));
        let late = folded(&[claimed("ann", 0, 10), claimed("bob", 10, 20)]);
        assert!(late.is_claimed_by("bob"));
        assert!(late.claim_at(Timestamp::from_micros(19)).is_some());
        assert!(late.claim_at(Timestamp::from_micros(20)).is_none());
    }

    #[test]
    fn a_claim_is_renewed_by_its_holder_alone() {
        let renewed = [claimed("ann", 0, 10), claimed("ann", 5, 15)];
        assert!(
            folded(&renewed)
                .claim_at(Timestamp::from_micros(14))
                .is_some()
        );
        let other = folded(&[renewed.to_vec(), vec![claimed("bob", 12, 22)]].concat());
        assert!(other.is_claimed_by("ann"));
    }

    #[test]
    fn what_was_decided_is_not_claimed_until_it_is_stored_again() {
        let decided = [
            claimed("ann", 0, 10),
            note(DeskAction::Redriven, "ann", 1),
            claimed("bob", 2, 12),
        ];
        let mut standing = folded(&decided);
        assert!(!standing.is_open() && !standing.is_claimed_by("bob"));
        standing.stored();
        assert_eq!(standing, Standing::open());
        standing.noted(&claimed("bob", 3, 13));
        standing.stored();
        assert!(standing.is_claimed_by("bob"), "stored twice is stored once");
    }
}
