//! What a message costs to consume at a backlog of ten million, beside one of ten thousand.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use eventbus::format::FlatFormat;
use eventbus::{EventBus, Start};

use super::{BATCH, Handled, broker, count_one, fill, median, messages};

const SMALL: usize = 10_000;
const LARGE: usize = 10_000_000;
/// The large one is consumed in such parts, each beside as many messages of small ones.
const PART: usize = 1_000_000;
/// One part less than there is: a consumer that leaves has handled a little more than its part.
const ROUNDS: usize = LARGE / PART - 1;
const GOAL: f64 = 1.15;

/// Prints processor time per message, and the ratio of both backlogs, part by part.
#[allow(clippy::print_stdout, reason = "a bench prints its figures")]
pub(super) async fn compare(directory: &Path) {
    let messages = messages().await;
    let small = broker(&directory.join("small.db")).await;
    let large = broker(&directory.join("large.db")).await;
    fill(&small, &messages, SMALL / BATCH).await;
    fill(&large, &messages, LARGE / BATCH).await;
    let [small, large] =
        [small, large].map(|broker| EventBus::builder(broker).format(FlatFormat).build());

    let (mut few, mut many, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        few.push(of_small(&small, round).await);
        many.push(of_large(&large).await);
        ratios.push(many[round] / few[round]);
        println!(
            "  part {round}: {:.0} and {:.0} ns a message",
            few[round], many[round]
        );
    }
    println!(
        "processor time a message: {:.2} µs at a backlog of {SMALL}, {:.2} µs at {LARGE}, medians of {ROUNDS} parts",
        median(few) / 1e3,
        median(many) / 1e3,
    );
    ratios.sort_by(f64::total_cmp);
    println!(
        "  ratio: median {:.2}, least {:.2}, most {:.2} (goal {GOAL})",
        median(ratios.clone()),
        ratios[0],
        ratios[ROUNDS - 1],
    );
}

/// Nanoseconds a message, when one group after the other consumes the small backlog.
async fn of_small(bus: &EventBus, round: usize) -> f64 {
    let groups: Vec<String> = (0..PART / SMALL)
        .map(|group| format!("bench-{round}-{group}"))
        .collect();
    let begun = processor_time();
    for group in &groups {
        consume(bus, group, SMALL).await;
    }
    let all = processor_time() - begun;
    // Again, with nothing left to consume: what joining and leaving costs.
    let begun = processor_time();
    for group in &groups {
        consume(bus, group, 0).await;
    }
    (all - (processor_time() - begun)) / PART as f64
}

/// Nanoseconds a message of the next part of the large backlog.
async fn of_large(bus: &EventBus) -> f64 {
    let begun = processor_time();
    consume(bus, "bench", PART).await;
    (processor_time() - begun) / PART as f64
}

/// Joins a group, handles at least so many messages, and leaves.
async fn consume(bus: &EventBus, group: &str, count: usize) {
    let handled: Arc<Handled> = Arc::default();
    handled.2.store(count, Ordering::Relaxed);
    let consumer = bus
        .consumer(group)
        .start(Start::Earliest)
        .shared_state(Arc::clone(&handled))
        .on(count_one)
        .spawn()
        .await
        .expect("a consumer can be spawned");
    while handled.0.load(Ordering::Relaxed) < count {
        let limit = Duration::from_secs(60);
        let waited = tokio::time::timeout(limit, handled.1.notified()).await;
        waited.expect("the backlog is consumed");
    }
    consumer.shutdown().await.expect("it ends");
}

/// Nanoseconds that all threads of this process, those that ended included, spent on a processor.
fn processor_time() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").expect("Linux tells it");
    let (_, fields) = text.rsplit_once(')').expect("the name of the program");
    let fields: Vec<f64> = fields
        .split_whitespace()
        .map(|field| field.parse().unwrap_or(0.0))
        .collect();
    // In user mode and in the kernel, in hundredths of a second.
    (fields[11] + fields[12]) * 1e7
}
