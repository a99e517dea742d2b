//! What a broker that errs, a future that is dropped or a value at its limit must not do.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use eventbus_core::{
    AdminReply, AdminRequest, Assignment, BoxError, Breaker, Broker, Capabilities, Committed,
    Context, Deliveries, Delivery, Error, ErrorKind, Event, EventBus, Group, InboxEntry, Json, Key,
    Lane, Limits, Member, MemoryBroker, Message, OnError, PublishError, Publisher, Receipt,
    Redrive, Replay, Result, RetryPolicy, Settlement, Signal, Start, Subscriber, Subscription,
    Topic, Unit, UnitOfWork, Until, Work, unknown_version,
};
use eventbus_testkit::{TestBus, within};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Instant;

#[derive(Debug, Serialize, Deserialize)]
struct Placed {
    order: u64,
}

impl Event for Placed {
    const TYPE: &'static str = "Placed";
    const TOPIC: Topic = Topic::from_static("orders");
    const VERSION: u32 = 1;
    type Codec = Json;

    fn key(&self) -> Option<Key> {
        Some(Key::display(self.order))
    }

    fn upcast(version: u32, _: &[u8]) -> Result<Self> {
        Err(unknown_version::<Self>(version))
    }
}

const SECOND: Duration = Duration::from_secs(1);

fn placed(order: u64) -> Placed {
    Placed { order }
}

/// Fails while it says so, and notes the ids it was asked to handle.
#[derive(Debug, Default)]
struct Desk {
    broken: AtomicBool,
    ids: Mutex<Vec<String>>,
}

impl Desk {
    fn broken() -> Arc<Self> {
        let desk = Self::default();
        desk.broken.store(true, Ordering::SeqCst);
        Arc::new(desk)
    }

    fn mend(&self) {
        self.broken.store(false, Ordering::SeqCst);
    }

    fn break_again(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }

    fn ids(&self) -> Vec<String> {
        self.ids.lock().expect("nobody panics").clone()
    }
}

async fn noting(_: Placed, cx: Context<Desk>) -> Result<(), BoxError> {
    let desk = cx.state();
    desk.ids
        .lock()
        .expect("nobody panics")
        .push(cx.id().to_string());
    match desk.broken.load(Ordering::SeqCst) {
        true => Err("broken".into()),
        false => Ok(()),
    }
}

// ---- dead letters

#[tokio::test]
async fn a_foreign_event_keeps_the_id_of_its_body_through_a_redrive() {
    let test = TestBus::new();
    let desk = Desk::broken();
    let consumer = test.consumer("billing").shared_state(Arc::clone(&desk));
    let consumer = consumer.on(noting).retry(RetryPolicy::none());
    let consumer = test.spawn(consumer).await;
    let body = r#"{"eventId":"order-7","eventType":"Placed","data":{"order":7}}"#;
    let foreign = Message::new(Placed::TOPIC, body).with_key("7");
    test.broker()
        .publish(vec![foreign])
        .await
        .expect("there is room");
    test.settled().await;
    desk.mend();
    let redriven = consumer.dead_letters().redrive(Redrive::all()).await;
    assert_eq!(redriven.expect("letters can be re-driven").done, 1);
    test.settled().await;
    assert_eq!(desk.ids(), ["order-7", "order-7"]);
}

#[tokio::test]
async fn an_event_that_fails_again_after_its_letter_was_decided_has_an_open_letter() {
    let test = TestBus::new();
    let desk = Desk::broken();
    let billing = || {
        let consumer = test.consumer("billing").shared_state(Arc::clone(&desk));
        consumer.on(noting).retry(RetryPolicy::none())
    };
    let consumer = test.spawn(billing()).await;
    test.publish(placed(1)).await.expect("there is room");
    test.settled().await;
    desk.mend();
    let desk_of_letters = consumer.dead_letters();
    desk_of_letters
        .discard(Redrive::all().because("was a test"))
        .await
        .expect("letters can be discarded");
    assert!(test.dead_letters().await.is_empty());
    consumer.shutdown().await.expect("it ends");
    // Everything is handled anew, and the same event fails again.
    let reset = AdminRequest::ResetGroup {
        group: Group::from_static("billing"),
        topic: Placed::TOPIC,
        to: Start::Earliest,
    };
    test.broker()
        .admin(reset)
        .await
        .expect("nobody is a member");
    desk.break_again();
    let _consumer = test.spawn(billing()).await;
    test.settled().await;
    assert_eq!(test.dead_letters().await.len(), 1);
}

