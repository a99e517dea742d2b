//! A dead letter as an operator sees it, and what was decided about it.

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
}

impl DeadLetter {
    /// What keeps all records of this letter on one partition.
    pub(super) fn record_key(&self) -> Key {
        match &self.message.key {
            Some(key) if self.whole.is_none() => key.clone(),
            _ => Key::display(&self.id),
        }
    }
}

/// What has become of a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeadLetterStatus {
    /// Nobody has dealt with it.
    Open,
    /// It was given to its group again.
    Redriven(Decision),
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
