//! What operators and other programs do to queues and connections under a consumer.

use std::time::Duration;

use eventbus_core::{ErrorKind, Message, Publisher, Subscription};
use eventbus_rabbitmq::RabbitMqBroker;
use eventbus_testkit::{Probe, within};
use lapin::options::{
    BasicPublishOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, ExchangeKind};

use crate::server::{Server, create, group, topic};
use crate::slow::Slow;

const MINUTE: Duration = Duration::from_secs(60);

/// A server that closes the channel cancels the consumer as well.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_queue_that_is_deleted_is_a_lane_that_is_lost_and_comes_back() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let (orders, billing) = (topic("orders"), group("billing"));
    create(&broker, &orders, 2).await;
    let subscription = Subscription::group(billing.clone(), vec![orders.clone()]);
    let mut probe = Probe::join(&broker, subscription).await.expect("it joins");
    within(MINUTE, async {
        probe.hold(2).await;
        let before = probe.lane(&orders, 1);
        let raw = server.raw().await;
        let channel = raw.create_channel().await.expect("there is one");
        let name = format!("{orders}:{billing}:1").as_str().into();
        let deleted = channel.queue_delete(name, QueueDeleteOptions::default());
        deleted.await.expect("it is deleted");
        probe
            .hear_until(|probe| probe.lost().contains(&before))
            .await;
        probe.hold(2).await;
        let after = probe.lane(&orders, 1);
        assert!(after.epoch > before.epoch || after.id != before.id);
        // Whatever partition a message is on, it arrives.
        let messages = (0..20).map(|key| {
            Message::new(orders.clone(), "x").with_key(eventbus_core::Key::display(key))
        });
        broker
            .publish(messages.collect())
            .await
            .expect("it is taken");
        let deliveries = probe.collect(20).await;
        probe.settle(&deliveries).await;
    })
    .await;
}

/// What another client of RabbitMQ publishes is read, its headers as text.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn messages_of_others_are_read() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let orders = topic("orders");
    create(&broker, &orders, 1).await;
    let subscription = Subscription::group(group("billing"), vec![orders.clone()]);
    let mut probe = Probe::join(&broker, subscription).await.expect("it joins");
    let (_raw, channel) = server.confirming().await;
    let mut headers = FieldTable::default();
    headers.insert("tenant".into(), AMQPValue::LongString("acme".into()));
    headers.insert("attempt".into(), AMQPValue::LongInt(3));
    headers.insert("eb-key".into(), AMQPValue::LongString("k".into()));
    let published = channel.basic_publish(
        orders.as_str().into(),
        "0".into(),
        BasicPublishOptions::default(),
        br#"{"event_type":"Paid"}"#,
        BasicProperties::default()
            .with_content_type("application/json".into())
            .with_headers(headers),
    );
    published
        .await
        .expect("it is sent")
        .await
        .expect("it is taken");
    within(MINUTE, async {
        let delivery = probe.collect(1).await.remove(0);
        assert_eq!(delivery.message.key, Some(eventbus_core::Key::from("k")));
        let headers = &delivery.message.headers;
        for (name, value) in [
            ("tenant", "acme"),
            ("attempt", "3"),
            ("content-type", "application/json"),
        ] {
            assert_eq!(headers.get_str(name), Some(value), "{name}");
        }
        assert_eq!(delivery.handed_out, Some(1));
        probe.settle([&delivery]).await;
    })
    .await;
}

