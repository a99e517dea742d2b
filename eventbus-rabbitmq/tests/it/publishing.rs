//! Calls to publish that share channels: none pays for another one, and none is forgotten.

use std::time::{Duration, Instant};

use eventbus_core::{
    Broker, ErrorKind, Message, Outcome, PublishError, Publisher, Subscription, Topic,
};
use eventbus_rabbitmq::{RabbitMqBroker, RabbitMqConfig};
use eventbus_testkit::{Probe, within};
use lapin::Connection;
use tokio::task::JoinHandle;

use crate::server::{Server, create, group, topic};
use crate::slow::Slow;

const MINUTE: Duration = Duration::from_secs(60);

/// A topic with a group, and a queue of its own that can stand still.
struct Stage<'s> {
    topic: Topic,
    probe: Probe,
    slow: Slow<'s>,
    broker: RabbitMqBroker,
    _raw: Connection,
}

impl<'s> Stage<'s> {
    async fn new(server: &'s Server, config: RabbitMqConfig) -> Self {
        let broker = RabbitMqBroker::connect(config).await.expect("it answers");
        let topic = topic("orders");
        create(&broker, &topic, 1).await;
        let subscription = Subscription::group(group("billing"), vec![topic.clone()]);
        let reads = server.connect().await.expect("it answers");
        let mut probe = Probe::join(&reads, subscription).await.expect("it joins");
        within(MINUTE, probe.hold(1)).await;
        let raw = server.raw().await;
        let channel = raw.create_channel().await.expect("there is one");
        let slow = Slow::bind(server, &channel, &topic).await;
        Self {
            topic,
            probe,
            slow,
            broker,
            _raw: raw,
        }
    }

    fn message(&self, text: &str) -> Message {
        Message::new(self.topic.clone(), text.to_owned())
    }

    /// Has every channel publish something that is not confirmed: one after the other, or one channel
    /// would take several.
    async fn keep_busy(&mut self) -> Vec<JoinHandle<Result<(), PublishError>>> {
        let mut busy = Vec::new();
        for _ in 0..4 {
            busy.push(self.publish("busy"));
            self.probe.collect_texts(1).await;
        }
        busy
    }

    /// Publishes in a task of its own.
    fn publish(&self, text: &str) -> JoinHandle<Result<(), PublishError>> {
        let (broker, message) = (self.broker.clone(), self.message(text));
        tokio::spawn(async move { broker.publish(vec![message]).await })
    }
}

/// As a service does whose time to end is up.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn closing_that_is_given_up_leaves_nobody_without_an_answer() {
    let server = Server::new().await;
    let mut stage = Stage::new(&server, Server::config()).await;
    stage.slow.stand_still().await;
    let under_way = stage.publish("under way");
    within(MINUTE, async {
        assert_eq!(stage.probe.collect_texts(1).await, ["under way"]);
        for _ in 0..2 {
            let closing = tokio::time::timeout(Duration::from_millis(200), stage.broker.close());
            closing.await.expect_err("it waits for what is under way");
        }
        let refused = stage.publish("behind").await.expect("it is answered");
        let error = refused.expect_err("it was closed").unpublished.remove(0);
        assert_eq!(
            (error.outcome, error.error.kind()),
            (Outcome::NotTaken, ErrorKind::Closed)
        );
        stage.slow.go_on().await;
        let published = under_way.await.expect("it is answered");
        published.expect("it is taken");
        stage.broker.close().await.expect("it closes");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_nobody_waits_for_any_more_is_not_published_later() {
    let server = Server::new().await;
    let mut stage = Stage::new(&server, Server::config()).await;
    stage.slow.stand_still().await;
    within(MINUTE, async {
        let busy = stage.keep_busy().await;
        let given_up = stage.publish("given up");
        tokio::time::sleep(Duration::from_millis(100)).await;
        given_up.abort();
        assert!(given_up.await.expect_err("it is aborted").is_cancelled());
        let after = stage.publish("after");
        stage.slow.go_on().await;
        for published in busy.into_iter().chain([after]) {
            published.await.expect("it runs").expect("it is taken");
        }
        assert_eq!(stage.probe.collect_texts(1).await, ["after"]);
    })
    .await;
}

/// However many calls wait for a channel, each has its own time.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_call_that_waits_for_others_ends_in_its_time() {
    let server = Server::new().await;
    let config = Server::config().with_publish_timeout(Duration::from_secs(2));
    let mut stage = Stage::new(&server, config).await;
    stage.slow.stand_still().await;
    within(MINUTE, async {
        let busy = stage.keep_busy().await;
        // Two that are taken together when a channel is free.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let earlier = stage.publish("earlier");
        tokio::time::sleep(Duration::from_millis(1000)).await;
        let begun = Instant::now();
        let waits = stage.publish("waits");
        for published in busy {
            let error = published.await.expect("it runs");
            let error = error.expect_err("nobody confirms it");
            assert_eq!(error.unpublished[0].outcome, Outcome::Unknown);
        }
        for waiting in [earlier, waits] {
            let refused = waiting.await.expect("it runs");
            refused.expect_err("nobody confirms it");
        }
        let took = begun.elapsed();
        assert!(took > Duration::from_millis(1900), "{took:?}");
        assert!(took < Duration::from_millis(2900), "{took:?}");
        stage.slow.go_on().await;
    })
    .await;
}

/// The server closes a channel for what its user may not do, and with it goes what others have sent.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_may_not_be_published_takes_nothing_else_with_it() {
    let server = Server::new().await;
    let admin = server.connect().await.expect("it answers");
    let (open, shut) = (topic("open"), topic("shut"));
    let mut probes = Vec::new();
    for topic in [&open, &shut] {
        create(&admin, topic, 1).await;
        let subscription = Subscription::group(group("billing"), vec![topic.clone()]);
        probes.push(Probe::join(&admin, subscription).await.expect("it joins"));
    }
    let user = topic("user").to_string();
    server.control(&["add_user", &user, "secret"]).await;
    let permissions = ["set_permissions", &user, ".*", "^open.*", ".*"];
    server.control(&permissions).await;
    let url = Server::url().replace("eventbus:eventbus@", &format!("{user}:secret@"));
    let config = RabbitMqConfig::from_url(&url).expect("a good url");
    let broker = RabbitMqBroker::connect(config).await.expect("it answers");
    let topics = [&open, &shut, &open, &shut, &open];
    let batch = topics
        .map(|topic| Message::new(topic.clone(), "x"))
        .to_vec();
    let error = within(MINUTE, broker.publish(batch)).await;
    let error = error.expect_err("some of it may not be published");
    let refused: Vec<_> = error.unpublished.iter().map(|it| it.index).collect();
    assert_eq!(refused, [1, 3], "{error}");
    for it in &error.unpublished {
        assert_eq!(it.error.kind(), ErrorKind::Unauthorized, "{error}");
    }
    server.control(&["delete_user", &user]).await;
}
