//! Two relays of which one stands still beyond its lease, or is killed, while a service writes: nothing is
//! lost, what is published twice is bounded, and consumers with an inbox see everything once, in order.
//! What holds for both stores is [`survives_relays_that_stand_still`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use eventbus_core::{
    AdminRequest, BoxError, Broker, Consumer, Context, Error, Event, EventBus, KeyStateStore,
    LeaseStore, Origin, OutboxStore, Relay, Result, Start, Until,
};
use eventbus_sql::{SqliteBroker, SqliteStore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::child::{Process, config, micros, say};
use crate::events::Counted;
use crate::place::Place;

const LIMIT: Duration = Duration::from_secs(60);
const TTL: Duration = Duration::from_millis(500);
/// What a relay publishes at once, and so what a stop or a kill may publish twice.
const BATCH: usize = 20;
const KEYS: i64 = 7;
const STOPS: usize = 6;
const KILLS: usize = 2;

/// A service that counts: its numbers are committed with an event each, and recorded by a consumer.
pub(crate) trait Ledger: Clone + Send + Sync + 'static {
    fn bus(&self) -> &EventBus;

    /// Where a child finds the same service.
    fn place(&self) -> String;

    fn commit(&self, number: i64) -> impl Future<Output = Result<()>> + Send;

    async fn consume(&self) -> Consumer;

    /// What the consumer has recorded, in the order in which it did.
    async fn recorded(&self) -> Vec<i64>;

    async fn waiting(&self) -> u64;

    /// Whether no process stands still inside a commit, so that others can write.
    async fn is_writable(&self) -> bool;
}

/// Relays for ever.
pub(crate) async fn relay<S>(bus: &EventBus, store: S)
where
    S: OutboxStore + LeaseStore + KeyStateStore,
{
    let relay = Relay::new(bus, Arc::new(store)).batch(BATCH).lease_ttl(TTL);
    say("ready");
    let ended = relay.run_until(std::future::pending()).await;
    ended.expect("nothing ends it");
}

fn start_relay(ledger: &impl Ledger) -> Process {
    let mut relay = Process::start("relay", ledger.place());
    assert_eq!(relay.hear().as_deref(), Some("ready"));
    relay
}

/// Some time, another one at each call.
async fn a_while() {
    sleep(Duration::from_micros(
        100_000 + micros() as u64 * 7919 % 300_000,
    ))
    .await;
}

