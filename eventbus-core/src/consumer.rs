//! The consumer: what a team sets up, and the runtime behind it.
//!
//! ```text
//!  pump ─▶ worker inbox by hash(key) ─▶ slot: retry [ unit [ layers [ decode ▶ handler ] ] ] ─▶ settler
//!   ▲                                        │ no attempt left, undecodable, no handler          │
//!   │                                        └─▶ dead letter stored durably ─▶ then settled      │
//!   └───────────────── credit in messages and bytes, kept by the broker's half ◀─────────────────┘
//! ```

use std::fmt;
use std::hash::BuildHasher;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use foldhash::fast::FixedState;
use tokio::sync::Notify;
use tower::layer::util::{Identity, Stack};
use tower::{Layer, Service};

use crate::broker::AdminRequest;
use crate::bus::EventBus;
use crate::clock::FOREVER;
use crate::dead_letter::{self, Cause};
use crate::delivery::{Lane, Limits, Start, Subscription};
use crate::duplicates::DuplicateWindow;
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::event::Event;
use crate::handler::{BatchHandler, Handler};
use crate::held_keys::no_key_state;
use crate::message::{Group, Key, Message, Topic};
use crate::retry::RetryPolicy;
use crate::topic::TopicSpec;
use crate::unit_of_work::{NoUnit, Unit, UnitOfWork};

pub(crate) mod backoff;
mod claims;
mod departure;
pub(crate) mod dispatch;
mod gate;
pub(crate) mod held;
mod keys;
mod lanes;
mod pump;
mod replay;
mod run;
mod running;
pub(crate) mod scope;
mod settler;
pub(crate) mod slots;
mod telemetry;
mod worker;

pub use dispatch::{Dispatch, DispatchFuture, Request};
pub use gate::Breaker;
pub use lanes::LaneStatus;
pub use replay::{Replay, ReplayReport};
pub use running::{Consumer, ConsumerState, ConsumerStatus};
pub use telemetry::{
    BLOCKED_KEYS, CONSUMED_MESSAGES, Counts, DEAD_LETTERS, DUPLICATES, FAILED_ATTEMPTS, GAPS,
    HANDLED, HELD_MESSAGES, OPERATION_DURATION, PROCESS_DURATION, SCHEDULE_LATENESS,
    SCHEDULED_WAITING, SENT_MESSAGES, SKIPPED,
};

use claims::Claims;
use dispatch::{Batch, ErasedHandler, Single};
use gate::Gate;
use held::HeldLanes;
use lanes::Lanes;
use scope::Scope;
use telemetry::Telemetry;

/// What happens to a message that can't be handled: its attempts are used up, it can't be decoded,
/// or there is no handler for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnPoison {
    /// Its key is put aside with it: later messages of the key wait behind it, in order and through
    /// restarts, until an operator decides by [`HeldKeys`](crate::HeldKeys). The default where the
    /// bus has a store of held keys. A message without a key becomes a dead letter.
    ParkKey,
    /// It becomes a dead letter, and later messages of its key go on: the default where keys can't
    /// be held.
    SkipKey,
    /// It is never settled: it is tried again at the longest time of the retry policy, at least a
    /// second apart, and its key waits behind it. Its partition stops when its window is full, and
    /// the consumer's status says so.
    BlockKey,
}

/// How a consumer behaves, apart from its handlers.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) retry: RetryPolicy,
    /// `None` is as the bus can.
    on_poison: Option<OnPoison>,
    pub(crate) breaker: Breaker,
    pub(crate) deadline: Duration,
    pub(crate) concurrency: usize,
    pub(crate) workers: usize,
    pub(crate) skip_others: bool,
    pub(crate) start: Start,
    pub(crate) limits: Limits,
    pub(crate) hand_outs_max: u32,
    pub(crate) shutdown_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            retry: RetryPolicy::default(),
            on_poison: None,
            breaker: Breaker::default(),
            deadline: Duration::from_secs(60),
            concurrency: 64,
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            skip_others: false,
            start: Start::default(),
            limits: Limits::default(),
            hand_outs_max: 100,
            shutdown_timeout: Duration::from_secs(25),
        }
    }
}

