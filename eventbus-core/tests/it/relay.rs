//! A relay brings what was committed to the broker: all of it, in the order of each key, whatever
//! fails.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use eventbus_core::{
    Consumer, Context, Error, ErrorKind, Event, EventBus, Group, HeldKeys, HeldPlace, KeyAction,
    LeaseReply, LeaseRequest, LeaseStore, MemberId, MemoryBroker, MemoryKeyState, MemoryLeases,
    MemoryOutbox, OnRefused, Origin, OutboxDepth, OutboxMessage, OutboxStore, Outgoing, Relay,
    RelayHandle, Result, RetryPolicy, Start, Until,
};
use eventbus_testkit::TestBus;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::fixtures::{
    Fault, FaultyBroker, MINUTE, OrderCreated, OrderPaid, SECOND, amount, faulty, order, paid,
};

/// An outbox, its relays, and the broker they publish to.
struct Stage {
    test: TestBus,
    broker: FaultyBroker,
    outbox: MemoryOutbox,
    leases: MemoryLeases,
    held: MemoryKeyState,
}

/// A relay that runs.
struct Running {
    handle: RelayHandle,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<()>>,
}

impl Running {
    async fn stop(self) {
        self.stop.send(()).expect("it runs");
        let ended = self.task.await.expect("it does not panic");
        ended.expect("it ends well");
    }
}

impl Stage {
    fn new() -> Self {
        let (test, broker) = faulty();
        Self {
            test,
            broker,
            outbox: MemoryOutbox::new(),
            leases: MemoryLeases::new(),
            held: MemoryKeyState::new(),
        }
    }

    fn relay(&self) -> Relay {
        self.relay_of(Arc::new(self.outbox.clone()))
    }

    fn relay_of(&self, outbox: Arc<dyn OutboxStore>) -> Relay {
        let leases = Arc::new(self.leases.clone());
        Relay::on(self.test.bus(), outbox, leases, Arc::new(self.held.clone()))
    }

    fn start(&self, relay: Relay) -> Running {
        let (stop, stopped) = oneshot::channel();
        let handle = relay.handle();
        let signal = async {
            // Dropped is stopped, too.
            let _ = stopped.await;
        };
        let task = tokio::spawn(relay.run_until(signal));
        Running { handle, stop, task }
    }

    fn append(&self, orders: impl IntoIterator<Item = OrderCreated>) {
        let mut batch = self.test.batch(Origin::new()).unwrap();
        for order in orders {
            batch.publish(order).unwrap();
        }
        self.outbox.append(batch.into_messages()).unwrap();
    }

    fn append_paid(&self, number: u64) {
        let mut batch = self.test.batch(Origin::new()).unwrap();
        batch.publish(paid(number)).unwrap();
        self.outbox.append(batch.into_messages()).unwrap();
    }

    /// Lets time pass until nothing waits.
    async fn drain(&self) {
        for _ in 0..1_000 {
            if self.outbox.depth().await.unwrap().messages() == 0 {
                return;
            }
            sleep(SECOND / 10).await;
        }
        panic!("the outbox is not drained");
    }

    /// The amounts of each order on the broker, in order.
    async fn published(&self) -> HashMap<u64, Vec<u64>> {
        let mut published: HashMap<u64, Vec<u64>> = HashMap::new();
        for created in self.test.published::<OrderCreated>().await {
            published
                .entry(created.order)
                .or_default()
                .push(created.amount);
        }
        published
    }

    async fn decide(&self, held: &HeldPlace, action: KeyAction) {
        let desk = self.desk();
        let decided = desk.decide(held, action, "ada", "a test").await;
        assert!(decided.unwrap());
    }

    fn desk(&self) -> HeldKeys {
        let bus = EventBus::builder(self.test.broker().clone());
        let bus = bus.key_state(Arc::new(self.held.clone())).build();
        bus.held_keys("outbox").unwrap()
    }
}

