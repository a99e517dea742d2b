//! What must hold over a ledger and its effects, and how a breach is shown. One file a check.

mod bounds;
mod drain;
mod effect_once;
mod honesty;
mod key_order;
mod liveness;
mod no_loss;
mod no_phantom;

use std::fmt;
use std::time::Duration;

use crate::history::{Effect, History};
use crate::record::{Operation, Record, Sample};
use crate::stamp::{RunId, Stamp};

pub use bounds::{Bounds, bounds, wire_duplicates};
pub use drain::drain;
pub use effect_once::effect_once;
pub use honesty::honesty;
pub use key_order::key_order;
pub use liveness::{Recoveries, liveness, recoveries};
pub use no_loss::no_loss;
pub use no_phantom::no_phantom;

/// What must hold. The numbers are those of the specification; 5 (sagas) and 6 (event store) come
/// with those parts of the SDK.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Invariant {
    /// I1: what was taken has an effect in every group, or is kept or reported by name.
    NoLoss,
    /// I2: nothing is seen that nobody tried, that failed, or that was changed.
    NoPhantom,
    /// I3: one effect a group.
    EffectOnce,
    /// I4: in order within a key.
    KeyOrder,
    /// I7: after a fault messages pass again, soon and all.
    Liveness,
    /// I8: memory, queues, attempts and duplicates stay under what was promised.
    Bounds,
    /// I9: a caller is never told more than is so.
    Honesty,
    /// I10: nothing is settled unhandled, and a shutdown that is done has nothing left.
    Drain,
}

impl Invariant {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::NoLoss,
        Self::NoPhantom,
        Self::EffectOnce,
        Self::KeyOrder,
        Self::Liveness,
        Self::Bounds,
        Self::Honesty,
        Self::Drain,
    ];
}

impl fmt::Display for Invariant {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NoLoss => "I1 no loss",
            Self::NoPhantom => "I2 no phantom",
            Self::EffectOnce => "I3 effect once",
            Self::KeyOrder => "I4 order per key",
            Self::Liveness => "I7 liveness",
            Self::Bounds => "I8 bounds",
            Self::Honesty => "I9 honesty",
            Self::Drain => "I10 drain",
        })
    }
}

/// What the tried system promised.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Promises {
    /// The groups that handle every message from the first on.
    pub groups: Vec<u16>,
    /// How long after the end of a fault the first probe may take.
    pub recovery_max: Duration,
    /// What may not be exceeded.
    pub bounds: Bounds,
    /// What is checked.
    pub invariants: Vec<Invariant>,
}

impl Promises {
    /// Everything, with thirty seconds to recover, and no bounds but those that need no number.
    #[must_use]
    pub fn to(groups: impl IntoIterator<Item = u16>) -> Self {
        Self {
            groups: groups.into_iter().collect(),
            recovery_max: Duration::from_secs(30),
            bounds: Bounds::default(),
            invariants: Invariant::ALL.to_vec(),
        }
    }

    /// Another time to recover.
    #[must_use]
    pub fn with_recovery_max(mut self, recovery_max: Duration) -> Self {
        self.recovery_max = recovery_max;
        self
    }

    /// Bounds that have numbers.
    #[must_use]
    pub fn with_bounds(mut self, bounds: Bounds) -> Self {
        self.bounds = bounds;
        self
    }

    /// Without one that this system does not promise, such as effects once without an inbox.
    #[must_use]
    pub fn without(mut self, invariant: Invariant) -> Self {
        self.invariants.retain(|one| *one != invariant);
        self
    }

    /// Checks what is promised, one after the other.
    #[must_use]
    pub fn check(&self, history: &History<'_>) -> Vec<(Invariant, Violations)> {
        let check = |invariant| match invariant {
            Invariant::NoLoss => no_loss(history, &self.groups),
            Invariant::NoPhantom => no_phantom(history),
            Invariant::EffectOnce => effect_once(history),
            Invariant::KeyOrder => key_order(history),
            Invariant::Liveness => liveness(history, self.recovery_max),
            Invariant::Bounds => bounds(history, &self.bounds),
            Invariant::Honesty => honesty(history),
            Invariant::Drain => drain(history),
        };
        let invariants = self.invariants.iter();
        invariants.map(|one| (*one, check(*one))).collect()
    }
}

