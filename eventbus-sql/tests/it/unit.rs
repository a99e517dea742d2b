//! A service's handlers on its own database: effects happen once, whatever fails.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use eventbus_core::{
    BoxError, Breaker, Consumer, ConsumerBuilder, Context, EventBus, EventId, MemoryBroker,
    OUTBOX_LANES, Origin, OutboxMessage, OutboxStore, Outgoing, RetryPolicy,
};
use eventbus_sql::{SqliteConfig, SqliteStore};
use sqlx::{Connection, SqliteConnection};
use tokio::sync::Barrier;
use tokio::time::timeout;

use crate::events::{OrderPlaced, StockReserved};
use crate::place::Place;
use crate::waiting::{LIMIT, PAUSE, handled, is_holding, until};

/// What the handlers met.
#[derive(Debug, Default)]
struct Met {
    /// The attempt of each run, by order.
    attempts: Mutex<BTreeMap<i64, Vec<u32>>>,
    faults: Mutex<BTreeMap<i64, Fault>>,
    /// Contexts that a handler did not give back.
    kept: Mutex<Vec<Context<Arc<Met>, SqliteStore>>>,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Error,
    Panic,
    Late,
    Keep,
}

impl Met {
    fn attempts(&self, number: i64) -> Vec<u32> {
        let attempts = self.attempts.lock().unwrap();
        attempts.get(&number).cloned().unwrap_or_default()
    }

    fn note(&self, number: i64, attempt: u32) {
        let mut attempts = self.attempts.lock().unwrap();
        attempts.entry(number).or_default().push(attempt);
    }

    fn set(&self, number: i64, fault: Fault) {
        self.faults.lock().unwrap().insert(number, fault);
    }
}

/// Counts an order, then meets the fault that is set for it, once.
async fn reserve(
    order: OrderPlaced,
    mut cx: Context<Arc<Met>, SqliteStore>,
) -> Result<(), BoxError> {
    let OrderPlaced { number } = order;
    let met = Arc::clone(cx.state());
    met.note(number, cx.attempt());
    cx.publish(StockReserved { number })?;
    sqlx::query("INSERT INTO reserved (number) VALUES (?)")
        .bind(number)
        .execute(cx.transaction().await?)
        .await?;
    let fault = met.faults.lock().unwrap().remove(&number);
    match fault {
        None => Ok(()),
        Some(Fault::Error) => Err("as asked".into()),
        Some(Fault::Panic) => panic!("as asked"),
        Some(Fault::Late) => std::future::pending().await,
        Some(Fault::Keep) => {
            met.kept.lock().unwrap().push(cx);
            Ok(())
        }
    }
}

struct Shop {
    place: Place,
    bus: EventBus,
    store: SqliteStore,
    met: Arc<Met>,
}

impl Shop {
    async fn open() -> Self {
        let place = Place::new();
        let config =
            SqliteConfig::new(place.file("shop.db")).with_busy_timeout(Duration::from_millis(900));
        let store = SqliteStore::connect(config).await.expect("it opens");
        let bus = EventBus::new(MemoryBroker::new());
        let mut tx = begin(&store, &bus).await;
        sqlx::query("CREATE TABLE reserved (number INTEGER)")
            .execute(&mut *tx)
            .await
            .expect("a table");
        tx.commit().await.expect("it commits");
        Self {
            place,
            bus,
            store,
            met: Arc::default(),
        }
    }

    fn consumer(&self, store: SqliteStore) -> ConsumerBuilder<Arc<Met>, SqliteStore> {
        let probe = Duration::from_millis(20);
        self.bus
            .consumer("inventory")
            .state(Arc::clone(&self.met))
            .unit(store)
            .on(reserve)
            .retry(RetryPolicy::immediate(3))
            .breaker(Breaker::default().with_probe_after(probe, probe))
    }

    async fn spawn(&self) -> Consumer {
        let consumer = self.consumer(self.store.clone()).spawn().await;
        consumer.expect("it starts")
    }

    async fn publish(&self, number: i64) -> EventId {
        let id = self.bus.publish(OrderPlaced { number }).await;
        id.expect("it is published")
    }

