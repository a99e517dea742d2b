//! Duplicate windows: handlers without a transaction run once per event, as long as the window is.
//! Here are the contract of stores and what users set up; what a consumer does with its claims is in
//! `consumer/claims.rs`.
//!
//! ```text
//!  delivered ─▶ claim ─▶ granted ─▶ handler ─▶ publish ─▶ mark handled ─▶ settle
//!                 │         ▲ renewed meanwhile   │ failed: release, so that a retry runs at once
//!                 │         └── free again ◀──────┴ crashed: the claim's lease ends
//!                 ├─▶ handled: a duplicate, settled
//!                 └─▶ busy: tried again, in its place, until it is one of the others
//! ```

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::clock::FOREVER;
use crate::envelope::EventId;
use crate::error::Result;
use crate::lease::MemberId;
use crate::memory::MemoryDuplicates;
use crate::message::Group;

/// Events that a store forgot before their window was over, for want of room.
pub const DUPLICATES_FORGOTTEN: &str = "eventbus.duplicates.forgotten";
/// Claims that were not renewed in time, so that somebody else may have handled the same event.
pub const CLAIMS_LOST: &str = "eventbus.duplicates.claims_lost";

/// Remembers which events a group has handled, and who handles one now.
///
/// # Contract
///
/// - Of one event, a group has at most one claim at a time.
/// - Times are counted on the store's own clock from when it served the call.
/// - What was marked as handled is known as handled until its window is over. A store that has to
///   forget earlier, for want of room, counts and logs it.
/// - Groups share nothing. Nothing depends on where an event came from.
/// - What a call says is durable, as far as the store is, when it resolves.
#[async_trait]
pub trait DuplicateStore: Debug + Send + Sync + 'static {
    /// Claims events for a member, or renews its claims: one answer for each id, in their order.
    ///
    /// - An event that is marked as handled stays so.
    /// - One that another member has claimed stays its, until it is marked, released, or the lease is
    ///   over.
    /// - Any other is the asking member's from now on for `lease`, its own included.
    ///
    /// # Cancellation
    ///
    /// A dropped future leaves it unknown whether the claims were made; they end by themselves.
    ///
    /// # Errors
    ///
    /// Nothing was claimed, or it is unknown; asking again does no harm. `RateLimited` where there is
    /// no room for more claims.
    async fn claim(&self, request: &ClaimEvents) -> Result<Vec<EventClaim>>;

    /// Marks events as handled for `window` from now on, whoever has claimed them, and ends the
    /// claims: an effect has happened, also when the claim was lost meanwhile.
    ///
    /// # Errors
    ///
    /// None of them is marked, or it is unknown; marking again does no harm.
    async fn mark_handled(&self, group: &Group, ids: &[EventId], window: Duration) -> Result<()>;

    /// Ends the member's claims, so that others may have these events at once. What is marked as
    /// handled, or claimed by somebody else, stays as it is.
    ///
    /// # Errors
    ///
    /// A claim that was not released ends when its lease is over.
    async fn release(&self, group: &Group, member: MemberId, ids: &[EventId]) -> Result<()>;
}

/// Which events a member would handle.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ClaimEvents {
    /// The group that handles them.
    pub group: Group,
    /// Who asks.
    pub member: MemberId,
    /// The events.
    pub ids: Vec<EventId>,
    /// For how long nobody else may handle them without another call.
    pub lease: Duration,
}

impl ClaimEvents {
    /// Claims events for `lease`.
    #[must_use]
    pub fn new(group: Group, member: MemberId, ids: Vec<EventId>, lease: Duration) -> Self {
        Self {
            group,
            member,
            ids,
            lease,
        }
    }
}

/// Whether a member may handle an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums, reason = "there is no fourth answer")]
pub enum EventClaim {
    /// It may: the claim is its own.
    Granted,
    /// The group has handled it.
    Handled,
    /// Another member is at it.
    Busy {
        /// When the other's lease is over, unless it is renewed.
        free_in: Duration,
    },
}

