//! A shop on a server of its own: it takes orders under load, and counts what became of them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use eventbus_core::{
    BoxError, Breaker, Consumer, Context, Event, EventBus, EventId, Json, Key, MemoryBroker,
    OUTBOX_LANES, Origin, OutboxMessage, OutboxStore, RelayHandle, Result, RetryPolicy, Start,
    Topic, Until, unknown_version,
};
use eventbus_sql::{PostgresConfig, PostgresOutbox, PostgresStore};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::waiting::until;

pub(crate) const KEYS: i64 = 7;
const PROBE: Duration = Duration::from_millis(20);

/// Keyed by what is left of the number divided by [`KEYS`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Taken {
    pub(crate) number: i64,
    /// So that some hundred of them take room.
    pub(crate) note: String,
}

impl Event for Taken {
    const TYPE: &'static str = "Taken";
    const TOPIC: Topic = Topic::from_static("taken");
    const VERSION: u32 = 1;
    type Codec = Json;

    fn key(&self) -> Option<Key> {
        Some(Key::display(self.number % KEYS))
    }

    fn upcast(version: u32, _: &[u8]) -> Result<Self> {
        Err(unknown_version::<Self>(version))
    }
}

/// What the handler says of an order that it has booked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Booked(Taken);

impl Event for Booked {
    const TYPE: &'static str = "Booked";
    const TOPIC: Topic = Topic::from_static("booked");
    const VERSION: u32 = 1;
    type Codec = Json;

    fn key(&self) -> Option<Key> {
        self.0.key()
    }

    fn upcast(version: u32, _: &[u8]) -> Result<Self> {
        Err(unknown_version::<Self>(version))
    }
}

impl From<Taken> for i64 {
    fn from(order: Taken) -> Self {
        order.number
    }
}

impl From<Booked> for i64 {
    fn from(booked: Booked) -> Self {
        booked.0.number
    }
}

/// The shop's tables are found beside the store's.
pub(crate) fn config(url: &str) -> PostgresConfig {
    let mut config = PostgresConfig::from_url(url)
        .expect("a good url")
        .with_connections(12)
        .with_schema("shop");
    config.connect = config.connect.options([("search_path", "shop")]);
    config
}

#[derive(Clone)]
pub(crate) struct Shop {
    pub(crate) bus: EventBus,
    pub(crate) store: PostgresStore,
    pub(crate) outbox: PostgresOutbox,
}

impl Shop {
    /// On a database that has its tables.
    pub(crate) async fn on(config: PostgresConfig) -> Self {
        let store = PostgresStore::connect(config).await;
        let store = store.expect("it connects");
        let bus = EventBus::new(MemoryBroker::new());
        Self {
            outbox: store.outbox(&bus),
            bus,
            store,
        }
    }

    pub(crate) async fn open(config: PostgresConfig) -> Self {
        let shop = Self::on(config).await;
        sqlx::raw_sql(
            "CREATE TABLE orders (number bigint PRIMARY KEY);
             CREATE TABLE booked (
                place bigserial PRIMARY KEY, number bigint NOT NULL, note text NOT NULL)",
        )
        .execute(shop.store.pool())
        .await
        .expect("tables");
        shop
    }

    /// Takes an order and publishes it, unless an earlier try of the same order did so.
    pub(crate) async fn order(&self, number: i64, note: &str) -> Result<(), BoxError> {
        let mut tx = self.outbox.begin(Origin::new()).await?;
        let sql = "INSERT INTO orders (number) VALUES ($1) ON CONFLICT DO NOTHING";
        let insert = sqlx::query(sql).bind(number).execute(&mut *tx);
        if insert.await?.rows_affected() == 0 {
            return Ok(());
        }
        let note = note.to_owned();
        tx.publish(Taken { number, note })?;
        Ok(tx.commit().await?)
    }

    /// What is in the table of orders.
    pub(crate) async fn orders(&self) -> BTreeSet<i64> {
        self.numbers("SELECT number FROM orders")
            .await
            .into_iter()
            .collect()
    }

    /// What was booked, in its order.
    pub(crate) async fn booked(&self) -> Vec<i64> {
        self.numbers("SELECT number FROM booked ORDER BY place")
            .await
    }

    /// The place of what was booked last.
    pub(crate) async fn last_booked(&self) -> i64 {
        self.numbers("SELECT coalesce(max(place), 0) FROM booked")
            .await[0]
    }