#[tokio::test]
async fn what_was_committed_is_published_in_order_and_removed() {
    let stage = Stage::new();
    stage.append((0..500).map(|number| amount(number % 10, number)));
    let relay = stage.start(stage.relay().batch(32));
    stage.drain().await;
    stage.append((500..1_000).map(|number| amount(number % 10, number)));
    stage.drain().await;
    let published = stage.published().await;
    for key in 0..10 {
        let expected: Vec<_> = (0..1_000).filter(|number| number % 10 == key).collect();
        assert_eq!(published[&key], expected);
    }
    assert_eq!(relay.handle.status().published, 1_000);
    relay.stop().await;
}

#[tokio::test]
async fn an_append_is_published_at_once() {
    let stage = Stage::new();
    let relay = stage.start(stage.relay());
    sleep(SECOND).await;
    stage.append([order(1)]);
    // Without any time.
    while stage.published().await.is_empty() {
        tokio::task::yield_now().await;
    }
    relay.stop().await;
}

#[tokio::test]
async fn while_the_broker_is_away_all_of_it_waits() {
    let stage = Stage::new();
    let relay = stage.start(stage.relay());
    stage.broker.fail("orders", Fault::Away);
    stage.append((0..20).map(|number| amount(1, number)));
    sleep(10 * MINUTE).await;
    let status = relay.handle.status();
    assert_eq!((status.published, status.held), (0, 0));
    assert_eq!(status.depth.messages(), 20);
    assert!(status.error.is_some());
    // It is asked again, less and less often.
    assert!(
        (20..2_000).contains(&stage.broker.failed()),
        "{}",
        stage.broker.failed()
    );
    stage.broker.mend();
    stage.drain().await;
    assert_eq!(stage.published().await[&1], (0..20).collect::<Vec<_>>());
    assert_eq!(relay.handle.status().error, None);
    relay.stop().await;
}

#[tokio::test]
async fn a_refused_message_parks_its_key_and_no_other() {
    let stage = Stage::new();
    let relay = stage.start(stage.relay());
    stage.broker.fail("payments", Fault::TooLarge);
    stage.append_paid(1);
    stage.append([amount(1, 1), amount(2, 1)]);
    stage.drain().await;
    stage.append([amount(1, 2), amount(2, 2)]);
    stage.drain().await;
    let published = stage.published().await;
    assert_eq!(published[&2], [1, 2]);
    // What was in one batch with it may have gone before it was refused; what came later waits.
    assert!(
        !published
            .get(&1)
            .is_some_and(|amounts| amounts.contains(&2))
    );
    let parked = stage.desk().list().await.unwrap();
    assert_eq!(parked.len(), 1);
    assert!(parked[0].wait.is_parked());
    assert!(parked[0].wait.error.contains("as the test asked for"));

    stage.broker.mend();
    stage.decide(&parked[0].held, KeyAction::Retry).await;
    sleep(SECOND).await;
    assert_eq!(stage.test.published::<OrderPaid>().await, [paid(1)]);
    assert_eq!(stage.published().await[&1], [1, 2]);
    assert!(stage.desk().list().await.unwrap().is_empty());
    stage.append([amount(1, 3)]);
    stage.drain().await;
    assert_eq!(stage.published().await[&1], [1, 2, 3]);
    relay.stop().await;
}

#[tokio::test]
async fn a_refused_message_can_be_given_up_alone_or_with_its_key() {
    for (action, expected) in [
        (KeyAction::Release, Some(vec![1, 2])),
        (KeyAction::Discard, None),
    ] {
        let stage = Stage::new();
        let relay = stage.start(stage.relay());
        stage.broker.fail("payments", Fault::TooLarge);
        stage.append_paid(1);
        stage.drain().await;
        stage.append([amount(1, 1), amount(1, 2)]);
        stage.drain().await;
        let parked = stage.desk().list().await.unwrap();
        stage.decide(&parked[0].held, action).await;
        sleep(SECOND).await;
        assert_eq!(stage.published().await.get(&1).cloned(), expected);
        assert!(stage.test.published::<OrderPaid>().await.is_empty());
        assert!(stage.desk().list().await.unwrap().is_empty());
        relay.stop().await;
    }
}

#[tokio::test]
async fn a_key_goes_on_without_a_refused_message_where_that_is_declared() {
    let stage = Stage::new();
    let relay = stage.start(stage.relay().on_refused(OnRefused::SkipKey));
    stage.broker.fail("payments", Fault::TooLarge);
    stage.append_paid(1);
    stage.append([amount(1, 1), amount(1, 2)]);
    stage.drain().await;
    assert_eq!(stage.published().await[&1], [1, 2]);
    assert_eq!(stage.desk().list().await.unwrap().len(), 1);
    relay.stop().await;
}