impl Settings {
    /// What happens to poison, if that and the delays of the retry policy can be honoured.
    fn on_poison(&self, keys_can_be_held: bool) -> Result<OnPoison> {
        if keys_can_be_held {
            return Ok(self.on_poison.unwrap_or(OnPoison::ParkKey));
        }
        if self.on_poison == Some(OnPoison::ParkKey) {
            let alternative = ", or take `OnPoison::SkipKey` or `BlockKey`";
            return Err(no_key_state("spawn consumer that parks keys", alternative));
        }
        if self.retry.has_delays() && !self.retry.is_out_of_order() {
            let alternative =
                ", or let later messages of a key go on with `RetryPolicy::out_of_order`";
            return Err(no_key_state(
                "spawn consumer with delayed attempts",
                alternative,
            ));
        }
        Ok(self.on_poison.unwrap_or(OnPoison::SkipKey))
    }

    /// As set, with `Duration::MAX` and the like as long as can be waited.
    fn within_forever(mut self) -> Self {
        for duration in [
            &mut self.deadline,
            &mut self.shutdown_timeout,
            &mut self.limits.revoke_timeout,
            &mut self.breaker.probe_after,
            &mut self.breaker.probe_after_max,
        ] {
            *duration = FOREVER.min(*duration);
        }
        self
    }
}

/// What all parts of one consumer share.
#[derive(Debug)]
pub(crate) struct Runtime {
    pub(crate) group: Group,
    pub(crate) bus: EventBus,
    /// What is consumed, by the names that the bus takes.
    pub(crate) topics: Vec<Topic>,
    /// The same by the names on the broker, with the prefix of the environment.
    pub(crate) broker_topics: Vec<Topic>,
    pub(crate) settings: Settings,
    pub(crate) unit: Option<Arc<dyn UnitOfWork>>,
    /// Where the consumer has a duplicate window, which one with a unit has not.
    pub(crate) claims: Option<Arc<Claims>>,
    pub(crate) replay: Option<Replay>,
    pub(crate) on_poison: OnPoison,
    /// Where the bus has a store of held keys, and this is no replay.
    pub(crate) held: Option<Arc<HeldLanes>>,
    pub(crate) gate: Gate,
    pub(crate) lanes: Lanes,
    /// Whether the consumer ends, and nothing more is passed to its workers. Locked while they are
    /// told something, so that all of them hear everything in the same order.
    ending: Mutex<bool>,
    pub(crate) telemetry: Telemetry,
    handlers: Vec<Registered>,
    hasher: FixedState,
    failure: OnceLock<Mutex<Option<Error>>>,
    failed: Notify,
}

/// What routing has to know about a handler.
#[derive(Debug)]
struct Registered {
    event_type: &'static str,
    /// How many events one call takes; `None` for a handler of single events.
    batch_max: Option<usize>,
}

impl Runtime {
    #[inline]
    pub(crate) fn hash_key(&self, key: &Key) -> u64 {
        self.hasher.hash_one(key.as_bytes())
    }

    /// Which of so many workers handles a key.
    pub(crate) fn worker_of_key(&self, key: &Key, workers: usize) -> usize {
        // The low bits choose among a worker's keys; these are independent of them.
        (self.hash_key(key) >> 32) as usize % workers
    }

    /// By what a message is queued.
    #[inline]
    pub(crate) fn key_hash(&self, message: &Message) -> Option<u64> {
        message.key.as_ref().map(|key| self.hash_key(key))
    }

    /// Whether runs may hold several deliveries.
    pub(crate) fn has_groups(&self) -> bool {
        self.unit.as_ref().is_some_and(|unit| unit.group_max() > 1)
            || self
                .handlers
                .iter()
                .any(|handler| handler.batch_max.is_some())
    }

