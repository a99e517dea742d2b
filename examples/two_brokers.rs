//! The same service on two brokers: the one that takes orders, and the one for notifications.
//!
//! `cargo run --example two_brokers`, or with any two URLs:
//! `cargo run --example two_brokers -- memory:?like=kafka memory:?like=rabbitmq`

use eventbus::prelude::*;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{Sender, channel};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderShipped", topic = "order-events", key = "order_id")]
struct OrderShipped {
    order_id: u64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(
    type = "CustomerNotified",
    topic = "notification-events",
    key = "order_id"
)]
struct CustomerNotified {
    order_id: u64,
}

/// The service knows neither broker: it is given a bus.
async fn notifications(bus: &EventBus, done: Sender<u64>) -> eventbus::Result<Consumer> {
    bus.consumer("notifications")
        .state(done)
        .on(async |order: OrderShipped, cx: Context<Sender<u64>>| {
            cx.publish(CustomerNotified {
                order_id: order.order_id,
            })?;
            Ok(())
        })
        .on(
            async |notified: CustomerNotified, cx: Context<Sender<u64>>| {
                cx.state().send(notified.order_id).await?;
                Ok(())
            },
        )
        .spawn()
        .await
}

#[tokio::main]
async fn main() -> eventbus::Result<()> {
    let mut urls: Vec<_> = std::env::args().skip(1).collect();
    if urls.is_empty() {
        urls = vec!["memory:?like=kafka".into(), "memory:?like=rabbitmq".into()];
    }
    for url in urls {
        let bus = EventBus::connect(&url).await?;
        let (done, mut notified) = channel(1);
        let service = notifications(&bus, done).await?;
        bus.publish(OrderShipped { order_id: 7 }).await?;
        println!(
            "{url}: customer of order {:?} notified",
            notified.recv().await
        );
        service.shutdown().await?;
        bus.close().await?;
    }
    Ok(())
}
