//! What is kept of messages that could not be handled, and what operators do with it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use eventbus_core::{
    AdminReply, AdminRequest, Breaker, Broker, Capabilities, Clock, Consumer,
    DEAD_LETTER_CLAIM_TIME, DeadLetter, DeadLetterStatus, DeadLetters, Deliveries, DeskAction,
    DeskReport, Edit, Error, ErrorKind, Event, EventBus, EventId, HEADER_BYTES_MAX, HEADERS_MAX,
    Headers, Key, Member, MemoryBroker, MemoryConfig, MemoryProfile, Message, Outcome, Outgoing,
    PublishError, Publisher, Redrive, Result, RetryPolicy, Signal, Start, Subscriber, Subscription,
    Timestamp, Topic, TopicSpec, Unpublished, Until, header,
};
use eventbus_testkit::TestBus;
use tokio::time::Instant;

use crate::failures::lag;
use crate::fixtures::{
    Calls, MINUTE, OrderCreated, OrderPaid, SECOND, amount, noting, order, paid,
};

/// A consumer of `billing` without retries, and what it notes.
async fn billing(test: &TestBus) -> (Consumer, Arc<Calls>) {
    let calls = Calls::new();
    let consumer = test.consumer("billing").shared_state(Arc::clone(&calls));
    let consumer = consumer.on(noting).retry(RetryPolicy::none());
    // Here most events are to fail.
    let consumer = consumer.breaker(Breaker::default().with_failure_rate(f64::INFINITY));
    (test.spawn(consumer).await, calls)
}

/// A message of exactly the size that the broker takes; no format claims it.
fn largest(test: &TestBus, key: Option<Key>, headers: Headers) -> Message {
    let mut message = Message::new(OrderCreated::TOPIC, "").with_headers(headers);
    message.key = key;
    let room = test.broker().capabilities().message_bytes_max - message.size();
    // No two stretches of it are alike, so that a part in the wrong place shows.
    let payload: Vec<u8> = (0..room as u64 / 8 + 1)
        .flat_map(u64::to_le_bytes)
        .collect();
    message.payload = payload[..room].to_vec().into();
    message
}

#[tokio::test]
async fn a_foreign_message_at_the_broker_s_limit_has_a_dead_letter_and_its_lane_goes_on() {
    let test = TestBus::like(MemoryProfile::Kafka);
    let (consumer, calls) = billing(&test).await;
    let originals = [
        largest(&test, Some(Key::from("1")), Headers::new()),
        largest(&test, Some(Key::from("1")), many_headers()),
        largest(&test, None, many_headers()),
    ];
    for original in &originals {
        let taken = test.broker().publish(vec![original.clone()]).await;
        taken.expect("it is as large as the broker takes");
    }
    test.publish(order(1)).await.unwrap();
    test.run_out().await;

    assert_eq!(calls.attempts(1), [1], "the key went on");
    assert_eq!(lag(&test, "billing").await, 0);
    let letters = test.dead_letters().await;
    assert_eq!(letters.len(), 3);
    for original in &originals {
        assert!(letters.iter().any(|letter| letter.message == *original));
    }
    let shown = consumer.dead_letters().show(&letters[0].id).await.unwrap();
    assert_eq!(shown.message, letters[0].message);
    let discarded = consumer.dead_letters();
    discarded.discard(Redrive::all()).await.unwrap();
    assert!(test.dead_letters().await.is_empty());
}

/// More headers than may be published, some of them longer.
fn many_headers() -> Headers {
    let mut headers = Headers::builder().unlimited();
    for number in 0..2 * HEADERS_MAX {
        let value = vec![number as u8; number * HEADER_BYTES_MAX / HEADERS_MAX];
        headers = headers.push("from elsewhere", value).expect("no limit");
    }
    headers.build()
}

// ---- what is listed

/// Breaks orders up to a number, publishes them and waits for their letters.
async fn broken(test: &TestBus, calls: &Calls, orders: std::ops::Range<u64>) {
    for number in orders.clone() {
        calls.break_order(number);
        test.publish(order(number)).await.unwrap();
    }
    test.run_out().await;
}

fn orders_of(letters: &[DeadLetter], test: &TestBus) -> Vec<u64> {
    let order = |letter: &DeadLetter| {
        let event = test.event::<OrderCreated>(&letter.message);
        event.unwrap().expect("of this type").order
    };
    letters.iter().map(order).collect()
}

