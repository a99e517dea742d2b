//! Batch handlers: each item has its own verdict, and its key its order.

use std::sync::Arc;

use eventbus_core::{BatchItem, BoxError, Consumer, Event, Message, Publisher, RetryPolicy};
use eventbus_testkit::TestBus;

use crate::failures::lag;
use crate::fixtures::{Calls, OrderCreated, OrderPaid, SECOND, amount, order, paid};

type Items = Vec<BatchItem<OrderCreated, Calls>>;

/// Notes all items, publishes for each, and fails those that are broken by themselves.
async fn each(items: Items) -> Result<(), BoxError> {
    for item in &items {
        item.cx.state().note(&item.event, item.cx.attempt());
        item.cx.publish(paid(item.event.order))?;
        if let Err(error) = item.cx.state().check(item.event.order) {
            item.fail(error);
        }
    }
    Ok(())
}

/// Fails the whole call when one item is broken.
async fn all(items: Items) -> Result<(), BoxError> {
    for item in &items {
        item.cx.state().note(&item.event, item.cx.attempt());
    }
    items
        .iter()
        .try_for_each(|item| item.cx.state().check(item.event.order))
}

/// Publishes while the consumer is paused, so that all of it is there at once.
async fn at_once(test: &TestBus, consumer: &Consumer, events: Vec<OrderCreated>) {
    consumer.pause();
    for event in events {
        test.publish(event).await.unwrap();
    }
    test.settled().await;
    consumer.resume();
    test.settled().await;
}

async fn consumer(test: &TestBus, calls: &Arc<Calls>, whole: bool) -> Consumer {
    let builder = test
        .consumer("billing")
        .shared_state(Arc::clone(calls))
        .workers(1)
        .retry(RetryPolicy::fixed(2, SECOND));
    match whole {
        true => test.spawn(builder.on_batch(100, all)).await,
        false => test.spawn(builder.on_batch(100, each)).await,
    }
}

#[tokio::test]
async fn an_item_that_fails_costs_the_others_nothing() {
    let test = TestBus::new();
    let calls = Calls::new();
    calls.break_order(3);
    let consumer = consumer(&test, &calls, false).await;
    at_once(&test, &consumer, (1..=10).map(order).collect()).await;
    test.run_out().await;
    for number in (1..=10).filter(|number| *number != 3) {
        assert_eq!(calls.attempts(number), [1], "order {number}");
    }
    assert_eq!(calls.attempts(3), [1, 2]);
    let letters = test.dead_letters().await;
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].error, "order 3 is broken");
    assert_eq!(test.published::<OrderPaid>().await.len(), 9);
    assert_eq!(lag(&test, "billing").await, 0);
}

#[tokio::test]
async fn an_error_of_the_whole_call_repeats_the_items_one_by_one() {
    let test = TestBus::new();
    let calls = Calls::new();
    calls.break_order(3);
    let consumer = consumer(&test, &calls, true).await;
    at_once(&test, &consumer, (1..=10).map(order).collect()).await;
    test.run_out().await;
    for number in (1..=10).filter(|number| *number != 3) {
        assert_eq!(calls.attempts(number), [1, 1], "order {number}");
    }
    assert_eq!(calls.attempts(3), [1, 1, 2]);
    assert_eq!(test.dead_letters().await.len(), 1);
    assert_eq!(consumer.status().counts.failed_attempts, 2);
    assert_eq!(consumer.status().counts.handled, 9);
}

#[tokio::test]
async fn items_behind_a_failed_one_of_their_key_are_handled_again_after_it() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .workers(1)
        .retry(RetryPolicy::fixed(3, SECOND))
        .on_batch(100, async |items: Items| {
            for item in &items {
                item.cx.state().note(&item.event, item.cx.attempt());
                item.cx.publish(paid(item.event.amount))?;
                if item.event.amount == 2 && item.cx.attempt() == 1 {
                    item.fail("not yet");
                }
            }
            Ok(())
        });
    let consumer = test.spawn(consumer).await;
    at_once(
        &test,
        &consumer,
        (1..=4).map(|step| amount(1, step)).collect(),
    )
    .await;
    assert_eq!(calls.amounts(1), [1, 2, 3, 4]);
    assert_eq!(test.published::<OrderPaid>().await, [paid(1)]);
    test.run_out().await;
    assert_eq!(calls.amounts(1)[4..], [2, 3, 4]);
    assert_eq!(consumer.status().counts.handled, 4);
    assert_eq!(test.published::<OrderPaid>().await.len(), 4);
}

#[tokio::test]
async fn an_undecodable_item_is_dead_lettered_from_among_good_ones() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = consumer(&test, &calls, false).await;
    consumer.pause();
    test.publish(amount(1, 1)).await.unwrap();
    for damaged in [r#"{"event_type":"OrderCreated","order":"x"}"#, "not JSON"] {
        let damaged = Message::new(OrderCreated::TOPIC, damaged).with_key("1");
        test.broker().publish(vec![damaged]).await.unwrap();
    }
    test.publish(amount(1, 2)).await.unwrap();
    test.publish(amount(2, 1)).await.unwrap();
    test.settled().await;
    consumer.resume();
    test.run_out().await;
    let letters = test.dead_letters().await;
    assert_eq!(letters.len(), 2);
    assert!(
        letters
            .iter()
            .all(|letter| letter.cause == "undecodable" && letter.attempts == 0)
    );
    assert_eq!(calls.amounts(1).last(), Some(&2));
    assert_eq!(consumer.status().counts.handled, 3);
    assert_eq!(consumer.status().counts.failed_attempts, 0);
}

#[tokio::test]
async fn items_behind_a_failed_one_leave_with_it_when_the_consumer_ends() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .workers(1)
        .on_batch(100, async |items: Items| {
            tokio::time::sleep(5 * SECOND).await;
            for item in &items {
                item.cx.state().note(&item.event, item.cx.attempt());
            }
            items[0].fail("not yet");
            Ok(())
        });
    let consumer = test.spawn(consumer).await;
    consumer.pause();
    for step in 1..=3 {
        test.publish(amount(1, step)).await.unwrap();
    }
    test.settled().await;
    consumer.resume();
    tokio::time::sleep(SECOND).await;
    consumer.shutdown().await.unwrap();
    assert_eq!(calls.amounts(1), [1, 2, 3], "nothing is started again");
    assert_eq!(lag(&test, "billing").await, 3);
}
