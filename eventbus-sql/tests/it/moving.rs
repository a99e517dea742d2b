//! A service moves from one broker to another under load: each event takes effect once, in the order
//! of its key, and nothing goes to the new broker before the old one is drained.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use eventbus_core::{
    BoxError, Consumer, Context, Event, EventBus, Json, Key, Origin, Relay, RelayHandle, Result,
    RetryPolicy, Topic, TopicSpec, Undrained, unknown_version,
};
use eventbus_sql::{SqliteBroker, SqliteConfig, SqliteStore};
use eventbus_testkit::within;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::place::Place;

const LIMIT: Duration = Duration::from_secs(120);
const KEYS: i64 = 40;
const PAUSE: Duration = Duration::from_millis(5);

macro_rules! event {
    ($name:ident on $topic:literal) => {
        #[derive(Clone, Serialize, Deserialize)]
        struct $name {
            key: i64,
            number: i64,
        }

        impl Event for $name {
            const TYPE: &'static str = stringify!($name);
            const TOPIC: Topic = Topic::from_static($topic);
            const VERSION: u32 = 1;
            type Codec = Json;

            fn key(&self) -> Option<Key> {
                Some(Key::display(self.key))
            }

            fn upcast(version: u32, _: &[u8]) -> Result<Self> {
                Err(unknown_version::<Self>(version))
            }
        }
    };
}

event!(Placed on "moving-orders");
event!(Reserved on "moving-stock");

const TOPICS: [Topic; 2] = [Placed::TOPIC, Reserved::TOPIC];

/// A shop whose database is its own, between two brokers.
struct Shop {
    place: Place,
    store: SqliteStore,
    old: EventBus,
    new: EventBus,
}

/// A relay that runs.
struct Running {
    handle: RelayHandle,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<()>>,
}

impl Running {
    fn start(relay: Relay) -> Self {
        let (stop, stopped) = oneshot::channel();
        let handle = relay.handle();
        let signal = async {
            // Dropped is stopped, too.
            let _ = stopped.await;
        };
        let task = tokio::spawn(relay.run_until(signal));
        Self { handle, stop, task }
    }

    async fn stop(self) {
        drop(self.stop);
        let ended = self.task.await.expect("it does not panic");
        ended.expect("it ends well");
    }

    fn reason(&self) -> String {
        self.handle.status().error.unwrap_or_default()
    }
}

impl Shop {
    async fn open() -> Self {
        let place = Place::new();
        let store = SqliteConfig::new(place.file("shop.db"));
        let store = SqliteStore::connect(store).await.expect("it opens");
        let (old, new) = (broker(&place, "old").await, broker(&place, "new").await);
        let shop = Self {
            place,
            store,
            old,
            new,
        };
        let mut tx = shop.begin().await;
        sqlx::raw_sql(
            "CREATE TABLE placed (number INTEGER PRIMARY KEY, key INTEGER);
             CREATE TABLE reserved (place INTEGER PRIMARY KEY, key INTEGER, number INTEGER);
             CREATE TABLE booked (place INTEGER PRIMARY KEY, key INTEGER, number INTEGER)",
        )
        .execute(&mut *tx)
        .await
        .expect("tables");
        tx.commit().await.expect("it commits");
        shop
    }

    async fn begin(&self) -> eventbus_sql::SqliteTransaction {
        let outbox = self.store.outbox(&self.old);
        let begun = outbox.begin(Origin::new()).await;
        begun.expect("a transaction begins")
    }

    /// A request: an order and its event.
    async fn order(&self, number: i64) {
        let key = number % KEYS;
        let mut tx = self.begin().await;
        sqlx::query("INSERT INTO placed (number, key) VALUES (?, ?)")
            .bind(number)
            .bind(key)
            .execute(&mut *tx)
            .await
            .expect("an order");
        tx.publish(Placed { key, number }).expect("an event");
        tx.commit().await.expect("it commits");
    }

