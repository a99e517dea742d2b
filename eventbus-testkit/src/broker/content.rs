//! What is published arrives as it was: bytes, headers, order, place; or it is refused by name.

use eventbus_core::{
    ErrorKind, Headers, HeadersBuilder, Key, Message, Outcome, PublishError, partition_of,
};

use super::{BrokerHarness, DEADLINE, Stage, numbered};
use crate::probe::{text_of, within};

/// Key, headers and payload arrive as they were published: empty, binary, unicode, repeated.
pub async fn bytes_and_headers_arrive_unchanged(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let mut probe = stage.member().await;
        let all_bytes: Vec<u8> = (0..=255).collect();
        let headers = |add: &dyn Fn(HeadersBuilder) -> eventbus_core::Result<HeadersBuilder>| {
            add(Headers::builder()).expect("within limits").build()
        };
        let message = |payload: &[u8]| Message::new(stage.topic.clone(), payload.to_vec());
        let batch = vec![
            message(b"plain").with_key("key"),
            message(b"").with_key("key"),
            message(&all_bytes).with_key(Key::new(all_bytes.clone())),
            message("żółć 🦀\0\r\n".as_bytes()).with_key("clé 🔑"),
            message(b"no key"),
            message(b"").with_headers(headers(&|add| add.push("alone", "x"))),
            message(b"headers")
                .with_key("key")
                .with_headers(headers(&|add| {
                    add.push("text", "value")?
                        .push("empty", "")?
                        .push("binary", &all_bytes)?
                        .push("unicode", "naïve ☃")?
                        .push("repeated", "first")?
                        .push("repeated", "second")?
                        .push("long", vec![b'x'; 8 * 1024])
                })),
            // What an adapter may send together has to come apart as it was.
            message(b"ours").with_headers(headers(&|add| {
                add.push("eb-id", "17")?
                    .push("eb-source", "")?
                    .push("eb-metadata", "{\"a: b\":\"ü\"}")?
                    .push("content-type", "text/plain")?
                    .push("eb-data", "1-2")
            })),
            message(b"ours with lines").with_headers(headers(&|add| {
                add.push("eb-id", "17")?
                    .push("eb-dlq-cause", "one\ntwo: three\r\n")?
                    .push("eb-a: b", "x")?
                    .push("eb-headers", "eb-id: 18\n")
            })),
            message(b"ours with bytes").with_headers(headers(&|add| {
                add.push("eb-id", &all_bytes)?.push("eb-id", "17")
            })),
            message(b"headers in a header").with_headers(headers(&|add| {
                add.push("eb-headers", "eb-id: 18\n")?
                    .push("eb-headers", "eb-id: 19")
            })),
        ];
        stage
            .broker
            .publish(batch.clone())
            .await
            .expect("there is room");
        let deliveries = probe.collect(batch.len()).await;
        for (sent, delivery) in batch.iter().zip(&deliveries) {
            assert_eq!(*sent, delivery.message);
        }
        probe.settle(&deliveries).await;
        assert!(stage.drain(&mut probe).await.is_empty());
    })
    .await;
}

/// A message just below the declared limit arrives whole.
pub async fn large_message_arrives_unchanged(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let mut probe = stage.member().await;
        // Brokers count framing as well, so the very last bytes are not asked for.
        let size = (stage.capabilities.message_bytes_max * 9 / 10).min(8 * 1024 * 1024);
        let payload: Vec<u8> = (0..size).map(|index| (index % 251) as u8).collect();
        let message = Message::new(stage.topic.clone(), payload).with_key("large");
        stage
            .broker
            .publish(vec![message.clone()])
            .await
            .expect("it is below the limit");
        let deliveries = probe.collect(1).await;
        assert!(deliveries[0].message == message, "the bytes differ");
        probe.settle(&deliveries).await;
    })
    .await;
}

/// Nothing is recognised as a duplicate silently: that is the inbox's work, by id.
pub async fn message_published_twice_arrives_twice(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let mut probe = stage.member().await;
        let key = Key::from("same");
        stage.publish(&key, &["same", "same"]).await;
        stage.publish(&key, &["same"]).await;
        let deliveries = stage.drain(&mut probe).await;
        assert_eq!(deliveries.len(), 3);
        probe.settle(&deliveries).await;
    })
    .await;
}

/// Within a batch, messages of one key keep their order, whatever stands between them.
pub async fn messages_of_a_key_keep_the_order_of_their_batch(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 4).await;
        let mut probe = stage.member().await;
        let texts = numbered("", 400);
        let batch = texts
            .iter()
            .enumerate()
            .map(|(index, text)| stage.message(&Key::display(index % 16), text))
            .collect();
        stage.broker.publish(batch).await.expect("there is room");
        expect_order_per_key(&stage, &mut probe, 400).await;
    })
    .await;
}

