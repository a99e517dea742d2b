//! A service's store in PostgreSQL beside hand-written SQL on the same server, interleaved in one run:
//! appending to the outbox, relaying what waits there, and handling events with an inbox. Prints
//! rates, and the median of the ratios of pairs.
//!
//! `export $(dev/brokers up postgres); cargo bench -p eventbus --features postgres --bench postgres`
//! (PAIRS=15 for more pairs, ONLY=relay for what has that in its name)
//!
//! With `-- latency`: how long after an idle service's commit its event is on the broker. With
//! `-- backlog`: what relaying an event costs at a backlog of a million; that takes minutes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use eventbus::broker::Publisher;
use eventbus::format::FlatFormat;
use eventbus::store::outbox_lane;
use eventbus::{
    BoxError, Context, Event, EventBus, EventId, Headers, Key, MemoryBroker, Message, Origin,
    PostgresConfig, PostgresStore, Topic,
};
use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use tokio::sync::Notify;

#[path = "postgres/backlog.rs"]
mod backlog;
#[path = "postgres/latency.rs"]
mod latency;

const TRANSACTIONS: usize = 1_000;
const TURN: usize = 50;
const TEN: usize = 10;
const WAITING: usize = 200_000;
const RELAYED: i64 = 1_000;
const EVENTS: usize = 10_000;
const GROUP: usize = 100;

/// 256 bytes in the flat format.
#[derive(Clone, Debug, Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "orders", key = "order_id")]
struct OrderCreated {
    order_id: u64,
    customer: String,
    address: String,
    cents: i64,
}

/// Who is measured, and what.
#[derive(Clone, Copy)]
enum Task {
    Append(usize),
    Relay,
    Inbox,
}

/// One comparison: its goal, and the rates of both arms.
struct Comparison {
    name: &'static str,
    task: Task,
    goal: f64,
    raw: Vec<f64>,
    store: Vec<f64>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let pairs = std::env::var("PAIRS");
    let pairs = pairs.ok().and_then(|pairs| pairs.parse().ok());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime can be built");
    match arguments.first().map(String::as_str) {
        Some("latency") => runtime.block_on(latency::measure()),
        Some("backlog") => runtime.block_on(backlog::compare()),
        // Cargo adds an argument of its own.
        _ => runtime.block_on(compare(pairs.unwrap_or(5))),
    }
}

#[allow(clippy::print_stdout, reason = "a bench prints its figures")]
async fn compare(pairs: usize) {
    let size = message(0).1.payload.len();
    println!("{size} B of payload, synchronous_commit=on, medians of {pairs} interleaved pairs");
    let comparison = |name, task, goal| Comparison {
        name,
        task,
        goal,
        raw: Vec::new(),
        store: Vec::new(),
    };
    let comparisons = [
        comparison("append an event in a transaction", Task::Append(1), 0.95),
        comparison("append 10 events in a transaction", Task::Append(TEN), 0.95),
        comparison("relay what waits to memory", Task::Relay, 0.9),
        comparison("handle with an inbox, 100 a commit", Task::Inbox, 0.9),
    ];
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut comparisons = Vec::from(comparisons);
    comparisons.retain(|comparison| comparison.name.contains(&only));
    for pair in 0..pairs {
        for comparison in &mut comparisons {
            // The other one first every second time.
            let (raw, store) = measure(comparison.task, pair % 2 == 0).await;
            comparison.raw.push(raw);
            comparison.store.push(store);
        }
    }
    for Comparison {
        name,
        goal,
        raw,
        store,
        ..
    } in comparisons
    {
        let ratios = raw.iter().zip(&store).map(|(raw, store)| store / raw);
        let ratio = median(ratios.collect());
        println!(
            "{name}: raw {:.0}/s, store {:.0}/s, ratio {ratio:.2} (goal {goal})",
            median(raw),
            median(store),
        );
    }
}

