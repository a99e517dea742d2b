//! What goes wrong is said within ten seconds, with what to do about it.

use std::time::{Duration, Instant};

use eventbus_core::{
    AdminReply, AdminRequest, Broker, DuplicateStore, Error, ErrorKind, EventId, Group,
    KeyStateStore, Message, Outcome, Position, PublishError, Publisher, Signal, Start, Subscriber,
    Subscription, Topic, TopicPartition, TopicSpec, Until,
};
use eventbus_redis::{RedisBroker, RedisDuplicates};
use eventbus_testkit::{Probe, within};

use crate::own_server::OwnServer;
use crate::server::Server;
use crate::streams::settle;

const PATIENCE: Duration = Duration::from_secs(10);

fn topic(name: &str) -> Topic {
    let name = format!("{name}-{:016x}", fastrand::u64(..));
    Topic::new(&name).expect("a good name")
}

async fn refused(url: &str) -> Error {
    let begun = Instant::now();
    let error = RedisBroker::from_url(url).await.expect_err(url);
    let took = begun.elapsed();
    assert!(took < PATIENCE, "{error} after {took:?}");
    error
}

/// What a single message was refused with.
async fn publish(broker: &RedisBroker, message: Message) -> (Outcome, Error) {
    let published = within(PATIENCE, broker.publish(vec![message])).await;
    only(published.expect_err("it is refused"))
}

fn only(error: PublishError) -> (Outcome, Error) {
    let mut refused = error.unpublished;
    assert_eq!(refused.len(), 1);
    let refused = refused.remove(0);
    (refused.outcome, refused.error)
}

/// What it says, with what caused it.
fn said(error: &Error) -> String {
    format!("{error:?}")
}

