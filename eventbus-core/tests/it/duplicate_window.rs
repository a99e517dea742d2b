//! With a duplicate window handlers run once per event, and nothing is lost, whatever fails when.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    BatchItem, BoxError, ClaimEvents, ConsumerBuilder, ConsumerState, Context, DuplicateStore,
    DuplicateWindow, Error, ErrorKind, EventClaim, EventId, Group, MemberId, MemoryDuplicates,
    MemoryUnit, Outgoing, Redrive, Replay, Result, RetryPolicy, Start,
};
use eventbus_testkit::TestBus;
use tokio::time::Instant;

use crate::failures::lag;
use crate::fixtures::{
    Calls, Fault, MINUTE, OrderCreated, OrderPaid, SECOND, amount, faulty, noting, order, paid,
    paying,
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// As long as a claim lasts that nobody renews.
const LEASE: Duration = Duration::from_secs(10);

/// A store that is away when the test says so; clones share it.
#[derive(Clone, Debug, Default)]
struct Store {
    inner: MemoryDuplicates,
    claims_fail: Arc<AtomicBool>,
    marks_fail: Arc<AtomicBool>,
}

impl Store {
    fn window(&self) -> DuplicateWindow {
        DuplicateWindow::new(self.clone())
    }

    /// Claims as a member of another process.
    async fn claim_elsewhere(&self, id: &EventId) -> EventClaim {
        let group = Group::from_static("billing");
        let request = ClaimEvents::new(group, MemberId::random(), vec![id.clone()], LEASE);
        self.inner.claim(&request).await.unwrap()[0]
    }
}

fn check(fails: &AtomicBool) -> Result<()> {
    match fails.load(Ordering::SeqCst) {
        true => Err(Error::new(
            ErrorKind::Unavailable,
            "ask",
            "the store is away",
        )),
        false => Ok(()),
    }
}

#[async_trait]
impl DuplicateStore for Store {
    async fn claim(&self, request: &ClaimEvents) -> Result<Vec<EventClaim>> {
        check(&self.claims_fail)?;
        self.inner.claim(request).await
    }

    async fn mark_handled(&self, group: &Group, ids: &[EventId], window: Duration) -> Result<()> {
        check(&self.marks_fail)?;
        self.inner.mark_handled(group, ids, window).await
    }

    async fn release(&self, group: &Group, member: MemberId, ids: &[EventId]) -> Result<()> {
        self.inner.release(group, member, ids).await
    }
}

fn billing(test: &TestBus, calls: &Arc<Calls>, store: &Store) -> ConsumerBuilder<Calls> {
    test.consumer("billing")
        .shared_state(Arc::clone(calls))
        .duplicate_window(store.window())
}

/// Notes the call and takes half a minute, three leases long.
async fn slow(order: OrderCreated, cx: Context<Calls>) -> Result<(), BoxError> {
    cx.state().note(&order, cx.attempt());
    tokio::time::sleep(30 * SECOND).await;
    Ok(())
}

/// Publishes an event under an id of the test's own.
async fn publish_as(test: &TestBus, id: &EventId, event: OrderCreated) {
    let event = Outgoing::new(event).with_id(id.clone());
    test.publish(event).await.unwrap();
}

#[tokio::test]
async fn a_duplicate_is_settled_without_running_its_handler() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    let consumer = test.spawn(billing(&test, &calls, &store).on(paying)).await;
    let id = test.publish(order(1)).await.unwrap();
    publish_as(&test, &id, order(1)).await;
    test.settled().await;
    assert_eq!(calls.attempts(1), [1]);
    let counts = consumer.status().counts;
    assert_eq!((counts.handled, counts.duplicates), (1, 1));
    assert_eq!(test.published::<OrderPaid>().await.len(), 1);
    assert_eq!(lag(&test, "billing").await, 0);
    assert_eq!(store.claim_elsewhere(&id).await, EventClaim::Handled);
}

