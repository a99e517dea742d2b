//! A service's handlers on its own database: effects happen once, whatever fails.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use eventbus_core::{
    BoxError, Breaker, Consumer, ConsumerBuilder, Context, EventBus, EventId, MemoryBroker, Origin,
    Outgoing, RetryPolicy,
};
use eventbus_sql::PostgresStore;
use sqlx::Connection;
use tokio::sync::Barrier;
use tokio::time::timeout;

use super::proxy::Proxy;
use super::server::{Server, restart};
use super::service::{Service, config};
use crate::events::{OrderPlaced, StockReserved};
use crate::waiting::{LIMIT, handled, is_holding, until};

const PROBE: Duration = Duration::from_millis(20);

/// What the handlers met.
#[derive(Debug, Default)]
struct Met {
    /// The attempt of each run, by order.
    attempts: Mutex<BTreeMap<i64, Vec<u32>>>,
    faults: Mutex<BTreeMap<i64, Fault>>,
    /// Contexts that a handler did not give back.
    kept: Mutex<Vec<Context<Arc<Met>, PostgresStore>>>,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Error,
    Panic,
    Late,
    Keep,
    /// Passes the error of a statement over.
    Swallow,
    /// Ends the transaction.
    Commit,
    RollBack,
    /// Its connection ends in the middle.
    Terminate,
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
    mut cx: Context<Arc<Met>, PostgresStore>,
) -> Result<(), BoxError> {
    let OrderPlaced { number } = order;
    let met = Arc::clone(cx.state());
    met.note(number, cx.attempt());
    cx.publish(StockReserved { number })?;
    sqlx::query("INSERT INTO reserved (number) VALUES ($1)")
        .bind(number)
        .execute(cx.transaction().await?)
        .await?;
    let fault = met.faults.lock().unwrap().remove(&number);
    let statement = match fault {
        None => return Ok(()),
        Some(Fault::Error) => return Err("as asked".into()),
        Some(Fault::Panic) => panic!("as asked"),
        Some(Fault::Late) => std::future::pending().await,
        Some(Fault::Keep) => {
            met.kept.lock().unwrap().push(cx);
            return Ok(());
        }
        Some(Fault::Swallow) => "SELECT 1 / 0",
        Some(Fault::Commit) => "COMMIT",
        Some(Fault::RollBack) => "ROLLBACK",
        Some(Fault::Terminate) => "SELECT pg_terminate_backend(pg_backend_pid())",
    };
    let ran = sqlx::raw_sql(statement).execute(cx.transaction().await?);
    let ran = ran.await;
    match fault {
        Some(Fault::Terminate) => Ok(ran.map(|_| ())?),
        _ => Ok(()),
    }
}

struct Shop {
    service: Service,
    met: Arc<Met>,
}

impl Shop {
    async fn open() -> Self {
        Self::of(Service::open().await)
    }

    fn of(service: Service) -> Self {
        Self {
            service,
            met: Arc::default(),
        }
    }

    fn consumer(&self, store: &PostgresStore) -> ConsumerBuilder<Arc<Met>, PostgresStore> {
        consumer(&self.service.bus, store, &self.met)
    }

    async fn spawn(&self) -> Consumer {
        let consumer = self.consumer(&self.service.store).spawn().await;
        consumer.expect("it starts")
    }

    async fn publish(&self, number: i64) -> EventId {
        let id = self.service.bus.publish(OrderPlaced { number }).await;
        id.expect("it is published")
    }
}

fn consumer(
    bus: &EventBus,
    store: &PostgresStore,
    met: &Arc<Met>,
) -> ConsumerBuilder<Arc<Met>, PostgresStore> {
    bus.consumer("inventory")
        .state(Arc::clone(met))
        .unit(store.clone())
        .on(reserve)
        .retry(RetryPolicy::immediate(3))
        .breaker(Breaker::default().with_probe_after(PROBE, PROBE))
}