    /// The place of what was booked last, whether that was kept or undone.
    pub(crate) async fn last_tried(&self) -> i64 {
        self.numbers("SELECT last_value FROM booked_place_seq")
            .await[0]
    }

    /// What waits to be published, as positions and ids.
    pub(crate) async fn next(&self) -> Vec<(u64, EventId)> {
        let next = self.messages().await.into_iter();
        next.map(|it| (it.position, it.id)).collect()
    }

    /// The numbers of what waits of one type.
    pub(crate) async fn unpublished<E: Event + Into<i64>>(&self) -> BTreeSet<i64> {
        let messages = self.messages().await;
        let events = messages.iter().map(|it| self.bus.event::<E>(&it.message));
        let events = events.filter_map(|event| event.expect("it is readable"));
        events.map(Into::into).collect()
    }

    async fn messages(&self) -> Vec<OutboxMessage> {
        let lanes: Vec<u32> = (0..OUTBOX_LANES).collect();
        answered(async || self.store.next(&lanes, 10_000, &[]).await).await
    }

    /// How many wait to be published.
    pub(crate) async fn waiting(&self) -> usize {
        self.next().await.len()
    }

    async fn numbers(&self, sql: &'static str) -> Vec<i64> {
        answered(async || sqlx::query_scalar(sql).fetch_all(self.store.pool()).await).await
    }

    /// Books each order once, and says so.
    pub(crate) async fn book(&self) -> Consumer {
        self.bus
            .consumer("books")
            .unit(self.store.clone())
            .on(book)
            .retry(RetryPolicy::immediate(3))
            .breaker(Breaker::default().with_probe_after(PROBE, PROBE))
            .spawn()
            .await
            .expect("it starts")
    }

    pub(crate) fn relay(&self) -> Running {
        let relay = self.outbox.relay().lease_ttl(Duration::from_secs(2));
        let (stop, stopped) = oneshot::channel::<()>();
        Running {
            handle: relay.handle(),
            task: tokio::spawn(relay.run_until(async {
                // Dropped is stopped, too.
                let _ = stopped.await;
            })),
            stop,
        }
    }

    /// The numbers of what was published of one type, in its order.
    pub(crate) async fn published<E: Event + Into<i64>>(&self) -> Vec<i64> {
        let topics = [E::TOPIC];
        let reader = self.bus.read(&topics, Start::Earliest, Some(Until::Now));
        let mut reader = reader.await.expect("it can be read");
        let mut numbers = Vec::new();
        while let Some(record) = reader.next().await.expect("it goes on") {
            let event: Option<E> = self.bus.event(&record.message).expect("it is readable");
            numbers.push(event.expect("of this type").into());
        }
        numbers
    }
}

async fn book(order: Taken, mut cx: Context<(), PostgresStore>) -> Result<(), BoxError> {
    let sql = "INSERT INTO booked (number, note) VALUES ($1, $2)";
    let insert = sqlx::query(sql).bind(order.number).bind(&order.note);
    insert.execute(cx.transaction().await?).await?;
    cx.publish(Booked(order))?;
    Ok(())
}

/// The first answer: a connection may have ended while it lay idle.
async fn answered<T, E>(mut ask: impl AsyncFnMut() -> Result<T, E>) -> T {
    let mut answer = None;
    until(async || {
        answer = ask().await.ok();
        answer.is_some()
    })
    .await;
    answer.expect("there is one")
}

/// A relay that runs.
pub(crate) struct Running {
    pub(crate) handle: RelayHandle,
    task: JoinHandle<Result<()>>,
    stop: oneshot::Sender<()>,
}

impl Running {
    pub(crate) async fn stop(self) {
        drop(self.stop);
        let ended = self.task.await.expect("it does not panic");
        ended.expect("it ends well");
    }
}

/// Of each key, in the order of their first appearance.
pub(crate) fn by_key(numbers: &[i64]) -> BTreeMap<i64, Vec<i64>> {
    let mut seen = BTreeSet::new();
    let mut keys: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    for number in numbers.iter().filter(|number| seen.insert(**number)) {
        keys.entry(number % KEYS).or_default().push(*number);
    }
    keys
}

/// All of them are there, those of a key in their order.
pub(crate) fn check(found: &[i64], expected: &BTreeSet<i64>) {
    let distinct: BTreeSet<i64> = found.iter().copied().collect();
    assert_eq!(&distinct, expected);
    for (key, numbers) in by_key(found) {
        assert!(numbers.is_sorted(), "key {key}: {numbers:?}");
    }
}
