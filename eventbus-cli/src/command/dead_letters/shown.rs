//! Letters and what happened to them as scripts and people see them.

use std::fmt;

use eventbus::DeadLetter;
use eventbus::desk::{DeadLetterStatus, Decision, DeskAction, DeskEntry};
use serde::Serialize;

use crate::record::ShownEvent;

/// A letter for scripts. The names are a promise: they are added to, never changed.
#[derive(Debug, Serialize)]
pub(crate) struct ShownLetter {
    pub(super) id: String,
    pub(super) group: String,
    pub(super) topic: String,
    pub(super) partition: u32,
    pub(super) position: Option<String>,
    pub(super) key: Option<String>,
    pub(super) cause: String,
    pub(super) error: String,
    pub(super) attempts: u32,
    pub(super) first_failed_at: String,
    pub(super) failed_at: String,
    /// `open`, `claimed`, `redriven`, `edited` or `discarded`.
    pub(super) status: &'static str,
    by: Option<String>,
    because: Option<String>,
    at: Option<String>,
    pub(super) event: ShownEvent,
    /// What happened to it, where that was asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) history: Vec<ShownEntry>,
}

/// One thing that happened to a letter.
#[derive(Debug, Serialize)]
pub(super) struct ShownEntry {
    /// `stored`, `claimed`, `redriven`, `edited` or `discarded`.
    action: &'static str,
    by: String,
    because: String,
    at: String,
    /// The id of the changed event.
    new_id: Option<String>,
}

impl ShownEntry {
    fn of(entry: &DeskEntry) -> Self {
        let (action, new_id) = match &entry.action {
            DeskAction::Stored => ("stored", None),
            DeskAction::Claimed { .. } => ("claimed", None),
            DeskAction::Redriven => ("redriven", None),
            DeskAction::Edited { new_id } => ("edited", Some(new_id.to_string())),
            DeskAction::Discarded => ("discarded", None),
            _ => ("unknown", None),
        };
        Self {
            action,
            by: entry.decision.by.clone(),
            because: entry.decision.because.clone(),
            at: entry.decision.at.to_string(),
            new_id,
        }
    }
}

impl fmt::Display for ShownEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} by {}", self.at, self.action, self.by)?;
        if let Some(new_id) = &self.new_id {
            write!(f, " into {new_id}")?;
        }
        match self.because.as_str() {
            "" => Ok(()),
            because => write!(f, ": {because}"),
        }
    }
}

impl ShownLetter {
    pub(crate) fn of(letter: &DeadLetter) -> Self {
        let (status, decision) = status(&letter.status);
        Self {
            id: letter.id.to_string(),
            group: letter.group.to_string(),
            topic: letter.message.topic.to_string(),
            partition: letter.partition,
            position: letter.position.map(|position| position.to_string()),
            key: letter.message.key.as_ref().map(ToString::to_string),
            cause: letter.cause.clone(),
            error: letter.error.clone(),
            attempts: letter.attempts,
            first_failed_at: letter.first_failed_at.to_string(),
            failed_at: letter.failed_at.to_string(),
            status,
            by: decision.map(|decision| decision.by.clone()),
            because: decision.map(|decision| decision.because.clone()),
            at: decision.map(|decision| decision.at.to_string()),
            event: ShownEvent::of(&letter.message),
            history: Vec::new(),
        }
    }

    pub(super) fn with_history(mut self, history: &[DeskEntry]) -> Self {
        self.history = history.iter().map(ShownEntry::of).collect();
        self
    }
}

fn status(status: &DeadLetterStatus) -> (&'static str, Option<&Decision>) {
    match status {
        DeadLetterStatus::Open => ("open", None),
        DeadLetterStatus::Claimed { decision, .. } => ("claimed", Some(decision)),
        DeadLetterStatus::Redriven(decision) => ("redriven", Some(decision)),
        DeadLetterStatus::Edited { decision, .. } => ("edited", Some(decision)),
        DeadLetterStatus::Discarded(decision) => ("discarded", Some(decision)),
        _ => ("unknown", None),
    }
}