pub(crate) async fn survives_relays_that_stand_still(ledger: impl Ledger) {
    let consumer = ledger.consume().await;
    let mut relays = [start_relay(&ledger), start_relay(&ledger)];
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for key in 0..KEYS {
        writers.spawn(count(ledger.clone(), key, Arc::clone(&stop)));
    }
    for turn in 0..STOPS {
        a_while().await;
        stand_still(&relays[turn % 2], &ledger).await;
    }
    for turn in 0..KILLS {
        a_while().await;
        let killed = std::mem::replace(&mut relays[turn % 2], start_relay(&ledger));
        killed.kill();
    }
    a_while().await;
    stop.store(true, Ordering::SeqCst);
    let mut committed = BTreeMap::new();
    while let Some(written) = timeout(LIMIT, writers.join_next()).await.expect("in time") {
        let (key, numbers) = written.expect("it does not panic");
        committed.insert(key, numbers);
    }
    let total: usize = committed.values().map(Vec::len).sum();
    assert!(total > 10 * BATCH, "{total} events are no load");
    let settled = async {
        while ledger.waiting().await > 0 || ledger.recorded().await.len() < total {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(LIMIT, settled).await.expect("nothing is lost");
    for relay in relays {
        relay.kill();
    }
    consumer.shutdown().await.expect("it ends");
    assert_eq!(
        by_key(&ledger.recorded().await),
        committed,
        "once, in order"
    );
    check_log(&published(ledger.bus()).await, &committed);
}

/// Commits the numbers of a key one after the other.
async fn count(ledger: impl Ledger, key: i64, stop: Arc<AtomicBool>) -> (i64, Vec<i64>) {
    let mut numbers = Vec::new();
    for number in (key..).step_by(KEYS as usize) {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        // SQLite is locked while a relay stands still inside a commit; nothing is committed then.
        while let Err(error) = ledger.commit(number).await {
            assert!(error.is_retryable(), "{error}");
        }
        numbers.push(number);
        sleep(Duration::from_millis(2)).await;
    }
    (key, numbers)
}

/// Stops a relay for longer than its lease, and wakes it.
async fn stand_still(relay: &Process, ledger: &impl Ledger) {
    relay.signal("STOP");
    while !ledger.is_writable().await {
        relay.signal("CONT");
        sleep(Duration::from_millis(20)).await;
        relay.signal("STOP");
    }
    sleep(TTL * 3).await;
    relay.signal("CONT");
}

fn by_key(numbers: &[i64]) -> BTreeMap<i64, Vec<i64>> {
    let mut keys: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    for number in numbers {
        keys.entry(number % KEYS).or_default().push(*number);
    }
    keys
}

/// The numbers on the broker; those of a key are in its order.
async fn published(bus: &EventBus) -> Vec<i64> {
    let topics = [Counted::TOPIC];
    let read = bus.read(&topics, Start::Earliest, Some(Until::Now));
    let mut reader = read.await.expect("it can be read");
    let mut numbers = Vec::new();
    while let Some(record) = reader.next().await.expect("it reads on") {
        let payload = String::from_utf8_lossy(&record.message.payload);
        let (_, rest) = payload.split_once("\"number\":").expect("a number");
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
        let number = digits.expect("digits").parse();
        numbers.push(number.expect("a number"));
    }
    numbers
}

/// Everything is there, by its first appearance in order; and no more twice than a batch for each
/// relay that stood still or was killed. A busy machine holds a relay up beyond its lease as well, so as
/// many again are allowed: what must not happen is that every batch is repeated.
fn check_log(log: &[i64], committed: &BTreeMap<i64, Vec<i64>>) {
    let mut seen = BTreeSet::new();
    let first: Vec<i64> = log.iter().copied().filter(|it| seen.insert(*it)).collect();
    assert_eq!(&by_key(&first), committed, "lost, or out of order");
    let twice = log.len() - first.len();
    let most = 2 * BATCH * (STOPS + KILLS);
    assert!(
        first.len() > 2 * most,
        "{} events are no load for it",
        first.len()
    );
    assert!(
        twice <= most,
        "{twice} of {} were published again",
        log.len()
    );
    println!("{} events, {twice} of them published again", first.len());
}

#[derive(Clone)]
struct FileLedger {
    file: PathBuf,
    broker: SqliteBroker,
    bus: EventBus,
    store: SqliteStore,
}

impl FileLedger {
    async fn open(file: &Path) -> Self {
        let broker = SqliteBroker::connect(config(file)).await.expect("it opens");
        let store = SqliteStore::connect(config(&file.with_extension("store"))).await;
        Self {
            file: file.to_owned(),
            bus: EventBus::new(broker.clone()),
            broker,
            store: store.expect("it opens"),
        }
    }

    async fn create_table(&self) {
        let outbox = self.store.outbox(&self.bus);
        let mut tx = outbox.begin(Origin::new()).await.expect("a transaction");
        let table =
            "CREATE TABLE recorded (place INTEGER PRIMARY KEY AUTOINCREMENT, number INTEGER)";
        let created = sqlx::raw_sql(table).execute(&mut *tx).await;
        created.expect("a table");
        tx.commit().await.expect("it commits");
    }
}

impl Ledger for FileLedger {
    fn bus(&self) -> &EventBus {
        &self.bus
    }

    fn place(&self) -> String {
        self.file.display().to_string()
    }

    async fn commit(&self, number: i64) -> Result<(), Error> {
        let mut tx = self.store.outbox(&self.bus).begin(Origin::new()).await?;
        tx.publish(Counted { number })?;
        tx.commit().await
    }

    async fn consume(&self) -> Consumer {
        let consumer = self.bus.consumer("ledger").unit(self.store.clone());
        let consumer = consumer.on(record).spawn().await;
        consumer.expect("it starts")
    }

    async fn recorded(&self) -> Vec<i64> {
        let numbers = sqlx::query_scalar("SELECT number FROM recorded ORDER BY place");
        numbers
            .fetch_all(self.store.readers())
            .await
            .expect("it reads")
    }

    async fn waiting(&self) -> u64 {
        self.store.depth().await.expect("it counts").messages()
    }

    async fn is_writable(&self) -> bool {
        let broker = self.broker.admin(AdminRequest::Health).await;
        let begun = self.store.outbox(&self.bus).begin(Origin::new()).await;
        broker.is_ok() && begun.is_ok()
    }
}

async fn record(counted: Counted, mut cx: Context<(), SqliteStore>) -> Result<(), BoxError> {
    sqlx::query("INSERT INTO recorded (number) VALUES (?)")
        .bind(counted.number)
        .execute(cx.transaction().await?)
        .await?;
    Ok(())
}

pub(crate) async fn relay_file(file: &Path) {
    let ledger = FileLedger::open(file).await;
    relay(&ledger.bus, ledger.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_stood_still_loses_nothing_and_repeats_its_batch_at_most() {
    let place = Place::new();
    let ledger = FileLedger::open(&place.file("bus.db")).await;
    ledger.create_table().await;
    survives_relays_that_stand_still(ledger).await;
}
