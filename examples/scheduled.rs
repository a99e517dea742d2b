//! A customer is reminded a quarter of an hour after the order, unless it is paid by then.
//!
//!     cargo run --example scheduled

use std::time::Duration;

use eventbus::prelude::*;
use serde::{Deserialize, Serialize};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderPlaced", topic = "order-events", key = "order_id")]
struct OrderPlaced {
    order_id: u64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderPaid", topic = "order-events", key = "order_id")]
struct OrderPaid {
    order_id: u64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "PaymentDue", topic = "reminders", key = "order_id")]
struct PaymentDue {
    order_id: u64,
}

/// A quarter of an hour, in a hurry.
const PATIENCE: Duration = Duration::from_millis(500);

/// The id by which a reminder is taken back: known to whoever knows the order.
fn reminder_of(order_id: u64) -> EventId {
    EventId::from_name(&format!("reminder of order {order_id}"))
}

async fn placed(order: OrderPlaced, cx: Context<EventBus>) -> Result<(), BoxError> {
    let order_id = order.order_id;
    let reminder = Outgoing::new(PaymentDue { order_id }).with_id(reminder_of(order_id));
    cx.publish_after(reminder, PATIENCE)?; // waits on disk, if this handler succeeds
    Ok(())
}

async fn paid(order: OrderPaid, cx: Context<EventBus>) -> Result<(), BoxError> {
    if cx.state().cancel(&reminder_of(order.order_id)).await? {
        println!("order {} is paid in time", order.order_id);
    }
    Ok(())
}

async fn remind(due: PaymentDue, _: Context<EventBus>) -> Result<(), BoxError> {
    println!("order {} is to be paid, please", due.order_id);
    Ok(())
}

#[tokio::main]
async fn main() -> eventbus::Result<()> {
    // On sqlite://shop.db what waits survives restarts, and the processes of a shop share it.
    let bus = EventBus::connect("memory:").await?;
    let billing = bus
        .consumer("billing")
        .state(bus.clone())
        .on(placed)
        .on(paid)
        .on(remind)
        .spawn()
        .await?;

    bus.publish(OrderPlaced { order_id: 1 }).await?;
    bus.publish(OrderPlaced { order_id: 2 }).await?;
    bus.publish(OrderPaid { order_id: 2 }).await?;

    while billing.status().counts.handled < 4 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(bus.scheduled()?.list().await?.is_empty());
    billing.shutdown().await
}