    #[inline]
    pub(crate) fn handler_of(&self, event_type: &str) -> Option<usize> {
        self.handlers
            .iter()
            .position(|handler| handler.event_type == event_type)
    }

    #[inline]
    fn handler(&self, scope: &Scope) -> Option<&Registered> {
        scope.route().map(|route| &self.handlers[route.handler])
    }

    /// Whether the handler takes several events in one call.
    #[inline]
    pub(crate) fn is_batch(&self, scope: &Scope) -> bool {
        self.handler(scope)
            .is_some_and(|handler| handler.batch_max.is_some())
    }

    /// How many deliveries one run with this one may hold.
    #[inline]
    pub(crate) fn batch_max(&self, scope: &Scope) -> usize {
        match &self.unit {
            Some(unit) => unit.group_max().max(1),
            None => self
                .handler(scope)
                .and_then(|handler| handler.batch_max)
                .unwrap_or(1),
        }
    }

    /// Whether two deliveries may be part of one run: in a transaction any, in a call of a batch
    /// handler those of one type.
    pub(crate) fn may_share_run(&self, one: &Scope, other: &Scope) -> bool {
        self.unit.is_some()
            || one.route().map(|route| route.handler) == other.route().map(|route| route.handler)
    }

    pub(crate) fn ending(&self) -> MutexGuard<'_, bool> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets lanes that are not ours any more.
    pub(crate) fn close_lanes(&self, lanes: &[Lane]) {
        self.lanes.close(lanes);
        if let Some(held) = &self.held {
            held.close(lanes);
        }
    }

    /// Ends the consumer: an error came that trying again does not help against.
    pub(crate) fn fail(&self, error: Error) {
        tracing::error!(group = %self.group, error = ?error, "consumer failed");
        let place = self.failure.get_or_init(|| Mutex::new(None));
        let mut failure = place.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(error);
        self.failed.notify_one();
    }

    pub(crate) fn fail_replay(&self, scope: &Scope, cause: &Cause) {
        let mut error = Error::new(
            ErrorKind::Conflict,
            "replay",
            format!("an event could not be handled: {cause}"),
        )
        .with("topic", &scope.message().topic)
        .with("partition", scope.partition());
        if let Some(position) = scope.position() {
            error = error.with("position", position);
        }
        self.fail(error);
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failure.get().is_some()
    }

    pub(crate) fn take_failure(&self) -> Option<Error> {
        let mut failure = self
            .failure
            .get()?
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        failure.take()
    }

    pub(crate) fn failure_text(&self) -> Option<String> {
        let failure = self
            .failure
            .get()?
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        failure.as_ref().map(Error::to_string)
    }

    pub(crate) async fn failed(&self) {
        self.failed.notified().await;
    }
}

/// Sets up a consumer: handlers, state, and how failures are met. Made by [`EventBus::consumer`].
///
/// Order is kept per key over all types and attempts; different keys run concurrently.
///
/// # Examples
///
/// ```
/// # use eventbus_macros::Event;
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(crate = "eventbus_core", type = "OrderCreated", topic = "order-events", key = "order_id")]
/// # struct OrderCreated { order_id: u64 }
/// use std::time::Duration;
/// use eventbus_core::{Context, EventBus, MemoryBroker, OnPoison, RetryPolicy};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let bus = EventBus::new(MemoryBroker::new());
/// let consumer = bus
///     .consumer("billing")
///     .state(String::from("invoice"))
///     .on(async |order: OrderCreated, cx: Context<String>| {
///         println!("{} for order {}", cx.state(), order.order_id);
///         Ok(())
///     })
///     .retry(RetryPolicy::exponential(5, Duration::from_millis(100), Duration::from_secs(10)))
///     .on_poison(OnPoison::SkipKey)
///     .concurrency(16)
///     .spawn()
///     .await?;
/// consumer.shutdown().await?;
///
/// // What is set up wrongly is refused before anything runs.
/// let refused = bus.consumer("billing").spawn().await;
/// assert!(refused.unwrap_err().to_string().contains("at least one handler"));
/// # Ok::<(), eventbus_core::Error>(())
/// # }).unwrap();
/// ```
#[must_use = "nothing is consumed until `.spawn().await`"]
pub struct ConsumerBuilder<S = (), U: Unit = NoUnit, L = Identity> {
    bus: EventBus,
    group: String,
    state: Arc<S>,
    handlers: Vec<Arc<dyn ErasedHandler<S>>>,
    topics: Vec<Topic>,
    unit: Option<Arc<dyn UnitOfWork>>,
    window: Option<DuplicateWindow>,
    layer: L,
    settings: Settings,
    /// The first thing that was set up wrongly; told when it is spawned.
    mistake: Option<Error>,
    unit_type: PhantomData<fn() -> U>,
}

