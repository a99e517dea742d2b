//! Answers that are lost or late, and channels that are closed, between the client and a real server.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use eventbus_core::{
    Delivery, Group, Key, Member, Message, Outcome, Publisher, Receipt, Signal, Subscriber,
    Subscription, Topic, Unpublished,
};
use eventbus_rabbitmq::{RabbitMqBroker, RabbitMqConfig};
use eventbus_testkit::{AmqpMethod, AmqpMethods, FaultProxy, Protocol, WireFault, within};

use crate::server::{Server, create, group, topic};

const LIMIT: Duration = Duration::from_secs(90);
/// Messages of a test, of one key.
const MESSAGES: u32 = 200;
/// The server has an error of its own.
const INTERNAL_ERROR: i16 = 541;

/// A client whose wire is harmed at these methods, one whose wire is not, and a topic of one partition
/// with a group.
struct Wire {
    proxy: FaultProxy,
    harmed: RabbitMqBroker,
    direct: RabbitMqBroker,
    topic: Topic,
    group: Group,
    _server: Server,
}

impl Wire {
    async fn harmed_at(method: AmqpMethod) -> Self {
        Self::with(method, |config| config).await
    }

    async fn with(method: AmqpMethod, change: impl Fn(RabbitMqConfig) -> RabbitMqConfig) -> Self {
        let server = Server::new().await;
        let url = Server::url();
        let address = url.rsplit('@').next().expect("an address");
        let address = address.split('/').next().expect("an address");
        let protocol = Protocol::Amqp(AmqpMethods::of(&[method]));
        let proxy = FaultProxy::start_with(address, protocol).await;
        let proxy = proxy.expect("it starts");
        let config = RabbitMqConfig::from_url(&proxy.url(&url).expect("it has a host"));
        let config = config.expect("a good url");
        let config = config.with_heartbeat(Duration::from_secs(3));
        let harmed = RabbitMqBroker::connect(change(config)).await;
        let direct = server.connect().await.expect("it answers");
        let (topic, group) = (topic("proxy"), group("proxy"));
        create(&direct, &topic, 1).await;
        let wire = Self {
            proxy,
            harmed: harmed.expect("it answers"),
            direct,
            topic,
            group,
            _server: server,
        };
        let member = wire.direct.subscribe(wire.subscription()).await;
        let member = member.expect("its queue is made");
        member.deliveries.close().await.expect("it leaves");
        wire
    }

    fn subscription(&self) -> Subscription {
        Subscription::group(self.group.clone(), vec![self.topic.clone()])
    }

    fn message(&self, number: u32) -> Message {
        let message = Message::new(self.topic.clone(), number.to_string());
        message.with_key(Key::display("one"))
    }

    /// Publishes all messages through the harmed wire, a few at a time, and harms it meanwhile. Answers
    /// how long the slowest took.
    async fn publish_under(&self, fault: WireFault) -> Duration {
        let publish = async {
            let mut slowest = Duration::ZERO;
            for first in (0..MESSAGES).step_by(10) {
                let batch = (first..first + 10).map(|number| self.message(number));
                let begun = Instant::now();
                let published = self.harmed.publish(batch.collect()).await;
                published.expect("it is tried until it is there");
                slowest = slowest.max(begun.elapsed());
                tokio::time::sleep(Duration::from_millis(30)).await;
            }
            slowest
        };
        let harm = async {
            for _ in 0..3 {
                tokio::time::sleep(Duration::from_millis(30)).await;
                self.proxy.set(fault);
                tokio::time::sleep(Duration::from_millis(300)).await;
                self.proxy.heal();
            }
        };
        let (slowest, ()) = within(LIMIT, async { tokio::join!(publish, harm) }).await;
        slowest
    }

    /// What the group gets, up to so many different messages, as they are seen for the first time.
    async fn stored(&self) -> Vec<u32> {
        let mut member = self.direct.subscribe(self.subscription()).await;
        let member = member.as_mut().expect("it joins");
        let mut seen = HashSet::new();
        let mut stored = Vec::new();
        while stored.len() < MESSAGES as usize {
            let taken = take(member, 1).await;
            settle(member, &taken).await;
            let new = taken.iter().map(number).filter(|it| seen.insert(*it));
            stored.extend(new);
        }
        stored
    }
}

fn number(delivery: &Delivery) -> u32 {
    let text = std::str::from_utf8(&delivery.message.payload).expect("a text");
    text.parse().expect("a number")
}

