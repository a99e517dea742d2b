//! A service that is killed over and over while requests and handlers write: what it committed and
//! what it published add up.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use eventbus_core::{
    BoxError, Consumer, Context, EventBus, Key, Origin, OutboxStore, Start, Until,
};
use eventbus_sql::{SqliteBroker, SqliteStore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::child::{Process, config, say};
use crate::events::{OrderPlaced, StockReserved};
use crate::place::Place;

const LIMIT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(5);
const ROUNDS: usize = 6;
const REQUESTS: usize = 4;

async fn reserve(order: OrderPlaced, mut cx: Context<(), SqliteStore>) -> Result<(), BoxError> {
    let OrderPlaced { number } = order;
    sqlx::query("INSERT INTO reserved (number) VALUES (?)")
        .bind(number)
        .execute(cx.transaction().await?)
        .await?;
    cx.publish(StockReserved { number })?;
    Ok(())
}

/// The service on a broker; its own database lies beside the broker's.
struct Service {
    bus: EventBus,
    store: SqliteStore,
    inventory: Consumer,
}

impl Service {
    async fn start(broker: SqliteBroker, file: &Path) -> Self {
        let bus = EventBus::new(broker);
        let store = SqliteStore::connect(config(&file.with_extension("store")))
            .await
            .expect("it opens");
        let mut tx = begin(&bus, &store).await;
        sqlx::raw_sql(
            "CREATE TABLE IF NOT EXISTS orders (number INTEGER PRIMARY KEY AUTOINCREMENT);
             CREATE TABLE IF NOT EXISTS reserved (number INTEGER)",
        )
        .execute(&mut *tx)
        .await
        .expect("the tables are there");
        tx.commit().await.expect("it commits");
        let inventory = bus.consumer("inventory").unit(store.clone()).on(reserve);
        let inventory = inventory.spawn().await.expect("it starts");
        Self {
            bus,
            store,
            inventory,
        }
    }

    async fn relay(&self, stop: impl Future<Output = ()> + Send) {
        let relay = self.store.outbox(&self.bus).relay();
        relay.run_until(stop).await.expect("it relays");
    }
}

async fn begin(bus: &EventBus, store: &SqliteStore) -> eventbus_sql::SqliteTransaction {
    let outbox = store.outbox(bus);
    outbox.begin(Origin::new()).await.expect("a transaction")
}

/// Takes orders, reserves for them and publishes for ever; says each order that was committed.
pub(crate) async fn trade(broker: SqliteBroker, file: &Path) {
    let service = Service::start(broker, file).await;
    let mut requests = JoinSet::new();
    for _ in 0..REQUESTS {
        let (bus, store) = (service.bus.clone(), service.store.clone());
        requests.spawn(async move {
            for turn in 1.. {
                let mut tx = begin(&bus, &store).await;
                let order =
                    sqlx::query_scalar("INSERT INTO orders DEFAULT VALUES RETURNING number");
                let number: i64 = order.fetch_one(&mut *tx).await.expect("it is written");
                tx.publish(OrderPlaced { number }).expect("collected");
                if turn % 5 == 0 {
                    tx.roll_back();
                    continue;
                }
                tx.commit().await.expect("it commits");
                say(number);
            }
        });
    }
    service.relay(std::future::pending()).await;
}

/// How often events of a type were published for each order, by their distinct ids.
async fn published(bus: &EventBus, topic: eventbus_core::Topic) -> BTreeMap<i64, usize> {
    let reader = bus.read(&[topic], Start::Earliest, Some(Until::Now)).await;
    let mut reader = reader.expect("it can be read");
    let mut ids: BTreeMap<i64, BTreeSet<String>> = BTreeMap::new();
    while let Some(record) = reader.next().await.expect("it reads on") {
        let key = record.message.key.as_ref().map(Key::as_bytes);
        let key = std::str::from_utf8(key.expect("a key")).expect("a text");
        let id = record.message.headers.get_str("eb-id").expect("an id");
        let ids = ids.entry(key.parse().expect("a number")).or_default();
        ids.insert(id.to_owned());
    }
    ids.into_iter().map(|(key, ids)| (key, ids.len())).collect()
}

async fn rows(store: &SqliteStore, table: &str) -> BTreeMap<i64, usize> {
    let sql = format!("SELECT number, count(*) FROM {table} GROUP BY number");
    let rows: Vec<(i64, i64)> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
        .fetch_all(store.readers())
        .await
        .expect("it reads");
    let rows = rows.into_iter();
    rows.map(|(number, times)| (number, times as usize))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_service_committed_and_published_adds_up() {
    let place = Place::new();
    let file = place.file("bus.db");
    let mut acknowledged = BTreeSet::new();
    for round in 0..ROUNDS {
        let mut service = Process::start("shop", &file);
        for _ in 0..50 + 20 * round {
            let said = service.hear().expect("it trades");
            acknowledged.insert(said.parse::<i64>().expect("a number"));
        }
        let said = service.kill();
        acknowledged.extend(
            said.iter()
                .map(|said| said.parse::<i64>().expect("a number")),
        );
    }

    let broker = SqliteBroker::connect(config(&file))
        .await
        .expect("it opens");
    let service = Service::start(broker, &file).await;
    let orders = rows(&service.store, "orders").await;
    let relayed = service.relay(async {
        let is_waiting = async || service.store.depth().await.expect("it counts").messages() > 0;
        while rows(&service.store, "reserved").await.len() < orders.len() || is_waiting().await {
            sleep(PAUSE).await;
        }
    });
    timeout(LIMIT, relayed).await.expect("nothing is missing");

    let once: BTreeMap<i64, usize> = orders.keys().map(|number| (*number, 1)).collect();
    assert!(acknowledged.iter().all(|number| once.contains_key(number)));
    assert_eq!(rows(&service.store, "reserved").await, once);
    let bus = &service.bus;
    let topics = ["order-events", "stock-events"].map(eventbus_core::Topic::from_static);
    for topic in topics {
        assert_eq!(published(bus, topic).await, once);
    }
    service.inventory.shutdown().await.expect("it ends");
}
