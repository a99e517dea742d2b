//! Transactions of a service that publish: through the store, and in a connection of its own.

use std::sync::Arc;
use std::time::Duration;

use eventbus_core::{
    ErrorKind, EventBus, EventId, Key, MemoryBroker, Message, OUTBOX_LANES, Origin, OutboxMessage,
    OutboxStore, Result, Topic,
};
use eventbus_sql::{SqliteBroker, SqliteConfig, SqliteOutbox, SqliteStore, SqliteTransaction};
use eventbus_testkit::{OutboxHarness, OutboxTransaction};
use sqlx::{Connection, SqliteConnection};
use tokio::time::timeout;

use crate::events::{MailWanted, OrderPlaced};
use crate::place::Place;

const LIMIT: Duration = Duration::from_secs(20);

/// A store with a table of orders, and its outbox to a bus in memory.
async fn shop(config: SqliteConfig) -> (SqliteStore, SqliteOutbox) {
    let store = SqliteStore::connect(config).await.expect("it opens");
    let outbox = store.outbox(&EventBus::new(MemoryBroker::new()));
    let mut tx = outbox.begin(Origin::new()).await.expect("a transaction");
    sqlx::query("CREATE TABLE IF NOT EXISTS orders (number INTEGER PRIMARY KEY)")
        .execute(&mut *tx)
        .await
        .expect("a table");
    tx.commit().await.expect("it commits");
    (store, outbox)
}

async fn write(connection: &mut SqliteConnection, number: i64) -> sqlx::Result<()> {
    let order = sqlx::query("INSERT INTO orders (number) VALUES (?)").bind(number);
    order.execute(connection).await.map(|_| ())
}

/// Writes an order and publishes it.
async fn place(outbox: &SqliteOutbox, number: i64) {
    let mut tx = outbox.begin(Origin::new()).await.expect("a transaction");
    write(&mut tx, number).await.expect("it is written");
    tx.publish(OrderPlaced { number }).expect("it is collected");
    tx.commit().await.expect("it commits");
}

async fn orders(store: &SqliteStore) -> Vec<i64> {
    let orders = sqlx::query_scalar("SELECT number FROM orders ORDER BY number");
    orders.fetch_all(store.readers()).await.expect("it reads")
}

async fn waiting(store: &SqliteStore) -> Vec<OutboxMessage> {
    let lanes: Vec<u32> = (0..OUTBOX_LANES).collect();
    store.next(&lanes, 1000, &[]).await.expect("it reads")
}

async fn foreign(place: &Place) -> SqliteConnection {
    let url = format!("sqlite://{}", place.file("shop.db").display());
    SqliteConnection::connect(&url).await.expect("it opens")
}

#[tokio::test]
async fn writes_and_events_commit_together_or_not_at_all() {
    let place = Place::new();
    let (store, outbox) = shop(SqliteConfig::new(place.file("shop.db"))).await;

    let mut tx = outbox
        .begin(Origin::new().with_correlation_id("request-7"))
        .await
        .expect("a transaction");
    write(&mut tx, 1).await.expect("it is written");
    let id = tx.publish(OrderPlaced { number: 1 }).expect("collected");
    tx.publish(MailWanted { number: 1 }).expect("collected");
    assert!(orders(&store).await.is_empty(), "nobody sees it before");
    tx.commit().await.expect("it commits");
    let mut dropped = outbox.begin(Origin::new()).await.expect("a transaction");
    write(&mut dropped, 2).await.expect("it is written");
    dropped
        .publish(OrderPlaced { number: 2 })
        .expect("collected");
    drop(dropped);
    let mut fails = outbox.begin(Origin::new()).await.expect("a transaction");
    write(&mut fails, 3).await.expect("it is written");
    write(&mut fails, 3).await.expect_err("it is there");
    fails.roll_back();

    assert_eq!(orders(&store).await, [1]);
    let found = waiting(&store).await;
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].id, id);
    assert_eq!(found[0].message.key, Some(Key::from("1")));
    assert_eq!(
        found[0].message.headers.get_str("eb-correlation-id"),
        Some("request-7")
    );
    assert_eq!(found[1].message.topic.as_str(), "mail");
}

