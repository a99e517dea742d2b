//! A bus for tests of services: in memory, with virtual time, and with an end to waiting.

use std::future::Future;
use std::ops::Deref;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use eventbus_core::{
    BoxError, Broker, Clock, Consumer, ConsumerBuilder, DeadLetter, DeadLetters, Dispatch,
    Envelope, Event, EventBus, EventBusBuilder, EventId, MemoryBroker, MemoryConfig,
    MemoryKeyState, MemoryProfile, OUTBOX_LANES, Origin, Outgoing, Relay, Request, Start,
    Timestamp, Unit, Until,
};
use tokio::task::{JoinSet, spawn_blocking, yield_now};
use tokio::time::Instant;
use tower::{Layer, Service};

use crate::faults::{FaultPlan, FaultyBroker};
use crate::simulation::is_silent;

/// An [`EventBus`] in memory whose time stands still until the test moves it.
///
/// Made inside a plain `#[tokio::test]`. Nothing sleeps: [`settled`](Self::settled) counts work,
/// and retries, deadlines and schedules wait for [`advance`](Self::advance) or
/// [`run_out`](Self::run_out). A handler that itself waits for time is work: while the test waits
/// for it, time runs on to the next timer, at no real cost.
///
/// # Databases
///
/// Services with a unit of work on a database are tested on [`with_database`](Self::with_database),
/// and what they publish arrives through a relay that [`relay`](Self::relay) runs:
///
/// ```no_run
/// # use std::sync::Arc;
/// # use eventbus_core::{Context, Event, EventBus, Json, Key, KeyStateStore, LeaseStore, OutboxStore, Relay, Result, Topic, Unit, UnitOfWork, unknown_version};
/// # use eventbus_testkit::TestBus;
/// # #[derive(Clone, serde::Serialize, serde::Deserialize)]
/// # struct OrderCreated { order_id: u64 }
/// # impl Event for OrderCreated {
/// #     const TYPE: &'static str = "OrderCreated";
/// #     const TOPIC: Topic = Topic::from_static("order-events");
/// #     const VERSION: u32 = 1;
/// #     type Codec = Json;
/// #     fn key(&self) -> Option<Key> { Some(Key::display(self.order_id)) }
/// #     fn upcast(version: u32, _: &[u8]) -> Result<Self> { Err(unknown_version::<Self>(version)) }
/// # }
/// # async fn example<S: OutboxStore + LeaseStore + KeyStateStore + UnitOfWork + Unit + Clone>(store: S) -> Result<()> {
/// let test = TestBus::new().with_database();
/// test.relay(Relay::new(&test, Arc::new(store.clone()))).await;
/// let stock = test.consumer("stock").unit(store).on(async |_: OrderCreated, _: Context<(), S>| Ok(()));
/// let stock = test.spawn(stock).await;
/// test.publish(OrderCreated { order_id: 1 }).await?;
/// test.settled().await;
/// # Ok(())
/// # }
/// ```
///
/// # Examples
///
/// ```
/// # use eventbus_core::{BoxError, Context, Event, Json, Key, Result, Topic, unknown_version};
/// # #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
/// # struct OrderCreated { order_id: u64 }
/// # impl Event for OrderCreated {
/// #     const TYPE: &'static str = "OrderCreated";
/// #     const TOPIC: Topic = Topic::from_static("order-events");
/// #     const VERSION: u32 = 1;
/// #     type Codec = Json;
/// #     fn key(&self) -> Option<Key> { Some(Key::display(self.order_id)) }
/// #     fn upcast(version: u32, _: &[u8]) -> Result<Self> { Err(unknown_version::<Self>(version)) }
/// # }
/// use eventbus_testkit::TestBus;
///
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// let test = TestBus::new();
/// let consumer = test
///     .spawn(test.consumer("billing").on(async |_: OrderCreated, _: Context| Ok(())))
///     .await;
/// test.publish(OrderCreated { order_id: 1 }).await?;
/// test.settled().await;
/// assert_eq!(consumer.status().counts.handled, 1);
/// # Ok::<(), eventbus_core::Error>(())
/// # }).unwrap();
/// ```
#[derive(Debug)]
pub struct TestBus {
    bus: EventBus,
    server: MemoryBroker,
    consumed: Mutex<Vec<DeadLetters>>,
    relays: Mutex<JoinSet<()>>,
    /// The client of the bus, where it has faults.
    faulty: Option<FaultyBroker>,
    /// While it is there, a blocking task waits for its end, and tokio's clock for that task.
    standstill: Option<mpsc::Sender<()>>,
}

