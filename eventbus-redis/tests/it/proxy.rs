//! Replies that are lost, late or refusals, between the client and a real server.

use std::time::Duration;

use eventbus_core::{
    AdminReply, AdminRequest, Broker, Delivery, ErrorKind, Group, Key, Member, Message, Outcome,
    Publisher, Receipt, Signal, Start, Subscriber, Subscription, Topic, TopicSpec, Unpublished,
    Until,
};
use eventbus_redis::{RedisBroker, RedisConfig};
use eventbus_testkit::{FaultProxy, Protocol, RedisCommands, WireFault, within};

use crate::server::Server;

const LIMIT: Duration = Duration::from_secs(60);
/// Messages of a test, of one key.
const MESSAGES: u32 = 200;

/// A client whose wire is harmed at these commands, one whose wire is not, and a topic of one partition.
struct Wire {
    proxy: FaultProxy,
    harmed: RedisBroker,
    direct: RedisBroker,
    topic: Topic,
    _server: Server,
}

impl Wire {
    async fn harmed_at(command: &'static str) -> Self {
        let server = Server::new().await;
        let url = Server::url();
        let address = url.rsplit('@').next().expect("an address");
        let protocol = Protocol::Redis(RedisCommands::of(&[command]));
        let proxy = FaultProxy::start_with(address, protocol).await;
        let proxy = proxy.expect("it starts");
        let config = RedisConfig::from_url(&proxy.url(&url).expect("it has a host"));
        let config = config
            .expect("a good url")
            .with_lease(Duration::from_secs(3));
        let harmed = RedisBroker::connect(config).await.expect("it answers");
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
        let message = Message::new(self.topic.clone(), number.to_string());
        message.with_key(Key::display("one"))
    }

    /// Publishes a message through the harmed wire, and says what came of it.
    async fn refused(&self, number: u32) -> Unpublished {
        let published = within(LIMIT, self.harmed.publish(vec![self.message(number)])).await;
        let mut unpublished = published.expect_err("it is not acknowledged").unpublished;
        unpublished.pop().expect("there is one")
    }

