//! What could not be handled is kept with its cause, listed, and given back once it can be.
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
}

/// The carrier's label printer, which is out of order to begin with.
struct Printer {
    works: AtomicBool,
    labels: watch::Sender<usize>,
}

async fn print_label(packed: ParcelPacked, cx: Context<Printer>) -> Result<(), BoxError> {
    if !cx.state().works.load(Ordering::Relaxed) {
        return Err(format!("no label for parcel {}: out of paper", packed.parcel).into());
    }
    cx.state().labels.send_modify(|count| *count += 1);
    Ok(())
}

#[tokio::main]
async fn main() -> eventbus::Result<()> {
    let bus = EventBus::connect("memory:").await?;
    let (labels, mut printed) = watch::channel(0);
    let printer = Arc::new(Printer {
        works: AtomicBool::new(false),
        labels,
    });

    let shipping = bus
        .consumer("shipping")
        .shared_state(Arc::clone(&printer))
        .on(print_label)
        .retry(RetryPolicy::immediate(2))
        .on_poison(OnPoison::SkipKey)
        .spawn()
        .await?;

    for parcel in 1..=3 {
        bus.publish(ParcelPacked { parcel }).await?;
    }
    let letters = loop {
        let letters = shipping.dead_letters().list().await?;
        if letters.len() == 3 {
            break letters;
        }
        tokio::task::yield_now().await;
    };
    for letter in &letters {
        println!(
            "{} after {} attempts: {}",
            letter.cause, letter.attempts, letter.error
        );
    }

    printer.works.store(true, Ordering::Relaxed);
    let redriven = shipping
        .dead_letters()
        .redrive(Redrive::all().by("ann").because("paper was refilled"))
        .await?;
    printed
        .wait_for(|count| *count == 3)
        .await
        .expect("the consumer runs");
    println!(
        "{redriven} re-driven, {} open",
        shipping.dead_letters().list().await?.len()
    );
    shipping.shutdown().await
}
