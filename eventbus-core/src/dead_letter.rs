//! Messages that could not be handled: kept whole with their cause, listed and re-driven.

mod cause;
mod desk;
mod letter;
mod parts;
mod record;

pub(crate) use cause::{Cause, Diagnosis};
pub use desk::{DEAD_LETTERS_MAX, DeadLetters, Redrive};
pub use letter::{DeadLetter, DeadLetterStatus, Decision};
pub(crate) use parts::in_parts;
pub(crate) use record::into_message;

use crate::error::Result;
use crate::message::{Group, Topic};

/// Where dead letters of `group` from `topic` are kept.
pub(crate) fn topic_of(topic: &Topic, group: &Group) -> Result<Topic> {
    Topic::new(&format!("{topic}.{group}.dlq"))
}
