//! Queues of somebody else that a group reads as they are.

use std::time::Duration;

use eventbus_core::{
    ErrorKind, Event, Message, Publisher, Redrive, RetryPolicy, Subscriber, Subscription,
};
use eventbus_testkit::{Probe, text_of, within};
use lapin::BasicProperties;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions};
use lapin::types::{AMQPValue, FieldTable};
use tokio::sync::mpsc::unbounded_channel;

use crate::letters::OrderPlaced;
use crate::server::{Server, create, group, topic};
use crate::shop::{Kind, Shop, order, tell};

const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_group_reads_the_queue_of_a_shop_as_it_is() {
    let server = Server::new().await;
    for kind in [Kind::Durable, Kind::Quorum] {
        let shop = Shop::new(&server, kind).await;
        let broker = shop.broker_of(shop.adopted()).await;
        let bus = shop.bus(&broker);
        let (told, mut orders) = unbounded_channel();
        shop.order(1).await;
        let name = group("billing").to_string();
        let consumer = bus.consumer(&name).state(told).on(tell).spawn().await;
        let consumer = consumer.expect("it joins");
        within(MINUTE, async {
            assert_eq!(orders.recv().await.expect("it runs").0, 1);
            let named = BasicProperties::default().with_message_id("order-2".into());
            shop.publish_with(order(2), named).await;
            let (order_id, id) = orders.recv().await.expect("it runs");
            assert_eq!((order_id, id.as_str()), (2, "order-2"));
            // What is published to the topic goes to the queue.
            bus.publish(OrderPlaced { order_id: 3 })
                .await
                .expect("it is taken");
            assert_eq!(orders.recv().await.expect("it runs").0, 3);
        })
        .await;
        consumer.shutdown().await.expect("it ends");
        bus.close().await.expect("it closes");
        assert!(shop.is_empty().await, "all of it was acknowledged");
    }
}

/// The next one gets what was not settled, members share the queue, and no second group is let in.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_has_no_verdict_stays_in_the_queue() {
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Durable).await;
    let broker = shop.broker_of(shop.adopted()).await;
    let billing = group("billing");
    let subscription = Subscription::group(billing.clone(), vec![shop.topic()]);
    // The field is the key, whatever the headers say, as for an ingress.
    let mut headers = FieldTable::default();
    headers.insert("eb-key".into(), AMQPValue::LongString("other".into()));
    let keyed = BasicProperties::default().with_headers(headers);
    for number in 0..4 {
        shop.publish_with(order(number), keyed.clone()).await;
    }
    within(MINUTE, async {
        let mut probe = Probe::join(&broker, subscription.clone())
            .await
            .expect("it joins");
        let deliveries = probe.collect(4).await;
        assert_eq!(
            deliveries[2].message.key,
            Some(eventbus_core::Key::display(2))
        );
        assert_eq!(
            deliveries[0].handed_out, None,
            "a classic queue does not count"
        );
        probe.settle(&deliveries[..2]).await;
        probe.crash();
        let mut next = Probe::join(&broker, subscription.clone())
            .await
            .expect("it joins");
        let texts: Vec<_> = next.collect(2).await.iter().map(text_of).collect();
        assert_eq!(texts, [order(2), order(3)]);
        // Two members read at the same time.
        let mut other = Probe::join(&broker, subscription).await.expect("it joins");
        other.hold(1).await;
        next.close().await;
        let deliveries = other.collect(2).await;
        other.settle(&deliveries).await;
        let second = Subscription::group(group("shipping"), vec![shop.topic()]);
        let error = broker.subscribe(second).await;
        let error = error.expect_err("it would get a part of the messages only");
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        let text = error.to_string();
        assert!(text.contains(billing.as_str()), "{text}");
        assert!(text.contains("an ingress"), "{text}");
        other.close().await;
    })
    .await;
    assert!(shop.is_empty().await);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_body_that_is_no_event_is_a_dead_letter_and_others_go_on() {
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Durable).await;
    let broker = shop.broker_of(shop.adopted()).await;
    let bus = shop.bus(&broker);
    let (told, mut orders) = unbounded_channel();
    let name = group("billing").to_string();
    let consumer = bus.consumer(&name).state(told).retry(RetryPolicy::none());
    let consumer = consumer.on(tell).spawn().await.expect("it joins");
    let odd = BasicProperties::default().with_content_type("text/plain".into());
    shop.publish_with("no json \u{0}", odd).await;
    shop.order(7).await;
    within(MINUTE, async {
        assert_eq!(orders.recv().await.expect("it runs").0, 7);
        let desk = bus.dead_letters(&name, &[OrderPlaced::TOPIC]);
        let desk = desk.expect("it has a desk");
        let letters = loop {
            let letters = desk.list().await.expect("they can be read");
            if !letters.is_empty() {
                break letters;
            }
        };
        assert_eq!(letters.len(), 1);
        assert_eq!(letters[0].message.payload.as_ref(), b"no json \0");
        assert_eq!(letters[0].cause, "undecodable");
        let headers = &letters[0].message.headers;
        assert_eq!(headers.get_str("content-type"), Some("text/plain"));
        while consumer.status().counts.dead_lettered < 1 {
            tokio::task::yield_now().await;
        }
        // Given again it goes through the queue, and becomes a letter once more.
        let report = desk.redrive(Redrive::all().by("ann").because("a test"));
        assert_eq!(report.await.expect("it is given again").done, 1);
        while consumer.status().counts.dead_lettered < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    consumer.shutdown().await.expect("it ends");
    bus.close().await.expect("it closes");
    assert!(shop.is_empty().await);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_queue_that_can_lose_messages_needs_a_word() {
    let server = Server::new().await;
    let cases = [
        (Kind::Transient, "say `volatile`"),
        (Kind::AutoDelete, "without auto-delete"),
        (Kind::Stream, "is a stream"),
    ];
    for (kind, text) in cases {
        let shop = Shop::new(&server, kind).await;
        let broker = shop.broker_of(shop.adopted()).await;
        let subscription = Subscription::group(group("billing"), vec![shop.topic()]);
        let error = broker.subscribe(subscription.clone()).await;
        let error = error.expect_err("it may lose messages");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains(text), "{error}");
        let broker = shop.broker_of(shop.adopted().volatile()).await;
        if kind != Kind::Transient {
            let error = broker.subscribe(subscription).await;
            error.expect_err("that it may be lost is another question");
            continue;
        }
        shop.order(1).await;
        let mut probe = Probe::join(&broker, subscription).await.expect("it joins");
        let deliveries = within(MINUTE, probe.collect(1)).await;
        probe.settle(&deliveries).await;
        probe.close().await;
        assert!(shop.is_empty().await);
    }
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_queue_that_is_not_there_is_not_created() {
    let server = Server::new().await;
    let shop = Shop::without_queue(&server).await;
    let broker = shop.broker_of(shop.adopted()).await;
    let subscription = Subscription::group(group("billing"), vec![shop.topic()]);
    let error = broker.subscribe(subscription).await;
    let error = error.expect_err("there is no such queue");
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(error.to_string().contains("not ours to create"), "{error}");
    let message = Message::new(shop.topic(), "x");
    let error = broker.publish(vec![message]).await;
    let error = error.expect_err("there is no such queue");
    let refused = &error.unpublished[0];
    assert_eq!(refused.error.kind(), ErrorKind::NotFound);
    assert!(refused.error.to_string().contains("is not there"));
    shop.declare(Kind::Durable).await;
    assert!(shop.is_empty().await, "nobody has created it");
}

/// A queue that goes while it is read is waited for.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_queue_that_goes_is_waited_for() {
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Durable).await;
    let broker = shop.broker_of(shop.adopted()).await;
    let subscription = Subscription::group(group("billing"), vec![shop.topic()]);
    within(MINUTE, async {
        let mut probe = Probe::join(&broker, subscription).await.expect("it joins");
        probe.hold(1).await;
        let before = probe.lane(&shop.topic(), 0);
        let options = lapin::options::QueueDeleteOptions::default();
        let deleted = shop
            .channel
            .queue_delete(shop.queue.as_str().into(), options);
        deleted.await.expect("it is deleted");
        let error = loop {
            match probe.step().await {
                Ok(()) => {}
                Err(error) => break error,
            }
        };
        assert!(error.is_retryable(), "{error}");
        assert!(error.to_string().contains("no such queue"), "{error}");
        assert!(probe.lost().contains(&before));
        shop.declare(Kind::Durable).await;
        shop.order(1).await;
        let delivery = loop {
            match probe.step().await {
                Ok(()) if probe.waiting() > 0 => break probe.collect(1).await.remove(0),
                Ok(()) => {}
                Err(error) => assert!(error.is_retryable(), "{error}"),
            }
        };
        probe.settle([&delivery]).await;
    })
    .await;
}

