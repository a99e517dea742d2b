//! Every failure of a message or a handler has the outcome that is defined for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use eventbus_core::{
    BoxError, ConsumerState, Context, Error, ErrorKind, Event, Headers, Key, Message, OnError,
    OnPoison, Outgoing, Publisher, Redrive, RetryPolicy, header,
};
use eventbus_testkit::TestBus;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::fixtures::{
    Calls, Fault, MINUTE, OrderCancelled, OrderCreated, OrderPaid, SECOND, amount, event, faulty,
    noting, order, paid, paying,
};

mod versions {
    //! Older and newer data of one event.

    use super::{Deserialize, Serialize, event};

    #[derive(Serialize, Deserialize)]
    pub(super) struct OrderCreated {
        pub(super) order: u64,
    }

    event!(OrderCreated, "OrderCreated", "orders", 2);
}

fn foreign(key: &'static str, payload: &'static str) -> Message {
    let headers = Headers::builder()
        .push("trace", [0u8, 255, 7])
        .and_then(|builder| builder.push("trace", "again"))
        .expect("within limits")
        .build();
    Message::new(OrderCreated::TOPIC, payload)
        .with_key(Key::from(key))
        .with_headers(headers)
}

#[tokio::test]
async fn undecodable_messages_become_dead_letters_untouched_and_without_retry() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test.consumer("billing").shared_state(Arc::clone(&calls));
    let consumer = test.spawn(consumer.on(noting)).await;
    let originals = [
        foreign(
            "1",
            r#"{"event_type":"OrderCreated","order":"not a number"}"#,
        ),
        foreign("1", r#"{"event_type":"OrderCreated","order":1"#),
        foreign("1", "no format claims this"),
    ];
    for original in &originals {
        test.broker().publish(vec![original.clone()]).await.unwrap();
    }
    test.publish(versions::OrderCreated { order: 1 })
        .await
        .unwrap();
    test.publish(order(1)).await.unwrap();
    test.settled().await;

    let letters = test.dead_letters().await;
    assert_eq!(letters.len(), 4);
    for (letter, original) in letters.iter().zip(&originals) {
        assert_eq!(letter.message.payload, original.payload);
        assert_eq!(letter.message.headers, original.headers);
        assert_eq!(letter.message.key, original.key);
        assert_eq!(letter.message.topic, original.topic);
    }
    for letter in &letters {
        assert_eq!((letter.cause.as_str(), letter.attempts), ("undecodable", 0));
    }
    assert!(
        letters[3].error.contains("deploy the service"),
        "{}",
        letters[3].error
    );
    assert_eq!(
        calls.attempts(1),
        [1],
        "the later message of the key went on"
    );
    let counts = consumer.status().counts;
    assert_eq!((counts.handled, counts.dead_lettered), (1, 4));
}

#[tokio::test]
async fn an_older_version_without_an_upcast_is_undecodable() {
    let test = TestBus::new();
    let consumer = test
        .consumer("billing")
        .on(async |_: versions::OrderCreated, _: Context| Ok(()));
    let _consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    let letters = test.dead_letters().await;
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].cause, "undecodable");
    assert!(letters[0].error.contains("nothing leads from this version"));
}

#[tokio::test]
async fn an_event_without_a_handler_becomes_a_dead_letter() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(noting);
    let _consumer = test.spawn(consumer).await;
    test.publish(OrderCancelled { order: 1 }).await.unwrap();
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    let letters = test.dead_letters().await;
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].cause, "no_handler");
    assert!(
        letters[0].error.contains(".skip_others()"),
        "{}",
        letters[0].error
    );
    assert_eq!(calls.attempts(1), [1]);
}

#[tokio::test]
async fn other_types_are_settled_and_counted_where_they_are_skipped() {
    let test = TestBus::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Calls::new())
        .skip_others()
        .on(noting);
    let consumer = test.spawn(consumer).await;
    test.publish(OrderCancelled { order: 1 }).await.unwrap();
    test.settled().await;
    assert_eq!(consumer.status().counts.skipped_other_type, 1);
    assert!(test.dead_letters().await.is_empty());
    assert_eq!(lag(&test, "billing").await, 0);
}

