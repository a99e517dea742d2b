//! The bus on Kafka beside librdkafka as one would use it by hand, on the same broker, the same bytes,
//! interleaved in one run: publishing, and consuming a backlog with one handler, with 64 keys at once,
//! and in batches. Prints rates, processor time of the client a message, and the ratios of pairs.
//!
//! `export $(dev/brokers up kafka); cargo bench -p eventbus --features kafka --bench kafka`
//! (PAIRS=9 for more pairs, MESSAGES=300000 for a longer run, ONLY=publish for one comparison, and
//! ARM=bus or ARM=raw for one side alone, which is for a profiler and says nothing about speed)
//!
//! By hand means: a `ThreadedProducer` whose callback counts, as many messages in flight as it takes;
//! a `StreamConsumer` that stores the offset of each message, committed by librdkafka's timer. Both
//! encode and decode the payload, and send the headers; by hand nobody reads those.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use eventbus::{
    BatchItem, BoxError, Context, Event, EventBus, KafkaBroker, KafkaConfig, Message, Start,
    TopicSpec, Until,
};
use futures_util::StreamExt;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{Consumer as _, StreamConsumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::message::{Header, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, ProducerContext, ThreadedProducer};
use rdkafka::{ClientContext, Offset, TopicPartitionList};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

const PARTITIONS: u32 = 12;
/// Events of one call to `publish_all`, and how many calls wait at the same time.
const BATCH: usize = 500;
const BATCHES_AT_ONCE: usize = 32;

/// 256 bytes as JSON.
#[derive(Clone, Debug, Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "orders", key = "order_id")]
struct OrderCreated {
    order_id: u64,
    customer: String,
    address: String,
    cents: i64,
}

/// The same event as it is on the wire, for who writes and reads that by hand.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope<Data> {
    event_id: String,
    event_type: String,
    event_version: String,
    timestamp: String,
    source: String,
    correlation_id: String,
    causation_id: Option<String>,
    data: Data,
    metadata: BTreeMap<String, String>,
}

/// How many are handled, of how many, since when, and whom to tell.
#[derive(Debug, Default)]
struct Handled {
    count: AtomicUsize,
    all: usize,
    done: Notify,
}

/// One arm of one pair.
#[derive(Clone, Copy, Debug)]
struct Figure {
    /// Messages a second.
    rate: f64,
    /// Microseconds of processor time of this process a message.
    cpu: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    Publish,
    Handler,
    Slots,
    Batches,
}

/// What is compared: its name, and the least ratio of rates that its upper bound has to reach.
const COMPARISONS: &[(What, &str, f64)] = &[
    (What::Publish, "publish", 0.95),
    (What::Handler, "consume, one handler", 0.92),
    (What::Slots, "consume, 64 keys at once", 0.80),
    (What::Batches, "consume, batches of 256", 0.97),
];
/// Most of our processor time a message for one of theirs.
const CPU_GOAL: f64 = 1.2;

fn main() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let pairs = number("PAIRS").unwrap_or(5);
    let messages = number("MESSAGES").unwrap_or(200_000);
    let only = std::env::var("ONLY").ok();
    let url = std::env::var("EVENTBUS_TEST_KAFKA").expect("export $(dev/brokers up kafka)");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime can be built");
    runtime.block_on(compare(&url, pairs, messages, only.as_deref()));
}

