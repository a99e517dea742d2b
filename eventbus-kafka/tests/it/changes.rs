//! Topics that change while they are read, and set-ups beside the default.

use std::time::{Duration, SystemTime};

use eventbus_core::{
    AdminRequest, Broker, Group, Key, Message, Position, Publisher, Start, Subscription, Topic,
    TopicSpec, Until, partition_of,
};
use eventbus_kafka::{KafkaBroker, KafkaConfig};
use eventbus_testkit::{Probe, Requests, WireFault, text_of, within};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions};
use rdkafka::client::DefaultClientContext;

use crate::server::Server;

const MINUTE: Duration = Duration::from_secs(60);

fn topic() -> Topic {
    let name = format!("changes-{:016x}", fastrand::u64(..));
    Topic::new(&name).expect("a good name")
}

fn group() -> Group {
    let name = format!("changes-{:016x}", fastrand::u64(..));
    Group::new(&name).expect("a good name")
}

async fn connect(config: KafkaConfig) -> KafkaBroker {
    KafkaBroker::connect(config).await.expect("it answers")
}

async fn create(broker: &KafkaBroker, topic: &Topic, partitions: u32) {
    let spec = TopicSpec::new(topic.clone()).with_partitions(partitions);
    let applied = broker.admin(AdminRequest::ApplyTopics(vec![spec])).await;
    applied.expect("it is created");
}

async fn publish(broker: &KafkaBroker, topic: &Topic, key: &Key, texts: &[&str]) {
    let message = |text: &&str| Message::new(topic.clone(), text.to_string()).with_key(key.clone());
    let messages = texts.iter().map(message).collect();
    broker.publish(messages).await.expect("it is taken");
}

async fn join(broker: &KafkaBroker, subscription: Subscription) -> Probe {
    Probe::join(broker, subscription).await.expect("it joins")
}

/// A key for each partition, by its number.
fn keys_of<const PARTITIONS: usize>() -> [Key; PARTITIONS] {
    std::array::from_fn(|partition| {
        let mut keys = (0..).map(Key::display);
        let key = keys.find(|key| partition_of(key, PARTITIONS as u32) as usize == partition);
        key.expect("there is one")
    })
}

/// Takes so many texts, over errors that pass.
async fn collect(probe: &mut Probe, count: usize) -> Vec<String> {
    while probe.waiting() < count {
        if let Err(error) = probe.step().await {
            assert!(error.is_retryable(), "the member goes on: {error}");
        }
    }
    probe.collect_texts(count).await
}

/// A client that does what operators do.
fn operator() -> AdminClient<DefaultClientContext> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", Server::config().servers);
    config.create().expect("a good configuration")
}

