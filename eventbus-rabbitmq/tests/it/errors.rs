//! What goes wrong is said within ten seconds, with what to do about it.

use std::time::{Duration, Instant};

use eventbus_core::{
    AdminReply, AdminRequest, Broker, Error, ErrorKind, Message, Outcome, PublishError, Publisher,
    Start, Subscriber, Subscription, TopicReport, TopicSpec,
};
use eventbus_rabbitmq::RabbitMqBroker;
use lapin::options::ExchangeDeleteOptions;
use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};

use crate::server::{Server, create, group, topic};

const PATIENCE: Duration = Duration::from_secs(10);

async fn refused(url: &str) -> Error {
    let begun = Instant::now();
    let error = RabbitMqBroker::from_url(url).await.expect_err(url);
    assert!(
        begun.elapsed() < PATIENCE,
        "{error} after {:?}",
        begun.elapsed()
    );
    error
}

fn only(error: PublishError) -> (Outcome, Error) {
    let mut refused = error.unpublished;
    assert_eq!(refused.len(), 1);
    let refused = refused.remove(0);
    (refused.outcome, refused.error)
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_named() {
    let error = refused("amqp://127.0.0.1:1").await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    assert!(
        error.to_string().contains("whether RabbitMQ runs there"),
        "{error}"
    );
}

#[tokio::test]
async fn a_host_that_is_unknown_is_named() {
    let error = refused("amqp://no-such-host.invalid").await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(
        error.to_string().contains("host of the url is unknown"),
        "{error:?}"
    );
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_wrong_password_is_said_to_be_wrong() {
    let _server = Server::new().await;
    let wrong = Server::url().replace(":eventbus@", ":wrong-one@");
    let error = refused(&wrong).await;
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error:?}");
    assert!(error.to_string().contains("user and password"), "{error}");
    assert!(!format!("{error:?}").contains("wrong-one"), "{error:?}");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_virtual_host_that_is_not_there_is_named() {
    let _server = Server::new().await;
    let wrong = Server::url().replace("/%2f", "/no-such-host");
    let error = refused(&wrong).await;
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error:?}");
    assert!(error.to_string().contains("virtual host"), "{error}");
    assert!(error.to_string().contains("no-such-host"), "{error}");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_missing_topic_is_not_found_where_none_is_to_be_created() {
    let _server = Server::new().await;
    let config = Server::config().with_create_topics(false);
    let broker = RabbitMqBroker::connect(config).await.expect("it answers");
    let missing = topic("missing");
    let message = Message::new(missing.clone(), "x");
    let error = broker.publish(vec![message]).await;
    let (outcome, error) = only(error.expect_err("there is no such topic"));
    assert_eq!(outcome, Outcome::NotTaken);
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(error.to_string().contains("apply_topics"), "{error}");
    let subscription = Subscription::group(group("missing"), vec![missing]);
    let error = broker.subscribe(subscription).await;
    let error = error.expect_err("there is no such topic");
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_message_that_nobody_would_get_is_refused() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let (lonely, read) = (topic("lonely"), topic("read"));
    create(&broker, &lonely, 2).await;
    create(&broker, &read, 2).await;
    let subscription = Subscription::group(group("reads"), vec![read.clone()]);
    let _member = broker.subscribe(subscription).await.expect("it joins");
    let topics = [&lonely, &read, &lonely, &read, &read, &lonely];
    let messages = topics
        .iter()
        .enumerate()
        .map(|(index, topic)| Message::new((*topic).clone(), format!("{index}")).with_key("same"));
    let error = broker.publish(messages.collect()).await;
    let error = error.expect_err("a topic has no group");
    let refused: Vec<_> = error.unpublished.iter().map(|it| it.index).collect();
    assert_eq!(refused, [0, 2, 5]);
    for refused in &error.unpublished {
        assert_eq!(refused.outcome, Outcome::NotTaken);
        assert_eq!(refused.error.kind(), ErrorKind::NotFound);
        assert!(refused.error.is_retryable());
        let text = refused.error.to_string();
        assert!(text.contains("no group is bound"), "{text}");
    }
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_topic_that_is_deleted_under_a_publisher_is_not_found() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let (deleted, other) = (topic("deleted"), topic("other"));
    for topic in [&deleted, &other] {
        create(&broker, topic, 1).await;
        let subscription = Subscription::group(group("reads"), vec![topic.clone()]);
        let member = broker.subscribe(subscription).await.expect("it joins");
        member.deliveries.close().await.expect("it leaves");
        let message = Message::new(topic.clone(), "x");
        broker.publish(vec![message]).await.expect("it is taken");
    }
    let raw = server.raw().await;
    let channel = raw.create_channel().await.expect("there is one");
    let name = deleted.as_str().into();
    let gone = channel.exchange_delete(name, ExchangeDeleteOptions::default());
    gone.await.expect("it is deleted");
    let messages = [&other, &deleted, &other].map(|topic| Message::new(topic.clone(), "y"));
    let error = broker.publish(messages.to_vec()).await;
    let (outcome, error) = only(error.expect_err("a topic is gone"));
    // A message that came before it was deleted was taken.
    assert_eq!(outcome, Outcome::Unknown);
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_differs_from_its_declaration_is_drift() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    // A long name has its count under a shorter one.
    for name in [topic("few"), topic(&"long".repeat(40))] {
        let orders = TopicSpec::new(name).with_partitions(3);
        let apply = |spec: TopicSpec| broker.admin(AdminRequest::ApplyTopics(vec![spec]));
        assert!(report_of(apply(orders.clone()).await).created);
        let other = orders.clone().with_partitions(20);
        let report = report_of(apply(other).await);
        assert_eq!(report.partitions, 3);
        let drift = report.drift.join("\n");
        let difference = "20 partitions are declared, the topic has 3";
        assert!(drift.contains(difference), "{drift}");
        // Whoever has not declared it finds the same.
        let another = server.connect().await.expect("it answers");
        let described = another.admin(AdminRequest::DescribeTopics(vec![orders.name]));
        assert_eq!(report_of(described.await).partitions, 3);
    }
    let kept = topic("orders.billing").to_string() + ".dlq";
    let kept = TopicSpec::new(eventbus_core::Topic::new(&kept).expect("a good name"));
    let day = Duration::from_secs(24 * 60 * 60);
    let apply = |spec: TopicSpec| broker.admin(AdminRequest::ApplyTopics(vec![spec]));
    let report = report_of(apply(kept.clone().with_retention(day)).await);
    assert_eq!((report.created, report.partitions), (true, 1));
    let report = report_of(apply(kept.clone().with_retention(day)).await);
    assert!(!report.created && report.drift.is_empty(), "{report:?}");
    let report = report_of(apply(kept.with_retention(2 * day)).await);
    assert!(report.drift.join("\n").contains("x-max-age"), "{report:?}");
}

fn report_of(reply: eventbus_core::Result<AdminReply>) -> TopicReport {
    match reply.expect("the request is answered") {
        AdminReply::Topics(mut reports) => reports.remove(0),
        reply => panic!("not an answer to the request: {reply:?}"),
    }
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_queue_of_somebody_else_is_not_taken_for_a_groups() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let (orders, billing) = (topic("orders"), group("billing"));
    create(&broker, &orders, 1).await;
    let raw = server.raw().await;
    let channel = raw.create_channel().await.expect("there is one");
    let options = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    let name = format!("{orders}:{billing}:0").as_str().into();
    let declared = channel.queue_declare(name, options, FieldTable::default());
    declared.await.expect("it is created");
    let subscription = Subscription::group(billing, vec![orders]);
    let error = broker.subscribe(subscription).await;
    let error = error.expect_err("it would hand messages to several at once");
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(error.to_string().contains("other settings"), "{error}");
}

/// What an operator has declared for a group is used where the group loses nothing by it.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_queue_with_other_settings_is_a_groups_where_it_drops_nothing() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let raw = server.raw().await;
    let text = |text: &str| AMQPValue::LongString(text.into());
    let number = AMQPValue::LongInt;
    let (short, max) = (number(5), number(i32::MAX));
    let refuses = ("x-overflow", text("reject-publish"));
    let limit = |limit| ("x-delivery-limit", limit);
    let cases = [
        (
            true,
            vec![
                limit(max.clone()),
                ("x-max-length", short.clone()),
                refuses.clone(),
            ],
        ),
        (true, vec![("x-max-length-bytes", number(1 << 20)), refuses]),
        (
            false,
            vec![limit(max.clone()), ("x-max-length", short.clone())],
        ),
        (
            false,
            vec![
                limit(max.clone()),
                ("x-max-length", short.clone()),
                ("x-message-ttl", short.clone()),
            ],
        ),
        (
            false,
            vec![
                limit(max.clone()),
                ("x-dead-letter-exchange", text("amq.fanout")),
            ],
        ),
        (false, vec![limit(max), ("x-expires", number(60_000))]),
    ];
    for (is_fit, settings) in cases {
        let (orders, billing) = (topic("orders"), group("billing"));
        create(&broker, &orders, 1).await;
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), text("quorum"));
        arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
        for (name, value) in &settings {
            arguments.insert((*name).into(), value.clone());
        }
        let channel = raw.create_channel().await.expect("there is one");
        let options = QueueDeclareOptions {
            durable: true,
            ..QueueDeclareOptions::default()
        };
        let name = format!("{orders}:{billing}:0").as_str().into();
        let declared = channel.queue_declare(name, options, arguments);
        declared.await.expect("it is created");
        let subscription = Subscription::group(billing, vec![orders]);
        match broker.subscribe(subscription).await {
            Ok(_) => assert!(is_fit, "{settings:?}"),
            Err(error) => {
                assert!(!is_fit, "{settings:?}: {error}");
                assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
            }
        }
    }
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_cannot_be_honoured_says_how_to_get_it() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let orders = topic("orders");
    create(&broker, &orders, 1).await;
    let reader = Subscription::reader(vec![orders.clone()]);
    let letters = eventbus_core::Topic::new(&format!("{orders}.g.dlq")).expect("a good name");
    let cases = [
        (reader, "Start::Latest"),
        (
            Subscription::group(group("g"), vec![letters]),
            "bus.dead_letters",
        ),
    ];
    for (subscription, text) in cases {
        let error = broker.subscribe(subscription).await;
        let error = error.expect_err("it cannot be honoured");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
    let tail = Subscription::reader(vec![orders.clone()]).with_start(Start::Latest);
    let mut tail = eventbus_testkit::Probe::join(&broker, tail)
        .await
        .expect("it reads");
    tail.step().await.expect("it is assigned");
    let messages = ["a", "b"].map(|text| Message::new(orders.clone(), text).with_key("k"));
    broker
        .publish(messages.to_vec())
        .await
        .expect("somebody gets it");
    assert_eq!(tail.collect_texts(2).await, ["a", "b"]);
}