#[tokio::test]
async fn other_groups_handle_the_same_event() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    let _billing = test.spawn(billing(&test, &calls, &store).on(noting)).await;
    let mailing = test.consumer("mailing").shared_state(Arc::clone(&calls));
    let mailing = mailing.duplicate_window(store.window()).on(noting);
    let _mailing = test.spawn(mailing).await;
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    assert_eq!(calls.attempts(1), [1, 1]);
}

#[tokio::test]
async fn after_a_day_an_id_is_as_new() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    let _consumer = test.spawn(billing(&test, &calls, &store).on(noting)).await;
    let id = test.publish(order(1)).await.unwrap();
    test.advance(DAY - MINUTE).await;
    publish_as(&test, &id, order(1)).await;
    test.settled().await;
    assert_eq!(calls.attempts(1), [1]);
    test.advance(MINUTE).await;
    publish_as(&test, &id, order(1)).await;
    test.settled().await;
    assert_eq!(calls.attempts(1), [1, 1]);
}

#[tokio::test]
async fn a_duplicate_waits_while_the_first_runs_and_others_go_on() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    let consumer = billing(&test, &calls, &store).on(slow).concurrency(4);
    let consumer = test.spawn(consumer).await;
    let begun = Instant::now();
    let id = test.publish(order(1)).await.unwrap();
    // Of other keys, so that nothing but the window keeps them apart.
    for number in 2..=20 {
        publish_as(&test, &id, order(number)).await;
    }
    for number in 21..=23 {
        test.publish(order(number)).await.unwrap();
    }
    tokio::time::sleep(20 * SECOND).await;
    let running: Vec<_> = calls.all().iter().map(|call| call.order).collect();
    assert_eq!(
        running.len(),
        4,
        "those that wait take no room: {running:?}"
    );
    assert_eq!(consumer.status().counts.duplicates, 0);
    assert!(matches!(
        store.claim_elsewhere(&id).await,
        EventClaim::Busy { .. }
    ));
    test.run_out().await;
    assert!(begun.elapsed() < 32 * SECOND);
    let counts = consumer.status().counts;
    assert_eq!((counts.handled, counts.duplicates), (4, 19));
    assert_eq!(counts.failed_attempts, 0);
}

#[tokio::test]
async fn an_event_that_is_claimed_elsewhere_waits_until_it_is_handled_there() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    let consumer = test.spawn(billing(&test, &calls, &store).on(noting)).await;
    let id = EventId::new();
    store.claim_elsewhere(&id).await;
    publish_as(&test, &id, order(1)).await;
    test.publish(amount(1, 7)).await.unwrap();
    test.publish(order(2)).await.unwrap();
    test.advance(5 * SECOND).await;
    assert!(calls.of(1).is_empty(), "its key waits in order");
    assert_eq!(calls.attempts(2), [1]);
    let group = Group::from_static("billing");
    store.mark_handled(&group, &[id], DAY).await.unwrap();
    test.run_out().await;
    assert_eq!(calls.amounts(1), [7]);
    let counts = consumer.status().counts;
    assert_eq!((counts.handled, counts.duplicates), (2, 1));
}

#[tokio::test]
async fn the_claim_of_a_crashed_consumer_ends_with_its_lease_and_nothing_is_lost() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    let crashing = test.spawn(billing(&test, &calls, &store).on(slow)).await;
    test.publish(order(1)).await.unwrap();
    tokio::time::sleep(25 * SECOND).await;
    assert_eq!(calls.attempts(1), [1]);
    drop(crashing);
    let crashed = Instant::now();
    let _next = test.spawn(billing(&test, &calls, &store).on(noting)).await;
    test.publish(order(2)).await.unwrap();
    test.settled().await;
    assert_eq!(calls.attempts(2), [1]);
    assert_eq!(calls.attempts(1), [1], "its lease is not over");
    test.run_out().await;
    let again = calls.of(1);
    assert_eq!(again.len(), 2);
    let waited = again[1].at - crashed;
    assert!(
        waited > 5 * SECOND && waited <= LEASE + SECOND,
        "{waited:?}"
    );
    assert_eq!(lag(&test, "billing").await, 0);
}

