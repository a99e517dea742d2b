//! An ingress: what a shop publishes to its queue, every group gets, once.

use std::collections::HashMap;
use std::time::Duration;

use eventbus_core::{
    Delivery, DuplicateWindow, ErrorKind, Event, Key, Limits, RetryPolicy, Subscription, header,
};
use eventbus_rabbitmq::{RabbitMqBroker, RabbitMqIngress};
use eventbus_testkit::{Probe, text_of, within};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use tokio::sync::mpsc::unbounded_channel;

use crate::child::move_and_die;
use crate::letters::OrderPlaced;
use crate::server::{Server, create, group};
use crate::shop::{Kind, Shop, order, tell};

const MINUTE: Duration = Duration::from_secs(60);

async fn probe(broker: &RabbitMqBroker, shop: &Shop) -> Probe {
    create(broker, &shop.topic(), 2).await;
    let subscription = Subscription::group(group("billing"), vec![shop.topic()]);
    let mut probe = Probe::join(broker, subscription).await.expect("it joins");
    probe.hold(2).await;
    probe
}

async fn ingress(broker: &RabbitMqBroker, shop: &Shop) -> RabbitMqIngress {
    let ingress = broker.ingress(shop.adopted(), shop.topic());
    ingress.spawn().await.expect("it starts")
}