#[tokio::test]
async fn what_fails_while_others_are_taken_waits_with_its_key_and_is_published_later() {
    let stage = Stage::new();
    let relay = stage.start(stage.relay());
    stage.broker.fail("payments", Fault::Away);
    stage.append_paid(1);
    for number in 0..10 {
        stage.append([amount(2, number)]);
        sleep(SECOND / 10).await;
    }
    stage.drain().await;
    stage.append([amount(1, 1)]);
    sleep(SECOND / 10).await;
    assert_eq!(stage.published().await[&2], (0..10).collect::<Vec<_>>());
    sleep(MINUTE).await;
    assert!(!stage.published().await.contains_key(&1));
    stage.broker.mend();
    sleep(2 * MINUTE).await;
    assert_eq!(stage.test.published::<OrderPaid>().await, [paid(1)]);
    assert_eq!(stage.published().await[&1], [1]);
    relay.stop().await;
}

#[tokio::test]
async fn two_relays_share_the_lanes_and_one_goes_on_alone() {
    let stage = Stage::new();
    let first = stage.start(stage.relay().batch(10));
    let second = stage.start(stage.relay().batch(10));
    stage.append((0..400).map(|number| amount(number % 20, number)));
    stage.drain().await;
    sleep(MINUTE).await;
    let lanes = [&first, &second].map(|relay| relay.handle.status().lanes.len());
    assert_eq!(lanes, [8, 8]);
    // One is gone without a word.
    first.task.abort();
    stage.append((400..800).map(|number| amount(number % 20, number)));
    stage.drain().await;
    sleep(MINUTE).await;
    assert_eq!(second.handle.status().lanes.len(), 16);
    let published = stage.published().await;
    for key in 0..20 {
        let expected: Vec<_> = (0..800).filter(|number| number % 20 == key).collect();
        assert_eq!(published[&key], expected, "key {key}");
    }
    second.stop().await;
}

#[tokio::test]
async fn a_relay_that_stops_ends_its_batch_and_gives_its_lanes_away() {
    let stage = Stage::new();
    let first = stage.start(stage.relay());
    stage.append((0..100).map(order));
    stage.drain().await;
    first.stop().await;
    let second = stage.start(stage.relay());
    stage.append((0..100).map(order));
    // Well before a lease ends by itself.
    sleep(SECOND).await;
    assert_eq!(stage.outbox.depth().await.unwrap().messages(), 0);
    second.stop().await;
}

#[tokio::test]
async fn a_broker_that_never_answers_does_not_keep_a_relay_from_stopping() {
    let stage = Stage::new();
    let relay = stage.start(stage.relay());
    stage.broker.fail("orders", Fault::Silent);
    stage.append([order(1)]);
    sleep(SECOND).await;
    relay.stop.send(()).unwrap();
    sleep(6 * SECOND).await;
    relay.task.await.unwrap().unwrap();
    assert_eq!(stage.outbox.depth().await.unwrap().messages(), 1);
}

/// Leases that nobody can give away.
#[derive(Debug)]
struct NoLeave(MemoryLeases);

#[async_trait]
impl LeaseStore for NoLeave {
    async fn exchange(&self, request: &LeaseRequest) -> Result<LeaseReply> {
        self.0.exchange(request).await
    }

    async fn leave(&self, _: &Group, _: MemberId) -> Result<()> {
        Err(Error::new(ErrorKind::Unavailable, "leave", "a test"))
    }

    async fn changed(&self, group: &Group) {
        self.0.changed(group).await;
    }
}

/// Found by the simulation (scenario 48, at the end of a relay): its lanes are free when their lease
/// is over, so that it has ended well.
#[tokio::test]
async fn a_relay_whose_store_is_away_at_the_end_has_ended_well() {
    let stage = Stage::new();
    let relay = Relay::on(
        stage.test.bus(),
        Arc::new(stage.outbox.clone()),
        Arc::new(NoLeave(stage.leases.clone())),
        Arc::new(stage.held.clone()),
    );
    let relay = stage.start(relay);
    stage.append([order(1)]);
    stage.drain().await;
    relay.stop().await;
    let second = stage.start(stage.relay());
    stage.append([order(2)]);
    stage.drain().await;
    assert_eq!(stage.published().await.len(), 2);
    second.stop().await;
}

