//! What is removed and what is not: by age, by size, for groups that live and groups that do not.

use std::time::Duration;

use eventbus_core::{
    AdminRequest, Broker, Group, Message, Publisher, Subscription, Topic, TopicSpec,
};
use eventbus_sql::PostgresBroker;
use eventbus_testkit::{Probe, text_of, within};

use super::server::Server;
use crate::processes::all_of;

const TOPIC: Topic = Topic::from_static("orders");
const GROUP: Group = Group::from_static("payments");
const LIMIT: Duration = Duration::from_secs(30);
const HOUR: Duration = Duration::from_secs(60 * 60);

async fn open(server: &Server, spec: TopicSpec) -> PostgresBroker {
    let config = server
        .config()
        .with_group_expiry(24 * HOUR)
        .with_retention_interval(Duration::from_millis(50));
    let broker = PostgresBroker::connect(config).await.expect("it answers");
    let spec = spec.with_partitions(1);
    let applied = broker.admin(AdminRequest::ApplyTopics(vec![spec])).await;
    applied.expect("the topic is created");
    broker
}

async fn publish(broker: &PostgresBroker, texts: &[&str]) {
    let batch = texts
        .iter()
        .map(|text| Message::new(TOPIC, (*text).to_owned()));
    broker.publish(batch.collect()).await.expect("it is taken");
}

/// Makes everything there is two hours older.
async fn age(server: &Server) {
    server
        .run("UPDATE {s}.messages SET taken = taken - 7200000000")
        .await;
}

async fn kept(broker: &PostgresBroker) -> Vec<String> {
    all_of(broker, TOPIC, 1).await.iter().map(text_of).collect()
}

async fn is_kept(broker: &PostgresBroker, texts: &[&str]) {
    within(LIMIT, async { while kept(broker).await != texts {} }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_too_old_goes_and_what_is_not_stays() {
    let server = Server::new().await;
    let broker = open(&server, TopicSpec::new(TOPIC).with_retention(HOUR)).await;
    publish(&broker, &["old", "older"]).await;
    age(&server).await;
    publish(&broker, &["new"]).await;
    is_kept(&broker, &["new"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_too_much_goes_oldest_first() {
    let server = Server::new().await;
    let spec = TopicSpec::new(TOPIC).with_retention_bytes(10);
    let broker = open(&server, spec).await;
    publish(&broker, &["aaaa", "bbbb", "cccc", "dddd"]).await;
    is_kept(&broker, &["cccc", "dddd"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn what_a_living_group_has_not_settled_stays_and_goes_when_the_group_has_expired() {
    let server = Server::new().await;
    let broker = open(&server, TopicSpec::new(TOPIC).with_retention(HOUR)).await;
    publish(&broker, &["settled", "unread", "unread too"]).await;
    let group = || Subscription::group(GROUP, vec![TOPIC]);
    let mut probe = Probe::join(&broker, group()).await.expect("it can join");
    let read = probe.collect(3).await;
    probe.settle(&read[..1]).await;
    probe.close().await;
    age(&server).await;
    is_kept(&broker, &["unread", "unread too"]).await;

    server
        .run("UPDATE {s}.consumer_groups SET seen = seen - 90000000000")
        .await;
    is_kept(&broker, &[]).await;
    publish(&broker, &["new"]).await;
    let mut probe = Probe::join(&broker, group()).await.expect("it can join");
    assert_eq!(probe.collect_texts(1).await, ["new"]);
    let gaps: Vec<_> = probe
        .gaps()
        .iter()
        .map(|(_, from, to)| (from.0, to.0))
        .collect();
    assert_eq!(gaps, [(1, 3)], "what vanished unread is reported");
}
