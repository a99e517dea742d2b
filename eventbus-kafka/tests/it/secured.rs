//! Encrypted connections.

use std::time::{Duration, Instant};

use eventbus_core::{
    AdminRequest, Broker as _, ErrorKind, Group, Key, Message, Publisher as _, Subscription, Topic,
    TopicSpec,
};
use eventbus_kafka::KafkaBroker;
use eventbus_testkit::{Probe, within};

use crate::server::Server;

const MINUTE: Duration = Duration::from_secs(60);

fn named(kind: &str) -> String {
    format!("{kind}-{:016x}", fastrand::u64(..))
}

/// Publishes, joins a group, reads and settles, asks how far it is.
async fn there_and_back(broker: &KafkaBroker) {
    let topic = Topic::new(&named("secured")).expect("a good name");
    let group = Group::new(&named("secured")).expect("a good name");
    let spec = TopicSpec::new(topic.clone()).with_partitions(1);
    let made = broker.admin(AdminRequest::ApplyTopics(vec![spec])).await;
    made.expect("it is made");
    let message = Message::new(topic.clone(), "a").with_key(Key::from("k"));
    broker.publish(vec![message]).await.expect("it is taken");
    let subscription = Subscription::group(group.clone(), vec![topic.clone()]);
    let mut probe = Probe::join(broker, subscription).await.expect("it joins");
    assert_eq!(probe.collect_texts(1).await, ["a"]);
    let topics = vec![topic];
    let lag = broker.admin(AdminRequest::Lag { group, topics }).await;
    lag.expect("it is known");
    probe.close().await;
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn encrypted_connections_take_a_password_by_either_means() {
    let _server = Server::new().await;
    for mechanism in ["PLAIN", "SCRAM-SHA-256"] {
        let url = format!("{}&sasl.mechanism={mechanism}", Server::tls_url());
        let broker = KafkaBroker::from_url(&url).await.expect(mechanism);
        within(MINUTE, there_and_back(&broker)).await;
    }
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_certificate_that_nobody_vouches_for_is_refused() {
    let _server = Server::new().await;
    let url = Server::tls_url();
    let (url, _authority) = url.split_once("&ssl.ca.location").expect("it names it");
    let begun = Instant::now();
    let error = KafkaBroker::from_url(url).await.expect_err("it is unknown");
    assert!(begun.elapsed() < Duration::from_secs(10), "{error}");
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    assert!(error.to_string().contains("ssl.ca.location"), "{error}");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_broker_that_asks_again_who_one_is_hears_it() {
    // What dev/brokers sets as `connections.max.reauth.ms`: later the broker ends the connection (KIP-368).
    const ASKED_EVERY: Duration = Duration::from_secs(10);
    let _server = Server::new().await;
    let broker = KafkaBroker::from_url(&Server::tls_url()).await;
    let broker = broker.expect("it is let in");
    let begun = Instant::now();
    while begun.elapsed() < ASKED_EVERY + ASKED_EVERY / 2 {
        within(MINUTE, there_and_back(&broker)).await;
    }
}