    /// How often each order took effect.
    async fn reserved(&self) -> BTreeMap<i64, i64> {
        let sql = "SELECT number, count(*) FROM reserved GROUP BY number";
        let rows: Vec<(i64, i64)> = sqlx::query_as(sql)
            .fetch_all(self.store.readers())
            .await
            .expect("it reads");
        rows.into_iter().collect()
    }

    async fn published(&self) -> Vec<OutboxMessage> {
        let lanes: Vec<u32> = (0..OUTBOX_LANES).collect();
        self.store.next(&lanes, 1000, &[]).await.expect("it reads")
    }
}

async fn begin(store: &SqliteStore, bus: &EventBus) -> eventbus_sql::SqliteTransaction {
    let outbox = store.outbox(bus);
    outbox.begin(Origin::new()).await.expect("a transaction")
}

#[tokio::test]
async fn a_duplicate_is_settled_without_running_its_handler() {
    let shop = Shop::open().await;
    let consumer = shop.spawn().await;
    let id = shop.publish(1).await;
    handled(&consumer, 1).await;
    let again = Outgoing::new(OrderPlaced { number: 1 }).with_id(id);
    shop.bus.publish(again).await.expect("it is published");
    handled(&consumer, 2).await;
    assert_eq!(shop.met.attempts(1), [1]);
    assert_eq!(consumer.status().counts.duplicates, 1);
    assert_eq!(shop.reserved().await, BTreeMap::from([(1, 1)]));
    let published = shop.published().await;
    assert_eq!(published.len(), 1);
    let own = published[0].message.headers.get_str("eb-id");
    assert_eq!(own, Some(published[0].id.to_string().as_str()));
}

#[tokio::test]
async fn an_event_that_two_members_handle_at_once_takes_effect_once() {
    let shop = Shop::open().await;
    let both = Arc::new(Barrier::new(2));
    let id = EventId::new();
    let mut members = Vec::new();
    // On two brokers, as while a service moves from one to the other: with one inbox.
    for _ in 0..2 {
        let bus = EventBus::new(MemoryBroker::new());
        let consumer = bus
            .consumer("inventory")
            .state(Arc::clone(&both))
            .unit(shop.store.clone())
            .on(
                async |order: OrderPlaced, mut cx: Context<Arc<Barrier>, SqliteStore>| {
                    cx.publish(StockReserved {
                        number: order.number,
                    })?;
                    // Neither has recorded it by now.
                    cx.state().wait().await;
                    sqlx::query("INSERT INTO reserved (number) VALUES (?)")
                        .bind(order.number)
                        .execute(cx.transaction().await?)
                        .await?;
                    Ok(())
                },
            );
        members.push(consumer.spawn().await.expect("it starts"));
        let order = Outgoing::new(OrderPlaced { number: 1 }).with_id(id.clone());
        bus.publish(order).await.expect("it is published");
    }
    for member in &members {
        handled(member, 1).await;
    }
    let counts = members.iter().map(|member| member.status().counts);
    let counts: Vec<_> = counts
        .map(|counts| (counts.handled + counts.duplicates, counts.failed_attempts))
        .collect();
    assert_eq!(counts, [(1, 0), (1, 0)]);
    let duplicates = members
        .iter()
        .map(|member| member.status().counts.duplicates);
    assert_eq!(duplicates.sum::<u64>(), 1);
    assert_eq!(shop.reserved().await, BTreeMap::from([(1, 1)]));
    assert_eq!(shop.published().await.len(), 1);
}

#[tokio::test]
async fn work_ends_with_its_handler_however_that_ends() {
    let shop = Shop::open().await;
    let consumer = shop
        .consumer(shop.store.clone())
        .deadline(Duration::from_millis(300))
        .spawn()
        .await
        .expect("it starts");
    let faults = [Fault::Error, Fault::Panic, Fault::Late, Fault::Keep];
    for (number, fault) in (0..).zip(faults) {
        shop.met.set(number, fault);
        shop.publish(number).await;
        until(async || {
            shop.met.kept.lock().unwrap().clear();
            consumer.status().counts.handled > number as u64
        })
        .await;
        assert_eq!(shop.met.attempts(number), [1, 2], "{fault:?}");
    }
    let once: BTreeMap<i64, i64> = (0..4).map(|number| (number, 1)).collect();
    assert_eq!(shop.reserved().await, once);
    assert_eq!(shop.published().await.len(), 4);
}

