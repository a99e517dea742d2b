//! What a handler looks like.

use std::future::Future;
use std::sync::Arc;

use crate::context::Context;
use crate::error::BoxError;
use crate::event::Event;
use crate::unit_of_work::{NoUnit, Unit};

/// Handles the events of one type.
///
/// An `async fn` or closure of the right shape is one:
///
/// ```
/// # use eventbus_core::{BoxError, Context, Event, Json, Key, Result, Topic, unknown_version};
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct OrderCreated { order_id: u64 }
/// async fn created(order: OrderCreated, cx: Context) -> Result<(), BoxError> {
///     println!("order {} on attempt {}", order.order_id, cx.attempt());
///     Ok(())
/// }
/// ```
///
/// # When it does not compile
///
/// - The event and the context are taken by value: `order: OrderCreated`, not `&OrderCreated`.
/// - Both arguments have to be there, and the result is `Result<(), BoxError>`; inside, `?` takes
///   any error.
/// - With `.state(shop)` the context is `Context<Shop>`; with `.shared_state(arc)` too.
/// - A closure captures nothing. What it needs is the consumer's state; or it is written
///   `move |order, cx| { let client = client.clone(); async move { … } }`.
/// - What is held across an `.await` has to be `Send`: no guard of a `std` mutex.
///
/// # Delivery
///
/// Runs are at least once: after a crash or a hand-over an event is handled again. An error or a
/// panic is tried again as the consumer's [`RetryPolicy`](crate::RetryPolicy) says; a run over its
/// deadline is dropped and counts as failed. Dropping stops what the handler awaits; it stops
/// neither tasks that the handler spawned nor code that blocks.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler of `{E}`",
    label = "not a handler",
    note = "a handler is `async |event: {E}, cx: Context<{S}>| {{ …; Ok(()) }}` or `async fn name(event: {E}, cx: Context<{S}>) -> Result<(), BoxError>`",
    note = "a closure must not capture anything: give the consumer `.state(…)` and use `cx.state()`"
)]
pub trait Handler<E: Event, S = (), U: Unit = NoUnit>: Send + Sync + 'static {
    /// Handles one event.
    fn handle(
        &self,
        event: E,
        cx: Context<S, U>,
    ) -> impl Future<Output = Result<(), BoxError>> + Send + 'static;
}

impl<E, S, U, F, Fut> Handler<E, S, U> for F
where
    E: Event,
    U: Unit,
    F: Fn(E, Context<S, U>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), BoxError>> + Send + 'static,
{
    fn handle(
        &self,
        event: E,
        cx: Context<S, U>,
    ) -> impl Future<Output = Result<(), BoxError>> + Send + 'static {
        self(event, cx)
    }
}

/// Handles several events of one type at once.
///
/// Items of one key stand in their order. `Ok` settles every item that was not failed by
/// [`BatchItem::fail`] and does not stand behind a failed one of its key: those come again after
/// it, so that the key keeps its order. An error or a panic fails the call, and each item is then handled by a call
/// of its own, so that one bad item costs nobody else an attempt.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a batch handler of `{E}`",
    label = "not a batch handler",
    note = "a batch handler is `async |items: Vec<BatchItem<{E}, {S}>>| {{ …; Ok(()) }}`"
)]
pub trait BatchHandler<E: Event, S = ()>: Send + Sync + 'static {
    /// Handles some events, at least one.
    fn handle(
        &self,
        items: Vec<BatchItem<E, S>>,
    ) -> impl Future<Output = Result<(), BoxError>> + Send + 'static;
}

impl<E, S, F, Fut> BatchHandler<E, S> for F
where
    E: Event,
    F: Fn(Vec<BatchItem<E, S>>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), BoxError>> + Send + 'static,
{
    fn handle(
        &self,
        items: Vec<BatchItem<E, S>>,
    ) -> impl Future<Output = Result<(), BoxError>> + Send + 'static {
        self(items)
    }
}

/// One event of a batch with its own context and verdict.
#[derive(Debug)]
#[non_exhaustive]
pub struct BatchItem<E, S = ()> {
    /// The event.
    pub event: E,
    /// Its surroundings; what it publishes is sent if this item succeeds.
    pub cx: Context<S>,
}

impl<E, S> BatchItem<E, S> {
    pub(crate) fn new(event: E, cx: Context<S>) -> Self {
        Self { event, cx }
    }

    /// Fails this item; it is tried again as the retry policy says. Later items of its key come
    /// again behind it, and no attempt is counted for them; other keys are not concerned.
    pub fn fail(&self, error: impl Into<BoxError>) {
        Arc::clone(self.cx.scope()).fail(error.into());
    }
}