#[tokio::test]
async fn a_large_queue_is_listed_in_pages_over_all_topics() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test.consumer("billing").shared_state(Arc::clone(&calls));
    let consumer = consumer
        .on(noting)
        .on(async |_: OrderPaid, _: eventbus_core::Context<Calls>| Err("unpayable".into()))
        .retry(RetryPolicy::none())
        .workers(1);
    let consumer = test.spawn(consumer).await;
    broken(&test, &calls, 0..25).await;
    for number in 0..3 {
        test.publish(paid(number)).await.unwrap();
    }
    test.run_out().await;
    let desk = consumer.dead_letters().with_page(10);
    let decided = Redrive::matching(|letter| letter.message.key == Some(Key::from("7")));
    assert_eq!(desk.discard(decided).await.unwrap().done, 1);

    let whole = consumer.dead_letters().list().await.unwrap();
    assert_eq!(whole.len(), 27);
    let mut paged = Vec::new();
    let mut sizes = Vec::new();
    let mut page = desk.list().await.unwrap();
    while let Some(last) = page.last().cloned() {
        sizes.push(page.len());
        paged.extend(page);
        page = desk.list_after(&last).await.unwrap();
    }
    assert_eq!(sizes, [10, 10, 7]);
    let ids = |letters: &[DeadLetter]| -> Vec<EventId> {
        letters.iter().map(|letter| letter.id.clone()).collect()
    };
    assert_eq!(ids(&paged), ids(&whole));
    let other = test
        .bus()
        .dead_letters("billing", &[OrderPaid::TOPIC])
        .unwrap();
    let refused = other.list_after(&whole[0]).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
}

#[tokio::test]
async fn a_page_is_bounded_in_bytes() {
    let test = TestBus::wrapping(MemoryConfig::default().like(MemoryProfile::Redis), |b| b);
    let (consumer, _calls) = billing(&test).await;
    // The largest that Redis takes is a quarter of a page.
    for _ in 0..5 {
        let original = largest(&test, Some(Key::from("1")), Headers::new());
        test.broker().publish(vec![original]).await.unwrap();
        test.run_out().await;
    }
    let desk = consumer.dead_letters();
    let mut sizes = Vec::new();
    let mut page = desk.list().await.unwrap();
    while let Some(last) = page.last().cloned() {
        sizes.push(page.len());
        page = desk.list_after(&last).await.unwrap();
    }
    assert_eq!(sizes, [4, 1]);
}

#[tokio::test]
async fn letters_are_grouped_by_what_their_errors_have_in_common() {
    let test = TestBus::new();
    let (consumer, calls) = billing(&test).await;
    broken(&test, &calls, 0..3).await;
    let begun = test.clock().now();
    test.advance(MINUTE).await;
    broken(&test, &calls, 3..5).await;
    let unreadable = Message::new(OrderCreated::TOPIC, "no format claims this");
    test.broker().publish(vec![unreadable]).await.unwrap();
    test.run_out().await;
    let desk = consumer.dead_letters();
    let groups = desk.by_error().await.unwrap();
    let counts: Vec<_> = groups
        .iter()
        .map(|group| (group.count, group.fingerprint.as_str()))
        .collect();
    assert_eq!(counts[0], (5, "error: order <n> is broken"));
    assert!(
        counts[1].1.starts_with("undecodable: read message"),
        "{counts:?}"
    );
    assert_eq!((counts.len(), counts[1].0), (2, 1));
    assert_eq!(groups[0].first_seen, begun);
    assert!(groups[0].last_seen >= begun.plus(MINUTE));
    assert!(groups[0].error.starts_with("order "), "{}", groups[0].error);
    assert!(desk.show(&groups[0].example).await.is_ok());

    calls.mend_all();
    let redrive = Redrive::of_error(groups[0].fingerprint.as_str());
    assert_eq!(desk.redrive(redrive).await.unwrap().done, 5);
    assert_eq!(desk.by_error().await.unwrap().len(), 1);
}

// ---- what is re-driven

