//! How a consumer ends: what runs is finished, what was not handled goes to the next owner.

use std::sync::Arc;

use eventbus_core::{
    BoxError, ConsumerBuilder, ConsumerState, Context, ErrorKind, Limits, MemoryConfig,
};
use eventbus_testkit::TestBus;
use tokio::time::Instant;

use crate::failures::lag;
use crate::fixtures::{Calls, OrderCreated, SECOND, amount, noting, order};

/// Notes the call when it ends, ten seconds after it began.
async fn slow(order: OrderCreated, cx: Context<Calls>) -> Result<(), BoxError> {
    tokio::time::sleep(10 * SECOND).await;
    cx.state().note(&order, cx.attempt());
    Ok(())
}

fn slowly(test: &TestBus, calls: &Arc<Calls>) -> ConsumerBuilder<Calls> {
    test.consumer("billing")
        .shared_state(Arc::clone(calls))
        .workers(2)
        .concurrency(4)
        .on(slow)
}

#[tokio::test]
async fn running_handlers_finish_and_queued_messages_go_to_the_next_owner() {
    let test = TestBus::new();
    let (first, second) = (Calls::new(), Calls::new());
    let consumer = test.spawn(slowly(&test, &first)).await;
    for number in 1..=40 {
        test.publish(order(number)).await.unwrap();
    }
    tokio::time::sleep(SECOND).await;
    let begun = Instant::now();
    consumer.shutdown().await.unwrap();
    let done: Vec<_> = first.all().iter().map(|call| call.order).collect();
    // Those that ran, and those before them that waited.
    assert!(begun.elapsed() < 20 * SECOND);
    assert!((2..=8).contains(&done.len()), "{done:?}");
    assert_eq!(lag(&test, "billing").await, 40 - done.len() as u64);

    let next = test
        .consumer("billing")
        .shared_state(Arc::clone(&second))
        .on(noting);
    let _next = test.spawn(next).await;
    test.settled().await;
    for number in 1..=40 {
        let times = usize::from(!done.contains(&number));
        assert_eq!(second.of(number).len(), times, "order {number}");
    }
    assert_eq!(lag(&test, "billing").await, 0);
}

#[tokio::test]
async fn with_one_key_the_next_owner_sees_exactly_the_rest() {
    let test = TestBus::new();
    let (first, second) = (Calls::new(), Calls::new());
    let consumer = test.spawn(slowly(&test, &first)).await;
    for step in 1..=10 {
        test.publish(amount(1, step)).await.unwrap();
    }
    tokio::time::sleep(25 * SECOND).await;
    consumer.shutdown().await.unwrap();
    assert_eq!(first.amounts(1), [1, 2, 3]);
    let next = test
        .consumer("billing")
        .shared_state(Arc::clone(&second))
        .on(noting);
    let _next = test.spawn(next).await;
    test.settled().await;
    assert_eq!(second.amounts(1), (4..=10).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_handler_longer_than_the_timeout_is_dropped_and_its_message_handed_on() {
    let test = TestBus::new();
    let (first, second) = (Calls::new(), Calls::new());
    let consumer = slowly(&test, &first).shutdown_timeout(2 * SECOND);
    let consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    tokio::time::sleep(SECOND).await;
    let begun = Instant::now();
    let error = consumer.shutdown().await.expect_err("it was dropped");
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.to_string().contains("not settled: 1"), "{error}");
    assert!(begun.elapsed() >= 2 * SECOND && begun.elapsed() < 5 * SECOND);
    assert!(first.all().is_empty());
    let next = test
        .consumer("billing")
        .shared_state(Arc::clone(&second))
        .on(noting);
    let _next = test.spawn(next).await;
    test.settled().await;
    assert_eq!(second.attempts(1), [1]);
}

#[tokio::test]
async fn a_dropped_consumer_is_a_crash_that_loses_nothing() {
    let test = TestBus::new();
    let (first, second) = (Calls::new(), Calls::new());
    let consumer = test.spawn(slowly(&test, &first)).await;
    for number in 1..=20 {
        test.publish(order(number)).await.unwrap();
    }
    tokio::time::sleep(SECOND).await;
    drop(consumer);
    tokio::time::sleep(20 * SECOND).await;
    assert!(first.all().is_empty(), "its handlers were dropped");
    let next = test
        .consumer("billing")
        .shared_state(Arc::clone(&second))
        .on(noting);
    let _next = test.spawn(next).await;
    test.settled().await;
    assert_eq!(second.all().len(), 20);
}

#[tokio::test]
async fn what_waits_for_a_late_retry_is_left_with_all_that_waits_behind_it() {
    let test = TestBus::wrapping(MemoryConfig::default().with_partitions(1), |broker| broker);
    let (first, second) = (Calls::new(), Calls::new());
    first.break_order(1);
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&first))
        .retry(eventbus_core::RetryPolicy::fixed(5, 60 * SECOND))
        .on(noting);
    let consumer = test.spawn(consumer).await;
    for (number, step) in [(1, 1), (1, 2), (2, 1)] {
        test.publish(amount(number, step)).await.unwrap();
    }
    test.settled().await;
    let begun = Instant::now();
    consumer.shutdown().await.unwrap();
    assert!(begun.elapsed() < SECOND);
    assert_eq!(first.amounts(1), [1]);
    let next = test
        .consumer("billing")
        .shared_state(Arc::clone(&second))
        .on(noting);
    let _next = test.spawn(next).await;
    test.settled().await;
    assert_eq!(second.amounts(1), [1, 2]);
    // It was settled behind what was left.
    assert_eq!((first.of(2).len(), second.of(2).len()), (1, 1));
}

