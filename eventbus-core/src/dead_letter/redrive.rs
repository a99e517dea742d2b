//! Which letters an operator deals with, and what came of it.

use std::fmt;

use super::letter::DeadLetter;
use crate::envelope::EventId;

/// Which dead letters to re-drive or discard, how fast, and on whose behalf.
///
/// # Examples
///
/// ```
/// use eventbus_core::Redrive;
///
/// let redrive = Redrive::matching(|letter| letter.error.contains("PSP"))
///     .by("ann")
///     .because("the PSP is back")
///     .rate(50)
///     .on_progress(|report| println!("{} of {}", report.done, report.chosen));
/// ```
#[must_use]
pub struct Redrive {
    pub(super) choose: Box<dyn Fn(&DeadLetter) -> bool + Send + Sync>,
    pub(super) by: String,
    pub(super) because: String,
    pub(super) rate: Option<u32>,
    pub(super) progress: Box<dyn Fn(&DeskReport) + Send + Sync>,
}

impl Redrive {
    /// All open letters.
    pub fn all() -> Self {
        Self::matching(|_| true)
    }

    /// The open letter with this id.
    pub fn one(id: EventId) -> Self {
        Self::matching(move |letter| letter.id == id)
    }

    /// The open letters with the error that [`DeadLetter::fingerprint`] names so.
    pub fn of_error(fingerprint: impl Into<String>) -> Self {
        let fingerprint = fingerprint.into();
        Self::matching(move |letter| letter.fingerprint() == fingerprint)
    }

    /// The open letters that `choose` picks.
    pub fn matching(choose: impl Fn(&DeadLetter) -> bool + Send + Sync + 'static) -> Self {
        Self {
            choose: Box::new(choose),
            by: "unknown".to_owned(),
            because: String::new(),
            rate: None,
            progress: Box::new(|_| {}),
        }
    }

    /// Records who decided.
    pub fn by(mut self, who: impl Into<String>) -> Self {
        self.by = who.into();
        self
    }

    /// Records why.
    pub fn because(mut self, reason: impl Into<String>) -> Self {
        self.because = reason.into();
        self
    }

    /// Deals with at most so many a second, at least one.
    pub fn rate(mut self, per_second: u32) -> Self {
        self.rate = Some(per_second.max(1));
        self
    }

    /// Tells how far it is, after each page that was read and each few letters.
    pub fn on_progress(mut self, progress: impl Fn(&DeskReport) + Send + Sync + 'static) -> Self {
        self.progress = Box::new(progress);
        self
    }
}

impl fmt::Debug for Redrive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redrive")
            .field("by", &self.by)
            .field("because", &self.because)
            .field("rate", &self.rate)
            .finish_non_exhaustive()
    }
}

/// What came of the letters that were chosen; while it goes on, what came of them so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeskReport {
    /// Letters that were chosen. It rises while further pages of a large queue are read.
    pub chosen: u64,
    /// Letters that were re-driven or discarded.
    pub done: u64,
    /// Letters that another operator had claimed, or dealt with meanwhile.
    pub taken: u64,
    /// Letters left open because their event has expired: its consumer would pass over it. Edit
    /// them with another expiry, or discard them.
    pub expired: u64,
    /// Letters left open because the broker does not take their event again, such as one that is
    /// too large with the headers of a re-drive. Edit or discard them.
    pub refused: u64,
}

impl DeskReport {
    /// Letters about which it is known what came of them: how far a progress bar is.
    pub fn ended(&self) -> u64 {
        self.done + self.taken + self.expired + self.refused
    }
}
