//! An ingress whose topic refuses messages, or is slow to take them.

use std::time::Duration;

use eventbus_core::{Subscription, Topic};
use eventbus_rabbitmq::{RabbitMqBroker, RabbitMqIngress, RabbitMqIngressStatus};
use eventbus_testkit::{Probe, text_of, within};
use lapin::BasicProperties;
use lapin::options::{BasicGetOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};

use crate::server::{Server, create, group};
use crate::shop::{Kind, Shop, order};
use crate::slow::{Slow, bind};

const MINUTE: Duration = Duration::from_secs(60);

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

async fn until(ingress: &RabbitMqIngress, is_so: impl Fn(&RabbitMqIngressStatus) -> bool) {
    while !is_so(&ingress.status()) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn probe(broker: &RabbitMqBroker, topic: &Topic) -> Probe {
    create(broker, topic, 1).await;
    let subscription = Subscription::group(group("billing"), vec![topic.clone()]);
    let mut probe = Probe::join(broker, subscription).await.expect("it joins");
    probe.hold(1).await;
    probe
}

/// A queue may take the second message of a key where it did not take the first.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_refused_is_not_overtaken_by_what_follows_it() {
    const MESSAGES: usize = 100;
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Durable).await;
    let broker = server.connect().await.expect("it answers");
    create(&broker, &shop.topic(), 1).await;
    // It takes two messages at once, and refuses others.
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(2));
    arguments.insert("x-overflow".into(), text("reject-publish"));
    let narrow = bind(&shop.channel, &shop.topic(), arguments).await;
    let body = |number| format!(r#"{{"order_id": 7, "number": {number}}}"#);
    within(MINUTE, async {
        for number in 0..MESSAGES {
            // All of one key.
            shop.publish(body(number)).await;
        }
        let ingress = broker.ingress(shop.adopted(), shop.topic());
        let ingress = ingress.spawn().await.expect("it starts");
        let mut bodies: Vec<String> = Vec::new();
        while bodies.len() < MESSAGES {
            if let Some(body) = shop.get(&narrow).await {
                bodies.push(String::from_utf8(body).expect("a text"));
            }
        }
        assert_eq!(bodies, (0..MESSAGES).map(body).collect::<Vec<_>>());
        ingress.shutdown().await.expect("it ends");
    })
    .await;
    assert!(shop.is_empty().await);
}

/// A shop's queue may drop a message that it has taken back a few times.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_a_topic_is_slow_to_take_is_not_given_back_to_the_queue() {
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Limited).await;
    let config = Server::config().with_publish_timeout(Duration::from_millis(500));
    let broker = RabbitMqBroker::connect(config).await.expect("it answers");
    within(MINUTE, async {
        let mut probe = probe(&broker, &shop.topic()).await;
        let slow = Slow::bind(&server, &shop.channel, &shop.topic()).await;
        slow.stand_still().await;
        let ingress = broker.ingress(shop.adopted(), shop.topic());
        let ingress = ingress.spawn().await.expect("it starts");
        shop.order(1).await;
        // Published again and again, which its group sees.
        for _ in 0..5 {
            let deliveries = probe.collect(1).await;
            assert_eq!(text_of(&deliveries[0]), order(1));
            probe.settle(&deliveries).await;
        }
        let error = ingress.status().error.expect("it waits");
        assert!(error.contains("not confirmed"), "{error}");
        slow.go_on().await;
        until(&ingress, |status| {
            status.moved == 1 && status.error.is_none()
        })
        .await;
        shop.order(2).await;
        until(&ingress, |status| status.moved == 2).await;
        ingress.shutdown().await.expect("it ends");
    })
    .await;
    assert!(shop.is_empty().await);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_being_moved_when_it_is_told_to_end_is_finished() {
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Durable).await;
    let broker = server.connect().await.expect("it answers");
    within(MINUTE, async {
        let mut probe = probe(&broker, &shop.topic()).await;
        let slow = Slow::bind(&server, &shop.channel, &shop.topic()).await;
        slow.stand_still().await;
        let ingress = broker.ingress(shop.adopted(), shop.topic());
        let ingress = ingress.spawn().await.expect("it starts");
        shop.order(1).await;
        let deliveries = probe.collect(1).await;
        let ends = tokio::spawn(ingress.shutdown());
        slow.go_on().await;
        ends.await.expect("it runs").expect("it ends");
        probe.settle(&deliveries).await;
    })
    .await;
    assert!(shop.is_empty().await, "it was acknowledged");
}

/// A topic may have been created anew with fewer partitions.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn messages_go_to_the_partitions_that_there_are() {
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Durable).await;
    let broker = server.connect().await.expect("it answers");
    create(&broker, &shop.topic(), 16).await;
    within(MINUTE, async {
        let ingress = broker.ingress(shop.adopted(), shop.topic());
        let ingress = ingress.spawn().await.expect("it starts");
        until(&ingress, |status| status.is_active).await;
        let name = format!("{}:partitions", shop.topic());
        let options = QueueDeleteOptions::default();
        let deleted = shop.channel.queue_delete(name.as_str().into(), options);
        deleted.await.expect("it is deleted");
        let another = server.connect().await.expect("it answers");
        let mut probe = probe(&another, &shop.topic()).await;
        for number in 0..20 {
            shop.order(number).await;
        }
        let deliveries = probe.collect(20).await;
        probe.settle(&deliveries).await;
        ingress.shutdown().await.expect("it ends");
    })
    .await;
    assert!(shop.is_empty().await);
}

/// What a message says to the server is not said again where it is only kept.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_put_aside_does_not_expire_and_goes_nowhere_else() {
    let server = Server::new().await;
    let shop = Shop::new(&server, Kind::Durable).await;
    let copies = Shop::new(&server, Kind::Durable).await;
    let config = Server::config().with_message_bytes_max(64 * 1024);
    let broker = RabbitMqBroker::connect(config).await.expect("it answers");
    create(&broker, &shop.topic(), 1).await;
    let mut headers = FieldTable::default();
    let mut others = lapin::types::FieldArray::default();
    others.push(text(&copies.queue));
    headers.insert("CC".into(), AMQPValue::FieldArray(others));
    let properties = BasicProperties::default()
        .with_headers(headers)
        .with_expiration("60000".into())
        .with_user_id("eventbus".into());
    shop.publish_with(vec![b'x'; 100_000], properties).await;
    within(MINUTE, async {
        let ingress = broker.ingress(shop.adopted(), shop.topic());
        let ingress = ingress.spawn().await.expect("it starts");
        until(&ingress, |status| status.refused == 1).await;
        ingress.shutdown().await.expect("it ends");
        let refused = format!("{}:refused", shop.queue);
        let got = shop
            .channel
            .basic_get(refused.as_str().into(), BasicGetOptions::default());
        let kept = got.await.expect("it answers").expect("it is there");
        let properties = &kept.delivery.properties;
        assert_eq!(properties.expiration(), &None);
        assert_eq!(properties.user_id(), &None);
        let headers = properties.headers().as_ref().expect("it has some");
        assert_eq!(headers.inner().get("eb-expiration"), Some(&text("60000")));
        assert_eq!(headers.inner().get("eb-user-id"), Some(&text("eventbus")));
        // What the shop itself has sent there, once.
        assert!(copies.get(&copies.queue).await.is_some());
        assert!(copies.get(&copies.queue).await.is_none());
    })
    .await;
}