#[tokio::test]
async fn an_expired_event_is_settled_and_counted() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(noting);
    let consumer = test.spawn(consumer).await;
    let now = test.clock().now();
    let expired = Outgoing::new(order(1)).with_expiry(now);
    test.publish(expired).await.unwrap();
    test.publish(Outgoing::new(order(2)).with_expiry(now.plus(MINUTE)))
        .await
        .unwrap();
    test.settled().await;
    assert_eq!(consumer.status().counts.skipped_expired, 1);
    assert_eq!(calls.all().len(), 1);
    assert_eq!(lag(&test, "billing").await, 0);
    assert!(test.dead_letters().await.is_empty());
}

pub(crate) async fn lag(test: &TestBus, group: &str) -> u64 {
    let lag = test.lag(group, &[OrderCreated::TOPIC]).await.unwrap();
    lag.iter().map(|lane| lane.messages).sum()
}

#[tokio::test]
async fn a_failing_handler_is_retried_as_the_schedule_says_then_dead_lettered_once() {
    let test = TestBus::new();
    let calls = Calls::new();
    calls.break_order(1);
    let policy = RetryPolicy::exponential(5, SECOND, 4 * SECOND);
    let consumer = test.consumer("billing").shared_state(Arc::clone(&calls));
    let consumer = test.spawn(consumer.on(noting).retry(policy)).await;
    let begun = test.clock().now();
    test.publish(order(1)).await.unwrap();
    test.run_out().await;

    assert_eq!(calls.attempts(1), [1, 2, 3, 4, 5]);
    let times: Vec<_> = calls.of(1).iter().map(|call| call.at).collect();
    for (pair, wanted) in times
        .windows(2)
        .zip([SECOND, 2 * SECOND, 4 * SECOND, 4 * SECOND])
    {
        let waited = pair[1] - pair[0];
        // Up to a tenth of jitter, and the granularity of timers.
        let latest = wanted + wanted / 10 + Duration::from_millis(5);
        assert!(
            waited >= wanted && waited <= latest,
            "{waited:?} of {wanted:?}"
        );
    }
    let letters = test.dead_letters().await;
    assert_eq!(letters.len(), 1);
    let letter = &letters[0];
    assert_eq!((letter.cause.as_str(), letter.attempts), ("error", 5));
    assert_eq!(letter.error, "order 1 is broken");
    assert_eq!(letter.first_failed_at, begun);
    assert!(letter.failed_at >= begun.plus(11 * SECOND));
    assert_eq!(letter.message.topic, OrderCreated::TOPIC);
    assert_eq!(letter.group.as_str(), "billing");
    assert!(letter.position.is_some());
    let lanes = consumer.status().lanes;
    assert!(lanes.iter().any(|lane| lane.partition == letter.partition));
    assert_eq!(lag(&test, "billing").await, 0);
}

/// What a payment provider answers.
#[derive(Debug)]
enum PspError {
    Declined,
    Busy,
    Unclear,
}

impl std::fmt::Display for PspError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

impl std::error::Error for PspError {}

#[tokio::test]
async fn rules_decide_by_the_error_s_value_also_below_a_wrapper() {
    let test = TestBus::new();
    let calls = Calls::new();
    let policy = RetryPolicy::fixed(3, SECOND).when(|error: &PspError| match error {
        PspError::Declined => OnError::DeadLetter,
        PspError::Busy => OnError::After(MINUTE),
        PspError::Unclear => OnError::Next,
    });
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(async |order: OrderCreated, cx: Context<Calls>| {
            cx.state().note(&order, cx.attempt());
            let error = match order.order {
                1 => PspError::Declined,
                2 => PspError::Busy,
                _ => PspError::Unclear,
            };
            let wrapped = Error::new(ErrorKind::Unavailable, "charge", "the provider refused");
            Err(wrapped.with_source(error).into())
        })
        .retry(policy);
    let _consumer = test.spawn(consumer).await;
    for number in 1..=3 {
        test.publish(order(number)).await.unwrap();
    }
    test.run_out().await;
    assert_eq!(calls.attempts(1), [1]);
    let waited = |order| calls.of(order)[1].at - calls.of(order)[0].at;
    assert!(waited(2) >= MINUTE);
    assert!(waited(3) < 2 * SECOND);
    let letters = test.dead_letters().await;
    assert_eq!(letters.len(), 3);
    assert!(
        letters
            .iter()
            .any(|letter| letter.error == "charge: the provider refused: Declined")
    );
}

