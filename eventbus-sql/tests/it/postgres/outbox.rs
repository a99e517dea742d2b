//! Transactions of a service that publish: through the store, and in a connection of its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use eventbus_core::{
    Broker, ErrorKind, EventBus, EventId, Key, MemoryBroker, Message, Origin, OutboxStore, Relay,
    Result, Signal, Subscriber, Subscription, Topic, Until,
};
use eventbus_sql::{PostgresStore, PostgresTransaction};
use eventbus_testkit::{OutboxHarness, OutboxTransaction};
use sqlx::Connection;
use tokio::time::{Instant, sleep, timeout};

use super::server::Server;
use super::service::{Service, config, write};
use crate::events::{MailWanted, OrderPlaced};
use crate::waiting::{LIMIT, until};

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn writes_and_events_commit_together_or_not_at_all() {
    let service = Service::open().await;
    let origin = Origin::new().with_correlation_id("request-7");
    let begun = service.outbox.begin(origin).await;
    let mut tx = begun.expect("a transaction");
    write(&mut tx, 1).await.expect("it is written");
    let id = tx.publish(OrderPlaced { number: 1 }).expect("collected");
    tx.publish(MailWanted { number: 1 }).expect("collected");
    assert!(service.orders().await.is_empty(), "nobody sees it before");
    tx.commit().await.expect("it commits");
    let mut dropped = service.begin().await;
    write(&mut dropped, 2).await.expect("it is written");
    let collected = dropped.publish(OrderPlaced { number: 2 });
    collected.expect("collected");
    drop(dropped);
    let mut fails = service.begin().await;
    write(&mut fails, 3).await.expect("it is written");
    write(&mut fails, 3).await.expect_err("it is there");
    fails.roll_back();

    assert_eq!(service.orders().await, [1]);
    let found = service.waiting().await;
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].id, id);
    assert_eq!(found[0].message.key, Some(Key::from("1")));
    let correlation = found[0].message.headers.get_str("eb-correlation-id");
    assert_eq!(correlation, Some("request-7"));
    assert_eq!(found[1].message.topic.as_str(), "mail");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn the_outbox_has_the_columns_that_debezium_looks_for() {
    let service = Service::open().await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let origin = Origin::new().with_traceparent(trace);
    let mut tx = service.outbox.begin(origin).await.expect("a transaction");
    let id = tx.publish(OrderPlaced { number: 7 }).expect("collected");
    let topic = Topic::from_static("raw");
    let odd = [vec![0xff, 0], b"a\0b".to_vec(), Vec::new()];
    let odd = odd.map(|key| Message::new(topic.clone(), "x").with_key(Key::new(key)));
    let raw: Vec<_> = odd.iter().map(|it| (EventId::new(), it.clone())).collect();
    service.store.append(&mut tx, &raw).await.expect("appended");
    tx.commit().await.expect("it commits");

    type Columns = (String, String, String, String, Vec<u8>, Option<String>);
    let sql = "SELECT id, aggregatetype, aggregateid, type, payload, tracingspancontext
        FROM outbox WHERE type <> ''";
    let row: Columns = sqlx::query_as(sql)
        .fetch_one(service.store.pool())
        .await
        .expect("a row");
    assert_eq!(
        (row.0, row.1.as_str(), row.2.as_str()),
        (id.to_string(), "order-events", "7")
    );
    assert_eq!(row.3, "OrderPlaced");
    let payload = String::from_utf8(row.4).expect("it is JSON");
    assert!(payload.contains("\"number\":7"), "{payload}");
    assert_eq!(row.5, Some(format!("traceparent={trace}\n")));
    let found = service.waiting().await;
    let raw = found.iter().filter(|next| next.message.topic == topic);
    let raw: Vec<_> = raw.map(|next| next.message.clone()).collect();
    assert_eq!(raw, odd, "keys that are no text");
}