#[tokio::test]
async fn the_outbox_has_the_columns_that_debezium_looks_for() {
    let place = Place::new();
    let (store, outbox) = shop(SqliteConfig::new(place.file("shop.db"))).await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let origin = Origin::new().with_traceparent(trace);
    let mut tx = outbox.begin(origin).await.expect("a transaction");
    let id = tx.publish(OrderPlaced { number: 7 }).expect("collected");
    let bytes = Message::new(Topic::from_static("raw"), "x").with_key(Key::new(vec![0xff, 0]));
    let raw = [(EventId::parse("own id").expect("an id"), bytes.clone())];
    store.append(&mut tx, &raw).await.expect("it is appended");
    tx.commit().await.expect("it commits");

    type Columns = (String, String, String, String, String, Option<String>);
    let sql =
        "SELECT id, aggregatetype, aggregateid, type, CAST(payload AS TEXT), tracingspancontext
        FROM eventbus_outbox WHERE type <> ''";
    let row: Columns = sqlx::query_as(sql)
        .fetch_one(store.readers())
        .await
        .expect("a row");
    assert_eq!(
        (row.0, row.1.as_str(), row.2.as_str()),
        (id.to_string(), "order-events", "7")
    );
    assert_eq!(row.3, "OrderPlaced");
    assert!(row.4.contains("\"number\":7"), "{}", row.4);
    assert_eq!(row.5, Some(format!("traceparent={trace}\n")));
    let found = waiting(&store).await;
    let raw = found.iter().find(|next| next.id.to_string() == "own id");
    assert_eq!(raw.expect("it waits").message, bytes, "its key is no text");
}

#[tokio::test]
async fn a_transaction_of_somebody_else_publishes_when_it_commits() {
    let place = Place::new();
    let (store, outbox) = shop(SqliteConfig::new(place.file("shop.db"))).await;
    let bus = EventBus::new(MemoryBroker::new());
    let batch = |number| {
        let mut batch = bus.batch(Origin::new()).expect("a batch");
        batch.publish(OrderPlaced { number }).expect("collected");
        batch
    };
    let mut connection = foreign(&place).await;
    let error = outbox.append(&mut connection, batch(0)).await;
    assert_eq!(
        error.expect_err("no transaction").kind(),
        ErrorKind::InvalidInput
    );

    let mut tx = connection.begin().await.expect("a transaction");
    write(&mut tx, 1).await.expect("it is written");
    outbox.append(&mut tx, batch(1)).await.expect("appended");
    tx.rollback().await.expect("it is rolled back");
    assert!(waiting(&store).await.is_empty());

    let appended = tokio::spawn({
        let store = store.clone();
        async move {
            while waiting(&store).await.is_empty() {
                store.appended().await
            }
        }
    });
    let mut tx = connection.begin().await.expect("a transaction");
    write(&mut tx, 2).await.expect("it is written");
    outbox.append(&mut tx, batch(2)).await.expect("appended");
    assert!(waiting(&store).await.is_empty());
    tx.commit().await.expect("it commits");
    timeout(LIMIT, appended)
        .await
        .expect("it is heard of")
        .expect("it ends");
    assert_eq!(waiting(&store).await[0].message.key, Some(Key::from("2")));
    assert_eq!(orders(&store).await, [2]);
}

#[tokio::test]
async fn positions_are_never_given_again() {
    let store_place = Place::new();
    let (store, outbox) = shop(SqliteConfig::new(store_place.file("shop.db"))).await;
    place(&outbox, 1).await;
    let first = waiting(&store).await[0].position;
    store.remove(&[first]).await.expect("it is removed");
    store.remove(&[first]).await.expect("it may be gone");
    place(&outbox, 2).await;
    assert!(waiting(&store).await[0].position > first);
}

