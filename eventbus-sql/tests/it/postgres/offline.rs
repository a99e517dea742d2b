//! The broker is away, and the service goes on: with an outbox it accepts work and catches up; without
//! one it hears in time that an event is not published, and whether it may be all the same.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use eventbus_core::{
    BoxError, Broker, Consumer, Context, ErrorKind, Event, EventBus, EventId, Json, Key, Message,
    OUTBOX_AGE, OUTBOX_MESSAGES, Origin, Outcome, Outgoing, Publisher, RelayHandle, Result, Start,
    Topic, TopicSpec, Until, unknown_version,
};
use eventbus_sql::{PostgresBroker, PostgresConfig, SqliteStore};
use eventbus_testkit::within;
use metrics::{Counter, Gauge, Histogram, KeyName, Metadata, SharedString, Unit};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::proxy::Proxy;
use super::server::Server;
use crate::place::Place;

const LIMIT: Duration = Duration::from_secs(90);
const PAUSE: Duration = Duration::from_millis(10);
/// How long a statement of the broker may take.
const TIMEOUT: Duration = Duration::from_secs(1);
const CUSTOMERS: i64 = 25;

#[derive(Clone, Serialize, Deserialize)]
struct Ordered {
    customer: i64,
    number: i64,
}

impl Event for Ordered {
    const TYPE: &'static str = "Ordered";
    const TOPIC: Topic = Topic::from_static("offline-orders");
    const VERSION: u32 = 1;
    type Codec = Json;

    fn key(&self) -> Option<Key> {
        Some(Key::display(self.customer))
    }

    fn upcast(version: u32, _: &[u8]) -> Result<Self> {
        Err(unknown_version::<Self>(version))
    }
}

fn ordered(number: i64) -> Ordered {
    let customer = number % CUSTOMERS;
    Ordered { customer, number }
}

/// What gauges show, by name and labels: what an operator's alarms see.
#[derive(Clone, Debug, Default)]
struct Gauges(Arc<Mutex<BTreeMap<String, Arc<AtomicU64>>>>);

/// Of this process: other tests set their own beside.
static GAUGES: LazyLock<Gauges> = LazyLock::new(|| {
    let gauges = Gauges::default();
    metrics::set_global_recorder(gauges.clone()).expect("nobody else records");
    gauges
});

impl Gauges {
    /// The sum over the lanes of one relay.
    fn sum(&self, name: &str, relay: &str) -> f64 {
        let gauges = self.0.lock().expect("not poisoned");
        let of_relay = gauges
            .iter()
            .filter(|(key, _)| key.starts_with(&format!("{name} relay={relay} ")));
        let value = |gauge: &AtomicU64| f64::from_bits(gauge.load(Ordering::SeqCst));
        of_relay.map(|(_, gauge)| value(gauge)).sum()
    }
}

