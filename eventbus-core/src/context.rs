//! What a handler knows about the event it handles, and what it may do.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Timestamp;
use crate::consumer::scope::Scope;
use crate::delivery::Position;
use crate::envelope::{Envelope, EventId};
use crate::error::Result;
use crate::event::Event;
use crate::message::{Headers, Key, Topic};
use crate::outgoing::Outgoing;
use crate::unit_of_work::{NoUnit, Unit, UnitOfWork, Work};

/// Belongs to one run of a handler: the event's surroundings, the consumer's state, and what the
/// handler publishes.
///
/// `S` is the state given to [`ConsumerBuilder::state`](crate::ConsumerBuilder::state), `U` the unit
/// of work. It is to be dropped when the handler ends: one that is kept beyond that publishes
/// nothing any more, and a transaction kept with it is rolled back and the delivery fails.
///
/// # Examples
///
/// ```
/// # use eventbus_macros::Event;
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(crate = "eventbus_core", type = "OrderCreated", topic = "order-events", key = "order_id")]
/// # struct OrderCreated { order_id: u64 }
/// use eventbus_core::{BoxError, Context, EventBus, MemoryBroker, Outgoing};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// async fn created(order: OrderCreated, cx: Context) -> Result<(), BoxError> {
///     if cx.attempt() > 1 {
///         println!("again: {}", cx.id());
///     }
///     cx.publish(Outgoing::new(OrderCreated { order_id: order.order_id + 1 }).with_metadata("from", "example"))?;
///     Ok(())
/// }
/// let bus = EventBus::new(MemoryBroker::new());
/// let consumer = bus.consumer("chain").on(created).spawn().await?;
/// # consumer.shutdown().await?;
/// # Ok::<(), eventbus_core::Error>(())
/// # }).unwrap();
/// ```
pub struct Context<S = (), U: Unit = NoUnit> {
    scope: Arc<Scope>,
    state: Arc<S>,
    /// Behind a mutex that is never locked, so that a reference to the context may cross an await.
    /// With the number by which it was lent.
    work: Mutex<Option<(Box<dyn Work>, u64)>>,
    unit: std::marker::PhantomData<fn() -> U>,
}

impl<S, U: Unit> Context<S, U> {
    #[inline]
    pub(crate) fn new(scope: Arc<Scope>, state: Arc<S>) -> Self {
        let work = Mutex::new(scope.take_work());
        Self {
            scope,
            state,
            work,
            unit: std::marker::PhantomData,
        }
    }

    pub(crate) fn scope(&self) -> &Arc<Scope> {
        &self.scope
    }

    /// The consumer's state.
    pub fn state(&self) -> &S {
        &self.state
    }

    /// Collects an event to be published when the handler has succeeded: with the same correlation
    /// and metadata, caused by the event handled, and with an id derived from it, so that handling
    /// again publishes the same id again.
    ///
    /// Returns the id it will have. What a failed handler collected is forgotten.
    ///
    /// # Errors
    ///
    /// `InvalidInput` or `Codec` when the event cannot be written or is too large for the broker,
    /// `Unsupported` during a replay, `Closed` when the handler has ended.
    pub fn publish<E: Event>(&self, event: impl Into<Outgoing<E>>) -> Result<EventId> {
        self.scope.publish(event.into())
    }

    /// Collects an event to be published at a time to come: as [`publish`](Self::publish), it is
    /// put into the schedule when the handler has succeeded, before anything else that it collected
    /// is sent, and before the event handled is settled. Handling again while it waits leaves it as
    /// it is, with its time.
    ///
    /// In a unit of work it is committed with the rest, and the relay puts it into the schedule a
    /// moment later: until then [`EventBus::cancel`](crate::EventBus::cancel) does not find it. What
    /// decides whether it still holds is the business: look again when it comes.
    ///
    /// # Errors
    ///
    /// As [`publish`](Self::publish); `Unsupported` where the bus has no schedule. A unit of work
    /// without an outbox ([`MemoryUnit`](crate::MemoryUnit)) refuses when it commits.
    pub fn publish_at<E: Event>(
        &self,
        event: impl Into<Outgoing<E>>,
        time: impl Into<Timestamp>,
    ) -> Result<EventId> {
        self.publish(event.into().with_not_before(time.into()))
    }

