//! What a broker hands to a consumer and hears back: lanes, receipts and signals.
//!
//! ```text
//!  Deliveries::next ──▶ Assigned ─ Delivered … Delivered ─ Revoking ──────────────▶ (next owner)
//!                                      │                       │
//!                              handlers run             handlers end or are dropped
//!                                      ▼                       ▼
//!  Settlement::settle ◀─────────────── receipts       Settlement::release
//! ```

use std::time::{Duration, SystemTime};

use crate::error::{Error, ErrorKind, Result};
use crate::message::{Group, Message, Topic};

/// One partition as one member holds it; the epoch rises at every assignment.
///
/// A lane of an older epoch is dead: whatever is still said about it is ignored and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(
    clippy::exhaustive_structs,
    reason = "a plain pair that adapters create"
)]
pub struct Lane {
    /// Which partition, numbered by the member: small and dense.
    pub id: u32,
    /// Which assignment of it.
    pub epoch: u32,
}

/// A durable place in a partition: later is greater. Brokers define the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(clippy::exhaustive_structs, reason = "a number with a meaning")]
pub struct Position(pub u128);

impl From<u64> for Position {
    fn from(number: u64) -> Self {
        Self(number.into())
    }
}

impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What a delivery is settled by: dense per lane from 0 on, not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(
    clippy::exhaustive_structs,
    reason = "a plain pair that adapters create"
)]
pub struct Receipt {
    /// The lane it came on.
    pub lane: Lane,
    /// Its number on that lane.
    pub tag: u64,
}

/// A message on its way to a handler.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Delivery {
    /// The message as it was published.
    pub message: Message,
    /// What to settle it by.
    pub receipt: Receipt,
    /// Where it stands in its partition, where the broker has such a thing.
    pub position: Option<Position>,
    /// How often it was handed out to this group, this time included, where the broker counts.
    pub handed_out: Option<u32>,
}

impl Delivery {
    /// A delivery of `message` without position and count.
    #[must_use]
    pub fn new(message: Message, receipt: Receipt) -> Self {
        Self {
            message,
            receipt,
            position: None,
            handed_out: None,
        }
    }

    /// Sets the position.
    #[must_use]
    pub fn with_position(mut self, position: Position) -> Self {
        self.position = Some(position);
        self
    }

    /// Sets how often it was handed out.
    #[must_use]
    pub fn with_handed_out(mut self, times: u32) -> Self {
        self.handed_out = Some(times);
        self
    }
}

/// A partition that is now this member's.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Assignment {
    /// How deliveries of it are marked from now on.
    pub lane: Lane,
    /// Its topic.
    pub topic: Topic,
    /// Its number in the topic.
    pub partition: u32,
    /// Where reading starts, where the broker has positions.
    pub position: Option<Position>,
}

impl Assignment {
    /// An assignment without a position.
    #[must_use]
    pub fn new(lane: Lane, topic: Topic, partition: u32) -> Self {
        Self {
            lane,
            topic,
            partition,
            position: None,
        }
    }

    /// Sets where reading starts.
    #[must_use]
    pub fn with_position(mut self, position: Position) -> Self {
        self.position = Some(position);
        self
    }
}

/// What [`Deliveries::next`](crate::Deliveries::next) tells.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Signal {
    /// These partitions are ours from now on.
    Assigned(Vec<Assignment>),
    /// Messages, in order within each lane.
    Delivered(Vec<Delivery>),
    /// Still ours: finish or drop the handlers, settle what is done, then release.
    Revoking(Vec<Lane>),
    /// Gone already: stop, settle nothing.
    Lost(Vec<Lane>),
    /// Messages from `from` up to, not including, `to` vanished unread: retention, trimming, a
    /// deleted topic.
    Gap {
        /// The lane it happened on.
        lane: Lane,
        /// The first position missing.
        from: Position,
        /// The next position there is. Not behind `from` where positions start over, because the topic
        /// was deleted and created anew or lost its end: how many vanished is not known then.
        to: Position,
    },
    /// [`Subscription::until`] was reached on these lanes; on none, when there were none to read.
    Ended(Vec<Lane>),
}