/// What must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Breach {
    /// I1: it was taken, and a group has nothing of it.
    Lost,
    /// I2: it was seen, and nobody tried to publish it.
    NeverPublished,
    /// I2: it was seen, and every try surely failed, or was rolled back.
    Failed,
    /// I2: it was seen before anybody tried to publish it, or to commit it.
    BeforePublished,
    /// I2: its payload is not the one that was published.
    Changed,
    /// I2: a broker handed out something that is no payload of this run.
    Unreadable,
    /// I2: an effect has an id that no message of this run has.
    ForeignEffect,
    /// I2: an effect has the id of one message and the key or the number of another.
    MixedUp,
    /// I3: a group has more than one effect of it.
    EffectTwice,
    /// I4: a group's effect of it was committed only after that of a later one of its key.
    EffectLate {
        /// The later one.
        after: Stamp,
    },
    /// I4: a group was first handed it only after a later one of its key.
    DeliveredLate {
        /// The later one.
        after: Stamp,
    },
    /// I7: no probe passed in time after a fault ended.
    NotRecovered {
        /// How long it took, or, without a probe that passed, how long nothing did.
        after: Duration,
    },
    /// I7: the last measurement of what a group has still to do was not 0.
    LagLeft {
        /// How many messages were left.
        lag: u64,
    },
    /// I8: a measurement was above its bound.
    Exceeded {
        /// What was measured.
        sample: Sample,
        /// What it was.
        value: u64,
        /// What it may be.
        max: u64,
    },
    /// I8: it was tried more often than the retry policy allows.
    TooManyAttempts {
        /// Which attempt there was.
        attempt: u16,
        /// Which is the last one allowed.
        max: u16,
    },
    /// I8: a group was handed more messages twice than were in flight at the faults until then.
    TooManyDuplicates {
        /// How many were handed out again until then.
        duplicates: u64,
        /// How many faults had begun.
        faults: u64,
    },
    /// I9: a caller was told ok, and the broker had not said so.
    OkUnacknowledged,
    /// I9: a caller was told that it surely failed, and the broker had not said so.
    FailUnproven,
    /// I9: a caller was told ok, and the broker does not have it in the end.
    NotStored,
    /// I9: two messages are said to be at one position.
    SamePosition {
        /// The other one.
        other: Stamp,
    },
    /// I10: a group settled it before it was handled or kept.
    SettledUnhandled,
    /// I10: a shutdown was done while its handler still ran.
    LeftRunning,
    /// I10: a consumer went on with it after its shutdown was done.
    AfterDrain,
}

impl Breach {
    /// What it is a breach of.
    #[must_use]
    pub fn invariant(&self) -> Invariant {
        match self {
            Self::Lost => Invariant::NoLoss,
            Self::NeverPublished
            | Self::Failed
            | Self::BeforePublished
            | Self::Changed
            | Self::Unreadable
            | Self::ForeignEffect
            | Self::MixedUp => Invariant::NoPhantom,
            Self::EffectTwice => Invariant::EffectOnce,
            Self::EffectLate { .. } | Self::DeliveredLate { .. } => Invariant::KeyOrder,
            Self::NotRecovered { .. } | Self::LagLeft { .. } => Invariant::Liveness,
            Self::Exceeded { .. }
            | Self::TooManyAttempts { .. }
            | Self::TooManyDuplicates { .. } => Invariant::Bounds,
            Self::OkUnacknowledged
            | Self::FailUnproven
            | Self::NotStored
            | Self::SamePosition { .. } => Invariant::Honesty,
            Self::SettledUnhandled | Self::LeftRunning | Self::AfterDrain => Invariant::Drain,
        }
    }
}