#[tokio::test]
async fn a_panic_is_a_failed_attempt_and_nothing_more() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(async |order: OrderCreated, cx: Context<Calls>| {
            cx.state().note(&order, cx.attempt());
            assert!(order.order != 1, "order 1 can't be added up");
            Ok(())
        });
    let consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.publish(order(2)).await.unwrap();
    test.run_out().await;
    assert_eq!(calls.attempts(1), [1, 2, 3, 4, 5]);
    assert_eq!(calls.attempts(2), [1]);
    let letters = test.dead_letters().await;
    assert_eq!(letters[0].cause, "panic");
    assert!(letters[0].error.contains("order 1 can't be added up"));
    assert_eq!(consumer.status().state, ConsumerState::Running);
}

#[tokio::test]
async fn a_handler_that_never_returns_is_dropped_at_its_deadline() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .deadline(10 * SECOND)
        .retry(RetryPolicy::immediate(2))
        .on(async |order: OrderCreated, cx: Context<Calls>| {
            cx.state().note(&order, cx.attempt());
            std::future::pending().await
        });
    let consumer = test.spawn(consumer).await;
    let begun = Instant::now();
    test.publish(order(1)).await.unwrap();
    test.run_out().await;
    assert_eq!(calls.attempts(1), [1, 2]);
    assert!(begun.elapsed() >= 20 * SECOND && begun.elapsed() < 24 * SECOND);
    let letters = test.dead_letters().await;
    assert_eq!(letters[0].cause, "deadline");
    assert!(
        letters[0].error.contains(".deadline("),
        "{}",
        letters[0].error
    );
    assert_eq!(consumer.status().counts.failed_attempts, 2);
}

struct PanicsInDrop(bool);

impl Drop for PanicsInDrop {
    fn drop(&mut self) {
        assert!(!self.0, "dropped");
    }
}

#[tokio::test]
async fn a_handler_that_panics_in_its_drop_harms_nobody() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .workers(1)
        .deadline(SECOND)
        .retry(RetryPolicy::immediate(2))
        .on(async |order: OrderCreated, cx: Context<Calls>| {
            cx.state().note(&order, cx.attempt());
            let _bomb = PanicsInDrop(order.order < 3);
            if order.order == 1 {
                std::future::pending::<()>().await;
            }
            Ok(())
        });
    let consumer = test.spawn(consumer).await;
    for number in 1..=3 {
        test.publish(order(number)).await.unwrap();
    }
    test.run_out().await;
    let mut causes: Vec<_> = test
        .dead_letters()
        .await
        .into_iter()
        .map(|l| l.cause)
        .collect();
    causes.sort();
    assert_eq!(causes, ["deadline", "panic"]);
    assert_eq!(calls.attempts(3), [1]);
    assert_eq!(consumer.status().state, ConsumerState::Running);
    consumer.shutdown().await.unwrap();
}

#[tokio::test]
async fn what_a_failed_attempt_published_is_forgotten() {
    let test = TestBus::new();
    let calls = Calls::new();
    calls.break_order(1);
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(paying);
    let _consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    assert!(test.published::<OrderPaid>().await.is_empty());
    calls.mend_all();
    test.run_out().await;
    assert_eq!(test.published::<OrderPaid>().await.len(), 1);
}

#[tokio::test]
async fn while_one_key_retries_others_go_on_and_its_later_messages_wait() {
    let test = TestBus::new();
    let calls = Calls::new();
    calls.break_order(1);
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(noting)
        .retry(RetryPolicy::fixed(10, MINUTE));
    let _consumer = test.spawn(consumer).await;
    for step in 1..=3 {
        test.publish(amount(1, step)).await.unwrap();
        test.publish(amount(2, step)).await.unwrap();
    }
    test.advance(3 * MINUTE + 30 * SECOND).await;
    assert_eq!(calls.amounts(2), [1, 2, 3]);
    assert!(calls.amounts(1).len() >= 3);
    assert!(calls.amounts(1).iter().all(|step| *step == 1));
    calls.mend_all();
    test.run_out().await;
    assert_eq!(calls.amounts(1).last_chunk(), Some(&[1, 2, 3]));
    assert!(test.dead_letters().await.is_empty());
}