#[test]
#[ignore = "needs brokers: ./dev/test"]
fn a_store_may_be_dropped_where_no_runtime_is() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (service, store) = runtime.block_on(async {
        let service = Service::open().await;
        assert!(service.waiting().await.is_empty());
        let store = service.store.clone();
        (service, store)
    });
    // The test's server needs one.
    runtime.block_on(async { drop(service) });
    drop(runtime);
    drop(store);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_transaction_of_somebody_else_publishes_when_it_commits() {
    let service = Service::open().await;
    let batch = |number| {
        let mut batch = service.bus.batch(Origin::new()).expect("a batch");
        batch.publish(OrderPlaced { number }).expect("collected");
        batch
    };
    let mut foreign = service.store.pool().acquire().await.expect("a connection");
    let outside = service.outbox.append(&mut foreign, batch(0)).await;
    let error = outside.expect_err("no transaction");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);

    let mut tx = foreign.begin().await.expect("a transaction");
    write(&mut tx, 1).await.expect("it is written");
    let appended = service.outbox.append(&mut tx, batch(1)).await;
    appended.expect("appended");
    tx.rollback().await.expect("it is rolled back");
    assert!(service.waiting().await.is_empty());

    let mut tx = foreign.begin().await.expect("a transaction");
    write(&mut tx, 2).await.expect("it is written");
    let appended = service.outbox.append(&mut tx, batch(2)).await;
    appended.expect("appended");
    assert!(service.waiting().await.is_empty());
    tx.commit().await.expect("it commits");
    // It is looked for after 1, 2, 4 … 20 milliseconds, and not only from time to time.
    let committed = Instant::now();
    let mut looks = 0;
    while committed.elapsed() < Duration::from_millis(200) {
        service.store.appended().await;
        looks += 1;
    }
    assert!(looks >= 4, "{looks} looks in 200 ms");
    let found = service.waiting().await;
    assert_eq!(found[0].message.key, Some(Key::from("2")));
    assert_eq!(service.orders().await, [2]);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn transactions_inside_one_that_was_lent_are_savepoints() {
    let service = Service::open().await;
    for round in 0..3 {
        let number = 10 * round;
        let mut tx = service.begin().await;
        let mut kept = tx.begin().await.expect("a savepoint");
        write(&mut kept, number).await.expect("it is written");
        kept.commit().await.expect("it is released");
        let mut dropped = tx.begin().await.expect("a savepoint");
        let written = write(&mut dropped, number + 1).await;
        written.expect("it is written");
        // A statement that failed is undone with its savepoint.
        let again = write(&mut dropped, number).await;
        again.expect_err("it is there");
        drop(dropped);
        write(&mut tx, number + 2).await.expect("it is written");
        // The savepoint of one that is forgotten goes with the transaction.
        let mut forgotten = tx.begin().await.expect("a savepoint");
        let written = write(&mut forgotten, number + 3).await;
        written.expect("it is written");
        std::mem::forget(forgotten);
        match round {
            1 => tx.roll_back(),
            _ => tx.commit().await.expect("it commits"),
        }
    }
    assert_eq!(service.orders().await, [0, 2, 3, 20, 22, 23]);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn who_borrows_a_connection_cannot_publish_what_is_not_committed() {
    let service = Service::open().await;
    for end in ["COMMIT", "ROLLBACK", "ROLLBACK; BEGIN", "COMMIT; BEGIN"] {
        for publishes in [true, false] {
            let mut tx = service.begin().await;
            if publishes {
                let collected = tx.publish(OrderPlaced { number: 1 });
                collected.expect("collected");
            }
            let ended = sqlx::raw_sql(end).execute(&mut *tx).await;
            ended.expect("PostgreSQL does so");
            let error = tx.commit().await.expect_err("it is not what was begun");
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
            assert!(error.to_string().contains("leave BEGIN"), "{error}");
        }
    }
    assert!(service.waiting().await.is_empty());
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_failed_statement_whose_error_is_passed_over_fails_the_commit() {
    let service = Service::open().await;
    for publishes in [true, false] {
        let mut tx = service.begin().await;
        write(&mut tx, 1).await.expect("it is written");
        write(&mut tx, 1).await.expect_err("it is there");
        if publishes {
            let collected = tx.publish(OrderPlaced { number: 1 });
            collected.expect("collected");
        }
        // PostgreSQL itself would answer this COMMIT with success, and roll back.
        let error = tx.commit().await.expect_err("it undoes everything");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(!error.is_retryable());
    }
    assert!(service.orders().await.is_empty());
    assert!(service.waiting().await.is_empty());
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_broken_deferred_constraint_fails_the_commit() {
    let service = Service::open().await;
    let table = "CREATE TABLE parcel (
        number bigint REFERENCES orders (number) DEFERRABLE INITIALLY DEFERRED)";
    let created = sqlx::raw_sql(table).execute(service.store.pool()).await;
    created.expect("a table");
    let mut tx = service.begin().await;
    let insert = sqlx::query("INSERT INTO parcel VALUES (99)");
    insert.execute(&mut *tx).await.expect("it is checked later");
    tx.publish(OrderPlaced { number: 99 }).expect("collected");
    let error = tx.commit().await.expect_err("there is no such order");
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert!(error.to_string().contains("constraint"), "{error}");
    assert!(service.waiting().await.is_empty());
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_damaged_message_holds_up_no_other() {
    let service = Service::open().await;
    for number in 0..20 {
        let mut tx = service.begin().await;
        tx.publish(OrderPlaced { number }).expect("collected");
        tx.commit().await.expect("it commits");
    }
    let pool = service.store.pool();
    let damage = "UPDATE outbox SET aggregatetype = 'no topic!' WHERE position > 12";
    let damaged = sqlx::raw_sql(damage).execute(pool).await;
    damaged.expect("it is right");
    let relay = service.outbox.relay();
    let handle = relay.handle();
    let emptied = until(async || {
        let depth = service.store.depth().await.expect("it counts");
        depth.messages() == 0
    });
    let ended = timeout(LIMIT, relay.run_until(emptied)).await;
    ended.expect("it ends").expect("damage is no end");
    assert_eq!(handle.status().published, 12);
    let aside = sqlx::query_scalar("SELECT position FROM outbox WHERE lane < 0 ORDER BY position");
    let aside: Vec<i64> = aside.fetch_all(pool).await.expect("it reads");
    assert_eq!(aside, (13..=20).collect::<Vec<_>>());
    // As the documentation says.
    let mended =
        "UPDATE outbox SET lane = -1 - lane, aggregatetype = 'order-events' WHERE lane < 0";
    sqlx::raw_sql(mended).execute(pool).await.expect("mended");
    assert_eq!(service.waiting().await.len(), 8);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_transaction_that_stays_open_holds_up_only_what_it_publishes() {
    let service = Service::open().await;
    let mut idle = service.store.pool().acquire().await.expect("a connection");
    let mut tx = idle.begin().await.expect("a transaction");
    write(&mut tx, 0).await.expect("it is written");
    let mut late = service.bus.batch(Origin::new()).expect("a batch");
    late.publish(OrderPlaced { number: 0 }).expect("collected");
    let appended = service.outbox.append(&mut tx, late).await;
    appended.expect("appended");

    let relay = service.outbox.relay();
    let handle = relay.handle();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(relay.run_until(async {
        // Dropping it stops the relay, too.
        let _ = stopped.await;
    }));
    for number in 1..=20 {
        let mut tx = service.begin().await;
        tx.publish(OrderPlaced { number }).expect("collected");
        tx.commit().await.expect("it commits");
    }
    until(async || handle.status().published == 20).await;
    until(async || handle.status().depth.held_back > Some(Duration::from_secs(1))).await;
    tx.commit().await.expect("it commits");
    until(async || handle.status().published == 21).await;
    until(async || handle.status().depth.held_back.is_none()).await;
    drop(stop);
    running.await.expect("it ends").expect("it ends well");
    assert!(service.waiting().await.is_empty());
}

/// Writers change aggregates under a lock of their row, and publish its new version; some of them
/// began long before, some hold an earlier position of another key. With relays at it meanwhile, the
/// versions of each aggregate are published in their order.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "needs brokers: ./dev/test"]
async fn versions_of_an_aggregate_are_published_in_their_order() {
    const AGGREGATES: i64 = 5;
    const WRITERS: i64 = 8;
    const CHANGES: i64 = 60;
    let service = Service::with(|config| config.with_connections(12)).await;
    let broker = MemoryBroker::new();
    let bus = EventBus::new(broker.clone());
    let sql = "INSERT INTO orders SELECT number FROM generate_series(1, $1) AS number";
    let aggregates = sqlx::query(sql).bind(AGGREGATES);
    aggregates
        .execute(service.store.pool())
        .await
        .expect("rows");

    let (stop, stopped) = tokio::sync::watch::channel(false);
    let relays: Vec<_> = (0..3)
        .map(|_| {
            let relay = Relay::new(&bus, Arc::new(service.store.clone())).batch(7);
            let mut stopped = stopped.clone();
            tokio::spawn(relay.run_until(async move {
                // Dropping it stops the relay, too.
                let _ = stopped.changed().await;
            }))
        })
        .collect();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = service.store.clone();
            tokio::spawn(async move {
                for change in 0..CHANGES {
                    change_aggregate(&store, writer, change, AGGREGATES).await;
                }
            })
        })
        .collect();
    for writer in writers {
        timeout(2 * LIMIT, writer)
            .await
            .expect("in time")
            .expect("it ends well");
    }
    until(async || service.waiting().await.is_empty()).await;
    stop.send(true).expect("they run");
    for relay in relays {
        relay.await.expect("it ends").expect("it ends well");
    }

    let versions = published_versions(&broker).await;
    let all: i64 = versions.values().map(|it| it.len() as i64).sum();
    assert_eq!(all, WRITERS * CHANGES);
    for (aggregate, versions) in versions {
        assert!(versions.is_sorted(), "{aggregate}: {versions:?}");
    }
}

async fn change_aggregate(store: &PostgresStore, writer: i64, change: i64, aggregates: i64) {
    let outbox_topic = Topic::from_static("versions");
    let aggregate = 1 + (writer * 7 + change * 3) % aggregates;
    let mut connection = store.pool().acquire().await.expect("a connection");
    let mut tx = connection.begin().await.expect("a transaction");
    if change % 3 == 0 {
        // It has a transaction id from now on, older than those of others that commit before it.
        let early = sqlx::query("SELECT pg_current_xact_id()");
        early.execute(&mut *tx).await.expect("an id");
        sleep(Duration::from_millis((writer as u64 * 3) % 10)).await;
    }
    let sql = "UPDATE orders SET version = version + 1 WHERE number = $1 RETURNING version";
    let version: i64 = sqlx::query_scalar(sql)
        .bind(aggregate)
        .fetch_one(&mut *tx)
        .await
        .expect("it is there");
    let key = Key::display(aggregate);
    let message = Message::new(outbox_topic, format!("{version}")).with_key(key);
    let appended = store.append(&mut tx, &[(EventId::new(), message)]).await;
    appended.expect("appended");
    if change % 4 == 1 {
        sleep(Duration::from_millis((writer as u64 * 5) % 7)).await;
    }
    tx.commit().await.expect("it commits");
}

async fn published_versions(broker: &MemoryBroker) -> BTreeMap<String, Vec<i64>> {
    let reader = Subscription::reader(vec![Topic::from_static("versions")]).with_until(Until::Now);
    let mut member = broker.subscribe(reader).await.expect("it reads");
    let mut versions: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    let mut open = usize::MAX;
    while open > 0 {
        match member.deliveries.next().await.expect("it reads") {
            Signal::Assigned(lanes) => open = lanes.len(),
            Signal::Ended(lanes) => open -= lanes.len(),
            Signal::Delivered(batch) => {
                let settled = batch.iter().map(|it| it.receipt);
                let settled: Vec<_> = settled.collect();
                for delivery in batch {
                    let key = delivery.message.key.expect("a key").to_string();
                    let text = String::from_utf8(delivery.message.payload.to_vec());
                    let version = text.expect("text").parse().expect("a number");
                    versions.entry(key).or_default().push(version);
                }
                let settled = member.settlement.settle(&settled).await;
                settled.expect("it settles");
            }
            signal => panic!("{signal:?}"),
        }
    }
    broker.close().await.expect("it closes");
    versions
}

#[async_trait::async_trait]
impl OutboxHarness for Server {
    async fn open(&self) -> Result<Arc<dyn OutboxStore>> {
        Ok(Arc::new(PostgresStore::connect(config(self)).await?))
    }

    async fn begin(&self) -> Result<Box<dyn OutboxTransaction>> {
        let store = PostgresStore::connect(config(self)).await?;
        let outbox = store.outbox(&EventBus::new(MemoryBroker::new()));
        let tx = outbox.begin(Origin::new()).await?;
        Ok(Box::new(Begun(store, tx)))
    }
}

/// A transaction of the store's own.
struct Begun(PostgresStore, PostgresTransaction);

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
    use crate::postgres::server::Server;

    eventbus_testkit::outbox_conformance!(
        #[ignore = "needs brokers: ./dev/test"]
        Server::new().await
    );
}