#[tokio::test]
async fn while_another_process_holds_the_file_nothing_counts_as_an_attempt() {
    let shop = Shop::open().await;
    let consumer = shop.spawn().await;
    let url = format!("sqlite://{}", shop.place.file("shop.db").display());
    let mut elsewhere = SqliteConnection::connect(&url).await.expect("it opens");
    let held = elsewhere.begin_with("BEGIN IMMEDIATE").await;
    let held = held.expect("it is free");
    for number in 0..5 {
        shop.publish(number).await;
    }
    until(async || is_holding(&consumer)).await;
    until(async || shop.met.attempts(0).len() > 1).await;
    held.rollback().await.expect("it lets go");
    handled(&consumer, 5).await;
    for number in 0..5 {
        assert!(
            shop.met
                .attempts(number)
                .iter()
                .all(|attempt| *attempt == 1)
        );
    }
    assert_eq!(consumer.status().counts.failed_attempts, 0);
    assert_eq!(shop.reserved().await.len(), 5);
}

#[tokio::test]
async fn a_full_disk_is_not_the_handlers_failure() {
    let shop = Shop::open().await;
    let set_pages = async |pages: &str| {
        let mut tx = begin(&shop.store, &shop.bus).await;
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
            "PRAGMA max_page_count = {pages}"
        )))
        .execute(&mut *tx)
        .await
        .expect("it is set");
        tx.roll_back();
    };
    let consumer = shop
        .bus
        .consumer("filling")
        .state(Arc::clone(&shop.met))
        .unit(shop.store.clone())
        .on(
            async |order: OrderPlaced, mut cx: Context<Arc<Met>, SqliteStore>| {
                cx.state().note(order.number, cx.attempt());
                sqlx::query("INSERT INTO reserved (number) VALUES (zeroblob(200000))")
                    .execute(cx.transaction().await?)
                    .await?;
                Ok(())
            },
        )
        .breaker(Breaker::default().with_probe_after(20 * PAUSE, 20 * PAUSE))
        .spawn()
        .await
        .expect("it starts");
    set_pages("1").await;
    shop.publish(1).await;
    until(async || is_holding(&consumer)).await;
    until(async || shop.met.attempts(1).len() > 1).await;
    set_pages("1000000").await;
    handled(&consumer, 1).await;
    assert!(shop.met.attempts(1).iter().all(|attempt| *attempt == 1));
    assert_eq!(consumer.status().counts.failed_attempts, 0);
}

#[tokio::test]
async fn events_that_share_a_transaction_are_handled_one_after_the_other() {
    let shop = Shop::open().await;
    let consumer = shop
        .consumer(shop.store.clone().with_group_max(50))
        .workers(1)
        .spawn()
        .await
        .expect("it starts");
    consumer.pause();
    shop.met.set(7, Fault::Error);
    let id = shop.publish(100).await;
    for number in 0..20 {
        shop.publish(number).await;
    }
    let again = Outgoing::new(OrderPlaced { number: 100 }).with_id(id);
    shop.bus.publish(again).await.expect("it is published");
    consumer.resume();
    handled(&consumer, 22).await;
    let reserved = shop.reserved().await;
    assert_eq!(reserved.len(), 21);
    assert!(reserved.values().all(|times| *times == 1));
    assert_eq!(consumer.status().counts.duplicates, 1);
    assert_eq!(shop.published().await.len(), 21);
}

#[tokio::test]
async fn a_commit_whose_answer_is_not_waited_for_takes_effect_once() {
    let shop = Shop::open().await;
    for number in 0..20 {
        let consumer = shop.spawn().await;
        shop.publish(number).await;
        until(async || !shop.met.attempts(number).is_empty()).await;
        // Dropped anywhere between the first statement and the settlement.
        drop(consumer);
    }
    let consumer = shop.spawn().await;
    until(async || shop.reserved().await.len() == 20).await;
    consumer.shutdown().await.expect("it ends");
    assert!(shop.reserved().await.values().all(|times| *times == 1));
    assert_eq!(shop.published().await.len(), 20);
}

