//! What others do with the streams: what they add is read, and what they remove is a gap.

use std::time::Duration;

use eventbus_core::{
    AdminReply, AdminRequest, Broker, Group, Key, Member, Message, Publisher, Signal, Start,
    Subscriber, Subscription, Topic, TopicSpec, Until,
};
use eventbus_redis::RedisBroker;
use eventbus_testkit::within;
use redis::AsyncCommands;

use crate::own_server::OwnServer;
use crate::server::Server;

const LIMIT: Duration = Duration::from_secs(20);

async fn native() -> redis::aio::MultiplexedConnection {
    let client = redis::Client::open(Server::url()).expect("a good url");
    let connection = client.get_multiplexed_async_connection().await;
    connection.expect("it answers")
}

/// A topic of one partition.
async fn topic(broker: &RedisBroker) -> Topic {
    let topic = Topic::new(&format!("streams-{:016x}", fastrand::u64(..))).expect("a good name");
    let spec = TopicSpec::new(topic.clone()).with_partitions(1);
    let made = broker.admin(AdminRequest::ApplyTopics(vec![spec])).await;
    made.expect("it is made");
    topic
}

async fn publish(broker: &RedisBroker, topic: &Topic, texts: &[&'static str]) {
    let messages = texts.iter().map(|text| Message::new(topic.clone(), *text));
    let published = broker.publish(messages.collect()).await;
    published.expect("it is taken");
}

/// All that a reader gives until the end there is now: texts, and gaps as `-`.
async fn read(broker: &RedisBroker, topic: &Topic) -> Vec<String> {
    let reader = Subscription::reader(vec![topic.clone()]).with_start(Start::Earliest);
    let reader = broker.subscribe(reader.with_until(Until::Now)).await;
    let mut reader = reader.expect("it reads");
    let mut read = Vec::new();
    loop {
        let signal = within(LIMIT, reader.deliveries.next()).await;
        match signal.expect("it goes on") {
            Signal::Delivered(batch) => read.extend(
                batch
                    .iter()
                    .map(|it| String::from_utf8_lossy(&it.message.payload).into_owned()),
            ),
            Signal::Gap { .. } => read.push("-".to_owned()),
            Signal::Ended(_) => return read,
            _ => {}
        }
    }
}

/// Takes and settles so many messages, and no more.
pub(crate) async fn settle(member: &mut Member, wanted: usize) {
    let mut taken = 0;
    while taken < wanted {
        let signal = within(LIMIT, member.deliveries.next()).await;
        if let Signal::Delivered(batch) = signal.expect("it goes on") {
            let done = batch.iter().take(wanted - taken);
            let done: Vec<_> = done.map(|it| it.receipt).collect();
            taken += done.len();
            let settled = member.settlement.settle(&done).await;
            settled.expect("it is recorded");
        }
    }
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_dapr_adds_is_read_with_its_metadata() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let topic = topic(&broker).await;
    let mut native = native().await;
    let fields = [
        ("metadata", r#"{"traceid":"7"}"#),
        ("data", r#"{"specversion":"1.0"}"#),
    ];
    let _: String = native
        .xadd(topic.as_str(), "*", &fields)
        .await
        .expect("it is added");
    let _: String = native
        .xadd(topic.as_str(), "*", &[("order", "5")])
        .await
        .expect("it is added");
    let reader = Subscription::reader(vec![topic.clone()]).with_start(Start::Earliest);
    let mut reader = broker.subscribe(reader).await.expect("it reads");
    let mut messages = Vec::new();
    while messages.len() < 2 {
        let signal = within(LIMIT, reader.deliveries.next()).await;
        if let Signal::Delivered(batch) = signal.expect("it goes on") {
            messages.extend(batch.into_iter().map(|delivery| delivery.message));
        }
    }
    assert_eq!(&messages[0].payload[..], br#"{"specversion":"1.0"}"#);
    assert_eq!(messages[0].headers.get("traceid"), Some(&b"7"[..]));
    assert!(messages[1].payload.is_empty(), "it has no data");
    assert_eq!(messages[1].headers.get("order"), Some(&b"5"[..]));
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_message_arrives_as_it_was_whatever_its_headers_hold() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let topic = topic(&broker).await;
    let mut headers = eventbus_core::Headers::builder();
    for (name, value) in [
        ("data", &b"not the payload"[..]),
        ("a", b""),
        ("b", b"\xff\x00"),
        ("c", b"two\nlines"),
        ("a", b"again"),
        ("h:x", b"1"),
    ] {
        headers = headers.push(name, value).expect("a good header");
    }
    let mut message =
        Message::new(topic.clone(), b"\x00\xff".to_vec()).with_headers(headers.build());
    message.key = Some(Key::new(b"\xfe\n".to_vec()));
    broker
        .publish(vec![message.clone()])
        .await
        .expect("it is taken");
    let reader = Subscription::reader(vec![topic.clone()]).with_start(Start::Earliest);
    let mut reader = broker.subscribe(reader).await.expect("it reads");
    loop {
        let signal = within(LIMIT, reader.deliveries.next()).await;
        if let Signal::Delivered(batch) = signal.expect("it goes on") {
            assert_eq!(batch[0].message, message);
            return;
        }
    }
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_somebody_trims_unread_is_a_gap_and_what_was_read_is_none() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let topic = topic(&broker).await;
    let group = Group::new(topic.as_str()).expect("a good name");
    publish(&broker, &topic, &["1", "2", "3", "4", "5", "6"]).await;
    let take = async |count: usize| {
        let group = Subscription::group(group.clone(), vec![topic.clone()]);
        let limits = group
            .limits
            .with_batch(1)
            .with_messages(1)
            .with_lane_messages(1);
        let joined = broker.subscribe(group.with_limits(limits)).await;
        let mut member = joined.expect("it joins");
        let mut taken = Vec::new();
        while taken.len() < count {
            let signal = within(LIMIT, member.deliveries.next()).await;
            match signal.expect("it goes on") {
                Signal::Delivered(batch) => {
                    for delivery in batch {
                        let text = String::from_utf8_lossy(&delivery.message.payload).into_owned();
                        taken.push(text);
                        let done = [delivery.receipt];
                        member
                            .settlement
                            .settle(&done)
                            .await
                            .expect("it is recorded");
                    }
                }
                Signal::Gap { .. } => taken.push("-".to_owned()),
                _ => {}
            }
        }
        member.deliveries.close().await.expect("it leaves");
        taken
    };
    assert_eq!(take(2).await, ["1", "2"]);
    let mut native = native().await;
    let trim = async |native: &mut redis::aio::MultiplexedConnection, left: usize| {
        let mut trim = redis::cmd("XTRIM");
        trim.arg(topic.as_str()).arg("MAXLEN").arg("=").arg(left);
        let _: i64 = trim.query_async(native).await.expect("it is trimmed");
    };
    trim(&mut native, 4).await;
    assert_eq!(take(1).await, ["3"], "what was read is no gap");
    trim(&mut native, 2).await;
    assert_eq!(take(2).await, ["-", "5"]);
    trim(&mut native, 0).await;
    publish(&broker, &topic, &["7"]).await;
    assert_eq!(take(2).await, ["-", "7"]);
    let _: i64 = native.del(topic.as_str()).await.expect("it is removed");
    publish(&broker, &topic, &["8", "9"]).await;
    assert_eq!(take(3).await, ["-", "8", "9"], "another stream has begun");
    assert_eq!(read(&broker, &topic).await, ["8", "9"]);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_every_group_has_read_is_removed_and_nothing_else() {
    let _server = Server::new().await;
    let config = Server::config().with_retention(Duration::from_millis(100));
    let broker = RedisBroker::connect(config).await.expect("it answers");
    let topic = topic(&broker).await;
    let texts: Vec<String> = (0..1000).map(|number| number.to_string()).collect();
    let messages = texts
        .iter()
        .map(|text| Message::new(topic.clone(), text.clone()));
    broker
        .publish(messages.collect())
        .await
        .expect("it is taken");
    let group = |name: &str| Group::new(&format!("{topic}-{name}")).expect("a good name");
    for name in ["quick", "slow"] {
        let joined = broker
            .subscribe(Subscription::group(group(name), vec![topic.clone()]))
            .await;
        let mut member = joined.expect("it joins");
        let wanted = if name == "quick" { 1000 } else { 500 };
        settle(&mut member, wanted).await;
        member.deliveries.close().await.expect("it leaves");
    }
    let mut native = native().await;
    within(LIMIT, async {
        // Whole nodes of the stream go, of a hundred entries.
        while native
            .xlen::<_, usize>(topic.as_str())
            .await
            .expect("it answers")
            > 600
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let left: usize = native.xlen(topic.as_str()).await.expect("it answers");
    assert!(left >= 500, "{left} are left, and 500 were not read by all");
    let lag = AdminRequest::Lag {
        group: group("slow"),
        topics: vec![topic.clone()],
    };
    let AdminReply::Lag(lag) = broker.admin(lag).await.expect("it answers") else {
        panic!("the answer to another question");
    };
    assert_eq!(lag[0].messages, 500);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn reading_begins_at_a_time_behind_what_came_before_it() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let topic = topic(&broker).await;
    // More than are counted at a time.
    let messages = (0..2500).map(|number| Message::new(topic.clone(), number.to_string()));
    broker
        .publish(messages.collect())
        .await
        .expect("it is taken");
    tokio::time::sleep(Duration::from_millis(5)).await;
    let mut native = native().await;
    let (seconds, micros): (u64, u32) = redis::cmd("TIME")
        .query_async(&mut native)
        .await
        .expect("it answers");
    let time = std::time::UNIX_EPOCH + Duration::new(seconds, micros * 1000);
    let messages = (0..2500).map(|number| Message::new(topic.clone(), format!("late {number}")));
    broker
        .publish(messages.collect())
        .await
        .expect("it is taken");
    let reader = Subscription::reader(vec![topic.clone()]).with_start(Start::Time(time));
    let reader = broker.subscribe(reader.with_until(Until::Now)).await;
    let mut reader = reader.expect("it reads");
    let mut texts = Vec::new();
    loop {
        let signal = within(LIMIT, reader.deliveries.next()).await;
        match signal.expect("it goes on") {
            Signal::Delivered(batch) => {
                let done: Vec<_> = batch.iter().map(|it| it.receipt).collect();
                texts.extend(batch.into_iter().map(|it| it.message.payload));
                reader
                    .settlement
                    .settle(&done)
                    .await
                    .expect("it is recorded");
            }
            Signal::Gap { .. } => panic!("nothing is missing"),
            Signal::Ended(_) => break,
            _ => {}
        }
    }
    assert_eq!(texts.len(), 2500);
    assert_eq!(&texts[0][..], b"late 0");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_somebody_removes_unread_in_the_middle_is_a_gap() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let topic = topic(&broker).await;
    publish(&broker, &topic, &["1", "2", "3", "4"]).await;
    let mut native = native().await;
    let all: redis::streams::StreamRangeReply =
        native.xrange_all(topic.as_str()).await.expect("it answers");
    let _: i64 = native
        .xdel(topic.as_str(), &[&all.ids[2].id])
        .await
        .expect("it is removed");
    assert_eq!(
        read(&broker, &topic).await,
        ["1", "2", "4"],
        "who begins here never had it"
    );
    let group = Group::new(topic.as_str()).expect("a good name");
    let joined = broker
        .subscribe(Subscription::group(group, vec![topic.clone()]))
        .await;
    let mut member = joined.expect("it joins");
    publish(&broker, &topic, &["5", "6", "7"]).await;
    let mut taken = Vec::new();
    let mut take = async |taken: &mut Vec<String>, wanted: usize| {
        while taken.len() < wanted {
            let signal = within(LIMIT, member.deliveries.next()).await;
            match signal.expect("it goes on") {
                Signal::Delivered(batch) => taken.extend(
                    batch
                        .iter()
                        .map(|it| String::from_utf8_lossy(&it.message.payload).into_owned()),
                ),
                Signal::Gap { .. } => taken.push("-".to_owned()),
                _ => {}
            }
        }
    };
    take(&mut taken, 6).await;
    assert_eq!(taken, ["1", "2", "4", "5", "6", "7"]);
    // In one step each, so that nobody reads in between.
    for (script, wanted) in [
        (
            "redis.call('XADD', KEYS[1], '*', 'data', '8')
            local id = redis.call('XADD', KEYS[1], '*', 'data', '9')
            redis.call('XADD', KEYS[1], '*', 'data', '10')
            return redis.call('XDEL', KEYS[1], id)",
            &["-", "8", "10"][..],
        ),
        (
            "return redis.call('XDEL', KEYS[1], redis.call('XADD', KEYS[1], '*', 'data', '11'))",
            &["-"],
        ),
    ] {
        taken.clear();
        let mut remove = redis::cmd("EVAL");
        remove.arg(script).arg(1).arg(topic.as_str());
        let _: i64 = remove.query_async(&mut native).await.expect("it is done");
        publish(&broker, &topic, &["12"]).await;
        take(&mut taken, wanted.len() + 1).await;
        assert_eq!(taken, [wanted, &["12"]].concat());
    }
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn an_id_that_nobody_can_read_holds_up_its_own_partition_and_says_so() {
    let server = OwnServer::start(&[]).await;
    let broker = server.connect().await;
    let (bad, good) = (topic(&broker).await, topic(&broker).await);
    let group = Group::new(good.as_str()).expect("a good name");
    let joined =
        |topic: &Topic| broker.subscribe(Subscription::group(group.clone(), vec![topic.clone()]));
    let mut theirs = joined(&bad).await.expect("it joins");
    let mut ours = joined(&good).await.expect("it joins");
    for member in [&mut theirs, &mut ours] {
        let signal = within(LIMIT, member.deliveries.next()).await;
        assert!(matches!(signal, Ok(Signal::Assigned(_))));
    }
    let says = tokio::spawn(async move {
        loop {
            if let Err(error) = theirs.deliveries.next().await {
                return error;
            }
        }
    });
    let mut native = server.native().await;
    // Microseconds for milliseconds.
    let _: String = native
        .xadd(bad.as_str(), "1764000000000000-0", &[("data", "1")])
        .await
        .expect("it is added");
    publish(&broker, &good, &["1"]).await;
    let signal = within(LIMIT, ours.deliveries.next()).await;
    assert!(
        matches!(signal, Ok(Signal::Delivered(_))),
        "the others go on"
    );
    let error = within(LIMIT, says).await.expect("it ends");
    assert!(error.to_string().contains("id `*`"), "{error}");
    // Whoever publishes is not asked to try for ever.
    let error = broker.publish(vec![Message::new(bad.clone(), "2")]).await;
    let error = error.expect_err("its id cannot be read either");
    assert!(!error.unpublished[0].error.is_retryable(), "{error}");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn who_only_publishes_removes_nothing_and_a_group_is_remembered_as_its_members_say() {
    let server = Server::new().await;
    let reads = server.connect().await.expect("it answers");
    let hasty = Server::config()
        .with_retention(Duration::from_millis(100))
        .with_group_expiry(Duration::from_millis(100));
    let hasty = RedisBroker::connect(hasty).await.expect("it answers");
    let topic = topic(&reads).await;
    let texts: Vec<Message> = (0..1000)
        .map(|it| Message::new(topic.clone(), it.to_string()))
        .collect();
    hasty.publish(texts).await.expect("it is taken");
    let group = |name: &str| Group::new(&format!("{topic}-{name}")).expect("a good name");
    let take = async |broker: &RedisBroker, name: &str, wanted: usize| {
        let joined = broker
            .subscribe(Subscription::group(group(name), vec![topic.clone()]))
            .await;
        let mut member = joined.expect("it joins");
        settle(&mut member, wanted).await;
        member.deliveries.close().await.expect("it leaves");
    };
    take(&reads, "quick", 1000).await;
    take(&reads, "slow", 1).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut native = native().await;
    let left: usize = native.xlen(topic.as_str()).await.expect("it answers");
    assert_eq!(left, 1000, "who publishes has no say");
    // A member that is set up so has one, for what every group has read that is remembered.
    take(&hasty, "hasty", 1000).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let left: usize = native.xlen(topic.as_str()).await.expect("it answers");
    assert!(
        left >= 488,
        "the slow one has not read them, and is remembered for days: {left}"
    );
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_was_read_is_removed_as_fast_as_it_comes() {
    let server = Server::new().await;
    let config = Server::config().with_retention(Duration::from_secs(2));
    let broker = RedisBroker::connect(config).await.expect("it answers");
    let topic = topic(&broker).await;
    let group = Group::new(topic.as_str()).expect("a good name");
    let latest = Subscription::group(group, vec![topic.clone()]).with_start(Start::Latest);
    let mut member = broker.subscribe(latest).await.expect("it joins");
    let all: Vec<_> = (0..25_000)
        .map(|it| Message::new(topic.clone(), it.to_string()))
        .collect();
    broker.publish(all).await.expect("it is taken");
    settle(&mut member, 25_000).await;
    let mut native = native().await;
    // One look is enough for all of them.
    let mut lengths = Vec::new();
    within(LIMIT, async {
        loop {
            let length: usize = native.xlen(topic.as_str()).await.expect("it answers");
            lengths.push(length);
            if length < 100 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    drop(server);
}
