//! The keys that wait for a group, for operators: what is held, and what is to become of it.

use std::sync::Arc;

use crate::bus::EventBus;
use crate::error::{Error, ErrorKind, Result};
use crate::key_state::{HeldMessage, HeldPlace, HeldReport, KeyAction, KeyDecision, KeyStateStore};
use crate::message::{Group, Key, Topic};

/// Most names that [`HeldKeys::list`] returns, and most messages that [`HeldKeys::messages`] does.
pub const HELD_LIST_MAX: usize = 10_000;

/// How many are asked for at once.
const PAGE: usize = 500;

/// The keys that are held for one group, parked or until a delayed attempt; made by
/// [`EventBus::held_keys`].
///
/// A decision is recorded in the store and carried out by the member that has the key's partition,
/// in any process, at once or when there is one.
///
/// # Examples
///
/// ```
/// # use eventbus_macros::Event;
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(crate = "eventbus_core", type = "OrderCreated", topic = "order-events", key = "order_id")]
/// # struct OrderCreated { order_id: u64 }
/// use std::sync::Arc;
/// use eventbus_core::{Context, EventBus, MemoryBroker, MemoryKeyState, RetryPolicy};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let bus = EventBus::builder(MemoryBroker::new())
///     .key_state(Arc::new(MemoryKeyState::new()))
///     .build();
/// let billing = bus
///     .consumer("billing")
///     .on(async |_: OrderCreated, _: Context| Err("no printer".into()))
///     .retry(RetryPolicy::none())
///     .spawn()
///     .await?;
/// bus.publish(OrderCreated { order_id: 42 }).await?;
///
/// let held = bus.held_keys("billing")?;
/// while held.list().await?.is_empty() {
///     tokio::task::yield_now().await;
/// }
/// let parked = held.list().await?.remove(0);
/// assert_eq!((parked.wait.error.as_str(), parked.messages), ("no printer", 1));
/// assert!(held.release(&parked.held, "ann", "printed by hand").await?);
/// # billing.shutdown().await?;
/// # Ok::<(), eventbus_core::Error>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct HeldKeys {
    bus: EventBus,
    store: Arc<dyn KeyStateStore>,
    group: Group,
}

impl HeldKeys {
    pub(crate) fn new(bus: EventBus, store: Arc<dyn KeyStateStore>, group: Group) -> Self {
        Self { bus, store, group }
    }

    /// The group whose keys these are.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// What is held, at most [`HELD_LIST_MAX`] names.
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub async fn list(&self) -> Result<Vec<HeldReport>> {
        let mut reports: Vec<HeldReport> = Vec::new();
        while reports.len() < HELD_LIST_MAX {
            let after = reports.last().map(|last| last.held.clone());
            let page = self.store.list(&self.group, after.as_ref(), PAGE).await?;
            if page.is_empty() {
                break;
            }
            reports.extend(page);
        }
        Ok(reports)
    }

    /// Where a key of a topic is held; `None` when it is not.
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub async fn find(&self, topic: &Topic, key: &Key) -> Result<Option<HeldReport>> {
        let topic = self.bus.topic(topic)?;
        let mut after: Option<HeldPlace> = None;
        loop {
            let page = self.store.list(&self.group, after.as_ref(), PAGE).await?;
            let Some(last) = page.last() else {
                return Ok(None);
            };
            after = Some(last.held.clone());
            let is_wanted = |report: &HeldReport| {
                report.held.place.topic == topic && report.held.name.key() == Some(key)
            };
            if let Some(found) = page.into_iter().find(is_wanted) {
                return Ok(Some(found));
            }
        }
    }

    /// The messages of one name in their order, at most [`HELD_LIST_MAX`].
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub async fn messages(&self, held: &HeldPlace) -> Result<Vec<HeldMessage>> {
        let mut messages: Vec<HeldMessage> = Vec::new();
        while messages.len() < HELD_LIST_MAX {
            let after = messages.last().map(|last| last.number);
            let page = self.store.messages(&self.group, held, after, PAGE).await?;
            if page.is_empty() {
                break;
            }
            messages.extend(page);
        }
        Ok(messages)
    }

    /// Lets all messages of a name be handled, in their order, the first with its attempts anew.
    /// `by` says who decided, `because` why. `false` when it is not held, or an earlier decision
    /// about it was not carried out yet.
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub async fn retry(&self, held: &HeldPlace, by: &str, because: &str) -> Result<bool> {
        self.decide(held, KeyAction::Retry, by, because).await
    }

    /// Makes the first message of a name a dead letter, and lets those behind it be handled, in
    /// their order. Otherwise as [`retry`](Self::retry).
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub async fn release(&self, held: &HeldPlace, by: &str, because: &str) -> Result<bool> {
        self.decide(held, KeyAction::Release, by, because).await
    }

    /// Makes all messages of a name dead letters. Otherwise as [`retry`](Self::retry).
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub async fn discard(&self, held: &HeldPlace, by: &str, because: &str) -> Result<bool> {
        self.decide(held, KeyAction::Discard, by, because).await
    }

    /// Decides what becomes of a name, for tools to which that is a value: as
    /// [`retry`](Self::retry), [`release`](Self::release) or [`discard`](Self::discard).
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub async fn decide(
        &self,
        held: &HeldPlace,
        action: KeyAction,
        by: &str,
        because: &str,
    ) -> Result<bool> {
        let decision = KeyDecision::new(action, by, because, self.bus.clock().now());
        let decided = self.store.decide(&self.group, held, &decision).await?;
        self.bus.wake_keepers();
        Ok(decided)
    }
}

/// Says that a bus has nowhere to hold keys, and what else there is.
pub(crate) fn no_key_state(operation: &'static str, alternative: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        operation,
        format!(
            "this bus has no store of held keys: connect to sqlite://…, name one beside the broker (`EventBusConfig::store`), or set one up with `EventBus::builder(…).key_state(…)`{alternative}"
        ),
    )
}