    /// Two groups of one service: what the first publishes the second handles.
    async fn consume(&self, bus: &EventBus) -> [Consumer; 2] {
        let stock = bus
            .consumer("stock")
            .unit(self.store.clone())
            .retry(RetryPolicy::none())
            .on(reserve);
        let books = bus.consumer("books").unit(self.store.clone()).on(book);
        [
            stock.spawn().await.expect("it starts"),
            books.spawn().await.expect("it starts"),
        ]
    }

    fn old_relay(&self) -> Relay {
        self.store.outbox(&self.old).relay().batch(50)
    }

    fn new_relay(&self) -> Relay {
        let relay = self.store.outbox(&self.new).relay().batch(50);
        let relay = relay.target("new").expect("a name");
        relay.after(self.old.drained(&TOPICS))
    }

    async fn count(&self, table: &str) -> i64 {
        let sql = sqlx::AssertSqlSafe(format!("SELECT count(*) FROM {table}"));
        let count = sqlx::query_scalar(sql).fetch_one(self.store.readers());
        count.await.expect("it reads")
    }

    async fn wait_for(&self, table: &str, count: i64) {
        let reached = async {
            while self.count(table).await < count {
                sleep(PAUSE).await;
            }
        };
        within(LIMIT, reached).await;
    }

    /// Each key's numbers in the order of their effects, each once.
    async fn check(&self, table: &str, orders: i64) {
        let sql = format!("SELECT number FROM {table} WHERE key = ? ORDER BY place");
        for key in 0..KEYS {
            let numbers: Vec<i64> = sqlx::query_scalar(sqlx::AssertSqlSafe(sql.clone()))
                .bind(key)
                .fetch_all(self.store.readers())
                .await
                .expect("it reads");
            let expected: Vec<_> = (0..orders).filter(|n| n % KEYS == key).collect();
            assert_eq!(numbers, expected, "key {key} of {table}");
        }
    }
}

async fn broker(place: &Place, name: &str) -> EventBus {
    let config = SqliteConfig::new(place.file(&format!("{name}.db")));
    let broker = SqliteBroker::connect(config).await.expect("it opens");
    let (held, schedule) = (Arc::new(broker.key_state()), Arc::new(broker.schedule()));
    let bus = EventBus::builder(broker).key_state(held).schedule(schedule);
    let bus = bus.build();
    let topics = TOPICS.map(|topic| TopicSpec::new(topic).with_partitions(4));
    bus.apply_topics(&topics).await.expect("topics");
    bus
}

async fn reserve(order: Placed, mut cx: Context<(), SqliteStore>) -> Result<(), BoxError> {
    let Placed { key, number } = order;
    insert("reserved", key, number, &mut cx).await?;
    cx.publish(Reserved { key, number })?;
    Ok(())
}

async fn book(stock: Reserved, mut cx: Context<(), SqliteStore>) -> Result<(), BoxError> {
    insert("booked", stock.key, stock.number, &mut cx).await
}

async fn insert(
    table: &str,
    key: i64,
    number: i64,
    cx: &mut Context<(), SqliteStore>,
) -> Result<(), BoxError> {
    let sql = sqlx::AssertSqlSafe(format!("INSERT INTO {table} (key, number) VALUES (?, ?)"));
    sqlx::query(sql)
        .bind(key)
        .bind(number)
        .execute(cx.transaction().await?)
        .await?;
    Ok(())
}

