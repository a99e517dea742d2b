//! With a unit of work effects happen once, whatever fails.

use std::collections::BTreeMap;
use std::sync::Arc;

use std::any::Any;
use std::sync::Mutex;

use async_trait::async_trait;
use eventbus_core::{
    BoxError, CommitFault, Committed, ConsumerBuilder, ConsumerState, Context, Error, ErrorKind,
    EventBus, Group, InboxEntry, MemoryBroker, MemoryConfig, MemoryProfile, MemoryUnit, Message,
    Outgoing, Replay, Result, RetryPolicy, Start, Topic, Unit, UnitOfWork, Until, Work,
};
use eventbus_testkit::faults::{Call, Fault as Broken};
use eventbus_testkit::{FaultPlan, FaultyBroker, TestBus};

use crate::failures::lag;
use crate::fixtures::{
    Calls, Fault, MINUTE, OrderCreated, OrderPaid, SECOND, amount, faulty, order, paid,
};

/// How often each order took effect.
type Effects = BTreeMap<u64, u64>;
type Database = MemoryUnit<Effects>;

async fn count(order: OrderCreated, mut cx: Context<Calls, Database>) -> Result<(), BoxError> {
    cx.state().note(&order, cx.attempt());
    *cx.transaction().await?.entry(order.order).or_default() += 1;
    cx.publish(paid(order.order))?;
    cx.state().check(order.order)
}

fn counting(
    test: &TestBus,
    calls: &Arc<Calls>,
    unit: &Database,
) -> ConsumerBuilder<Calls, Database> {
    test.consumer("billing")
        .shared_state(Arc::clone(calls))
        .unit(unit.clone())
        .on(count)
}

fn database(test: &TestBus) -> Database {
    MemoryUnit::new(test.broker().clone(), Effects::new())
}

#[tokio::test]
async fn a_duplicate_is_settled_without_running_its_handler() {
    let test = TestBus::new();
    let (calls, unit) = (Calls::new(), database(&test));
    let consumer = test.spawn(counting(&test, &calls, &unit)).await;
    let id = test.publish(order(1)).await.unwrap();
    test.publish(Outgoing::new(order(1)).with_id(id))
        .await
        .unwrap();
    test.settled().await;
    assert_eq!(calls.attempts(1), [1]);
    let counts = consumer.status().counts;
    assert_eq!((counts.handled, counts.duplicates), (1, 1));
    assert_eq!(unit.state().await, Effects::from([(1, 1)]));
    assert_eq!(test.published::<OrderPaid>().await.len(), 1);
    assert_eq!(lag(&test, "billing").await, 0);
}

#[tokio::test]
async fn a_duplicate_within_one_group_takes_effect_once() {
    let test = TestBus::new();
    let (calls, unit) = (Calls::new(), database(&test).with_group_max(10));
    let consumer = test.spawn(counting(&test, &calls, &unit)).await;
    consumer.pause();
    let id = test.publish(order(1)).await.unwrap();
    test.publish(Outgoing::new(order(1)).with_id(id))
        .await
        .unwrap();
    test.settled().await;
    consumer.resume();
    test.settled().await;
    assert_eq!(unit.state().await, Effects::from([(1, 1)]));
    assert_eq!(consumer.status().counts.duplicates, 1);
}

#[tokio::test]
async fn an_event_that_two_members_handle_at_once_takes_effect_once() {
    let test = TestBus::new();
    let (calls, unit) = (Calls::new(), database(&test));
    let build = || {
        test.consumer("billing")
            .shared_state(Arc::clone(&calls))
            .unit(unit.clone())
            .on(
                async |order: OrderCreated, mut cx: Context<Calls, Database>| {
                    cx.state().note(&order, cx.attempt());
                    *cx.transaction().await?.entry(order.order).or_default() += 1;
                    tokio::time::sleep(2 * SECOND).await;
                    Ok(())
                },
            )
    };
    let first = test.spawn(build()).await;
    test.publish(order(1)).await.unwrap();
    tokio::time::sleep(SECOND).await;
    // Its lanes are taken away while the handler runs; whoever has them next begins at once.
    let second = test.spawn(build()).await;
    test.broker().lose(first.group());
    test.run_out().await;
    assert_eq!(unit.state().await, Effects::from([(1, 1)]));
    assert_eq!(lag(&test, "billing").await, 0);
    drop(second);
}

