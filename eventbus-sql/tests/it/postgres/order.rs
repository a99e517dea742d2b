//! What holds while many publish to the same partitions at once, and when hints are wrong.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use eventbus_core::{
    AdminRequest, Broker, Key, Message, Publisher, Subscription, Topic, TopicSpec, error_chain,
};
use eventbus_sql::PostgresBroker;
use eventbus_testkit::{Probe, within};
use sqlx::{AssertSqlSafe, Row};

use super::server::Server;
use crate::processes::all_of;

const TOPIC: Topic = Topic::from_static("orders");
const PARTITIONS: u32 = 8;
const LIMIT: Duration = Duration::from_secs(60);

async fn open(server: &Server, partitions: u32) -> PostgresBroker {
    let broker = server.connect().await.expect("the server answers");
    let topic = TopicSpec::new(TOPIC).with_partitions(partitions);
    let applied = broker.admin(AdminRequest::ApplyTopics(vec![topic])).await;
    applied.expect("the topic is created");
    broker
}

/// Publishes batches that touch partitions in every order.
async fn publish(broker: PostgresBroker, seed: u64, batches: usize) -> usize {
    let mut published = 0;
    for number in 0..batches {
        let size = 1 + (number + seed as usize) % 13;
        let batch = (0..size).map(|each| Message::new(TOPIC, vec![b'x'; 10 + each * 7]));
        let taken = broker.publish(batch.collect()).await;
        taken.unwrap_or_else(|error| panic!("{}", error_chain(&error)));
        published += size;
    }
    published
}

/// Looks again and again whether some position is visible and an earlier one is not.
async fn look_for_holes(server: &Server, stop: &AtomicBool) -> usize {
    let sql = "SELECT lane, count(*), max(position) + 1 FROM {s}.messages GROUP BY lane";
    let sql = sql.replace("{s}", server.schema());
    let mut connection = server.connection().await;
    let mut looks = 0;
    while !stop.load(Ordering::SeqCst) {
        let rows = sqlx::query(AssertSqlSafe(sql.clone())).fetch_all(&mut connection);
        for row in rows.await.expect("it can be read") {
            let (count, end): (i64, i64) = (row.get(1), row.get(2));
            assert_eq!(count, end, "lane {} has a hole", row.get::<i32, _>(0));
        }
        looks += 1;
    }
    looks
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn positions_are_dense_and_become_visible_in_their_order() {
    let server = Server::new().await;
    open(&server, PARTITIONS).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut publishers = Vec::new();
    for seed in 0..6 {
        let broker = server.connect().await.expect("the server answers");
        publishers.push(tokio::spawn(publish(broker, seed, 150)));
    }
    let publishing = async {
        let mut published = 0;
        for publisher in publishers {
            published += within(LIMIT, publisher).await.expect("nobody is refused");
        }
        stop.store(true, Ordering::SeqCst);
        published
    };
    let (published, looks) = tokio::join!(publishing, look_for_holes(&server, &stop));
    assert!(looks > 10, "it was looked {looks} times");
    let broker = server.connect().await.expect("the server answers");
    let found = all_of(&broker, TOPIC, PARTITIONS as usize).await.len();
    assert_eq!(found, published);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_notification_that_is_wrong_does_no_harm() {
    let server = Server::new().await;
    let broker = open(&server, 1).await;
    let reader = Subscription::reader(vec![TOPIC]);
    let mut probe = Probe::join(&broker, reader).await.expect("it can be read");
    probe.hold(1).await;
    // In another process, so that the one that reads hears of it by notification only.
    let publisher = server.connect().await.expect("the server answers");
    for number in 0..5 {
        let notify =
            format!("SELECT pg_notify('eventbus_{{s}}', 'l1:999999 g1:99 x l1:{number}9')");
        server.run(&notify).await;
        let message = Message::new(TOPIC, number.to_string());
        publisher.publish(vec![message]).await.expect("it is taken");
        assert_eq!(probe.collect_texts(1).await, [number.to_string()]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn large_messages_of_several_partitions_all_arrive_in_their_order() {
    let server = Server::new().await;
    let broker = open(&server, 4).await;
    // More than one question reads, of every partition and together.
    let mut sent = Vec::new();
    for key in 0..4 {
        for number in 0..4 {
            let text = format!("{key}/{number}/");
            let payload = text.clone() + &"x".repeat(3_000_000);
            let message = Message::new(TOPIC, payload).with_key(Key::display(key));
            broker.publish(vec![message]).await.expect("it is taken");
            sent.push(text);
        }
    }
    let read = within(LIMIT, all_of(&broker, TOPIC, 4)).await;
    let mut read: Vec<_> = read
        .iter()
        .map(|it| String::from_utf8_lossy(&it.message.payload[..4]).into_owned())
        .collect();
    // Stable, so that the order within a key is seen.
    read.sort_by_key(|text| text.as_bytes()[0]);
    assert_eq!(read, sent);
}