impl ConsumerBuilder {
    pub(crate) fn new(bus: EventBus, group: &str) -> Self {
        Self {
            bus,
            group: group.to_owned(),
            state: Arc::new(()),
            handlers: Vec::new(),
            topics: Vec::new(),
            unit: None,
            window: None,
            layer: Identity::new(),
            settings: Settings::default(),
            mistake: None,
            unit_type: PhantomData,
        }
    }
}

impl<U: Unit, L> ConsumerBuilder<(), U, L> {
    /// Gives all handlers a state, found as [`Context::state`](crate::Context::state). Comes before the handlers.
    pub fn state<S: Send + Sync + 'static>(self, state: S) -> ConsumerBuilder<S, U, L> {
        self.shared_state(Arc::new(state))
    }

    /// As [`state`](Self::state), with a state that others hold, too.
    pub fn shared_state<S: Send + Sync + 'static>(self, state: Arc<S>) -> ConsumerBuilder<S, U, L> {
        let mistake = match self.handlers.is_empty() {
            true => self.mistake,
            false => Some(misuse("`.state(…)` comes before `.on(…)`")),
        };
        ConsumerBuilder {
            bus: self.bus,
            group: self.group,
            state,
            handlers: Vec::new(),
            topics: Vec::new(),
            unit: self.unit,
            window: self.window,
            layer: self.layer,
            settings: self.settings,
            mistake,
            unit_type: PhantomData,
        }
    }
}

impl<S: Send + Sync + 'static, L> ConsumerBuilder<S, NoUnit, L> {
    /// Handles every event in a transaction: what handlers write, the record that the event was
    /// handled, and what they publish commit together. Comes before the handlers.
    pub fn unit<U: UnitOfWork + Unit>(self, unit: U) -> ConsumerBuilder<S, U, L> {
        let mistake = match self.handlers.is_empty() {
            true => self.mistake,
            false => Some(misuse("`.unit(…)` comes before `.on(…)`")),
        };
        ConsumerBuilder {
            bus: self.bus,
            group: self.group,
            state: self.state,
            handlers: Vec::new(),
            topics: Vec::new(),
            unit: Some(Arc::new(unit)),
            window: self.window,
            layer: self.layer,
            settings: self.settings,
            mistake,
            unit_type: PhantomData,
        }
    }

    /// Runs handlers once per event within a window, for effects that no transaction of ours holds,
    /// such as a payment provider's. With a [`unit`](Self::unit) there is no need for it.
    pub fn duplicate_window(mut self, window: DuplicateWindow) -> Self {
        self.window = Some(window);
        self
    }

    /// Handles the events of one more type, up to `batch_max` at once: as many as are there, none
    /// is waited for.
    pub fn on_batch<E: Event, H: BatchHandler<E, S>>(
        mut self,
        batch_max: usize,
        handler: H,
    ) -> Self {
        if batch_max == 0 {
            self.mistake = Some(misuse("a batch holds at least one event"));
        }
        self.register(
            E::TYPE,
            E::TOPIC,
            Arc::new(Batch::new(handler, batch_max.max(1))),
        )
    }
}