/// The next messages of a member, so many at least.
async fn take(member: &mut Member, count: usize) -> Vec<Delivery> {
    let mut taken = Vec::new();
    while taken.len() < count {
        match within(LIMIT, member.deliveries.next()).await {
            Ok(Signal::Delivered(deliveries)) => taken.extend(deliveries),
            Ok(_) => {}
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
    }
    taken
}

/// Settles, again where that has failed, as a consumer does.
async fn settle(member: &mut Member, deliveries: &[Delivery]) {
    let done: Vec<Receipt> = deliveries.iter().map(|it| it.receipt).collect();
    while let Err(error) = member.settlement.settle(&done).await {
        assert!(error.is_retryable(), "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_published_and_not_confirmed_is_there_in_order() {
    let wire = Wire::harmed_at(AmqpMethod::Publish).await;
    wire.publish_under(WireFault::LoseResponse).await;
    assert!(wire.proxy.traffic().responses_lost > 0);
    assert_eq!(wire.stored().await, (0..MESSAGES).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_message_that_is_never_confirmed_is_unknown() {
    let short = |config: RabbitMqConfig| config.with_publish_timeout(Duration::from_secs(1));
    let wire = Wire::with(AmqpMethod::Publish, short).await;
    wire.proxy.set(WireFault::LoseResponse);
    let published = within(LIMIT, wire.harmed.publish(vec![wire.message(0)])).await;
    let refused = published.expect_err("nobody confirmed it").unpublished;
    let [Unpublished { outcome, error, .. }] = refused.as_slice() else {
        panic!("there is one");
    };
    assert_eq!(*outcome, Outcome::Unknown, "{error}");
    assert!(error.is_retryable(), "{error}");
}

/// Also where it is not known yet whether the topics are there.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_call_ends_in_its_time_when_the_server_says_nothing() {
    let short = |config: RabbitMqConfig| config.with_publish_timeout(Duration::from_secs(1));
    let wire = Wire::with(AmqpMethod::Publish, short).await;
    wire.proxy.set(WireFault::HalfOpen);
    let begun = Instant::now();
    let unknown = (0..3).map(|_| Message::new(topic("unknown"), "x"));
    let published = within(LIMIT, wire.harmed.publish(unknown.collect())).await;
    let refused = published.expect_err("nobody answers").unpublished;
    assert!(refused.iter().all(|it| it.outcome == Outcome::NotTaken));
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_published_while_channels_are_closed_is_there_in_order() {
    let wire = Wire::harmed_at(AmqpMethod::Publish).await;
    wire.publish_under(WireFault::Misreport(INTERNAL_ERROR))
        .await;
    assert!(wire.proxy.traffic().responses_misreported > 0);
    assert_eq!(wire.stored().await, (0..MESSAGES).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_late_is_there_in_order() {
    let wire = Wire::harmed_at(AmqpMethod::Publish).await;
    const LATE: Duration = Duration::from_millis(150);
    let slowest = wire.publish_under(WireFault::DelayRequest(LATE)).await;
    assert!(slowest >= LATE, "{slowest:?}");
    assert_eq!(wire.stored().await, (0..MESSAGES).collect::<Vec<_>>());
}

/// Handles all messages as a member whose settlements are harmed again and again.
async fn all_is_settled_under(fault: WireFault) {
    let wire = Wire::harmed_at(AmqpMethod::DeclareQueue).await;
    let joined = wire.harmed.subscribe(wire.subscription()).await;
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
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        wire.proxy.heal();
    };
    let work = async {
        let mut next = 0;
        while next < MESSAGES {
            let taken = take(&mut member, 1).await;
            for delivery in &taken {
                let number = number(delivery);
                // What was settled and not recorded comes again, and nothing is passed over.
                assert!(number <= next, "{number} before {next}");
                next = next.max(number + 1);
            }
            settle(&mut member, &taken).await;
        }
    };
    within(LIMIT, async { tokio::join!(work, publish) }).await;
    let traffic = wire.proxy.traffic();
    assert!(traffic.responses_lost + traffic.responses_misreported > 0);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_settlement_whose_answer_is_lost_passes_over_nothing() {
    all_is_settled_under(WireFault::LoseResponse).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_settlement_whose_channel_is_closed_passes_over_nothing() {
    all_is_settled_under(WireFault::Misreport(INTERNAL_ERROR)).await;
}