#[tokio::test]
async fn nothing_is_settled_while_dead_letters_cannot_be_stored() {
    let (test, broker) = faulty();
    let calls = Calls::new();
    calls.break_order(1);
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(noting)
        .retry(RetryPolicy::none());
    let consumer = test.spawn(consumer).await;
    broker.fail(".dlq", Fault::Away);
    test.publish(amount(1, 1)).await.unwrap();
    test.publish(amount(1, 2)).await.unwrap();
    test.settled().await;
    assert!(matches!(
        consumer.status().state,
        ConsumerState::Holding { .. }
    ));
    test.advance(10 * MINUTE).await;
    assert!(matches!(
        consumer.status().state,
        ConsumerState::Holding { .. }
    ));
    assert!(broker.failed() > 5, "the store was probed");
    assert_eq!(lag(&test, "billing").await, 2);
    assert_eq!(calls.amounts(1), [1], "the handler is not run again");

    broker.mend();
    calls.mend_all();
    test.run_out().await;
    assert_eq!(consumer.status().state, ConsumerState::Running);
    assert_eq!(test.dead_letters().await.len(), 1);
    assert_eq!(calls.amounts(1), [1, 2]);
    assert_eq!(lag(&test, "billing").await, 0);
}

#[tokio::test]
async fn what_a_handler_published_is_sent_when_the_broker_is_back_without_running_it_again() {
    for fault in [Fault::Away, Fault::Silent] {
        let (test, broker) = faulty();
        let calls = Calls::new();
        let consumer = test
            .consumer("billing")
            .shared_state(Arc::clone(&calls))
            .on(paying);
        let consumer = test.spawn(consumer).await;
        broker.fail("payments", Fault::Away);
        test.publish(order(1)).await.unwrap();
        test.settled().await;
        assert!(matches!(
            consumer.status().state,
            ConsumerState::Holding { .. }
        ));
        broker.fail("payments", fault);
        test.advance(10 * MINUTE).await;
        assert_eq!(lag(&test, "billing").await, 1);
        broker.mend();
        test.run_out().await;
        assert_eq!(consumer.status().state, ConsumerState::Running);
        assert_eq!(calls.attempts(1), [1], "{fault:?}");
        assert_eq!(test.published::<OrderPaid>().await, [paid(1)]);
        assert_eq!(lag(&test, "billing").await, 0);
    }
}

#[tokio::test]
async fn a_broker_that_does_not_answer_costs_no_attempt() {
    let (test, broker) = faulty();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(paying);
    let consumer = test.spawn(consumer).await;
    broker.fail("payments", Fault::Silent);
    test.publish(order(1)).await.unwrap();
    test.advance(30 * MINUTE).await;
    assert!(matches!(
        consumer.status().state,
        ConsumerState::Holding { .. }
    ));
    assert_eq!(consumer.status().counts.failed_attempts, 0);
    broker.mend();
    test.run_out().await;
    assert!(calls.attempts(1).iter().all(|attempt| *attempt == 1));
    assert_eq!(test.published::<OrderPaid>().await, [paid(1)]);
    assert!(test.dead_letters().await.is_empty());
}

#[tokio::test]
async fn a_publish_that_is_refused_for_good_is_a_failed_attempt() {
    let (test, broker) = faulty();
    let calls = Calls::new();
    let policy = RetryPolicy::immediate(3).when(|error: &Error| match error.kind() {
        ErrorKind::Unauthorized => OnError::After(MINUTE),
        _ => OnError::DeadLetter,
    });
    let consumer = test.consumer("billing").shared_state(Arc::clone(&calls));
    let consumer = test.spawn(consumer.on(paying).retry(policy)).await;
    broker.fail("payments", Fault::Refused);
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    assert_eq!(calls.attempts(1), [1]);
    test.run_out().await;
    assert_eq!(calls.attempts(1), [1, 2, 3]);
    let letters = test.dead_letters().await;
    assert_eq!((letters.len(), letters[0].attempts), (1, 3));
    assert!(letters[0].error.contains("as the test asked for"));
    assert_eq!(consumer.status().state, ConsumerState::Running);
}

