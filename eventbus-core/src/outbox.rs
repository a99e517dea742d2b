//! The contract of stores that hold what was committed and is to be published.
//!
//! ```text
//!  business transaction: [ writes │ append ] ─▶ commit ─▶ next ─▶ broker ─▶ remove
//!                                                          └─ one relay a lane, by lease ─┘
//! ```

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;

use crate::clock::Timestamp;
use crate::envelope::EventId;
use crate::error::Result;
use crate::message::{Key, Message};
use crate::topic::partition_of;

/// How many lanes an outbox has: as many relays can share it. Part of the stored form.
pub const OUTBOX_LANES: u32 = 16;

/// Bytes of messages that an answer of [`OutboxStore::next`] may always have: only of more may a store
/// leave some for the next one.
pub const OUTBOX_BYTES_MIN: usize = 1024 * 1024;

/// The lane of an outbox on which a message waits: that of its key, or of its id where it has none.
///
/// # Examples
///
/// ```
/// use eventbus_core::{EventId, Key, OUTBOX_LANES, outbox_lane};
///
/// let key = Key::from("order-42");
/// assert_eq!(outbox_lane(Some(&key), &EventId::new()), outbox_lane(Some(&key), &EventId::new()));
/// assert!(outbox_lane(None, &EventId::new()) < OUTBOX_LANES);
/// ```
#[must_use]
pub fn outbox_lane(key: Option<&Key>, id: &EventId) -> u32 {
    match key {
        Some(key) => partition_of(key, OUTBOX_LANES),
        None => partition_of(&Key::display(id), OUTBOX_LANES),
    }
}

/// Holds committed messages until they are on the broker: what a relay needs.
/// How messages get in, in a transaction of the business, is the store's own.
#[async_trait]
pub trait OutboxStore: fmt::Debug + Send + Sync + 'static {
    /// The messages that are next on these lanes but those at the positions `except`, at most
    /// `messages_max` over all lanes; lanes with messages get even shares.
    ///
    /// # Contract
    ///
    /// - `except` may name what is removed at the same time.
    /// - Of each lane from its first message on and in order: of two transactions that wrote one
    ///   key one after the other, the messages of the first come first.
    ///   So they are if the second wrote when the first had committed, or had waited for a lock of it.
    /// - Only what is committed. None is left out for good, however late its transaction commits.
    /// - An answer with less than a share for one lane (`messages_max / lanes.len()`, rounded down)
    ///   and less than [`OUTBOX_BYTES_MIN`] is all there is: [`appended`](Self::appended) tells of
    ///   what may be published afterwards.
    ///
    /// # Errors
    ///
    /// A retryable error says that the store is away.
    async fn next(
        &self,
        lanes: &[u32],
        messages_max: usize,
        except: &[u64],
    ) -> Result<Vec<OutboxMessage>>;

    /// Removes messages, by their positions, that are on the broker or held elsewhere. Those that
    /// are gone are passed over. All or nothing, durable when it resolves.
    async fn remove(&self, positions: &[u64]) -> Result<()>;

    /// Resolves when something may have been appended since this future was first polled: soon
    /// after a commit of this process, within a quarter of a second after one of another. It may
    /// resolve for nothing.
    async fn appended(&self);

    /// How much waits; of a lane with very much, maybe less than there is.
    async fn depth(&self) -> Result<OutboxDepth>;
}

/// A message that waits to be published.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct OutboxMessage {
    /// Its place: later ones of its lane have greater ones.
    pub position: u64,
    /// Its lane.
    pub lane: u32,
    /// Its event's id.
    pub id: EventId,
    /// What is published.
    pub message: Message,
}

impl OutboxMessage {
    /// A message at a place.
    #[must_use]
    pub fn new(position: u64, lane: u32, id: EventId, message: Message) -> Self {
        Self {
            position,
            lane,
            id,
            message,
        }
    }
}

/// How much waits in an outbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OutboxDepth {
    /// How many committed messages each lane holds, by its number; lanes without any are left out.
    pub lanes: Vec<(u32, u64)>,
    /// When the oldest of them was appended.
    pub oldest: Option<Timestamp>,
    /// For how long a transaction has been open that holds messages back, where there is one.
    pub held_back: Option<Duration>,
}

impl OutboxDepth {
    /// Nothing waits.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many messages wait over all lanes.
    pub fn messages(&self) -> u64 {
        self.lanes.iter().map(|(_, messages)| messages).sum()
    }
}
