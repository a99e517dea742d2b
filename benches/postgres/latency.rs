//! How long after the commit of an idle service its event is on the broker: one every 20 ms.

use std::time::{Duration, Instant};

use eventbus::format::FlatFormat;
use eventbus::{Context, EventBus, MemoryBroker, Origin};
use tokio::sync::mpsc::{Sender, channel};
use tokio::time::{interval, timeout};

use super::{OrderCreated, Place, order};

const MESSAGES: u64 = 1_000;
const UNMEASURED: u64 = 50;
const PAUSE: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(10);

/// Prints how long after the commit a handler on an in-memory broker began.
#[allow(clippy::print_stdout, reason = "a bench prints its figures")]
pub(super) async fn measure() {
    let place = Place::new().await;
    let bus = EventBus::builder(MemoryBroker::new())
        .format(FlatFormat)
        .build();
    let outbox = place.store.outbox(&bus);
    let (sender, mut begun) = channel(1);
    let consumer = bus
        .consumer("bench")
        .state(sender)
        .on(async |_: OrderCreated, cx: Context<Sender<Instant>>| {
            cx.state().send(Instant::now()).await?;
            Ok(())
        })
        .spawn()
        .await
        .expect("a consumer can be spawned");
    let relay = outbox.relay();
    let relay = tokio::spawn(relay.run_until(std::future::pending()));
    let mut times = Vec::new();
    let mut ticks = interval(PAUSE);
    for number in 0..MESSAGES + UNMEASURED {
        ticks.tick().await;
        let mut tx = outbox.begin(Origin::new()).await.expect("a transaction");
        tx.publish(order(number)).expect("it is collected");
        tx.commit().await.expect("it commits");
        let committed = Instant::now();
        let begun = timeout(PATIENCE, begun.recv()).await;
        let begun = begun.expect("in time").expect("it runs");
        if number >= UNMEASURED {
            times.push(begun.saturating_duration_since(committed));
        }
    }
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!(
        "one event every {PAUSE:?}, {MESSAGES} times; from commit to a handler on the broker: p50 {:?}, p99 {:?}, longest {:?} (goal: p99 25 ms)",
        at(0.5),
        at(0.99),
        at(1.0)
    );
    relay.abort();
    consumer.shutdown().await.expect("it ends");
    place.remove().await;
}