#[tokio::test]
async fn a_retry_that_is_due_in_time_is_made_for_what_was_settled_behind_it() {
    let test = TestBus::wrapping(MemoryConfig::default().with_partitions(1), |broker| broker);
    let calls = Calls::new();
    calls.break_order(1);
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .retry(eventbus_core::RetryPolicy::fixed(5, 10 * SECOND))
        .on(noting);
    let consumer = test.spawn(consumer).await;
    for number in 1..=2 {
        test.publish(order(number)).await.unwrap();
    }
    test.settled().await;
    calls.mend_all();
    let begun = Instant::now();
    consumer.shutdown().await.unwrap();
    assert!(begun.elapsed() < 15 * SECOND);
    assert_eq!(calls.attempts(1), [1, 2]);
    assert_eq!(lag(&test, "billing").await, 0);
}

#[tokio::test]
async fn a_lane_revoked_during_a_shutdown_does_not_wait_for_workers_that_have_ended() {
    let test = TestBus::wrapping(MemoryConfig::default().with_partitions(2), |broker| broker);
    let (first, second) = (Calls::new(), Calls::new());
    let limits = Limits::default().with_revoke_timeout(60 * SECOND);
    let consumer = slowly(&test, &first).limits(limits);
    let consumer = test.spawn(consumer).await;
    // On the lane that stays with it.
    test.publish(order(2)).await.unwrap();
    tokio::time::sleep(SECOND).await;
    let shutdown = tokio::spawn(consumer.shutdown());
    tokio::time::sleep(SECOND).await;
    let next = test
        .consumer("billing")
        .shared_state(Arc::clone(&second))
        .limits(limits)
        .on(noting);
    let _next = test.spawn(next).await;
    for number in 3..=20 {
        test.publish(order(number)).await.unwrap();
    }
    tokio::time::sleep(SECOND).await;
    assert!(first.all().is_empty(), "it still runs");
    assert!(!second.all().is_empty(), "the other lane is free");
    shutdown.await.unwrap().unwrap();
    test.settled().await;
    assert_eq!((first.all().len(), second.all().len()), (1, 18));
}

#[tokio::test]
async fn a_held_or_paused_consumer_shuts_down_at_once() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(noting);
    let consumer = test.spawn(consumer).await;
    consumer.pause();
    for number in 1..=10 {
        test.publish(order(number)).await.unwrap();
    }
    test.settled().await;
    let begun = Instant::now();
    consumer.shutdown().await.unwrap();
    assert!(begun.elapsed() < SECOND);
    assert_eq!(lag(&test, "billing").await, 10);
}

#[tokio::test]
async fn a_message_that_waits_for_its_retry_is_handed_on() {
    let test = TestBus::new();
    let (first, second) = (Calls::new(), Calls::new());
    first.break_order(1);
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&first))
        .retry(eventbus_core::RetryPolicy::fixed(5, 60 * SECOND))
        .on(noting);
    let consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    consumer.run_until(std::future::ready(())).await.unwrap();
    assert!(test.dead_letters().await.is_empty());
    let next = test
        .consumer("billing")
        .shared_state(Arc::clone(&second))
        .on(noting);
    let _next = test.spawn(next).await;
    test.settled().await;
    assert_eq!(second.attempts(1), [1]);
}

#[tokio::test]
async fn a_consumer_whose_bus_is_closed_has_failed_and_says_so() {
    let test = TestBus::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Calls::new())
        .on(noting);
    let consumer = test.spawn(consumer).await;
    test.close().await.unwrap();
    // The consumer hears of it in its own task.
    tokio::time::sleep(SECOND).await;
    let state = consumer.status().state;
    assert!(matches!(state, ConsumerState::Failed { .. }), "{state:?}");
    let error = consumer
        .run_until(std::future::pending())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
}