/// An outbox that is away when it is to remove.
#[derive(Debug)]
struct Forgetful {
    inner: MemoryOutbox,
    failures: AtomicU32,
}

#[async_trait]
impl OutboxStore for Forgetful {
    async fn next(
        &self,
        lanes: &[u32],
        messages_max: usize,
        except: &[u64],
    ) -> Result<Vec<OutboxMessage>> {
        self.inner.next(lanes, messages_max, except).await
    }

    async fn remove(&self, positions: &[u64]) -> Result<()> {
        let left = self
            .failures
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            });
        match left {
            Ok(_) => Err(Error::new(ErrorKind::Unavailable, "remove", "a test")),
            Err(_) => self.inner.remove(positions).await,
        }
    }

    async fn appended(&self) {
        self.inner.appended().await;
    }

    async fn depth(&self) -> Result<OutboxDepth> {
        self.inner.depth().await
    }
}

#[tokio::test]
async fn what_could_not_be_removed_is_removed_later_and_published_once() {
    let stage = Stage::new();
    let forgetful = Forgetful {
        inner: stage.outbox.clone(),
        failures: AtomicU32::new(2),
    };
    let relay = stage.start(stage.relay_of(Arc::new(forgetful)));
    stage.append([amount(1, 1), amount(1, 2)]);
    stage.drain().await;
    assert_eq!(stage.published().await[&1], [1, 2]);
    relay.stop().await;
}

#[tokio::test]
async fn what_was_not_removed_when_a_relay_died_is_published_again_with_the_same_ids() {
    let stage = Stage::new();
    let forgetful = Forgetful {
        inner: stage.outbox.clone(),
        failures: AtomicU32::new(u32::MAX),
    };
    let dies = stage.start(stage.relay_of(Arc::new(forgetful)));
    stage.append([amount(1, 1), amount(1, 2)]);
    while dies.handle.status().published < 2 {
        sleep(SECOND / 10).await;
    }
    dies.task.abort();
    let relay = stage.start(stage.relay());
    stage.drain().await;
    let published = stage.test.published_with_envelopes::<OrderCreated>().await;
    let amounts: Vec<_> = published
        .iter()
        .map(|(_, created)| created.amount)
        .collect();
    assert_eq!(amounts, [1, 2, 1, 2]);
    assert_eq!(published[0].0.id, published[2].0.id);
    relay.stop().await;
}

#[tokio::test]
async fn a_few_that_come_one_by_one_are_removed_together_and_none_is_left() {
    let stage = Stage::new();
    let counting = Arc::new(Counting {
        inner: stage.outbox.clone(),
        removals: AtomicU32::new(0),
        asked: AtomicU32::new(0),
    });
    let leases = Arc::new(CountedLeases {
        inner: stage.leases.clone(),
        exchanges: AtomicU32::new(0),
    });
    let relay = Relay::on(
        stage.test.bus(),
        Arc::clone(&counting) as _,
        Arc::clone(&leases) as _,
        Arc::new(stage.held.clone()),
    );
    let relay = stage.start(relay);
    for number in 1..=100 {
        stage.append([amount(1, number)]);
        stage.test.settled().await;
        assert_eq!(relay.handle.status().published, number);
    }
    assert!(counting.removals.load(Ordering::SeqCst) <= 10);
    assert!(counting.asked.load(Ordering::SeqCst) <= 110);
    assert!(leases.exchanges.load(Ordering::SeqCst) <= 10);
    sleep(SECOND / 10).await;
    assert_eq!(stage.outbox.depth().await.unwrap().messages(), 0);
    assert_eq!(stage.published().await[&1], (1..=100).collect::<Vec<_>>());
    stage.append([amount(1, 101)]);
    stage.test.settled().await;
    relay.stop().await;
    assert_eq!(stage.outbox.depth().await.unwrap().messages(), 0);
}