/// The date of tests: it begins on 1 January 2026 and follows tokio's time.
#[derive(Debug)]
struct TestClock {
    begun: Instant,
}

const BEGINNING: Timestamp = Timestamp::from_micros(1_767_225_600_000_000);

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        BEGINNING.plus(self.begun.elapsed())
    }
}

/// How far [`TestBus::run_out`] goes at most.
const RUN_OUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

impl TestBus {
    /// A bus on a new in-memory broker, with a schedule; stops tokio's clock if it runs.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime with one thread, which `#[tokio::test]` gives.
    #[allow(clippy::new_without_default, reason = "it stops the clock")]
    pub fn new() -> Self {
        Self::like(MemoryProfile::Memory)
    }

    /// As [`new`](Self::new), with the declared capabilities and limits of another broker, so that
    /// what production refuses is refused in the test.
    ///
    /// # Panics
    ///
    /// As [`new`](Self::new).
    pub fn like(profile: MemoryProfile) -> Self {
        Self::wrapping(MemoryConfig::default().like(profile), |server| server)
    }

    /// As [`new`](Self::new), on a server set up as `config` says and reached through what `wrap`
    /// makes of it, such as a broker that fails on demand.
    ///
    /// # Panics
    ///
    /// As [`new`](Self::new).
    pub fn wrapping<B: Broker>(config: MemoryConfig, wrap: impl FnOnce(MemoryBroker) -> B) -> Self {
        Self::build(config, wrap, |bus, _| bus)
    }

    /// As [`new`](Self::new), with a store of held keys: what can't be handled parks its key, and
    /// retries can be delayed.
    ///
    /// # Panics
    ///
    /// As [`new`](Self::new).
    pub fn holding_keys() -> Self {
        Self::build(
            MemoryConfig::default(),
            |server| server,
            |bus, clock| bus.key_state(Arc::new(MemoryKeyState::with_clock(clock))),
        )
    }

    /// As [`new`](Self::new), with a broker on which calls are refused, late, unanswered, done twice
    /// or in part, that is away for a while, and takes lanes away: what this seed decides, a few
    /// faults among the first few dozen calls. It loses nothing, and keeps the order of each lane.
    ///
    /// What a broker may do at any time, a service has to survive: its effects are to be the same for
    /// every seed, when the bus is [healed](Self::heal). [`Simulation`](crate::Simulation) goes
    /// through many seeds, and shrinks the faults of one that fails. Where the test panics, the
    /// faults are printed.
    ///
    /// The test's own [`publish`](EventBus::publish) meets faults, too;
    /// [`publish_surely`](Self::publish_surely) goes on until it is done.
    ///
    /// # Panics
    ///
    /// As [`new`](Self::new).
    pub fn with_faults(seed: u64) -> Self {
        Self::with_plan(FaultPlan::of_seed(seed))
    }

    /// As [`with_faults`](Self::with_faults), with these faults.
    ///
    /// # Panics
    ///
    /// As [`new`](Self::new).
    pub fn with_plan(plan: FaultPlan) -> Self {
        let mut faulty = None;
        let wrap = |server| {
            let client = FaultyBroker::new(server, plan);
            faulty = Some(client.clone());
            client
        };
        let mut test = Self::wrapping(MemoryConfig::default(), wrap);
        test.faulty = faulty;
        test
    }

    fn build<B: Broker>(
        config: MemoryConfig,
        wrap: impl FnOnce(MemoryBroker) -> B,
        set_up: impl FnOnce(EventBusBuilder, Arc<dyn Clock>) -> EventBusBuilder,
    ) -> Self {
        if !is_paused() {
            tokio::time::pause();
        }
        let clock: Arc<dyn Clock> = Arc::new(TestClock {
            begun: Instant::now(),
        });
        let server = MemoryBroker::with(config.with_clock(Arc::clone(&clock)));
        let mut bus = EventBus::builder(wrap(server.clone()))
            .source("test")
            .clock(Arc::clone(&clock));
        if let Some(schedule) = server.schedule() {
            bus = bus.schedule(Arc::new(schedule));
        }
        Self {
            bus: set_up(bus, clock).build(),
            server,
            consumed: Mutex::new(Vec::new()),
            relays: Mutex::new(JoinSet::new()),
            faulty: None,
            standstill: None,
        }
    }

    /// Lets time pass only where the test says so, for handlers that wait for a database: tokio
    /// does not see that one is at work, takes the test for idle, and jumps to the next timer,
    /// which may be the limit of a transaction. A handler that waits for time waits for
    /// [`advance`](Self::advance) then.
    #[must_use]
    pub fn with_database(mut self) -> Self {
        let (standstill, ended) = mpsc::channel::<()>();
        // tokio's clock does not jump while a blocking task runs. This one ends with the sender,
        // which is what its error says.
        drop(spawn_blocking(move || ended.recv()));
        self.standstill = Some(standstill);
        self
    }

