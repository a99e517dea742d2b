//! What was found out about the events of a key, and how it reads as text.

use std::fmt;

use crate::clock::Timestamp;
use crate::dead_letter::{DeadLetter, DeadLetterStatus};
use crate::delivery::Position;
use crate::envelope::{Envelope, EventId};
use crate::key_state::HeldReport;
use crate::message::{Group, Key, Topic};
use crate::schedule::ScheduledReport;

/// Where the events of a key are; found by [`EventBus::whereabouts`](crate::EventBus::whereabouts).
///
/// A snapshot: what moves meanwhile may show where it was a moment ago. `Display` writes it for
/// people, a line each.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Whereabouts {
    /// The topic, by its name on the broker.
    pub topic: Topic,
    /// The key.
    pub key: Key,
    /// The latest events of the key, oldest first.
    pub events: Vec<EventPlace>,
    /// Events of the key before those, which were counted and left out.
    pub earlier: u64,
    /// The groups for which the key is held: parked, or until a delayed attempt.
    pub held: Vec<HeldFor>,
    /// What of the key waits for its time and is not published yet.
    pub scheduled: Vec<ScheduledReport>,
    /// Dead letters of the key that any group left, open or not, oldest first in each group.
    pub dead_letters: Vec<DeadLetter>,
    /// What could not be found out. Empty: nothing is missing above.
    pub unknown: Vec<Unknown>,
}

/// One event and how far each group is with it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EventPlace {
    /// The event's id.
    pub id: EventId,
    /// Its type, time and flow; `None` when no format claims the message.
    pub envelope: Option<Envelope>,
    /// The partition it stands on.
    pub partition: u32,
    /// Its place there, where the broker has positions.
    pub position: Option<Position>,
    /// The only group it is meant for, when it was re-driven or replayed; others pass over it.
    pub to_group: Option<Group>,
    /// Every group that reads the topic, as far as the broker knows them.
    pub groups: Vec<GroupProgress>,
}

/// The key as it is held for one group.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HeldFor {
    /// The group.
    pub group: Group,
    /// What is held, since when and why; what [`HeldKeys`](crate::HeldKeys) decides about.
    pub report: HeldReport,
}

/// How far one group is with one event.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupProgress {
    /// The group.
    pub group: Group,
    /// How far it is.
    pub progress: Progress,
}

/// How far a group is with an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// It is done with it: handled, dead-lettered or passed over.
    Settled,
    /// It has not come to it, is handling it now, or is done with it but not with one before it.
    Waiting {
        /// How many messages of the partition stand before it that the group has not settled;
        /// `None` when the read began behind the group's place.
        before: Option<u64>,
    },
    /// It was put aside with its key.
    Held {
        /// How many messages of the key stand before it.
        before: u64,
        /// When the first of them is tried again; `None` waits for an operator.
        until: Option<Timestamp>,
    },
}

/// Something that could not be found out.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unknown {
    /// What, such as `events` or `groups`.
    pub what: &'static str,
    /// Why, and what helps.
    pub reason: String,
}

impl fmt::Display for Whereabouts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, key {}:", self.topic, self.key)?;
        if self.events.is_empty()
            && self.held.is_empty()
            && self.scheduled.is_empty()
            && self.dead_letters.is_empty()
        {
            f.write_str(" nothing found")?;
        }
        if self.earlier > 0 {
            write!(f, "\n  {} earlier events are left out", self.earlier)?;
        }
        for event in &self.events {
            write!(f, "\n  {event}")?;
        }
        for HeldFor { group, report } in &self.held {
            match report.wait.until {
                None => write!(f, "\n  parked for {group} since {}", report.since)?,
                Some(until) => write!(f, "\n  held for {group} until {until}")?,
            }
            write!(f, ": {}", report.wait.error)?;
        }
        for waiting in &self.scheduled {
            let event_type = waiting.event_type.as_deref().unwrap_or("event");
            let (id, due) = (&waiting.id, waiting.due);
            write!(f, "\n  {event_type} {id} waits until {due}")?;
        }
        for letter in &self.dead_letters {
            write!(
                f,
                "\n  dead letter {} of {}, {}: {}",
                letter.id,
                letter.group,
                status(&letter.status),
                letter.error
            )?;
        }
        for unknown in &self.unknown {
            write!(f, "\n  unknown: {}: {}", unknown.what, unknown.reason)?;
        }
        Ok(())
    }
}

impl fmt::Display for EventPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.envelope {
            Some(envelope) => write!(f, "{} {}", envelope.event_type, self.id)?,
            None => write!(f, "unreadable {}", self.id)?,
        }
        write!(f, " on partition {}", self.partition)?;
        if let Some(position) = self.position {
            write!(f, " at {position}")?;
        }
        if let Some(group) = &self.to_group {
            write!(f, ", for {group} alone")?;
        }
        for GroupProgress { group, progress } in &self.groups {
            write!(f, "\n    {group}: {progress}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Settled => f.write_str("settled"),
            Self::Waiting { before: None } => f.write_str("waiting"),
            Self::Waiting { before: Some(0) } => f.write_str("next"),
            Self::Waiting { before: Some(1) } => f.write_str("waiting behind 1 message"),
            Self::Waiting {
                before: Some(before),
            } => write!(f, "waiting behind {before} messages"),
            Self::Held {
                before: 0,
                until: None,
            } => f.write_str("parked"),
            Self::Held {
                before: 0,
                until: Some(until),
            } => write!(f, "tried again at {until}"),
            Self::Held { before, .. } => write!(f, "held behind {before} of its key"),
        }
    }
}

fn status(status: &DeadLetterStatus) -> String {
    match status {
        DeadLetterStatus::Open => "open".to_owned(),
        DeadLetterStatus::Claimed { decision, .. } => format!("open, {} is at it", decision.by),
        DeadLetterStatus::Redriven(decision) => format!("re-driven by {}", decision.by),
        DeadLetterStatus::Edited { decision, new_id } => {
            format!("edited by {} into {new_id}", decision.by)
        }
        DeadLetterStatus::Discarded(decision) => format!("discarded by {}", decision.by),
    }
}