/// Leases that count how often they are asked for.
#[derive(Debug)]
struct CountedLeases {
    inner: MemoryLeases,
    exchanges: AtomicU32,
}

#[async_trait]
impl LeaseStore for CountedLeases {
    async fn exchange(&self, request: &LeaseRequest) -> Result<LeaseReply> {
        self.exchanges.fetch_add(1, Ordering::SeqCst);
        self.inner.exchange(request).await
    }

    async fn leave(&self, group: &Group, member: MemberId) -> Result<()> {
        self.inner.leave(group, member).await
    }

    async fn changed(&self, group: &Group) {
        self.inner.changed(group).await;
    }
}

/// An outbox that counts what it is asked.
#[derive(Debug)]
struct Counting {
    inner: MemoryOutbox,
    removals: AtomicU32,
    asked: AtomicU32,
}

#[async_trait]
impl OutboxStore for Counting {
    async fn next(
        &self,
        lanes: &[u32],
        messages_max: usize,
        except: &[u64],
    ) -> Result<Vec<OutboxMessage>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.inner.next(lanes, messages_max, except).await
    }

    async fn remove(&self, positions: &[u64]) -> Result<()> {
        self.removals.fetch_add(1, Ordering::SeqCst);
        self.inner.remove(positions).await
    }

    async fn appended(&self) {
        self.inner.appended().await;
    }

    async fn depth(&self) -> Result<OutboxDepth> {
        self.inner.depth().await
    }
}

#[tokio::test]
async fn a_batch_belongs_to_a_request_and_not_to_a_handler() {
    let test = TestBus::new();
    let origin = Origin::new()
        .with_correlation_id("request-7")
        .with_metadata("userId", "u-17");
    let mut batch = test.batch(origin).unwrap();
    let id = batch.publish(order(1)).unwrap();
    batch.publish(paid(1)).unwrap();
    let messages = batch.into_messages();
    assert_eq!(messages[0].0, id);
    for (_, message) in &messages {
        let envelope = test.envelope(message).unwrap();
        assert_eq!(envelope.correlation_id, "request-7");
        assert_eq!(envelope.metadata["userId"], "u-17");
    }
    let consumer = test
        .consumer("billing")
        .state(test.bus().clone())
        .on(async |_: OrderCreated, cx: Context<EventBus>| {
            cx.state().batch(Origin::new())?;
            Ok(())
        })
        .retry(RetryPolicy::none());
    let _consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    let letters = test.dead_letters().await;
    assert!(
        letters[0].error.contains("cx.transaction()"),
        "{}",
        letters[0].error
    );
}

#[tokio::test]
async fn what_has_a_time_to_come_goes_on_to_the_schedule() {
    let stage = Stage::new();
    let later = stage.test.clock().now().plus(60 * MINUTE);
    let mut batch = stage.test.batch(Origin::new()).unwrap();
    let reminder = Outgoing::new(amount(1, 2)).with_not_before(later);
    batch.publish(reminder).unwrap();
    batch.publish(amount(1, 1)).unwrap();
    stage.outbox.append(batch.into_messages()).unwrap();
    let relay = stage.start(stage.relay());
    stage.drain().await;
    assert_eq!(stage.published().await[&1], [1]);
    stage.test.advance(61 * MINUTE).await;
    assert_eq!(stage.published().await[&1], [1, 2]);
    relay.stop().await;
}

#[tokio::test]
async fn a_relay_without_a_schedule_parks_only_what_is_for_later() {
    let stage = Stage::new();
    let held = Arc::new(stage.held.clone());
    let bus = EventBus::builder(stage.test.broker().clone())
        .key_state(Arc::<MemoryKeyState>::clone(&held))
        .build();
    let later = bus.clock().now().plus(60 * MINUTE);
    let mut batch = stage.test.batch(Origin::new()).unwrap();
    let reminder = Outgoing::new(amount(1, 1)).with_not_before(later);
    batch.publish(reminder).unwrap();
    for number in 2..20 {
        batch.publish(amount(number, 1)).unwrap();
    }
    stage.outbox.append(batch.into_messages()).unwrap();
    let outbox = Arc::new(stage.outbox.clone());
    let relay = Relay::on(&bus, outbox, Arc::new(stage.leases.clone()), held);
    let relay = stage.start(relay);
    stage.drain().await;
    assert_eq!(stage.published().await.len(), 18);
    let parked = stage.desk().list().await.unwrap();
    assert_eq!(parked.len(), 1);
    assert!(parked[0].wait.is_parked());
    relay.stop().await;
}

