//! Hand-overs under load, on several threads: each event is handled once, by one member or another.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use eventbus_core::{
    BoxError, Consumer, Context, EventBus, Limits, MemoryBroker, MemoryConfig, Start,
};
use tokio::sync::watch;

use crate::fixtures::{OrderCreated, amount};

const EVENTS: u64 = 3_000;
const KEYS: u64 = 97;
const SEEDS: u64 = 20;

/// How long a hand-over may take before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the handlers of all members did.
#[derive(Debug)]
struct Handled {
    /// The events of each key, in the order in which they were handled.
    events: Mutex<Vec<Vec<u64>>>,
    count: watch::Sender<u64>,
}

impl Handled {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            events: Mutex::new(vec![Vec::new(); KEYS as usize]),
            count: watch::Sender::new(0),
        })
    }

    async fn wait_for(&self, count: u64) {
        let mut handled = self.count.subscribe();
        let reached = handled.wait_for(|handled| *handled >= count);
        let in_time = tokio::time::timeout(PATIENCE, reached).await;
        let reached = in_time.unwrap_or_else(|_| panic!("{count} events were not handled"));
        reached.expect("the sender is here");
    }

    fn check(&self, seed: u64) {
        let events = self.events.lock().unwrap();
        for (key, handled) in events.iter().enumerate() {
            let key = key as u64;
            let published: Vec<_> = (0..EVENTS).filter(|number| number % KEYS == key).collect();
            assert_eq!(*handled, published, "key {key}, seed {seed}");
        }
    }
}

/// Takes longer for some events than for others.
async fn handle(order: OrderCreated, cx: Context<Handled>) -> Result<(), BoxError> {
    for _ in 0..random(order.amount) % 20 {
        tokio::task::yield_now().await;
    }
    let handled = cx.state();
    handled.events.lock().unwrap()[order.order as usize].push(order.amount);
    handled.count.send_modify(|count| *count += 1);
    Ok(())
}

/// The same for the same seed, and like no other's.
fn random(seed: u64) -> u64 {
    let mixed = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 17
}

async fn join(broker: &MemoryBroker, handled: &Arc<Handled>) -> Consumer {
    EventBus::new(broker.connect())
        .consumer("billing")
        .shared_state(Arc::clone(handled))
        .start(Start::Earliest)
        .concurrency(64)
        .workers(4)
        // Nothing here is about how long a hand-over may take, and a machine may be busy.
        .limits(Limits::default().with_revoke_timeout(PATIENCE))
        .on(handle)
        .spawn()
        .await
        .unwrap()
}

async fn published() -> MemoryBroker {
    let broker = MemoryBroker::with(MemoryConfig::default().with_partitions(4));
    let bus = EventBus::new(broker.connect());
    let events = (0..EVENTS).map(|number| amount(number % KEYS, number));
    bus.publish_all(events.collect::<Vec<_>>()).await.unwrap();
    broker
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_member_that_stops_at_any_moment_leaves_exactly_the_rest() {
    for seed in 0..SEEDS {
        let (broker, handled) = (published().await, Handled::new());
        let first = join(&broker, &handled).await;
        handled.wait_for(random(seed) % EVENTS).await;
        first.shutdown().await.unwrap();
        let second = join(&broker, &handled).await;
        handled.wait_for(EVENTS).await;
        second.shutdown().await.unwrap();
        handled.check(seed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_member_that_joins_at_any_moment_takes_exactly_the_rest_of_its_lanes() {
    for seed in 0..SEEDS {
        let (broker, handled) = (published().await, Handled::new());
        let first = join(&broker, &handled).await;
        handled.wait_for(random(seed) % EVENTS).await;
        let second = join(&broker, &handled).await;
        handled.wait_for(EVENTS).await;
        first.shutdown().await.unwrap();
        second.shutdown().await.unwrap();
        handled.check(seed);
    }
}