impl fmt::Display for Breach {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost => formatter.write_str(
                "it was taken, but there is no effect of it, no dead letter, nothing parked and no reported gap",
            ),
            Self::NeverPublished => formatter.write_str("it was seen, but nobody tried to publish it"),
            Self::Failed => formatter.write_str(
                "it was seen, but every try to publish it had surely failed, or was never committed",
            ),
            Self::BeforePublished => {
                formatter.write_str("it was seen before anybody tried to publish or commit it")
            }
            Self::Changed => formatter.write_str("its payload is not the one that was published"),
            Self::Unreadable => {
                formatter.write_str("what a broker handed out is no payload of this run")
            }
            Self::ForeignEffect => {
                formatter.write_str("an effect has an id that no message of this run has")
            }
            Self::MixedUp => formatter.write_str(
                "an effect has the id of this message and the key or the number of another",
            ),
            Self::EffectTwice => formatter.write_str("there is more than one effect of it"),
            Self::EffectLate { after } => write!(
                formatter,
                "its effect was committed after that of {after}, which was published later"
            ),
            Self::DeliveredLate { after } => write!(
                formatter,
                "it was first handed out after {after}, which was published later"
            ),
            Self::NotRecovered { after } => write!(
                formatter,
                "the faults were over, but {after:?} later no probe had passed"
            ),
            Self::LagLeft { lag } => {
                write!(formatter, "{lag} messages were still to be settled at the end")
            }
            Self::Exceeded { sample, value, max } => {
                write!(formatter, "{sample:?} was {value}, and may be {max}")
            }
            Self::TooManyAttempts { attempt, max } => {
                write!(formatter, "there was an attempt {attempt}, and {max} are allowed")
            }
            Self::TooManyDuplicates { duplicates, faults } => write!(
                formatter,
                "{duplicates} messages had been handed out again after {faults} faults"
            ),
            Self::OkUnacknowledged => {
                formatter.write_str("the caller was told ok, but the broker had not said so")
            }
            Self::FailUnproven => formatter.write_str(
                "the caller was told that it surely failed, but the broker had not said so",
            ),
            Self::NotStored => {
                formatter.write_str("the caller was told ok, but the broker does not have it in the end")
            }
            Self::SamePosition { other } => {
                write!(formatter, "it and {other} are said to be at one position")
            }
            Self::SettledUnhandled => {
                formatter.write_str("it was settled before it was handled, or kept as a dead letter")
            }
            Self::LeftRunning => {
                formatter.write_str("the shutdown was done, but a handler of it still ran")
            }
            Self::AfterDrain => {
                formatter.write_str("the shutdown was done, but the consumer went on with it")
            }
        }
    }
}

/// A breach, with what shows it and nothing else.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Violation {
    /// What must not be.
    pub breach: Breach,
    /// The run.
    pub run: RunId,
    /// With which message, if with one.
    pub stamp: Option<Stamp>,
    /// In which group; 0 if in none.
    pub group: u16,
    /// The records that show it, in order of time: those of the message, and of the group.
    pub records: Vec<Record>,
    /// How many more of these there are than the [`RECORDS_MAX`](Self::RECORDS_MAX) that are kept.
    pub omitted: usize,
    /// The effects that show it, in order.
    pub effects: Vec<Effect>,
}

impl Violation {
    /// How many records a violation holds.
    pub const RECORDS_MAX: usize = 64;

    /// A breach that is about no message.
    fn new(history: &History<'_>, breach: Breach, group: u16, indices: &[usize]) -> Self {
        let mut violation = Self {
            breach,
            run: history.ledger().run(),
            stamp: None,
            group,
            records: Vec::new(),
            omitted: 0,
            effects: Vec::new(),
        };
        for index in indices {
            violation.keep(*history.record(*index));
        }
        violation
    }

    /// A breach that is about a message, with all that is known of it in the group, or in any group
    /// where that is 0.
    fn of(history: &History<'_>, breach: Breach, stamp: Stamp, group: u16) -> Self {
        let mut violation = Self::new(history, breach, group, &[]);
        violation.stamp = Some(stamp);
        violation.add(history, stamp);
        violation
    }