#[tokio::test]
async fn a_redrive_keeps_to_its_rate_and_tells_how_far_it_is() {
    let test = TestBus::new();
    let (consumer, calls) = billing(&test).await;
    broken(&test, &calls, 0..45).await;
    calls.mend_all();
    let reports: Arc<Mutex<Vec<DeskReport>>> = Arc::default();
    let told = Arc::clone(&reports);
    let redrive = Redrive::all()
        .rate(10)
        .on_progress(move |report| told.lock().unwrap().push(*report));
    let begun = Instant::now();
    let report = consumer.dead_letters().redrive(redrive).await.unwrap();
    assert!(
        begun.elapsed() >= 4400 * SECOND / 1000,
        "{:?}",
        begun.elapsed()
    );
    assert!(begun.elapsed() < 5 * SECOND, "{:?}", begun.elapsed());
    assert_eq!((report.chosen, report.done, report.ended()), (45, 45, 45));
    let reports = reports.lock().unwrap();
    assert_eq!(reports[0].done, 0);
    assert!(reports.is_sorted_by_key(|report| report.done));
    assert_eq!(reports.last(), Some(&report));
    assert!(reports.len() > 40);
}

#[tokio::test]
async fn an_expired_event_is_not_counted_as_redriven() {
    let test = TestBus::new();
    let (consumer, calls) = billing(&test).await;
    calls.break_order(1);
    let expiry = test.clock().now().plus(MINUTE);
    test.publish(Outgoing::new(order(1)).with_expiry(expiry))
        .await
        .unwrap();
    test.settled().await;
    calls.mend_all();
    test.advance(2 * MINUTE).await;
    let desk = consumer.dead_letters();
    let report = desk.redrive(Redrive::all()).await.unwrap();
    assert_eq!((report.chosen, report.done, report.expired), (1, 0, 1));
    let letter = desk.list().await.unwrap().remove(0);
    let error = desk.edit(&letter.id, Edit::new()).await.unwrap_err();
    assert!(error.to_string().contains(".without_header("), "{error}");
    let edit = Edit::new().without_header(header::EXPIRES_AT);
    desk.edit(&letter.id, edit).await.unwrap();
    test.settled().await;
    assert_eq!(calls.attempts(1), [1, 1]);
}