/// The rates by hand and of the store. What one commits and the next waits for differs most from
/// second to second, so that appends take turns every few transactions.
async fn measure(task: Task, raw_first: bool) -> (f64, f64) {
    let turns = match task {
        Task::Append(_) => TRANSACTIONS / TURN,
        Task::Relay | Task::Inbox => 1,
    };
    let places = [Place::new().await, Place::new().await];
    let (mut raw, mut store) = (Duration::ZERO, Duration::ZERO);
    for turn in 0..turns {
        let raw_first = raw_first == (turn % 2 == 0);
        for is_raw in [raw_first, !raw_first] {
            match is_raw {
                true => raw += run(true, task, &places[0]).await,
                false => store += run(false, task, &places[1]).await,
            }
        }
    }
    for place in places {
        place.remove().await;
    }
    let events = match task {
        Task::Append(events) => TRANSACTIONS * events,
        Task::Relay => WAITING,
        Task::Inbox => EVENTS,
    };
    (
        events as f64 / raw.as_secs_f64(),
        events as f64 / store.as_secs_f64(),
    )
}

async fn run(raw: bool, task: Task, place: &Place) -> Duration {
    match (raw, task) {
        (true, Task::Append(events)) => raw_append(place, events).await,
        (false, Task::Append(events)) => append(place, events).await,
        (true, Task::Relay) => raw_relay(place).await,
        (false, Task::Relay) => relay(place).await,
        (true, Task::Inbox) => raw_handle(place).await,
        (false, Task::Inbox) => handle(place).await,
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A schema of its own on the server.
struct Place {
    schema: String,
    store: PostgresStore,
}

impl Place {
    async fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let schema = format!("bench_{}_{number}", std::process::id());
        let mut config = PostgresConfig::from_url(&url()).expect("a good url");
        config.connect = config.connect.options([("search_path", &schema)]);
        let store = PostgresStore::connect(config.with_schema(&schema)).await;
        let place = Self {
            schema,
            store: store.expect("the server answers"),
        };
        let table = "CREATE TABLE handled (order_id bigint NOT NULL, cents bigint NOT NULL)";
        place.execute(table).await;
        place
    }

    async fn execute(&self, sql: &'static str) {
        let executed = sqlx::raw_sql(sql).execute(self.store.pool()).await;
        executed.expect("the statement is right");
    }

    async fn connection(&self) -> PgConnection {
        let mut connection = PgConnection::connect(&url()).await.expect("it answers");
        let sql = format!("SET search_path TO {}", self.schema);
        let set = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection);
        set.await.expect("it is set");
        connection
    }

    /// Fills the outbox, and leaves what autovacuum may do behind.
    async fn fill(&self, events: usize) {
        let mut connection = self.connection().await;
        let messages: Vec<_> = (0..events as u64).map(message).collect();
        for messages in messages.chunks(1_000) {
            let mut tx = connection.begin().await.expect("a transaction");
            let appended = self.store.append(&mut tx, messages).await;
            appended.expect("it is appended");
            tx.commit().await.expect("it commits");
        }
        self.execute("VACUUM ANALYZE outbox").await;
    }

    async fn remove(self) {
        let sql = format!("DROP SCHEMA {} CASCADE", self.schema);
        let mut connection = self.connection().await;
        let dropped = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection);
        dropped.await.expect("it is dropped");
    }
}

fn url() -> String {
    std::env::var("EVENTBUS_TEST_POSTGRES")
        .expect("EVENTBUS_TEST_POSTGRES is not set: export $(dev/brokers up postgres)")
}

fn order(order_id: u64) -> OrderCreated {
    OrderCreated {
        order_id,
        customer: "x".repeat(60),
        address: "y".repeat(92),
        cents: 1_999,
    }
}

/// A message as a bus writes it, key and headers included.
fn message(order_id: u64) -> (EventId, Message) {
    let bus = EventBus::builder(MemoryBroker::new())
        .format(FlatFormat)
        .build();
    let mut batch = bus.batch(Origin::new()).expect("no handler runs");
    batch.publish(order(order_id)).expect("it is small");
    batch.into_messages().remove(0)
}

