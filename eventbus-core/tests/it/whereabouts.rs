//! Where the events of a key are said to be, before, while and after groups deal with them.

use eventbus_core::{
    DeadLetterStatus, ErrorKind, Event, GroupProgress, MemoryProfile, Message, Progress, Redrive,
    RetryPolicy, Start, Topic, Until, Whereabouts,
};
use eventbus_testkit::TestBus;

use crate::fixtures::{Calls, OrderCreated, noting, order};

const TOPIC: Topic = OrderCreated::TOPIC;

/// What is said of each event, by group.
fn progress(places: &Whereabouts) -> Vec<Vec<(&str, Progress)>> {
    let of_event = |groups: &[GroupProgress]| -> Vec<(&'static str, Progress)> {
        let named = groups.iter().map(|it| {
            let name = ["billing", "shipping"]
                .into_iter()
                .find(|name| *name == it.group.as_str());
            (name.expect("a group of these tests"), it.progress)
        });
        named.collect()
    };
    let events = places.events.iter();
    events.map(|event| of_event(&event.groups)).collect()
}

/// On one partition, so that the events of all keys stand behind each other.
async fn one_partition() -> TestBus {
    let test = TestBus::new();
    let orders = eventbus_core::TopicSpec::new(TOPIC).with_partitions(1);
    test.apply_topics(&[orders]).await.unwrap();
    test
}

#[tokio::test]
async fn every_event_of_the_key_is_found_with_what_each_group_did() {
    let test = one_partition().await;
    let calls = Calls::new();
    let billing = test.consumer("billing").shared_state(calls).on(noting);
    let _billing = test.spawn(billing).await;
    let calls = Calls::new();
    let shipping = test.consumer("shipping").shared_state(calls).on(noting);
    let shipping = test.spawn(shipping).await;
    shipping.pause();
    for number in [1, 7, 1, 2, 7] {
        test.publish(order(number)).await.unwrap();
    }
    test.settled().await;

    let places = test.whereabouts(&TOPIC, "7").await.unwrap();
    let waiting = |before| ("shipping", Progress::Waiting { before });
    let settled = ("billing", Progress::Settled);
    assert_eq!(
        progress(&places),
        [[settled, waiting(Some(1))], [settled, waiting(Some(4))]]
    );
    let first = &places.events[0];
    assert_eq!(first.envelope.as_ref().unwrap().event_type, "OrderCreated");
    assert_eq!((first.partition, first.position.unwrap().0), (0, 1));
    assert!(places.dead_letters.is_empty() && places.unknown.is_empty());

    // A read that begins behind a group's place can't say how much stands in between.
    let late = Start::Position(first.position.unwrap());
    let places = test.whereabouts(&TOPIC, "7").since(late).await.unwrap();
    assert_eq!(
        progress(&places),
        [[settled, waiting(None)], [settled, waiting(None)]]
    );

    shipping.resume();
    test.settled().await;
    let places = test.whereabouts(&TOPIC, "7").latest(1).await.unwrap();
    assert_eq!(
        progress(&places),
        [[settled, ("shipping", Progress::Settled)]]
    );
    assert_eq!(places.earlier, 1);
}

#[tokio::test]
async fn dead_letters_of_the_key_are_found_whatever_became_of_them() {
    let test = one_partition().await;
    let refuse = async |order: OrderCreated, _: eventbus_core::Context| match order.order {
        7 => Err("no such customer".into()),
        _ => Ok(()),
    };
    let billing = test
        .consumer("billing")
        .on(refuse)
        .retry(RetryPolicy::none());
    let billing = test.spawn(billing).await;
    for number in [7, 8] {
        test.publish(order(number)).await.unwrap();
    }
    test.settled().await;
    let places = test.whereabouts(&TOPIC, "7").await.unwrap();
    assert_eq!(places.dead_letters.len(), 1);
    assert_eq!(places.dead_letters[0].status, DeadLetterStatus::Open);
    assert!(places.to_string().contains("open: no such customer"));
    assert!(
        test.whereabouts(&TOPIC, "8")
            .await
            .unwrap()
            .dead_letters
            .is_empty()
    );

    let desk = billing.dead_letters();
    desk.redrive(Redrive::all().by("ann")).await.unwrap();
    test.settled().await;
    let places = test.whereabouts(&TOPIC, "7").await.unwrap();
    let group = places.events[1].to_group.as_ref().unwrap();
    assert_eq!(
        group.as_str(),
        "billing",
        "the second one is the re-driven one"
    );
    let states: Vec<_> = places.dead_letters.iter().map(|it| &it.status).collect();
    assert!(
        matches!(
            states[..],
            [DeadLetterStatus::Redriven(_), DeadLetterStatus::Open]
        ),
        "{states:?}"
    );
    desk.discard(Redrive::all().by("ben")).await.unwrap();
    let places = test.whereabouts(&TOPIC, "7").await.unwrap();
    assert!(places.to_string().contains("discarded by ben"));
}

