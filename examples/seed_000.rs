//! Seed 000: the order service is a Python program that publishes to the queue `order_events`. Four
//! services react to its orders, each by itself; while one of them is down, the others go on.
//!
//!     export $(dev/brokers up rabbitmq)
//!     EVENTBUS_URL=$EVENTBUS_TEST_RABBITMQ cargo run --example seed_000 --features rabbitmq
//!
//! Python needs pika: `pip install pika`, or name one that has it by `PYTHON=…`.

use eventbus::RabbitMqBroker;
use eventbus::format::FlatFormat;
use eventbus::prelude::*;
use serde::{Deserialize, Serialize};

#[path = "seeds/python.rs"]
mod python;

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order_events", key = "order_id")]
struct OrderCreated {
    order_id: u64,
    amount: u64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "PaymentProcessed", topic = "payment_events", key = "order_id")]
struct PaymentProcessed {
    order_id: u64,
    amount: u64,
}

async fn charge(order: OrderCreated, cx: Context) -> Result<(), BoxError> {
    let OrderCreated { order_id, amount } = order;
    println!("payment:      order {order_id} is charged {amount}");
    cx.publish(PaymentProcessed { order_id, amount })?;
    Ok(())
}

async fn reserve(order: OrderCreated, _: Context) -> Result<(), BoxError> {
    println!("inventory:    order {} has its stock", order.order_id);
    Ok(())
}

async fn confirm(order: OrderCreated, _: Context) -> Result<(), BoxError> {
    println!("notification: order {} is confirmed", order.order_id);
    Ok(())
}

async fn count(order: OrderCreated, _: Context) -> Result<(), BoxError> {
    println!("reporting:    {} more", order.amount);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let rabbit = RabbitMqBroker::from_url(&python::url()).await?;
    let bus = EventBus::builder(rabbit.clone()).format(FlatFormat).build();
    python::run("queues.py", &["payment_results", "payment_events"]).await?;

    let payment = bus.consumer("payment").on(charge).spawn().await?;
    let inventory = bus.consumer("inventory").on(reserve).spawn().await?;
    let notification = bus.consumer("notification").on(confirm).spawn().await?;
    let reporting = bus.consumer("reporting").on(count).spawn().await?;

    // Orders come on one queue, which hands each to one reader. From here on every service gets it.
    python::run("publish_000.py", &[]).await?;
    let orders = rabbit.ingress("order_events", OrderCreated::TOPIC);
    let orders = orders.key("order_id").spawn().await?;
    python::until(|| all_handled(&[&payment, &inventory, &notification, &reporting], 1)).await;

    println!("--- notification is down");
    notification.shutdown().await?;
    python::run("publish_000.py", &[]).await?;
    python::until(|| all_handled(&[&payment, &inventory, &reporting], 2)).await;

    println!("--- notification is back, and nothing is missing");
    let notification = bus.consumer("notification").on(confirm).spawn().await?;
    python::until(|| all_handled(&[&notification], 1)).await;

    // The shop's Python programs read what the services publish.
    let read = python::run("read.py", &["payment_results", "2"]).await?;
    let paid = r#"{"event_type":"PaymentProcessed","order_id":123,"amount":250}"#;
    assert_eq!(read.lines().collect::<Vec<_>>(), [paid, paid]);

    orders.shutdown().await?;
    for service in [payment, inventory, notification, reporting] {
        service.shutdown().await?;
    }
    bus.close().await?;
    Ok(())
}

fn all_handled(services: &[&Consumer], orders: u64) -> bool {
    let handled = services.iter().map(|it| it.status().counts.handled);
    handled.min() >= Some(orders)
}