#[allow(clippy::print_stdout, reason = "a bench prints its figures")]
async fn compare(url: &str, pairs: usize, messages: usize, only: Option<&str>) {
    let bench = Bench::new(url, messages).await;
    if let Ok(arm) = std::env::var("ARM") {
        return bench.run_alone(&arm, pairs, only).await;
    }
    println!(
        "{} B of payload, {} B of headers, {messages} messages, {pairs} interleaved pairs",
        bench.sample.payload.len(),
        bench.sample.headers.packed_len(),
    );
    for (what, name, goal) in chosen(only) {
        let (mut raw, mut bus) = (Vec::new(), Vec::new());
        for pair in 0..pairs {
            // The other one first every second time.
            if pair % 2 == 0 {
                raw.push(bench.raw(*what).await);
                bus.push(bench.bus(*what).await);
            } else {
                bus.push(bench.bus(*what).await);
                raw.push(bench.raw(*what).await);
            }
        }
        let ratios = |of: fn(&Figure) -> f64| -> Vec<f64> {
            let pairs = raw.iter().zip(&bus);
            pairs.map(|(raw, bus)| of(bus) / of(raw)).collect()
        };
        let (rate, upper) = mean_and_upper(&ratios(|figure| figure.rate));
        let (cpu, _) = mean_and_upper(&ratios(|figure| figure.cpu));
        let middle =
            |figures: &[Figure], of: fn(&Figure) -> f64| median(figures.iter().map(of).collect());
        println!(
            "{name}: raw {:.0}/s at {:.2} µs, bus {:.0}/s at {:.2} µs; rate {rate:.2}, at most {upper:.2} (goal {goal}); processor {cpu:.2} (goal {CPU_GOAL})",
            middle(&raw, |figure| figure.rate),
            middle(&raw, |figure| figure.cpu),
            middle(&bus, |figure| figure.rate),
            middle(&bus, |figure| figure.cpu),
        );
    }
}

/// All comparisons, or those whose names have this in them.
fn chosen(only: Option<&str>) -> impl Iterator<Item = &'static (What, &'static str, f64)> {
    let all = COMPARISONS.iter();
    all.filter(move |(_, name, _)| only.is_none_or(|only| name.contains(only)))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The geometric mean of ratios, and the upper bound of its 95 % confidence interval.
fn mean_and_upper(ratios: &[f64]) -> (f64, f64) {
    let count = ratios.len() as f64;
    let logs: Vec<f64> = ratios.iter().map(|ratio| ratio.ln()).collect();
    let mean = logs.iter().sum::<f64>() / count;
    let squares: f64 = logs.iter().map(|log| (log - mean).powi(2)).sum();
    let error = (squares / (count - 1.0).max(1.0) / count).sqrt();
    // Student's t at 97.5 % for 3 to 10 pairs, then nearly the normal one.
    let t = match ratios.len() {
        0..=3 => 4.3,
        4 => 3.18,
        5 => 2.78,
        6 => 2.57,
        7 => 2.45,
        8..=10 => 2.31,
        _ => 2.1,
    };
    (mean.exp(), (mean + t * error).exp())
}

/// Seconds that this process spent on processors.
fn cpu_time() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").expect("Linux tells it");
    let behind_name = text.rsplit(')').next().expect("its fields");
    let fields: Vec<f64> = behind_name
        .split_whitespace()
        .map(|field| field.parse().unwrap_or_default())
        .collect();
    // User and system time, in hundredths of a second.
    (fields[11] + fields[12]) / 100.0
}

/// Measures from here on.
struct Watch(Instant, f64);

impl Watch {
    fn start() -> Self {
        Self(Instant::now(), cpu_time())
    }

    fn figure(&self, messages: usize) -> Figure {
        let messages = messages as f64;
        Figure {
            rate: messages / self.0.elapsed().as_secs_f64(),
            cpu: (cpu_time() - self.1) * 1e6 / messages,
        }
    }
}

fn order(order_id: u64) -> OrderCreated {
    OrderCreated {
        order_id: 1_000_000 + order_id % 10_000,
        customer: "x".repeat(60),
        address: "y".repeat(119),
        cents: 1_999,
    }
}

struct Bench {
    url: String,
    servers: String,
    /// A backlog is there.
    backlog: EventBus,
    /// Published to, and never read.
    sink: EventBus,
    messages: usize,
    /// A message as the bus makes it: by hand the same headers are sent.
    sample: Message,
}

/// Counts what was delivered.
#[derive(Clone, Default)]
struct Count(Arc<AtomicUsize>);

impl ClientContext for Count {}