#[tokio::test]
async fn a_damaged_message_holds_up_no_other() {
    let store_place = Place::new();
    let (store, outbox) = shop(SqliteConfig::new(store_place.file("shop.db"))).await;
    for number in 0..20 {
        place(&outbox, number).await;
    }
    let mut file = foreign(&store_place).await;
    let mut run = async |sql: &'static str| {
        let ran = sqlx::raw_sql(sql).execute(&mut file).await;
        ran.expect("it is right");
    };
    run("CREATE TABLE sound AS SELECT position, payload FROM eventbus_outbox").await;
    run("UPDATE eventbus_outbox SET payload = x'00' WHERE position = 1").await;
    run("UPDATE eventbus_outbox SET id = x'ff' WHERE position = 2").await;
    run("UPDATE eventbus_outbox SET payload = x'00' WHERE position > 10").await;

    let relay = outbox.relay();
    let handle = relay.handle();
    let emptied = async {
        while store.depth().await.expect("it counts").messages() > 0 {
            tokio::task::yield_now().await;
        }
    };
    let ended = timeout(LIMIT, relay.run_until(emptied)).await;
    ended.expect("it ends").expect("damage is no end");
    assert_eq!(handle.status().published, 8);

    let aside = sqlx::query_scalar("SELECT position FROM eventbus_outbox WHERE lane < 0");
    let mut aside: Vec<i64> = aside.fetch_all(store.readers()).await.expect("it reads");
    aside.sort_unstable();
    assert_eq!(aside, [vec![1, 2], (11..=20).collect()].concat());
    // As the documentation says.
    run("UPDATE eventbus_outbox SET lane = -1 - lane,
            payload = (SELECT payload FROM sound WHERE sound.position = eventbus_outbox.position)
        WHERE lane < 0 AND position <> 2")
    .await;
    assert_eq!(waiting(&store).await.len(), 11);
}

#[tokio::test]
async fn lanes_get_even_shares_and_depth_counts_them() {
    let store_place = Place::new();
    let (store, outbox) = shop(SqliteConfig::new(store_place.file("shop.db"))).await;
    for number in 0..40 {
        place(&outbox, number).await;
    }
    let depth = store.depth().await.expect("it counts");
    assert_eq!(depth.messages(), 40);
    assert!(depth.oldest.is_some());
    let lanes: Vec<u32> = depth.lanes.iter().map(|(lane, _)| *lane).collect();
    let few = store
        .next(&lanes, lanes.len(), &[])
        .await
        .expect("it reads");
    let mut seen: Vec<u32> = few.iter().map(|next| next.lane).collect();
    seen.sort_unstable();
    assert_eq!(seen, lanes, "one of each");
    assert!(few.is_sorted_by_key(|next| next.position));
    assert!(store.next(&[], 10, &[]).await.expect("it reads").is_empty());
}

#[tokio::test]
async fn transactions_inside_one_that_was_lent_are_savepoints() {
    let store_place = Place::new();
    let (store, outbox) = shop(SqliteConfig::new(store_place.file("shop.db"))).await;
    for round in 0..3 {
        let number = 10 * round;
        let mut tx = outbox.begin(Origin::new()).await.expect("a transaction");
        let mut kept = tx.begin().await.expect("a savepoint");
        write(&mut kept, number).await.expect("it is written");
        kept.commit().await.expect("it is released");
        let mut dropped = tx.begin().await.expect("a savepoint");
        write(&mut dropped, number + 1)
            .await
            .expect("it is written");
        drop(dropped);
        write(&mut tx, number + 2).await.expect("it is written");
        // The savepoint of one that is forgotten goes with the transaction.
        let mut forgotten = tx.begin().await.expect("a savepoint");
        write(&mut forgotten, number + 3)
            .await
            .expect("it is written");
        std::mem::forget(forgotten);
        match round {
            1 => tx.roll_back(),
            _ => tx.commit().await.expect("it commits"),
        }
    }
    assert_eq!(orders(&store).await, [0, 2, 3, 20, 22, 23]);
}

#[tokio::test]
async fn who_borrows_the_connection_cannot_commit_it() {
    let store_place = Place::new();
    let (store, outbox) = shop(SqliteConfig::new(store_place.file("shop.db"))).await;
    for end in ["COMMIT", "ROLLBACK"] {
        let (beside, culprit) = tokio::join!(
            async {
                let mut tx = outbox.begin(Origin::new()).await.expect("a transaction");
                write(&mut tx, 1).await.expect("it is written");
                tx.commit().await
            },
            async {
                let mut tx = outbox.begin(Origin::new()).await.expect("a transaction");
                write(&mut tx, 2).await.expect("it is written");
                // It is refused, or ends the transaction of both.
                let _ = sqlx::raw_sql(end).execute(&mut *tx).await;
                tx.commit().await
            },
        );
        for error in [beside, culprit] {
            let error = error.expect_err("it is of both");
            assert!(error.is_retryable(), "{error}");
            assert!(error.to_string().contains("run no COMMIT"), "{error}");
        }
        assert!(orders(&store).await.is_empty());
        let broker = store_place.file("shop.db");
        drop(broker);
    }
    place(&outbox, 3).await;
    assert_eq!(orders(&store).await, [3]);
}