impl<S: Send + Sync + 'static, U: Unit, L> ConsumerBuilder<S, U, L> {
    /// Handles the events of one more type. Types of one topic stay in order per key.
    pub fn on<E: Event, H: Handler<E, S, U>>(self, handler: H) -> Self {
        self.register(E::TYPE, E::TOPIC, Arc::new(Single::<E, H, U>::new(handler)))
    }

    fn register(
        mut self,
        event_type: &'static str,
        topic: Topic,
        handler: Arc<dyn ErasedHandler<S>>,
    ) -> Self {
        if self
            .handlers
            .iter()
            .any(|other| other.event_type() == event_type)
        {
            self.mistake = Some(
                misuse(
                    "an event type has one handler per consumer: of several versions handle the newest and name the older one in #[event(from = …)], for a second handler use another group",
                )
                .with("type", event_type),
            );
        }
        if !self.topics.contains(&topic) {
            self.topics.push(topic);
        }
        self.handlers.push(handler);
        self
    }

    /// Sets what happens after a failed attempt; by default five attempts within 1.5 seconds.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.settings.retry = policy;
        self
    }

    /// Sets what happens to a message that can't be handled. By default its key is parked where the
    /// bus has a store of held keys, and it becomes a dead letter elsewhere.
    pub fn on_poison(mut self, on_poison: OnPoison) -> Self {
        self.settings.on_poison = Some(on_poison);
        self
    }

    /// Sets when the consumer holds because it would only fail.
    pub fn breaker(mut self, breaker: Breaker) -> Self {
        self.settings.breaker = breaker;
        self
    }

    /// Sets how long one run of a handler may take before it is dropped and counts as failed; by
    /// default 60 seconds. It is checked by a coarse tick: up to a second late.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.settings.deadline = deadline;
        if deadline.is_zero() {
            self.mistake = Some(misuse("a deadline is longer than zero"));
        }
        self
    }

    /// Sets how many handlers run at once, over all workers; by default 64.
    pub fn concurrency(mut self, runs: usize) -> Self {
        self.settings.concurrency = runs;
        if runs == 0 {
            self.mistake = Some(misuse("a concurrency of at least one is needed"));
        }
        self
    }

    /// Sets how many tasks share the handlers, by key; by default one per core.
    pub fn workers(mut self, workers: usize) -> Self {
        self.settings.workers = workers;
        if workers == 0 {
            self.mistake = Some(misuse("at least one worker is needed"));
        }
        self
    }

    /// Passes over events of types that have no handler here, and counts them. Without it they are
    /// poison, parked or dead-lettered, because they may have been meant for this consumer.
    pub fn skip_others(mut self) -> Self {
        self.settings.skip_others = true;
        self
    }

    /// Sets where the group begins when it is new; by default with the oldest message there is.
    pub fn start(mut self, start: Start) -> Self {
        self.settings.start = start;
        self
    }

    /// Sets how much may be in flight.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.settings.limits = limits;
        self
    }

    /// Sets how often a message may be handed out without a verdict, where the broker counts, before
    /// it is taken for poison because handling it seems to end the process; by default 100. Hand-overs
    /// between members count, too.
    pub fn hand_outs_max(mut self, times: u32) -> Self {
        self.settings.hand_outs_max = times;
        if times == 0 {
            self.mistake = Some(misuse("a message has to be handed out at least once"));
        }
        self
    }

    /// Sets how long a shutdown may take for running handlers, and for what has to be handled so that
    /// [nothing is handled twice](crate::Consumer::shutdown); by default 25 seconds.
    pub fn shutdown_timeout(mut self, timeout: Duration) -> Self {
        self.settings.shutdown_timeout = timeout;
        self
    }

    /// Wraps every run in a [`tower::Layer`]; the first one added is the outermost. Within a retry:
    /// each attempt passes through all layers.
    ///
    /// Of tower's own, `TimeoutLayer` and `ConcurrencyLimitLayer` work; waiting for a permit counts
    /// towards the [`deadline`](Self::deadline), so bound handlers by
    /// [`concurrency`](Self::concurrency) where that is enough. Load shedding does not belong here:
    /// it would turn pressure into dead letters.
    pub fn layer<M>(self, layer: M) -> ConsumerBuilder<S, U, Stack<M, L>> {
        ConsumerBuilder {
            bus: self.bus,
            group: self.group,
            state: self.state,
            handlers: self.handlers,
            topics: self.topics,
            unit: self.unit,
            window: self.window,
            layer: Stack::new(layer, self.layer),
            settings: self.settings,
            mistake: self.mistake,
            unit_type: PhantomData,
        }
    }

    /// Joins the group and starts handling.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when it was set up wrongly, `Unsupported` when the broker cannot honour it,
    /// and those of joining. Nothing runs then.
    pub async fn spawn(self) -> Result<Consumer>
    where
        L: Layer<Dispatch<S>> + Send,
        L::Service: Service<Request, Response = ()> + Clone + Send + 'static,
        <L::Service as Service<Request>>::Error: Into<BoxError>,
        <L::Service as Service<Request>>::Future: Send,
    {
        let parts = self.check(None)?;
        create_dead_letter_topics(&parts.runtime).await?;
        let subscription = Subscription::group(
            parts.runtime.group.clone(),
            parts.runtime.broker_topics.clone(),
        )
        .with_start(parts.runtime.settings.start)
        .with_limits(parts.runtime.settings.limits);
        running::start(parts.runtime, subscription, parts.service).await
    }

    /// Handles what is on the topics already, within bounds, apart from any group: nothing is
    /// settled, published or dead-lettered. Resolves when the end is reached.
    ///
    /// The same handlers serve live and replayed events; [`Context::is_replay`](crate::Context::is_replay) tells them apart.
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn); and `Conflict` with topic, partition and position when an event
    /// can't be handled after all its attempts: the replay stops there.
    ///
    /// # Cancellation
    ///
    /// A dropped future stops the replay; handlers that run are dropped.
    pub async fn replay(self, replay: Replay) -> Result<ReplayReport>
    where
        L: Layer<Dispatch<S>> + Send,
        L::Service: Service<Request, Response = ()> + Clone + Send + 'static,
        <L::Service as Service<Request>>::Error: Into<BoxError>,
        <L::Service as Service<Request>>::Future: Send,
    {
        let limits = self.settings.limits;
        let parts = self.check(Some(replay.clone()))?;
        let subscription = replay.subscription(parts.runtime.broker_topics.clone(), limits);
        replay::run(running::start(parts.runtime, subscription, parts.service).await?).await
    }

    fn check(self, replay: Option<Replay>) -> Result<Parts<L::Service>>
    where
        L: Layer<Dispatch<S>>,
    {
        if let Some(mistake) = self.mistake {
            return Err(mistake.with("group", self.group));
        }
        let group = Group::new(&self.group)?;
        if self.handlers.is_empty() {
            return Err(
                misuse("a consumer has at least one handler: add `.on(…)`").with("group", group)
            );
        }
        if replay.is_some() && (self.unit.is_some() || self.window.is_some()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "replay",
                "a unit of work or a duplicate window would take replayed events for duplicates: replay into a consumer without one",
            )
            .with("group", group));
        }
        if self.window.is_some() {
            self.check_window()
                .map_err(|error| error.with("group", &group))?;
        }
        let mut settings = self.settings.within_forever();
        if replay.is_some() {
            // It ends with the first event that can't be handled: holding would only hide which.
            settings.breaker = settings.breaker.with_failure_rate(f64::INFINITY);
        }
        let Limits {
            batch,
            messages,
            lane_messages,
            ..
        } = settings.limits;
        if [batch, messages, lane_messages].contains(&0) {
            return Err(misuse(
                "a limit of zero messages would never deliver one: allow at least one",
            )
            .with("group", group));
        }
        // More never run at once: each has its message in flight.
        settings.concurrency = settings.concurrency.min(messages);
        if self.unit.as_ref().is_some_and(|unit| unit.group_max() > 1) {
            // One transaction at a time per worker; it holds several events.
            settings.concurrency = settings.workers;
        }
        let key_state = self.bus.key_state().filter(|_| replay.is_none());
        let on_poison = match replay {
            // It ends instead.
            Some(_) => OnPoison::SkipKey,
            None => settings
                .on_poison(key_state.is_some())
                .map_err(|error| error.with("group", &group))?,
        };
        let held = key_state.map(|store| {
            let part = self.bus.shared_activity().part();
            Arc::new(HeldLanes::new(Arc::clone(store), part))
        });
        let claims = self.window.map(|window| {
            let part = self.bus.shared_activity().part();
            Arc::new(Claims::new(window, group.clone(), part))
        });
        let topics = self.bus.topics(&self.topics)?;
        for topic in &topics {
            dead_letter::topic_of(topic, &group).map_err(|error| {
                misuse("the names of topic and group are too long for the name of the dead-letter topic: shorten one")
                    .with_source(error)
            })?;
        }
        let handlers = self
            .handlers
            .iter()
            .map(|handler| Registered {
                event_type: handler.event_type(),
                batch_max: handler.batch_max(),
            })
            .collect();
        let runtime = Runtime {
            telemetry: Telemetry::new(self.bus.capabilities().system, &group),
            group,
            bus: self.bus,
            topics: self.topics,
            broker_topics: topics,
            unit: self.unit,
            claims,
            replay,
            on_poison,
            held,
            gate: Gate::new(settings.breaker),
            lanes: Lanes::default(),
            ending: Mutex::new(false),
            settings,
            handlers,
            hasher: FixedState::default(),
            failure: OnceLock::new(),
            failed: Notify::new(),
        };
        Ok(Parts {
            runtime: Arc::new(runtime),
            service: self.layer.layer(Dispatch::new(self.handlers, self.state)),
        })
    }
}