#[tokio::test]
async fn one_bad_event_of_a_group_costs_the_others_nothing() {
    let test = TestBus::new();
    let (calls, unit) = (Calls::new(), database(&test).with_group_max(100));
    calls.break_order(7);
    let consumer = counting(&test, &calls, &unit)
        .workers(1)
        .retry(RetryPolicy::fixed(3, SECOND));
    let consumer = test.spawn(consumer).await;
    consumer.pause();
    for number in 1..=20 {
        test.publish(order(number)).await.unwrap();
    }
    test.settled().await;
    consumer.resume();
    test.run_out().await;
    let expected: Effects = (1..=20).filter(|n| *n != 7).map(|n| (n, 1)).collect();
    assert_eq!(unit.state().await, expected);
    let letters = test.dead_letters().await;
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].attempts, 3);
    // Once in the group, and three attempts of its own.
    assert_eq!(calls.attempts(7), [1, 1, 2, 3]);
    assert_eq!(test.published::<OrderPaid>().await.len(), 19);
    assert_eq!(consumer.status().counts.failed_attempts, 3);
}

#[tokio::test]
async fn while_the_store_is_away_the_consumer_holds_and_counts_no_attempt() {
    for group_max in [1, 10] {
        let test = TestBus::new();
        let (calls, unit) = (Calls::new(), database(&test).with_group_max(group_max));
        let consumer = test.spawn(counting(&test, &calls, &unit)).await;
        unit.fail_begin(u32::MAX);
        for number in 1..=20 {
            test.publish(order(number)).await.unwrap();
        }
        test.advance(10 * MINUTE).await;
        let status = consumer.status();
        let ConsumerState::Holding { reason } = status.state else {
            panic!("{status:?}");
        };
        assert!(reason.contains("the store is away"), "{reason}");
        assert_eq!(status.counts.failed_attempts, 0);
        assert!(calls.all().is_empty());
        unit.fail_begin(0);
        test.run_out().await;
        assert!(calls.all().iter().all(|call| call.attempt == 1));
        assert_eq!(unit.state().await, (1..=20).map(|n| (n, 1)).collect());
        assert_eq!(consumer.status().state, ConsumerState::Running);
    }
}

#[tokio::test]
async fn a_bad_event_alone_does_not_keep_a_consumer_held_whose_store_is_back() {
    let test = TestBus::new();
    let (calls, unit) = (Calls::new(), database(&test));
    calls.break_order(1);
    let consumer = test.spawn(counting(&test, &calls, &unit)).await;
    unit.fail_begin(3);
    test.publish(order(1)).await.unwrap();
    test.run_out().await;
    assert_eq!(consumer.status().state, ConsumerState::Running);
    let letters = test.dead_letters().await;
    assert_eq!((letters.len(), letters[0].attempts), (1, 5));
}

#[tokio::test]
async fn a_commit_whose_answer_was_lost_takes_effect_once() {
    for (fault, runs) in [(CommitFault::After, 1), (CommitFault::Before, 2)] {
        for group_max in [1, 10] {
            let test = TestBus::new();
            let (calls, unit) = (Calls::new(), database(&test).with_group_max(group_max));
            let consumer = test.spawn(counting(&test, &calls, &unit)).await;
            unit.fail_commit(1, fault);
            test.publish(order(1)).await.unwrap();
            test.run_out().await;
            assert_eq!(unit.state().await, Effects::from([(1, 1)]));
            assert_eq!(calls.attempts(1), vec![1; runs]);
            let counts = consumer.status().counts;
            assert_eq!(counts.duplicates, u64::from(fault == CommitFault::After));
            assert_eq!(counts.failed_attempts, 0);
            assert_eq!(test.published::<OrderPaid>().await.len(), 1);
            assert_eq!(lag(&test, "billing").await, 0);
        }
    }
}

#[tokio::test]
async fn what_was_committed_is_sent_when_the_broker_is_back() {
    let (test, broker) = faulty();
    let calls = Calls::new();
    let unit = MemoryUnit::new(broker.clone(), Effects::new());
    let consumer = test.spawn(counting(&test, &calls, &unit)).await;
    broker.fail("payments", Fault::Away);
    test.publish(order(1)).await.unwrap();
    test.advance(MINUTE).await;
    assert_eq!(unit.outbox_len().await, 1);
    assert!(unit.flush().await.unwrap_err().is_retryable());
    assert!(matches!(
        consumer.status().state,
        ConsumerState::Holding { .. }
    ));
    broker.mend();
    test.run_out().await;
    assert_eq!(unit.outbox_len().await, 0);
    assert_eq!(calls.attempts(1), [1]);
    assert_eq!(test.published::<OrderPaid>().await.len(), 1);
    assert_eq!(unit.state().await, Effects::from([(1, 1)]));
}