/// Has the handlers of a consumer run once per event, without a database: for effects elsewhere, such
/// as a payment provider's. Given to [`ConsumerBuilder::duplicate_window`](crate::ConsumerBuilder::duplicate_window).
///
/// An event that the group has handled within the window is settled without running its handler,
/// whether the broker delivered it twice or a publisher sent it twice under one id. The first one
/// claims it; where another member is at it, a duplicate waits in the place of its key, and others
/// go on. What the handler published is on the broker before the event counts as handled.
///
/// # Contract
///
/// - Nothing is lost: an event counts as handled only after its handler succeeded and what it
///   published was taken. Whoever crashes before that leaves a claim that ends with its lease; then
///   the event is handled again, and publishes the same ids again.
/// - **The effect and the mark are not one.** A crash between them, or a member that stands still for
///   longer than its lease, runs the handler again: with the same
///   [`idempotency_key`](crate::Context::idempotency_key), by which what it calls recognises it.
///   Effects in a database of your own are once with a [unit of work](crate::UnitOfWork).
/// - A failed attempt gives its claim up, so that a retry runs at once, here or elsewhere. So does a
///   dead letter: re-driven, it is handled.
/// - While the broker takes nothing, or the store does not answer, the consumer holds; a handler
///   that has succeeded is not run again for it, unless its lane moves, the process ends, or the
///   consumer's [deadline](crate::ConsumerBuilder::deadline) passes while it waits for an answer.
/// - Batch handlers and replays do not go with it, and are refused.
///
/// # Examples
///
/// ```
/// # use eventbus_macros::Event;
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(crate = "eventbus_core", type = "OrderCreated", topic = "order-events", key = "order_id")]
/// # struct OrderCreated { order_id: u64 }
/// use eventbus_core::{BoxError, Context, DuplicateWindow, EventBus, MemoryBroker};
///
/// async fn charge(order: OrderCreated, cx: Context) -> Result<(), BoxError> {
///     println!("charging order {} under {}", order.order_id, cx.idempotency_key());
///     Ok(())
/// }
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let bus = EventBus::new(MemoryBroker::new());
/// let payments = bus
///     .consumer("payments")
///     .duplicate_window(DuplicateWindow::in_memory())
///     .on(charge)
///     .spawn()
///     .await?;
/// payments.shutdown().await?;
/// # Ok::<(), eventbus_core::Error>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct DuplicateWindow {
    pub(crate) store: Arc<dyn DuplicateStore>,
    pub(crate) length: Duration,
    pub(crate) lease: Duration,
}

impl DuplicateWindow {
    /// A window of 24 hours over a store.
    #[must_use]
    pub fn new(store: impl DuplicateStore) -> Self {
        Self::on(Arc::new(store))
    }

    /// As [`new`](Self::new), over a store whose type is known only at run time.
    #[must_use]
    pub fn on(store: Arc<dyn DuplicateStore>) -> Self {
        Self {
            store,
            length: Duration::from_secs(24 * 60 * 60),
            lease: Duration::from_secs(10),
        }
    }

    /// A window of 24 hours that this process remembers, and no other: duplicates that come after a
    /// restart, or to another process, are handled again. Clones remember the same; see
    /// [`MemoryDuplicates`].
    #[must_use]
    pub fn in_memory() -> Self {
        Self::new(MemoryDuplicates::new())
    }

    /// Sets for how long an event counts as handled, from when it was.
    #[must_use]
    pub fn with_length(mut self, length: Duration) -> Self {
        self.length = length.min(FOREVER);
        self
    }

    /// Sets after how long another member takes over an event whose member crashed; by default 10
    /// seconds, at least 30 milliseconds. Claims are renewed three times as often while a handler
    /// runs, however long that is.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease.clamp(Duration::from_millis(30), FOREVER);
        self
    }
}