#[tokio::test]
async fn a_damaged_record_among_dead_letters_hides_none_of_the_others() {
    let test = TestBus::new();
    let consumer = test.consumer("billing").shared_state(Desk::broken());
    let consumer = consumer.on(noting).retry(RetryPolicy::none());
    let consumer = test.spawn(consumer).await;
    test.publish(placed(1)).await.expect("there is room");
    test.settled().await;
    for (name, value) in [("eb-dlq-id", ""), ("eb-dlq-id", "without anything else")] {
        let headers = eventbus_core::Headers::builder().push(name, value);
        let damaged = Message::new(Topic::from_static("orders.billing.dlq"), "?")
            .with_headers(headers.expect("within limits").build());
        test.broker()
            .publish(vec![damaged])
            .await
            .expect("there is room");
    }
    let letters = consumer.dead_letters().list().await;
    assert_eq!(letters.expect("the sound one is listed").len(), 1);
}

#[tokio::test]
async fn groups_whose_letters_share_a_topic_see_their_own() {
    #[derive(Debug, Serialize, Deserialize)]
    struct Regional {}
    impl Event for Regional {
        const TYPE: &'static str = "Regional";
        const TOPIC: Topic = Topic::from_static("orders.eu");
        const VERSION: u32 = 1;
        type Codec = Json;
        fn key(&self) -> Option<Key> {
            None
        }
        fn upcast(version: u32, _: &[u8]) -> Result<Self> {
            Err(unknown_version::<Self>(version))
        }
    }
    let test = TestBus::new();
    let first = test.consumer("eu.billing").retry(RetryPolicy::none());
    let first = first.on(async |_: Placed, _: Context| Err("first".into()));
    let first = test.spawn(first).await;
    let second = test.consumer("billing").retry(RetryPolicy::none());
    let second = second.on(async |_: Regional, _: Context| Err("second".into()));
    let second = test.spawn(second).await;
    test.publish(placed(1)).await.expect("there is room");
    test.publish(Regional {}).await.expect("there is room");
    test.settled().await;
    for (consumer, error) in [(&first, "first"), (&second, "second")] {
        let letters = consumer.dead_letters().list().await.expect("listed");
        let errors: Vec<_> = letters.iter().map(|letter| letter.error.as_str()).collect();
        assert_eq!(errors, [error]);
    }
}

// ---- a broker whose settlements fail

/// Wraps the in-memory broker; settling fails on demand.
#[derive(Clone, Debug)]
struct Unsettling {
    inner: MemoryBroker,
    /// How many settlements fail from now on, and how.
    failing: Arc<AtomicUsize>,
    kind: ErrorKind,
    /// How closing a member goes.
    closing: Closing,
}

#[derive(Clone, Copy, Debug)]
enum Closing {
    Works,
    Hangs,
    Fails,
}

impl Unsettling {
    fn new(kind: ErrorKind, closing: Closing) -> Self {
        Self {
            inner: MemoryBroker::new(),
            failing: Arc::default(),
            kind,
            closing,
        }
    }

    fn fail(&self, times: usize) {
        self.failing.store(times, Ordering::SeqCst);
    }
}

#[async_trait]
impl Publisher for Unsettling {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        self.inner.publish(batch).await
    }
}

#[async_trait]
impl Subscriber for Unsettling {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        let member = self.inner.subscribe(subscription).await?;
        let settlement = Wrapped(member.settlement, self.clone());
        let deliveries = Wrapped(member.deliveries, self.clone());
        Ok(Member::new(Box::new(deliveries), Box::new(settlement)))
    }
}

#[async_trait]
impl Broker for Unsettling {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        self.inner.admin(request).await
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}

#[derive(Debug)]
struct Wrapped<T>(T, Unsettling);

#[async_trait]
impl Deliveries for Wrapped<Box<dyn Deliveries>> {
    async fn next(&mut self) -> Result<Signal> {
        self.0.next().await
    }

    async fn close(self: Box<Self>) -> Result<()> {
        match self.1.closing {
            Closing::Works => self.0.close().await,
            Closing::Hangs => std::future::pending().await,
            Closing::Fails => Err(Error::new(
                ErrorKind::Unavailable,
                "close",
                "nobody answers",
            )),
        }
    }
}