/// Found by the simulation (scenario 47, for a unit in memory): of two events of a key the second was
/// taken, and the first sent again behind it.
#[tokio::test]
async fn what_a_broker_takes_in_part_is_sent_again_in_the_order_of_its_key() {
    let server = MemoryBroker::with(MemoryConfig::default().like(MemoryProfile::Kafka));
    let plan = FaultPlan::none()
        .with(Call::Publish, 1, Broken::Partly)
        .with(Call::Publish, 2, Broken::Partly);
    let unit = MemoryUnit::new(FaultyBroker::new(server.clone(), plan), ());
    let topic = Topic::from_static("numbers");
    let message = |number: u8| Message::new(topic.clone(), vec![number]).with_key("one");
    let work = unit.begin(&Group::from_static("billing"), &[]).await;
    let committed = work.unwrap().commit((0..4).map(message).collect()).await;
    assert!(committed.unwrap_err().is_retryable());
    while unit.outbox_len().await > 0 {
        drop(unit.flush().await);
    }
    let bus = EventBus::new(server);
    let reader = bus.read(&[topic], Start::Earliest, Some(Until::Now)).await;
    let mut reader = reader.unwrap();
    let mut numbers = Vec::new();
    while let Some(record) = reader.next().await.unwrap() {
        numbers.extend_from_slice(&record.message.payload);
    }
    assert_eq!(numbers, [0, 1, 2, 3]);
}

#[tokio::test]
async fn a_context_kept_beyond_its_handler_rolls_back_and_fails_the_attempt() {
    let test = TestBus::new();
    let unit = database(&test);
    let consumer = test
        .consumer("billing")
        .unit(unit.clone())
        .deadline(MINUTE)
        .retry(RetryPolicy::fixed(2, SECOND))
        .on(async |order: OrderCreated, mut cx: Context<(), Database>| {
            *cx.transaction().await?.entry(order.order).or_default() += 1;
            if cx.attempt() == 1 {
                tokio::spawn(async move {
                    tokio::time::sleep(10 * SECOND).await;
                    drop(cx);
                });
            }
            Ok(())
        });
    let consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    assert_eq!(consumer.status().counts.failed_attempts, 1);
    // When it is dropped at last it is rolled back, and the attempt that waits for the lock goes on.
    test.run_out().await;
    assert_eq!(unit.state().await, Effects::from([(1, 1)]));
    let counts = consumer.status().counts;
    assert_eq!((counts.handled, counts.failed_attempts), (1, 1));
}

#[tokio::test]
async fn a_transaction_ends_with_its_handler_also_when_that_panics_or_is_late() {
    let test = TestBus::new();
    let (calls, unit) = (Calls::new(), database(&test));
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .unit(unit.clone())
        .deadline(10 * SECOND)
        .retry(RetryPolicy::fixed(3, 60 * MINUTE))
        .on(
            async |order: OrderCreated, mut cx: Context<Calls, Database>| {
                cx.state().note(&order, cx.attempt());
                *cx.transaction().await?.entry(order.order).or_default() += 1;
                match (order.order, cx.attempt()) {
                    (1, 1) => panic!("on the first attempt"),
                    (2, 1) => std::future::pending().await,
                    _ => Ok(()),
                }
            },
        );
    let consumer = test.spawn(consumer).await;
    for number in 1..=3 {
        test.publish(order(number)).await.unwrap();
    }
    test.advance(5 * MINUTE).await;
    assert_eq!(
        unit.state().await,
        Effects::from([(3, 1)]),
        "nobody holds the lock"
    );
    test.run_out().await;
    assert_eq!(unit.state().await, Effects::from([(1, 1), (2, 1), (3, 1)]));
    assert_eq!(consumer.status().counts.failed_attempts, 2);
}