/// Where a group that is new, or a reader without a group, begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Start {
    /// With the oldest message the broker still has for it: the default, because it loses nothing.
    ///
    /// Where `history` is not declared (RabbitMQ), a group has what was published since it was
    /// first subscribed.
    #[default]
    Earliest,
    /// With what is published from now on.
    Latest,
    /// At this position of every partition. Needs `replay`.
    Position(Position),
    /// With the first message taken by the broker at or after this time. Needs `replay`.
    Time(SystemTime),
}

/// Where a bounded read ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Until {
    /// Behind the last message there is when the read begins.
    Now,
    /// Before this position of every partition.
    Position(Position),
    /// Before the first message taken by the broker at or after this time.
    Time(SystemTime),
}

/// How much a member may hold unsettled. The broker's half keeps to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Most messages in one `Delivered`.
    pub batch: usize,
    /// Most messages unsettled over all lanes.
    pub messages: usize,
    /// Most bytes unsettled over all lanes; one message may exceed it, when it is alone.
    pub bytes: usize,
    /// Most messages unsettled on one lane.
    pub lane_messages: usize,
    /// How long a lane may be kept after `Revoking`. Handlers get nine tenths of it, those that run
    /// and those of what came before them; the rest is for settling what they did and for the
    /// release.
    pub revoke_timeout: Duration,
}

impl Default for Limits {
    /// 256 a batch, 4,096 messages, 64 MiB, 1,024 a lane, 5 seconds.
    fn default() -> Self {
        Self {
            batch: 256,
            messages: 4096,
            bytes: 64 * 1024 * 1024,
            lane_messages: 1024,
            revoke_timeout: Duration::from_secs(5),
        }
    }
}

impl Limits {
    /// Sets the most messages of one `Delivered`, at least one.
    #[must_use]
    pub fn with_batch(mut self, batch: usize) -> Self {
        self.batch = batch.max(1);
        self
    }

    /// Sets the most unsettled messages over all lanes, at least one.
    #[must_use]
    pub fn with_messages(mut self, messages: usize) -> Self {
        self.messages = messages.max(1);
        self
    }

    /// Sets the most unsettled bytes over all lanes.
    #[must_use]
    pub fn with_bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes;
        self
    }

    /// Sets the most unsettled messages on one lane, at least one.
    #[must_use]
    pub fn with_lane_messages(mut self, messages: usize) -> Self {
        self.lane_messages = messages.max(1);
        self
    }

    /// Sets how long a lane may be kept after `Revoking`.
    #[must_use]
    pub fn with_revoke_timeout(mut self, timeout: Duration) -> Self {
        self.revoke_timeout = timeout;
        self
    }
}

/// What a member wants to read.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Subscription {
    /// The group whose members share the partitions; `None` is a reader of its own that moves no
    /// position (tail, replay).
    pub group: Option<Group>,
    /// The topics.
    pub topics: Vec<Topic>,
    /// Where a new group or a reader begins.
    pub start: Start,
    /// Where a reader ends; `None` goes on.
    pub until: Option<Until>,
    /// How much may be unsettled.
    pub limits: Limits,
}

impl Subscription {
    /// A member of `group`.
    #[must_use]
    pub fn group(group: Group, topics: Vec<Topic>) -> Self {
        Self {
            group: Some(group),
            topics,
            start: Start::default(),
            until: None,
            limits: Limits::default(),
        }
    }

    /// A reader without a group.
    #[must_use]
    pub fn reader(topics: Vec<Topic>) -> Self {
        Self {
            group: None,
            topics,
            start: Start::default(),
            until: None,
            limits: Limits::default(),
        }
    }

    /// Checks what no broker can honour; adapters call it before anything changes.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when no topic is named, `Unsupported` when a group is to end.
    pub fn check(&self) -> Result<()> {
        if self.topics.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "subscribe",
                "no topic is named: give at least one",
            ));
        }
        if self.group.is_some() && self.until.is_some() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "subscribe",
                "a group has no end: read with `Subscription::reader`, or leave `until` out",
            ));
        }
        Ok(())
    }

    /// Sets where a new group or a reader begins.
    #[must_use]
    pub fn with_start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Sets where a reader ends.
    #[must_use]
    pub fn with_until(mut self, until: Until) -> Self {
        self.until = Some(until);
        self
    }

    /// Sets how much may be unsettled.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }
}
