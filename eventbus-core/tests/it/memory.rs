//! What only the in-memory broker has: bounded room, fault injection, profiles of topics.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use eventbus_core::{
    AdminReply, AdminRequest, Breaker, Broker, Clock, ConsumerState, ErrorKind, Group, Headers,
    Key, Limits, MemoryBroker, MemoryConfig, MemoryProfile, Message, Outcome, Position, Publisher,
    RetryPolicy, Start, Subscription, Timestamp, Topic, Until, header,
};
use eventbus_testkit::{Probe, TestBus, text_of};

use crate::failures::lag;
use crate::fixtures::{Calls, SECOND, order, paying};

const TOPIC: Topic = Topic::from_static("orders");
const GROUP: Group = Group::from_static("payments");
const OVERHEAD: usize = MemoryConfig::MESSAGE_OVERHEAD;

/// A server with room for `messages` of 72 bytes, on one partition.
fn small(messages: usize) -> MemoryBroker {
    MemoryBroker::with(
        MemoryConfig::default()
            .with_partitions(1)
            .with_bytes(messages * (72 + OVERHEAD)),
    )
}

fn message(topic: &Topic, number: usize) -> Message {
    Message::new(topic.clone(), format!("{number:071}")).with_key("k")
}

async fn publish(broker: &MemoryBroker, topic: &Topic, numbers: std::ops::Range<usize>) {
    let batch = numbers.map(|number| message(topic, number)).collect();
    broker.publish(batch).await.expect("there is room");
}

async fn member(broker: &MemoryBroker) -> Probe {
    join(broker, Subscription::group(GROUP, vec![TOPIC])).await
}

async fn join(broker: &MemoryBroker, subscription: Subscription) -> Probe {
    let probe = Probe::join(broker, subscription).await;
    probe.expect("the subscription is honoured")
}

fn number(text: &str) -> usize {
    text.parse().expect("the text is a number")
}

