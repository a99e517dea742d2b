//! The broker beside hand-written SQL on the same kind of file, interleaved in one run: publishing
//! in batches, single publishes at once, and consuming a backlog through a bus. Prints rates, and
//! the median of the ratios of pairs.
//!
//! `cargo bench -p eventbus --bench sqlite` (PAIRS=15 for more pairs)
//!
//! With `-- latency`: how long an idle consumer takes to hear of a message. With `-- backlog`: what
//! a message costs at a backlog of ten million; that takes minutes and 5 GB of disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use eventbus::broker::Publisher;
use eventbus::format::FlatFormat;
use eventbus::{
    BoxError, Context, Event, EventBus, Headers, Key, MemoryBroker, Message, SqliteBroker,
    SqliteConfig, Start, TopicSpec, Until,
};
use serde::{Deserialize, Serialize};
use sqlx::sqlite::{SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{Arguments, AssertSqlSafe, ConnectOptions, Row, SqliteConnection};
use tokio::sync::Notify;
use tokio::task::JoinSet;

#[path = "sqlite/backlog.rs"]
mod backlog;
#[path = "sqlite/latency.rs"]
mod latency;

const BATCH: usize = 500;
const BATCHES: usize = 200;
const SINGLES: usize = 64;
const SINGLE_ROUNDS: usize = 150;
const BACKLOG: usize = 200_000;
const PAGE: i64 = 512;

/// 256 bytes in the flat format.
#[derive(Clone, Debug, Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "orders", key = "order_id")]
struct OrderCreated {
    order_id: u64,
    customer: String,
    address: String,
    cents: i64,
}

/// How many are handled, whom to tell, of how many.
type Handled = (AtomicUsize, Notify, AtomicUsize);

/// One comparison: its goal, and the rates of both arms.
struct Comparison {
    name: &'static str,
    goal: f64,
    raw: Vec<f64>,
    broker: Vec<f64>,
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
    if let [of, file] = arguments.as_slice()
        && of == "latency-of"
    {
        return runtime.block_on(latency::handle(Path::new(file)));
    }
    let directory = std::env::temp_dir().join(format!("eventbus-bench-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("the directory can be created");
    match arguments.first().map(String::as_str) {
        Some("latency") => runtime.block_on(latency::measure(&directory)),
        Some("backlog") => runtime.block_on(backlog::compare(&directory)),
        // Cargo adds an argument of its own.
        _ => runtime.block_on(compare(&directory, pairs.unwrap_or(5))),
    }
    std::fs::remove_dir_all(&directory).expect("the directory can be removed");
}

#[allow(clippy::print_stdout, reason = "a bench prints its figures")]
async fn compare(directory: &Path, pairs: usize) {
    let messages = messages().await;
    let size = messages[0].payload.len();
    println!("{size} B of payload, WAL, synchronous=FULL, medians of {pairs} interleaved pairs");
    let comparison = |name, goal| Comparison {
        name,
        goal,
        raw: Vec::new(),
        broker: Vec::new(),
    };
    let mut comparisons = [
        comparison("publish in batches of 500", 0.8),
        comparison("64 single publishes at once, to 64 rows a commit", 0.6),
        comparison("consume a backlog", 0.85),
    ];
    let mut files = Files(directory, 0);
    for pair in 0..pairs {
        // The other one first every second time.
        for raw in [pair % 2 == 0, pair % 2 == 1] {
            for (index, comparison) in comparisons.iter_mut().enumerate() {
                let rate = run(raw, index, &files.next(), &messages).await;
                let arm = if raw {
                    &mut comparison.raw
                } else {
                    &mut comparison.broker
                };
                arm.push(rate);
            }
        }
    }
    for Comparison {
        name,
        goal,
        raw,
        broker,
    } in comparisons
    {
        let ratios: Vec<f64> = raw
            .iter()
            .zip(&broker)
            .map(|(raw, broker)| broker / raw)
            .collect();
        println!(
            "{name}: raw {:.0}/s, broker {:.0}/s, ratio {:.2} (goal {goal})",
            median(raw),
            median(broker),
            median(ratios)
        );
    }
}

async fn run(raw: bool, comparison: usize, file: &Path, messages: &[Message]) -> f64 {
    match (raw, comparison) {
        (true, 0) => raw_publish(file, messages, BATCH, BATCHES).await,
        (true, 1) => raw_publish(file, messages, SINGLES, SINGLE_ROUNDS).await,
        (true, _) => raw_consume(file, messages).await,
        (false, 0) => broker_publish(file, messages).await,
        (false, 1) => broker_singles(file, messages).await,
        (false, _) => broker_consume(file, messages).await,
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Names of files that nobody used yet.
struct Files<'d>(&'d Path, usize);

impl Files<'_> {
    /// A new name; the one before the last is removed, so that the disk does not fill up.
    fn next(&mut self) -> PathBuf {
        self.1 += 1;
        if let Some(old) = self.1.checked_sub(2) {
            for suffix in ["", "-wal", "-shm"] {
                // Some of them were never created.
                let _ = std::fs::remove_file(self.0.join(format!("{old}.db{suffix}")));
            }
        }
        self.0.join(format!("{}.db", self.1))
    }
}

fn order(order_id: u64) -> OrderCreated {
    OrderCreated {
        order_id,
        customer: "x".repeat(60),
        address: "y".repeat(92),
        cents: 1_999,
    }
}

/// Messages as a bus writes them, keys and headers included.
async fn messages() -> Vec<Message> {
    let bus = EventBus::builder(MemoryBroker::new())
        .format(FlatFormat)
        .build();
    for order_id in 0..BATCH as u64 {
        bus.publish(order(order_id)).await.expect("memory takes it");
    }
    let mut reader = bus
        .read(&[OrderCreated::TOPIC], Start::Earliest, Some(Until::Now))
        .await
        .expect("memory can be read");
    let mut messages = Vec::new();
    while let Some(record) = reader.next().await.expect("memory can be read") {
        messages.push(record.message);
    }
    messages
}

async fn raw_connection(file: &Path) -> SqliteConnection {
    // As the broker sets it up.
    let mut connection = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("wal_autocheckpoint", "4000")
        .row_buffer_size(1024)
        .disable_statement_logging()
        .connect()
        .await
        .expect("the file can be opened");
    sqlx::query(
        "CREATE TABLE IF NOT EXISTS message
         (id INTEGER PRIMARY KEY, key BLOB, headers BLOB NOT NULL, payload BLOB NOT NULL)",
    )
    .execute(&mut connection)
    .await
    .expect("the table can be created");
    connection
}

async fn raw_publish(file: &Path, messages: &[Message], rows: usize, rounds: usize) -> f64 {
    let mut connection = raw_connection(file).await;
    let start = Instant::now();
    raw_insert(&mut connection, messages, rows, rounds).await;
    (rows * rounds) as f64 / start.elapsed().as_secs_f64()
}

async fn raw_insert(
    connection: &mut SqliteConnection,
    messages: &[Message],
    rows: usize,
    rounds: usize,
) {
    let values = vec!["(?,?,?,?)"; rows].join(",");
    let sql = format!("INSERT INTO message (id, key, headers, payload) VALUES {values}");
    let sql: Arc<str> = sql.into();
    let mut id = 0i64;
    for _ in 0..rounds {
        execute(connection, "BEGIN IMMEDIATE").await;
        let mut arguments = SqliteArguments::default();
        for message in messages.iter().cycle().take(rows) {
            id += 1;
            let key = message.key.as_ref().map(|key| key.as_bytes().to_vec());
            let headers = message.headers.packed().to_vec();
            let added = arguments
                .add(id)
                .and_then(|()| Arguments::add(&mut arguments, key))
                .and_then(|()| Arguments::add(&mut arguments, headers))
                .and_then(|()| Arguments::add(&mut arguments, message.payload.to_vec()));
            added.expect("they are numbers and bytes");
        }
        sqlx::query_with(AssertSqlSafe(Arc::clone(&sql)), arguments)
            .execute(&mut *connection)
            .await
            .expect("it is inserted");
        execute(connection, "COMMIT").await;
    }
}

async fn execute(connection: &mut SqliteConnection, sql: &'static str) {
    let executed = sqlx::query(sql).execute(connection).await;
    executed.expect("the statement is right");
}

async fn broker(file: &Path) -> SqliteBroker {
    let config = SqliteConfig::new(file);
    let broker = SqliteBroker::connect(config).await.expect("it opens");
    let bus = EventBus::new(broker.clone());
    let topic = TopicSpec::new(OrderCreated::TOPIC).with_partitions(4);
    let applied = bus.apply_topics(&[topic]).await;
    applied.expect("the topic is created");
    broker
}

async fn broker_publish(file: &Path, messages: &[Message]) -> f64 {
    let broker = broker(file).await;
    let start = Instant::now();
    fill(&broker, messages, BATCHES).await;
    (BATCH * BATCHES) as f64 / start.elapsed().as_secs_f64()
}

async fn fill(broker: &SqliteBroker, messages: &[Message], batches: usize) {
    for _ in 0..batches {
        let published = broker.publish(messages.to_vec()).await;
        published.expect("it is on disk");
    }
}

async fn broker_singles(file: &Path, messages: &[Message]) -> f64 {
    let broker = broker(file).await;
    let start = Instant::now();
    let mut publishers = JoinSet::new();
    for message in &messages[..SINGLES] {
        let (broker, message) = (broker.clone(), message.clone());
        publishers.spawn(async move {
            for _ in 0..SINGLE_ROUNDS {
                let published = broker.publish(vec![message.clone()]).await;
                published.expect("it is on disk");
            }
        });
    }
    while let Some(ended) = publishers.join_next().await {
        ended.expect("it did not panic");
    }
    (SINGLES * SINGLE_ROUNDS) as f64 / start.elapsed().as_secs_f64()
}

async fn raw_consume(file: &Path, messages: &[Message]) -> f64 {
    let mut connection = raw_connection(file).await;
    raw_insert(&mut connection, messages, BATCH, BACKLOG / BATCH).await;
    let bus = EventBus::builder(MemoryBroker::new())
        .format(FlatFormat)
        .build();
    let start = Instant::now();
    let (mut last, mut count) = (0i64, 0);
    loop {
        let rows = sqlx::query(
            "SELECT id, key, headers, payload FROM message WHERE id > ? ORDER BY id LIMIT ?",
        )
        .bind(last)
        .bind(PAGE)
        .fetch_all(&mut connection)
        .await
        .expect("it can be read");
        if rows.is_empty() {
            break;
        }
        for row in &rows {
            last = row.get(0);
            let headers = Headers::from_packed(row.get::<Vec<u8>, _>(2).into());
            let headers = headers.expect("they were written whole");
            let payload = Bytes::from(row.get::<Vec<u8>, _>(3));
            let mut message = Message::new(OrderCreated::TOPIC, payload).with_headers(headers);
            message.key = row.get::<Option<Vec<u8>>, _>(1).map(Key::new);
            let order: Option<OrderCreated> = bus.event(&message).expect("it is an event");
            std::hint::black_box(&order);
            count += 1;
        }
    }
    assert_eq!(count, BACKLOG);
    count as f64 / start.elapsed().as_secs_f64()
}

async fn broker_consume(file: &Path, messages: &[Message]) -> f64 {
    let broker = broker(file).await;
    fill(&broker, messages, BACKLOG / BATCH).await;
    let bus = EventBus::builder(broker).format(FlatFormat).build();
    let handled: Arc<Handled> = Arc::default();
    handled.2.store(BACKLOG, Ordering::Relaxed);
    let start = Instant::now();
    let consumer = bus
        .consumer("bench")
        .shared_state(Arc::clone(&handled))
        .on(count_one)
        .spawn()
        .await
        .expect("a consumer can be spawned");
    while handled.0.load(Ordering::Relaxed) < BACKLOG {
        let limit = Duration::from_secs(60);
        let waited = tokio::time::timeout(limit, handled.1.notified()).await;
        waited.expect("the backlog is consumed");
    }
    let rate = BACKLOG as f64 / start.elapsed().as_secs_f64();
    consumer.shutdown().await.expect("it ends");
    rate
}

async fn count_one(order: OrderCreated, cx: Context<Handled>) -> Result<(), BoxError> {
    std::hint::black_box(&order);
    let (handled, done, all) = cx.state();
    if handled.fetch_add(1, Ordering::Relaxed) + 1 == all.load(Ordering::Relaxed) {
        done.notify_one();
    }
    Ok(())
}