impl ProducerContext for Count {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        assert!(result.is_ok(), "the broker takes it");
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Bench {
    async fn new(url: &str, messages: usize) -> Self {
        let unique = std::process::id();
        let bus = |what: &str| {
            let prefix = format!("bench-{what}-{unique}-");
            async move {
                let config = KafkaConfig::from_url(url).expect("a good url");
                let broker = KafkaBroker::connect(config).await.expect("it answers");
                let bus = EventBus::builder(broker).topic_prefix(prefix).build();
                let topic = TopicSpec::new(OrderCreated::TOPIC).with_partitions(PARTITIONS);
                bus.apply_topics(&[topic]).await.expect("it is created");
                bus
            }
        };
        let (backlog, sink) = (bus("read").await, bus("written").await);
        fill(&backlog, messages).await;
        let mut reader = backlog
            .read(&[OrderCreated::TOPIC], Start::Earliest, Some(Until::Now))
            .await
            .expect("it can be read");
        let sample = reader.next().await.expect("it can be read");
        let config = KafkaConfig::from_url(url).expect("a good url");
        Self {
            url: url.to_owned(),
            servers: config.servers,
            backlog,
            sink,
            messages,
            sample: sample.expect("there are some").message,
        }
    }

    fn topic(&self, what: &str) -> String {
        let unique = std::process::id();
        format!("bench-{what}-{unique}-orders")
    }

    /// One side, as often as there would be pairs.
    #[allow(clippy::print_stdout, reason = "a bench prints its figures")]
    async fn run_alone(&self, arm: &str, pairs: usize, only: Option<&str>) {
        for (what, name, _) in chosen(only) {
            for _ in 0..pairs {
                let figure = match arm {
                    "raw" => self.raw(*what).await,
                    _ => self.bus(*what).await,
                };
                println!(
                    "{name}, {arm}: {:.0}/s at {:.2} µs",
                    figure.rate, figure.cpu
                );
            }
        }
    }

    async fn raw(&self, what: What) -> Figure {
        match what {
            What::Publish => self.raw_publish().await,
            _ => self.raw_consume().await,
        }
    }

    async fn bus(&self, what: What) -> Figure {
        match what {
            What::Publish => {
                let watch = Watch::start();
                fill(&self.sink, self.messages).await;
                watch.figure(self.messages)
            }
            what => self.bus_consume(what).await,
        }
    }

    async fn raw_publish(&self) -> Figure {
        let counted = Count::default();
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.servers)
            .set("enable.idempotence", "true")
            .set("acks", "all");
        let producer: ThreadedProducer<Count> = config
            .create_with_context(counted.clone())
            .expect("a good configuration");
        let topic = self.topic("written");
        let headers = on_the_wire(&self.sample);
        let mut envelope: Envelope<OrderCreated> =
            serde_json::from_slice(&self.sample.payload).expect("it is JSON");
        let messages = self.messages;
        let watch = Watch::start();
        let sent = tokio::task::spawn_blocking(move || {
            for number in 0..messages {
                envelope.data = order(number as u64);
                let payload = serde_json::to_vec(&envelope).expect("it is JSON");
                let key = envelope.data.order_id.to_string();
                loop {
                    let mut all = OwnedHeaders::new_with_capacity(headers.len());
                    for (name, value) in &headers {
                        all = all.insert(Header {
                            key: name,
                            value: Some(value),
                        });
                    }
                    let record = BaseRecord::to(&topic).key(&key).payload(&payload);
                    match producer.send(record.headers(all)) {
                        Ok(()) => break,
                        Err((error, _)) => {
                            assert_eq!(
                                error.rdkafka_error_code(),
                                Some(RDKafkaErrorCode::QueueFull)
                            );
                            std::thread::sleep(Duration::from_millis(1));
                        }
                    }
                }
            }
            while counted.0.load(Ordering::Relaxed) < messages {
                std::thread::sleep(Duration::from_millis(1));
            }
            producer
        });
        let _producer = sent.await.expect("it does not panic");
        watch.figure(self.messages)
    }