#[tokio::test]
async fn a_failed_attempt_is_retried_at_once_here_and_elsewhere() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    calls.break_order(1);
    let retry = RetryPolicy::fixed(9, SECOND);
    let first = billing(&test, &calls, &store).on(noting).retry(retry);
    let first = test.spawn(first).await;
    let id = test.publish(order(1)).await.unwrap();
    test.advance(5 * SECOND / 2).await;
    assert_eq!(calls.attempts(1), [1, 2, 3]);
    first.shutdown().await.unwrap();
    calls.mend_all();
    let _next = test.spawn(billing(&test, &calls, &store).on(noting)).await;
    test.settled().await;
    assert_eq!(calls.attempts(1), [1, 2, 3, 1]);
    assert_eq!(store.claim_elsewhere(&id).await, EventClaim::Handled);
}

#[tokio::test]
async fn an_attempt_that_panics_or_is_late_gives_its_claim_up() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    let consumer = billing(&test, &calls, &store)
        .deadline(20 * SECOND)
        .retry(RetryPolicy::fixed(3, SECOND))
        .on(async |order: OrderCreated, cx: Context<Calls>| {
            cx.state().note(&order, cx.attempt());
            match (order.order, cx.attempt()) {
                (1, 1) => panic!("on the first attempt"),
                (2, 1) => std::future::pending().await,
                _ => Ok(()),
            }
        });
    let consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.publish(order(2)).await.unwrap();
    test.advance(30 * SECOND).await;
    assert_eq!(calls.attempts(1), [1, 2]);
    assert_eq!(calls.attempts(2), [1, 2]);
    assert_eq!(consumer.status().counts.failed_attempts, 2);
}

#[tokio::test]
async fn a_dead_letter_is_handled_when_it_is_re_driven() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    calls.break_order(1);
    let consumer = test.spawn(billing(&test, &calls, &store).on(noting)).await;
    test.publish(order(1)).await.unwrap();
    test.run_out().await;
    assert_eq!(test.dead_letters().await.len(), 1);
    calls.mend_all();
    let letters = consumer.dead_letters();
    assert_eq!(letters.redrive(Redrive::all()).await.unwrap().done, 1);
    test.run_out().await;
    assert_eq!(calls.attempts(1), [1, 2, 3, 4, 5, 1]);
    assert_eq!(consumer.status().counts.duplicates, 0);
}

#[tokio::test]
async fn what_was_handled_is_sent_and_not_handled_again_when_the_broker_is_back() {
    let (test, broker) = faulty();
    let (calls, store) = (Calls::new(), Store::default());
    let consumer = test.spawn(billing(&test, &calls, &store).on(paying)).await;
    broker.fail("payments", Fault::Away);
    let id = test.publish(order(1)).await.unwrap();
    test.advance(10 * MINUTE).await;
    assert!(matches!(
        consumer.status().state,
        ConsumerState::Holding { .. }
    ));
    let elsewhere = store.claim_elsewhere(&id).await;
    assert!(
        matches!(elsewhere, EventClaim::Busy { .. }),
        "{elsewhere:?}"
    );
    broker.mend();
    test.run_out().await;
    assert_eq!(calls.attempts(1), [1]);
    assert_eq!(test.published::<OrderPaid>().await.len(), 1);
    assert_eq!(store.claim_elsewhere(&id).await, EventClaim::Handled);
    let counts = consumer.status().counts;
    assert_eq!((counts.handled, counts.failed_attempts), (1, 0));
    assert_eq!(lag(&test, "billing").await, 0);
}