#[tokio::test]
async fn a_blocked_key_waits_for_its_handler_to_be_mended() {
    let test = TestBus::new();
    let calls = Calls::new();
    calls.break_order(1);
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(noting)
        .retry(RetryPolicy::fixed(2, 10 * SECOND))
        .on_poison(OnPoison::BlockKey);
    let consumer = test.spawn(consumer).await;
    test.publish(amount(1, 1)).await.unwrap();
    test.publish(amount(1, 2)).await.unwrap();
    test.publish(amount(2, 1)).await.unwrap();
    test.advance(MINUTE).await;
    assert_eq!(consumer.status().counts.blocked_keys, 1);
    assert_eq!(lag(&test, "billing").await, 2);
    assert_eq!(calls.amounts(2), [1]);
    test.advance(60 * MINUTE).await;
    assert!(calls.amounts(1).iter().all(|step| *step == 1));
    assert!(calls.of(1).len() > 100, "it is tried again and again");

    calls.mend_all();
    test.advance(MINUTE).await;
    assert_eq!(consumer.status().counts.blocked_keys, 0);
    assert_eq!(calls.amounts(1).last(), Some(&2));
    assert_eq!(lag(&test, "billing").await, 0);
    assert_eq!(consumer.status().counts.dead_lettered, 0);
}

#[tokio::test]
async fn an_undecodable_message_blocks_its_key_where_that_is_asked_for() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(noting)
        .on_poison(OnPoison::BlockKey);
    let consumer = test.spawn(consumer).await;
    let damaged = foreign("1", "no format claims this");
    test.broker().publish(vec![damaged]).await.unwrap();
    test.publish(order(1)).await.unwrap();
    test.publish(order(2)).await.unwrap();
    test.advance(MINUTE).await;
    assert_eq!(consumer.status().counts.blocked_keys, 1);
    assert_eq!(calls.all().len(), 1);
    assert_eq!(lag(&test, "billing").await, 2);
    consumer.shutdown().await.unwrap();
    assert_eq!(lag(&test, "billing").await, 2);
}

#[derive(Debug, Default)]
struct Poison {
    mended: AtomicBool,
    attempts: AtomicU32,
}

#[tokio::test]
async fn a_redriven_letter_goes_to_its_group_alone_with_its_id_and_new_attempts() {
    let test = TestBus::new();
    let state = std::sync::Arc::new(Poison::default());
    let other = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&state))
        .retry(RetryPolicy::immediate(2))
        .on(
            async |_: OrderCreated, cx: Context<Poison>| -> Result<(), BoxError> {
                cx.state().attempts.store(cx.attempt(), Ordering::SeqCst);
                match cx.state().mended.load(Ordering::SeqCst) {
                    true => Ok(()),
                    false => Err("broken".into()),
                }
            },
        );
    let consumer = test.spawn(consumer).await;
    let stock = test
        .consumer("stock")
        .shared_state(Arc::clone(&other))
        .on(noting);
    let stock = test.spawn(stock).await;
    let id = test.publish(order(1)).await.unwrap();
    test.run_out().await;
    let letters = test.dead_letters().await;
    assert_eq!(letters.len(), 1);
    state.mended.store(true, Ordering::SeqCst);
    let redrive = Redrive::one(letters[0].id.clone())
        .by("ann")
        .because("mended");
    let redriven = consumer.dead_letters().redrive(redrive).await.unwrap();
    assert_eq!(redriven.done, 1);
    test.run_out().await;
    assert_eq!(state.attempts.load(Ordering::SeqCst), 1);
    assert_eq!(consumer.status().counts.handled, 1);
    assert_eq!(other.attempts(1), [1]);
    assert_eq!(stock.status().counts.skipped_other_group, 1);
    assert!(test.dead_letters().await.is_empty());
    assert_eq!(
        letters[0].message.headers.get_str(header::ID),
        Some(id.to_string().as_str())
    );
}
