//! What goes wrong is said within ten seconds, with what to do about it.

use std::time::{Duration, Instant};

use eventbus_core::{
    AdminReply, AdminRequest, Broker, Compression, Error, ErrorKind, Message, Outcome, Publisher,
    Topic, TopicReport, TopicSpec,
};
use eventbus_kafka::{KafkaBroker, KafkaConfig};

use crate::server::Server;

const PATIENCE: Duration = Duration::from_secs(10);

fn topic(name: &str) -> Topic {
    Topic::new(&format!("{name}-{:016x}", fastrand::u64(..))).expect("a good name")
}

async fn refused(url: &str) -> Error {
    let begun = Instant::now();
    let error = KafkaBroker::from_url(url).await.expect_err(url);
    assert!(
        begun.elapsed() < PATIENCE,
        "{error} after {:?}",
        begun.elapsed()
    );
    error
}

#[tokio::test]
async fn a_broker_that_does_not_answer_is_named() {
    let error = refused("kafka://127.0.0.1:1").await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    assert!(
        error.to_string().contains("whether Kafka runs there"),
        "{error}"
    );
}

#[tokio::test]
async fn a_host_that_is_unknown_is_named() {
    let error = refused("kafka://no-such-host.invalid:9092").await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(
        error.to_string().contains("host of the url is unknown"),
        "{error}"
    );
}

#[tokio::test]
async fn an_option_that_does_not_exist_is_named() {
    let error = refused("kafka://127.0.0.1:1?no.such.option=1").await;
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert!(error.to_string().contains("no.such.option"), "{error}");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_wrong_password_is_said_to_be_wrong() {
    let _server = Server::new().await;
    let right = Server::sasl_url();
    KafkaBroker::from_url(&right)
        .await
        .expect("it is the right one");
    let wrong = right.replace(":eventbus@", ":wrong-one@");
    let error = refused(&wrong).await;
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    assert!(error.to_string().contains("credentials"), "{error}");
    assert!(!format!("{error:?}").contains("wrong-one"), "{error:?}");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_missing_topic_is_not_found_where_none_is_to_be_created() {
    let _server = Server::new().await;
    let config = Server::config().with_create_topics(false);
    let broker = KafkaBroker::connect(config).await.expect("it answers");
    let begun = Instant::now();
    let missing = topic("missing");
    let error = broker
        .publish(vec![Message::new(missing.clone(), "x")])
        .await;
    let refused = error
        .expect_err("there is no such topic")
        .unpublished
        .remove(0);
    assert!(begun.elapsed() < PATIENCE);
    assert_eq!(refused.outcome, Outcome::NotTaken);
    assert_eq!(
        refused.error.kind(),
        ErrorKind::NotFound,
        "{}",
        refused.error
    );
    assert!(
        refused.error.to_string().contains("apply_topics"),
        "{}",
        refused.error
    );
    assert_eq!(refused.message.topic, missing);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_differs_from_its_declaration_is_drift() {
    let _server = Server::new().await;
    let broker = KafkaBroker::connect(Server::config())
        .await
        .expect("it answers");
    let orders = TopicSpec::new(topic("few")).with_partitions(3);
    let apply = |spec: TopicSpec| broker.admin(AdminRequest::ApplyTopics(vec![spec]));
    apply(orders.clone()).await.expect("it is created");
    let day = Duration::from_secs(24 * 60 * 60);
    let other = orders
        .clone()
        .with_partitions(20)
        .with_replication(3)
        .with_retention(3 * day)
        .with_compression(Compression::Snappy);
    let report = report_of(apply(other).await);
    assert_eq!(report.partitions, 3);
    let drift = report.drift.join("\n");
    for difference in [
        "20 partitions are declared, the topic has 3",
        "a replication of 3 is declared, the topic has 1",
        "retention.ms=259200000 is declared, the topic has 604800000",
        "compression.type=snappy is declared, the topic has producer",
    ] {
        assert!(drift.contains(difference), "{drift}");
    }
    let kept = TopicSpec::new(topic("kept"))
        .with_partitions(2)
        .with_replication(1)
        .with_retention(3 * day)
        .with_retention_bytes(1 << 30)
        .with_compression(Compression::Snappy);
    for created in [true, false] {
        let report = report_of(apply(kept.clone()).await);
        assert_eq!(report.created, created);
        assert!(report.drift.is_empty(), "{:?}", report.drift);
    }
    let too_many = TopicSpec::new(topic("replicas")).with_replication(3);
    let error = apply(too_many).await.expect_err("there is one broker");
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert!(error.to_string().contains("too few brokers"), "{error}");
}

fn report_of(reply: eventbus_core::Result<AdminReply>) -> TopicReport {
    match reply.expect("the request is answered") {
        AdminReply::Topics(mut reports) => reports.remove(0),
        reply => panic!("not an answer to the request: {reply:?}"),
    }
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_message_that_the_topic_does_not_take_is_too_large() {
    let _server = Server::new().await;
    let config = Server::config().with_option("message.max.bytes", "4000000");
    let config: KafkaConfig = config.expect("it may be set");
    let broker = KafkaBroker::connect(config).await.expect("it answers");
    let begun = Instant::now();
    let message = Message::new(topic("large"), vec![b'x'; 2_000_000]);
    let refused = broker
        .publish(vec![message])
        .await
        .expect_err("the broker takes a megabyte");
    assert!(begun.elapsed() < PATIENCE);
    let refused = &refused.unpublished[0];
    assert_eq!(refused.outcome, Outcome::NotTaken);
    assert_eq!(
        refused.error.kind(),
        ErrorKind::InvalidInput,
        "{}",
        refused.error
    );
    assert!(
        refused.error.to_string().contains("max.message.bytes"),
        "{}",
        refused.error
    );
}

/// Found by `dev/verify --scenario embedded --broker kafka`, where members of a new group start at once
/// and each declares the topic of its dead letters.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn clients_that_declare_a_topic_at_once_all_find_it() {
    let server = Server::new().await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(server.connect().await.expect("it answers"));
    }
    for _ in 0..20 {
        let name = topic("at-once");
        let declare = clients.iter().map(|client| {
            let spec = TopicSpec::new(name.clone()).with_partitions(1);
            client.admin(AdminRequest::ApplyTopics(vec![spec]))
        });
        for declared in futures_util::future::join_all(declare).await {
            declared.expect("one of them creates it, and each finds it");
        }
    }
}