#[tokio::test]
async fn what_was_handled_and_not_sent_is_handled_again_where_its_lane_goes() {
    let (test, broker) = faulty();
    let (calls, store) = (Calls::new(), Store::default());
    let first = billing(&test, &calls, &store)
        .on(paying)
        .shutdown_timeout(SECOND);
    let first = test.spawn(first).await;
    broker.fail("payments", Fault::Away);
    test.publish(order(1)).await.unwrap();
    test.advance(MINUTE).await;
    first.shutdown().await.unwrap();
    broker.mend();
    let _next = test.spawn(billing(&test, &calls, &store).on(paying)).await;
    // No lease has to end: the first one gave its claim up.
    test.settled().await;
    assert_eq!(calls.attempts(1), [1, 1]);
    assert_eq!(test.published::<OrderPaid>().await.len(), 1);
}

#[tokio::test]
async fn what_the_broker_refuses_fails_the_attempt() {
    let (test, broker) = faulty();
    let (calls, store) = (Calls::new(), Store::default());
    let consumer = test.spawn(billing(&test, &calls, &store).on(paying)).await;
    broker.fail("payments", Fault::TooLarge);
    let id = test.publish(order(1)).await.unwrap();
    test.run_out().await;
    assert_eq!(consumer.status().counts.dead_lettered, 1);
    assert_eq!(store.claim_elsewhere(&id).await, EventClaim::Granted);
}

#[tokio::test]
async fn while_the_store_is_away_the_consumer_holds_and_counts_no_attempt() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    let consumer = test.spawn(billing(&test, &calls, &store).on(noting)).await;
    store.claims_fail.store(true, Ordering::SeqCst);
    for number in 1..=20 {
        test.publish(order(number)).await.unwrap();
    }
    test.advance(10 * MINUTE).await;
    let status = consumer.status();
    let ConsumerState::Holding { reason } = status.state else {
        panic!("{status:?}");
    };
    assert!(reason.contains("the store is away"), "{reason}");
    assert!(calls.all().is_empty());
    store.claims_fail.store(false, Ordering::SeqCst);
    test.run_out().await;
    assert_eq!(calls.all().len(), 20);
    assert!(calls.all().iter().all(|call| call.attempt == 1));
    assert_eq!(consumer.status().state, ConsumerState::Running);
}

#[tokio::test]
async fn a_store_that_is_away_when_all_is_done_costs_no_second_run() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    let consumer = test.spawn(billing(&test, &calls, &store).on(paying)).await;
    store.marks_fail.store(true, Ordering::SeqCst);
    let id = test.publish(order(1)).await.unwrap();
    test.advance(10 * MINUTE).await;
    assert!(matches!(
        consumer.status().state,
        ConsumerState::Holding { .. }
    ));
    assert_eq!(
        lag(&test, "billing").await,
        1,
        "nothing is settled unmarked"
    );
    store.marks_fail.store(false, Ordering::SeqCst);
    test.run_out().await;
    assert_eq!(calls.attempts(1), [1]);
    assert_eq!(test.published::<OrderPaid>().await.len(), 1);
    assert_eq!(store.claim_elsewhere(&id).await, EventClaim::Handled);
}

#[tokio::test]
async fn an_effect_counts_though_its_claim_was_lost_meanwhile() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    let consumer = test.spawn(billing(&test, &calls, &store).on(slow)).await;
    let id = test.publish(order(1)).await.unwrap();
    tokio::time::sleep(SECOND).await;
    store.claims_fail.store(true, Ordering::SeqCst);
    tokio::time::sleep(2 * LEASE).await;
    assert_eq!(store.claim_elsewhere(&id).await, EventClaim::Granted);
    store.claims_fail.store(false, Ordering::SeqCst);
    test.run_out().await;
    assert_eq!(calls.attempts(1), [1]);
    assert_eq!(store.claim_elsewhere(&id).await, EventClaim::Handled);
    assert_eq!(consumer.status().counts.handled, 1);
}

