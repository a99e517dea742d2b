//! A dead letter as an operator sees it, and what was decided about it.

use super::desk::DEAD_LETTERS_BYTES_MAX;
use super::fingerprint::fingerprint;
use super::log::Place;
use super::record::Note;
use super::standing::Standing;
use crate::clock::Timestamp;
use crate::delivery::Position;
use crate::envelope::EventId;
use crate::message::{Group, Key, Message};

/// A message that could not be handled.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The letter's identity; it differs for each time the same event is dead-lettered.
    pub id: EventId,
    /// The message as it was published.
    pub message: Message,
    /// The group that could not handle it.
    pub group: Group,
    /// The partition it was read from.
    pub partition: u32,
    /// Its place there, where the broker has positions.
    pub position: Option<Position>,
    /// What kind of cause: `error`, `panic`, `deadline`, `undecodable`, `no_handler`, `hand_outs`,
    /// or `discarded` with its key.
    pub cause: String,
    /// The error and its causes in one line.
    pub error: String,
    /// Failed attempts.
    pub attempts: u32,
    /// When the first attempt failed.
    pub first_failed_at: Timestamp,
    /// When the last attempt failed.
    pub failed_at: Timestamp,
    /// What has become of it.
    pub status: DeadLetterStatus,
    /// How many bytes stand in parts before it; `None` when it was stored whole.
    pub(super) whole: Option<usize>,
    /// Where it stands on its topic.
    pub(super) place: Place,
    pub(super) standing: Standing,
}

impl DeadLetter {
    /// What its error has in common with others of the same cause: the cause and the error's text,
    /// with placeholders for what differs from event to event.
    ///
    /// Words that are numbers or contain some, identifiers and quoted parts are replaced:
    /// `error: no label for parcel <n>: out of paper`. The text is stable, so that it can be kept
    /// and compared.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.cause, &self.error)
    }

    /// What keeps all notes about this letter on one partition.
    pub(super) fn record_key(&self) -> Key {
        match &self.message.key {
            Some(key) if self.whole.is_none() => key.clone(),
            _ => Key::display(&self.id),
        }
    }

    /// Takes over what somebody did with it.
    pub(super) fn noted(&mut self, note: Note) {
        self.standing.noted(&note);
        let decision = note.decision;
        match note.action {
            DeskAction::Stored | DeskAction::Claimed { .. } => {}
            DeskAction::Redriven => self.status = DeadLetterStatus::Redriven(decision),
            DeskAction::Edited { new_id } => {
                self.status = DeadLetterStatus::Edited { decision, new_id };
            }
            DeskAction::Discarded => self.status = DeadLetterStatus::Discarded(decision),
        }
    }

    /// Says who works on it now.
    pub(super) fn with_claim_at(mut self, now: Timestamp) -> Self {
        if let Some(claim) = self.standing.claim_at(now) {
            self.status = DeadLetterStatus::Claimed {
                decision: claim.decision.clone(),
                until: claim.until,
            };
        }
        self
    }

    /// What it counts towards the size of a page.
    pub(super) fn weight(&self) -> usize {
        // It says so itself: more than a page holds is as good as a page.
        let whole = self.whole.unwrap_or(0).min(DEAD_LETTERS_BYTES_MAX);
        let bytes = whole.max(self.message.size());
        size_of::<Self>() + self.error.len() + bytes
    }
}

/// What has become of a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeadLetterStatus {
    /// Nobody has dealt with it.
    Open,
    /// It is open, and somebody is dealing with it.
    Claimed {
        /// Who, why, and since when.
        decision: Decision,
        /// When it is free again, should that operator have crashed.
        until: Timestamp,
    },
    /// It was given to its group again.
    Redriven(Decision),
    /// A changed event was given to its group instead.
    Edited {
        /// Who, why and when.
        decision: Decision,
        /// The id of the changed event.
        new_id: EventId,
    },
    /// It was put aside for good.
    Discarded(Decision),
}

/// Who decided about a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Decision {
    /// Who.
    pub by: String,
    /// Why.
    pub because: String,
    /// When.
    pub at: Timestamp,
}

/// One thing that happened to a dead letter; see [`DeadLetters::history`](crate::DeadLetters::history).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeskEntry {
    /// What was done.
    pub action: DeskAction,
    /// Who did it, why and when; for a letter that was stored, the group and the error.
    pub decision: Decision,
}

/// What can happen to a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeskAction {
    /// A consumer stored it.
    Stored,
    /// An operator announced to deal with it. Of several claims the first counts.
    Claimed {
        /// When the claim ends.
        until: Timestamp,
    },
    /// It was given to its group again.
    Redriven,
    /// A changed event was given to its group instead.
    Edited {
        /// The id of the changed event.
        new_id: EventId,
    },
    /// It was put aside for good.
    Discarded,
}
