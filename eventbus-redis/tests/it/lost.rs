//! A server that has lost some of what it had: the end of a stream, a topic, how far a group was.

use std::collections::BTreeSet;
use std::time::Duration;

use eventbus_core::{
    AdminReply, AdminRequest, Broker, ErrorKind, Group, Message, Outcome, Publisher, Signal,
    Subscriber, Subscription, Topic, TopicSpec,
};
use eventbus_redis::RedisBroker;
use eventbus_testkit::within;
use redis::AsyncCommands;

use crate::own_server::OwnServer;

const LIMIT: Duration = Duration::from_secs(30);
const TOPIC: Topic = Topic::from_static("orders");
const GROUP: Group = Group::from_static("payments");

async fn one_partition(broker: &RedisBroker) {
    let spec = TopicSpec::new(TOPIC).with_partitions(1);
    let made = broker.admin(AdminRequest::ApplyTopics(vec![spec])).await;
    made.expect("it is made");
}

async fn publish(broker: &RedisBroker, numbers: std::ops::Range<u32>) {
    let messages = numbers.map(|number| Message::new(TOPIC, number.to_string()));
    let messages: Vec<_> = messages.collect();
    loop {
        match broker.publish(messages.clone()).await {
            Ok(()) => return,
            Err(error) if error.is_retryable() => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// A member that settles what it gets.
struct Reader(eventbus_core::Member);

impl Reader {
    async fn join(broker: &RedisBroker) -> Self {
        let joined = broker.subscribe(Subscription::group(GROUP, vec![TOPIC]));
        Self(joined.await.expect("it joins"))
    }

    /// Reads until all of these have come; returns whether a gap was told.
    async fn take(&mut self, numbers: std::ops::Range<u32>) -> bool {
        let mut missing: BTreeSet<String> = numbers.map(|number| number.to_string()).collect();
        let mut has_gap = false;
        within(LIMIT, async {
            while !missing.is_empty() {
                match self.0.deliveries.next().await {
                    Ok(Signal::Delivered(batch)) => {
                        for delivery in &batch {
                            let text = String::from_utf8_lossy(&delivery.message.payload);
                            missing.remove(text.as_ref());
                        }
                        let done = batch.iter().map(|it| it.receipt);
                        let done: Vec<_> = done.collect();
                        if let Err(error) = self.0.settlement.settle(&done).await {
                            assert!(error.is_retryable(), "{error}");
                        }
                    }
                    Ok(Signal::Gap { .. }) => has_gap = true,
                    Ok(Signal::Revoking(lanes)) => {
                        self.0.settlement.release(&lanes).await.expect("it may");
                    }
                    Ok(_) => {}
                    Err(error) => assert!(error.is_retryable(), "{error}"),
                }
            }
        })
        .await;
        has_gap
    }
}

async fn lag(broker: &RedisBroker) -> u64 {
    let ask = AdminRequest::Lag {
        group: GROUP,
        topics: vec![TOPIC],
    };
    let AdminReply::Lag(lag) = broker.admin(ask).await.expect("it answers") else {
        panic!("the answer to another question");
    };
    lag.iter().map(|lane| lane.messages).sum()
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_added_to_a_stream_that_lost_its_end_is_read() {
    for (kept, added) in [(90, 5), (90, 10), (90, 15), (0, 3)] {
        let mut server = OwnServer::start(&[]).await;
        let broker = server.connect().await;
        one_partition(&broker).await;
        publish(&broker, 0..kept).await;
        let data = server.copy();
        publish(&broker, kept..100).await;
        let mut reader = Reader::join(&broker).await;
        assert!(!reader.take(0..100).await);
        server.go_on_with(data).await;
        publish(&broker, 100..100 + added).await;
        reader.take(100..100 + added).await;
        let settled = async {
            while lag(&broker).await > 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        within(LIMIT, settled).await;
        // And it goes on without reading anything again.
        publish(&broker, 200..201).await;
        assert!(!reader.take(200..201).await);
    }
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_group_that_is_ahead_of_its_stream_says_so_and_begins_a_little_before() {
    let server = OwnServer::start(&[]).await;
    let broker = server.connect().await;
    one_partition(&broker).await;
    publish(&broker, 0..5).await;
    let mut reader = Reader::join(&broker).await;
    assert!(!reader.take(0..5).await);
    reader.0.deliveries.close().await.expect("it leaves");
    let _: i64 = server
        .native()
        .await
        .del(TOPIC.as_str())
        .await
        .expect("it is removed");
    publish(&broker, 5..7).await;
    let mut reader = Reader::join(&broker).await;
    assert!(reader.take(5..7).await, "it is told");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_group_whose_place_is_lost_begins_with_what_there_is() {
    let server = OwnServer::start(&[]).await;
    let broker = server.connect().await;
    one_partition(&broker).await;
    publish(&broker, 0..5).await;
    let mut reader = Reader::join(&broker).await;
    reader.take(0..5).await;
    let mut native = server.native().await;
    let _: i64 = native
        .del("eventbus:positions:orders")
        .await
        .expect("it is removed");
    // Whoever gets the partition next.
    let _: i64 = native
        .del("eventbus:group:payments:leases")
        .await
        .expect("it is removed");
    assert!(reader.take(0..5).await, "it is told, and all is read again");
    let epoch: String = native
        .hget("eventbus:group:payments:leases", "orders 0")
        .await
        .expect("it is held again");
    let (epoch, _) = epoch.split_once(' ').expect("with an epoch");
    let epoch: u64 = epoch.parse().expect("a number");
    assert!(epoch > 1_000_000_000_000, "no former owner has it: {epoch}");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_topic_that_is_lost_is_stored_again_by_who_reads_it() {
    let server = OwnServer::start(&[]).await;
    let config = server.config().with_retention(Duration::from_millis(100));
    let broker = RedisBroker::connect(config).await.expect("it answers");
    let spec = TopicSpec::new(TOPIC).with_partitions(3);
    let made = broker.admin(AdminRequest::ApplyTopics(vec![spec])).await;
    made.expect("it is made");
    let _reader = Reader::join(&broker).await;
    let mut native = server.native().await;
    let _: i64 = native.del("eventbus:topics").await.expect("it is removed");
    within(LIMIT, async {
        loop {
            let stored: Option<String> = native
                .hget("eventbus:topics", "orders")
                .await
                .expect("it answers");
            if stored.is_some_and(|stored| stored.starts_with("3 ")) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn who_knew_a_topic_with_other_partitions_publishes_no_more_and_says_why() {
    let server = OwnServer::start(&[]).await;
    let config = server.config().with_retention(Duration::from_millis(100));
    let broker = RedisBroker::connect(config).await.expect("it answers");
    publish(&broker, 0..1).await;
    let mut native = server.native().await;
    let _: i64 = native
        .hset("eventbus:topics", "orders", "7 -")
        .await
        .expect("it is changed");
    within(LIMIT, async {
        loop {
            let published = broker.publish(vec![Message::new(TOPIC, "1")]).await;
            if let Err(error) = published {
                let refused = &error.unpublished[0];
                assert_eq!(refused.outcome, Outcome::NotTaken);
                assert_eq!(refused.error.kind(), ErrorKind::Conflict, "{error}");
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}
