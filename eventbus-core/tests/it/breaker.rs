//! A consumer that would only fail holds, burns nothing, and drains everything when it is mended.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use eventbus_core::{
    BoxError, Breaker, ConsumerState, Context, Error, ErrorKind, OnError, RetryPolicy,
};
use eventbus_testkit::TestBus;

use crate::failures::lag;
use crate::fixtures::{Calls, MINUTE, OrderCreated, SECOND, noting, order};

#[derive(Debug, Default)]
struct Provider {
    away: AtomicBool,
    attempts_most: AtomicUsize,
    calls: AtomicUsize,
    running: AtomicUsize,
    running_most: AtomicUsize,
}

/// Fails 19 of 20 orders while the provider is away.
async fn charge(order: OrderCreated, cx: Context<Provider>) -> Result<(), BoxError> {
    let provider = cx.state();
    provider.calls.fetch_add(1, Ordering::SeqCst);
    let running = provider.running.fetch_add(1, Ordering::SeqCst) + 1;
    provider.running_most.fetch_max(running, Ordering::SeqCst);
    let attempt = cx.attempt() as usize;
    provider.attempts_most.fetch_max(attempt, Ordering::SeqCst);
    tokio::task::yield_now().await;
    provider.running.fetch_sub(1, Ordering::SeqCst);
    match provider.away.load(Ordering::SeqCst) && !order.order.is_multiple_of(20) {
        true => Err("the provider is away".into()),
        false => Ok(()),
    }
}

#[tokio::test]
async fn a_consumer_whose_handlers_mostly_fail_holds_and_burns_nothing() {
    let test = TestBus::new();
    let provider = Arc::new(Provider::default());
    provider.away.store(true, Ordering::SeqCst);
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&provider))
        .on(charge)
        .retry(RetryPolicy::fixed(3, SECOND));
    let consumer = test.spawn(consumer).await;
    for number in 1..=300 {
        test.publish(order(number)).await.unwrap();
    }
    test.settled().await;
    let status = consumer.status();
    assert!(
        matches!(status.state, ConsumerState::Holding { .. }),
        "{status:?}"
    );
    let (calls, before) = (provider.calls.load(Ordering::SeqCst), status.counts);
    provider.running_most.store(0, Ordering::SeqCst);

    test.advance(20 * MINUTE).await;
    let probes = provider.calls.load(Ordering::SeqCst) - calls;
    let after = consumer.status().counts;
    assert!(probes >= 20, "{probes} probes");
    // A lucky probe lets it go on, and a few failures make it hold again.
    let counted = after.failed_attempts - before.failed_attempts;
    assert!(counted <= 15 * 6, "{counted} attempts were counted");
    assert!(provider.attempts_most.load(Ordering::SeqCst) <= 3);
    assert_eq!(after.dead_lettered, before.dead_lettered);
    assert!(test.dead_letters().await.is_empty());

    provider.away.store(false, Ordering::SeqCst);
    test.run_out().await;
    assert_eq!(consumer.status().state, ConsumerState::Running);
    assert_eq!(consumer.status().counts.handled, 300);
    assert_eq!(lag(&test, "billing").await, 0);
    assert!(test.dead_letters().await.is_empty());
}

#[tokio::test]
async fn a_held_consumer_probes_one_at_a_time_and_counts_no_attempt() {
    let test = TestBus::new();
    let provider = Arc::new(Provider::default());
    provider.away.store(true, Ordering::SeqCst);
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&provider))
        .on(charge)
        .retry(RetryPolicy::fixed(3, SECOND));
    let consumer = test.spawn(consumer).await;
    for number in (1..=300).filter(|number| number % 20 != 0) {
        test.publish(order(number)).await.unwrap();
    }
    test.settled().await;
    let before = consumer.status().counts;
    let calls = provider.calls.load(Ordering::SeqCst);
    provider.running_most.store(0, Ordering::SeqCst);
    test.advance(20 * MINUTE).await;
    let probes = provider.calls.load(Ordering::SeqCst) - calls;
    assert!((20..=80).contains(&probes), "{probes} probes");
    assert_eq!(provider.running_most.load(Ordering::SeqCst), 1);
    assert_eq!(consumer.status().counts, before);
    assert!(provider.attempts_most.load(Ordering::SeqCst) <= 2);
    assert!(before.failed_attempts <= 50, "{before:?}");
}

