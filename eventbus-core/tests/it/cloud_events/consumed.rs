//! CloudEvents through a consumer: handled once, kept whole where they cannot be, and edited.

use std::sync::Arc;

use eventbus_core::{
    Breaker, CloudEventsBinaryFormat, CloudEventsFormat, Consumer, DuplicateWindow, Edit, Event,
    EventBus, EventId, Format, MemoryBroker, Message, Publisher, Record, Redrive, RetryPolicy,
    Start, Until,
};
use eventbus_testkit::TestBus;
use serde_json::{Value, json};

use super::foreign::MINIMAL;
use super::headers;
use crate::fixtures::{Calls, OrderCreated, amount, noting};
use crate::formats::envelope;

async fn billing(test: &TestBus) -> (Consumer, Arc<Calls>) {
    let calls = Calls::new();
    let consumer = test.consumer("billing").shared_state(Arc::clone(&calls));
    let consumer = consumer.on(noting).retry(RetryPolicy::none());
    let consumer = consumer.duplicate_window(DuplicateWindow::in_memory());
    // Here most events are to fail.
    let consumer = consumer.breaker(Breaker::default().with_failure_rate(f64::INFINITY));
    (test.spawn(consumer).await, calls)
}

/// An event of `source` that calls itself `id`.
fn of(source: &str, id: &str, order: u64) -> Message {
    let mut said = MINIMAL;
    said[1].1 = id;
    said[2].1 = source;
    let data = json!({"order": order, "amount": 5}).to_string();
    let message = Message::new(OrderCreated::TOPIC, data).with_key(order.to_string());
    message.with_headers(headers(&said))
}

async fn records(bus: &EventBus) -> Vec<Record> {
    let topics = [OrderCreated::TOPIC];
    let reader = bus.read(&topics, Start::Earliest, Some(Until::Now)).await;
    let mut reader = reader.expect("it reads");
    let mut records = Vec::new();
    while let Some(record) = reader.next().await.expect("it reads on") {
        records.push(record);
    }
    records
}

#[tokio::test]
async fn two_sources_that_count_their_events_are_no_duplicates_of_each_other() {
    let test = TestBus::new();
    let (consumer, calls) = billing(&test).await;
    let messages = vec![of("/a", "7", 1), of("/b", "7", 2), of("/a", "7", 1)];
    test.broker()
        .publish(messages)
        .await
        .expect("they are taken");
    test.settled().await;
    assert_eq!((calls.amounts(1), calls.amounts(2)), (vec![5], vec![5]));
    assert_eq!(consumer.status().counts.duplicates, 1);
}

#[tokio::test]
async fn what_is_no_cloud_event_is_a_dead_letter_as_it_came() {
    let test = TestBus::new();
    let (consumer, _) = billing(&test).await;
    let body = r#"{"specversion":"1.0","id":"7","type":"OrderCreated"}"#;
    let said = headers(&[("content-type", "application/cloudevents+json"), ("x", "1")]);
    let wrong = Message::new(OrderCreated::TOPIC, body)
        .with_key("1")
        .with_headers(said.clone());
    test.broker()
        .publish(vec![wrong.clone()])
        .await
        .expect("it is taken");
    test.settled().await;
    let letter = consumer
        .dead_letters()
        .list()
        .await
        .expect("it is stored")
        .remove(0);
    assert_eq!(letter.cause, "undecodable");
    assert!(letter.error.contains("it is missing"), "{}", letter.error);
    assert_eq!(
        (&letter.message.payload, &letter.message.key),
        (&wrong.payload, &wrong.key)
    );
    for (name, value) in said.iter() {
        assert_eq!(letter.message.headers.get(name), Some(value));
    }
}

