//! A service in one screen: an order comes in, a payment goes out.
//!
//! `cargo run --example quickstart`, and the same on another broker with `EVENTBUS_URL=…`.

use eventbus::prelude::*;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{Sender, channel};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", key = "order_id")]
struct OrderCreated {
    order_id: u64,
    amount: u64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "PaymentProcessed", topic = "payment-events", key = "order_id")]
struct PaymentProcessed {
    order_id: u64,
    amount: u64,
}

#[tokio::main]
async fn main() -> eventbus::Result<()> {
    let url = std::env::var("EVENTBUS_URL").unwrap_or("memory:".into());
    let bus = EventBus::connect(&url).await?;
    let (paid, mut all_paid) = channel(1);

    let payments = bus
        .consumer("payments")
        .on(async |order: OrderCreated, cx: Context| {
            println!(
                "charging order {} under {}",
                order.order_id,
                cx.idempotency_key()
            );
            let OrderCreated { order_id, amount } = order;
            cx.publish(PaymentProcessed { order_id, amount })?;
            Ok(())
        })
        .spawn()
        .await?;

    let receipts = bus
        .consumer("receipts")
        .state(paid)
        .on(
            async |payment: PaymentProcessed, cx: Context<Sender<u64>>| {
                println!("order {} paid {}", payment.order_id, payment.amount);
                cx.state().send(payment.order_id).await?;
                Ok(())
            },
        )
        .spawn()
        .await?;

    bus.publish(OrderCreated {
        order_id: 123,
        amount: 250,
    })
    .await?;

    all_paid.recv().await;
    payments.shutdown().await?;
    receipts.shutdown().await
}