/// How many messages a reader finds.
async fn count(broker: &RedisBroker, topic: &Topic) -> usize {
    let reader = Subscription::reader(vec![topic.clone()]).with_start(Start::Earliest);
    let reader = broker.subscribe(reader.with_until(Until::Now)).await;
    let mut reader = reader.expect("it reads");
    let (mut count, mut open) = (0, 0);
    loop {
        match within(PATIENCE, reader.deliveries.next()).await {
            Ok(Signal::Delivered(batch)) => {
                count += batch.len();
                let settled = batch.iter().map(|it| it.receipt);
                let settled: Vec<_> = settled.collect();
                let settled = reader.settlement.settle(&settled).await;
                settled.expect("it goes on");
            }
            Ok(Signal::Ended(lanes)) => {
                open -= lanes.len();
                if open == 0 {
                    return count;
                }
            }
            Ok(Signal::Assigned(lanes)) => open += lanes.len(),
            Ok(Signal::Gap { .. }) => panic!("a message is lost"),
            signal => drop(signal.expect("it goes on")),
        }
    }
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_named() {
    let error = refused("redis://127.0.0.1:1").await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    let text = error.to_string();
    assert!(
        text.contains("127.0.0.1:1") && text.contains("host and port"),
        "{text}"
    );
}

#[tokio::test]
async fn a_host_that_is_unknown_is_named() {
    let error = refused("redis://no-such-host.invalid").await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    let text = error.to_string();
    assert!(
        text.contains("no-such-host.invalid") && text.contains("host"),
        "{text}"
    );
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_wrong_password_is_said_to_be_wrong() {
    let _server = Server::new().await;
    let error = refused(&Server::url().replace(":eventbus@", ":wrong-one@")).await;
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error:?}");
    assert!(error.to_string().contains("user or password"), "{error}");
    assert!(!format!("{error:?}").contains("wrong-one"), "{error:?}");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_user_with_the_rights_that_the_docs_give_may_do_all_that_is_needed() {
    let docs = include_str!("../../../docs/brokers/redis.md");
    let rights = docs
        .lines()
        .find_map(|line| line.strip_prefix("ACL SETUSER shop "));
    let server = OwnServer::start(&[]).await;
    let mut set = redis::cmd("ACL");
    set.arg("SETUSER").arg("shop");
    for right in rights.expect("the docs give them").split(' ') {
        set.arg(right);
    }
    let done: redis::RedisResult<()> = set.query_async(&mut server.native().await).await;
    done.expect("it is set");
    let url = format!(
        "redis://shop:PASSWORD@127.0.0.1:{}/0?retention=100ms",
        server.port()
    );
    let broker = RedisBroker::from_url(&url).await.expect("it answers");
    let topic = Topic::from_static("orders");
    let group = Group::from_static("payments");
    let messages = (0..200).map(|number| Message::new(topic.clone(), number.to_string()));
    let published = broker.publish(messages.collect()).await;
    published.expect("it is taken");
    let joined = broker.subscribe(Subscription::group(group.clone(), vec![topic.clone()]));
    let mut member = joined.await.expect("it joins");
    settle(&mut member, 200).await;
    member.deliveries.close().await.expect("it leaves");
    for request in [
        AdminRequest::Health,
        AdminRequest::Groups { topics: Vec::new() },
        AdminRequest::ResetGroup {
            group: group.clone(),
            topic: topic.clone(),
            to: Start::Earliest,
        },
        AdminRequest::Trim {
            topic: topic.clone(),
            partition: 0,
            before: Position(u128::MAX),
        },
    ] {
        broker.admin(request).await.expect("it may");
    }
    let place = TopicPartition::new(topic, 0);
    let claimed = broker.key_state().claim(&group, &place).await;
    claimed.expect("it may");
    let handled = RedisDuplicates::from_url(&url).await.expect("it answers");
    let ids = [EventId::new()];
    let marked = handled
        .mark_handled(&group, &ids, Duration::from_secs(1))
        .await;
    marked.expect("it may");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_missing_topic_is_not_found_where_none_is_to_be_created() {
    let _server = Server::new().await;
    let config = Server::config().with_create_topics(false);
    let broker = RedisBroker::connect(config).await.expect("it answers");
    let missing = topic("missing");
    let (outcome, error) = publish(&broker, Message::new(missing.clone(), "x")).await;
    assert_eq!(outcome, Outcome::NotTaken);
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(said(&error).contains("apply_topics"), "{error}");
    let reader = Subscription::reader(vec![missing.clone()]);
    let error = broker.subscribe(reader).await.expect_err("it is missing");
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    // What cannot be handled has a place all the same.
    let letters = Topic::new(&format!("{missing}.billing.dlq")).expect("a good name");
    let letter = Message::new(letters, "x");
    broker.publish(vec![letter]).await.expect("it is taken");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn another_count_of_partitions_is_drift() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let spec = TopicSpec::new(topic("few"));
    let apply = async |partitions| {
        let spec = spec.clone().with_partitions(partitions);
        let applied = broker.admin(AdminRequest::ApplyTopics(vec![spec])).await;
        let Ok(AdminReply::Topics(mut reports)) = applied else {
            panic!("not an answer: {applied:?}");
        };
        reports.remove(0)
    };
    assert!(apply(3).await.created);
    let report = apply(20).await;
    assert_eq!(report.partitions, 3);
    let drift = report.drift.join("\n");
    assert!(
        drift.contains("20 partitions are declared, the topic has 3"),
        "{drift}"
    );
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_message_that_is_too_large_is_refused_alone() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let topic = topic("large");
    let sizes = [1, broker.capabilities().message_bytes_max + 1, 1];
    let messages = sizes.map(|size| Message::new(topic.clone(), vec![b'x'; size]));
    let error = within(PATIENCE, broker.publish(messages.to_vec())).await;
    let (outcome, error) = only(error.expect_err("one is too large"));
    assert_eq!(outcome, Outcome::NotTaken);
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert!(!error.is_retryable());
    assert_eq!(count(&broker, &topic).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_full_memory_refuses_and_loses_nothing() {
    let settings = ["--maxmemory", "8mb", "--maxmemory-policy", "noeviction"];
    let server = OwnServer::start(&settings).await;
    let broker = server.connect().await;
    let topic = topic("full");
    let group = Group::new(topic.as_str()).expect("a good name");
    let member = Subscription::group(group.clone(), vec![topic.clone()]);
    let mut probe = Probe::join(&broker, member).await.expect("it joins");
    let message = || Message::new(topic.clone(), vec![b'x'; 64 * 1024]);
    let mut taken = 0;
    let error = loop {
        let batch = (0..4).map(|_| message()).collect();
        match within(PATIENCE, broker.publish(batch)).await {
            Ok(()) => taken += 4,
            Err(error) => break error,
        }
        assert!(taken < 1000, "8 MiB are used up");
    };
    taken += 4 - error.unpublished.len();
    for refused in &error.unpublished {
        assert_eq!(refused.outcome, Outcome::NotTaken);
        assert_eq!(refused.error.kind(), ErrorKind::RateLimited);
        assert!(refused.error.is_retryable());
        let text = refused.error.to_string();
        assert!(
            text.contains("memory is full") && text.contains("maxmemory"),
            "{text}"
        );
    }
    assert_eq!(count(&broker, &topic).await, taken);
    // Groups that have begun go on, too: what they settle makes room.
    let lag = || AdminRequest::Lag {
        group: group.clone(),
        topics: vec![topic.clone()],
    };
    let again = within(PATIENCE, probe.collect(1)).await;
    probe.settle(&again).await;
    let Ok(AdminReply::Lag(lag)) = broker.admin(lag()).await else {
        panic!("it is declared");
    };
    assert_eq!(
        lag.iter().map(|it| it.messages).sum::<u64>(),
        taken as u64 - 1
    );
    server
        .answers(&["CONFIG", "SET", "maxmemory", "64mb"], "OK")
        .await;
    broker
        .publish(error.into_messages())
        .await
        .expect("there is room again");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_server_that_throws_keys_away_is_refused() {
    let settings = ["--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"];
    let server = OwnServer::start(&settings).await;
    let error = refused(&format!("redis://127.0.0.1:{}", server.port())).await;
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("noeviction"), "{error}");
    server
        .answers(&["CONFIG", "SET", "maxmemory-policy", "volatile-ttl"], "OK")
        .await;
    server.connect().await;
    let error = RedisDuplicates::connect(server.config()).await;
    let error = error.expect_err("marks end by themselves");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("noeviction"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_replica_takes_nothing_and_says_who_does() {
    let primary = OwnServer::start(&[]).await;
    let port = primary.port().to_string();
    let replica = OwnServer::start(&["--replicaof", "127.0.0.1", &port]).await;
    replica
        .answers(&["INFO", "replication"], "master_link_status:up")
        .await;
    let topic = topic("copied");
    let broker = primary.connect().await;
    broker
        .publish(vec![Message::new(topic.clone(), "x")])
        .await
        .expect("it is taken");
    let broker = replica.connect().await;
    // The topic is there as soon as it is copied; until then it would be created.
    let (outcome, error) = publish(&broker, Message::new(topic.clone(), "y")).await;
    assert_eq!(outcome, Outcome::NotTaken);
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.is_retryable());
    assert!(said(&error).contains("name the primary"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_publish_that_no_replica_has_is_unknown() {
    let primary = OwnServer::start(&[]).await;
    let port = primary.port().to_string();
    let mut replica = OwnServer::start(&["--replicaof", "127.0.0.1", &port]).await;
    replica
        .answers(&["INFO", "replication"], "master_link_status:up")
        .await;
    let config = primary.config().with_replicas(1);
    let broker = RedisBroker::connect(config).await.expect("it answers");
    let topic = topic("copied");
    let message = || Message::new(topic.clone(), "x");
    broker
        .publish(vec![message()])
        .await
        .expect("the replica has it");
    replica.kill();
    let (outcome, error) = publish(&broker, message()).await;
    assert_eq!(outcome, Outcome::Unknown);
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("replicas"), "{error}");
    replica
        .start_again(&["--replicaof", "127.0.0.1", &port])
        .await;
    replica
        .answers(&["INFO", "replication"], "master_link_status:up")
        .await;
    broker
        .publish(vec![message()])
        .await
        .expect("the replica has it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_server_that_reads_its_data_takes_messages_when_it_has_read_them() {
    let mut server = OwnServer::start(&[]).await;
    let topic = topic("kept");
    let broker = server.connect().await;
    broker
        .publish(vec![Message::new(topic.clone(), "x")])
        .await
        .expect("it is taken");
    let fill = "for i = 1, 3000 do redis.call('SET', i, i) end return 'OK'";
    server.answers(&["EVAL", fill, "0"], "OK").await;
    // Its file is written anew as a snapshot, of which each key is read slowly.
    server.answers(&["BGREWRITEAOF"], "rewriting").await;
    server
        .answers(&["INFO", "persistence"], "aof_rewrite_in_progress:0")
        .await;
    let slowly = [
        "--key-load-delay",
        "1000",
        "--loading-process-events-interval-bytes",
        "1024",
    ];
    server.start_again(&slowly).await;
    let broker = server.connect().await;
    let (outcome, error) = publish(&broker, Message::new(topic.clone(), "y")).await;
    assert_eq!(outcome, Outcome::NotTaken);
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.is_retryable());
    assert!(said(&error).contains("reads its data"), "{error}");
    server.answers(&["PING"], "PONG").await;
    let message = Message::new(topic.clone(), "y");
    broker.publish(vec![message]).await.expect("it is taken");
    assert_eq!(count(&broker, &topic).await, 2);
}
