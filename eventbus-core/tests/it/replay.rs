//! A replay is a bounded read through the same handlers: no group moves, nothing is sent.

use std::sync::Arc;

use eventbus_core::{
    AdminRequest, Broker, ConsumerBuilder, Context, ErrorKind, Event, MemoryConfig, Position,
    Redrive, Replay, RetryPolicy, Start, Until,
};
use eventbus_testkit::TestBus;
use tokio::time::Instant;

use crate::failures::lag;
use crate::fixtures::{Calls, OrderCreated, OrderPaid, SECOND, amount, noting, order, paying};

fn noted(test: &TestBus, calls: &Arc<Calls>) -> ConsumerBuilder<Calls> {
    test.consumer("billing")
        .shared_state(Arc::clone(calls))
        .on(noting)
}

#[tokio::test]
async fn a_replay_ends_where_the_topic_ended_and_touches_no_group() {
    let test = TestBus::new();
    let (live, replayed) = (Calls::new(), Calls::new());
    let consumer = test.spawn(noted(&test, &live)).await;
    for number in 1..=10 {
        test.publish(order(number)).await.unwrap();
    }
    test.settled().await;
    consumer.pause();
    test.publish(order(11)).await.unwrap();
    let report = noted(&test, &replayed)
        .replay(Replay::from(Start::Earliest))
        .await
        .unwrap();
    assert_eq!((report.handled, report.skipped, report.gaps), (11, 0, 0));
    assert_eq!(replayed.all().len(), 11);
    assert_eq!(lag(&test, "billing").await, 1);
    assert_eq!(live.all().len(), 10);
    consumer.resume();
    test.settled().await;
    assert_eq!(live.all().len(), 11);
}

#[tokio::test]
async fn bounds_and_a_key_choose_what_is_replayed() {
    let test = TestBus::wrapping(MemoryConfig::default().with_partitions(1), |server| server);
    for step in 1..=5 {
        test.publish(amount(1, step)).await.unwrap();
        test.publish(amount(2, step)).await.unwrap();
    }
    let calls = Calls::new();
    let replay = Replay::from(Start::Position(Position(2))).until(Until::Position(Position(7)));
    let report = noted(&test, &calls).replay(replay.key("2")).await.unwrap();
    assert_eq!(calls.amounts(2), [2, 3]);
    assert!(calls.of(1).is_empty());
    assert_eq!((report.handled, report.skipped), (2, 3));
}

#[tokio::test]
async fn a_rate_spreads_a_replay_over_time() {
    let test = TestBus::new();
    for number in 0..200 {
        test.publish(order(number)).await.unwrap();
    }
    let calls = Calls::new();
    let begun = Instant::now();
    let replay = Replay::from(Start::Earliest).rate(20);
    let report = noted(&test, &calls).replay(replay).await.unwrap();
    assert_eq!(report.handled, 200);
    let took = begun.elapsed();
    assert!(took >= 9 * SECOND && took <= 12 * SECOND, "{took:?}");
    let all = calls.all();
    let early = all
        .iter()
        .filter(|call| call.at <= begun + 2 * SECOND)
        .count();
    assert!(early <= 60, "{early} of 200 in the first two seconds");
}

#[tokio::test]
async fn a_replay_publishes_only_where_that_is_allowed() {
    let test = TestBus::new();
    let calls = Calls::new();
    let live = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(paying);
    let live = test.spawn(live).await;
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    let again = || {
        let consumer = test.consumer("billing").shared_state(Arc::clone(&calls));
        consumer.retry(RetryPolicy::none()).on(paying)
    };
    let error = again()
        .replay(Replay::from(Start::Earliest))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("Replay::allow_publish"),
        "{error}"
    );
    assert_eq!(test.published::<OrderPaid>().await.len(), 1);
    let allowed = Replay::from(Start::Earliest).allow_publish();
    assert_eq!(again().replay(allowed).await.unwrap().handled, 1);
    // The same id again: whoever handled it before recognises it.
    let mut reader = test
        .read(&[OrderPaid::TOPIC], Start::Earliest, Some(Until::Now))
        .await
        .unwrap();
    let mut ids = Vec::new();
    while let Some(record) = reader.next().await.unwrap() {
        ids.push(test.envelope(&record.message).unwrap().id);
    }
    assert_eq!(ids.len(), 2);
    assert_eq!(ids[0], ids[1]);
    drop(live);
}

#[tokio::test]
async fn an_event_that_cannot_be_handled_ends_the_replay_and_says_where() {
    let test = TestBus::new();
    for step in 1..=9 {
        test.publish(amount(1, step)).await.unwrap();
    }
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .retry(RetryPolicy::fixed(3, SECOND))
        .on(async |order: OrderCreated, cx: Context<Calls>| {
            assert!(cx.is_replay());
            cx.state().note(&order, cx.attempt());
            match order.amount {
                4 => Err("step 4 is broken".into()),
                _ => Ok(()),
            }
        });
    let error = consumer
        .replay(Replay::from(Start::Earliest))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    let context: Vec<_> = error.context().map(|(name, _)| name).collect();
    assert_eq!(context, ["topic", "partition", "position"]);
    assert!(error.to_string().contains("step 4 is broken"), "{error}");
    assert!(error.to_string().contains("position: 3"), "{error}");
    assert_eq!(
        calls.amounts(1),
        [1, 2, 3, 4, 4, 4],
        "nothing behind it is handled"
    );
    assert!(test.dead_letters().await.is_empty());
}

#[tokio::test]
async fn gaps_are_reported() {
    let test = TestBus::wrapping(MemoryConfig::default().with_partitions(1), |server| server);
    for number in 1..=10 {
        test.publish(order(number)).await.unwrap();
    }
    let trim = AdminRequest::Trim {
        topic: OrderCreated::TOPIC,
        partition: 0,
        before: Position(4),
    };
    test.broker().admin(trim).await.unwrap();
    let calls = Calls::new();
    let replay = Replay::from(Start::Position(Position(0)));
    let report = noted(&test, &calls).replay(replay).await.unwrap();
    assert_eq!((report.handled, report.gaps), (6, 1));
}

#[tokio::test]
async fn redriven_messages_are_not_replayed_beside_their_originals() {
    let test = TestBus::new();
    let calls = Calls::new();
    calls.break_order(1);
    let consumer = noted(&test, &calls).retry(RetryPolicy::none());
    let consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    calls.mend_all();
    consumer
        .dead_letters()
        .redrive(Redrive::all())
        .await
        .unwrap();
    test.settled().await;
    assert_eq!(consumer.status().counts.handled, 1);
    let replayed = Calls::new();
    let report = noted(&test, &replayed)
        .replay(Replay::from(Start::Earliest))
        .await
        .unwrap();
    assert_eq!(replayed.of(1).len(), 1);
    assert_eq!((report.handled, report.skipped), (1, 1));
}