/// Two publishes, one awaited after the other, keep the order of a key.
pub async fn messages_of_a_key_keep_the_order_of_awaited_publishes(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 4).await;
        let mut probe = stage.member().await;
        for (index, text) in numbered("", 64).iter().enumerate() {
            stage.publish(&Key::display(index % 4), &[text]).await;
        }
        expect_order_per_key(&stage, &mut probe, 64).await;
    })
    .await;
}

async fn expect_order_per_key(stage: &Stage, probe: &mut crate::Probe, count: usize) {
    let deliveries = probe.collect(count).await;
    let mut last = std::collections::HashMap::new();
    for delivery in &deliveries {
        let number: u64 = text_of(delivery).parse().expect("the text is a number");
        let before = last.insert(delivery.message.key.clone(), number);
        assert!(
            before.is_none_or(|before| before < number),
            "{number} of key {:?} came after {before:?}",
            delivery.message.key
        );
    }
    probe.settle(&deliveries).await;
    assert!(stage.drain(probe).await.is_empty(), "something came twice");
}

/// A key's messages are on the partition that `partition_of` names.
pub async fn messages_of_a_key_share_the_partition_of_that_key(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 5).await;
        let mut probe = stage.member().await;
        let batch = (0..100)
            .map(|number| stage.message(&Key::display(number), "x"))
            .collect();
        stage.broker.publish(batch).await.expect("there is room");
        let deliveries = probe.collect(100).await;
        for delivery in &deliveries {
            let key = delivery.message.key.as_ref().expect("all have a key");
            let lane = probe.lane(&stage.topic, partition_of(key, 5));
            assert_eq!(delivery.receipt.lane, lane, "the place of key {key}");
        }
        probe.settle(&deliveries).await;
    })
    .await;
}

/// A message over the limit is `InvalidInput` and not on the broker.
pub async fn oversized_message_is_refused_and_not_taken(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let mut probe = stage.member().await;
        let payload = vec![0; stage.capabilities.message_bytes_max + 1];
        let message = Message::new(stage.topic.clone(), payload).with_key("k");
        let error = publish_error(&stage, vec![message]).await;
        expect_refusal(&error, 0, ErrorKind::InvalidInput);
        assert_eq!(error.unpublished.len(), 1);
        assert!(stage.drain(&mut probe).await.is_empty(), "it was taken");
    })
    .await;
}

/// A batch with messages at fault names exactly what is not on the broker.
pub async fn partial_failure_names_the_right_messages(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let mut probe = stage.member().await;
        let large = "x".repeat(stage.capabilities.message_bytes_max + 1);
        let texts = ["a", &large, "b", &large, "c"];
        let batch: Vec<_> = texts
            .iter()
            .enumerate()
            .map(|(index, text)| stage.message(&Key::display(index), text))
            .collect();
        let error = publish_error(&stage, batch.clone()).await;
        for index in [1, 3] {
            expect_refusal(&error, index, ErrorKind::InvalidInput);
        }
        for unpublished in &error.unpublished {
            assert!(unpublished.message == batch[unpublished.index]);
            assert_eq!(unpublished.outcome, Outcome::NotTaken);
        }
        let named: Vec<_> = error.unpublished.iter().map(|found| found.index).collect();
        let expected: Vec<_> = (0..5)
            .filter(|index| !named.contains(index))
            .map(|index| texts[index].to_owned())
            .collect();
        assert_eq!(stage.drain_texts(&mut probe).await, expected);
    })
    .await;
}

/// Where `ordered_pipelining` is declared, nothing of a key is taken behind a refused message.
pub async fn later_messages_of_a_refused_key_are_held_back_where_declared(
    harness: &dyn BrokerHarness,
) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let mut probe = stage.member().await;
        let large = "x".repeat(stage.capabilities.message_bytes_max + 1);
        let (key, other) = (Key::from("key"), Key::from("other"));
        let batch = vec![
            stage.message(&key, "before"),
            stage.message(&key, &large),
            stage.message(&key, "behind"),
            stage.message(&other, "beside"),
        ];
        let error = publish_error(&stage, batch).await;
        let arrived = stage.drain_texts(&mut probe).await;
        if stage.capabilities.ordered_pipelining {
            assert!(!arrived.contains(&"behind".to_owned()), "{arrived:?}");
        }
        // Declared or not: each message is either named or there.
        for (index, text) in ["before", "", "behind", "beside"].iter().enumerate() {
            let named = error.unpublished.iter().any(|found| found.index == index);
            let there = arrived.iter().any(|found| found == text);
            assert!(
                named != there,
                "message {index}: named {named}, there {there}"
            );
        }
    })
    .await;
}

async fn publish_error(stage: &Stage, batch: Vec<Message>) -> PublishError {
    stage
        .broker
        .publish(batch)
        .await
        .expect_err("a message is too large")
}

fn expect_refusal(error: &PublishError, index: usize, kind: ErrorKind) {
    let refused = error
        .unpublished
        .iter()
        .find(|found| found.index == index)
        .expect("the message at fault is named");
    assert_eq!(refused.error.kind(), kind);
    assert_eq!(refused.outcome, Outcome::NotTaken);
}
