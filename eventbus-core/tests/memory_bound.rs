//! How much memory a fast producer and a slow consumer take: what was configured, and little more.
//! A binary of its own, because it measures the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use eventbus_core::{
    BoxError, Consumer, Context, ErrorKind, Event, EventBus, Json, Key, Limits, MemoryBroker,
    MemoryConfig, Message, Outcome, Publisher, Result, Topic, unknown_version,
};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

const TOPIC: Topic = Topic::from_static("frames");

/// Each message is as large as this, its key and its format included.
const MESSAGE: usize = 16 * KIB;

/// What the process may take beyond what was configured: the runtime, the allocator's slack.
const SLACK: usize = 64 * MIB;

#[derive(Debug, Serialize, Deserialize)]
struct Frame {
    data: String,
}

impl Event for Frame {
    const TYPE: &'static str = "Frame";
    const TOPIC: Topic = TOPIC;
    const VERSION: u32 = 1;
    type Codec = Json;

    fn key(&self) -> Option<Key> {
        None
    }

    fn upcast(version: u32, _: &[u8]) -> Result<Self> {
        Err(unknown_version::<Self>(version))
    }
}

/// Holds handlers back until it is opened.
#[derive(Debug)]
struct Gate {
    open: Semaphore,
    handled: AtomicUsize,
}

impl Gate {
    fn closed() -> Arc<Self> {
        Arc::new(Self {
            open: Semaphore::new(0),
            handled: AtomicUsize::new(0),
        })
    }
}

async fn wait(_: Frame, cx: Context<Gate>) -> Result<(), BoxError> {
    // Closed means that it never closes again.
    if let Ok(permit) = cx.state().open.acquire().await {
        drop(permit);
    }
    cx.state().handled.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// The bytes of this process that are in memory; nothing where the system does not tell.
fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    let kib: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * KIB)
}

/// The most that the process took.
struct Peak {
    before: usize,
    most: usize,
}

impl Peak {
    fn begin() -> Self {
        let before = resident().unwrap_or_default();
        Self {
            before,
            most: before,
        }
    }

    fn look(&mut self) {
        self.most = self.most.max(resident().unwrap_or_default());
    }

    fn grown(&self) -> usize {
        self.most - self.before
    }

    fn check(&self, what: &str, configured: usize) {
        println!(
            "{what}: {} MiB before, {} MiB more at most; {} MiB are configured",
            self.before / MIB,
            self.grown() / MIB,
            configured / MIB
        );
        assert!(self.grown() <= configured + SLACK, "{what} is not bounded");
    }
}

/// One message with bytes of its own.
fn frame(number: usize) -> Message {
    let key = number.to_string();
    let mut payload = String::with_capacity(MESSAGE);
    payload.push_str("{\"event_type\":\"Frame\",\"data\":\"");
    let data = MESSAGE - payload.len() - key.len() - 2;
    payload.push_str(&"x".repeat(data));
    payload.push_str("\"}");
    let message = Message::new(TOPIC, Bytes::from(payload)).with_key(Key::display(number));
    assert_eq!(message.size(), MESSAGE);
    message
}

/// Publishes in batches and returns how many messages were taken.
async fn publish(broker: &MemoryBroker, messages: usize, peak: &mut Peak) -> usize {
    let mut taken = 0;
    for first in (0..messages).step_by(64) {
        let batch: Vec<_> = (first..messages.min(first + 64)).map(frame).collect();
        let count = batch.len();
        let unpublished = match broker.publish(batch).await {
            Ok(()) => Vec::new(),
            Err(error) => error.unpublished,
        };
        for left in &unpublished {
            assert_eq!(left.outcome, Outcome::NotTaken);
            assert_eq!(left.error.kind(), ErrorKind::RateLimited);
            assert!(left.error.is_retryable());
        }
        taken += count - unpublished.len();
        peak.look();
    }
    taken
}

async fn consume(bus: &EventBus, gate: &Arc<Gate>, limits: Limits) -> Consumer {
    bus.consumer("viewers")
        .shared_state(Arc::clone(gate))
        .limits(limits)
        .deadline(Duration::from_secs(600))
        .on(wait)
        .spawn()
        .await
        .expect("the consumer is set up well")
}

/// Opens the gate and waits until `count` messages are handled.
async fn open(gate: &Gate, count: usize, peak: &mut Peak) {
    gate.open.close();
    let handled = async {
        while gate.handled.load(Ordering::Relaxed) < count {
            peak.look();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let all = tokio::time::timeout(Duration::from_secs(60), handled).await;
    assert!(all.is_ok(), "{:?} of {count} were handled", gate.handled);
}

/// A producer eight times as fast as there is room, and a consumer that stands still.
async fn broker_is_bounded() {
    let (room, offered) = (64 * MIB, 512 * MIB);
    let mut peak = Peak::begin();
    let config = MemoryConfig::default()
        .with_bytes(room)
        .with_publish_timeout(Duration::from_millis(1));
    let broker = MemoryBroker::with(config);
    let bus = EventBus::new(broker.clone());
    let gate = Gate::closed();
    let consumer = consume(&bus, &gate, Limits::default()).await;

    let messages = offered / MESSAGE;
    let taken = publish(&broker, messages, &mut peak).await;
    println!("{taken} of {messages} messages of 16 KiB were taken");
    let fitting = room / (MESSAGE + MemoryConfig::MESSAGE_OVERHEAD);
    assert_eq!(taken, fitting);

    open(&gate, taken, &mut peak).await;
    consumer.shutdown().await.expect("it shuts down");
    assert_eq!(gate.handled.load(Ordering::Relaxed), taken);
    peak.check("a full broker", room);
}

/// A backlog of 256 MiB, of which a consumer takes 8 MiB at a time.
async fn consumer_is_bounded() {
    let (backlog, held) = (256 * MIB, 8 * MIB);
    let broker = MemoryBroker::with(MemoryConfig::default().with_bytes(2 * backlog));
    let messages = backlog / MESSAGE;
    let mut filling = Peak::begin();
    assert_eq!(publish(&broker, messages, &mut filling).await, messages);

    // The log is there; what is measured now is what the consumer adds to it.
    let mut peak = Peak::begin();
    let bus = EventBus::new(broker.clone());
    let gate = Gate::closed();
    let limits = Limits::default()
        .with_bytes(held)
        .with_messages(usize::MAX)
        .with_lane_messages(usize::MAX);
    let consumer = consume(&bus, &gate, limits).await;
    let in_flight = async {
        loop {
            let lanes = consumer.status().lanes;
            let in_flight: usize = lanes.iter().map(|lane| lane.in_flight).sum();
            if in_flight >= held / MESSAGE {
                return in_flight;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let in_flight = tokio::time::timeout(Duration::from_secs(60), in_flight).await;
    let in_flight = in_flight.expect("the limit is reached");
    println!("{in_flight} of {messages} messages of 16 KiB are in flight");
    assert_eq!(in_flight, held / MESSAGE);
    peak.look();

    open(&gate, messages, &mut peak).await;
    consumer.shutdown().await.expect("it shuts down");
    assert_eq!(gate.handled.load(Ordering::Relaxed), messages);
    peak.check("a consumer", held);
}

/// One after the other: they share the process that is measured.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_bounded_by_what_is_configured() {
    broker_is_bounded().await;
    consumer_is_bounded().await;
}