#[tokio::test]
async fn a_rollback_is_noticed_though_another_transaction_stands_in_its_place() {
    let store_place = Place::new();
    let (store, outbox) = shop(SqliteConfig::new(store_place.file("shop.db"))).await;
    let (beside, culprit) = tokio::join!(
        async {
            let mut tx = outbox.begin(Origin::new()).await.expect("a transaction");
            write(&mut tx, 1).await.expect("it is written");
            tx.commit().await
        },
        async {
            let mut tx = outbox.begin(Origin::new()).await.expect("a transaction");
            let swap = sqlx::raw_sql("ROLLBACK; BEGIN IMMEDIATE; SAVEPOINT lent");
            swap.execute(&mut *tx).await.expect("SQLite does so");
            write(&mut tx, 2).await.expect("it is written");
            tx.commit().await
        },
    );
    let error = culprit.expect_err("it has ended what is of others");
    assert!(error.is_retryable(), "{error}");
    // They share a commit unless the machine is slow.
    let kept = match beside {
        Ok(()) => vec![1],
        Err(error) if error.is_retryable() => Vec::new(),
        Err(error) => panic!("{error}"),
    };
    assert_eq!(orders(&store).await, kept);
    place(&outbox, 3).await;
    assert_eq!(orders(&store).await, [kept, vec![3]].concat());
}

/// Borrows the connection, and writes a row whose parent may be missing.
async fn refer(outbox: &SqliteOutbox, parent: i64) -> Result<()> {
    let mut tx = outbox.begin(Origin::new()).await?;
    let refer = sqlx::query("INSERT INTO child VALUES (?)").bind(parent);
    refer.execute(&mut *tx).await.expect("it is checked later");
    tx.commit().await
}

/// As a caller does who is told to do it again.
async fn refer_until_it_is_settled(outbox: &SqliteOutbox, parent: i64) -> Result<()> {
    let settled = async {
        loop {
            match refer(outbox, parent).await {
                Err(error) if error.is_retryable() => {}
                settled => return settled,
            }
        }
    };
    timeout(LIMIT, settled).await.expect("it is settled")
}

#[tokio::test]
async fn a_broken_deferred_constraint_fails_whoever_broke_it() {
    let store_place = Place::new();
    let config = SqliteConfig::new(store_place.file("shop.db"));
    let (store, outbox) = shop(config.clone()).await;
    let broker = SqliteBroker::connect(config).await.expect("it opens");
    let bus = EventBus::new(broker);
    let mut tx = outbox.begin(Origin::new()).await.expect("a transaction");
    let tables = "CREATE TABLE parent (id INTEGER PRIMARY KEY);
        CREATE TABLE child (id REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED);
        INSERT INTO parent VALUES (1)";
    let created = sqlx::raw_sql(tables).execute(&mut *tx).await;
    created.expect("tables");
    tx.commit().await.expect("it commits");

    // The others gather behind it.
    let first = outbox.begin(Origin::new()).await.expect("a transaction");
    let (bad, good, published, ()) = tokio::join!(
        refer_until_it_is_settled(&outbox, 99),
        refer_until_it_is_settled(&outbox, 1),
        bus.publish(OrderPlaced { number: 1 }),
        async { first.roll_back() },
    );
    published.expect("it has nothing to do with it");
    good.expect("it broke nothing");
    let error = bad.expect_err("it is the one");
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    let children = sqlx::query_scalar("SELECT id FROM child");
    let children: Vec<i64> = children.fetch_all(store.readers()).await.expect("it reads");
    assert_eq!(children, [1]);
}