#[async_trait]
impl Settlement for Wrapped<Box<dyn Settlement>> {
    async fn settle(&mut self, settled: &[Receipt]) -> Result<()> {
        let less = |failing: usize| failing.checked_sub(1);
        let (set, get) = (Ordering::SeqCst, Ordering::SeqCst);
        if self.1.failing.fetch_update(set, get, less).is_ok() {
            return Err(Error::new(self.1.kind, "settle", "as the test asked for"));
        }
        self.0.settle(settled).await
    }

    async fn release(&mut self, lanes: &[Lane]) -> Result<()> {
        self.0.release(lanes).await
    }
}

#[tokio::test]
async fn a_reader_whose_settlement_failed_still_gives_every_message() {
    let broker = Unsettling::new(ErrorKind::Unavailable, Closing::Works);
    let bus = EventBus::new(broker.clone());
    for number in 0..20 {
        bus.publish(placed(number)).await.expect("there is room");
    }
    let topics = [Placed::TOPIC];
    let reader = bus.read(&topics, Start::Earliest, Some(Until::Now)).await;
    let mut reader = reader.expect("there is a history");
    broker.fail(1);
    let mut seen = 0;
    let mut failures = 0;
    loop {
        match reader.next().await {
            Ok(Some(_)) => seen += 1,
            Ok(None) => break,
            Err(error) if error.is_retryable() => failures += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!((seen, failures), (20, 1));
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_cannot_settle_leaves_nobody_waiting_for_quiet() {
    let broker = Unsettling::new(ErrorKind::Unauthorized, Closing::Works);
    let bus = EventBus::new(broker.clone());
    let consumer = bus
        .consumer("billing")
        .on(async |_: Placed, _: Context| Ok(()));
    let consumer = consumer.spawn().await.expect("it is set up well");
    broker.fail(usize::MAX);
    for number in 0..10 {
        bus.publish(placed(number)).await.expect("there is room");
        tokio::time::sleep(SECOND).await;
    }
    assert!(bus.activity().is_quiet());
    let error = consumer.shutdown().await.expect_err("it has failed");
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
}

#[tokio::test(start_paused = true)]
async fn what_ended_a_consumer_is_told_although_closing_fails_too() {
    let broker = Unsettling::new(ErrorKind::Unauthorized, Closing::Fails);
    let bus = EventBus::new(broker.clone());
    let consumer = bus
        .consumer("billing")
        .on(async |_: Placed, _: Context| Ok(()));
    let consumer = consumer.spawn().await.expect("it is set up well");
    broker.fail(1);
    bus.publish(placed(1)).await.expect("there is room");
    tokio::time::sleep(SECOND).await;
    let error = consumer.shutdown().await.expect_err("it has failed");
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_ends_although_the_broker_does_not_answer() {
    let broker = Unsettling::new(ErrorKind::Unavailable, Closing::Hangs);
    let bus = EventBus::new(broker);
    let consumer = bus
        .consumer("billing")
        .on(async |_: Placed, _: Context| Ok(()));
    let consumer = consumer.shutdown_timeout(5 * SECOND).spawn().await;
    let consumer = consumer.expect("it is set up well");
    let error = within(60 * SECOND, consumer.shutdown()).await;
    assert_eq!(
        error.expect_err("nobody answered").kind(),
        ErrorKind::Timeout
    );
}

// ---- time

#[tokio::test]
async fn a_handler_that_never_rests_is_dropped_at_its_deadline() {
    let test = TestBus::new();
    let consumer = test.consumer("billing").workers(1);
    let consumer = consumer.retry(RetryPolicy::none()).deadline(10 * SECOND);
    let consumer = consumer.on(async |_: Placed, _: Context| {
        std::future::poll_fn(|cx| {
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await
    });
    let consumer = test.spawn(consumer).await;
    test.publish(placed(1)).await.expect("there is room");
    for _ in 0..100 {
        tokio::time::advance(SECOND).await;
        tokio::task::yield_now().await;
    }
    assert_eq!(consumer.status().counts.dead_lettered, 1);
}

#[tokio::test]
async fn the_longest_duration_means_never() {
    let test = TestBus::new();
    let consumer = test
        .consumer("billing")
        .deadline(Duration::MAX)
        .shutdown_timeout(Duration::MAX)
        .limits(Limits::default().with_revoke_timeout(Duration::MAX))
        .breaker(Breaker::default().with_probe_after(Duration::MAX, Duration::MAX))
        .retry(
            RetryPolicy::fixed(2, Duration::MAX).when(|error: &Error| match error.kind() {
                ErrorKind::Conflict => OnError::After(Duration::MAX),
                _ => OnError::Next,
            }),
        )
        .on(async |placed: Placed, _: Context| match placed.order {
            0 => Ok(()),
            1 => Err(Error::new(ErrorKind::Conflict, "handle", "later").into()),
            _ => Err("later".into()),
        });
    let consumer = test.spawn(consumer).await;
    for order in 0..3 {
        test.publish(placed(order)).await.expect("there is room");
    }
    test.settled().await;
    let other = test
        .consumer("billing")
        .on(async |_: Placed, _: Context| Ok(()));
    let other = test.spawn(other).await;
    test.settled().await;
    let handled = consumer.status().counts.handled;
    consumer.shutdown().await.expect("it ends");
    test.settled().await;
    assert_eq!(handled + other.status().counts.handled, 3);
    other.shutdown().await.expect("it ends");
}

/// An error with a bug of its own.
#[derive(Debug)]
struct Unprintable;

impl std::fmt::Display for Unprintable {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        panic!("a bug")
    }
}

impl std::error::Error for Unprintable {}

#[tokio::test]
async fn a_panic_in_a_rule_or_in_an_error_s_text_costs_its_event_and_not_the_consumer() {
    let test = TestBus::new();
    let consumer = test
        .consumer("billing")
        .retry(RetryPolicy::immediate(2).when(|_: &Error| -> OnError { panic!("a bug") }))
        .on(async |placed: Placed, _: Context| match placed.order {
            0 => Ok(()),
            1 => Err(Error::new(ErrorKind::Conflict, "handle", "no").into()),
            _ => Err(Unprintable.into()),
        });
    let consumer = test.spawn(consumer).await;
    for order in [1, 2, 0] {
        test.publish(placed(order)).await.expect("there is room");
    }
    test.settled().await;
    let counts = consumer.status().counts;
    assert_eq!((counts.handled, counts.dead_lettered), (1, 2));
}

#[tokio::test]
async fn a_replay_of_events_that_all_fail_ends_with_their_error() {
    let test = TestBus::new();
    for number in 0..200 {
        test.publish(placed(number)).await.expect("there is room");
    }
    let replay = test
        .consumer("read-model")
        .on(async |_: Placed, _: Context| Err("broken".into()))
        .replay(Replay::from(Start::Earliest));
    let error = within(600 * SECOND, replay).await;
    assert_eq!(
        error.expect_err("nothing can be handled").kind(),
        ErrorKind::Conflict
    );
}

/// Notes when the handler that holds it ends.
struct Ends(Arc<Mutex<Vec<(&'static str, Instant)>>>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0
            .lock()
            .expect("nobody panics")
            .push(("ended", Instant::now()));
    }
}

type Notes = Arc<Mutex<Vec<(&'static str, Instant)>>>;

async fn hang(_: Placed, cx: Context<Notes>) -> Result<(), BoxError> {
    let _ends = Ends(Arc::clone(cx.state()));
    std::future::pending().await
}

async fn begin(_: Placed, cx: Context<Notes>) -> Result<(), BoxError> {
    let mut notes = cx.state().lock().expect("nobody panics");
    notes.push(("begun", Instant::now()));
    Ok(())
}

#[tokio::test]
async fn a_handler_is_dropped_before_the_next_owner_begins() {
    let test = TestBus::new();
    let notes = Notes::default();
    let hanging = test.consumer("billing").state(Arc::clone(&notes)).on(hang);
    let _hanging = test.spawn(hanging).await;
    for order in 0..40 {
        test.publish(placed(order)).await.expect("there is room");
    }
    tokio::time::sleep(SECOND).await;
    let start = Instant::now();
    let next = test.consumer("billing").state(Arc::clone(&notes)).on(begin);
    let _next = test.spawn(next).await;
    tokio::time::sleep(20 * SECOND).await;
    let notes = notes.lock().expect("nobody panics").clone();
    let begun = notes.iter().position(|note| note.0 == "begun");
    let (before, after) = notes.split_at(begun.expect("some were handled"));
    assert!(!before.is_empty(), "handlers were dropped");
    assert!(after.iter().all(|note| note.0 == "begun"), "{after:?}");
    let timeout = Limits::default().revoke_timeout;
    assert!(
        before[0].1 < start + timeout,
        "the lanes were released in time"
    );
}

// ---- a broker that says what the test tells it to

/// Hands its one member the signals it is given.
#[derive(Debug)]
struct Scripted {
    inner: MemoryBroker,
    signals: Mutex<Option<UnboundedReceiver<Signal>>>,
}

fn scripted() -> (Scripted, UnboundedSender<Signal>) {
    let (sender, receiver) = unbounded_channel();
    let inner = MemoryBroker::new();
    let signals = Mutex::new(Some(receiver));
    (Scripted { inner, signals }, sender)
}

#[async_trait]
impl Publisher for Scripted {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        self.inner.publish(batch).await
    }
}

#[async_trait]
impl Subscriber for Scripted {
    async fn subscribe(&self, _: Subscription) -> Result<Member> {
        let signals = self.signals.lock().expect("nobody panics").take();
        let signals = signals.expect("there is one member");
        Ok(Member::new(Box::new(Script(signals)), Box::new(Nobody)))
    }
}

#[async_trait]
impl Broker for Scripted {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        self.inner.admin(request).await
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}

#[derive(Debug)]
struct Script(UnboundedReceiver<Signal>);

#[async_trait]
impl Deliveries for Script {
    async fn next(&mut self) -> Result<Signal> {
        match self.0.recv().await {
            Some(signal) => Ok(signal),
            None => std::future::pending().await,
        }
    }

    async fn close(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct Nobody;

#[async_trait]
impl Settlement for Nobody {
    async fn settle(&mut self, _: &[Receipt]) -> Result<()> {
        Ok(())
    }

    async fn release(&mut self, _: &[Lane]) -> Result<()> {
        Ok(())
    }
}

/// A payload that says how many messages are left of it.
struct Counted {
    _alive: Arc<()>,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        br#"{"event_type":"Placed","order":1}"#
    }
}

#[tokio::test(start_paused = true)]
async fn a_paused_consumer_keeps_nothing_of_lanes_that_come_and_go() {
    let (broker, signals) = scripted();
    let bus = EventBus::new(broker);
    let consumer = bus.consumer("billing").workers(1);
    let consumer = consumer.on(async |_: Placed, _: Context| Ok(()));
    let consumer = consumer.spawn().await.expect("it is set up well");
    consumer.pause();
    let alive = Arc::new(());
    let deliver = |lane: Lane, count: u64| {
        let deliveries = (0..count).map(|tag| {
            let payload = Bytes::from_owner(Counted {
                _alive: Arc::clone(&alive),
            });
            let message = Message::new(Placed::TOPIC, payload).with_key(Key::display(tag));
            Delivery::new(message, Receipt { lane, tag })
        });
        let assignment = Assignment::new(lane, Placed::TOPIC, lane.id);
        let tell = |signal| signals.send(signal).expect("the member hears");
        tell(Signal::Assigned(vec![assignment]));
        tell(Signal::Delivered(deliveries.collect()));
    };
    deliver(Lane { id: 0, epoch: 1 }, 1);
    for epoch in 1..=20 {
        let lane = Lane { id: 1, epoch };
        deliver(lane, 50);
        tokio::time::sleep(SECOND).await;
        let revoking = Signal::Revoking(vec![lane]);
        signals.send(revoking).expect("the member hears");
        tokio::time::sleep(SECOND).await;
    }
    assert_eq!(Arc::strong_count(&alive) - 1, 1, "only one is in flight");
    assert_eq!(consumer.status().lanes.len(), 1);
    consumer.shutdown().await.expect("it ends");
}

// ---- contexts that are kept

/// What contexts that outlive their handler were answered.
type Answers = Arc<Mutex<Vec<std::result::Result<(), ErrorKind>>>>;

#[derive(Debug, Serialize, Deserialize)]
struct Paid {
    attempt: u32,
}

impl Event for Paid {
    const TYPE: &'static str = "Paid";
    const TOPIC: Topic = Topic::from_static("payments");
    const VERSION: u32 = 1;
    type Codec = Json;

    fn key(&self) -> Option<Key> {
        None
    }

    fn upcast(version: u32, _: &[u8]) -> Result<Self> {
        Err(unknown_version::<Self>(version))
    }
}

/// Publishes from a task of its own, a second late.
fn publish_late(cx: Context<Answers>) {
    tokio::spawn(async move {
        tokio::time::sleep(SECOND).await;
        let attempt = cx.attempt();
        let answer = cx.publish(Paid { attempt }).map(|_| ());
        let answer = answer.map_err(|error| error.kind());
        cx.state().lock().expect("nobody panics").push(answer);
    });
}

#[tokio::test]
async fn a_context_kept_beyond_its_handler_does_not_pretend_to_publish() {
    let test = TestBus::new();
    let answers = Answers::default();
    let consumer = test.consumer("billing").state(Arc::clone(&answers));
    let consumer = consumer.on(async |_: Placed, cx: Context<Answers>| {
        publish_late(cx);
        Ok(())
    });
    let _consumer = test.spawn(consumer).await;
    test.publish(placed(1)).await.expect("there is room");
    tokio::time::sleep(10 * SECOND).await;
    let answers = answers.lock().expect("nobody panics").clone();
    assert_eq!(answers, [Err(ErrorKind::Closed)]);
}

#[tokio::test]
async fn a_context_of_an_earlier_attempt_publishes_nothing_in_a_later_one() {
    let test = TestBus::new();
    let answers = Answers::default();
    let consumer = test.consumer("billing").state(Arc::clone(&answers));
    let consumer = consumer.retry(RetryPolicy::immediate(2));
    let consumer = consumer.on(async |_: Placed, cx: Context<Answers>| {
        if cx.attempt() == 1 {
            publish_late(cx);
            return Err("once more".into());
        }
        tokio::time::sleep(5 * SECOND).await;
        cx.publish(Paid { attempt: 2 })?;
        Ok(())
    });
    let _consumer = test.spawn(consumer).await;
    test.publish(placed(1)).await.expect("there is room");
    tokio::time::sleep(10 * SECOND).await;
    let paid = test.published::<Paid>().await;
    assert_eq!(
        paid.iter().map(|paid| paid.attempt).collect::<Vec<_>>(),
        [2]
    );
    let answers = answers.lock().expect("nobody panics").clone();
    assert_eq!(answers, [Err(ErrorKind::Closed)]);
}

#[tokio::test]
async fn a_context_of_a_handler_that_panicked_does_not_pretend_to_publish() {
    let test = TestBus::new();
    let answers = Answers::default();
    let consumer = test.consumer("billing").state(Arc::clone(&answers));
    let consumer = consumer.retry(RetryPolicy::none());
    let consumer = consumer.on(async |_: Placed, cx: Context<Answers>| {
        publish_late(cx);
        panic!("a bug")
    });
    let _consumer = test.spawn(consumer).await;
    test.publish(placed(1)).await.expect("there is room");
    tokio::time::sleep(10 * SECOND).await;
    let answers = answers.lock().expect("nobody panics").clone();
    assert_eq!(answers, [Err(ErrorKind::Closed)]);
}

// ---- a unit of work that settles

#[derive(Debug)]
struct Settling;

impl Unit for Settling {
    type Resource = ();
}

#[async_trait]
impl UnitOfWork for Settling {
    fn group_max(&self) -> usize {
        1
    }

    async fn begin(&self, _: &Group, _: &[InboxEntry]) -> Result<Box<dyn Work>> {
        Ok(Box::new(Open(())))
    }
}

#[derive(Debug)]
struct Open(());

#[async_trait]
impl Work for Open {
    fn is_duplicate(&self, _: usize) -> bool {
        false
    }

    async fn transaction(&mut self) -> Result<&mut (dyn Any + Send)> {
        Ok(&mut self.0)
    }

    async fn commit(self: Box<Self>, _: Vec<Message>) -> Result<Committed> {
        Ok(Committed::Settled)
    }

    async fn roll_back(self: Box<Self>, _error: Option<&BoxError>) -> Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn what_a_commit_settled_is_not_in_flight_any_more() {
    let test = TestBus::new();
    let consumer = test.consumer("billing").unit(Settling);
    let consumer = consumer.on(async |_: Placed, _: Context<(), Settling>| Ok(()));
    let consumer = test.spawn(consumer).await;
    for number in 0..10 {
        test.publish(placed(number)).await.expect("there is room");
    }
    test.settled().await;
    let status = consumer.status();
    assert_eq!(status.counts.handled, 10);
    assert!(status.lanes.iter().all(|lane| lane.in_flight == 0));
    consumer.shutdown().await.expect("it ends");
}

#[tokio::test]
async fn any_concurrency_is_taken_and_limits_of_zero_are_refused() {
    let test = TestBus::new();
    let consumer = || {
        test.consumer("billing")
            .on(async |_: Placed, _: Context| Ok(()))
    };
    let consumer_of_all = test.spawn(consumer().concurrency(usize::MAX)).await;
    test.publish(placed(1)).await.expect("there is room");
    test.settled().await;
    assert_eq!(consumer_of_all.status().counts.handled, 1);
    let mut limits = Limits::default();
    limits.lane_messages = 0;
    let refused = consumer().limits(limits).spawn().await;
    let error = refused.expect_err("nothing would ever be delivered");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}
