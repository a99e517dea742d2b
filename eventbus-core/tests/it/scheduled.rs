//! Events for later: at their time, once, in order; taken back, refused, and through trouble.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use eventbus_core::{
    BoxError, Context, ErrorKind, Event, EventBus, EventId, Headers, MemoryBroker, MemoryProfile,
    MemorySchedule, MemoryUnit, Message, Outcome, Outgoing, PartlyPublished, Replay, RetryPolicy,
    Start, Timestamp, Until, header,
};
use eventbus_testkit::TestBus;

use crate::fixtures::{
    Fault, MINUTE, OrderCreated, OrderPaid, SECOND, amount, faulty, order, paid,
};

type Sender = tokio::sync::mpsc::UnboundedSender<EventId>;

const HOUR: Duration = Duration::from_secs(3600);

async fn amounts(test: &TestBus) -> Vec<u64> {
    let events = test.published::<OrderCreated>().await;
    events.iter().map(|event| event.amount).collect()
}

#[tokio::test]
async fn an_event_is_published_at_its_time_with_its_id() {
    let test = TestBus::new();
    let id = test.publish_after(order(1), HOUR).await.unwrap();
    test.advance(HOUR - SECOND).await;
    assert!(test.published::<OrderCreated>().await.is_empty());
    let listed = test.scheduled().unwrap().list().await.unwrap();
    assert_eq!((listed.len(), &listed[0].id), (1, &id));
    assert_eq!(listed[0].event_type.as_deref(), Some("OrderCreated"));

    test.advance(2 * SECOND).await;
    let published = test.published_with_envelopes::<OrderCreated>().await;
    assert_eq!(published.len(), 1);
    assert_eq!(published[0].0.id, id);
    assert!(test.scheduled().unwrap().list().await.unwrap().is_empty());
    assert!(!test.cancel(&id).await.unwrap());
}

#[tokio::test]
async fn the_header_says_afterwards_when_it_was_due() {
    let test = TestBus::new();
    let time = test.clock().now().plus(HOUR);
    test.publish_at(order(1), time).await.unwrap();
    test.run_out().await;
    let mut reader = test
        .read(&[OrderCreated::TOPIC], Start::Earliest, Some(Until::Now))
        .await
        .unwrap();
    let record = reader.next().await.unwrap().unwrap();
    let said = record.message.headers.get_str(header::NOT_BEFORE);
    assert_eq!(said, Some(time.to_string().as_str()));
}

#[tokio::test]
async fn events_come_by_time_and_ties_as_they_were_scheduled() {
    let test = TestBus::new();
    for (minutes, step) in [(3, 4), (1, 1), (2, 2), (2, 3)] {
        let delay = MINUTE * minutes;
        test.publish_after(amount(1, step), delay).await.unwrap();
    }
    test.publish(amount(1, 0)).await.unwrap();
    test.advance(MINUTE + SECOND).await;
    assert_eq!(amounts(&test).await, [0, 1]);
    test.run_out().await;
    assert_eq!(amounts(&test).await, [0, 1, 2, 3, 4]);
}

#[tokio::test]
async fn what_has_a_time_that_is_over_is_published_at_once() {
    let test = TestBus::new();
    let past = Timestamp::from_micros(0);
    test.publish_at(order(1), past).await.unwrap();
    let now = test.clock().now();
    test.publish_at(order(2), now).await.unwrap();
    assert_eq!(test.published::<OrderCreated>().await.len(), 2);
}

#[tokio::test]
async fn a_cancelled_event_is_not_published() {
    let test = TestBus::new();
    let id = test.publish_after(order(1), HOUR).await.unwrap();
    let kept = test.publish_after(order(2), HOUR).await.unwrap();
    assert!(test.cancel(&id).await.unwrap());
    assert!(!test.cancel(&id).await.unwrap());
    test.run_out().await;
    let published = test.published_with_envelopes::<OrderCreated>().await;
    assert_eq!(published.len(), 1);
    assert_eq!(published[0].0.id, kept);
}

#[tokio::test]
async fn a_batch_is_partly_sent_and_partly_scheduled() {
    let test = TestBus::new();
    let later = test.clock().now().plus(HOUR);
    let batch = [0, 1, 2, 3].map(|step| {
        let event = Outgoing::new(amount(1, step));
        match step {
            1 | 2 => event.with_not_before(later),
            _ => event,
        }
    });
    let ids = test.publish_all(batch).await.unwrap();
    assert_eq!(ids.len(), 4);
    assert_eq!(amounts(&test).await, [0, 3]);
    test.run_out().await;
    assert_eq!(amounts(&test).await, [0, 3, 1, 2]);
}

fn for_later(text: &'static str, time: Timestamp) -> Message {
    let headers = Headers::builder().push(header::NOT_BEFORE, time.to_string());
    Message::new(OrderPaid::TOPIC, text).with_headers(headers.unwrap().build())
}