impl<S: Send + Sync + 'static, U: Unit, L> ConsumerBuilder<S, U, L> {
    /// What does not go with a duplicate window.
    fn check_window(&self) -> Result<()> {
        if self.unit.is_some() {
            return Err(misuse(
                "a unit of work finds duplicates itself: leave `.duplicate_window(…)` out",
            ));
        }
        let is_batch = |handler: &Arc<dyn ErasedHandler<S>>| handler.batch_max().is_some();
        if self.handlers.iter().any(is_batch) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "spawn consumer",
                "a duplicate window holds single events: handle them with `.on(…)`, or in a consumer without one",
            ));
        }
        Ok(())
    }
}

/// A consumer that was checked.
struct Parts<V> {
    runtime: Arc<Runtime>,
    service: V,
}

/// So that a missing permission shows now and not with the first dead letter.
async fn create_dead_letter_topics(runtime: &Runtime) -> Result<()> {
    if runtime.on_poison == OnPoison::BlockKey {
        return Ok(());
    }
    let specs = runtime
        .broker_topics
        .iter()
        .map(|topic| {
            let name = dead_letter::topic_of(topic, &runtime.group)?;
            Ok(TopicSpec::new(name).with_partitions(1))
        })
        .collect::<Result<_>>()?;
    let request = AdminRequest::ApplyTopics(specs);
    let applied = runtime.bus.broker().admin(request).await;
    applied
        .map(|_| ())
        .map_err(|error| error.with("for the dead letters of", &runtime.group))
}

impl<S, U: Unit, L> fmt::Debug for ConsumerBuilder<S, U, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsumerBuilder")
            .field("group", &self.group)
            .field("topics", &self.topics)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

fn misuse(message: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, "spawn consumer", message)
}