    /// Publishes all messages through the harmed wire, a few at a time and each until it is taken, and
    /// harms it meanwhile.
    async fn publish_under(&self, fault: WireFault) {
        let publish = async {
            for first in (0..MESSAGES).step_by(10) {
                let batch = (first..first + 10).map(|number| self.message(number));
                let mut batch: Vec<_> = batch.collect();
                while let Err(error) = self.harmed.publish(batch).await {
                    assert!(error.is_retryable(), "{error}");
                    batch = error.into_messages();
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let harm = async {
            for _ in 0..3 {
                tokio::time::sleep(Duration::from_millis(5)).await;
                self.proxy.set(fault);
                tokio::time::sleep(Duration::from_millis(100)).await;
                self.proxy.heal();
            }
        };
        within(LIMIT, async { tokio::join!(harm, publish) }).await;
    }

    /// What the topic has.
    async fn stored(&self) -> Vec<u32> {
        let subscription = Subscription::reader(vec![self.topic.clone()]);
        let subscription = subscription.with_start(Start::Earliest);
        let subscription = subscription.with_until(Until::Now);
        let mut reader = self.direct.subscribe(subscription).await.expect("it reads");
        let mut stored = Vec::new();
        loop {
            let signal = within(LIMIT, reader.deliveries.next()).await;
            match signal.expect("it reads") {
                Signal::Delivered(deliveries) => stored.extend(deliveries.iter().map(number)),
                Signal::Ended(_) => return stored,
                _ => {}
            }
        }
    }
}

fn number(delivery: &Delivery) -> u32 {
    let text = std::str::from_utf8(&delivery.message.payload).expect("a text");
    text.parse().expect("a number")
}

/// The messages as they are seen for the first time.
fn first_seen(mut numbers: Vec<u32>) -> Vec<u32> {
    let mut seen = std::collections::HashSet::new();
    numbers.retain(|number| seen.insert(*number));
    numbers
}

/// The next messages of a member, so many.
async fn take(member: &mut Member, count: usize) -> Vec<Delivery> {
    let mut taken = Vec::new();
    while taken.len() < count {
        match within(LIMIT, member.deliveries.next()).await {
            Ok(Signal::Delivered(deliveries)) => taken.extend(deliveries),
            Ok(Signal::Gap { from, to, .. }) => panic!("a gap from {from:?} to {to:?}"),
            Ok(_) => {}
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
    }
    taken
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_message_whose_reply_is_lost_is_unknown_and_may_be_there() {
    let wire = Wire::harmed_at("XADD").await;
    wire.proxy.set(WireFault::LoseResponse);
    let refused = wire.refused(7).await;
    assert_eq!(refused.outcome, Outcome::Unknown, "{}", refused.error);
    assert!(refused.error.is_retryable(), "{}", refused.error);
    wire.proxy.heal();
    assert_eq!(wire.proxy.traffic().responses_lost, 1);
    assert_eq!(wire.stored().await, [7], "the server has taken it");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_repeated_because_its_reply_was_lost_keeps_its_order() {
    let wire = Wire::harmed_at("XADD").await;
    wire.publish_under(WireFault::LoseResponse).await;
    assert!(wire.proxy.traffic().responses_lost > 0);
    let stored = first_seen(wire.stored().await);
    assert_eq!(stored, (0..MESSAGES).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_late_is_there_once_and_in_order() {
    let wire = Wire::harmed_at("XADD").await;
    let late = WireFault::DelayRequest(Duration::from_millis(30));
    wire.publish_under(late).await;
    assert_eq!(wire.stored().await, (0..MESSAGES).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_refused_message_is_said_not_to_be_taken_and_is_not_there() {
    let wire = Wire::harmed_at("XADD").await;
    for (code, kind, is_retryable) in [
        (RedisCommands::LOADING, ErrorKind::Unavailable, true),
        (RedisCommands::READ_ONLY, ErrorKind::Unavailable, true),
        (RedisCommands::OUT_OF_MEMORY, ErrorKind::RateLimited, true),
        (RedisCommands::DISK_FAILED, ErrorKind::Unavailable, true),
        (RedisCommands::NO_PASSWORD, ErrorKind::Unauthorized, false),
        (RedisCommands::NO_PERMISSION, ErrorKind::Unauthorized, false),
    ] {
        wire.proxy.set(WireFault::Misreport(code));
        let Unpublished { outcome, error, .. } = wire.refused(1).await;
        assert_eq!(
            (outcome, error.kind()),
            (Outcome::NotTaken, kind),
            "{error}"
        );
        assert_eq!(error.is_retryable(), is_retryable, "{error}");
    }
    wire.proxy.heal();
    let published = wire.harmed.publish(vec![wire.message(2)]).await;
    published.expect("it is taken on the same connection");
    assert_eq!(wire.stored().await, [2]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn messages_that_are_refused_for_a_while_are_there_once_each() {
    let wire = Wire::harmed_at("XADD").await;
    let fault = WireFault::Misreport(RedisCommands::LOADING);
    wire.publish_under(fault).await;
    assert!(wire.proxy.traffic().responses_misreported > 0);
    let mut stored = wire.stored().await;
    // A part of a batch may be refused and the rest of it not: order is not promised then.
    stored.sort_unstable();
    assert_eq!(stored, (0..MESSAGES).collect::<Vec<_>>());
}

/// Settles half of the messages while scripts are harmed, and looks where the group is then.
async fn half_is_settled_under(fault: WireFault) {
    let wire = Wire::harmed_at("EVAL").await;
    let all = (0..20).map(|number| wire.message(number)).collect();
    wire.direct.publish(all).await.expect("it is published");
    let group = Group::new(wire.topic.as_str()).expect("a good name");
    let subscription = Subscription::group(group.clone(), vec![wire.topic.clone()]);
    let subscription = subscription.with_start(Start::Earliest);
    let joined = wire.harmed.subscribe(subscription.clone()).await;
    let mut member = joined.expect("it joins");
    let taken = take(&mut member, 20).await;
    let half: Vec<Receipt> = taken[..10]
        .iter()
        .map(|delivery| delivery.receipt)
        .collect();
    wire.proxy.set(fault);
    let harm = async {
        tokio::time::sleep(Duration::from_millis(700)).await;
        wire.proxy.heal();
    };
    let settle = async {
        // What has failed is settled again, as a consumer does.
        while let Err(error) = member.settlement.settle(&half).await {
            assert!(error.is_retryable(), "{error}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(LIMIT, async { tokio::join!(settle, harm) }).await;
    let traffic = wire.proxy.traffic();
    assert!(traffic.responses_lost + traffic.responses_misreported > 0);
    let topics = vec![wire.topic.clone()];
    let lag = AdminRequest::Lag { group, topics };
    let AdminReply::Lag(lag) = wire.direct.admin(lag).await.expect("it answers") else {
        panic!("the answer to another question");
    };
    assert_eq!(lag.iter().map(|lane| lane.messages).sum::<u64>(), 10);
    member.deliveries.close().await.expect("it leaves");
    let joined = wire.direct.subscribe(subscription).await;
    let mut next = joined.expect("it joins");
    let left: Vec<u32> = take(&mut next, 10).await.iter().map(number).collect();
    assert_eq!(left, (10..20).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_settlement_whose_reply_is_lost_is_repeated_and_skips_nothing() {
    half_is_settled_under(WireFault::LoseResponse).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_settlement_that_is_refused_is_repeated_and_skips_nothing() {
    half_is_settled_under(WireFault::Misreport(RedisCommands::LOADING)).await;
}

/// Reads all messages as a member while reading is harmed.
async fn all_is_read_under(fault: WireFault) {
    let wire = Wire::harmed_at("XREAD").await;
    let group = Group::new(wire.topic.as_str()).expect("a good name");
    let subscription = Subscription::group(group, vec![wire.topic.clone()]);
    let joined = wire.harmed.subscribe(subscription).await;
    let mut member = joined.expect("it joins");
    let publish = async {
        for number in 0..MESSAGES {
            let published = wire.direct.publish(vec![wire.message(number)]).await;
            published.expect("it is taken");
            if number % 40 == 10 {
                wire.proxy.set(fault);
            }
            if number % 40 == 30 {
                wire.proxy.heal();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        wire.proxy.heal();
    };
    let taking = async {
        let mut taken = Vec::new();
        while taken.len() < MESSAGES as usize {
            let deliveries = take(&mut member, 1).await;
            let done = |it: &Delivery| it.receipt;
            let done: Vec<_> = deliveries.iter().map(done).collect();
            member.settlement.settle(&done).await.expect("it settles");
            taken.extend(deliveries.iter().map(number));
        }
        taken
    };
    let (taken, ()) = within(LIMIT, async { tokio::join!(taking, publish) }).await;
    let traffic = wire.proxy.traffic();
    assert!(traffic.responses_lost + traffic.responses_misreported > 0);
    assert_eq!(taken, (0..MESSAGES).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_page_that_is_lost_is_read_again_and_nothing_is_skipped() {
    all_is_read_under(WireFault::LoseResponse).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_page_that_is_refused_is_read_again_and_nothing_is_skipped() {
    all_is_read_under(WireFault::Misreport(RedisCommands::LOADING)).await;
}