#[tokio::test]
async fn messages_of_tools_wait_as_well() {
    let test = TestBus::new();
    let later = test.clock().now().plus(HOUR);
    let message = for_later("raw", later);
    let plain = Message::new(OrderPaid::TOPIC, "plain");
    test.publish_messages(vec![message, plain]).await.unwrap();
    let waiting = test.scheduled().unwrap().list().await.unwrap();
    assert_eq!((waiting.len(), waiting[0].due), (1, later));
}

#[tokio::test]
async fn without_a_schedule_it_is_refused_with_the_way_to_get_one() {
    for bus in [
        EventBus::new(MemoryBroker::new()),
        TestBus::like(MemoryProfile::Kafka).bus().clone(),
    ] {
        let errors = [
            bus.publish_after(order(1), HOUR).await.unwrap_err(),
            bus.cancel(&EventId::new()).await.unwrap_err(),
            bus.scheduled().unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains("sqlite://"), "{error}");
        }
        let past = Timestamp::from_micros(0);
        bus.publish_at(order(1), past).await.unwrap();
        let later = bus.clock().now().plus(HOUR);
        let refused = bus.publish_messages(vec![for_later("raw", later)]).await;
        let error = refused.unwrap_err().unpublished.remove(0);
        assert_eq!(error.outcome, Outcome::NotTaken);
        assert_eq!(error.error.kind(), ErrorKind::Unsupported);
    }
}

#[tokio::test]
async fn a_schedule_outlives_its_bus() {
    tokio::time::pause();
    let broker = MemoryBroker::new();
    let schedule = Arc::new(MemorySchedule::new());
    let bus = |broker: MemoryBroker| {
        EventBus::builder(broker)
            .schedule(Arc::clone(&schedule) as _)
            .build()
    };
    let first = bus(broker.connect());
    let delay = Duration::from_millis(200);
    let id = first.publish_after(order(1), delay).await.unwrap();
    first.close().await.unwrap();
    let closed = first.publish_after(order(2), delay).await.unwrap_err();
    assert_eq!(closed.kind(), ErrorKind::Closed);

    let second = bus(broker.connect());
    let (done, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let consumer = second
        .consumer("billing")
        .state(done)
        .on(async |_: OrderCreated, cx: Context<Sender>| Ok(cx.state().send(cx.id().clone())?))
        .spawn()
        .await
        .unwrap();
    assert_eq!(heard.recv().await, Some(id));
    consumer.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_bus_that_nobody_uses_ends_with_its_schedule() {
    let schedule = Arc::new(MemorySchedule::new());
    let bus = EventBus::builder(MemoryBroker::new())
        .schedule(Arc::clone(&schedule) as _)
        .build();
    bus.publish_after(order(1), HOUR).await.unwrap();
    tokio::task::yield_now().await;
    drop(bus);
    while Arc::strong_count(&schedule) > 1 {
        tokio::task::yield_now().await;
    }
}

/// Asks to be reminded of each order, an hour later.
async fn remind(order: OrderCreated, cx: Context) -> Result<(), BoxError> {
    cx.publish_after(paid(order.order), HOUR)?;
    Ok(())
}

#[tokio::test]
async fn what_a_handler_schedules_waits_when_it_has_succeeded() {
    let test = TestBus::new();
    let fails = Arc::new(AtomicBool::new(true));
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&fails))
        .on(async |order: OrderCreated, cx: Context<AtomicBool>| {
            let id = cx.publish_after(paid(order.order), HOUR)?;
            cx.publish(paid(order.order + 1))?;
            if cx.state().swap(false, Ordering::Relaxed) {
                return Err(format!("{id} is forgotten").into());
            }
            Ok(())
        })
        .retry(RetryPolicy::fixed(2, MINUTE));
    let _consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    let scheduled = test.scheduled().unwrap();
    assert!(scheduled.list().await.unwrap().is_empty());

    test.advance(2 * MINUTE).await;
    assert_eq!(scheduled.list().await.unwrap().len(), 1);
    assert_eq!(test.published::<OrderPaid>().await, [paid(2)]);
    test.run_out().await;
    assert_eq!(test.published::<OrderPaid>().await, [paid(2), paid(1)]);
    let caused = test.published_with_envelopes::<OrderPaid>().await;
    assert!(caused.iter().all(|(it, _)| it.causation_id.is_some()));
}

#[tokio::test]
async fn handling_again_schedules_nothing_more() {
    let test = TestBus::new();
    let _consumer = test.spawn(test.consumer("billing").on(remind)).await;
    let id = EventId::new();
    for _ in 0..3 {
        let again = Outgoing::new(order(1)).with_id(id.clone());
        test.publish(again).await.unwrap();
    }
    test.settled().await;
    let scheduled = test.scheduled().unwrap();
    assert_eq!(scheduled.list().await.unwrap().len(), 1);
    test.run_out().await;
    assert_eq!(test.published::<OrderPaid>().await.len(), 1);
}

