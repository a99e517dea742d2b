//! What relaying an event costs at a backlog of a million, beside ten thousand: processor time of this
//! process and of the server together.

use std::fs;
use std::time::Duration;

use eventbus::{EventBus, MemoryBroker};

use super::Place;

const LARGE: usize = 1_000_000;
const SMALL: usize = 10_000;
const PARTS: usize = 9;

/// Relays as much as the small backlog of either, in turns, and prints the median of the ratios.
#[allow(clippy::print_stdout, reason = "a bench prints its figures")]
pub(super) async fn compare() {
    let large = Place::new().await;
    large.fill(LARGE + PARTS * SMALL).await;
    // What filling it left to be written is not what relaying costs.
    large.execute("CHECKPOINT").await;
    println!("{LARGE} events wait; relaying {SMALL} of them, {PARTS} times, beside as many alone");
    let mut ratios = Vec::new();
    for _ in 0..PARTS {
        let small = Place::new().await;
        small.fill(SMALL).await;
        let of_small = relay(&small).await;
        small.remove().await;
        let of_large = relay(&large).await;
        ratios.push(of_large / of_small);
        println!("  {of_large:.1} us beside {of_small:.1} us an event");
    }
    ratios.sort_by(f64::total_cmp);
    println!("ratio {:.2} (goal 1.15)", ratios[PARTS / 2]);
    large.remove().await;
}

/// Microseconds of processor time an event.
async fn relay(place: &Place) -> f64 {
    let relay = place
        .store
        .outbox(&EventBus::new(MemoryBroker::new()))
        .relay();
    let handle = relay.handle();
    let before = processor_time();
    relay
        .run_until(async {
            while handle.status().published < SMALL as u64 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .expect("it ends well");
    let spent = processor_time() - before;
    spent.as_secs_f64() * 1e6 / handle.status().published as f64
}

/// Of this process, and of every PostgreSQL process, those that ended included.
fn processor_time() -> Duration {
    let mut ticks = 0;
    for entry in fs::read_dir("/proc").expect("this needs Linux").flatten() {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((head, rest)) = stat.rsplit_once(')') else {
            continue;
        };
        let mine = entry.file_name().to_string_lossy() == std::process::id().to_string();
        if mine || head.ends_with("(postgres") {
            // utime, stime, cutime and cstime are the 14th to 17th value, and the third follows `)`.
            let values = rest.split_whitespace().skip(11).take(4);
            ticks += values.filter_map(|it| it.parse::<u64>().ok()).sum::<u64>();
        }
    }
    // A hundred a second on every Linux that Rust runs on.
    Duration::from_millis(ticks * 10)
}
