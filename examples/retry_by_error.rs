//! The error's value decides: a declined card is final, a busy provider is asked again later.
//!
//! `cargo run --example retry_by_error`

use std::time::Duration;

use eventbus::prelude::*;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{Sender, channel};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "PaymentRequested", topic = "payment-events", key = "order_id")]
struct PaymentRequested {
    order_id: u64,
    card: String,
}

#[derive(Debug)]
enum PspError {
    Declined,
    Busy { retry_after: Duration },
}

impl std::fmt::Display for PspError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Declined => f.write_str("the card was declined"),
            Self::Busy { .. } => f.write_str("the provider is busy"),
        }
    }
}

impl std::error::Error for PspError {}

/// Busy at the first attempt; declines one card.
fn charge(payment: &PaymentRequested, attempt: u32) -> Result<(), PspError> {
    match (payment.card.as_str(), attempt) {
        ("4000-0002", _) => Err(PspError::Declined),
        (_, 1) => Err(PspError::Busy {
            retry_after: Duration::from_millis(50),
        }),
        _ => Ok(()),
    }
}

async fn pay(payment: PaymentRequested, cx: Context<Sender<u64>>) -> Result<(), BoxError> {
    println!("order {}: attempt {}", payment.order_id, cx.attempt());
    charge(&payment, cx.attempt())?;
    println!("order {}: charged", payment.order_id);
    cx.state().send(payment.order_id).await?;
    Ok(())
}

#[tokio::main]
async fn main() -> eventbus::Result<()> {
    let bus = EventBus::connect("memory:").await?;
    let (charged, mut all_charged) = channel(8);

    let payments = bus
        .consumer("payments")
        .state(charged)
        .on(pay)
        .retry(
            RetryPolicy::immediate(5).when(|error: &PspError| match error {
                PspError::Declined => OnError::DeadLetter,
                PspError::Busy { retry_after } => OnError::After(*retry_after),
            }),
        )
        .spawn()
        .await?;

    for (order_id, card) in [(1, "4000-0001"), (2, "4000-0002"), (3, "4000-0003")] {
        let card = card.to_owned();
        bus.publish(PaymentRequested { order_id, card }).await?;
    }

    let first = all_charged.recv().await;
    let second = all_charged.recv().await;
    assert_eq!(first.min(second), Some(1));
    assert_eq!(first.max(second), Some(3));

    let declined = payments.dead_letters().list().await?;
    assert_eq!(declined.len(), 1);
    println!(
        "order 2 after {} attempt: {}",
        declined[0].attempts, declined[0].error
    );
    payments.shutdown().await
}