#[tokio::test]
async fn an_event_too_large_to_be_redriven_is_left_open_and_hinders_no_other() {
    let test = TestBus::like(MemoryProfile::Kafka);
    let (consumer, calls) = billing(&test).await;
    let original = largest(&test, Some(Key::from("1")), Headers::new());
    test.broker().publish(vec![original]).await.unwrap();
    broken(&test, &calls, 1..3).await;
    calls.mend_all();
    let desk = consumer.dead_letters();
    let report = desk.redrive(Redrive::all()).await.unwrap();
    assert_eq!((report.done, report.refused), (2, 1));
    let letter = desk.list().await.unwrap().remove(0);
    let edit = Edit::new().payload(r#"{"event_type":"OrderCreated","order":9,"amount":0}"#);
    desk.edit(&letter.id, edit).await.unwrap();
    test.settled().await;
    assert_eq!(calls.attempts(9), [1]);
    assert!(desk.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn letters_of_one_key_are_redriven_in_their_order() {
    let test = TestBus::new();
    let (consumer, calls) = billing(&test).await;
    calls.break_order(1);
    for step in 0..150 {
        test.publish(amount(1, step)).await.unwrap();
    }
    test.run_out().await;
    calls.mend_all();
    let desk = consumer.dead_letters().with_page(40);
    let report = desk.redrive(Redrive::all()).await.unwrap();
    assert_eq!((report.chosen, report.done), (150, 150));
    test.settled().await;
    assert!(calls.amounts(1)[150..].iter().copied().eq(0..150));
}

// ---- what is edited

#[tokio::test]
async fn an_edited_event_is_another_one_that_follows_from_the_old() {
    let test = TestBus::new();
    let (consumer, calls) = billing(&test).await;
    let other = Calls::new();
    let stock = test
        .consumer("stock")
        .shared_state(Arc::clone(&other))
        .on(noting);
    let stock = test.spawn(stock).await;
    calls.break_order(1);
    let old = test.publish(amount(1, 5)).await.unwrap();
    test.run_out().await;
    let desk = consumer.dead_letters();
    let letter = desk.list().await.unwrap().remove(0);
    let edit = Edit::new()
        .data(r#"{"order":2,"amount":7}"#)
        .header("tenant", "north")
        .by("ann")
        .because("it was another order");
    let new = desk.edit(&letter.id, edit.clone()).await.unwrap();
    test.settled().await;
    assert_eq!(calls.amounts(2), [7]);
    assert!(other.of(2).is_empty() && stock.status().counts.skipped_other_group == 1);

    let published = test.published_with_envelopes::<OrderCreated>().await;
    let (before, _) = &published[0];
    let (envelope, event) = published
        .iter()
        .find(|(envelope, _)| envelope.id == new)
        .expect("it is on the topic");
    assert_eq!(*event, amount(2, 7));
    assert_ne!(new, old);
    assert_eq!(envelope.causation_id, Some(old.to_string()));
    assert_eq!(envelope.correlation_id, before.correlation_id);

    let shown = desk.show(&letter.id).await.unwrap();
    let DeadLetterStatus::Edited { decision, new_id } = shown.status else {
        panic!("{:?}", shown.status);
    };
    assert_eq!((decision.by.as_str(), &new_id), ("ann", &new));
    let error = desk.edit(&letter.id, edit).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(desk.list().await.unwrap().is_empty());

    let history = desk.history(&letter.id).await.unwrap();
    assert!(matches!(history[0].action, DeskAction::Stored));
    assert!(matches!(history[1].action, DeskAction::Claimed { .. }));
    assert_eq!(history[2].action, DeskAction::Edited { new_id });
    assert_eq!(history[2].decision.because, "it was another order");
    assert_eq!(history.len(), 3);
    let unknown = desk.history(&EventId::from_name("gone")).await.unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn an_unreadable_event_is_edited_as_a_whole() {
    let test = TestBus::new();
    let (consumer, calls) = billing(&test).await;
    let unreadable = Message::new(OrderCreated::TOPIC, "no format claims this").with_key("1");
    test.broker().publish(vec![unreadable]).await.unwrap();
    test.settled().await;
    let desk = consumer.dead_letters();
    let letter = desk.list().await.unwrap().remove(0);
    let error = desk
        .edit(&letter.id, Edit::new().data("{}"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Codec);
    let edit = Edit::new().payload(r#"{"event_type":"OrderCreated","order":1,"amount":0}"#);
    let new = desk.edit(&letter.id, edit).await.unwrap();
    test.settled().await;
    assert_eq!(calls.attempts(1), [1]);
    let topics = [OrderCreated::TOPIC];
    let reader = test.bus().read(&topics, Start::Earliest, Some(Until::Now));
    let mut reader = reader.await.unwrap();
    let mut edited = None;
    while let Some(record) = reader.next().await.unwrap() {
        let headers = &record.message.headers;
        if headers.get_str(header::ID) == Some(&new.to_string()) {
            edited = headers.get_str(header::EDITED_FROM).map(str::to_owned);
        }
    }
    assert_eq!(edited, Some(letter.id.to_string()));
}

// ---- several operators, and crashes

/// What [`Slow`] does with a message that is published.
type Fault = dyn Fn(&Message) -> Option<ErrorKind> + Send + Sync;

/// A broker that publishes one message at a time and lets others run in between, and fails some.
#[derive(Clone)]
struct Slow {
    inner: MemoryBroker,
    /// Decides how often others run; the same number, the same run.
    random: Arc<AtomicU64>,
    fault: Arc<Mutex<Option<Box<Fault>>>>,
}

impl std::fmt::Debug for Slow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slow").finish_non_exhaustive()
    }
}

impl Slow {
    fn fail(&self, fault: impl Fn(&Message) -> Option<ErrorKind> + Send + Sync + 'static) {
        *self.fault.lock().unwrap() = Some(Box::new(fault));
    }

    fn mend(&self) {
        *self.fault.lock().unwrap() = None;
    }

    async fn rest(&self) {
        let step = |random: u64| Some(random.wrapping_mul(6_364_136_223_846_793_005) + 1);
        let random = self
            .random
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, step);
        for _ in 0..random.expect("it always steps") >> 62 {
            tokio::task::yield_now().await;
        }
    }
}

#[async_trait]
impl Publisher for Slow {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        let mut unpublished = Vec::new();
        for (index, message) in batch.into_iter().enumerate() {
            let fault = self
                .fault
                .lock()
                .unwrap()
                .as_ref()
                .and_then(|fault| fault(&message));
            match fault {
                Some(ErrorKind::Timeout) => std::future::pending().await,
                Some(kind) => {
                    let error = Error::new(kind, "publish", "as the test asked for");
                    let failed = Unpublished::new(index, message, Outcome::NotTaken, error);
                    unpublished.push(failed);
                }
                None => self.inner.publish(vec![message]).await?,
            }
            self.rest().await;
        }
        match unpublished.is_empty() {
            true => Ok(()),
            false => Err(PublishError::new(unpublished)),
        }
    }
}

#[derive(Debug)]
struct SlowDeliveries(Box<dyn Deliveries>, Slow);

#[async_trait]
impl Deliveries for SlowDeliveries {
    async fn next(&mut self) -> Result<Signal> {
        self.1.rest().await;
        self.0.next().await
    }

    async fn close(self: Box<Self>) -> Result<()> {
        self.0.close().await
    }
}

#[async_trait]
impl Subscriber for Slow {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        self.rest().await;
        let member = self.inner.subscribe(subscription).await?;
        let deliveries = Box::new(SlowDeliveries(member.deliveries, self.clone()));
        Ok(Member::new(deliveries, member.settlement))
    }
}

#[async_trait]
impl Broker for Slow {
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

/// The time of a bus, for another one.
#[derive(Debug)]
struct BusClock(EventBus);

impl Clock for BusClock {
    fn now(&self) -> Timestamp {
        self.0.clock().now()
    }
}

/// A desk of its own connection to the test's broker, and that connection.
fn desk(test: &TestBus, seed: u64) -> (DeadLetters, Slow) {
    let broker = Slow {
        inner: test.broker().connect(),
        random: Arc::new(AtomicU64::new(seed)),
        fault: Arc::default(),
    };
    let clock = Arc::new(BusClock(test.bus().clone()));
    let bus = EventBus::builder(broker.clone()).clock(clock).build();
    let desk = bus.dead_letters("billing", &[OrderCreated::TOPIC]);
    (desk.expect("a good name"), broker)
}

fn status_of(message: &Message) -> Option<&str> {
    message.headers.get_str("eb-dlq-status")
}

#[tokio::test]
async fn two_operators_at_once_redrive_each_letter_once() {
    const LETTERS: u64 = 200;
    let mut shared = 0;
    for seed in 0..20 {
        let test = TestBus::new();
        let (_consumer, calls) = billing(&test).await;
        broken(&test, &calls, 0..LETTERS).await;
        calls.mend_all();
        let letters = test.dead_letters().await;
        let (ann, _) = desk(&test, 2 * seed);
        let (bob, _) = desk(&test, 2 * seed + 1);
        // The rate makes them claim in rounds, so that they meet in the middle of the queue.
        let redrive = |by| Redrive::all().by(by).because("both at once").rate(3);
        let (ann, bob) = tokio::join!(ann.redrive(redrive("ann")), bob.redrive(redrive("bob")));
        let (ann, bob) = (ann.unwrap(), bob.unwrap());
        test.settled().await;
        assert_eq!(ann.done + bob.done, LETTERS, "{ann:?} {bob:?}");
        shared += u64::from(ann.done > 0 && bob.done > 0);
        for number in 0..LETTERS {
            assert_eq!(
                calls.attempts(number),
                [1, 1],
                "order {number}, seed {seed}"
            );
        }
        assert!(test.dead_letters().await.is_empty());
        let (desk, _) = desk(&test, seed);
        for letter in letters.iter().step_by(20) {
            let history = desk.history(&letter.id).await.unwrap();
            let redriven: Vec<_> = history
                .iter()
                .filter(|entry| entry.action == DeskAction::Redriven)
                .collect();
            assert_eq!(redriven.len(), 1);
            let first_claim = history
                .iter()
                .find(|entry| matches!(entry.action, DeskAction::Claimed { .. }));
            let by = |entry: &eventbus_core::DeskEntry| entry.decision.by.clone();
            assert_eq!(first_claim.map(by), redriven.first().map(|entry| by(entry)));
            assert_eq!(redriven[0].decision.because, "both at once");
        }
    }
    assert!(shared > 0, "the two never met");
}

#[tokio::test]
async fn what_an_operator_claimed_before_a_crash_is_open_again_when_the_claim_ends() {
    let test = TestBus::new();
    let (_consumer, calls) = billing(&test).await;
    broken(&test, &calls, 1..2).await;
    calls.mend_all();
    let (ann, broker) = desk(&test, 1);
    broker.fail(|message| status_of(message).is_none().then_some(ErrorKind::Timeout));
    let hung = tokio::time::timeout(SECOND, ann.redrive(Redrive::all().by("ann"))).await;
    hung.expect_err("it hangs between claim and event");

    let (bob, _) = desk(&test, 2);
    let letter = bob.list().await.unwrap().remove(0);
    let DeadLetterStatus::Claimed { decision, until } = &letter.status else {
        panic!("{:?}", letter.status);
    };
    assert_eq!(decision.by, "ann");
    assert_eq!(*until, decision.at.plus(DEAD_LETTER_CLAIM_TIME));
    let report = bob.redrive(Redrive::all()).await.unwrap();
    assert_eq!((report.done, report.taken), (0, 1));
    let error = bob.edit(&letter.id, Edit::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.to_string().contains("ann"), "{error}");

    test.advance(DEAD_LETTER_CLAIM_TIME).await;
    assert_eq!(
        bob.show(&letter.id).await.unwrap().status,
        DeadLetterStatus::Open
    );
    assert_eq!(bob.redrive(Redrive::all().by("bob")).await.unwrap().done, 1);
    test.settled().await;
    assert_eq!(calls.attempts(1), [1, 1]);
}

#[tokio::test]
async fn an_event_that_was_published_before_a_crash_is_published_again_with_its_id() {
    let test = TestBus::new();
    let (_consumer, calls) = billing(&test).await;
    broken(&test, &calls, 1..3).await;
    calls.mend_all();
    let (ann, broker) = desk(&test, 1);
    broker.fail(|message| match status_of(message) {
        Some("redriven" | "edited") => Some(ErrorKind::Unavailable),
        _ => None,
    });
    let edited = ann.list().await.unwrap().remove(1);
    let edit = || Edit::new().data(r#"{"order":9,"amount":9}"#);
    assert!(
        ann.redrive(Redrive::one(ann.list().await.unwrap()[0].id.clone()))
            .await
            .is_err()
    );
    assert!(ann.edit(&edited.id, edit()).await.is_err());
    broker.mend();
    test.advance(DEAD_LETTER_CLAIM_TIME).await;
    assert_eq!(ann.list().await.unwrap().len(), 2);
    let others = Redrive::matching(move |letter| letter.id != edited.id);
    assert_eq!(ann.redrive(others).await.unwrap().done, 1);
    let last = ann.list().await.unwrap().remove(0);
    let new = ann.edit(&last.id, edit()).await.unwrap();
    test.settled().await;
    let published = test.published_with_envelopes::<OrderCreated>().await;
    let ids = |order: u64| -> Vec<EventId> {
        let of_order = published.iter().filter(|(_, event)| event.order == order);
        of_order.map(|(envelope, _)| envelope.id.clone()).collect()
    };
    assert_eq!(ids(9), [new.clone(), new]);
    let first = if ids(1).len() == 3 { ids(1) } else { ids(2) };
    assert_eq!(first, vec![first[0].clone(); 3]);
}

#[tokio::test]
async fn a_redrive_whose_broker_goes_away_says_so_and_notes_what_was_done() {
    let test = TestBus::new();
    let (_consumer, calls) = billing(&test).await;
    broken(&test, &calls, 0..10).await;
    calls.mend_all();
    let (ann, broker) = desk(&test, 1);
    broker.fail(|message| {
        let is_event = status_of(message).is_none();
        (is_event && message.key == Some(Key::from("7"))).then_some(ErrorKind::Unavailable)
    });
    let error = ann.redrive(Redrive::all()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    test.settled().await;
    assert_eq!(orders_of(&ann.list().await.unwrap(), &test), [7]);
    broker.mend();
    test.advance(DEAD_LETTER_CLAIM_TIME).await;
    assert_eq!(ann.redrive(Redrive::all()).await.unwrap().done, 1);
    test.settled().await;
    for number in 0..10 {
        assert_eq!(calls.attempts(number), [1, 1]);
    }
}

#[tokio::test]
async fn letters_without_a_key_are_dealt_with_once_also_on_several_partitions() {
    let test = TestBus::new();
    let spec = TopicSpec::new(Topic::from_static("orders.billing.dlq")).with_partitions(4);
    test.apply_topics(&[spec]).await.unwrap();
    let (_consumer, calls) = billing(&test).await;
    for number in 0..40 {
        calls.break_order(number);
        let body = format!(r#"{{"event_type":"OrderCreated","order":{number},"amount":0}}"#);
        let keyless = Message::new(OrderCreated::TOPIC, body);
        test.broker().publish(vec![keyless]).await.unwrap();
    }
    test.run_out().await;
    calls.mend_all();
    let letters = test.dead_letters().await;
    assert!(letters.iter().all(|letter| letter.message.key.is_none()));
    let (ann, bob) = (desk(&test, 1).0, desk(&test, 2).0);
    let redrive = || Redrive::all().rate(2);
    let (ann, bob) = tokio::join!(ann.redrive(redrive()), bob.redrive(redrive()));
    assert_eq!(ann.unwrap().done + bob.unwrap().done, 40);
    test.settled().await;
    assert!(test.dead_letters().await.is_empty());
    for number in 0..40 {
        assert_eq!(calls.attempts(number), [1, 1], "order {number}");
    }
}

// ---- what others wrote on a topic of dead letters

/// A record on the topic of dead letters of `billing`, with these headers.
fn foreign(headers: &[(&str, &str)], payload: &str) -> Message {
    let mut built = Headers::builder();
    for (name, value) in headers {
        built = built.push(name, value).expect("within limits");
    }
    let topic = Topic::new(&format!("{}.billing.dlq", OrderCreated::TOPIC)).expect("a topic");
    Message::new(topic, payload.to_owned())
        .with_key("k")
        .with_headers(built.build())
}

fn foreign_letter(id: &str, more: &[(&str, &str)]) -> Message {
    const TOPIC: Topic = OrderCreated::TOPIC;
    let time = "2026-01-01T00:00:00Z";
    let topic = TOPIC.to_string();
    let mut headers = vec![
        ("eb-dlq-id", id),
        ("eb-dlq-topic", topic.as_str()),
        ("eb-dlq-group", "billing"),
        ("eb-dlq-first-failed-at", time),
        ("eb-dlq-failed-at", time),
    ];
    headers.extend(more);
    foreign(&headers, "x")
}

async fn desk_over(records: Vec<Message>) -> (TestBus, DeadLetters) {
    let test = TestBus::new();
    let taken = test.broker().publish(records).await;
    taken.expect("they are taken");
    let desk = test.bus().dead_letters("billing", &[OrderCreated::TOPIC]);
    (test, desk.expect("the names are sound"))
}

#[tokio::test]
async fn a_letter_that_says_it_is_endless_is_listed_and_counts_as_a_page() {
    let endless = [("eb-dlq-whole", "18446744073709551615")];
    let letters = ["1", "2"].map(|id| foreign_letter(id, &endless));
    let (_test, desk) = desk_over(letters.into()).await;
    // Its parts are missing: it is left out, and said in the log.
    assert!(desk.list().await.expect("it can be read").is_empty());
}

#[tokio::test]
async fn a_note_of_a_later_version_leaves_the_letter_open() {
    let note = [
        ("eb-dlq-id", "1"),
        ("eb-dlq-group", "billing"),
        ("eb-dlq-status", "postponed"),
        ("eb-dlq-at", "2026-01-01T00:00:00Z"),
    ];
    let (_test, desk) = desk_over(vec![foreign_letter("1", &[]), foreign(&note, "")]).await;
    assert_eq!(desk.list().await.expect("it can be read").len(), 1);
}

#[tokio::test]
async fn an_event_that_says_it_was_redriven_as_often_as_can_be_is_redriven_again() {
    let redriven = [("eb-redrives", "4294967295")];
    let (_test, desk) = desk_over(vec![foreign_letter("1", &redriven)]).await;
    let report = desk.redrive(Redrive::all()).await.expect("it is answered");
    assert_eq!(report.done, 1);
}

#[tokio::test]
async fn a_letter_published_as_an_event_has_a_dead_letter_of_its_own() {
    let test = TestBus::like(MemoryProfile::Kafka);
    let (_consumer, _) = billing(&test).await;
    let copied = foreign_letter(
        "1",
        &[("eb-dlq-status", "discarded"), ("eb-dlq-kept-x", "y")],
    );
    let whole = Message::new(OrderCreated::TOPIC, "x").with_headers(copied.headers.clone());
    // This one is stored in parts.
    let large = largest(&test, None, copied.headers);
    let taken = test.broker().publish(vec![whole.clone(), large.clone()]);
    taken.await.expect("they are taken");
    test.run_out().await;
    let letters = test.dead_letters().await;
    assert_eq!(letters.len(), 2);
    for original in [whole, large] {
        assert!(letters.iter().any(|letter| letter.message == original));
    }
}