/// A queue that cannot be read keeps a member from nothing else that it reads.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_queue_that_is_held_alone_is_waited_for_beside_everything_else() {
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Durable).await;
    let broker = shop.broker_of(shop.adopted()).await;
    let orders = topic("orders");
    create(&broker, &orders, 2).await;
    let alone = BasicConsumeOptions {
        exclusive: true,
        ..BasicConsumeOptions::default()
    };
    let name = shop.queue.as_str().into();
    let held = shop
        .channel
        .basic_consume(name, "".into(), alone, FieldTable::default());
    let held = held.await.expect("it consumes");
    let topics = vec![shop.topic(), orders.clone()];
    let subscription = Subscription::group(group("billing"), topics);
    let mut probe = Probe::join(&broker, subscription).await.expect("it joins");
    within(MINUTE, async {
        let error = loop {
            match probe.step().await {
                Ok(()) => {}
                Err(error) => break error,
            }
        };
        assert!(error.is_retryable(), "{error}");
        assert!(error.to_string().contains("exclusive"), "{error}");
        probe.hold(2).await;
        // It is tried again and again meanwhile.
        for number in 0..10 {
            let message = Message::new(orders.clone(), number.to_string());
            broker.publish(vec![message]).await.expect("it is taken");
            let deliveries = probe.collect(1).await;
            probe.settle(&deliveries).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert_eq!(probe.lost(), []);
        let cancelled = shop
            .channel
            .basic_cancel(held.tag(), BasicCancelOptions::default());
        cancelled.await.expect("it is cancelled");
        probe.hold(3).await;
        shop.order(1).await;
        let deliveries = probe.collect(1).await;
        probe.settle(&deliveries).await;
        assert_eq!(probe.lost(), []);
    })
    .await;
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn nobody_reads_a_queue_of_somebody_else_without_a_group() {
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Durable).await;
    let broker = shop.broker_of(shop.adopted()).await;
    let reader = Subscription::reader(vec![shop.topic()]);
    let error = broker.subscribe(reader).await;
    let error = error.expect_err("it would take messages");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let other = topic("other");
    assert!(
        broker
            .subscribe(Subscription::group(group("g"), vec![other]))
            .await
            .is_ok()
    );
}
