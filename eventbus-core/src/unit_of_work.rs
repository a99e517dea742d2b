//! The contract by which a handler's writes, its duplicate check and what it publishes commit
//! together.

use std::any::Any;
use std::fmt::Debug;

use async_trait::async_trait;

use crate::delivery::{Position, Receipt};
use crate::envelope::EventId;
use crate::error::{BoxError, Result};
use crate::message::{Group, Message, Topic};

/// Opens transactions that hold what handling events changes.
///
/// ```text
///  begin ─▶ [ record ids │ handler 1 … handler n │ outgoing ] ─▶ commit ─▶ settle
///            duplicate? skip its handler            any error: roll back, one at a time
/// ```
///
/// A unit whose commits hold one event opens its transaction when the handler first asks for it, so
/// that none is open while a handler asks another service something first.
#[async_trait]
pub trait UnitOfWork: Debug + Send + Sync + 'static {
    /// Most events one commit may hold. 1: the handlers of a worker run concurrently, each with
    /// its own [`Work`].
    fn group_max(&self) -> usize;

    /// Finds out which of these events the group has handled. Where a commit may hold several, it
    /// opens the transaction and records all ids in one statement.
    ///
    /// # Cancellation
    ///
    /// A dropped future leaves nothing behind.
    ///
    /// # Errors
    ///
    /// A retryable error pauses the consumer and counts no attempt.
    async fn begin(&self, group: &Group, events: &[InboxEntry]) -> Result<Box<dyn Work>>;
}

/// An event that a unit of work records as handled by a group.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct InboxEntry {
    /// The event's id: with the group, what makes a duplicate.
    pub id: EventId,
    /// Where it came from.
    pub topic: Topic,
    /// Its partition.
    pub partition: u32,
    /// Its place there, where the broker has positions.
    pub position: Option<Position>,
    /// What it is settled by.
    pub receipt: Receipt,
}

/// A transaction, open or to be opened: all or nothing. Dropping it rolls back.
#[async_trait]
pub trait Work: Debug + Send + 'static {
    /// Whether the event at `index` was handled by this group before: its handler is not run, or,
    /// when that came to light only as the transaction was opened, what it did is rolled back.
    fn is_duplicate(&self, index: usize) -> bool;

    /// What handlers write through, such as a connection: opens the transaction, and records the
    /// ids first of all, unless that was done. They borrow it; none can commit it.
    ///
    /// # Errors
    ///
    /// The transaction cannot be opened, or the event was handled meanwhile by somebody else.
    async fn transaction(&mut self) -> Result<&mut (dyn Any + Send)>;

    /// Commits the writes, the ids and what is to be published.
    ///
    /// # Errors
    ///
    /// Nothing was committed, or it is unknown whether it was: in both cases the events are
    /// handled again, and are duplicates if it was.
    async fn commit(self: Box<Self>, outgoing: Vec<Message>) -> Result<Committed>;

    /// Rolls back, because a handler failed; with the error, where it returned one.
    ///
    /// # Errors
    ///
    /// A retryable one says that the store, not the handler, is why: it was away when the
    /// transaction was to be opened, is now, or had no room for what the handler wrote. The
    /// consumer pauses and counts no attempt.
    async fn roll_back(self: Box<Self>, error: Option<&BoxError>) -> Result<()>;
}

/// What a commit held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums, reason = "there is no third answer")]
pub enum Committed {
    /// The deliveries are settled next.
    SettleNext,
    /// The commit held the group's positions too: nothing is passed to
    /// [`Settlement::settle`](crate::Settlement::settle), so the unit has told the member by
    /// [`InboxEntry::receipt`] that the credit is free.
    Settled,
}

/// A [`UnitOfWork`] that says what handlers find in [`Context::transaction`](crate::Context::transaction).
pub trait Unit: Send + Sync + 'static {
    /// What handlers write through.
    type Resource: Send + 'static;
}

/// No unit of work: what a handler published is sent when it succeeded, then its event is settled.
#[derive(Clone, Copy, Debug, Default)]
#[allow(clippy::exhaustive_structs, reason = "it has nothing to add")]
pub struct NoUnit;

impl Unit for NoUnit {
    type Resource = ();
}
