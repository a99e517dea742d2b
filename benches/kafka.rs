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

#[path = "load/pairs.rs"]
mod pairs;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use eventbus::{Event, EventBus, KafkaBroker, KafkaConfig, Message, TopicSpec};
use pairs::{Arm, Comparison, Envelope, Figure, OrderCreated, Watch, What, fill, number, order};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{Consumer as _, StreamConsumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::message::{Header, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, ProducerContext, ThreadedProducer};
use rdkafka::{ClientContext, Offset, TopicPartitionList};

const PARTITIONS: u32 = 12;
/// What is compared, and the least ratio of rates that its upper bound has to reach.
const COMPARISONS: &[Comparison] = &[
    (What::Publish, "publish", 0.95),
    (What::Handler, "consume, one handler", 0.92),
    (What::Slots, "consume, 64 keys at once", 0.80),
    (What::Batches, "consume, batches of 256", 0.97),
];

fn main() {
    let messages = number("MESSAGES").unwrap_or(200_000);
    let url = std::env::var("EVENTBUS_TEST_KAFKA").expect("export $(dev/brokers up kafka)");
    pairs::runtime().block_on(async {
        let bench = Bench::new(&url, messages).await;
        pairs::compare(COMPARISONS, &bench.sample, messages, |arm, what| {
            bench.run(arm, what)
        })
        .await;
    });
}

struct Bench {
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
        let sample = pairs::sample().await;
        let config = KafkaConfig::from_url(url).expect("a good url");
        Self {
            servers: config.servers,
            backlog,
            sink,
            messages,
            sample,
        }
    }

    fn topic(&self, what: &str) -> String {
        let unique = std::process::id();
        format!("bench-{what}-{unique}-orders")
    }

    async fn run(&self, arm: Arm, what: What) -> Figure {
        match (arm, what) {
            (Arm::Raw, What::Publish) => self.raw_publish().await,
            (Arm::Raw, _) => self.raw_consume().await,
            (Arm::Bus, What::Publish) => pairs::publish(&self.sink, self.messages).await,
            (Arm::Bus, what) => {
                let group = format!("bench-bus-{}", fastrand::u64(..));
                pairs::consume(&self.backlog, &group, self.messages, what).await
            }
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