#[tokio::test]
async fn a_transaction_that_does_not_end_is_given_up() {
    let store_place = Place::new();
    let config = SqliteConfig::new(store_place.file("shop.db"))
        .with_busy_timeout(Duration::from_millis(300))
        .with_transaction_limit(Duration::from_millis(200));
    let (store, outbox) = shop(config).await;
    let mut kept = outbox.begin(Origin::new()).await.expect("a transaction");
    write(&mut kept, 1).await.expect("it is written");
    let waits = outbox.begin(Origin::new());
    let error = timeout(LIMIT, waits)
        .await
        .expect("it hears")
        .expect_err("it is locked");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let error = kept.commit().await.expect_err("it was given up");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.is_retryable(), "{error}");
    assert!(error.to_string().contains("longer than 200ms"), "{error}");
    timeout(LIMIT, async {
        while let Err(error) = outbox.begin(Origin::new()).await {
            assert_eq!(error.kind(), ErrorKind::Unavailable);
        }
    })
    .await
    .expect("its connection is closed soon");
    place(&outbox, 2).await;
    assert_eq!(orders(&store).await, [2]);
}

#[tokio::test]
async fn a_statement_that_does_not_end_is_interrupted() {
    let store_place = Place::new();
    let config = SqliteConfig::new(store_place.file("shop.db"))
        .with_transaction_limit(Duration::from_millis(200));
    let (store, outbox) = shop(config).await;
    let mut tx = outbox.begin(Origin::new()).await.expect("a transaction");
    write(&mut tx, 1).await.expect("it is written");
    let endless = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n)
        INSERT INTO orders SELECT count(*) FROM n";
    let endless = sqlx::query(endless).execute(&mut *tx);
    let ended = timeout(LIMIT, endless).await.expect("it is interrupted");
    ended.expect_err("it has no result");
    tx.roll_back();
    place(&outbox, 2).await;
    assert_eq!(orders(&store).await, [2]);
}

#[tokio::test(start_paused = true)]
async fn the_limit_of_a_transaction_is_real_time() {
    let store_place = Place::new();
    let (_store, outbox) = shop(SqliteConfig::new(store_place.file("shop.db"))).await;
    let mut tx = outbox.begin(Origin::new()).await.expect("a transaction");
    for number in 0..100 {
        write(&mut tx, number).await.expect("it is written");
    }
    tokio::time::sleep(Duration::from_secs(3600)).await;
    tx.commit().await.expect("that took no time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_side_by_side_share_commits_and_keep_their_order() {
    let store_place = Place::new();
    let (store, outbox) = shop(SqliteConfig::new(store_place.file("shop.db"))).await;
    let outbox = Arc::new(outbox);
    let requests: Vec<_> = (0..64)
        .map(|number| {
            let outbox = Arc::clone(&outbox);
            tokio::spawn(async move { place(&outbox, number).await })
        })
        .collect();
    for request in requests {
        request.await.expect("it goes well");
    }
    assert_eq!(orders(&store).await.len(), 64);
    let placed = waiting(&store).await;
    let mut numbers: Vec<_> = placed.iter().map(|next| next.message.key.clone()).collect();
    numbers.sort();
    numbers.dedup();
    assert_eq!(numbers.len(), 64);
}

#[async_trait::async_trait]
impl OutboxHarness for Place {
    async fn open(&self) -> Result<Arc<dyn OutboxStore>> {
        Ok(Arc::new(SqliteStore::open(self.file("shop.db")).await?))
    }

    async fn begin(&self) -> Result<Box<dyn OutboxTransaction>> {
        let store = SqliteStore::open(self.file("shop.db")).await?;
        let outbox = store.outbox(&EventBus::new(MemoryBroker::new()));
        let tx = outbox.begin(Origin::new()).await?;
        Ok(Box::new(Begun(store, tx)))
    }
}

/// A transaction of the store's own.
struct Begun(SqliteStore, SqliteTransaction);

#[async_trait::async_trait]
impl OutboxTransaction for Begun {
    async fn append(&mut self, messages: Vec<(EventId, Message)>) -> Result<()> {
        self.0.append(&mut self.1, &messages).await
    }

    async fn commit(self: Box<Self>) -> Result<()> {
        self.1.commit().await
    }
}

mod conformance {
    use crate::place::Place;

    eventbus_testkit::outbox_conformance!(Place::new());
}
