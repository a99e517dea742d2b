//! The load that the in-memory benches share: pre-encoded events from publish to handler, the same
//! through a bare channel, and the parts of it alone: batches, decoding, broker.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use eventbus::broker::{Broker, Publisher, Receipt, Signal, Subscriber, Subscription};
use eventbus::{
    Consumer, ConsumerBuilder, Context, Event, EventBus, Group, MemoryBroker, MemoryConfig,
    Message, NoUnit, Result, Start, Until,
};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// How many messages a publish holds.
pub(crate) const BATCH: usize = 64;
const KEYS: u64 = 64;
/// Small enough for the log to stay in the processor's caches, as a channel does.
const LOG_BYTES: usize = 2 << 20;

/// What the handler counts into: how many, whom to tell, of how many.
pub(crate) type Handled = (AtomicUsize, Notify, usize);

/// About 256 bytes of payload in the default format.
#[derive(Clone, Debug, Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", key = "order_id")]
pub(crate) struct OrderCreated {
    /// The order.
    pub(crate) order_id: u64,
    /// What it costs.
    pub(crate) cents: i64,
    /// How many pieces.
    pub(crate) quantity: u32,
}

/// A runtime with one thread, so that time on the processor is the cost.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime can be built")
}

/// Messages as a publisher has encoded them, one a key.
pub(crate) async fn encoded() -> Vec<Message> {
    let bus = EventBus::new(MemoryBroker::new());
    for order_id in 0..KEYS {
        let order = OrderCreated {
            order_id,
            cents: 1_999,
            quantity: 3,
        };
        bus.publish(order).await.expect("memory takes it");
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

/// Publishes `count` messages in batches to a consumer and waits until all are handled. `spawn` may
/// put layers around the handler.
pub(crate) async fn through_bus(
    messages: &[Message],
    count: usize,
    spawn: impl AsyncFnOnce(ConsumerBuilder<Handled, NoUnit>) -> Result<Consumer>,
) {
    let broker = broker();
    let bus = EventBus::new(broker.clone());
    let handled = Arc::new((AtomicUsize::new(0), Notify::new(), count));
    let builder = bus
        .consumer("bench")
        .shared_state(Arc::clone(&handled))
        .on(count_one)
        .workers(1);
    let consumer = spawn(builder).await.expect("memory takes a consumer");
    for batch in batches(messages, count) {
        broker.publish(batch).await.expect("memory takes it");
        // One thread: the consumer's turn.
        tokio::task::yield_now().await;
    }
    while handled.0.load(Ordering::Relaxed) < count {
        handled.1.notified().await;
    }
    consumer.shutdown().await.expect("it ends");
    broker.close().await.expect("it ends");
}

fn broker() -> MemoryBroker {
    MemoryBroker::with(MemoryConfig::default().with_bytes(LOG_BYTES))
}

async fn count_one(order: OrderCreated, cx: Context<Handled>) -> Result<(), eventbus::BoxError> {
    std::hint::black_box(&order);
    let (handled, done, all) = cx.state();
    if handled.fetch_add(1, Ordering::Relaxed) + 1 == *all {
        done.notify_one();
    }
    Ok(())
}

/// Sends `count` messages through a channel to a loop that decodes them.
#[allow(
    clippy::future_not_send,
    reason = "it runs on one thread, as its peer does"
)]
pub(crate) async fn through_channel(messages: &[Message], count: usize) {
    let bus = Rc::new(EventBus::new(MemoryBroker::new()));
    let (sender, mut receiver) = tokio::sync::mpsc::channel::<Message>(1024);
    let handled = Rc::new(Cell::new(0));
    let local = tokio::task::LocalSet::new();
    let consumer = {
        let (bus, handled) = (Rc::clone(&bus), Rc::clone(&handled));
        local.spawn_local(async move {
            let mut received = Vec::with_capacity(BATCH);
            while receiver.recv_many(&mut received, BATCH).await > 0 {
                for message in received.drain(..) {
                    std::hint::black_box(decode(&bus, &message));
                    handled.set(handled.get() + 1);
                }
            }
        })
    };
    local
        .run_until(async {
            for batch in batches(messages, count) {
                for message in batch {
                    sender.send(message).await.expect("the loop receives");
                }
                tokio::task::yield_now().await;
            }
            drop(sender);
            consumer.await.expect("the loop ends");
        })
        .await;
    assert_eq!(handled.get(), count);
}

/// Publishes the same batches, takes them as a member of a group and settles them: no runtime.
pub(crate) async fn through_broker(messages: &[Message], count: usize) {
    let broker = broker();
    let topics = vec![OrderCreated::TOPIC];
    let subscription =
        Subscription::group(Group::from_static("bench"), topics).with_start(Start::Earliest);
    let mut member = broker
        .subscribe(subscription)
        .await
        .expect("memory takes it");
    let (mut taken, mut settled) = (0, Vec::<Receipt>::new());
    for batch in batches(messages, count) {
        taken += batch.len();
        broker.publish(batch).await.expect("memory takes it");
        while taken > 0 {
            let signal = member.deliveries.next().await.expect("memory goes on");
            let Signal::Delivered(deliveries) = signal else {
                continue;
            };
            taken -= deliveries.len();
            settled.extend(deliveries.iter().map(|delivery| delivery.receipt));
        }
        member
            .settlement
            .settle(&settled)
            .await
            .expect("memory records it");
        settled.clear();
    }
    broker.close().await.expect("it ends");
}

/// Makes the same batches and nothing else.
pub(crate) fn batches_only(messages: &[Message], count: usize) {
    for batch in batches(messages, count) {
        std::hint::black_box(batch);
    }
}

/// Makes the same batches and decodes their messages, and nothing else.
pub(crate) fn decode_only(messages: &[Message], count: usize) {
    let bus = EventBus::new(MemoryBroker::new());
    for batch in batches(messages, count) {
        for message in batch {
            std::hint::black_box(decode(&bus, &message));
        }
    }
}

fn decode(bus: &EventBus, message: &Message) -> OrderCreated {
    bus.event(message)
        .expect("the messages are whole")
        .expect("they are of this type")
}

fn batches(messages: &[Message], count: usize) -> impl Iterator<Item = Vec<Message>> {
    (0..count.div_ceil(BATCH)).map(move |batch| {
        let size = BATCH.min(count - batch * BATCH);
        messages.iter().cycle().take(size).cloned().collect()
    })
}