    /// Collects an event to be published after `delay`, counted from now; otherwise as
    /// [`publish_at`](Self::publish_at).
    ///
    /// # Errors
    ///
    /// As [`publish_at`](Self::publish_at).
    pub fn publish_after<E: Event>(
        &self,
        event: impl Into<Outgoing<E>>,
        delay: Duration,
    ) -> Result<EventId> {
        let time = self.scope.runtime().bus.clock().now().plus(delay);
        self.publish_at(event, time)
    }

    /// A text that is the same for every attempt of this group at this event, and differs between
    /// groups: pass it to whatever accepts an idempotency key.
    ///
    /// It belongs to the event, not to what the handler does: where the last of two events triggers
    /// an effect, either may come last, and the key of the business (an order's number) is right.
    pub fn idempotency_key(&self) -> String {
        format!("{}/{}", self.scope.group(), self.scope.id())
    }

    /// The event's id.
    pub fn id(&self) -> &EventId {
        self.scope.id()
    }

    /// All that is known about the event apart from its data; read from the message at each call.
    ///
    /// # Errors
    ///
    /// `Codec` when a foreign publisher's envelope is damaged.
    pub fn envelope(&self) -> Result<Envelope> {
        self.scope.envelope()
    }

    /// The message's headers.
    pub fn headers(&self) -> &Headers {
        &self.scope.message().headers
    }

    /// The message's key.
    pub fn key(&self) -> Option<&Key> {
        self.scope.message().key.as_ref()
    }

    /// The topic it was read from.
    pub fn topic(&self) -> &Topic {
        &self.scope.message().topic
    }

    /// The partition it was read from.
    pub fn partition(&self) -> u32 {
        self.scope.partition()
    }

    /// Its place in the partition, where the broker has positions.
    pub fn position(&self) -> Option<Position> {
        self.scope.position()
    }

    /// Which attempt this is, from 1 on.
    pub fn attempt(&self) -> u32 {
        self.scope.attempt()
    }

    /// Whether this is a replay: effects beyond the consumer's own state are out of place.
    pub fn is_replay(&self) -> bool {
        self.scope.is_replay()
    }
}

impl<S: Send + Sync, U: Unit + UnitOfWork> Context<S, U> {
    /// What is written through in the unit of work's transaction, such as a connection; the first
    /// call opens it, so that what takes long and is no part of it comes before.
    ///
    /// Return its error from the handler as it is: it counts no attempt when the store is away, and
    /// is no failure when somebody else has handled the event meanwhile.
    ///
    /// # Errors
    ///
    /// Those of opening the transaction.
    ///
    /// # Panics
    ///
    /// When the unit's [`Work`] gives something else than its [`Unit::Resource`]: a bug of the unit.
    pub async fn transaction(&mut self) -> Result<&mut U::Resource> {
        let work = self.work.get_mut().unwrap_or_else(PoisonError::into_inner);
        let (work, _) = work
            .as_mut()
            .expect("a consumer with a unit lends its work");
        let resource = work.transaction().await?;
        Ok(resource
            .downcast_mut()
            .expect("the work of a unit gives the resource that the unit names"))
    }
}

impl<S, U: Unit> Drop for Context<S, U> {
    #[inline]
    fn drop(&mut self) {
        let work = self.work.get_mut();
        if let Some((work, loan)) = work.unwrap_or_else(PoisonError::into_inner).take() {
            self.scope.return_work(work, loan);
        }
    }
}

impl<S, U: Unit> fmt::Debug for Context<S, U> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("topic", self.topic())
            .field("partition", &self.partition())
            .field("position", &self.position())
            .field("attempt", &self.attempt())
            .finish_non_exhaustive()
    }
}