fn handled(consumers: &[Consumer]) -> u64 {
    let handled = |consumer: &Consumer| consumer.status().counts.handled;
    consumers.iter().map(handled).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_moves_under_load_with_each_effect_once_and_in_order() {
    let shop = Arc::new(Shop::open().await);
    let on_old = shop.consume(&shop.old).await;
    let on_new = shop.consume(&shop.new).await;
    // Two processes of the old version.
    let old_relays = [
        Running::start(shop.old_relay()),
        Running::start(shop.old_relay()),
    ];

    // Requests go on all the time.
    let (placed, stop) = (
        Arc::new(AtomicI64::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let requests = {
        let (shop, placed, stop) = (Arc::clone(&shop), Arc::clone(&placed), Arc::clone(&stop));
        tokio::spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                shop.order(placed.fetch_add(1, Ordering::SeqCst)).await;
            }
        })
    };
    shop.wait_for("booked", 400).await;
    assert_eq!(handled(&on_new), 0);

    // The deployment: one process after the other, those of the new version wait meanwhile.
    let [first, second] = old_relays;
    let new_relays = [Running::start(shop.new_relay()), {
        first.stop().await;
        Running::start(shop.new_relay())
    }];
    within(LIMIT, async {
        while !new_relays[0].reason().contains("another target") {
            sleep(PAUSE).await;
        }
    })
    .await;
    let waiting = placed.load(Ordering::SeqCst) + 100;
    shop.wait_for("placed", waiting).await;
    assert_eq!(handled(&on_new), 0, "nothing is on the new broker yet");
    second.stop().await;

    let moved = shop.count("booked").await + 400;
    shop.wait_for("booked", moved).await;
    stop.store(true, Ordering::SeqCst);
    requests.await.expect("it does not panic");
    let orders = placed.load(Ordering::SeqCst);
    shop.wait_for("booked", orders).await;
    for table in ["reserved", "booked"] {
        assert_eq!(shop.count(table).await, orders, "{table}: each once");
        shop.check(table, orders).await;
    }
    // The last effects are there before their events are settled.
    for bus in [&shop.old, &shop.new] {
        let drained = within(LIMIT, bus.drained(&TOPICS).into_future()).await;
        drained.expect("it answers");
    }
    assert!(handled(&on_old) >= 800 && handled(&on_new) >= 400);
    for relay in new_relays {
        assert_eq!(relay.reason(), "");
        relay.stop().await;
    }
    for consumer in on_old.into_iter().chain(on_new) {
        consumer.shutdown().await.expect("it ends");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parked_key_on_the_old_broker_keeps_everything_from_the_new_one_and_says_so() {
    let shop = Shop::open().await;
    let on_old = shop.consume(&shop.old).await;
    let on_new = shop.consume(&shop.new).await;
    // Order 0 cannot be handled: somebody else has written its row in the way.
    let mut tx = shop.begin().await;
    sqlx::raw_sql(
        "CREATE UNIQUE INDEX once ON reserved (number); INSERT INTO reserved VALUES (1, 0, 0)",
    )
    .execute(&mut *tx)
    .await
    .expect("a row");
    tx.commit().await.expect("it commits");
    let old_relay = Running::start(shop.old_relay());
    for number in 0..KEYS {
        shop.order(number).await;
    }
    shop.wait_for("booked", KEYS - 1).await;
    old_relay.stop().await;
    let new_relay = Running::start(shop.new_relay());
    for number in KEYS..2 * KEYS {
        shop.order(number).await;
    }
    within(LIMIT, async {
        while !new_relay.reason().contains("stock has parked") {
            sleep(PAUSE).await;
        }
    })
    .await;
    let report = shop
        .old
        .drained(&TOPICS)
        .report()
        .await
        .expect("it answers");
    assert!(
        matches!(&report.left[..], [Undrained::Held { group, .. }] if group.as_str() == "stock"),
        "{report}"
    );
    assert_eq!(handled(&on_new), 0);

    let mut tx = shop.begin().await;
    sqlx::raw_sql("DELETE FROM reserved WHERE number = 0")
        .execute(&mut *tx)
        .await
        .expect("the way is free");
    tx.commit().await.expect("it commits");
    let desk = shop.old.held_keys("stock").expect("a store");
    let held = desk.list().await.expect("it lists").remove(0).held;
    let retried = desk.retry(&held, "ann", "the row is gone").await;
    assert!(retried.expect("it is decided"));
    // What follows from it goes through the outbox, and so to the new broker.
    shop.wait_for("booked", 2 * KEYS).await;
    shop.check("reserved", 2 * KEYS).await;
    shop.check("booked", 2 * KEYS).await;
    new_relay.stop().await;
    for consumer in on_old.into_iter().chain(on_new) {
        consumer.shutdown().await.expect("it ends");
    }
    drop(shop.place);
}