#[tokio::test]
async fn while_the_schedule_is_full_only_the_key_of_what_is_for_later_waits() {
    let stage = Stage::new();
    let later = stage.test.clock().now().plus(600 * MINUTE);
    let reminder = || {
        let note = "x".repeat(900_000);
        Outgoing::new(OrderPaid { order: 7, note }).with_not_before(later)
    };
    while stage.test.publish(reminder()).await.is_ok() {}
    let mut batch = stage.test.batch(Origin::new()).unwrap();
    batch.publish(reminder()).unwrap();
    stage.outbox.append(batch.into_messages()).unwrap();
    let relay = stage.start(stage.relay());
    for number in 0..100 {
        stage.append([amount(number + 100, number)]);
        sleep(SECOND).await;
    }
    assert_eq!(stage.published().await.len(), 100);
    relay.stop().await;
}

#[tokio::test]
async fn a_topic_that_is_not_there_yet_parks_nothing() {
    let stage = Stage::new();
    let relay = stage.start(stage.relay());
    stage.broker.fail("payments", Fault::Missing);
    stage.append_paid(1);
    for number in 0..10 {
        stage.append([amount(2, number)]);
        sleep(SECOND).await;
    }
    let held = stage.desk().list().await.unwrap();
    assert!(held.iter().all(|report| !report.wait.is_parked()));
    stage.broker.mend();
    sleep(2 * MINUTE).await;
    assert_eq!(stage.test.published::<OrderPaid>().await, [paid(1)]);
    relay.stop().await;
}

#[tokio::test]
async fn a_retry_that_fails_while_the_broker_is_away_is_repeated_less_and_less_often() {
    let stage = Stage::new();
    let relay = stage.start(stage.relay());
    stage.broker.fail("payments", Fault::TooLarge);
    stage.append_paid(1);
    stage.drain().await;
    let parked = stage.desk().list().await.unwrap();
    stage.broker.fail("payments", Fault::Away);
    let before = stage.broker.failed();
    stage.decide(&parked[0].held, KeyAction::Retry).await;
    sleep(10 * MINUTE).await;
    let tries = stage.broker.failed() - before;
    assert!((5..25).contains(&tries), "{tries}");
    stage.broker.mend();
    sleep(2 * MINUTE).await;
    assert_eq!(stage.test.published::<OrderPaid>().await, [paid(1)]);
    relay.stop().await;
}

#[tokio::test]
async fn what_a_key_held_is_published_in_order_however_much_it_is() {
    let stage = Stage::new();
    let relay = stage.start(stage.relay());
    stage.broker.fail("payments", Fault::TooLarge);
    stage.append_paid(1);
    stage.drain().await;
    stage.append((0..350).map(|number| amount(1, number)));
    stage.drain().await;
    let parked = stage.desk().list().await.unwrap();
    stage.broker.mend();
    stage.decide(&parked[0].held, KeyAction::Retry).await;
    sleep(MINUTE).await;
    assert_eq!(stage.published().await[&1], (0..350).collect::<Vec<_>>());
    relay.stop().await;
}

#[tokio::test]
async fn a_test_waits_for_a_relay_while_time_stands_still() {
    let test = TestBus::new().with_database();
    let outbox = MemoryOutbox::new();
    let leases = Arc::new(MemoryLeases::new());
    let held = Arc::new(MemoryKeyState::new());
    test.relay(Relay::on(&test, Arc::new(outbox.clone()), leases, held))
        .await;
    let begun = Instant::now();
    for number in 1..=100 {
        let mut batch = test.batch(Origin::new()).unwrap();
        batch.publish(order(number)).unwrap();
        outbox.append(batch.into_messages()).unwrap();
        test.settled().await;
        let published = test.published::<OrderCreated>().await;
        assert_eq!(published.len() as u64, number);
    }
    assert_eq!(begun.elapsed(), std::time::Duration::ZERO);
}