#[tokio::test]
async fn a_consumer_that_waits_for_another_ends_at_once() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    let waiting = test.spawn(billing(&test, &calls, &store).on(noting)).await;
    let id = EventId::new();
    store.claim_elsewhere(&id).await;
    publish_as(&test, &id, order(1)).await;
    test.advance(SECOND).await;
    let begun = Instant::now();
    waiting.shutdown().await.unwrap();
    assert!(begun.elapsed() < SECOND, "{:?}", begun.elapsed());
    assert_eq!(lag(&test, "billing").await, 1);
    let _next = test.spawn(billing(&test, &calls, &store).on(noting)).await;
    test.run_out().await;
    assert_eq!(calls.attempts(1), [1]);
}

#[tokio::test]
async fn a_lane_that_is_revoked_while_an_event_waits_takes_it_along() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    let first = test.spawn(billing(&test, &calls, &store).on(noting)).await;
    let ids: Vec<_> = (1..=8).map(|_| EventId::new()).collect();
    for (number, id) in (1..).zip(&ids) {
        store.claim_elsewhere(id).await;
        publish_as(&test, id, order(number)).await;
    }
    test.advance(SECOND).await;
    let begun = Instant::now();
    let second = test.spawn(billing(&test, &calls, &store).on(noting)).await;
    test.settled().await;
    assert!(begun.elapsed() < SECOND, "{:?}", begun.elapsed());
    for member in [&first, &second] {
        assert_eq!(member.status().lanes.len(), 2);
    }
    test.run_out().await;
    assert_eq!(calls.all().len(), 8);
    let handled = |member: &eventbus_core::Consumer| member.status().counts.handled;
    assert!(handled(&second) > 0);
    assert_eq!(handled(&first) + handled(&second), 8);
}

#[tokio::test]
async fn lanes_that_are_lost_while_a_handler_runs_free_its_event() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    let first = test.spawn(billing(&test, &calls, &store).on(slow)).await;
    test.publish(order(1)).await.unwrap();
    tokio::time::sleep(SECOND).await;
    let second = test.spawn(billing(&test, &calls, &store).on(slow)).await;
    test.broker().lose(first.group());
    let lost = Instant::now();
    test.run_out().await;
    let begun: Vec<_> = calls.of(1).iter().map(|call| call.at).collect();
    assert_eq!(begun.len(), 2);
    assert!(begun[1] - lost < SECOND, "{:?}", begun[1] - lost);
    drop(second);
}

#[tokio::test]
async fn what_a_handler_schedules_comes_once() {
    let test = TestBus::new();
    let (calls, store) = (Calls::new(), Store::default());
    let consumer =
        billing(&test, &calls, &store).on(async |order: OrderCreated, cx: Context<Calls>| {
            cx.publish_after(paid(order.order), MINUTE)?;
            Ok(())
        });
    let _consumer = test.spawn(consumer).await;
    let id = test.publish(order(1)).await.unwrap();
    publish_as(&test, &id, order(1)).await;
    test.settled().await;
    assert!(test.published::<OrderPaid>().await.is_empty());
    test.run_out().await;
    assert_eq!(test.published::<OrderPaid>().await.len(), 1);
}

#[tokio::test]
async fn what_does_not_go_with_a_window_is_refused() {
    let test = TestBus::new();
    let store = Store::default();
    let windowed = || test.consumer("billing").duplicate_window(store.window());
    let batches = windowed().on_batch(10, async |_: Vec<BatchItem<OrderCreated>>| Ok(()));
    let refused = batches.spawn().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);

    let unit = MemoryUnit::new(test.broker().clone(), 0u64);
    let with_unit = windowed().unit(unit);
    let with_unit = with_unit.on(async |_: OrderCreated, _: Context<(), MemoryUnit<u64>>| Ok(()));
    let refused = with_unit.spawn().await.unwrap_err();
    assert!(refused.to_string().contains("leave"), "{refused}");

    let replayed = windowed().on(async |_: OrderCreated, _: Context| Ok(()));
    let replayed = replayed.replay(Replay::from(Start::Earliest)).await;
    assert_eq!(replayed.unwrap_err().kind(), ErrorKind::Unsupported);
}
