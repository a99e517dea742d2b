//! The bus on RabbitMQ beside its client as one would use it by hand, on the same server, the same
//! bytes, interleaved in one run: publishing, and consuming a backlog with one handler, with 64 keys at
//! once, and in batches. Prints rates, processor time of the client a message, and the ratios of pairs.
//!
//! `export $(dev/brokers up rabbitmq); cargo bench -p eventbus --features rabbitmq --bench rabbitmq`
//! (PAIRS=9 for more pairs, MESSAGES=100000 for a longer run, ONLY=publish for one comparison, and
//! ARM=bus or ARM=raw for one side alone, which is for a profiler and says nothing about speed)
//!
//! By hand means: persistent messages that must be routed, 500 written side by side and confirmed before
//! the next 500 on each of two channels; a consumer on each quorum queue with as many sent ahead, which
//! acknowledges every 50 messages at once. Both encode and decode the payload, and send the headers; by
//! hand nobody reads those.

#[path = "load/pairs.rs"]
mod pairs;

use std::future::poll_fn;
use std::task::Poll;

use eventbus::{Context, EventBus, Message, RabbitMqBroker};
use futures_util::StreamExt;
use futures_util::future::join_all;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, ExchangeDeleteOptions, QueueDeleteOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use pairs::{Arm, Comparison, Envelope, Figure, OrderCreated, Watch, What, fill, number, order};

/// As many as our defaults create, and messages that are sent ahead for each.
const PARTITIONS: u32 = 4;
const PREFETCH: u16 = 256;
/// By hand: messages side by side, channels that publish, messages of an acknowledgement.
const WINDOW: usize = 500;
const CHANNELS: usize = 2;
const ACK: u64 = 50;

/// What is compared, and the least ratio of rates that its upper bound has to reach.
const COMPARISONS: &[Comparison] = &[
    (What::Publish, "publish", 0.95),
    (What::Handler, "consume, one handler", 0.95),
    (What::Slots, "consume, 64 keys at once", 0.80),
    (What::Batches, "consume, batches of 256", 0.95),
];

fn main() {
    let messages = number("MESSAGES").unwrap_or(40_000);
    let url = std::env::var("EVENTBUS_TEST_RABBITMQ").expect("export $(dev/brokers up rabbitmq)");
    pairs::runtime().block_on(async {
        let bench = Bench::new(&url, messages).await;
        pairs::compare(COMPARISONS, &bench.sample, messages, |arm, what| {
            bench.run(arm, what)
        })
        .await;
        bench.remove().await;
    });
}

struct Bench {
    connection: Connection,
    /// For what is no part of the measurement.
    channel: Channel,
    bus: EventBus,
    messages: usize,
    /// A message as the bus makes it: by hand the same headers are sent.
    sample: Message,
}

/// Queues keep what no group has read, so there is one group, whose queues both consume from.
const GROUP: &str = "bench";

fn topic() -> String {
    format!("bench-{}-orders", std::process::id())
}

fn queue(partition: u32) -> ShortString {
    format!("{}:{GROUP}:{partition}", topic()).into()
}

impl Bench {
    async fn new(url: &str, messages: usize) -> Self {
        let broker = RabbitMqBroker::from_url(url).await.expect("it answers");
        let prefix = format!("bench-{}-", std::process::id());
        let bus = EventBus::builder(broker).topic_prefix(prefix).build();
        let properties = ConnectionProperties::default();
        let connection = Connection::connect(url, properties)
            .await
            .expect("it answers");
        let channel = connection.create_channel().await.expect("it answers");
        // Its queues keep from now on what is published.
        let consumer = bus
            .consumer(GROUP)
            .on(ignore)
            .spawn()
            .await
            .expect("it joins");
        consumer.shutdown().await.expect("it ends");
        Self {
            sample: pairs::sample().await,
            connection,
            channel,
            bus,
            messages,
        }
    }

    async fn run(&self, arm: Arm, what: What) -> Figure {
        if what != What::Publish {
            fill(&self.bus, self.messages).await;
        }
        let figure = match (arm, what) {
            (Arm::Raw, What::Publish) => self.raw_publish().await,
            (Arm::Raw, _) => self.raw_consume().await,
            (Arm::Bus, What::Publish) => pairs::publish(&self.bus, self.messages).await,
            (Arm::Bus, what) => pairs::consume(&self.bus, GROUP, self.messages, what).await,
        };
        for partition in 0..PARTITIONS {
            let left = self
                .channel
                .queue_purge(queue(partition), QueuePurgeOptions::default());
            let left = left.await.expect("it answers");
            assert!(what == What::Publish || left == 0, "all were acknowledged");
        }
        figure
    }

    async fn remove(&self) {
        let partitions = format!("{}:partitions", topic()).into();
        for queue in (0..PARTITIONS).map(queue).chain([partitions]) {
            let removed = self
                .channel
                .queue_delete(queue, QueueDeleteOptions::default());
            removed.await.expect("it answers");
        }
        let removed = self
            .channel
            .exchange_delete(topic().into(), ExchangeDeleteOptions::default());
        removed.await.expect("it answers");
    }