impl metrics::Recorder for Gauges {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, _: &metrics::Key, _: &Metadata<'_>) -> Counter {
        Counter::noop()
    }

    fn register_gauge(&self, key: &metrics::Key, _: &Metadata<'_>) -> Gauge {
        let mut name = format!("{} ", key.name());
        for label in key.labels() {
            name.push_str(&format!("{}={} ", label.key(), label.value()));
        }
        let mut gauges = self.0.lock().expect("not poisoned");
        Gauge::from_arc(Arc::clone(gauges.entry(name).or_default()))
    }

    fn register_histogram(&self, _: &metrics::Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

/// A wire to a broker on the server, and what is on this end of it.
struct Stage {
    server: Server,
    proxy: Proxy,
    bus: EventBus,
}

impl Stage {
    async fn new() -> Self {
        let (server, proxy) = (Server::new().await, Proxy::start().await);
        let config = PostgresConfig::from_url(&proxy.url(&server)).expect("a good url");
        let broker = PostgresBroker::connect(config.with_timeout(TIMEOUT)).await;
        let broker = broker.expect("the server answers");
        let held = Arc::new(broker.key_state());
        let bus = EventBus::builder(broker).key_state(held).build();
        let topic = TopicSpec::new(Ordered::TOPIC).with_partitions(4);
        bus.apply_topics(&[topic]).await.expect("a topic");
        Self { server, proxy, bus }
    }

    /// The events that are on the broker, as somebody with a better wire sees it.
    async fn published(&self) -> BTreeMap<EventId, usize> {
        let broker = PostgresBroker::from_url(&self.server.url()).await;
        let bus = EventBus::new(broker.expect("the server answers"));
        let topics = [Ordered::TOPIC];
        let reader = bus.read(&topics, Start::Earliest, Some(Until::Now));
        let mut reader = reader.await.expect("it can be read");
        let mut published = BTreeMap::new();
        while let Some(record) = reader.next().await.expect("it goes on") {
            let envelope = bus.envelope(&record.message).expect("an envelope");
            *published.entry(envelope.id).or_default() += 1;
        }
        published
    }
}

/// A service with a database of its own.
struct Shop {
    store: SqliteStore,
    bus: EventBus,
    relay: RelayHandle,
    stop: oneshot::Sender<()>,
    relaying: JoinHandle<Result<()>>,
    shipping: Consumer,
    _place: Place,
}

async fn ship(order: Ordered, mut cx: Context<(), SqliteStore>) -> Result<(), BoxError> {
    sqlx::query("INSERT INTO shipped (customer, number) VALUES (?, ?)")
        .bind(order.customer)
        .bind(order.number)
        .execute(cx.transaction().await?)
        .await?;
    Ok(())
}

impl Shop {
    async fn open(bus: &EventBus, name: &str) -> Self {
        let place = Place::new();
        let store = SqliteStore::open(place.file("shop.db")).await;
        let store = store.expect("it opens");
        let outbox = store.outbox(bus);
        let mut tx = outbox.begin(Origin::new()).await.expect("a transaction");
        sqlx::raw_sql(
            "CREATE TABLE orders (number INTEGER PRIMARY KEY, customer INTEGER);
             CREATE TABLE shipped (place INTEGER PRIMARY KEY, customer INTEGER, number INTEGER)",
        )
        .execute(&mut *tx)
        .await
        .expect("tables");
        tx.commit().await.expect("it commits");
        let shipping = bus.consumer("shipping").unit(store.clone()).on(ship);
        let relay = outbox.relay().name(name).expect("a name");
        let (stop, stopped) = oneshot::channel();
        let (handle, signal) = (relay.handle(), async {
            // Dropped is stopped, too.
            let _ = stopped.await;
        });
        Self {
            shipping: shipping.spawn().await.expect("it starts"),
            relaying: tokio::spawn(relay.run_until(signal)),
            relay: handle,
            stop,
            bus: bus.clone(),
            store,
            _place: place,
        }
    }

    /// A request: returns how long it took.
    async fn order(&self, number: i64) -> Duration {
        let begun = Instant::now();
        let outbox = self.store.outbox(&self.bus);
        let mut tx = outbox.begin(Origin::new()).await.expect("a transaction");
        sqlx::query("INSERT INTO orders (number, customer) VALUES (?, ?)")
            .bind(number)
            .bind(number % CUSTOMERS)
            .execute(&mut *tx)
            .await
            .expect("an order");
        tx.publish(ordered(number)).expect("an event");
        tx.commit().await.expect("it commits");
        begun.elapsed()
    }

    async fn shipped(&self) -> Vec<(i64, i64)> {
        let sql = "SELECT customer, number FROM shipped ORDER BY place";
        let shipped = sqlx::query_as(sql).fetch_all(self.store.readers());
        shipped.await.expect("it reads")
    }

    async fn wait_for(&self, shipped: usize) {
        let reached = async {
            while self.shipped().await.len() < shipped {
                sleep(PAUSE).await;
            }
        };
        within(LIMIT, reached).await;
    }

    /// Each order once, those of a customer in their order.
    async fn check(&self, orders: i64) {
        let shipped = self.shipped().await;
        for customer in 0..CUSTOMERS {
            let of_customer = shipped.iter().filter(|(of, _)| *of == customer);
            let numbers: Vec<_> = of_customer.map(|(_, number)| *number).collect();
            let expected: Vec<_> = (0..orders).filter(|n| n % CUSTOMERS == customer).collect();
            assert_eq!(numbers, expected, "customer {customer}");
        }
    }

    async fn close(self) {
        drop(self.stop);
        let ended = self.relaying.await.expect("it does not panic");
        ended.expect("it ends well");
        self.shipping.shutdown().await.expect("it ends well");
    }
}

/// Orders 300 times while the broker is away, and once more when it is back.
async fn goes_on(name: &str, harm: impl Fn(&Proxy)) {
    LazyLock::force(&GAUGES);
    let stage = Stage::new().await;
    let shop = Shop::open(&stage.bus, name).await;
    for number in 0..50 {
        shop.order(number).await;
    }
    shop.wait_for(50).await;
    harm(&stage.proxy);
    let mut slowest = Duration::ZERO;
    for number in 50..350 {
        slowest = slowest.max(shop.order(number).await);
    }
    // A machine that does other things besides needs a while for a commit; the broker is not waited for.
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");

    // The relay says what waits, since when, and why.
    within(LIMIT, async {
        loop {
            let status = shop.relay.status();
            if status.error.is_some() && status.depth.messages() >= 300 {
                assert!(status.depth.oldest.is_some());
                assert!(GAUGES.sum(OUTBOX_MESSAGES, name) >= 300.0);
                break assert!(GAUGES.sum(OUTBOX_AGE, name) > 0.0);
            }
            sleep(PAUSE).await;
        }
    })
    .await;
    assert_eq!(shop.shipped().await.len(), 50);

    stage.proxy.mend();
    shop.wait_for(350).await;
    shop.order(350).await;
    shop.wait_for(351).await;
    shop.check(351).await;
    within(LIMIT, async {
        while shop.relay.status().error.is_some() || shop.relay.status().depth.messages() > 0 {
            sleep(PAUSE).await;
        }
    })
    .await;
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_service_with_an_outbox_accepts_work_while_connections_are_refused_and_catches_up() {
    goes_on("refused", Proxy::cut).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_service_with_an_outbox_accepts_work_while_nothing_passes_and_catches_up() {
    goes_on("silent", Proxy::freeze).await;
}

/// What came of publishing without an outbox.
struct Told {
    id: EventId,
    outcome: String,
    took: Duration,
}

/// Publishes an event, which fails, and says how.
async fn fail(bus: &EventBus, number: i64) -> Told {
    let begun = Instant::now();
    let id = EventId::new();
    let event = Outgoing::new(ordered(number)).with_id(id.clone());
    let error = bus.publish(event).await.expect_err("the broker is away");
    assert!(error.is_retryable(), "{error}");
    assert!(
        matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout),
        "{error}"
    );
    let text = error.to_string();
    let is_unknown = text.contains("outcome: unknown");
    assert!(is_unknown || text.contains("outcome: not taken"), "{text}");
    Told {
        id,
        outcome: if is_unknown { "unknown" } else { "not taken" }.to_owned(),
        took: begun.elapsed(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn without_an_outbox_publishing_fails_in_time_and_says_whether_it_may_have_happened() {
    let stage = Stage::new().await;
    let known = stage.bus.publish(ordered(0)).await.expect("it is there");
    let mut told = Vec::new();
    for harm in [Proxy::freeze, Proxy::lose_answers, Proxy::cut] {
        harm(&stage.proxy);
        for number in 1..=3 {
            told.push(fail(&stage.bus, number).await);
        }
        stage.proxy.mend();
        // What was away is back with the next publish, or one soon after.
        within(LIMIT, async {
            while stage.bus.publish(ordered(9)).await.is_err() {
                sleep(PAUSE).await;
            }
        })
        .await;
    }
    for failed in &told {
        // A statement, and a connection made for it before.
        assert!(failed.took < 5 * TIMEOUT, "{:?}", failed.took);
    }
    assert!(told.iter().any(|failed| failed.outcome == "not taken"));
    assert!(told.iter().any(|failed| failed.outcome == "unknown"));
    // Whatever was on its way has come by now.
    let published = stage.published().await;
    assert_eq!(published.get(&known), Some(&1));
    for failed in told {
        let times = published.get(&failed.id).copied().unwrap_or_default();
        match failed.outcome.as_str() {
            "not taken" => assert_eq!(times, 0, "it is there, though it was said not to be"),
            _ => assert!(times <= 1),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn each_message_of_a_batch_says_whether_it_may_have_happened() {
    let stage = Stage::new().await;
    let config = PostgresConfig::from_url(&stage.proxy.url(&stage.server)).expect("a good url");
    let broker = PostgresBroker::connect(config.with_timeout(TIMEOUT)).await;
    let broker = broker.expect("the server answers");
    stage.proxy.cut();
    let batch = (0..5).map(|number| Message::new(Ordered::TOPIC, number.to_string()));
    let error = broker.publish(batch.collect()).await;
    let error = error.expect_err("the server is away");
    assert!(error.is_retryable());
    assert_eq!(error.unpublished.len(), 5);
    for (index, unpublished) in error.unpublished.iter().enumerate() {
        assert_eq!(unpublished.index, index);
        assert!(matches!(
            unpublished.outcome,
            Outcome::NotTaken | Outcome::Unknown
        ));
    }
    stage.proxy.mend();
    within(LIMIT, async {
        while broker
            .publish(
                error
                    .unpublished
                    .iter()
                    .map(|it| it.message.clone())
                    .collect(),
            )
            .await
            .is_err()
        {
            sleep(PAUSE).await;
        }
    })
    .await;
    broker.close().await.expect("it closes");
}