#[tokio::test]
async fn a_foreign_event_is_the_same_when_it_is_redriven() {
    let test = TestBus::new();
    let (consumer, calls) = billing(&test).await;
    calls.break_order(1);
    test.broker()
        .publish(vec![of("/a", "7", 1)])
        .await
        .expect("it is taken");
    test.run_out().await;
    calls.mend_all();
    let desk = consumer.dead_letters();
    desk.redrive(Redrive::all()).await.expect("it is re-driven");
    test.settled().await;
    assert_eq!(calls.amounts(1), [5, 5]);
    let records = records(test.bus()).await;
    assert_eq!(records.len(), 2);
    for record in records {
        let envelope = test.bus().envelope(&record.message).expect("it is read");
        assert_eq!(envelope.id, EventId::parse("/a 7").expect("an id"));
        assert_eq!(envelope.source, "/a");
    }
}

#[tokio::test]
async fn data_are_edited_and_stay_of_their_media_type() {
    let structured = CloudEventsFormat::new();
    let binary = CloudEventsBinaryFormat::new();
    for format in [&structured as &dyn Format, &binary] {
        let test = TestBus::new();
        let (consumer, calls) = billing(&test).await;
        calls.break_order(1);
        let old = amount(1, 5);
        let data = serde_json::to_vec(&old).expect("JSON");
        let media_type = "application/vnd.shop.order+json";
        let written = format.write(&envelope(), media_type, &data);
        let (headers, payload) = written.expect("it is written");
        let message = Message::new(OrderCreated::TOPIC, payload).with_key("1");
        let messages = vec![message.with_headers(headers)];
        test.broker().publish(messages).await.expect("it is taken");
        test.run_out().await;
        let desk = consumer.dead_letters();
        let letter = desk.list().await.expect("it is stored").remove(0);
        let edit = Edit::new().data(r#"{"order":2,"amount":7}"#);
        let new = desk.edit(&letter.id, edit).await.expect("it is edited");
        test.settled().await;
        assert_eq!(calls.amounts(2), [7]);

        let edited = records(test.bus())
            .await
            .pop()
            .expect("it is on the topic")
            .message;
        let envelope = test.bus().envelope(&edited).expect("it is read");
        assert_eq!(envelope.id, new);
        let (said, id) = match format.name() {
            "cloudevents" => {
                let body: Value = serde_json::from_slice(&edited.payload).expect("JSON");
                assert_eq!(body["data"], json!({"order": 2, "amount": 7}));
                (body["datacontenttype"].clone(), body["id"].clone())
            }
            _ => {
                let said = |name| Value::from(edited.headers.get_str(name));
                (said("content-type"), said("ce_id"))
            }
        };
        assert_eq!((said, id), (media_type.into(), new.to_string().into()));
    }
}

#[tokio::test]
async fn a_topic_has_its_format_and_the_bus_another() {
    let broker = MemoryBroker::new();
    let bus = EventBus::builder(broker)
        .source("shop")
        .format(CloudEventsFormat::new())
        .topic_format(
            crate::fixtures::OrderPaid::TOPIC,
            CloudEventsBinaryFormat::new(),
        )
        .build();
    bus.publish(amount(1, 5)).await.expect("it is taken");
    bus.publish(crate::fixtures::paid(1))
        .await
        .expect("it is taken");
    let topics = [OrderCreated::TOPIC, crate::fixtures::OrderPaid::TOPIC];
    let reader = bus.read(&topics, Start::Earliest, Some(Until::Now)).await;
    let mut reader = reader.expect("it reads");
    let mut formats = Vec::new();
    while let Some(record) = reader.next().await.expect("it reads on") {
        let message = record.message;
        let format = message.headers.get_str("eb-format").map(str::to_owned);
        formats.push((message.topic.to_string(), format.expect("it says so")));
    }
    formats.sort();
    let expected = [
        ("orders", "cloudevents"),
        ("payments", "cloudevents-binary"),
    ];
    assert_eq!(
        formats,
        expected.map(|(topic, format)| (topic.to_owned(), format.to_owned()))
    );
}