    async fn raw_consume(&self) -> Figure {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.servers)
            .set("group.id", format!("bench-raw-{}", fastrand::u64(..)))
            .set("enable.auto.commit", "true")
            .set("enable.auto.offset.store", "false")
            // With its default of a second it mostly waits.
            .set("fetch.queue.backoff.ms", "10");
        let consumer: StreamConsumer = config.create().expect("a good configuration");
        let mut places = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            places
                .add_partition_offset(&self.topic("read"), partition as i32, Offset::Beginning)
                .expect("a good place");
        }
        consumer.assign(&places).expect("it is assigned");
        let mut watch = None;
        for _ in 0..self.messages {
            let message = consumer.recv().await.expect("it can be read");
            let watch = watch.get_or_insert_with(Watch::start);
            let payload = message.payload().expect("there is one");
            let envelope: Envelope<OrderCreated> =
                serde_json::from_slice(payload).expect("it is JSON");
            std::hint::black_box((&envelope, &watch));
            consumer
                .store_offset_from_message(&message)
                .expect("it is assigned");
        }
        watch.expect("there were some").figure(self.messages)
    }

    async fn bus_consume(&self, what: What) -> Figure {
        let handled = Arc::new(Handled {
            all: self.messages,
            ..Handled::default()
        });
        let group = format!("bench-bus-{}", fastrand::u64(..));
        let consumer = self
            .backlog
            .consumer(&group)
            .shared_state(Arc::clone(&handled));
        let consumer = match what {
            What::Batches => consumer.on_batch(256, count_all),
            _ => consumer.on(count_one),
        };
        let consumer = match what {
            What::Slots => consumer.concurrency(64),
            _ => consumer,
        };
        let consumer = consumer.spawn().await.expect("it joins");
        while handled.count.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        let watch = Watch::start();
        let begun = handled.count.load(Ordering::Relaxed);
        let limit = Duration::from_secs(120);
        let waited = tokio::time::timeout(limit, handled.done.notified()).await;
        waited.expect("the backlog is consumed");
        let figure = watch.figure(self.messages - begun);
        consumer.shutdown().await.expect("it ends");
        figure
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // What it wrote goes with the broker's data.
        std::hint::black_box(&self.url);
    }
}

/// The headers of a record: those of ours are lines of one.
fn on_the_wire(message: &Message) -> Vec<(String, Vec<u8>)> {
    let (ours, others): (Vec<_>, Vec<_>) = message
        .headers
        .iter()
        .partition(|(name, _)| name.starts_with("eb-"));
    let lines = ours.iter().flat_map(|(name, value)| {
        let line = [name.as_bytes(), b": ", value, b"\n"];
        line.concat()
    });
    let mut headers = vec![("eb-headers".to_owned(), lines.collect())];
    headers.extend(
        others
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_vec())),
    );
    headers
}

/// Publishes so many events, several batches at a time.
async fn fill(bus: &EventBus, messages: usize) {
    let batches = (0..messages).step_by(BATCH).map(|first| {
        let last = messages.min(first + BATCH);
        let orders: Vec<_> = (first..last).map(|number| order(number as u64)).collect();
        bus.publish_all(orders)
    });
    let mut published = futures_util::stream::iter(batches).buffered(BATCHES_AT_ONCE);
    while let Some(ids) = published.next().await {
        ids.expect("the broker takes it");
    }
}

async fn count_one(order: OrderCreated, cx: Context<Handled>) -> Result<(), BoxError> {
    std::hint::black_box(&order);
    cx.state().note(1);
    Ok(())
}

async fn count_all(items: Vec<BatchItem<OrderCreated, Handled>>) -> Result<(), BoxError> {
    if let Some(first) = items.first() {
        first.cx.state().note(items.len());
    }
    std::hint::black_box(&items);
    Ok(())
}

impl Handled {
    fn note(&self, count: usize) {
        if self.count.fetch_add(count, Ordering::Relaxed) + count >= self.all {
            self.done.notify_one();
        }
    }
}