/// Waits until an ingress is so.
async fn until(
    ingress: &RabbitMqIngress,
    is_so: impl Fn(&eventbus_rabbitmq::RabbitMqIngressStatus) -> bool,
) {
    while !is_so(&ingress.status()) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn id_of(delivery: &Delivery) -> String {
    let id = delivery.message.headers.get_str(header::ID);
    id.expect("it was given one").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn every_group_gets_what_a_shop_publishes_to_its_queue() {
    let server = Server::new().await;
    for kind in [Kind::Durable, Kind::Quorum] {
        let shop = Shop::new(&server, kind).await;
        let broker = server.connect().await.expect("it answers");
        let bus = shop.bus(&broker);
        let mut consumers = Vec::new();
        let mut told = Vec::new();
        for name in ["payment", "inventory"] {
            let (tells, orders) = unbounded_channel();
            let consumer = bus.consumer(group(name).as_str()).state(tells).on(tell);
            consumers.push(consumer.spawn().await.expect("it joins"));
            told.push(orders);
        }
        // One whose consumer starts later.
        let late = group("late");
        let ingress = broker.ingress(shop.adopted(), shop.topic());
        let ingress = ingress.groups(&[late.as_str()]).expect("good names");
        let ingress = ingress.spawn().await.expect("it starts");
        within(MINUTE, async {
            for number in 0..300 {
                shop.order(number).await;
            }
            let (tells, orders) = unbounded_channel();
            let consumer = bus.consumer(late.as_str()).state(tells).on(tell);
            consumers.push(consumer.spawn().await.expect("it joins"));
            told.push(orders);
            let mut ids = HashMap::new();
            for orders in &mut told {
                for _ in 0..300 {
                    let (order_id, id) = orders.recv().await.expect("it runs");
                    // The same everywhere.
                    let known = ids.entry(order_id).or_insert_with(|| id.clone());
                    assert_eq!(*known, id);
                }
            }
            assert_eq!(ids.len(), 300);
            until(&ingress, |status| status.moved == 300).await;
            let status = ingress.status();
            assert!(status.is_active);
            assert_eq!((status.unkeyed, status.refused, status.error), (0, 0, None));
        })
        .await;
        ingress.shutdown().await.expect("it ends");
        bus.close().await.expect("it closes");
        assert!(shop.is_empty().await, "all of it was acknowledged");
    }
}

/// Killed between the confirmation and the acknowledgement, it publishes the same ids again; killed
/// elsewhere, each once. What looks like an earlier message is another one all the same.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_moved_again_after_a_kill_has_the_same_id() {
    let server = Server::new().await;
    let cases = [
        (Kind::Durable, "ingress.publish.before", 1),
        (Kind::Durable, "ingress.publish.after", 2),
        (Kind::Quorum, "ingress.publish.after", 2),
        (Kind::Durable, "ingress.acknowledge.after", 1),
        (Kind::Quorum, "ingress.acknowledge.after", 1),
    ];
    for (kind, step, times) in cases {
        let shop = Shop::new(&server, kind).await;
        let broker = server.connect().await.expect("it answers");
        let mut probe = probe(&broker, &shop).await;
        // Two that look the same.
        for number in [1, 1, 2] {
            shop.order(number).await;
        }
        within(MINUTE, async {
            move_and_die(&shop.queue, &shop.topic(), step, 1).await;
            // Nobody can tell it from the others either.
            shop.order(1).await;
            let ingress = ingress(&broker, &shop).await;
            let deliveries = probe.collect(3 * times + 1).await;
            let mut counts: HashMap<String, usize> = HashMap::new();
            for delivery in &deliveries {
                *counts.entry(id_of(delivery)).or_default() += 1;
                let is_one = text_of(delivery) == order(1);
                let key = if is_one { 1 } else { 2 };
                assert_eq!(delivery.message.key, Some(Key::display(key)));
            }
            let mut counts: Vec<_> = counts.into_values().collect();
            counts.sort_unstable();
            assert_eq!(counts, [1, times, times, times], "{kind:?} {step}");
            probe.settle(&deliveries).await;
            ingress.shutdown().await.expect("it ends");
        })
        .await;
        assert!(shop.is_empty().await, "{kind:?} {step}");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_moved_twice_takes_effect_once() {
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Durable).await;
    let broker = server.connect().await.expect("it answers");
    let bus = shop.bus(&broker);
    let (told, mut orders) = unbounded_channel();
    let name = group("billing").to_string();
    let consumer = bus.consumer(&name).state(told);
    let consumer = consumer.duplicate_window(DuplicateWindow::in_memory());
    let consumer = consumer.on(tell).spawn().await.expect("it joins");
    within(MINUTE, async {
        for number in 0..20 {
            shop.order(number % 10).await;
        }
        move_and_die(&shop.queue, &shop.topic(), "ingress.publish.after", 1).await;
        let ingress = ingress(&broker, &shop).await;
        until(&ingress, |status| status.moved >= 20).await;
        while consumer.status().counts.duplicates < 20 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let mut effects: HashMap<u64, usize> = HashMap::new();
        for _ in 0..20 {
            let (order_id, _) = orders.recv().await.expect("it runs");
            *effects.entry(order_id).or_default() += 1;
        }
        assert!(effects.values().all(|times| *times == 2), "{effects:?}");
        assert!(orders.is_empty());
        ingress.shutdown().await.expect("it ends");
    })
    .await;
    consumer.shutdown().await.expect("it ends");
    bus.close().await.expect("it closes");
}

/// A message may have been in another queue before, whose server has written headers into it.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn headers_that_are_called_like_the_servers_mean_nothing() {
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Quorum).await;
    let broker = server.connect().await.expect("it answers");
    let mut probe = probe(&broker, &shop).await;
    for (name, number) in [("x-stream-offset", 70), ("x-delivery-count", 500)] {
        let mut headers = FieldTable::default();
        headers.insert(name.into(), AMQPValue::LongLongInt(number));
        let properties = BasicProperties::default().with_headers(headers);
        shop.publish_with(order(1), properties).await;
    }
    within(MINUTE, async {
        let ingress = ingress(&broker, &shop).await;
        let deliveries = probe.collect(2).await;
        assert!(deliveries.iter().all(|it| it.position.is_none()));
        assert!(deliveries.iter().all(|it| it.handed_out == Some(1)));
        probe.settle(&deliveries).await;
        ingress.shutdown().await.expect("it ends");
    })
    .await;
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn an_id_that_a_message_has_is_kept() {
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Durable).await;
    let broker = server.connect().await.expect("it answers");
    let mut probe = probe(&broker, &shop).await;
    let named = BasicProperties::default()
        .with_message_id("order-1".into())
        .with_app_id("checkout".into());
    shop.publish_with(order(1), named).await;
    let event = r#"{"specversion":"1.0","id":"7b6d4c3e-0f61-4b87-9d0a-52ad3c5f8a11","source":"checkout",
        "type":"OrderPlaced","data":{"order_id":1}}"#;
    let other = BasicProperties::default().with_message_id("unlike".into());
    shop.publish_with(event, other).await;
    within(MINUTE, async {
        let ingress = ingress(&broker, &shop).await;
        let deliveries = probe.collect(2).await;
        let headers = |wanted: bool| {
            let found = deliveries
                .iter()
                .find(|it| (text_of(it) == event) == wanted);
            &found.expect("both have come").message.headers
        };
        assert_eq!(headers(false).get_str(header::ID), Some("order-1"));
        assert_eq!(headers(false).get_str("amqp-app-id"), Some("checkout"));
        // The body says who it is.
        assert_eq!(headers(true).get_str(header::ID), None);
        assert_eq!(headers(true).get_str("amqp-message-id"), Some("unlike"));
        probe.settle(&deliveries).await;
        until(&ingress, |status| status.moved == 2).await;
        // The key of the second is not where it is declared.
        assert_eq!(ingress.status().unkeyed, 1);
        ingress.shutdown().await.expect("it ends");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_no_topic_takes_and_what_is_no_event_blocks_nothing() {
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Durable).await;
    let config = Server::config().with_message_bytes_max(64 * 1024);
    let broker = RabbitMqBroker::connect(config).await.expect("it answers");
    let bus = shop.bus(&broker);
    let (told, mut orders) = unbounded_channel();
    let name = group("billing").to_string();
    let consumer = bus.consumer(&name).state(told).retry(RetryPolicy::none());
    let consumer = consumer.on(tell).spawn().await.expect("it joins");
    let large = vec![b'x'; 100_000];
    shop.publish("no json").await;
    shop.publish(&large).await;
    shop.order(7).await;
    within(MINUTE, async {
        let ingress = ingress(&broker, &shop).await;
        assert_eq!(orders.recv().await.expect("it runs").0, 7);
        until(&ingress, |status| status.moved == 2 && status.refused == 1).await;
        assert_eq!(ingress.status().unkeyed, 1);
        // As it came, in a queue that an operator finds by its name.
        let refused = format!("{}:refused", shop.queue);
        assert_eq!(shop.get(&refused).await, Some(large));
        let desk = bus.dead_letters(&name, &[OrderPlaced::TOPIC]);
        let desk = desk.expect("it has a desk");
        let letters = loop {
            let letters = desk.list().await.expect("they can be read");
            if !letters.is_empty() {
                break letters;
            }
        };
        assert_eq!(letters[0].message.payload.as_ref(), b"no json");
        ingress.shutdown().await.expect("it ends");
    })
    .await;
    consumer.shutdown().await.expect("it ends");
    bus.close().await.expect("it closes");
    assert!(shop.is_empty().await);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_an_ingress_cannot_honour_is_said_when_it_starts() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let cases = [
        (None, ErrorKind::NotFound, "not ours to create"),
        (
            Some(Kind::Transient),
            ErrorKind::Unsupported,
            "say `volatile`",
        ),
        (
            Some(Kind::AutoDelete),
            ErrorKind::Unsupported,
            "without auto-delete",
        ),
        (Some(Kind::Stream), ErrorKind::Unsupported, "is a stream"),
    ];
    for (kind, expected, text) in cases {
        let shop = Shop::without_queue(&server).await;
        if let Some(kind) = kind {
            shop.declare(kind).await;
        }
        create(&broker, &shop.topic(), 1).await;
        let refused = broker.ingress(shop.adopted(), shop.topic()).spawn().await;
        let error = refused.expect_err("it cannot be honoured");
        assert_eq!(error.kind(), expected, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
    // A queue that a group reads is no queue for an ingress, and the other way round.
    let shop = Shop::new(&server, Kind::Durable).await;
    let other = server.connect().await.expect("it answers");
    let moves = ingress(&other, &shop).await;
    let reads = shop.broker_of(shop.adopted()).await;
    let subscription = Subscription::group(group("billing"), vec![shop.topic()]);
    let error = Probe::join(&reads, subscription).await;
    let error = error.expect_err("it would take what all are to get");
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(error.to_string().contains("read by"), "{error}");
    moves.shutdown().await.expect("it ends");
}

/// What it meets only when it runs.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_it_waits_for_is_in_its_status() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    within(MINUTE, async {
        // No group is there yet.
        let shop = Shop::new(&server, Kind::Transient).await;
        create(&broker, &shop.topic(), 2).await;
        shop.order(1).await;
        let waits = broker.ingress(shop.adopted().volatile(), shop.topic());
        let waits = waits.spawn().await.expect("it starts");
        let says = |text: &'static str| {
            move |status: &eventbus_rabbitmq::RabbitMqIngressStatus| {
                status.error.as_ref().is_some_and(|it| it.contains(text))
            }
        };
        until(&waits, says("no group is bound")).await;
        let mut probe = probe(&broker, &shop).await;
        let deliveries = probe.collect(1).await;
        probe.settle(&deliveries).await;
        until(&waits, |status| status.moved == 1 && status.error.is_none()).await;
        // The queue goes, and comes back.
        let options = lapin::options::QueueDeleteOptions::default();
        let deleted = shop
            .channel
            .queue_delete(shop.queue.as_str().into(), options);
        deleted.await.expect("it is deleted");
        until(&waits, says("no such queue")).await;
        shop.declare(Kind::Transient).await;
        shop.order(2).await;
        let deliveries = probe.collect(1).await;
        probe.settle(&deliveries).await;
        waits.shutdown().await.expect("it ends");
    })
    .await;
}