#[tokio::test]
async fn handlers_side_by_side_share_commits() {
    let commits = Arc::new(AtomicUsize::new(0));
    let counting = Steps(Arc::clone(&commits));
    let _counting = tracing::subscriber::set_default(counting);
    let shop = Shop::open().await;
    let consumer = shop
        .consumer(shop.store.clone())
        .workers(1)
        .concurrency(64)
        .spawn()
        .await
        .expect("it starts");
    consumer.pause();
    for number in 0..64 {
        shop.publish(number).await;
    }
    let before = commits.load(Ordering::Relaxed);
    consumer.resume();
    handled(&consumer, 64).await;
    let commits = commits.load(Ordering::Relaxed) - before;
    assert!(commits <= 32, "{commits} commits for 64 events");
    assert_eq!(shop.reserved().await.len(), 64);
}

#[tokio::test]
async fn a_service_that_holds_all_its_readers_holds_up_no_handler() {
    let shop = Shop::open().await;
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(shop.store.readers().acquire().await.expect("it is free"));
    }
    let consumer = shop.spawn().await;
    shop.publish(1).await;
    timeout(LIMIT / 3, handled(&consumer, 1))
        .await
        .expect("its check for duplicates has connections of its own");
    assert_eq!(shop.published().await.len(), 1);
}

#[tokio::test]
async fn only_the_event_that_breaks_a_deferred_constraint_becomes_a_dead_letter() {
    let shop = Shop::open().await;
    let mut tx = begin(&shop.store, &shop.bus).await;
    let tables = "CREATE TABLE parent (id INTEGER PRIMARY KEY);
        CREATE TABLE child (id REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)";
    let created = sqlx::raw_sql(tables).execute(&mut *tx).await;
    created.expect("tables");
    tx.commit().await.expect("it commits");
    let consumer = shop
        .bus
        .consumer("referring")
        .unit(shop.store.clone())
        .on(
            async |order: OrderPlaced, mut cx: Context<(), SqliteStore>| {
                let sql = match order.number % 20 {
                    0 => "INSERT INTO child VALUES (?)",
                    _ => "INSERT INTO reserved (number) VALUES (?)",
                };
                let insert = sqlx::query(sql).bind(order.number);
                insert.execute(cx.transaction().await?).await?;
                Ok(())
            },
        )
        .retry(RetryPolicy::immediate(3))
        .breaker(Breaker::default().with_probe_after(PAUSE, PAUSE))
        .spawn()
        .await
        .expect("it starts");
    consumer.pause();
    for number in 1..=60 {
        shop.publish(number).await;
    }
    consumer.resume();
    until(async || {
        let counts = consumer.status().counts;
        counts.handled + counts.dead_lettered >= 60
    })
    .await;
    assert_eq!(consumer.status().counts.dead_lettered, 3);
    let reserved = shop.reserved().await;
    assert_eq!(reserved.len(), 57);
    assert!(reserved.values().all(|times| *times == 1));
}

#[tokio::test]
async fn what_was_handled_long_ago_is_forgotten() {
    let place = Place::new();
    let config = SqliteConfig::new(place.file("shop.db"))
        .with_inbox_retention(Duration::from_secs(3600))
        .with_retention_interval(Duration::from_millis(10));
    let store = SqliteStore::connect(config).await.expect("it opens");
    let bus = EventBus::new(MemoryBroker::new());
    let mut tx = begin(&store, &bus).await;
    sqlx::raw_sql(
        "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 2500)
         INSERT INTO eventbus_inbox SELECT 'inventory', n, n FROM n;
         INSERT INTO eventbus_inbox VALUES ('inventory', 'new', unixepoch() * 1000000)",
    )
    .execute(&mut *tx)
    .await
    .expect("they are inserted");
    tx.commit().await.expect("it commits");
    until(async || {
        let ids: Vec<String> = sqlx::query_scalar("SELECT event_id FROM eventbus_inbox")
            .fetch_all(store.readers())
            .await
            .expect("it reads");
        ids == ["new"]
    })
    .await;
}

/// Counts commits by the step that they name.
struct Steps(Arc<AtomicUsize>);

impl tracing::Subscriber for Steps {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "eventbus::step"
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        event.record(
            &mut |_: &tracing::field::Field, step: &dyn std::fmt::Debug| {
                if format!("{step:?}").contains("sql.commit.after") {
                    self.0.fetch_add(1, Ordering::Relaxed);
                }
            },
        );
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}