#[tokio::test]
async fn events_of_one_key_keep_their_order_in_groups_that_fail() {
    let test = TestBus::new();
    let unit = MemoryUnit::new(test.broker().clone(), Vec::<u64>::new()).with_group_max(8);
    let consumer = test
        .consumer("billing")
        .unit(unit.clone())
        .workers(2)
        .retry(RetryPolicy::fixed(4, SECOND))
        .on(
            async |order: OrderCreated, mut cx: Context<(), MemoryUnit<Vec<u64>>>| {
                cx.transaction().await?.push(order.amount);
                match order.amount.is_multiple_of(5) && cx.attempt() < 3 {
                    true => Err("not yet".into()),
                    false => Ok(()),
                }
            },
        );
    let consumer = test.spawn(consumer).await;
    consumer.pause();
    for step in 1..=50 {
        test.publish(amount(1, step)).await.unwrap();
    }
    test.settled().await;
    consumer.resume();
    test.run_out().await;
    assert_eq!(unit.state().await, (1..=50).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_replay_with_a_unit_is_refused() {
    let test = TestBus::new();
    let (calls, unit) = (Calls::new(), database(&test));
    let refused = counting(&test, &calls, &unit)
        .replay(Replay::from(Start::Earliest))
        .await
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(refused.to_string().contains("without one"), "{refused}");
}

/// A unit that opens its transaction when it is asked for, and finds out only then what is in the way.
#[derive(Clone, Debug, Default)]
struct Late {
    /// What comes of opening, one after the other.
    found: Arc<Mutex<Vec<Found>>>,
    committed: Arc<Mutex<u32>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Away,
    HandledElsewhere,
}

#[derive(Debug)]
struct LateWork {
    unit: Late,
    found: Option<Found>,
    writes: u32,
}

impl Unit for Late {
    type Resource = u32;
}

#[async_trait]
impl UnitOfWork for Late {
    fn group_max(&self) -> usize {
        1
    }

    async fn begin(&self, _: &Group, _: &[InboxEntry]) -> Result<Box<dyn Work>> {
        Ok(Box::new(LateWork {
            unit: self.clone(),
            found: None,
            writes: 0,
        }))
    }
}

#[async_trait]
impl Work for LateWork {
    fn is_duplicate(&self, _: usize) -> bool {
        self.found == Some(Found::HandledElsewhere)
    }

    async fn transaction(&mut self) -> Result<&mut (dyn Any + Send)> {
        self.found = self.unit.found.lock().unwrap().pop();
        match self.found {
            None => Ok(&mut self.writes),
            Some(_) => Err(Error::new(ErrorKind::Conflict, "open", "not to be had")),
        }
    }

    async fn commit(self: Box<Self>, _: Vec<Message>) -> Result<Committed> {
        *self.unit.committed.lock().unwrap() += self.writes;
        Ok(Committed::SettleNext)
    }

    async fn roll_back(self: Box<Self>, _error: Option<&BoxError>) -> Result<()> {
        match self.found {
            Some(Found::Away) => Err(Error::new(ErrorKind::Unavailable, "open", "away")),
            _ => Ok(()),
        }
    }
}

async fn handle_with(test: &TestBus, found: &[Found]) -> (Late, Arc<Calls>, Counted) {
    let unit = Late::default();
    *unit.found.lock().unwrap() = found.to_vec();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .unit(unit.clone())
        .on(async |order: OrderCreated, mut cx: Context<Calls, Late>| {
            cx.state().note(&order, cx.attempt());
            // Whatever the handler makes of the error.
            let writes = cx.transaction().await.map_err(|_| "no transaction")?;
            *writes += 1;
            Ok(())
        });
    let consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.run_out().await;
    let counts = consumer.status().counts;
    let counted = Counted {
        handled: counts.handled,
        duplicates: counts.duplicates,
        failed: counts.failed_attempts,
    };
    (unit, calls, counted)
}

#[derive(Debug, PartialEq, Eq)]
struct Counted {
    handled: u64,
    duplicates: u64,
    failed: u64,
}

#[tokio::test]
async fn a_store_that_is_away_when_the_transaction_opens_costs_no_attempt() {
    let test = TestBus::new();
    let (unit, calls, counted) = handle_with(&test, &[Found::Away, Found::Away]).await;
    assert_eq!(calls.attempts(1), [1, 1, 1]);
    let expected = Counted {
        handled: 1,
        duplicates: 0,
        failed: 0,
    };
    assert_eq!(counted, expected);
    assert_eq!(*unit.committed.lock().unwrap(), 1);
}

#[tokio::test]
async fn what_somebody_else_handled_meanwhile_is_a_duplicate_and_no_failure() {
    let test = TestBus::new();
    let (unit, calls, counted) = handle_with(&test, &[Found::HandledElsewhere]).await;
    assert_eq!(calls.attempts(1), [1]);
    let expected = Counted {
        handled: 0,
        duplicates: 1,
        failed: 0,
    };
    assert_eq!(counted, expected);
    assert_eq!(*unit.committed.lock().unwrap(), 0);
}