    /// Shows another message too.
    fn with(mut self, history: &History<'_>, other: Stamp) -> Self {
        self.add(history, other);
        self.effects.sort_by_key(|effect| effect.order);
        self
    }

    /// Shows some other records too.
    fn with_records(mut self, history: &History<'_>, indices: &[usize]) -> Self {
        for index in indices {
            self.keep(*history.record(*index));
        }
        self.in_order()
    }

    fn in_order(mut self) -> Self {
        self.records.sort_by_key(|one| (one.time, one.sequence));
        self
    }

    fn add(&mut self, history: &History<'_>, stamp: Stamp) {
        let group = self.group;
        let is_shown = |other: u16| group == 0 || other == 0 || other == group;
        let message = history.message(stamp);
        for (_, record) in message.records() {
            if is_shown(record.entry.group) {
                self.keep(*record);
            }
            if let (Operation::Append, Some(number)) =
                (record.entry.operation, record.entry.position)
            {
                self.transaction(history, record.process, number);
            }
        }
        let effects = message.effects.iter();
        self.effects
            .extend(effects.filter(|effect| is_shown(effect.group)));
        self.records.sort_by_key(|one| (one.time, one.sequence));
    }

    /// Shows what became of a transaction.
    fn transaction(&mut self, history: &History<'_>, process: u32, number: u64) {
        let Some((from, until)) = history.commit_range(process, number) else {
            return;
        };
        for record in &history.ledger().records()[from..=until] {
            let is_it = record.entry.operation == Operation::Commit
                && record.process == process
                && record.entry.position == Some(number);
            if is_it && !self.records.contains(record) {
                self.keep(*record);
            }
        }
    }

    fn keep(&mut self, record: Record) {
        match self.records.len() < Self::RECORDS_MAX {
            true => self.records.push(record),
            false => self.omitted += 1,
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: ", self.breach.invariant())?;
        if let Some(stamp) = self.stamp {
            let Stamp {
                producer,
                key,
                key_seq,
            } = stamp;
            let id = stamp.id(self.run);
            write!(
                formatter,
                "message {stamp} (producer {producer}, key {key}, number {key_seq}, id {id})"
            )?;
        }
        match (self.stamp, self.group) {
            (_, 0) => {}
            (None, group) => write!(formatter, "group {group}")?,
            (Some(_), group) => write!(formatter, " in group {group}")?,
        }
        if self.stamp.is_some() || self.group != 0 {
            write!(formatter, ": ")?;
        }
        writeln!(formatter, "{}", self.breach)?;
        for record in &self.records {
            writeln!(formatter, "  {record}")?;
        }
        if self.omitted > 0 {
            writeln!(formatter, "  and {} more records", self.omitted)?;
        }
        for effect in &self.effects {
            writeln!(
                formatter,
                "  effect {} of id {} key {} number {} group {} attempt {}",
                effect.order, effect.id, effect.key, effect.key_seq, effect.group, effect.attempt
            )?;
        }
        if self.stamp.is_some() && self.effects.is_empty() {
            writeln!(formatter, "  no effect")?;
        }
        Ok(())
    }
}

/// What a check found: how much, and the first of it.
#[derive(Clone, Debug, Default)]
pub struct Violations {
    total: u64,
    examples: Vec<Violation>,
}

impl Violations {
    /// How many are kept; a system that loses everything would fill the memory otherwise.
    pub const EXAMPLES_MAX: usize = 100;

    /// How many there are.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// The first of them.
    #[must_use]
    pub fn examples(&self) -> &[Violation] {
        &self.examples
    }

    /// Counts one, and has it made if it is kept.
    fn add(&mut self, make: impl FnOnce() -> Violation) {
        self.total += 1;
        if self.examples.len() < Self::EXAMPLES_MAX {
            self.examples.push(make());
        }
    }
}
