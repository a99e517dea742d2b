//! Where is my event? What a customer asks the support desk, and what the bus answers.
//!
//! `cargo run --example whereabouts`

use eventbus::Progress;
use eventbus::prelude::*;
use serde::{Deserialize, Serialize};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderPaid", topic = "order-events", key = "order_id")]
struct OrderPaid {
    order_id: u64,
    address: Option<String>,
}

async fn ship(order: OrderPaid, _: Context) -> Result<(), BoxError> {
    let address = order.address.ok_or("the order has no address")?;
    println!("order {} goes to {address}", order.order_id);
    Ok(())
}

async fn invoice(_: OrderPaid, _: Context) -> Result<(), BoxError> {
    Ok(())
}

#[tokio::main]
async fn main() -> eventbus::Result<()> {
    let bus = EventBus::connect("memory:?partitions=1").await?;
    let shipping = bus.consumer("shipping").on(ship);
    let shipping = shipping.retry(RetryPolicy::none()).spawn().await?;
    let invoicing = bus.consumer("invoicing").on(invoice).spawn().await?;
    invoicing.pause();

    for (order_id, address) in [(41, Some("Elm Street 1".into())), (42, None)] {
        bus.publish(OrderPaid { order_id, address }).await?;
    }
    while shipping.status().held == 0 {
        tokio::task::yield_now().await;
    }

    // Order 42 was paid and nothing has come. Where is it?
    let order = loop {
        let order = bus.whereabouts(&OrderPaid::TOPIC, "42").await?;
        if !order.held.is_empty() {
            break order;
        }
    };
    println!("{order}");

    // Shipping parked it, and invoicing, which somebody paused, has one more before it.
    assert_eq!(order.held[0].report.wait.error, "the order has no address");
    let invoicing_is_at = order.events[0].groups[0].progress;
    assert_eq!(invoicing_is_at, Progress::Waiting { before: Some(1) });

    // And how far behind is everybody?
    for place in bus.lags(&[OrderPaid::TOPIC]).await? {
        println!("{} is {} messages behind", place.group, place.lag);
    }
    invoicing.resume();
    shipping.shutdown().await?;
    invoicing.shutdown().await
}