/// What a stream says of a message means nothing in a queue, whoever has written it.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn headers_that_are_called_like_the_servers_skip_nothing() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let orders = topic("orders");
    create(&broker, &orders, 1).await;
    let subscription = Subscription::group(group("billing"), vec![orders.clone()]);
    let mut probe = Probe::join(&broker, subscription).await.expect("it joins");
    let (_raw, channel) = server.confirming().await;
    for (body, offset) in [("high", 70), ("low", 3)] {
        let mut headers = FieldTable::default();
        headers.insert("x-stream-offset".into(), AMQPValue::LongLongInt(offset));
        headers.insert("x-delivery-count".into(), AMQPValue::LongLongInt(500));
        headers.insert("eb-mark".into(), AMQPValue::LongString("m".into()));
        let published = channel.basic_publish(
            orders.as_str().into(),
            "0".into(),
            BasicPublishOptions::default(),
            body.as_bytes(),
            BasicProperties::default().with_headers(headers),
        );
        let published = published.await.expect("it is sent");
        published.await.expect("it is taken");
    }
    within(MINUTE, async {
        let deliveries = probe.collect(2).await;
        let texts: Vec<_> = deliveries.iter().map(eventbus_testkit::text_of).collect();
        assert_eq!(texts, ["high", "low"]);
        for delivery in &deliveries {
            assert_eq!((delivery.position, delivery.handed_out), (None, Some(1)));
        }
        probe.settle(&deliveries).await;
    })
    .await;
}

/// A quorum queue without a leader answers nothing.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_queue_that_does_not_answer_keeps_nobody_from_the_others() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let (orders, billing) = (topic("orders"), group("billing"));
    create(&broker, &orders, 2).await;
    let subscription = Subscription::group(billing.clone(), vec![orders.clone()]);
    let first = Probe::join(&broker, subscription.clone()).await;
    first.expect("it joins").close().await;
    let silent = Slow::named(&server, format!("{orders}:{billing}:0"));
    silent.stand_still().await;
    within(MINUTE, async {
        let mut probe = Probe::join(&broker, subscription).await.expect("it joins");
        hold(&mut probe, 1).await;
        assert_eq!(probe.assigned()[0].partition, 1);
        let key = (0..).map(eventbus_core::Key::display);
        let mut key = key.filter(|key| eventbus_core::partition_of(key, 2) == 1);
        let message = Message::new(orders.clone(), "x").with_key(key.next().expect("there is one"));
        broker.publish(vec![message]).await.expect("it is taken");
        while probe.waiting() == 0 {
            step(&mut probe).await;
        }
        let deliveries = probe.collect(1).await;
        probe.settle(&deliveries).await;
        let error = loop {
            if let Err(error) = probe.step().await {
                break error;
            }
        };
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        assert!(error.is_retryable(), "{error}");
        silent.go_on().await;
        hold(&mut probe, 2).await;
        assert_eq!(probe.lost(), []);
    })
    .await;
}

/// The next signal, or what passes.
async fn step(probe: &mut Probe) {
    if let Err(error) = probe.step().await {
        assert!(error.is_retryable(), "{error}");
    }
}

async fn hold(probe: &mut Probe, count: usize) {
    while probe.assigned().len() != count {
        step(probe).await;
    }
}

/// A tool may make an exchange anew, which unbinds whatever was bound to it.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_group_that_was_unbound_is_bound_again() {
    let server = Server::new().await;
    let config = Server::config().with_heartbeat(Duration::from_secs(1));
    let broker = RabbitMqBroker::connect(config).await.expect("it answers");
    let (orders, billing) = (topic("orders"), group("billing"));
    create(&broker, &orders, 2).await;
    let subscription = Subscription::group(billing.clone(), vec![orders.clone()]);
    let mut probe = Probe::join(&broker, subscription).await.expect("it joins");
    probe.hold(2).await;
    let raw = server.raw().await;
    let channel = raw.create_channel().await.expect("there is one");
    let members = format!("{billing}:members");
    let kinds = [
        (orders.as_str(), ExchangeKind::Topic),
        (&members, ExchangeKind::Fanout),
    ];
    for (name, kind) in kinds {
        let deleted = channel.exchange_delete(name.into(), ExchangeDeleteOptions::default());
        deleted.await.expect("it is deleted");
        let durable = ExchangeDeclareOptions {
            durable: true,
            ..ExchangeDeclareOptions::default()
        };
        let none = FieldTable::default();
        let declared = channel.exchange_declare(name.into(), kind, durable, none);
        declared.await.expect("it is created");
    }
    within(MINUTE, async {
        let mut left = vec![Message::new(orders.clone(), "x")];
        while let Err(error) = broker.publish(left).await {
            assert!(error.is_retryable(), "{error}");
            left = error.into_messages();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let deliveries = probe.collect(1).await;
        probe.settle(&deliveries).await;
        assert_eq!(probe.lost(), []);
        // Members hear of each other, too: another one gets its share.
        let subscription = Subscription::group(billing, vec![orders.clone()]);
        let mut other = Probe::join(&broker, subscription).await.expect("it joins");
        tokio::join!(other.hold(1), probe.hold(1));
    })
    .await;
}