    /// Runs a relay, the only one of its outbox, until the bus is dropped:
    /// [`settled`](Self::settled) waits for what it has to publish.
    ///
    /// # Panics
    ///
    /// When its store fails before it runs.
    pub async fn relay(&self, relay: Relay) {
        // Nobody takes over from it, however much time passes.
        let relay = relay.lease_ttl(Duration::MAX);
        let handle = relay.handle();
        let running = async {
            let ended = relay.run_until(std::future::pending()).await;
            ended.expect("the store of a relay works");
        };
        let task = {
            let mut relays = self.relays.lock().unwrap_or_else(PoisonError::into_inner);
            relays.spawn(running)
        };
        while handle.status().lanes.len() < OUTBOX_LANES as usize {
            assert!(!task.is_finished(), "the relay ended before it began");
            yield_now().await;
        }
    }

    /// The bus.
    pub fn bus(&self) -> &EventBus {
        &self.bus
    }

    /// The broker, for faults such as [`MemoryBroker::lose`].
    pub fn broker(&self) -> &MemoryBroker {
        &self.server
    }

    /// Spawns a consumer whose dead letters [`dead_letters`](Self::dead_letters) shows.
    ///
    /// # Panics
    ///
    /// When it is set up wrongly.
    pub async fn spawn<S, U, L>(&self, consumer: ConsumerBuilder<S, U, L>) -> Consumer
    where
        S: Send + Sync + 'static,
        U: Unit,
        L: Layer<Dispatch<S>> + Send,
        L::Service: Service<Request, Response = ()> + Clone + Send + 'static,
        <L::Service as Service<Request>>::Error: Into<BoxError>,
        <L::Service as Service<Request>>::Future: Send,
    {
        let consumer = match consumer.spawn().await {
            Ok(consumer) => consumer,
            Err(error) => panic!("the consumer was refused: {error:?}"),
        };
        let mut consumed = self.consumed.lock().unwrap_or_else(PoisonError::into_inner);
        consumed.push(consumer.dead_letters());
        drop(consumed);
        consumer
    }

    /// Publishes an event until the broker has taken it, as a client does that does not give up: with
    /// the same id each time, and a tenth of a second later.
    ///
    /// # Panics
    ///
    /// When it can't be published at all, and when the broker is away for a day.
    pub async fn publish_surely<E: Event>(&self, event: impl Into<Outgoing<E>>) -> EventId {
        let batch = self.bus.batch(Origin::new());
        let mut batch = batch.expect("a test publishes outside of handlers");
        let id = batch.publish(event).expect("the event can be written");
        let messages = batch.into_messages().into_iter();
        let mut left: Vec<_> = messages.map(|(_, message)| message).collect();
        let begun = Instant::now();
        while let Err(error) = self.bus.publish_messages(left).await {
            assert!(error.is_retryable(), "it is refused for good: {error}");
            assert!(begun.elapsed() < RUN_OUT_MAX, "the broker is away: {error}");
            left = error.into_messages();
            self.pass(Duration::from_millis(100)).await;
        }
        id
    }

    /// Resolves when nothing can go on without time passing: no message is on its way, no handler
    /// runs, no verdict is unsettled, and no [`relay`](Self::relay) has anything to publish. What
    /// waits for a retry, a probe or a paused consumer is left.
    /// A [`Reader`](eventbus_core::Reader) of the test's own has to be read to its end or dropped
    /// before: what is there for it is on its way.
    pub async fn settled(&self) {
        // Who was told of something to do, such as a relay of a commit, gets to know it first.
        yield_now().await;
        loop {
            let mut changed = pin!(self.changed());
            // Registers before it looks, so that no change is missed.
            let already = poll_once(changed.as_mut()).await;
            let faults_are_quiet = self.faulty.as_ref().is_none_or(FaultyBroker::is_quiet);
            if faults_are_quiet && self.bus.activity().is_quiet() && !self.server.deliverable() {
                return;
            }
            if !already {
                changed.await;
            }
        }
    }

    /// Resolves when somebody may have less to do than when this future was first polled.
    async fn changed(&self) {
        match &self.faulty {
            None => self.bus.activity().changed().await,
            Some(faulty) => tokio::select! {
                () = self.bus.activity().changed() => {}
                () = faulty.changed() => {}
            },
        }
    }

