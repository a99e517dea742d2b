//! What is removed and what is not: by age, by size, for groups that live and groups that do not.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use eventbus_core::{
    AdminReply, AdminRequest, Broker, Clock, Group, Message, Publisher, Subscription, Timestamp,
    Topic, TopicSpec, Until,
};
use eventbus_sql::{SqliteBroker, SqliteConfig};
use eventbus_testkit::{Probe, text_of, within};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions};

use crate::place::Place;

const TOPIC: Topic = Topic::from_static("orders");
const GROUP: Group = Group::from_static("payments");
const LIMIT: Duration = Duration::from_secs(30);
const HOUR: Duration = Duration::from_secs(60 * 60);

/// A date that is set by hand.
#[derive(Debug)]
struct Calendar(AtomicI64);

impl Calendar {
    fn pass(&self, time: Duration) {
        let micros = i64::try_from(time.as_micros()).expect("it is short");
        self.0.fetch_add(micros, Ordering::SeqCst);
    }
}

impl Clock for Calendar {
    fn now(&self) -> Timestamp {
        Timestamp::from_micros(self.0.load(Ordering::SeqCst))
    }
}

struct Stage {
    broker: SqliteBroker,
    calendar: Arc<Calendar>,
    place: Place,
}

impl Stage {
    async fn new(spec: TopicSpec) -> Self {
        let place = Place::new();
        let calendar = Arc::new(Calendar(AtomicI64::new(1_800_000_000_000_000)));
        let config = SqliteConfig::new(place.file("kept.db"))
            .with_clock(Arc::clone(&calendar) as Arc<dyn Clock>)
            .with_group_expiry(24 * HOUR)
            .with_retention_interval(Duration::from_millis(10));
        let broker = SqliteBroker::connect(config).await.expect("it opens");
        let spec = spec.with_partitions(1);
        let applied = broker.admin(AdminRequest::ApplyTopics(vec![spec])).await;
        applied.expect("the topic is created");
        Self {
            broker,
            calendar,
            place,
        }
    }

    /// How the topic differs from this.
    async fn drift(&self, spec: &TopicSpec) -> Vec<String> {
        let request = AdminRequest::ApplyTopics(vec![spec.clone()]);
        let reply = self.broker.admin(request).await;
        let AdminReply::Topics(mut reports) = reply.expect("it answers") else {
            panic!("topics were asked for");
        };
        reports.remove(0).drift
    }

    async fn publish(&self, texts: impl IntoIterator<Item = String>) {
        let messages = texts
            .into_iter()
            .map(|text| Message::new(TOPIC, text).with_key("k"));
        let published = self.broker.publish(messages.collect()).await;
        published.expect("it is taken");
    }

    async fn member(&self) -> Probe {
        let member = Subscription::group(GROUP, vec![TOPIC]);
        let mut probe = Probe::join(&self.broker, member)
            .await
            .expect("it can join");
        within(LIMIT, probe.hold(1)).await;
        probe
    }

    /// Everything there is.
    async fn all(&self) -> Vec<String> {
        let reader = Subscription::reader(vec![TOPIC]).with_until(Until::Now);
        let mut probe = Probe::join(&self.broker, reader)
            .await
            .expect("it can be read");
        let mut all = Vec::new();
        while probe.ended().is_empty() || probe.waiting() > 0 {
            if probe.waiting() == 0 {
                within(LIMIT, probe.step())
                    .await
                    .expect("the reader goes on");
            }
            let batch = probe.collect(probe.waiting()).await;
            probe.settle(&batch).await;
            all.extend(batch.iter().map(text_of));
        }
        all
    }

    /// Waits until that is what there is.
    async fn becomes(&self, expected: &[String]) {
        let waiting = async {
            while self.all().await != expected {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        within(LIMIT, waiting).await;
    }
}

fn texts(from: usize, to: usize) -> Vec<String> {
    (from..to).map(|number| format!("{number:010}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_old_goes_and_what_is_unread_stays() {
    let stage = Stage::new(TopicSpec::new(TOPIC).with_retention(HOUR)).await;
    stage.publish(texts(0, 2500)).await;
    stage.calendar.pass(2 * HOUR);
    stage.publish(texts(2500, 2600)).await;
    // Without a group the old ones go, in several pieces.
    stage.becomes(&texts(2500, 2600)).await;
    let mut probe = stage.member().await;
    let first = probe.collect(50).await;
    probe.settle(&first).await;
    stage.calendar.pass(2 * HOUR);
    // All are too old now: what the group has settled goes, the rest stays.
    stage.becomes(&texts(2550, 2600)).await;
    let rest = within(LIMIT, probe.collect(50)).await;
    probe.settle(&rest).await;
    stage.becomes(&[]).await;
    assert!(probe.gaps().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_much_goes_oldest_first() {
    // Key and text: 11 bytes each.
    let spec = TopicSpec::new(TOPIC).with_retention_bytes(11 * 100);
    let stage = Stage::new(spec).await;
    stage.publish(texts(0, 90)).await;
    stage.publish(texts(90, 350)).await;
    stage.becomes(&texts(250, 350)).await;
    let probe = stage.member().await;
    stage.publish(texts(350, 700)).await;
    let other = Subscription::group(Group::from_static("other"), vec![TOPIC]);
    let mut other = Probe::join(&stage.broker, other)
        .await
        .expect("it can join");
    let all = within(LIMIT, other.collect(450)).await;
    other.settle(&all).await;
    // One group is done, the other one has read nothing.
    assert_eq!(stage.all().await, texts(250, 700));
    drop(probe);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_nobody_has_seen_for_long_expires_and_gets_a_gap() {
    let stage = Stage::new(TopicSpec::new(TOPIC).with_retention(HOUR)).await;
    let mut probe = stage.member().await;
    stage.publish(texts(0, 10)).await;
    let first = within(LIMIT, probe.collect(4)).await;
    probe.settle(&first).await;
    probe.close().await;
    stage.calendar.pass(23 * HOUR);
    stage.publish(texts(10, 11)).await;
    // Not yet: it was seen 23 hours ago.
    stage.becomes(&texts(4, 11)).await;
    stage.calendar.pass(2 * HOUR);
    stage.publish(texts(11, 12)).await;
    stage.becomes(&texts(11, 12)).await;
    let mut probe = stage.member().await;
    let rest = within(LIMIT, probe.collect(1)).await;
    assert_eq!(text_of(&rest[0]), texts(11, 12)[0]);
    let (_, from, to) = probe.gaps()[0];
    assert_eq!((from.0, to.0), (4, 11));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retention_declared_later_is_not_taken_and_its_drift_says_how_to_change_it() {
    let stage = Stage::new(TopicSpec::new(TOPIC)).await;
    stage.publish(texts(0, 20)).await;
    let spec = TopicSpec::new(TOPIC)
        .with_retention(HOUR)
        .with_retention_bytes(11 * 10);
    let drift = stage.drift(&spec).await;
    assert_eq!(drift.len(), 2, "{drift:?}");
    assert_eq!(stage.drift(&spec).await, drift, "it was not changed");

    let mut connection = SqliteConnectOptions::new()
        .filename(stage.place.file("kept.db"))
        .connect()
        .await
        .expect("it opens");
    for difference in drift {
        let (_, statement) = difference.split_once("in the file: ").expect("it is there");
        let statement = AssertSqlSafe(statement.to_owned());
        let executed = sqlx::query(statement).execute(&mut connection).await;
        assert_eq!(executed.expect("it is right").rows_affected(), 1);
    }
    assert!(stage.drift(&spec).await.is_empty());
    stage.becomes(&texts(10, 20)).await;
}
