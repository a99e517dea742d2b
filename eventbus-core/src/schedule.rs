//! The contract of stores that keep messages until their time comes. Who publishes them is in
//! `schedule/scheduler.rs`, what users say in `scheduled.rs`.
//!
//! ```text
//!  published with a time to come ─▶ add ─▶ [ waits ] ─▶ take ─▶ broker ─▶ done: gone
//!                                              │          ▲        │
//!                                   cancel ◀───┘          └────────┘ away: taken again
//! ```

pub(crate) mod scheduler;

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;

use crate::clock::Timestamp;
use crate::envelope::EventId;
use crate::error::Result;
use crate::lease::{MemberId, ProcessId};
use crate::message::{Key, Message, Topic};

/// Most messages that wait in one schedule; more are `RateLimited`.
pub const SCHEDULED_MAX: u64 = 1_000_000;

/// Keeps messages until their time comes; it belongs to one broker.
///
/// # Contract
///
/// - A message that was added is returned by [`take`](Self::take) until it was cancelled or reported
///   as published: a crash at any point publishes it twice at worst, with the same id.
/// - At most one taker is at it at a time, so that what is due is published in its order.
#[async_trait]
pub trait ScheduleStore: Debug + Send + Sync + 'static {
    /// Adds messages, in this order. All or nothing, durable when it resolves.
    ///
    /// # Contract
    ///
    /// - An id that waits already is passed over, so that a call may be repeated: the message that
    ///   waits stays as it is, with its time.
    ///
    /// # Errors
    ///
    /// `RateLimited` when more than [`SCHEDULED_MAX`] would wait, or more bytes than the store takes.
    async fn add(&self, messages: &[Scheduled]) -> Result<()>;

    /// Removes a message; durable when it resolves. `false` when it does not wait, or was taken: it
    /// may be on the broker.
    async fn cancel(&self, id: &EventId) -> Result<bool>;

    /// Takes what is due, earliest first, in order of adding where times are equal, for
    /// [`done`](Self::done) to report about. Nothing, when another taker is at it.
    ///
    /// # Contract
    ///
    /// - A taker is at it until it reports, takes again, its `ttl` is over, or it is named dead. The
    ///   time is counted on the store's own clock, from when the call was served.
    /// - What was taken and not reported as published is due still; it cannot be cancelled any more.
    /// - A stored message that is damaged is logged and due again later; it holds up no other.
    async fn take(&self, request: &TakeScheduled) -> Result<Taken>;

    /// Removes what was published, makes what was refused due again, in its order, from the time on
    /// that it says, and ends the claim; durable when it resolves. What is in neither is due still.
    /// What was refused is not on the broker, unless it is named as such: it can be cancelled again.
    ///
    /// # Errors
    ///
    /// `Conflict` when the claim has ended: another taker may publish the same messages.
    async fn done(&self, claim: u64, published: &[EventId], refused: &Refused) -> Result<()>;

    /// What waits, in the order of its times, at most `reports_max` behind `after`.
    async fn list(
        &self,
        after: Option<&ScheduledReport>,
        reports_max: usize,
    ) -> Result<Vec<ScheduledReport>>;

    /// Resolves when a message may be due earlier than [`Taken::next`] said, since
    /// [`Taken::version`] was `seen`. It may come without a reason, and it comes every few seconds
    /// where another process can add messages and end before their time.
    async fn changed(&self, seen: u64);
}

/// A message and when it is to be published.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Scheduled {
    /// The event's id, by which it is cancelled.
    pub id: EventId,
    /// When it is published, not before.
    pub not_before: Timestamp,
    /// The message as it will be published.
    pub message: Message,
}

impl Scheduled {
    /// A message for this time.
    #[must_use]
    pub fn new(id: EventId, not_before: Timestamp, message: Message) -> Self {
        Self {
            id,
            not_before,
            message,
        }
    }
}

/// Who takes, and how much.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TakeScheduled {
    /// Who takes.
    pub taker: MemberId,
    /// Its process.
    pub process: ProcessId,
    /// What is due at this time.
    pub now: Timestamp,
    /// For how long nobody else takes, unless the taker reports.
    pub ttl: Duration,
    /// A taker that is certainly dead: it is not at it any more.
    pub dead: Option<MemberId>,
    /// Most messages.
    pub messages_max: usize,
    /// Most bytes of their keys, headers and payloads; one message is taken however large it is.
    pub bytes_max: usize,
}

