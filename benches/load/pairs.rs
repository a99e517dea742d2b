//! What the benches of brokers share: the event, pairs of runs by hand and by the bus with what is
//! said of them, publishing so many events, and consuming a backlog.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use eventbus::{
    BatchItem, BoxError, Context, Event, EventBus, MemoryBroker, Message, Start, Until,
};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// Events of one call to `publish_all`, and how many calls wait at the same time.
const BATCH: usize = 500;
const BATCHES_AT_ONCE: usize = 32;
/// Most of our processor time a message for one of theirs.
const CPU_GOAL: f64 = 1.2;

/// 256 bytes as JSON.
#[derive(Clone, Debug, Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "orders", key = "order_id")]
pub(crate) struct OrderCreated {
    pub(crate) order_id: u64,
    customer: String,
    address: String,
    cents: i64,
}

/// The same event as it is on the wire, for who writes and reads that by hand.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Envelope<Data> {
    event_id: String,
    event_type: String,
    event_version: String,
    timestamp: String,
    source: String,
    correlation_id: String,
    causation_id: Option<String>,
    pub(crate) data: Data,
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
pub(crate) struct Figure {
    /// Messages a second.
    rate: f64,
    /// Microseconds of processor time of this process a message.
    cpu: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum What {
    Publish,
    Handler,
    Slots,
    Batches,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Arm {
    /// The client by hand.
    Raw,
    Bus,
}

/// What is compared: its name, and the least ratio of rates that its upper bound has to reach.
pub(crate) type Comparison = (What, &'static str, f64);

/// A number out of the environment.
pub(crate) fn number(name: &str) -> Option<usize> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Runs `PAIRS` interleaved pairs of each comparison (`ONLY` those whose names have this in them), or
/// one `ARM` of them alone, and prints what came of it.
#[allow(clippy::print_stdout, reason = "a bench prints its figures")]
pub(crate) async fn compare(
    comparisons: &[Comparison],
    sample: &Message,
    messages: usize,
    run: impl AsyncFn(Arm, What) -> Figure,
) {
    let only = std::env::var("ONLY").ok();
    let chosen = comparisons
        .iter()
        .filter(|(_, name, _)| only.as_ref().is_none_or(|only| name.contains(only)));
    let pairs = number("PAIRS").unwrap_or(5);
    if let Ok(alone) = std::env::var("ARM") {
        let arm = match alone.as_str() {
            "raw" => Arm::Raw,
            _ => Arm::Bus,
        };
        for (what, name, _) in chosen {
            for _ in 0..pairs {
                let Figure { rate, cpu } = run(arm, *what).await;
                println!("{name}, {alone}: {rate:.0}/s at {cpu:.2} µs");
            }
        }
        return;
    }
    println!(
        "{} B of payload, {} B of headers, {messages} messages, {pairs} interleaved pairs",
        sample.payload.len(),
        sample.headers.packed_len(),
    );
    for (what, name, goal) in chosen {
        let (mut raw, mut bus) = (Vec::new(), Vec::new());
        for pair in 0..pairs {
            // The other one first every second time.
            if pair % 2 == 0 {
                raw.push(run(Arm::Raw, *what).await);
                bus.push(run(Arm::Bus, *what).await);
            } else {
                bus.push(run(Arm::Bus, *what).await);
                raw.push(run(Arm::Raw, *what).await);
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
pub(crate) struct Watch(Instant, f64);

impl Watch {
    pub(crate) fn start() -> Self {
        Self(Instant::now(), cpu_time())
    }

    pub(crate) fn figure(&self, messages: usize) -> Figure {
        let messages = messages as f64;
        Figure {
            rate: messages / self.0.elapsed().as_secs_f64(),
            cpu: (cpu_time() - self.1) * 1e6 / messages,
        }
    }
}

pub(crate) fn order(order_id: u64) -> OrderCreated {
    OrderCreated {
        order_id: 1_000_000 + order_id % 10_000,
        customer: "x".repeat(60),
        address: "y".repeat(119),
        cents: 1_999,
    }
}

/// A runtime with two threads.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime can be built")
}

/// Publishes so many events, several batches at a time.
pub(crate) async fn fill(bus: &EventBus, messages: usize) {
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

/// The time for which so many events are published.
pub(crate) async fn publish(bus: &EventBus, messages: usize) -> Figure {
    let watch = Watch::start();
    fill(bus, messages).await;
    watch.figure(messages)
}

/// A message as the bus makes it, which by hand has the same headers.
pub(crate) async fn sample() -> Message {
    let bus = EventBus::new(MemoryBroker::new());
    fill(&bus, 1).await;
    let mut reader = bus
        .read(&[OrderCreated::TOPIC], Start::Earliest, Some(Until::Now))
        .await
        .expect("memory can be read");
    let sample = reader.next().await.expect("memory can be read");
    sample.expect("there is one").message
}

/// Consumes a backlog as a group, which then has ended.
pub(crate) async fn consume(bus: &EventBus, group: &str, messages: usize, what: What) -> Figure {
    let handled = Arc::new(Handled {
        all: messages,
        ..Handled::default()
    });
    let consumer = bus.consumer(group).shared_state(Arc::clone(&handled));
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
    let figure = watch.figure(messages - begun);
    consumer.shutdown().await.expect("it ends");
    figure
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