/// New ones of a topic are looked for often.
fn looking_often() -> KafkaConfig {
    let config = Server::config().with_option("topic.metadata.refresh.interval.ms", "500");
    config.expect("it may be set")
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_partition_that_is_added_is_read_from_its_beginning() {
    let _server = Server::new().await;
    let broker = connect(looking_often()).await;
    let orders = topic();
    create(&broker, &orders, 1).await;
    let subscription = Subscription::group(group(), vec![orders.clone()]);
    // Also of a group that began with what came then: it has been there all the time.
    let mut probe = join(&broker, subscription.with_start(Start::Latest)).await;
    let more = NewPartitions::new(orders.as_str(), 2);
    let added = operator()
        .create_partitions([&more], &AdminOptions::new())
        .await;
    added.expect("it is answered")[0]
        .as_ref()
        .expect("there are two now");
    // A client that knows of both.
    let publisher = connect(Server::config()).await;
    let [_, key] = &keys_of::<2>();
    publish(&publisher, &orders, key, &["a", "b"]).await;
    within(MINUTE, async {
        assert_eq!(collect(&mut probe, 2).await, ["a", "b"]);
        assert_eq!(probe.assigned().len(), 2);
        assert!(probe.gaps().is_empty());
    })
    .await;
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_topic_that_is_created_anew_is_a_gap_and_read_from_its_beginning() {
    let _server = Server::new().await;
    let (proxy, config) = Server::proxy(Requests::of(&[])).await;
    let broker = connect(config).await;
    let orders = topic();
    create(&broker, &orders, 1).await;
    let key = Key::from("k");
    publish(&broker, &orders, &key, &["a", "b", "c"]).await;
    let subscription = Subscription::group(group(), vec![orders.clone()]);
    let mut probe = join(&broker, subscription).await;
    within(MINUTE, async {
        assert_eq!(collect(&mut probe, 3).await, ["a", "b", "c"]);
        // The member does not see it missing: its group would take the partition away, place and all.
        proxy.set(WireFault::HalfOpen);
        let deleted = operator()
            .delete_topics(&[orders.as_str()], &AdminOptions::new())
            .await;
        deleted.expect("it is answered")[0]
            .as_ref()
            .expect("it is deleted");
        let anew = connect(Server::config()).await;
        let spec = TopicSpec::new(orders.clone()).with_partitions(1);
        while anew
            .admin(AdminRequest::ApplyTopics(vec![spec.clone()]))
            .await
            .is_err()
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        publish(&anew, &orders, &key, &["d"]).await;
        proxy.heal();
        assert_eq!(collect(&mut probe, 1).await, ["d"]);
        // Whether "c" was the last of the old one, nobody can say.
        let gaps = probe.gaps().iter().map(|(_, from, to)| (from.0, to.0));
        assert_eq!(gaps.collect::<Vec<_>>(), [(3, 0)]);
    })
    .await;
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_group_begins_on_a_topic_that_it_adds_where_it_says() {
    let _server = Server::new().await;
    let broker = connect(Server::config()).await;
    let (orders, payments) = (topic(), topic());
    create(&broker, &orders, 1).await;
    create(&broker, &payments, 3).await;
    // One for each partition: each is begun by itself.
    let keys = keys_of::<3>();
    for key in &keys {
        publish(&broker, &payments, key, &["before"]).await;
    }
    let group = group();
    let old = Subscription::group(group.clone(), vec![orders.clone()]);
    let mut old = join(&broker, old).await;
    let both = Subscription::group(group, vec![orders, payments.clone()]);
    // The group has members, so that nobody may say for it where it begins but who has the partition.
    let mut both = join(&broker, both.with_start(Start::Latest)).await;
    within(MINUTE, async {
        while both
            .assigned()
            .iter()
            .filter(|it| it.topic == payments)
            .count()
            < 3
        {
            tokio::select! {
                step = old.step() => step.expect("it goes on"),
                step = both.step() => step.expect("it goes on"),
            }
        }
        // Where it begins is being looked for, while it asks for messages and gets none.
        let asking = async {
            loop {
                both.step().await.expect("it goes on");
            }
        };
        let begun = tokio::time::timeout(Duration::from_secs(5), asking).await;
        assert!(begun.is_err(), "it asks without an end");
        assert_eq!(both.waiting(), 0);
        for key in &keys {
            publish(&broker, &payments, key, &["after"]).await;
        }
        assert_eq!(collect(&mut both, 3).await, ["after"; 3]);
    })
    .await;
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_reader_until_a_time_to_come_ends_when_it_has_come() {
    let _server = Server::new().await;
    let broker = connect(Server::config()).await;
    let orders = topic();
    create(&broker, &orders, 2).await;
    let (first, second) = (Key::from("a"), Key::from("b"));
    publish(&broker, &orders, &first, &["before"]).await;
    let until = SystemTime::now() + Duration::from_secs(8);
    let subscription = Subscription::reader(vec![orders.clone()]);
    let subscription = subscription
        .with_start(Start::Earliest)
        .with_until(Until::Time(until));
    let mut probe = join(&broker, subscription).await;
    within(MINUTE, async {
        publish(&broker, &orders, &second, &["in time"]).await;
        let mut read = collect(&mut probe, 2).await;
        read.sort();
        assert_eq!(read, ["before", "in time"]);
        if let Ok(left) = until.duration_since(SystemTime::now()) {
            assert!(probe.ended().is_empty(), "its time has not come");
            tokio::time::sleep(left).await;
        }
        publish(&broker, &orders, &first, &["too late"]).await;
        while probe.ended().len() < 2 {
            probe.step().await.expect("it goes on");
        }
        assert_eq!(probe.waiting(), 0, "what came later is not read");
    })
    .await;
}

/// A byte of a message is changed where the broker keeps it; it gives out what it has.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_batch_that_is_damaged_stops_its_partition_and_no_other() {
    let _server = Server::new().await;
    let broker = connect(Server::config()).await;
    let orders = topic();
    create(&broker, &orders, 2).await;
    let keys = keys_of::<2>();
    publish(&broker, &orders, &keys[0], &["whole"]).await;
    publish(&broker, &orders, &keys[0], &["to be damaged"]).await;
    publish(&broker, &orders, &keys[0], &["behind it"]).await;
    let log = Server::log_of(&orders, 0);
    let mut bytes = std::fs::read(&log).expect("the broker keeps it there");
    let place = bytes.windows(13).position(|it| it == b"to be damaged");
    bytes[place.expect("it is there")] ^= 1;
    std::fs::write(&log, bytes).expect("it can be changed");
    let mut probe = join(&broker, Subscription::group(group(), vec![orders.clone()])).await;
    within(MINUTE, async {
        assert_eq!(collect(&mut probe, 1).await, ["whole"]);
        publish(&broker, &orders, &keys[1], &["elsewhere"]).await;
        let mut complaints = Vec::new();
        while probe.waiting() < 1 || complaints.is_empty() {
            if let Err(error) = probe.step().await {
                assert!(error.is_retryable(), "the member goes on: {error}");
                complaints.push(error.to_string());
            }
        }
        assert_eq!(probe.collect_texts(1).await, ["elsewhere"]);
        assert!(
            complaints.iter().any(|it| it.contains("cannot be read")),
            "{complaints:?}"
        );
        // What lies behind it would be settled over it.
        let more = tokio::time::timeout(Duration::from_secs(2), async {
            while probe.waiting() == 0 {
                let _ = probe.step().await;
            }
        });
        assert!(more.await.is_err(), "it was read over");
    })
    .await;
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn messages_compressed_by_any_means_arrive_unchanged() {
    let _server = Server::new().await;
    let orders = topic();
    let reader = connect(Server::config()).await;
    create(&reader, &orders, 1).await;
    let kinds = ["none", "gzip", "snappy", "lz4", "zstd"];
    for kind in kinds {
        let config = Server::config().with_option("compression.type", kind);
        let broker = connect(config.expect("it may be set")).await;
        let text = kind.repeat(1000);
        publish(&broker, &orders, &Key::from("k"), &[&text, &text]).await;
    }
    within(MINUTE, async {
        let all = Subscription::group(group(), vec![orders]);
        let mut probe = join(&reader, all).await;
        let texts = collect(&mut probe, 2 * kinds.len()).await;
        for (kind, pair) in kinds.iter().zip(texts.chunks(2)) {
            assert!(pair.iter().all(|text| *text == kind.repeat(1000)), "{kind}");
        }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn the_newer_protocol_of_groups_shares_out_and_goes_on() {
    let _server = Server::new().await;
    // Its heartbeats are the brokers' business.
    let config = KafkaConfig::from_url(&Server::url()).expect("a good url");
    let config = config.with_option("group.protocol", "consumer");
    let config = config.expect("it may be set");
    let broker = connect(config).await;
    let orders = topic();
    create(&broker, &orders, 2).await;
    let subscription = Subscription::group(group(), vec![orders.clone()]);
    within(2 * MINUTE, async {
        let mut first = join(&broker, subscription.clone()).await;
        first.hold(2).await;
        publish(&broker, &orders, &Key::from("k"), &["a", "b"]).await;
        let deliveries = first.collect(2).await;
        assert_eq!(text_of(&deliveries[0]), "a");
        first.settle(&deliveries[..1]).await;
        first.close().await;
        let mut second = join(&broker, subscription).await;
        assert_eq!(second.collect_texts(1).await, ["b"]);
        assert_eq!(deliveries[1].position, Some(Position(1)));
    })
    .await;
}