#[tokio::test]
async fn no_dead_letter_is_written_while_the_consumer_holds() {
    let test = TestBus::new();
    let calls = Calls::new();
    (1..=200).for_each(|number| calls.break_order(number));
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(noting)
        .concurrency(50)
        .workers(2)
        .retry(RetryPolicy::none());
    let consumer = test.spawn(consumer).await;
    for number in 1..=200 {
        test.publish(order(number)).await.unwrap();
    }
    test.settled().await;
    let stored = consumer.status().counts.dead_lettered;
    assert!(stored < 100, "{stored}");
    test.advance(10 * MINUTE).await;
    assert!(matches!(
        consumer.status().state,
        ConsumerState::Holding { .. }
    ));
    assert_eq!(consumer.status().counts.dead_lettered, stored);

    calls.mend_all();
    test.run_out().await;
    let counts = consumer.status().counts;
    assert_eq!(counts.handled + counts.dead_lettered, 200);
    assert_eq!(test.dead_letters().await.len() as u64, counts.dead_lettered);
    assert_eq!(lag(&test, "billing").await, 0);
}

#[derive(Debug)]
struct Declined;

impl std::fmt::Display for Declined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("declined")
    }
}

impl std::error::Error for Declined {}

#[tokio::test]
async fn what_the_policy_rejects_never_holds_the_consumer() {
    let test = TestBus::new();
    let consumer = test
        .consumer("billing")
        .on(async |_: OrderCreated, _: Context| Err(Declined.into()))
        .breaker(Breaker::default().with_samples_min(10))
        .retry(RetryPolicy::default().when(|_: &Declined| OnError::DeadLetter));
    let consumer = test.spawn(consumer).await;
    for number in 1..=100 {
        test.publish(order(number)).await.unwrap();
    }
    test.settled().await;
    assert_eq!(consumer.status().state, ConsumerState::Running);
    assert_eq!(test.dead_letters().await.len(), 100);
}

#[tokio::test]
async fn a_paused_consumer_starts_nothing_until_it_is_resumed() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(noting);
    let consumer = test.spawn(consumer).await;
    consumer.pause();
    test.publish(order(1)).await.unwrap();
    test.advance(MINUTE).await;
    assert_eq!(consumer.status().state, ConsumerState::Paused);
    assert!(calls.all().is_empty());
    consumer.resume();
    test.settled().await;
    assert_eq!(consumer.status().state, ConsumerState::Running);
    assert_eq!(calls.all().len(), 1);
}

#[tokio::test]
async fn an_attempt_that_fails_during_a_pause_counts() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .retry(RetryPolicy::fixed(3, 10 * SECOND))
        .on(async |order: OrderCreated, cx: Context<Calls>| {
            cx.state().note(&order, cx.attempt());
            tokio::time::sleep(5 * SECOND).await;
            Err("broken".into())
        });
    let consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    tokio::time::sleep(SECOND).await;
    consumer.pause();
    test.advance(MINUTE).await;
    assert_eq!(calls.attempts(1), [1]);
    consumer.resume();
    test.run_out().await;
    assert_eq!(calls.attempts(1), [1, 2, 3]);
    assert_eq!(test.dead_letters().await[0].attempts, 3);
}

#[tokio::test]
async fn a_handler_that_says_that_what_it_needs_is_away_holds_its_consumer_and_burns_nothing() {
    let test = TestBus::new();
    let provider = Arc::new(Provider::default());
    provider.away.store(true, Ordering::SeqCst);
    let ask = async |order: OrderCreated, cx: Context<Provider>| -> Result<(), BoxError> {
        charge(order, cx).await.map_err(|_| {
            Error::new(ErrorKind::Unavailable, "charge", "the provider is away").into()
        })
    };
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&provider))
        .on(ask)
        .retry(RetryPolicy::none().when(|_: &Error| OnError::Hold));
    let consumer = test.spawn(consumer).await;
    // Far fewer than a breaker would need.
    for number in 1..=3 {
        test.publish(order(number)).await.unwrap();
    }
    test.settled().await;
    let ConsumerState::Holding { reason, .. } = consumer.status().state else {
        panic!("it holds: {:?}", consumer.status());
    };
    assert!(reason.contains("the provider is away"), "{reason}");
    test.advance(20 * MINUTE).await;
    assert_eq!(consumer.status().counts.failed_attempts, 0);
    assert!(test.dead_letters().await.is_empty());
    provider.away.store(false, Ordering::SeqCst);
    test.run_out().await;
    assert_eq!(consumer.status().state, ConsumerState::Running);
    assert_eq!(consumer.status().counts.handled, 3);
    assert_eq!(provider.attempts_most.load(Ordering::SeqCst), 1);
}