async fn append(place: &Place, events: usize) -> Duration {
    let mut connection = place.connection().await;
    let messages: Vec<_> = (0..events as u64).map(message).collect();
    let mut start = Instant::now();
    for turn in 0..=TURN {
        // The first has prepared the statements.
        if turn == 1 {
            start = Instant::now();
        }
        let mut tx = connection.begin().await.expect("a transaction");
        let appended = place.store.append(&mut tx, &messages).await;
        appended.expect("it is appended");
        tx.commit().await.expect("it commits");
    }
    start.elapsed()
}

async fn raw_append(place: &Place, events: usize) -> Duration {
    let mut connection = place.connection().await;
    let messages: Vec<_> = (0..events as u64).map(message).collect();
    let mut start = Instant::now();
    for turn in 0..=TURN {
        // The first has prepared the statements.
        if turn == 1 {
            start = Instant::now();
        }
        let mut tx = connection.begin().await.expect("a transaction");
        raw_insert(&mut tx, &messages).await;
        tx.commit().await.expect("it commits");
    }
    start.elapsed()
}

/// One statement for all, as somebody writes it who knows PostgreSQL.
async fn raw_insert(connection: &mut PgConnection, messages: &[(EventId, Message)]) {
    const ONE: &str = "INSERT INTO outbox
        (lane, id, aggregatetype, aggregateid, type, payload, headers) VALUES ($1, $2, $3, $4, $5, $6, $7)";
    const ALL: &str = "INSERT INTO outbox
        (lane, id, aggregatetype, aggregateid, type, payload, headers)
        SELECT * FROM unnest($1::int[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bytea[],
            $7::bytea[])";
    let lane = |(id, message): &(EventId, Message)| outbox_lane(message.key.as_ref(), id) as i32;
    let key = |message: &Message| message.key.as_ref().map(Key::to_string);
    let inserted = if let [(id, message)] = messages {
        sqlx::query(ONE)
            .bind(lane(&messages[0]))
            .bind(id.to_string())
            .bind(message.topic.as_str())
            .bind(key(message))
            .bind(OrderCreated::TYPE)
            .bind(&message.payload[..])
            .bind(&message.headers.packed()[..])
            .execute(connection)
            .await
    } else {
        let all = || messages.iter().map(|(_, message)| message);
        sqlx::query(ALL)
            .bind(messages.iter().map(lane).collect::<Vec<_>>())
            .bind(
                messages
                    .iter()
                    .map(|it| it.0.to_string())
                    .collect::<Vec<_>>(),
            )
            .bind(all().map(|it| it.topic.as_str()).collect::<Vec<_>>())
            .bind(all().map(key).collect::<Vec<_>>())
            .bind(vec![OrderCreated::TYPE; messages.len()])
            .bind(all().map(|it| &it.payload[..]).collect::<Vec<_>>())
            .bind(all().map(|it| &it.headers.packed()[..]).collect::<Vec<_>>())
            .execute(connection)
            .await
    };
    inserted.expect("it is inserted");
}

async fn relay(place: &Place) -> Duration {
    place.fill(WAITING).await;
    let broker = MemoryBroker::new();
    let relay = place.store.outbox(&EventBus::new(broker)).relay();
    let handle = relay.handle();
    let start = Instant::now();
    relay
        .run_until(async {
            while handle.status().published < WAITING as u64 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .expect("it ends well");
    start.elapsed()
}

/// What a team writes that wants order: what comes first, published, deleted.
async fn raw_relay(place: &Place) -> Duration {
    const NEXT: &str = "SELECT position, aggregatetype, aggregateid, headers, payload FROM outbox
        ORDER BY position LIMIT $1";
    place.fill(WAITING).await;
    let broker = MemoryBroker::new();
    let mut connection = place.connection().await;
    let mut relayed = 0;
    let start = Instant::now();
    while relayed < WAITING {
        let rows = sqlx::query(NEXT)
            .bind(RELAYED)
            .fetch_all(&mut connection)
            .await
            .expect("it can be read");
        let mut positions: Vec<i64> = Vec::with_capacity(rows.len());
        let mut batch = Vec::with_capacity(rows.len());
        for row in &rows {
            positions.push(row.get(0));
            let topic = Topic::new(row.get(1)).expect("it is one");
            let headers = Bytes::copy_from_slice(row.get(3));
            let mut message = Message::new(topic, Bytes::copy_from_slice(row.get(4)))
                .with_headers(Headers::from_packed(headers).expect("they were written whole"));
            message.key = row.get::<Option<&str>, _>(2).map(Key::from);
            batch.push(message);
        }
        broker.publish(batch).await.expect("memory takes it");
        sqlx::query("DELETE FROM outbox WHERE position = ANY($1)")
            .bind(&positions)
            .execute(&mut connection)
            .await
            .expect("it is deleted");
        relayed += positions.len();
    }
    start.elapsed()
}

const HANDLE: &str = "INSERT INTO handled (order_id, cents) VALUES ($1, $2)";

/// How many are handled, and whom to tell.
type Handled = (AtomicUsize, Notify);

async fn handle(place: &Place) -> Duration {
    let bus = EventBus::builder(MemoryBroker::new())
        .format(FlatFormat)
        .build();
    let orders: Vec<_> = (0..EVENTS as u64).map(order).collect();
    let published = bus.publish_all(orders).await;
    published.expect("memory takes it");
    let handled: Arc<Handled> = Arc::default();
    let start = Instant::now();
    let consumer = bus
        .consumer("bench")
        .shared_state(Arc::clone(&handled))
        .unit(place.store.clone().with_group_max(GROUP))
        .workers(1)
        .on(handle_one)
        .spawn()
        .await
        .expect("a consumer can be spawned");
    while handled.0.load(Ordering::Relaxed) < EVENTS {
        let limit = Duration::from_secs(60);
        let waited = tokio::time::timeout(limit, handled.1.notified()).await;
        waited.expect("the backlog is handled");
    }
    // The last ones are settled, and so committed.
    consumer.shutdown().await.expect("it ends");
    start.elapsed()
}

async fn handle_one(
    order: OrderCreated,
    mut cx: Context<Handled, PostgresStore>,
) -> Result<(), BoxError> {
    sqlx::query(HANDLE)
        .bind(order.order_id as i64)
        .bind(order.cents)
        .execute(cx.transaction().await?)
        .await?;
    let (handled, done) = cx.state();
    if handled.fetch_add(1, Ordering::Relaxed) + 1 == EVENTS {
        done.notify_one();
    }
    Ok(())
}

/// The batched statement by hand: ids first, then the writes of those that are new, in one commit.
async fn raw_handle(place: &Place) -> Duration {
    const RECORD: &str = "INSERT INTO inbox (consumer_group, event_id, handled_at)
        SELECT 'bench', id, 0 FROM unnest($1::text[]) AS id ON CONFLICT DO NOTHING RETURNING event_id";
    let messages: Vec<_> = (0..EVENTS as u64).map(message).collect();
    let bus = EventBus::builder(MemoryBroker::new())
        .format(FlatFormat)
        .build();
    let mut connection = place.connection().await;
    let start = Instant::now();
    for group in messages.chunks(GROUP) {
        let mut tx = connection.begin().await.expect("a transaction");
        let ids: Vec<String> = group.iter().map(|(id, _)| id.to_string()).collect();
        let by_id: HashMap<_, _> = ids.iter().zip(group).collect();
        let new = sqlx::query(RECORD)
            .bind(&ids)
            .fetch_all(&mut *tx)
            .await
            .expect("they are recorded");
        for row in &new {
            let (_, message) = by_id[&row.get::<String, _>(0)];
            let order: Option<OrderCreated> = bus.event(message).expect("it is an event");
            let order = order.expect("it is of this type");
            sqlx::query(HANDLE)
                .bind(order.order_id as i64)
                .bind(order.cents)
                .execute(&mut *tx)
                .await
                .expect("it is written");
        }
        tx.commit().await.expect("it commits");
    }
    start.elapsed()
}