#[tokio::test]
async fn what_every_group_has_settled_makes_room() {
    let broker = small(10);
    let mut probe = member(&broker).await;
    for round in 0..20 {
        publish(&broker, &TOPIC, round * 5..round * 5 + 5).await;
        let deliveries = probe.collect(5).await;
        assert_eq!(number(&text_of(&deliveries[0])), round * 5);
        probe.settle(&deliveries).await;
    }
    assert!(probe.gaps().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_a_group_has_not_settled_is_kept_and_publishing_is_refused_in_time() {
    let broker = small(10);
    let mut probe = member(&broker).await;
    publish(&broker, &TOPIC, 0..8).await;
    let batch = (8..13).map(|number| message(&TOPIC, number)).collect();
    let error = broker.publish(batch).await.expect_err("there is no room");
    let left: Vec<_> = error.unpublished.iter().map(|left| left.index).collect();
    assert_eq!(left, [2, 3, 4]);
    for unpublished in &error.unpublished {
        assert_eq!(unpublished.outcome, Outcome::NotTaken);
        assert_eq!(unpublished.error.kind(), ErrorKind::RateLimited);
        assert!(unpublished.error.is_retryable());
        assert_eq!(unpublished.message, message(&TOPIC, unpublished.index + 8));
    }
    let texts = probe.collect_texts(10).await;
    assert!(texts.iter().map(|text| number(text)).eq(0..10));
}

#[tokio::test(start_paused = true)]
async fn a_waiting_publish_goes_on_when_something_is_settled() {
    let broker = small(10);
    let mut probe = member(&broker).await;
    publish(&broker, &TOPIC, 0..10).await;
    let publisher = broker.clone();
    let waiting = tokio::spawn(async move { publish(&publisher, &TOPIC, 10..20).await });
    let mut seen = 0;
    while seen < 20 {
        let deliveries = probe.collect(1).await;
        assert_eq!(number(&text_of(&deliveries[0])), seen);
        probe.settle(&deliveries).await;
        seen += 1;
    }
    waiting.await.expect("everything was taken");
}

#[tokio::test]
async fn closing_ends_a_waiting_publish() {
    let broker = small(2);
    let _member = member(&broker).await;
    publish(&broker, &TOPIC, 0..2).await;
    let waiting = broker.publish(vec![message(&TOPIC, 2)]);
    let (refused, closed) = tokio::join!(waiting, broker.close());
    closed.expect("a client can be closed");
    let error = refused.expect_err("the client is closed");
    assert_eq!(error.unpublished[0].error.kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn a_topic_without_groups_keeps_the_newest_and_a_slow_reader_hears_of_the_gap() {
    let broker = small(32);
    publish(&broker, &TOPIC, 0..20).await;
    let limits = Limits::default().with_messages(1);
    let mut slow = join(
        &broker,
        Subscription::reader(vec![TOPIC]).with_limits(limits),
    )
    .await;
    let first = slow.collect(1).await;
    publish(&broker, &TOPIC, 20..100).await;
    slow.settle(&first).await;
    let next = slow.collect(1).await;
    let (_, from, to) = slow.gaps()[0];
    assert_eq!(from, Position(1));
    assert_eq!(next[0].position, Some(to));
    assert_eq!(number(&text_of(&next[0])) as u128, to.0);
    let mut late = join(
        &broker,
        Subscription::reader(vec![TOPIC]).with_until(Until::Now),
    )
    .await;
    late.hear_until(|probe| probe.ended().len() == 1).await;
    assert!(late.gaps().is_empty(), "it asked for the earliest there is");
    assert!(late.waiting() >= 30, "{} are left", late.waiting());
}

#[tokio::test(start_paused = true)]
async fn dead_letters_are_never_dropped_for_room() {
    let broker = small(10);
    let dead_letters = Topic::from_static("orders.payments.dlq");
    publish(&broker, &dead_letters, 0..6).await;
    publish(&broker, &TOPIC, 0..50).await;
    let reader = Subscription::reader(vec![dead_letters]).with_until(Until::Now);
    let mut reader = join(&broker, reader).await;
    assert_eq!(reader.collect(6).await.len(), 6);
}

#[tokio::test(start_paused = true)]
async fn a_full_server_has_a_reserve_for_dead_letters_and_for_what_follows_from_a_message() {
    let broker = small(32);
    let _member = member(&broker).await;
    publish(&broker, &TOPIC, 0..32).await;
    let refused = broker.publish(vec![message(&TOPIC, 32)]).await;
    refused.expect_err("what comes from outside waits for room");
    let cause = Headers::builder().push(header::CAUSATION_ID, "");
    let following = message(&TOPIC, 33).with_headers(cause.expect("within limits").build());
    let taken = broker.publish(vec![following.clone()]).await;
    taken.expect("a sixteenth is left for it");
    let refused = broker.publish(vec![following]).await;
    refused.expect_err("the reserve is bounded");
    publish(&broker, &Topic::from_static("orders.payments.dlq"), 0..2).await;
    let letter = message(&Topic::from_static("orders.payments.dlq"), 3);
    let refused = broker.publish(vec![letter]).await;
    let error = refused.expect_err("the reserve is bounded");
    assert!(error.is_retryable(), "{error}");
}

#[tokio::test]
async fn handlers_empty_a_server_that_is_full_of_their_own_events() {
    let config = MemoryConfig::default()
        .with_bytes(64 * 1024)
        .with_publish_timeout(SECOND);
    let test = TestBus::wrapping(config, |server| server);
    let calls = Calls::new();
    for number in 0..5 {
        calls.break_order(number);
    }
    let consumer = test.consumer("billing").shared_state(Arc::clone(&calls));
    let consumer = consumer.on(paying).retry(RetryPolicy::none());
    // Its breaker would only hold back what shows whether there is room.
    let consumer = consumer.breaker(Breaker::default().with_failure_rate(f64::INFINITY));
    let consumer = test.spawn(consumer).await;
    consumer.pause();
    let mut published = 0;
    while test.publish(order(published)).await.is_ok() {
        published += 1;
    }
    assert!(published > 50, "{published}");
    consumer.resume();
    test.run_out().await;
    assert_eq!(consumer.status().state, ConsumerState::Running);
    assert_eq!(lag(&test, "billing").await, 0);
    assert_eq!(test.dead_letters().await.len(), 5);
    assert_eq!(consumer.status().counts.handled, published - 5);
}

#[tokio::test]
async fn dead_letters_have_one_partition_and_history_on_every_profile() {
    for profile in [MemoryProfile::RabbitMq, MemoryProfile::Kafka] {
        let broker = MemoryBroker::with(MemoryConfig::default().like(profile));
        let dead_letters = Topic::from_static("orders.payments.dlq");
        publish(&broker, &dead_letters, 0..3).await;
        let request = AdminRequest::DescribeTopics(vec![dead_letters.clone()]);
        let reply = broker.admin(request).await.expect("the topic is there");
        let AdminReply::Topics(reports) = reply else {
            panic!("not an answer to the request");
        };
        assert_eq!(reports[0].partitions, 1);
        let reader = Subscription::reader(vec![dead_letters])
            .with_start(Start::Position(Position(1)))
            .with_until(Until::Now);
        let mut reader = join(&broker, reader).await;
        reader.hear_until(|probe| probe.ended().len() == 1).await;
        assert_eq!(reader.waiting(), 2);
    }
}

#[tokio::test]
async fn a_lost_lane_is_told_to_its_living_owner_and_late_settlements_are_counted() {
    let broker = MemoryBroker::with(MemoryConfig::default().with_partitions(1));
    let mut probe = member(&broker).await;
    publish(&broker, &TOPIC, 0..2).await;
    let before = probe.collect(2).await;
    broker.lose(&GROUP);
    probe.hear_until(|probe| probe.lost().len() == 1).await;
    probe.settle(&before).await;
    assert_eq!(broker.stale_settlements(), 2);
    let again = probe.collect(2).await;
    assert_eq!(again[0].handed_out, Some(2));
    probe.settle(&again).await;
}

#[tokio::test]
async fn deliverable_says_whether_something_can_go_on() {
    let broker = MemoryBroker::with(MemoryConfig::default().with_partitions(1));
    assert!(!broker.deliverable());
    let limits = Limits::default().with_messages(1);
    let subscription = Subscription::group(GROUP, vec![TOPIC]).with_limits(limits);
    let mut probe = join(&broker, subscription).await;
    assert!(broker.deliverable(), "the assignment was not heard");
    probe.hold(1).await;
    assert!(!broker.deliverable());
    publish(&broker, &TOPIC, 0..2).await;
    assert!(broker.deliverable());
    let first = probe.collect(1).await;
    assert!(!broker.deliverable(), "the credit is used up");
    probe.settle(&first).await;
    assert!(broker.deliverable());
    let second = probe.collect(1).await;
    probe.settle(&second).await;
    assert!(!broker.deliverable());
    probe.close().await;
    publish(&broker, &TOPIC, 2..3).await;
    assert!(!broker.deliverable(), "nobody is there");
}

#[tokio::test]
async fn messages_without_key_go_to_each_partition_in_turn() {
    let broker = MemoryBroker::new();
    let mut probe = member(&broker).await;
    let batch = (0..8).map(|_| Message::new(TOPIC, "x")).collect();
    broker.publish(batch).await.expect("there is room");
    let deliveries = probe.collect(8).await;
    for lane in probe.assigned() {
        let count = deliveries
            .iter()
            .filter(|found| found.receipt.lane == lane.lane);
        assert_eq!(count.count(), 2);
    }
}

#[derive(Debug, Default)]
struct HandClock(AtomicI64);

impl Clock for HandClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_micros(self.0.load(Ordering::SeqCst))
    }
}

#[tokio::test(start_paused = true)]
async fn a_read_until_a_time_to_come_ends_with_the_clock() {
    let clock = Arc::new(HandClock::default());
    let shared: Arc<dyn Clock> = Arc::<HandClock>::clone(&clock);
    let broker = MemoryBroker::with(
        MemoryConfig::default()
            .with_partitions(1)
            .with_clock(shared),
    );
    let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
    let until = |seconds| Subscription::reader(vec![TOPIC]).with_until(Until::Time(at(seconds)));
    let mut by_clock = join(&broker, until(5)).await;
    let mut by_message = join(&broker, until(10)).await;
    publish(&broker, &TOPIC, 0..1).await;
    by_clock.collect(1).await;
    clock.0.store(6_000_000, Ordering::SeqCst);
    by_clock.hear_until(|probe| probe.ended().len() == 1).await;
    clock.0.store(10_000_000, Ordering::SeqCst);
    publish(&broker, &TOPIC, 1..2).await;
    by_message
        .hear_until(|probe| probe.ended().len() == 1)
        .await;
    assert_eq!(by_message.waiting(), 1);
    let late = Subscription::reader(vec![TOPIC]).with_start(Start::Time(at(1)));
    let mut late = join(&broker, late).await;
    assert_eq!(number(&late.collect_texts(1).await[0]), 1);
}

#[tokio::test]
async fn a_large_message_is_not_overtaken_for_ever_by_small_ones_of_other_lanes() {
    let broker = MemoryBroker::with(MemoryConfig::default().with_partitions(2));
    let limits = Limits::default().with_bytes(300).with_batch(1);
    let subscription = Subscription::group(GROUP, vec![TOPIC]).with_limits(limits);
    let mut probe = join(&broker, subscription).await;
    probe.hold(2).await;
    let keys: Vec<_> = (0..2)
        .map(|partition| {
            (0..100)
                .map(Key::display)
                .find(|key| eventbus_core::partition_of(key, 2) == partition)
                .expect("some number belongs to each partition")
        })
        .collect();
    let small = (0..50).map(|_| Message::new(TOPIC, vec![0; 100]).with_key(keys[0].clone()));
    let large = Message::new(TOPIC, vec![1; 280]).with_key(keys[1].clone());
    broker
        .publish(small.chain([large]).collect())
        .await
        .expect("there is room");
    let mut before = 0;
    let mut held = probe.collect(1).await;
    while held[0].message.payload[0] == 0 {
        before += 1;
        probe.settle(&held).await;
        held = probe.collect(1).await;
    }
    assert!(before < 10, "{before} small messages came first");
}
