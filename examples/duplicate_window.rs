//! A customer pays once, without a database to remember that: an order that comes again within a day
//! is not charged again, nor is one that comes while the first charge is under way.
//!
//!     cargo run --example duplicate_window

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use eventbus::prelude::*;
use serde::{Deserialize, Serialize};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderPlaced", topic = "order-events", key = "order_id")]
struct OrderPlaced {
    order_id: u64,
    cents: u64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderPaid", topic = "payment-events", key = "order_id")]
struct OrderPaid {
    order_id: u64,
}

/// The payment provider, on the other side of the internet.
#[derive(Default)]
struct Provider {
    charged: AtomicU64,
}

impl Provider {
    /// A good provider takes a key, and charges once under it however often it is asked: that covers
    /// the moment between the charge and our remembering it.
    async fn charge(&self, cents: u64, idempotency_key: &str) -> Result<(), BoxError> {
        tokio::time::sleep(Duration::from_millis(200)).await;
        self.charged.fetch_add(cents, Ordering::Relaxed);
        println!("charged {cents} cents under {idempotency_key}");
        Ok(())
    }
}

async fn pay(order: OrderPlaced, cx: Context<Provider>) -> Result<(), BoxError> {
    let OrderPlaced { order_id, cents } = order;
    cx.state().charge(cents, &cx.idempotency_key()).await?;
    cx.publish(OrderPaid { order_id })?;
    Ok(())
}

#[tokio::main]
async fn main() -> eventbus::Result<()> {
    let bus = EventBus::connect("memory:").await?;
    let payments = bus
        .consumer("payments")
        .state(Provider::default())
        .duplicate_window(DuplicateWindow::in_memory()) // 24 hours, or `.with_length(…)`
        .on(pay)
        .spawn()
        .await?;

    // The web shop gets no answer and sends its order three times: its id says it is the same.
    let basket = EventId::from_name("basket 7f3a of the web shop");
    for _ in 0..3 {
        let order = OrderPlaced {
            order_id: 1,
            cents: 2_500,
        };
        bus.publish(Outgoing::new(order).with_id(basket.clone()))
            .await?;
    }

    let counts = loop {
        let counts = payments.status().counts;
        if counts.handled + counts.duplicates == 3 {
            break counts;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    println!(
        "{} charge, {} duplicates",
        counts.handled, counts.duplicates
    );
    assert_eq!((counts.handled, counts.duplicates), (1, 2));
    payments.shutdown().await
}