#[tokio::test]
async fn a_dead_letter_that_is_stored_in_parts_is_found_by_its_key() {
    let test = TestBus::like(MemoryProfile::Kafka);
    let calls = Calls::new();
    let billing = test.consumer("billing").shared_state(calls).on(noting);
    let _billing = test.spawn(billing.retry(RetryPolicy::none())).await;
    let empty = Message::new(TOPIC, "").with_key("7");
    let room = test.capabilities().message_bytes_max - empty.size();
    let largest = Message::new(TOPIC, vec![b'x'; room]).with_key("7");
    test.publish_messages(vec![largest.clone()]).await.unwrap();
    test.run_out().await;
    let places = test.whereabouts(&TOPIC, "7").await.unwrap();
    assert_eq!(places.dead_letters.len(), 1);
    assert_eq!(places.dead_letters[0].message, largest);
    let others = test.whereabouts(&TOPIC, "8").await.unwrap();
    assert!(others.dead_letters.is_empty());
}

#[tokio::test]
async fn what_is_parked_is_not_said_to_be_settled() {
    let test = TestBus::holding_keys();
    let refuse = async |order: OrderCreated, _: eventbus_core::Context| match order.order {
        7 => Err("no such customer".into()),
        _ => Ok(()),
    };
    let billing = test
        .consumer("billing")
        .on(refuse)
        .retry(RetryPolicy::none());
    let _billing = test.spawn(billing).await;
    for _ in 0..2 {
        test.publish(order(7)).await.unwrap();
    }
    test.settled().await;
    let places = test.whereabouts(&TOPIC, "7").await.unwrap();
    let held = |before| {
        let until = None;
        [("billing", Progress::Held { before, until })]
    };
    assert_eq!(progress(&places), [held(0), held(1)]);
    assert_eq!(places.held[0].report.wait.error, "no such customer");
    let text = places.to_string();
    assert!(
        text.contains("billing: parked") && text.contains("held behind 1"),
        "{text}"
    );
    assert!(text.contains("parked for billing since"), "{text}");

    let desk = test.held_keys("billing").unwrap();
    desk.discard(&places.held[0].report.held, "ann", "gone")
        .await
        .unwrap();
    test.settled().await;
    let places = test.whereabouts(&TOPIC, "7").await.unwrap();
    let settled = [("billing", Progress::Settled)];
    assert_eq!(progress(&places), [settled, settled]);
    assert!(places.held.is_empty() && places.dead_letters.len() == 2);
}

#[tokio::test]
async fn a_bounded_read_says_that_it_was_not_the_whole() {
    let test = one_partition().await;
    for number in [7, 1, 7] {
        test.publish(order(number)).await.unwrap();
    }
    let places = test.whereabouts(&TOPIC, "7").read_max(2).await.unwrap();
    assert_eq!(places.events.len(), 1);
    assert_eq!(places.unknown[0].what, "events");
    let reason = &places.unknown[0].reason;
    assert!(reason.contains("begin later with `since`"), "{reason}");
}

#[tokio::test]
async fn what_the_broker_can_not_tell_is_named_and_the_rest_is_answered() {
    let test = TestBus::like(MemoryProfile::RabbitMq);
    let refuse = async |_: OrderCreated, _: eventbus_core::Context| Err("closed".into());
    let billing = test
        .consumer("billing")
        .on(refuse)
        .retry(RetryPolicy::none());
    let _billing = test.spawn(billing).await;
    test.publish(order(7)).await.unwrap();
    test.settled().await;
    let places = test
        .whereabouts(&TOPIC, "7")
        .group("billing")
        .await
        .unwrap();
    assert!(places.events.is_empty());
    assert_eq!(places.unknown[0].what, "events");
    assert!(places.unknown[0].reason.contains("replay"));
    assert_eq!(places.dead_letters.len(), 1);
}

#[tokio::test]
async fn looking_creates_nothing() {
    let test = TestBus::new();
    let error = test.whereabouts(&TOPIC, "7").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    test.publish(order(7)).await.unwrap();
    let _reader = test
        .read(&[TOPIC], Start::Latest, Some(Until::Now))
        .await
        .unwrap();
    test.whereabouts(&TOPIC, "7").group("nobody").await.unwrap();
    let topics = test.describe_topics(&[]).await.unwrap();
    assert_eq!(topics.len(), 1, "{topics:?}");
}