impl TakeScheduled {
    /// Takes up to 256 messages of 4 MiB together for this process.
    #[must_use]
    pub fn new(taker: MemberId, now: Timestamp, ttl: Duration) -> Self {
        Self {
            taker,
            process: ProcessId::current(),
            now,
            ttl,
            dead: None,
            messages_max: 256,
            bytes_max: 4 * 1024 * 1024,
        }
    }

    /// Sets whose process it is.
    #[must_use]
    pub fn with_process(mut self, process: ProcessId) -> Self {
        self.process = process;
        self
    }

    /// Names a taker that is certainly dead.
    #[must_use]
    pub fn with_dead(mut self, dead: MemberId) -> Self {
        self.dead = Some(dead);
        self
    }

    /// Sets how much is taken at most.
    #[must_use]
    pub fn with_limits(mut self, messages_max: usize, bytes_max: usize) -> Self {
        self.messages_max = messages_max;
        self.bytes_max = bytes_max;
        self
    }
}

/// What [`ScheduleStore::take`] found.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Taken {
    /// What to report under; it has no meaning where no message was taken.
    pub claim: u64,
    /// What to publish now, in its order.
    pub messages: Vec<Scheduled>,
    /// The other taker, when one is at what is due.
    pub busy: Option<BusyTaker>,
    /// When the first of those becomes due that are not due yet.
    pub next: Option<Timestamp>,
    /// How many messages wait, those that are due included.
    pub waiting: u64,
    /// What [`ScheduleStore::changed`] goes by.
    pub version: u64,
}

/// Who is at what is due.
#[derive(Clone, Debug)]
#[allow(
    clippy::exhaustive_structs,
    reason = "a plain triple that stores create"
)]
pub struct BusyTaker {
    /// Who it is.
    pub taker: MemberId,
    /// Its process.
    pub process: ProcessId,
    /// After which time it is not at it any more, unless it takes again.
    pub free_in: Duration,
}

/// What a broker did not take, and what waits behind it, so that it holds up no other.
#[derive(Clone, Debug)]
#[allow(clippy::exhaustive_structs, reason = "a plain triple")]
pub struct Refused {
    /// The messages, in their order.
    pub ids: Vec<EventId>,
    /// Those of them that may be on the broker all the same: they cannot be cancelled.
    pub unknown: Vec<EventId>,
    /// When they are tried again.
    pub again: Timestamp,
}

/// A message that waits, as operators see it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ScheduledReport {
    /// Its number in the order of adding.
    pub number: u64,
    /// The event's id.
    pub id: EventId,
    /// When it is published; later than was asked for where the broker refused it.
    pub due: Timestamp,
    /// Where to, by the name that the topic has on the broker.
    pub topic: Topic,
    /// Its key.
    pub key: Option<Key>,
    /// The event's type, where a header says it.
    pub event_type: Option<String>,
    /// Bytes of key, headers and payload.
    pub bytes: usize,
    /// Whether it was taken, and cannot be cancelled any more.
    pub is_taken: bool,
}

impl ScheduledReport {
    /// A report about a message that waits under a number.
    #[must_use]
    pub fn new(number: u64, scheduled: &Scheduled) -> Self {
        let message = &scheduled.message;
        let event_type = message.headers.get_str(crate::header::TYPE);
        Self {
            number,
            id: scheduled.id.clone(),
            due: scheduled.not_before,
            topic: message.topic.clone(),
            key: message.key.clone(),
            event_type: event_type.map(str::to_owned),
            bytes: message.size(),
            is_taken: false,
        }
    }

    /// Sets when it is published.
    #[must_use]
    pub fn with_due(mut self, due: Timestamp) -> Self {
        self.due = due;
        self
    }

    /// Sets its size.
    #[must_use]
    pub fn with_bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes;
        self
    }

    /// Sets that it was taken.
    #[must_use]
    pub fn with_taken(mut self) -> Self {
        self.is_taken = true;
        self
    }
}