fn once(numbers: std::ops::Range<i64>) -> BTreeMap<i64, i64> {
    numbers.map(|number| (number, 1)).collect()
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_duplicate_is_settled_without_running_its_handler() {
    let shop = Shop::open().await;
    let consumer = shop.spawn().await;
    let id = shop.publish(1).await;
    handled(&consumer, 1).await;
    let again = Outgoing::new(OrderPlaced { number: 1 }).with_id(id);
    let published = shop.service.bus.publish(again).await;
    published.expect("it is published");
    handled(&consumer, 2).await;
    assert_eq!(shop.met.attempts(1), [1]);
    assert_eq!(consumer.status().counts.duplicates, 1);
    assert_eq!(shop.service.reserved().await, once(1..2));
    let published = shop.service.waiting().await;
    assert_eq!(published.len(), 1);
    let own = published[0].message.headers.get_str("eb-id");
    assert_eq!(own, Some(published[0].id.to_string().as_str()));
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn an_event_that_two_replicas_handle_at_once_takes_effect_once() {
    let service = Service::open().await;
    let both = Arc::new(Barrier::new(2));
    let mut members = Vec::new();
    let mut buses = Vec::new();
    for _ in 0..2 {
        let bus = EventBus::new(MemoryBroker::new());
        let consumer = bus
            .consumer("inventory")
            .state(Arc::clone(&both))
            // A client of its own each, as processes have.
            .unit(
                PostgresStore::connect(config(&service.server))
                    .await
                    .expect("it connects"),
            )
            .on(
                async |order: OrderPlaced, mut cx: Context<Arc<Barrier>, PostgresStore>| {
                    cx.publish(StockReserved {
                        number: order.number,
                    })?;
                    // Neither has recorded it by now.
                    cx.state().wait().await;
                    sqlx::query("INSERT INTO reserved (number) VALUES ($1)")
                        .bind(order.number)
                        .execute(cx.transaction().await?)
                        .await?;
                    Ok(())
                },
            );
        members.push(consumer.spawn().await.expect("it starts"));
        buses.push(bus);
    }
    for number in 0..20 {
        let id = EventId::new();
        for bus in &buses {
            let order = Outgoing::new(OrderPlaced { number }).with_id(id.clone());
            bus.publish(order).await.expect("it is published");
        }
        for member in &members {
            handled(member, 1 + number as u64).await;
        }
    }
    let counts: Vec<_> = members
        .iter()
        .map(|member| member.status().counts)
        .collect();
    assert!(counts.iter().all(|counts| counts.failed_attempts == 0));
    let duplicates: u64 = counts.iter().map(|counts| counts.duplicates).sum();
    assert_eq!(duplicates, 20);
    assert_eq!(service.reserved().await, once(0..20));
    assert_eq!(service.waiting().await.len(), 20);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn work_ends_with_its_handler_however_that_ends() {
    let shop = Shop::open().await;
    let consumer = shop
        .consumer(&shop.service.store)
        .deadline(Duration::from_millis(500))
        .spawn()
        .await
        .expect("it starts");
    let faults = [
        Fault::Error,
        Fault::Panic,
        Fault::Late,
        Fault::Keep,
        Fault::Swallow,
        Fault::RollBack,
    ];
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
    assert_eq!(shop.service.reserved().await, once(0..6));
    assert_eq!(shop.service.waiting().await.len(), 6);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_savepoint_that_could_not_begin_harms_nobody_else() {
    let service = Service::with(|config| config.with_connections(4)).await;
    for _ in 0..8 {
        let mut tx = service.begin().await;
        sqlx::raw_sql("SELECT 1 / 0")
            .execute(&mut *tx)
            .await
            .expect_err("it is no number");
        // The driver answers by ending the whole transaction.
        tx.begin().await.expect_err("nothing more is done in it");
        tx.commit().await.expect_err("so is the commit");
    }
    for number in 0..8 {
        let mut tx = service.begin().await;
        let mut savepoint = tx.begin().await.expect("a savepoint");
        super::service::write(&mut savepoint, number)
            .await
            .expect("it is written");
        savepoint.commit().await.expect("it is released");
        tx.roll_back();
    }
    assert!(service.orders().await.is_empty(), "it commits nothing");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn an_event_whose_handler_commits_by_itself_is_never_settled_in_silence() {
    let shop = Shop::open().await;
    let consumer = shop.spawn().await;
    shop.met.set(1, Fault::Commit);
    shop.publish(1).await;
    handled(&consumer, 1).await;
    // Its writes were committed without what it publishes, so it is not taken for handled.
    assert_eq!(shop.met.attempts(1), [1, 2]);
    assert_eq!(shop.service.waiting().await.len(), 1);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_connection_that_ends_is_not_the_handlers_failure() {
    let shop = Shop::open().await;
    let consumer = shop.spawn().await;
    for number in 0..3 {
        shop.met.set(number, Fault::Terminate);
        shop.publish(number).await;
        handled(&consumer, 1 + number as u64).await;
        assert_eq!(shop.met.attempts(number), [1, 1]);
    }
    assert_eq!(consumer.status().counts.failed_attempts, 0);
    assert_eq!(shop.service.reserved().await, once(0..3));
    assert_eq!(shop.service.waiting().await.len(), 3);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_handler_that_waits_too_long_in_its_transaction_is_one_that_failed() {
    let timeout = Duration::from_millis(300);
    let service = Service::with(|config| config.with_timeout(timeout)).await;
    let shop = Shop::of(service);
    let consumer = shop
        .service
        .bus
        .consumer("inventory")
        .state(Arc::clone(&shop.met))
        .unit(shop.service.store.clone())
        .on(
            async |order: OrderPlaced, mut cx: Context<Arc<Met>, PostgresStore>| {
                cx.state().note(order.number, cx.attempt());
                cx.transaction().await?;
                tokio::time::sleep(Duration::from_millis(500)).await;
                Ok(())
            },
        )
        .retry(RetryPolicy::immediate(3))
        .breaker(Breaker::default().with_probe_after(PROBE, PROBE))
        .spawn()
        .await
        .expect("it starts");
    shop.publish(1).await;
    until(async || consumer.status().counts.dead_lettered == 1).await;
    assert_eq!(shop.met.attempts(1), [1, 2, 3]);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn while_all_connections_are_lent_nothing_counts_as_an_attempt() {
    let service = Service::with(|config| {
        config
            .with_connections(4)
            .with_timeout(Duration::from_millis(300))
    });
    let shop = Shop::of(service.await);
    let mut held = Vec::new();
    for _ in 0..4 {
        let begun = shop.service.outbox.begin(Origin::new()).await;
        let mut tx = begun.expect("a transaction");
        let longer = sqlx::raw_sql("SET LOCAL idle_in_transaction_session_timeout TO 0");
        longer.execute(&mut *tx).await.expect("it may");
        held.push(tx);
    }
    let consumer = shop.spawn().await;
    for number in 0..5 {
        shop.publish(number).await;
    }
    until(async || is_holding(&consumer)).await;
    until(async || shop.met.attempts(0).len() > 1).await;
    drop(held);
    handled(&consumer, 5).await;
    assert_eq!(consumer.status().counts.failed_attempts, 0);
    assert_eq!(shop.service.reserved().await, once(0..5));
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_commit_whose_answer_is_lost_takes_effect_once() {
    let server = Server::new().await;
    let proxy = Proxy::start().await;
    let service = Service::open().await;
    let mut behind = eventbus_sql::PostgresConfig::from_url(&format!(
        "{}&timeout=500ms",
        proxy.url(&service.server)
    ))
    .expect("a good url");
    behind.connect = behind
        .connect
        .options([("search_path", service.server.schema())]);
    let store = PostgresStore::connect(behind).await.expect("it connects");
    let shop = Shop::of(service);
    let consumer = shop.consumer(&store).spawn().await.expect("it starts");
    for number in 0..30 {
        if number % 3 == 1 {
            proxy.lose_answers();
        }
        shop.publish(number).await;
        tokio::time::sleep(PROBE / 4).await;
        proxy.mend();
    }
    handled(&consumer, 30).await;
    assert_eq!(consumer.status().counts.failed_attempts, 0);
    assert_eq!(shop.service.reserved().await, once(0..30));
    assert_eq!(shop.service.waiting().await.len(), 30);
    drop(server);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_restart_of_the_server_loses_and_doubles_nothing() {
    let (server, alone) = Server::alone().await;
    let service = Service::on(server, |config| config).await;
    let shop = Shop::of(service);
    let consumer = shop.spawn().await;
    for number in 0..200 {
        shop.publish(number).await;
        if number == 50 {
            restart().await;
        }
    }
    handled(&consumer, 200).await;
    assert_eq!(consumer.status().counts.failed_attempts, 0);
    assert_eq!(shop.service.reserved().await, once(0..200));
    assert_eq!(shop.service.waiting().await.len(), 200);
    drop(alone);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_transaction_that_cannot_be_serialized_is_done_again() {
    let service = Service::with(|mut config| {
        let isolation = [("default_transaction_isolation", "serializable")];
        config.connect = config.connect.options(isolation);
        config
    });
    let shop = Shop::of(service.await);
    let both = Arc::new(Barrier::new(2));
    let consumer = shop
        .service
        .bus
        .consumer("balance")
        .state(Arc::clone(&both))
        .unit(shop.service.store.clone())
        .on(
            async |order: OrderPlaced, mut cx: Context<Arc<Barrier>, PostgresStore>| {
                let (attempt, both) = (cx.attempt(), Arc::clone(cx.state()));
                let tx = cx.transaction().await?;
                // Each writes what depends on what the other one writes.
                let sql = "INSERT INTO orders SELECT $1, count(*) FROM orders";
                let insert = sqlx::query(sql).bind(order.number);
                insert.execute(&mut *tx).await?;
                if attempt == 1 {
                    // The other one may have failed, or wait for its turn.
                    let _ = timeout(PROBE * 5, both.wait()).await;
                }
                Ok(())
            },
        )
        .retry(RetryPolicy::immediate(10))
        .breaker(Breaker::default().with_probe_after(PROBE, PROBE))
        .spawn()
        .await
        .expect("it starts");
    for number in 0..10 {
        shop.publish(number).await;
    }
    handled(&consumer, 10).await;
    assert_eq!(shop.service.orders().await, (0..10).collect::<Vec<_>>());
    assert_eq!(consumer.status().counts.dead_lettered, 0);
    let sql = "SELECT count(DISTINCT version) FROM orders";
    let serial = sqlx::query_scalar(sql).fetch_one(shop.service.store.pool());
    assert_eq!(serial.await.ok(), Some(10i64), "each saw all before it");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn events_that_share_a_transaction_are_handled_one_after_the_other() {
    let shop = Shop::open().await;
    let consumer = shop
        .consumer(&shop.service.store.clone().with_group_max(50))
        .workers(1)
        .spawn()
        .await
        .expect("it starts");
    consumer.pause();
    shop.met.set(7, Fault::Error);
    shop.met.set(9, Fault::Terminate);
    let id = shop.publish(100).await;
    for number in 0..20 {
        shop.publish(number).await;
    }
    let again = Outgoing::new(OrderPlaced { number: 100 }).with_id(id);
    let published = shop.service.bus.publish(again).await;
    published.expect("it is published");
    consumer.resume();
    handled(&consumer, 22).await;
    let reserved = shop.service.reserved().await;
    assert_eq!(reserved.len(), 21);
    assert!(reserved.values().all(|times| *times == 1));
    assert_eq!(consumer.status().counts.duplicates, 1);
    assert_eq!(shop.service.waiting().await.len(), 21);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_consumer_that_is_dropped_anywhere_leaves_nothing_half_done() {
    let shop = Shop::open().await;
    for number in 0..20 {
        let consumer = shop.spawn().await;
        shop.publish(number).await;
        until(async || !shop.met.attempts(number).is_empty()).await;
        // Anywhere between the first statement and the settlement.
        drop(consumer);
    }
    let consumer = shop.spawn().await;
    until(async || shop.service.reserved().await.len() == 20).await;
    consumer.shutdown().await.expect("it ends");
    assert_eq!(shop.service.reserved().await, once(0..20));
    assert_eq!(shop.service.waiting().await.len(), 20);
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_was_handled_long_ago_is_forgotten() {
    let service = Service::with(|config| {
        config
            .with_inbox_retention(Duration::from_secs(3600))
            .with_retention_interval(Duration::from_millis(10))
    });
    let service = service.await;
    let sql = "INSERT INTO inbox SELECT 'inventory', n::text, n FROM generate_series(1, 2500) AS n;
        INSERT INTO inbox VALUES ('inventory', 'new', extract(epoch FROM now()) * 1000000)";
    let inserted = sqlx::raw_sql(sql).execute(service.store.pool()).await;
    inserted.expect("they are inserted");
    until(async || {
        let ids: Vec<String> = sqlx::query_scalar("SELECT event_id FROM inbox")
            .fetch_all(service.store.pool())
            .await
            .expect("it reads");
        ids == ["new"]
    })
    .await;
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_service_that_holds_all_its_connections_holds_up_no_handler() {
    let service = Service::with(|config| config.with_connections(4)).await;
    let shop = Shop::of(service);
    let mut held = Vec::new();
    for _ in 0..4 {
        let connection = shop.service.store.pool().acquire().await;
        held.push(connection.expect("it is free"));
    }
    let consumer = shop.spawn().await;
    shop.publish(1).await;
    handled(&consumer, 1).await;
    let mut free = held.pop().expect("there are some");
    free.ping().await.expect("it lives");
    drop((free, held));
    assert_eq!(shop.service.reserved().await, once(1..2));
    let timed = timeout(LIMIT, shop.service.waiting()).await;
    assert_eq!(timed.expect("in time").len(), 1);
}
