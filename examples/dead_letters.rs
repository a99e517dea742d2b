//! What could not be handled is counted by its error, given back once it can be, and edited where
//! that is all that helps. Every step is on record.
//!
//! `cargo run --example dead_letters`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use eventbus::prelude::*;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

#[derive(Event, Serialize, Deserialize)]
#[event(type = "ParcelPacked", topic = "shipping-events", key = "parcel")]
struct ParcelPacked {
    parcel: u64,
    street: String,
}

/// The carrier's label printer, which is out of paper to begin with.
struct Printer {
    has_paper: AtomicBool,
    labels: watch::Sender<usize>,
}

async fn print_label(packed: ParcelPacked, cx: Context<Printer>) -> Result<(), BoxError> {
    if packed.street.is_empty() {
        return Err(format!("parcel {} has no street", packed.parcel).into());
    }
    if !cx.state().has_paper.load(Ordering::Relaxed) {
        return Err(format!("no label for parcel {}: out of paper", packed.parcel).into());
    }
    cx.state().labels.send_modify(|count| *count += 1);
    Ok(())
}

#[tokio::main]
async fn main() -> eventbus::Result<()> {
    let bus = EventBus::connect("memory:").await?;
    let (labels, mut printed) = watch::channel(0);
    let has_paper = AtomicBool::new(false);
    let printer = Arc::new(Printer { has_paper, labels });

    let shipping = bus
        .consumer("shipping")
        .shared_state(Arc::clone(&printer))
        .on(print_label)
        .retry(RetryPolicy::none())
        .on_poison(OnPoison::SkipKey)
        .spawn()
        .await?;
    for (parcel, street) in [(1, "Elm Street 7"), (2, ""), (3, "Oak Lane 1")] {
        let street = street.to_owned();
        bus.publish(ParcelPacked { parcel, street }).await?;
    }
    let desk = shipping.dead_letters();
    while desk.list().await?.len() < 3 {
        tokio::task::yield_now().await;
    }

    // What went wrong, and how often?
    for error in desk.by_error().await? {
        println!("{} × {}", error.count, error.fingerprint);
    }

    // The printer has paper again: give those parcels back to this group, ten a second.
    printer.has_paper.store(true, Ordering::Relaxed);
    let redrive = Redrive::of_error("error: no label for parcel <n>: out of paper")
        .by("ann")
        .because("paper was refilled")
        .rate(10)
        .on_progress(|report| println!("{} of {} re-driven", report.done, report.chosen));
    desk.redrive(redrive).await?;

    // No paper helps where the street is missing: another event takes the place of that one.
    let letter = desk.list().await?.remove(0);
    let edit = Edit::new()
        .data(r#"{"parcel":2,"street":"Birch Road 3"}"#)
        .by("bob")
        .because("the customer told us the street");
    desk.edit(&letter.id, edit).await?;
    for entry in desk.history(&letter.id).await? {
        let who = entry.decision;
        println!(
            "{}: {:?} by {}: {}",
            who.at, entry.action, who.by, who.because
        );
    }

    let all = printed.wait_for(|count| *count == 3).await;
    all.expect("the consumer runs");
    println!("{} open", desk.list().await?.len());
    shipping.shutdown().await
}