/// How an ingress ends whose place another one takes.
#[derive(Clone, Copy)]
enum End {
    Dropped,
    /// With its process.
    Killed,
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn another_one_takes_the_place_of_an_ingress_that_is_dropped() {
    take_the_place_of_one_that_is(End::Dropped).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn another_one_takes_the_place_of_an_ingress_that_is_killed() {
    take_the_place_of_one_that_is(End::Killed).await;
}

/// Of several processes one moves messages; the next one goes on where it ended, in order. It ends in the
/// middle of its work, while others wait for its place and the shop goes on.
async fn take_the_place_of_one_that_is(end: End) {
    const ORDERS: u64 = 600;
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Durable).await;
    let broker = server.connect().await.expect("it answers");
    create(&broker, &shop.topic(), 1).await;
    let limits = Limits::default().with_lane_messages(1000);
    let subscription = Subscription::group(group("billing"), vec![shop.topic()]);
    let subscription = subscription.with_limits(limits);
    let mut probe = Probe::join(&broker, subscription).await.expect("it joins");
    within(MINUTE, async {
        probe.hold(1).await;
        let first = async {
            match end {
                End::Dropped => {
                    let first = ingress(&broker, &shop).await;
                    until(&first, |status| status.moved > 100).await;
                    drop(first);
                }
                End::Killed => {
                    // The first order alone, and two batches cannot be all of the others.
                    let step = "ingress.publish.before";
                    move_and_die(&shop.queue, &shop.topic(), step, 3).await;
                }
            }
        };
        let others = async {
            shop.order(0).await;
            // The first one moves it.
            let moved = probe.collect(1).await;
            let others = [ingress(&broker, &shop).await, ingress(&broker, &shop).await];
            assert!(others.iter().all(|it| !it.status().is_active));
            for number in 1..ORDERS {
                shop.order(number).await;
            }
            (others, moved)
        };
        let ((), (others, mut deliveries)) = tokio::join!(first, others);
        let mut next = 0;
        loop {
            for delivery in &deliveries {
                let key = delivery.message.key.as_ref().expect("it has a key");
                let number = String::from_utf8_lossy(key.as_bytes()).parse();
                let number: u64 = number.expect("a number");
                // In order, apart from what was moved twice.
                assert!(number <= next, "{number} before {next}");
                next = next.max(number + 1);
            }
            probe.settle(&deliveries).await;
            if next == ORDERS {
                break;
            }
            deliveries = probe.collect(1).await;
        }
        let others_moved = || others.iter().map(|it| it.status().moved).sum::<u64>();
        // What was seen may be counted a moment later.
        while others_moved() == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(others.iter().any(|it| it.status().is_active));
        for it in others {
            it.shutdown().await.expect("it ends");
        }
    })
    .await;
    assert!(shop.is_empty().await);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn an_ingress_ends_with_its_broker_and_says_who_else_takes_messages() {
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Durable).await;
    let broker = server.connect().await.expect("it answers");
    create(&broker, &shop.topic(), 1).await;
    let options = lapin::options::BasicConsumeOptions::default();
    let none = lapin::types::FieldTable::default();
    let name = shop.queue.as_str().into();
    let taking = shop.channel.basic_consume(name, "".into(), options, none);
    let _taking = taking.await.expect("it consumes");
    within(MINUTE, async {
        let moves = ingress(&broker, &shop).await;
        until(&moves, |status| status.competitors == 1).await;
        eventbus_core::Broker::close(&broker)
            .await
            .expect("it closes");
        moves
            .run_until(std::future::pending())
            .await
            .expect("it has ended");
        let refused = broker.ingress(shop.adopted(), shop.topic()).spawn().await;
        let error = refused.expect_err("it was closed");
        assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    })
    .await;
}