    async fn raw_publish(&self) -> Figure {
        let envelope: Envelope<OrderCreated> =
            serde_json::from_slice(&self.sample.payload).expect("it is JSON");
        let watch = Watch::start();
        let publishing = (0..CHANNELS).map(|number| {
            let (first, envelope) = (number * self.messages / CHANNELS, envelope.clone());
            let end = (number + 1) * self.messages / CHANNELS;
            async move {
                let channel = self.connection.create_channel().await.expect("it answers");
                let confirms = channel.confirm_select(ConfirmSelectOptions::default());
                confirms.await.expect("it answers");
                publish(&channel, &self.sample, envelope, first..end).await;
            }
        });
        join_all(publishing).await;
        watch.figure(self.messages)
    }

    async fn raw_consume(&self) -> Figure {
        let mut consumers = Vec::new();
        for partition in 0..PARTITIONS {
            let channel = self.connection.create_channel().await.expect("it answers");
            let limited = channel.basic_qos(PREFETCH, BasicQosOptions::default());
            limited.await.expect("it answers");
            let (tag, options) = (ShortString::from(""), BasicConsumeOptions::default());
            let consumer =
                channel.basic_consume(queue(partition), tag, options, FieldTable::default());
            let consumer = consumer.await.expect("it answers");
            consumers.push((channel, consumer));
        }
        let (channels, consumers): (Vec<_>, Vec<_>) = consumers.into_iter().unzip();
        let consumers = consumers.into_iter().enumerate();
        let mut all = futures_util::stream::select_all(
            consumers.map(|(index, consumer)| consumer.map(move |it| (index, it))),
        );
        let (mut tags, mut watch) = (vec![0; channels.len()], None);
        for _ in 0..self.messages {
            let (index, delivery) = all.next().await.expect("it goes on");
            let delivery = delivery.expect("it can be read");
            let watch = watch.get_or_insert_with(Watch::start);
            let envelope: Envelope<OrderCreated> =
                serde_json::from_slice(&delivery.data).expect("it is JSON");
            std::hint::black_box((&envelope, &watch));
            tags[index] = delivery.delivery_tag;
            if delivery.delivery_tag % ACK == 0 {
                acknowledge(&channels[index], delivery.delivery_tag).await;
            }
        }
        for (channel, tag) in channels.iter().zip(tags) {
            acknowledge(channel, tag).await;
        }
        let figure = watch.expect("there were some").figure(self.messages);
        for channel in channels {
            channel.close(200, "done".into()).await.expect("it answers");
        }
        figure
    }
}

async fn ignore(_: OrderCreated, _: Context) -> Result<(), eventbus::BoxError> {
    Ok(())
}

async fn acknowledge(channel: &Channel, tag: u64) {
    let acknowledged = channel.basic_ack(tag, BasicAckOptions { multiple: true });
    acknowledged.await.expect("it is open");
}

/// Publishes the orders of these numbers, a window at a time.
async fn publish(
    channel: &Channel,
    sample: &Message,
    mut envelope: Envelope<OrderCreated>,
    numbers: std::ops::Range<usize>,
) {
    let exchange = ShortString::from(topic());
    let options = BasicPublishOptions {
        mandatory: true,
        immediate: false,
    };
    let keys: Vec<ShortString> = (0..PARTITIONS).map(|it| it.to_string().into()).collect();
    for first in numbers.clone().step_by(WINDOW) {
        let mut payloads = Vec::with_capacity(WINDOW);
        for number in first..numbers.end.min(first + WINDOW) {
            envelope.data = order(number as u64);
            let payload = serde_json::to_vec(&envelope).expect("it is JSON");
            payloads.push((number, payload, envelope.data.order_id));
        }
        let mut sending: Vec<_> = payloads
            .iter()
            .map(|(number, payload, order_id)| {
                let key = keys[number % keys.len()].clone();
                let properties = properties(sample, *order_id);
                let exchange = exchange.clone();
                Box::pin(channel.basic_publish(exchange, key, options, payload, properties))
            })
            .collect();
        // The first poll of each puts its frames behind those of the one before.
        let mut early: Vec<_> = poll_fn(|cx| {
            let polled = sending.iter_mut().map(|it| match it.as_mut().poll(cx) {
                Poll::Ready(sent) => Some(sent),
                Poll::Pending => None,
            });
            Poll::Ready(polled.collect())
        })
        .await;
        for (sending, early) in sending.into_iter().zip(&mut early) {
            let confirm = match early.take() {
                Some(sent) => sent,
                None => sending.await,
            };
            let confirmation = confirm.expect("it is sent").await.expect("it is confirmed");
            assert!(matches!(confirmation, Confirmation::Ack(None)));
        }
    }
}

fn properties(sample: &Message, order_id: u64) -> BasicProperties {
    let text = |value: &[u8]| AMQPValue::LongString(LongString::from(value));
    let mut table = FieldTable::default();
    for (name, value) in sample.headers.iter() {
        table.insert(name.into(), text(value));
    }
    table.insert("eb-key".into(), text(order_id.to_string().as_bytes()));
    BasicProperties::default()
        .with_delivery_mode(2)
        .with_headers(table)
}
