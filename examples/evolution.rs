//! An event evolves from v1 to v2: old messages, wherever they are, reach the new handler.
//!
//! `cargo run --example evolution`

use eventbus::prelude::*;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{Sender, channel};

/// What the shop published until last year, and what still lies on topics and among dead letters.
mod v1 {
    use super::{Deserialize, Event, Serialize};

    #[derive(Event, Serialize, Deserialize)]
    #[event(type = "OrderCreated", topic = "order-events", key = "order_id")]
    pub(super) struct OrderCreated {
        pub(super) order_id: u64,
        /// In whole euros.
        pub(super) amount: i64,
    }
}

/// Amounts got cents and a currency: readers of v1 could not have read this, so it is v2.
#[derive(Event, Debug, PartialEq, Serialize, Deserialize)]
#[event(
    type = "OrderCreated",
    topic = "order-events",
    key = "order_id",
    version = 2,
    from = "v1::OrderCreated"
)]
struct OrderCreated {
    order_id: u64,
    cents: i64,
    currency: String,
}

impl From<v1::OrderCreated> for OrderCreated {
    fn from(old: v1::OrderCreated) -> Self {
        Self {
            order_id: old.order_id,
            cents: old.amount * 100,
            currency: "EUR".into(),
        }
    }
}

#[tokio::main]
async fn main() -> eventbus::Result<()> {
    let bus = EventBus::connect("memory:").await?;
    bus.publish(v1::OrderCreated {
        order_id: 1,
        amount: 25,
    })
    .await?;
    bus.publish(OrderCreated {
        order_id: 2,
        cents: 1_999,
        currency: "CHF".into(),
    })
    .await?;

    let (seen, mut orders) = channel(2);
    let billing = bus
        .consumer("billing")
        .state(seen)
        .on(
            async |order: OrderCreated, cx: Context<Sender<OrderCreated>>| {
                cx.state().send(order).await?;
                Ok(())
            },
        )
        .spawn()
        .await?;

    for _ in 0..2 {
        let order = orders.recv().await.expect("the consumer runs");
        println!(
            "order {} costs {} {}",
            order.order_id,
            order.cents as f64 / 100.0,
            order.currency
        );
    }
    billing.shutdown().await
}