#[tokio::test]
async fn a_replay_schedules_nothing_unless_it_may_publish() {
    let test = TestBus::new();
    test.publish(order(1)).await.unwrap();
    let replay = Replay::from(Start::Earliest);
    let refused = test.consumer("billing").on(remind).replay(replay).await;
    let error = refused.unwrap_err();
    assert!(format!("{error:?}").contains("is a replay"), "{error:?}");
    let replay = Replay::from(Start::Earliest).allow_publish();
    let replayed = test.consumer("billing").on(remind).replay(replay).await;
    replayed.unwrap();
    assert_eq!(test.scheduled().unwrap().list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_unit_of_work_without_an_outbox_refuses_to_schedule() {
    let test = TestBus::new();
    let unit = MemoryUnit::new(test.broker().clone(), ());
    let consumer = test
        .consumer("billing")
        .unit(unit)
        .on(
            async |order: OrderCreated, cx: Context<(), MemoryUnit<()>>| {
                cx.publish_after(paid(order.order), HOUR)?;
                Ok(())
            },
        )
        .retry(RetryPolicy::none());
    let _consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.run_out().await;
    let letters = test.dead_letters().await;
    assert!(letters[0].error.contains("unit of work"), "{letters:?}");
}

#[tokio::test]
async fn bus_publish_at_is_refused_inside_a_handler_and_cancel_is_not() {
    let test = TestBus::new();
    let id = test.publish_after(paid(7), HOUR).await.unwrap();
    let consumer = test.consumer("billing").state((test.bus().clone(), id)).on(
        async |_: OrderCreated, cx: Context<(EventBus, EventId)>| {
            let (bus, id) = cx.state();
            let refused = bus.publish_after(paid(1), HOUR).await;
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
            assert!(bus.cancel(id).await?);
            Ok(())
        },
    );
    let consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.run_out().await;
    assert_eq!(consumer.status().counts.handled, 1);
    assert!(test.published::<OrderPaid>().await.is_empty());
}

#[tokio::test]
async fn what_is_due_while_the_broker_is_away_comes_in_order_when_it_is_back() {
    let (test, faults) = faulty();
    for step in 1..=3 {
        let delay = MINUTE * step as u32;
        test.publish_after(amount(1, step), delay).await.unwrap();
    }
    let first = test.scheduled().unwrap().list().await.unwrap().remove(0);
    faults.fail("orders", Fault::Away);
    test.advance(10 * MINUTE).await;
    assert!(!test.cancel(&first.id).await.unwrap(), "it may be there");
    faults.mend();
    test.advance(MINUTE).await;
    assert_eq!(amounts(&test).await, [1, 2, 3]);
    assert!(test.scheduled().unwrap().list().await.unwrap().is_empty());
}

#[tokio::test]
async fn what_the_broker_refuses_holds_up_nothing_and_is_tried_again() {
    let (test, faults) = faulty();
    test.publish_after(order(1), MINUTE).await.unwrap();
    test.publish_after(paid(1), MINUTE + SECOND).await.unwrap();
    faults.fail("orders", Fault::Refused);
    test.advance(MINUTE + 2 * SECOND).await;
    assert_eq!(test.published::<OrderPaid>().await, [paid(1)]);
    assert_eq!(test.scheduled().unwrap().list().await.unwrap().len(), 1);
    faults.mend();
    test.advance(MINUTE).await;
    assert_eq!(test.published::<OrderCreated>().await, [order(1)]);
}

#[tokio::test]
async fn whereabouts_knows_what_waits() {
    let test = TestBus::new();
    test.publish(order(1)).await.unwrap();
    let id = test.publish_after(order(1), HOUR).await.unwrap();
    test.publish_after(order(2), HOUR).await.unwrap();
    let places = test.whereabouts(&OrderCreated::TOPIC, "1").await.unwrap();
    assert_eq!((places.events.len(), places.scheduled.len()), (1, 1));
    assert_eq!(places.scheduled[0].id, id);
    let line = format!("OrderCreated {id} waits until 2026-01-01T01:00:00Z");
    assert!(places.to_string().contains(&line), "{places}");
}

#[tokio::test]
async fn a_full_schedule_holds_back_only_what_is_for_later() {
    let test = TestBus::new();
    let later = test.clock().now().plus(HOUR);
    let text = "x".repeat(900_000);
    let large = |order| OrderPaid {
        order,
        note: text.clone(),
    };
    let mut number = 0;
    let error = loop {
        number += 1;
        let batch = [
            Outgoing::new(large(number)).with_not_before(later),
            Outgoing::new(paid(number)),
        ];
        match test.publish_all(batch).await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(number > 60, "64 MiB hold more than {number}");
    assert_eq!(error.kind(), ErrorKind::RateLimited);
    assert!(error.is_retryable());
    let partly = PartlyPublished::of(&error).unwrap();
    assert_eq!((partly.published.len(), partly.not_taken.len()), (1, 1));
    let sent = test.published::<OrderPaid>().await.len() as u64;
    assert_eq!(sent, number, "what is due of the last batch was sent");
}

#[tokio::test]
async fn without_a_schedule_only_what_is_for_later_is_refused() {
    let test = TestBus::new();
    let bus = EventBus::new(test.broker().clone());
    let later = for_later("later", bus.clock().now().plus(HOUR));
    let plain = |text: &'static str| Message::new(OrderPaid::TOPIC, text);
    let batch = vec![plain("a"), later, plain("b")];
    let unpublished = bus.publish_messages(batch).await.unwrap_err().unpublished;
    let refused: Vec<_> = unpublished
        .iter()
        .map(|it| (it.index, it.outcome))
        .collect();
    assert_eq!(refused, [(1, Outcome::NotTaken)]);
    assert_eq!(unpublished[0].error.kind(), ErrorKind::Unsupported);
}

#[tokio::test]
async fn a_refused_message_is_not_overtaken_by_its_key() {
    let (test, faults) = faulty();
    for (step, delay) in [(1, MINUTE), (2, MINUTE + SECOND), (3, MINUTE + 20 * SECOND)] {
        test.publish_after(amount(1, step), delay).await.unwrap();
    }
    faults.fail("orders", Fault::Refused);
    test.advance(MINUTE + 2 * SECOND).await;
    faults.mend();
    let other = MINUTE / 2;
    test.publish_after(amount(2, 0), other).await.unwrap();
    test.advance(MINUTE / 2 + SECOND).await;
    assert_eq!(amounts(&test).await, [0], "other keys go on");
    test.advance(5 * MINUTE).await;
    let events = test.published::<OrderCreated>().await;
    let of_key = events.iter().filter(|event| event.order == 1);
    let of_key: Vec<_> = of_key.map(|event| event.amount).collect();
    assert_eq!(of_key, [1, 2, 3]);
}

#[tokio::test]
async fn a_topic_that_is_away_holds_up_no_other() {
    let (test, faults) = faulty();
    for number in 0..600 {
        let delay = MINUTE + Duration::from_millis(number);
        test.publish_after(paid(number % 10), delay).await.unwrap();
    }
    faults.fail("payments", Fault::Away);
    test.advance(2 * MINUTE).await;
    for minute in 1..5 {
        test.publish_after(order(minute), SECOND).await.unwrap();
        test.advance(MINUTE).await;
        let published = test.published::<OrderCreated>().await;
        assert_eq!(published.len() as u64, minute);
    }
    faults.mend();
    test.advance(3 * MINUTE).await;
    assert_eq!(test.published::<OrderPaid>().await.len(), 600);
    assert!(test.scheduled().unwrap().list().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_topic_that_was_away_is_published_in_order() {
    let (test, faults) = faulty();
    for step in 0..600 {
        let delay = MINUTE + Duration::from_millis(step);
        test.publish_after(amount(step % 7, step), delay)
            .await
            .unwrap();
    }
    test.publish_after(paid(1), 2 * MINUTE).await.unwrap();
    faults.fail("orders", Fault::Away);
    test.advance(2 * MINUTE + 5 * SECOND).await;
    assert_eq!(test.published::<OrderPaid>().await, [paid(1)]);
    faults.mend();
    test.advance(5 * MINUTE).await;
    let events = test.published::<OrderCreated>().await;
    for key in 0..7 {
        let of_key = events.iter().filter(|event| event.order == key);
        let of_key: Vec<_> = of_key.map(|event| event.amount).collect();
        let expected: Vec<_> = (0..600).filter(|step| step % 7 == key).collect();
        assert_eq!(of_key, expected, "key {key}");
    }
}

#[tokio::test]
async fn while_the_broker_is_away_nothing_is_postponed() {
    let (test, faults) = faulty();
    let delay = MINUTE;
    test.publish_after(paid(1), delay).await.unwrap();
    test.publish_after(order(1), delay).await.unwrap();
    let before = test.scheduled().unwrap().list().await.unwrap();
    faults.fail("", Fault::Away);
    test.advance(60 * MINUTE).await;
    let after = test.scheduled().unwrap().list().await.unwrap();
    let due = |it: &eventbus_core::ScheduledReport| it.due;
    assert!(after.iter().map(due).eq(before.iter().map(due)));
    faults.mend();
    test.advance(3 * SECOND).await;
    assert_eq!(test.published::<OrderCreated>().await.len(), 1);
}
