//! Responses that are lost or wrong, between the client and a real broker.

use std::time::{Duration, SystemTime};

use eventbus_core::{
    AdminReply, AdminRequest, Broker, Delivery, Error, ErrorKind, Group, Key, Member, Message,
    Outcome, Position, Publisher, Receipt, Signal, Start, Subscriber, Subscription, Topic,
    TopicSpec, Until,
};
use eventbus_kafka::KafkaBroker;
use eventbus_testkit::{FaultProxy, KafkaApi, Requests, WireFault, within};

use crate::server::Server;

const LIMIT: Duration = Duration::from_secs(60);
/// Messages of a test, of one key.
const MESSAGES: u32 = 200;

/// A client whose wire is harmed at these requests, one whose wire is not, and a topic of one partition.
struct Wire {
    proxy: FaultProxy,
    harmed: KafkaBroker,
    direct: KafkaBroker,
    topic: Topic,
    _server: Server,
}

impl Wire {
    async fn harmed_at(api: KafkaApi) -> Self {
        let server = Server::new().await;
        let (proxy, config) = Server::proxy(Requests::of(&[api])).await;
        let harmed = KafkaBroker::connect(config).await.expect("it answers");
        let direct = server.connect().await.expect("it answers");
        let topic = Topic::new(&format!("proxy-{:016x}", fastrand::u64(..))).expect("a good name");
        let spec = TopicSpec::new(topic.clone()).with_partitions(1);
        let made = direct.admin(AdminRequest::ApplyTopics(vec![spec])).await;
        made.expect("the topic is made");
        Self {
            proxy,
            harmed,
            direct,
            topic,
            _server: server,
        }
    }

    fn message(&self, number: u32) -> Message {
        let mut message = Message::new(self.topic.clone(), number.to_string());
        message.key = Some(Key::display("one"));
        message
    }

    /// Publishes all messages through the harmed wire, a few at a time, and harms it meanwhile.
    async fn publish_under(&self, fault: WireFault) {
        let publish = async {
            for first in (0..MESSAGES).step_by(10) {
                let batch = (first..first + 10).map(|number| self.message(number));
                let published = self.harmed.publish(batch.collect()).await;
                published.expect("it is tried until it is there");
            }
        };
        let harm = async {
            for _ in 0..3 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                self.proxy.set(fault);
                tokio::time::sleep(Duration::from_millis(500)).await;
                self.proxy.heal();
            }
        };
        within(LIMIT, async { tokio::join!(publish, harm) }).await;
    }

    /// What the topic has.
    async fn stored(&self) -> Vec<u32> {
        let mut subscription = Subscription::reader(vec![self.topic.clone()]);
        subscription.start = Start::Earliest;
        subscription.until = Some(Until::Now);
        read(self.direct.subscribe(subscription).await.expect("it reads")).await
    }
}

/// All that a reader of one partition gives until its end.
async fn read(mut reader: Member) -> Vec<u32> {
    let mut read = Vec::new();
    loop {
        match within(LIMIT, reader.deliveries.next())
            .await
            .expect("it reads")
        {
            Signal::Delivered(deliveries) => read.extend(deliveries.iter().map(number)),
            Signal::Ended(_) => return read,
            _ => {}
        }
    }
}

fn number(delivery: &Delivery) -> u32 {
    let text = std::str::from_utf8(&delivery.message.payload).expect("a text");
    text.parse().expect("a number")
}