/// A broker that the relays of a stage move to, and the group that reads the one they leave.
struct Move {
    stage: Stage,
    new: EventBus,
    billing: Consumer,
}

impl Move {
    async fn begin() -> Self {
        let stage = Stage::new();
        let billing = stage.test.consumer("billing");
        let billing = billing.on(async |_: OrderCreated, _: Context| Ok(()));
        let billing = stage.test.spawn(billing).await;
        Self {
            stage,
            new: EventBus::new(MemoryBroker::new()),
            billing,
        }
    }

    /// A relay to the new broker, which waits for the old one.
    fn moved(&self) -> Relay {
        let outbox = Arc::new(self.stage.outbox.clone());
        let leases = Arc::new(self.stage.leases.clone());
        let relay = Relay::on(&self.new, outbox, leases, Arc::new(self.stage.held.clone()));
        let drained = self.stage.test.drained(&[OrderCreated::TOPIC]);
        relay.target("new").unwrap().after(drained)
    }

    async fn waiting(&self) -> u64 {
        self.stage.outbox.depth().await.unwrap().messages()
    }

    /// How many events are on the new broker.
    async fn arrived(&self) -> usize {
        let topics = [OrderCreated::TOPIC];
        let reader = self.new.read(&topics, Start::Earliest, Some(Until::Now));
        let mut reader = reader.await.unwrap();
        let mut arrived = 0;
        while reader.next().await.unwrap().is_some() {
            arrived += 1;
        }
        arrived
    }
}

fn reason(relay: &Running) -> String {
    relay.handle.status().error.unwrap_or_default()
}

#[tokio::test]
async fn relays_of_two_targets_wait_until_one_is_left_and_its_broker_may_be_used() {
    let moving = Move::begin().await;
    let old = moving.stage.start(moving.stage.relay());
    moving.stage.append((0..10).map(order));
    moving.stage.drain().await;
    let new = moving.stage.start(moving.moved());
    sleep(MINUTE).await;
    moving.stage.append((0..10).map(order));
    sleep(MINUTE).await;
    assert_eq!(moving.waiting().await, 10, "nobody publishes");
    for relay in [&old, &new] {
        assert!(
            reason(relay).contains("another target"),
            "{}",
            reason(relay)
        );
    }
    assert_eq!(moving.arrived().await, 0);
    old.stop().await;
    moving.stage.drain().await;
    assert_eq!(moving.arrived().await, 10);
    assert_eq!(reason(&new), "");
    // Whoever comes back by mistake is told, and keeps nothing from order but time.
    let back = moving.stage.start(moving.stage.relay());
    sleep(MINUTE).await;
    moving.stage.append((0..10).map(order));
    sleep(MINUTE).await;
    assert_eq!(moving.waiting().await, 10);
    back.stop().await;
    moving.stage.drain().await;
    assert_eq!(moving.arrived().await, 20);
    new.stop().await;
}

#[tokio::test]
async fn a_relay_that_comes_after_another_broker_waits_until_that_is_drained() {
    let moving = Move::begin().await;
    let old = moving.stage.start(moving.stage.relay());
    moving.billing.pause();
    moving.stage.append((0..10).map(order));
    moving.stage.drain().await;
    old.stop().await;
    let relays = [
        moving.stage.start(moving.moved()),
        moving.stage.start(moving.moved()),
    ];
    moving.stage.append((0..50).map(order));
    sleep(10 * MINUTE).await;
    assert_eq!(moving.waiting().await, 50);
    for relay in &relays {
        assert!(reason(relay).contains("billing has"), "{}", reason(relay));
    }
    moving.billing.resume();
    moving.stage.drain().await;
    assert_eq!(moving.arrived().await, 50);
    for relay in relays {
        relay.stop().await;
    }
}

#[tokio::test]
async fn a_relay_that_comes_after_another_broker_needs_a_target_of_its_own() {
    let moving = Move::begin().await;
    let drained = moving.stage.test.drained(&[OrderCreated::TOPIC]);
    let relay = moving.stage.relay().after(drained);
    let refused = relay.run_until(std::future::pending()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    assert!(moving.stage.relay().target("a b").is_err());
}