    /// Ends all faults of a bus [with faults](Self::with_faults), and lets time pass until nothing
    /// waits for it, as [`run_out`](Self::run_out) does.
    ///
    /// # Panics
    ///
    /// As [`run_out`](Self::run_out).
    pub async fn heal(&self) {
        if let Some(faulty) = &self.faulty {
            faulty.heal();
        }
        self.run_out().await;
    }

    /// Lets time pass, then waits until nothing more can go on.
    pub async fn advance(&self, duration: Duration) {
        self.settled().await;
        let until = Instant::now() + duration;
        // From one timer to the next, so that what one of them starts happens at its own time.
        while let Some(due) = self.bus.activity().next_due()
            && due < until
        {
            self.pass(due.saturating_duration_since(Instant::now()))
                .await;
        }
        self.pass(until.saturating_duration_since(Instant::now()))
            .await;
    }

    async fn pass(&self, duration: Duration) {
        // tokio's timers have a granularity of a millisecond and never fire early.
        tokio::time::advance(duration + Duration::from_millis(1)).await;
        self.settled().await;
    }

    /// Lets time pass until no retry, no probe and no scheduled event is pending.
    ///
    /// # Panics
    ///
    /// When some still are after a day: a blocked key or a held consumer never runs out.
    pub async fn run_out(&self) {
        self.settled().await;
        let end = Instant::now() + RUN_OUT_MAX;
        while let Some(due) = self.bus.activity().next_due() {
            assert!(
                due <= end,
                "retries are still pending after a day: a key is blocked or a consumer holds"
            );
            self.pass(due.saturating_duration_since(Instant::now()))
                .await;
        }
    }

    /// All events of a type that were published so far, in order within each key.
    ///
    /// # Panics
    ///
    /// When one of its topic can't be read, and on a bus like a broker that keeps nothing for
    /// readers, such as RabbitMQ.
    pub async fn published<E: Event>(&self) -> Vec<E> {
        let found = self.published_with_envelopes().await;
        found.into_iter().map(|(_, event)| event).collect()
    }

    /// As [`published`](Self::published), with the envelope of each: its id, cause and correlation.
    ///
    /// # Panics
    ///
    /// As [`published`](Self::published).
    pub async fn published_with_envelopes<E: Event>(&self) -> Vec<(Envelope, E)> {
        let reader = self
            .bus
            .read(&[E::TOPIC], Start::Earliest, Some(Until::Now))
            .await;
        let mut reader = reader.unwrap_or_else(|error| {
            panic!("what was published can't be read again: look at what a consumer got, or use a bus like a broker with `replay`\n{error:?}")
        });
        let mut events = Vec::new();
        while let Some(record) = reader.next().await.expect("the in-memory broker reads on") {
            match self.bus.event::<E>(&record.message) {
                Ok(Some(event)) => {
                    let envelope = self.bus.envelope(&record.message);
                    events.push((envelope.expect("what was read has an envelope"), event));
                }
                Ok(None) => {}
                Err(error) => panic!("a message on {} can't be read: {error:?}", E::TOPIC),
            }
        }
        events
    }

    /// The open dead letters of all consumers spawned here.
    ///
    /// # Panics
    ///
    /// When they can't be read.
    pub async fn dead_letters(&self) -> Vec<DeadLetter> {
        let desks = {
            let consumed = self.consumed.lock().unwrap_or_else(PoisonError::into_inner);
            consumed.clone()
        };
        let mut letters: Vec<DeadLetter> = Vec::new();
        for desk in desks {
            let found = desk.list().await.expect("dead letters can be listed");
            for letter in found {
                if !letters.iter().any(|known| known.id == letter.id) {
                    letters.push(letter);
                }
            }
        }
        letters
    }
}

impl Drop for TestBus {
    fn drop(&mut self) {
        let Some(faulty) = &self.faulty else { return };
        if std::thread::panicking() && !is_silent() {
            let (plan, happened) = (faulty.plan(), faulty.happened());
            eprintln!("TestBus: {plan}\n{happened} of them happened");
        }
    }
}

impl Deref for TestBus {
    type Target = EventBus;

    fn deref(&self) -> &EventBus {
        &self.bus
    }
}

/// Whether tokio's clock stands still: it does not move while the machine's does.
fn is_paused() -> bool {
    let (tokio, machine) = (Instant::now(), std::time::Instant::now());
    while machine.elapsed() < Duration::from_micros(50) {
        std::hint::spin_loop();
    }
    tokio == Instant::now()
}

/// Polls once, to register a waiter; says whether it is over already.
async fn poll_once(mut future: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
    std::future::poll_fn(|cx| std::task::Poll::Ready(future.as_mut().poll(cx).is_ready())).await
}