/// The next messages of a member, so many.
async fn take(member: &mut Member, count: usize) -> Vec<Delivery> {
    let mut taken = Vec::new();
    while taken.len() < count {
        let signal = within(LIMIT, member.deliveries.next()).await;
        if let Signal::Delivered(deliveries) = signal.expect("it goes on") {
            taken.extend(deliveries);
        }
    }
    taken
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_published_and_not_answered_is_there_once_and_in_order() {
    let wire = Wire::harmed_at(KafkaApi::Produce).await;
    wire.publish_under(WireFault::LoseResponse).await;
    assert!(wire.proxy.traffic().responses_lost > 0);
    assert_eq!(wire.stored().await, (0..MESSAGES).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_published_and_said_not_to_be_is_there_once_and_in_order() {
    const NOT_LEADER: i16 = 6;
    let wire = Wire::harmed_at(KafkaApi::Produce).await;
    wire.publish_under(WireFault::Misreport(NOT_LEADER)).await;
    assert!(wire.proxy.traffic().responses_misreported > 0);
    assert_eq!(wire.stored().await, (0..MESSAGES).collect::<Vec<_>>());
}

/// The client that has lost its place among the broker's producers is replaced: what it had is
/// answered, not as if the bus was closed, and what is published next is taken.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_producer_that_has_lost_its_place_is_replaced() {
    const OUT_OF_ORDER_SEQUENCE_NUMBER: i16 = 45;
    let wire = Wire::harmed_at(KafkaApi::Produce).await;
    let publish = |number| wire.harmed.publish(vec![wire.message(number)]);
    within(LIMIT, publish(0)).await.expect("it is taken");
    wire.proxy
        .set(WireFault::Misreport(OUT_OF_ORDER_SEQUENCE_NUMBER));
    let refused = within(LIMIT, publish(1)).await;
    let refused = refused.expect_err("the broker says that it is out of order");
    let [refused] = refused.unpublished.as_slice() else {
        panic!("{refused}");
    };
    assert_ne!(refused.error.kind(), ErrorKind::Closed, "{}", refused.error);
    assert_eq!(refused.outcome, Outcome::Unknown, "it was stored in truth");
    wire.proxy.heal();
    within(LIMIT, publish(2)).await.expect("by another client");
    assert_eq!(wire.stored().await, [0, 1, 2]);
}

/// Settles half of the messages while commits are harmed, and looks where the group is then.
async fn half_is_settled_under(fault: WireFault) {
    let wire = Wire::harmed_at(KafkaApi::OffsetCommit).await;
    let all = (0..20).map(|number| wire.message(number)).collect();
    wire.direct.publish(all).await.expect("it is published");
    let group = Group::new(wire.topic.as_str()).expect("a good name");
    let subscription = || {
        let mut subscription = Subscription::group(group.clone(), vec![wire.topic.clone()]);
        subscription.start = Start::Earliest;
        subscription
    };
    let mut member = wire
        .harmed
        .subscribe(subscription())
        .await
        .expect("it joins");
    let taken = take(&mut member, 20).await;
    let half: Vec<Receipt> = taken[..10]
        .iter()
        .map(|delivery| delivery.receipt)
        .collect();
    wire.proxy.set(fault);
    let harm = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        wire.proxy.heal();
    };
    let settle = async {
        // What has failed is settled again, as a consumer does.
        while member.settlement.settle(&half).await.is_err() {}
    };
    within(LIMIT, async { tokio::join!(settle, harm) }).await;
    let traffic = wire.proxy.traffic();
    assert!(traffic.responses_lost + traffic.responses_misreported > 0);
    let topics = vec![wire.topic.clone()];
    let lag = AdminRequest::Lag {
        group: group.clone(),
        topics,
    };
    let AdminReply::Lag(lag) = wire.direct.admin(lag).await.expect("it answers") else {
        panic!("the answer to another question");
    };
    assert_eq!(lag.iter().map(|lane| lane.messages).sum::<u64>(), 10);
    member.deliveries.close().await.expect("it leaves");
    let mut next = wire
        .direct
        .subscribe(subscription())
        .await
        .expect("it joins");
    let left: Vec<u32> = take(&mut next, 10).await.iter().map(number).collect();
    assert_eq!(left, (10..20).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_commit_whose_answer_is_lost_is_repeated_and_skips_nothing() {
    half_is_settled_under(WireFault::LoseResponse).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_commit_that_is_said_to_have_failed_is_repeated_and_skips_nothing() {
    const COORDINATOR_NOT_AVAILABLE: i16 = 15;
    half_is_settled_under(WireFault::Misreport(COORDINATOR_NOT_AVAILABLE)).await;
}

/// Librdkafka may never get to send a commit, and does not join its group again before.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_member_whose_commit_is_not_answered_joins_anew() {
    let wire = Wire::harmed_at(KafkaApi::OffsetCommit).await;
    let all = (0..20).map(|number| wire.message(number)).collect();
    wire.direct.publish(all).await.expect("it is published");
    let group = Group::new(wire.topic.as_str()).expect("a good name");
    let subscription = Subscription::group(group, vec![wire.topic.clone()]);
    let subscription = subscription.with_start(Start::Earliest);
    let mut member = within(LIMIT, wire.harmed.subscribe(subscription))
        .await
        .expect("it joins");
    let taken = take(&mut member, 20).await;
    let settled = [taken[0].receipt];
    wire.proxy.set(WireFault::DelayRequest(LIMIT));
    let settled = within(LIMIT, member.settlement.settle(&settled)).await;
    settled.expect("what is lost has nothing to settle");
    wire.proxy.heal();
    let lost = within(LIMIT, member.deliveries.next()).await;
    let lost = lost.expect("it goes on");
    assert!(
        matches!(&lost, Signal::Lost(lanes) if lanes == &[taken[0].receipt.lane]),
        "{lost:?}"
    );
    let again = take(&mut member, 20).await;
    assert_eq!(number(&again[0]), 0, "its commit was not taken");
    let all: Vec<_> = again.iter().map(|it| it.receipt).collect();
    let settled = within(LIMIT, member.settlement.settle(&all)).await;
    settled.expect("by another client");
    let closed = within(LIMIT, member.deliveries.close()).await;
    closed.expect("it leaves");
}

/// What a broker answers to a request that it does not know in this version.
const UNSUPPORTED_VERSION: i16 = 35;
/// An error says what is wrong within this time.
const SOON: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_broker_that_is_too_old_to_publish_to_is_said_to_be() {
    let wire = Wire::harmed_at(KafkaApi::Produce).await;
    wire.proxy.set(WireFault::Misreport(UNSUPPORTED_VERSION));
    let published = within(SOON, wire.harmed.publish(vec![wire.message(0)])).await;
    let error = Error::from(published.expect_err("it is not taken"));
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("2.4 or later"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_broker_that_is_too_old_for_our_groups_is_said_to_be() {
    // Its first place is recorded before it joins.
    let wire = Wire::harmed_at(KafkaApi::OffsetCommit).await;
    wire.proxy.set(WireFault::Misreport(UNSUPPORTED_VERSION));
    let group = Group::new(wire.topic.as_str()).expect("a good name");
    let subscription = Subscription::group(group, vec![wire.topic.clone()]);
    let joined = within(SOON, wire.harmed.subscribe(subscription)).await;
    let error = joined.expect_err("it is not let in");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("2.4 or later"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_comes_while_a_reader_asks_where_a_time_is_belongs_behind_it() {
    let wire = Wire::harmed_at(KafkaApi::ListOffsets).await;
    wire.proxy
        .set(WireFault::DelayRequest(Duration::from_millis(300)));
    let now = SystemTime::now();
    // Kafka has the times of messages in whole milliseconds: what follows at once would be of the same.
    tokio::time::sleep(Duration::from_millis(2)).await;
    let reader = Subscription::reader(vec![wire.topic.clone()]);
    let before = reader.clone().with_start(Start::Earliest);
    let before = wire.harmed.subscribe(before.with_until(Until::Time(now)));
    let after = wire.harmed.subscribe(
        reader
            .with_start(Start::Time(now))
            .with_until(Until::Position(Position(5))),
    );
    let publish = async {
        for number in 0..30 {
            let published = wire.direct.publish(vec![wire.message(number)]).await;
            published.expect("it is there");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let (before, after, ()) = within(LIMIT, async { tokio::join!(before, after, publish) }).await;
    assert_eq!(read(before.expect("it reads")).await, Vec::<u32>::new());
    assert_eq!(read(after.expect("it reads")).await, [0, 1, 2, 3, 4]);
}
