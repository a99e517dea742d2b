//! Messages that could not be handled: kept whole with their cause, listed and re-driven.

mod cause;
mod desk;
mod edit;
mod fingerprint;
mod letter;
mod log;
mod parts;
mod record;
mod redrive;
mod run;
mod standing;

pub(crate) use cause::{Cause, Diagnosis};
pub use desk::{
    DEAD_LETTER_CLAIM_TIME, DEAD_LETTERS_BYTES_MAX, DEAD_LETTERS_MAX, DeadLetters,
    ERROR_GROUPS_MAX, ErrorGroup,
};
pub use edit::Edit;
pub use letter::{DeadLetter, DeadLetterStatus, Decision, DeskAction, DeskEntry};
pub(crate) use parts::in_parts;
pub(crate) use record::{id_of, into_message};
pub use redrive::{DeskReport, Redrive};

use crate::error::Result;
use crate::message::{Group, Topic};

/// Where dead letters of `group` from `topic` are kept.
pub(crate) fn topic_of(topic: &Topic, group: &Group) -> Result<Topic> {
    Topic::new(&format!("{topic}.{group}.dlq"))
}
