//! The database before it is damaged: every table has rows.

use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use eventbus_core::{
    AdminRequest, Broker, EventBus, EventId, Group, HeldName, HoldEntry, Key, KeyAction,
    KeyDecision, KeyStateDesk, KeyStateStore, LeaseRequest, LeaseStore, LeaseTopic, MemberId,
    Message, OUTBOX_LANES, Origin, OutboxStore, Position, Publisher, ScheduleStore, Scheduled,
    Subscription, Timestamp, Topic, TopicPartition, TopicSpec, Wait,
};
use eventbus_sql::{SqliteBroker, SqliteConfig};
use eventbus_testkit::Probe;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};

use crate::handling::OrderCreated;

pub(super) const ORDERS: Topic = Topic::from_static("orders");
pub(super) const PAYMENTS: Group = Group::from_static("payments");
pub(super) const RELAYS: Group = Group::from_static("relays");
/// More than there are, and less than a page.
const MESSAGES: usize = 40;
/// Messages from this size on are read alone.
const LARGE: usize = 17 * 1024;

/// A file, and the messages that it holds.
pub(super) struct Sound {
    pub(super) file: Vec<u8>,
    /// In the order of the log.
    pub(super) log: Vec<Message>,
    pub(super) held: Vec<Message>,
    pub(super) scheduled: Vec<Message>,
    pub(super) outbox: Vec<Message>,
}

pub(super) static SOUND: LazyLock<Sound> = LazyLock::new(|| {
    let place = tempfile::tempdir().expect("a directory can be made");
    let path = place.path().join("sound.db");
    // A thread of its own: the first to ask may be a runtime's.
    let filled = std::thread::scope(|scope| {
        let filling = scope.spawn(|| crate::runtime().block_on(fill(&path)));
        filling.join()
    });
    filled.expect("the SDK fills a database")
});

pub(super) fn config(path: &Path) -> SqliteConfig {
    SqliteConfig::new(path).with_busy_timeout(Duration::from_millis(300))
}

pub(super) fn place() -> TopicPartition {
    TopicPartition::new(ORDERS, 0)
}

pub(super) fn lanes() -> Vec<u32> {
    (0..OUTBOX_LANES).collect()
}

pub(super) fn lease_topics() -> Vec<LeaseTopic> {
    vec![LeaseTopic {
        name: Topic::from_static("outbox"),
        partitions: 4,
    }]
}

async fn fill(path: &Path) -> Sound {
    let broker = SqliteBroker::connect(config(path)).await.expect("it opens");
    let log = publish(&broker).await;
    let held = hold(&broker).await;
    let scheduled = schedule(&broker).await;
    let outbox = append(&broker).await;
    let store = broker.key_state();
    let wanted = TopicPartition::new(Topic::from_static("outbox"), 0);
    let ttl = Duration::from_secs(3600);
    let request = LeaseRequest::new(RELAYS, MemberId::random(), lease_topics(), ttl);
    let leased = store.exchange(&request.with_wanted(vec![wanted])).await;
    leased.expect("the lease is free");
    drop(store);
    broker.close().await.expect("it closes");
    drop(broker);

    let options = SqliteConnectOptions::new().filename(path);
    let mut connection = options.connect().await.expect("it is a database");
    let inbox = "INSERT INTO eventbus_inbox VALUES ('payments', '1', 1)";
    let handled = sqlx::raw_sql(inbox).execute(&mut connection).await;
    handled.expect("there is an inbox");
    let checkpoint = sqlx::raw_sql("PRAGMA wal_checkpoint(TRUNCATE)");
    let written = checkpoint.execute(&mut connection).await;
    written.expect("nobody else has it open");
    connection.close().await.expect("it closes");
    Sound {
        file: std::fs::read(path).expect("it is there"),
        log,
        held,
        scheduled,
        outbox,
    }
}

fn message(number: usize) -> Message {
    let headers = eventbus_core::Headers::builder()
        .push("eb-id", number.to_string())
        .and_then(|headers| headers.push("content-type", "application/json"));
    let size = if number == 7 { LARGE } else { 100 };
    Message::new(ORDERS, format!("{number:>size$}"))
        .with_key("k")
        .with_headers(headers.expect("within limits").build())
}

/// A topic that a group has read a part of, and that keeps its messages for a while.
async fn publish(broker: &SqliteBroker) -> Vec<Message> {
    let orders = TopicSpec::new(ORDERS)
        .with_partitions(1)
        .with_retention(Duration::from_secs(365 * 24 * 60 * 60));
    let applied = broker.admin(AdminRequest::ApplyTopics(vec![orders])).await;
    applied.expect("it is created");
    let messages: Vec<_> = (0..MESSAGES).map(message).collect();
    let taken = broker.publish(messages.clone()).await;
    taken.expect("they are taken");
    let member = Subscription::group(PAYMENTS, vec![ORDERS]);
    let mut probe = Probe::join(broker, member).await.expect("it can join");
    let first = probe.collect(4).await;
    probe.settle(&first).await;
    probe.close().await;
    messages
}

/// A key that waits, a message that is parked, and a decision about it.
async fn hold(broker: &SqliteBroker) -> Vec<Message> {
    let store = broker.key_state();
    let (claim, _) = store.claim(&PAYMENTS, &place()).await.expect("it is free");
    let (parked, mut later) = (Wait::nothing(), Wait::nothing());
    later.until = Some(Timestamp::from_micros(1));
    later.attempts = 3;
    let name = HeldName::Key(Key::from("k"));
    let single = HeldName::Message(EventId::from_name("held"));
    let entries = [
        HoldEntry::new(name.clone(), message(1), Some(Position(1)), later.clone()),
        HoldEntry::new(name, message(2), Some(Position(2)), later),
        HoldEntry::new(single.clone(), message(3), None, parked),
    ];
    store.hold(&claim, &entries).await.expect("they are held");
    let listed = store
        .list(&PAYMENTS, None, 10)
        .await
        .expect("they are listed");
    let held = listed.iter().map(|report| &report.held);
    let held = held.clone().find(|held| held.name == single);
    let decision = KeyDecision::new(KeyAction::Retry, "ann", "try", Timestamp::from_micros(5));
    let decided = store
        .decide(&PAYMENTS, held.expect("it is held"), &decision)
        .await;
    assert!(decided.expect("it is noted"));
    [1, 2, 3].map(message).to_vec()
}

async fn schedule(broker: &SqliteBroker) -> Vec<Message> {
    let far = Timestamp::from_micros(i64::MAX / 2);
    let due = [Timestamp::from_micros(1), Timestamp::from_micros(2), far];
    let messages: Vec<_> = (10..13).map(message).collect();
    let scheduled = messages.iter().zip(due).enumerate();
    let scheduled = scheduled.map(|(number, (message, due))| {
        Scheduled::new(
            EventId::from_name(&number.to_string()),
            due,
            message.clone(),
        )
    });
    let scheduled: Vec<_> = scheduled.collect();
    let added = broker.schedule().add(&scheduled).await;
    added.expect("they are added");
    messages
}

async fn append(broker: &SqliteBroker) -> Vec<Message> {
    let bus = EventBus::new(broker.clone());
    let store = broker.key_state();
    let outbox = store.outbox(&bus);
    let mut transaction = outbox.begin(Origin::new()).await.expect("it begins");
    for number in 0..3 {
        let published = transaction.publish(OrderCreated::new(number));
        published.expect("it can be written");
    }
    transaction.commit().await.expect("it commits");
    let waiting = store.next(&lanes(), 10, &[]).await.expect("they wait");
    waiting.into_iter().map(|waiting| waiting.message).collect()
}