/// A topic may get more partitions by being deleted and created anew, under whoever uses it.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn more_partitions_are_seen_by_whoever_runs() {
    let server = Server::new().await;
    let config = Server::config().with_heartbeat(Duration::from_secs(1));
    let broker = RabbitMqBroker::connect(config).await.expect("it answers");
    let orders = topic("orders");
    create(&broker, &orders, 1).await;
    let subscription = Subscription::group(group("billing"), vec![orders.clone()]);
    let mut probe = Probe::join(&broker, subscription).await.expect("it joins");
    probe.hold(1).await;
    let raw = server.raw().await;
    let channel = raw.create_channel().await.expect("there is one");
    let name = format!("{orders}:partitions").as_str().into();
    let deleted = channel.queue_delete(name, QueueDeleteOptions::default());
    deleted.await.expect("it is deleted");
    let another = server.connect().await.expect("it answers");
    create(&another, &orders, 3).await;
    within(MINUTE, async {
        // Keys of all three, until each partition has had one.
        let mut seen = std::collections::BTreeSet::new();
        let mut number = 0;
        while seen.len() < 3 {
            number += 1;
            let key = eventbus_core::Key::display(number);
            let mut left = vec![Message::new(orders.clone(), "x").with_key(key)];
            while let Err(error) = broker.publish(left).await {
                // Of its new partitions the group has no queues yet.
                assert!(error.is_retryable(), "{error}");
                left = error.into_messages();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            let delivery = loop {
                if probe.waiting() > 0 {
                    break probe.collect(1).await.remove(0);
                }
                if let Err(error) = probe.step().await {
                    assert!(error.is_retryable(), "{error}");
                }
            };
            seen.insert((delivery.receipt.lane.id, delivery.receipt.lane.epoch));
            probe.settle([&delivery]).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            if probe.lost().is_empty() {
                seen.clear();
            }
        }
    })
    .await;
}

/// Another process may delete a topic and create it anew with more partitions.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_topic_that_was_created_anew_is_looked_at_again() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let orders = topic("orders");
    create(&broker, &orders, 8).await;
    let subscription = Subscription::group(group("billing"), vec![orders.clone()]);
    let member = Probe::join(&broker, subscription).await.expect("it joins");
    let messages = || {
        let all = (0..20).map(eventbus_core::Key::display);
        all.map(|key| Message::new(orders.clone(), "x").with_key(key))
            .collect::<Vec<_>>()
    };
    broker.publish(messages()).await.expect("it is taken");
    member.close().await;
    let raw = server.raw().await;
    let channel = raw.create_channel().await.expect("there is one");
    let name = format!("{orders}:partitions").as_str().into();
    let deleted = channel.queue_delete(name, QueueDeleteOptions::default());
    deleted.await.expect("it is deleted");
    let name = orders.as_str().into();
    let deleted = channel.exchange_delete(name, lapin::options::ExchangeDeleteOptions::default());
    deleted.await.expect("it is deleted");
    let another = server.connect().await.expect("it answers");
    create(&another, &orders, 2).await;
    let subscription = Subscription::group(group("shipping"), vec![orders.clone()]);
    let mut probe = Probe::join(&another, subscription).await.expect("it joins");
    within(MINUTE, async {
        // Of 8 partitions most are bound to nothing now.
        let error = broker.publish(messages()).await;
        let error = error.expect_err("it does not know yet");
        assert!(error.is_retryable(), "{error}");
        let left = error.into_messages();
        broker.publish(left).await.expect("it knows now");
        let deliveries = probe.collect(20).await;
        probe.settle(&deliveries).await;
    })
    .await;
}
