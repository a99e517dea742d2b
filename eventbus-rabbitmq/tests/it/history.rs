//! Topics that are declared with a retention: beside the queues of its groups each partition has a stream,
//! from which it can be read again.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use eventbus_core::{
    AdminReply, AdminRequest, BoxError, Broker, Context, ErrorKind, Event, EventBus, Message,
    Publisher, Replay, Start, Subscriber, Subscription, TopicSpec, Until,
};
use eventbus_testkit::{Probe, within};
use lapin::options::QueueDeleteOptions;

use crate::letters::OrderPlaced;
use crate::server::{Server, create, group, topic};

const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_a_topic_keeps_can_be_replayed_and_no_group_notices() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let prefix = format!("{}.", topic("history"));
    let bus = EventBus::builder(broker).topic_prefix(&prefix).build();
    let spec = TopicSpec::new(OrderPlaced::TOPIC)
        .with_partitions(3)
        .with_retention(DAY);
    within(MINUTE, async {
        bus.apply_topics(&[spec]).await.expect("it is made");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let handler = |seen: &Arc<Mutex<Vec<u64>>>| {
            let seen = Arc::clone(seen);
            move |order: OrderPlaced, _: Context| {
                seen.lock().expect("not poisoned").push(order.order_id);
                async { Ok::<(), BoxError>(()) }
            }
        };
        let name = topic("billing").to_string();
        let consumer = bus.consumer(&name).on(handler(&seen));
        let consumer = consumer.spawn().await.expect("it joins");
        for order_id in 0..100 {
            let published = bus.publish(OrderPlaced { order_id }).await;
            published.expect("it is taken");
        }
        for _ in 0..2 {
            let again = Arc::new(Mutex::new(Vec::new()));
            let replayed = bus.consumer(&name).on(handler(&again));
            let report = replayed.replay(Replay::from(Start::Earliest)).await;
            assert_eq!(report.expect("it is kept").handled, 100);
            let mut again = again.lock().expect("not poisoned").clone();
            again.sort_unstable();
            assert_eq!(again, (0..100).collect::<Vec<_>>());
        }
        while seen.lock().expect("not poisoned").len() < 100 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // What told the readers where the end is was put in no queue.
        let counts = consumer.status().counts;
        assert_eq!((counts.handled, counts.dead_lettered), (100, 0));
        drop(consumer);
    })
    .await;
    bus.close().await.expect("it closes");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_topic_without_a_retention_is_kept_for_its_groups_only_and_says_so() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let orders = topic("orders");
    create(&broker, &orders, 2).await;
    let reader = || {
        let reader = Subscription::reader(vec![orders.clone()]).with_start(Start::Earliest);
        broker.subscribe(reader.with_until(Until::Now))
    };
    let error = reader().await.expect_err("it has no stream");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(
        error.to_string().contains("declare it with a retention"),
        "{error}"
    );
    // From then on it is kept, also where nobody reads.
    let spec = TopicSpec::new(orders.clone())
        .with_partitions(2)
        .with_retention(DAY);
    let applied = broker
        .admin(AdminRequest::ApplyTopics(vec![spec.clone()]))
        .await;
    let Ok(AdminReply::Topics(reports)) = applied else {
        panic!("it is declared: {applied:?}");
    };
    assert!(
        !reports[0].created && reports[0].drift.is_empty(),
        "{reports:?}"
    );
    let messages = (0..10).map(|number| Message::new(orders.clone(), number.to_string()));
    broker
        .publish(messages.collect())
        .await
        .expect("it is kept");
    within(MINUTE, async {
        let mut probe = Probe::new(reader().await.expect("it has streams"));
        let mut texts = probe.collect_texts(10).await;
        texts.sort();
        let wanted: Vec<_> = (0..10).map(|number| number.to_string()).collect();
        assert_eq!(texts, wanted);
        // A group has its own queues, from when it began.
        let members = Subscription::group(group("billing"), vec![orders.clone()]);
        let mut probe = Probe::join(&broker, members).await.expect("it joins");
        probe.hold(2).await;
        broker
            .publish(vec![Message::new(orders.clone(), "late")])
            .await
            .expect("it is taken");
        assert_eq!(probe.collect_texts(1).await, ["late"]);
    })
    .await;
    // Whoever declared it may have ended in the middle: it is completed by who declares it next.
    let raw = server.raw().await;
    let channel = raw.create_channel().await.expect("there is one");
    let name = format!("{orders}:1").as_str().into();
    let deleted = channel.queue_delete(name, QueueDeleteOptions::default());
    deleted.await.expect("it is deleted");
    let applied = broker
        .admin(AdminRequest::ApplyTopics(vec![spec.clone()]))
        .await;
    applied.expect("it is completed");
    within(MINUTE, async {
        let mut probe = Probe::new(reader().await.expect("it has both streams"));
        probe.hear_until(|probe| probe.ended().len() == 2).await;
    })
    .await;
    let longer = spec.with_retention(2 * DAY);
    let applied = broker.admin(AdminRequest::ApplyTopics(vec![longer])).await;
    let Ok(AdminReply::Topics(reports)) = applied else {
        panic!("it is answered: {applied:?}");
    };
    assert!(
        reports[0].drift.join(" ").contains("x-max-age"),
        "{reports:?}"
    );
}
