//! What is kept of messages that could not be handled, and what operators do with it.

use std::sync::Arc;

use eventbus_core::{
    Broker, Consumer, Event, HEADER_BYTES_MAX, HEADERS_MAX, Headers, Key, MemoryProfile, Message,
    Publisher, Redrive, RetryPolicy,
};
use eventbus_testkit::TestBus;

use crate::failures::lag;
use crate::fixtures::{Calls, OrderCreated, noting, order};

/// A consumer of `billing` without retries, and what it notes.
async fn billing(test: &TestBus) -> (Consumer, Arc<Calls>) {
    let calls = Calls::new();
    let consumer = test.consumer("billing").shared_state(Arc::clone(&calls));
    let consumer = consumer.on(noting).retry(RetryPolicy::none());
    (test.spawn(consumer).await, calls)
}

/// A message of exactly the size that the broker takes; no format claims it.
fn largest(test: &TestBus, key: Option<Key>, headers: Headers) -> Message {
    let mut message = Message::new(OrderCreated::TOPIC, "").with_headers(headers);
    message.key = key;
    let room = test.broker().capabilities().message_bytes_max - message.size();
    // No two stretches of it are alike, so that a part in the wrong place shows.
    let payload: Vec<u8> = (0..room as u64 / 8 + 1)
        .flat_map(u64::to_le_bytes)
        .collect();
    message.payload = payload[..room].to_vec().into();
    message
}

#[tokio::test]
async fn a_foreign_message_at_the_broker_s_limit_has_a_dead_letter_and_its_lane_goes_on() {
    let test = TestBus::like(MemoryProfile::Kafka);
    let (consumer, calls) = billing(&test).await;
    let originals = [
        largest(&test, Some(Key::from("1")), Headers::new()),
        largest(&test, Some(Key::from("1")), many_headers()),
        largest(&test, None, many_headers()),
    ];
    for original in &originals {
        let taken = test.broker().publish(vec![original.clone()]).await;
        taken.expect("it is as large as the broker takes");
    }
    test.publish(order(1)).await.unwrap();
    test.run_out().await;

    assert_eq!(calls.attempts(1), [1], "the key went on");
    assert_eq!(lag(&test, "billing").await, 0);
    let letters = test.dead_letters().await;
    assert_eq!(letters.len(), 3);
    for original in &originals {
        assert!(letters.iter().any(|letter| letter.message == *original));
    }
    let shown = consumer.dead_letters().show(&letters[0].id).await.unwrap();
    assert_eq!(shown.message, letters[0].message);
    let discarded = consumer.dead_letters();
    discarded.discard(Redrive::all()).await.unwrap();
    assert!(test.dead_letters().await.is_empty());
}

/// More headers than may be published, some of them longer.
fn many_headers() -> Headers {
    let mut headers = Headers::builder().unlimited();
    for number in 0..2 * HEADERS_MAX {
        let value = vec![number as u8; number * HEADER_BYTES_MAX / HEADERS_MAX];
        headers = headers.push("from elsewhere", value).expect("no limit");
    }
    headers.build()
}
