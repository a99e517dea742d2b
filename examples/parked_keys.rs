//! An order that can't be handled parks: its later events wait behind it, in order, until somebody
//! decides. Other orders go on.
//!
//!     cargo run --example parked_keys

use std::time::Duration;

use eventbus::prelude::*;
use serde::{Deserialize, Serialize};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", key = "order_id")]
struct OrderCreated {
    order_id: u64,
    amount: u64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderPaid", topic = "order-events", key = "order_id")]
struct OrderPaid {
    order_id: u64,
}

/// Books what it can.
#[derive(Default)]
struct Ledger {
    is_repaired: std::sync::atomic::AtomicBool,
}

impl Ledger {
    async fn book(&self, order: OrderCreated) -> Result<(), BoxError> {
        if order.amount == 0 && !self.is_repaired.load(std::sync::atomic::Ordering::Relaxed) {
            return Err("an order over nothing can't be booked".into());
        }
        println!("order {} is booked", order.order_id);
        Ok(())
    }
}

#[tokio::main]
async fn main() -> eventbus::Result<()> {
    let bus = EventBus::connect("memory:").await?;
    let ledger = std::sync::Arc::new(Ledger::default());

    let accounting = bus
        .consumer("accounting")
        .shared_state(std::sync::Arc::clone(&ledger))
        .on(async |order: OrderCreated, cx: Context<Ledger>| cx.state().book(order).await)
        .on(async |paid: OrderPaid, _: Context<Ledger>| {
            println!("order {} is paid", paid.order_id);
            Ok(())
        })
        // Two tries at once, one more a second later; then the order parks.
        .retry(RetryPolicy::immediate(2).delayed([Duration::from_secs(1)]))
        .on_poison(OnPoison::ParkKey)
        .spawn()
        .await?;

    bus.publish(OrderCreated {
        order_id: 1,
        amount: 0,
    })
    .await?;
    bus.publish(OrderPaid { order_id: 1 }).await?;
    bus.publish(OrderCreated {
        order_id: 2,
        amount: 80,
    })
    .await?;
    bus.publish(OrderPaid { order_id: 2 }).await?;

    let held = bus.held_keys("accounting")?;
    let parked = loop {
        let keys = held.list().await?;
        match keys.into_iter().find(|key| key.wait.is_parked()) {
            Some(parked) => break parked,
            None => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    println!(
        "{} is parked with {} events: {}",
        parked.held, parked.messages, parked.wait.error
    );

    ledger
        .is_repaired
        .store(true, std::sync::atomic::Ordering::Relaxed);
    held.retry(&parked.held, "ann", "nothing may be free")
        .await?;

    while !held.list().await?.is_empty() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    accounting.shutdown().await
}
