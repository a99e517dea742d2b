//! Seed 001: as seed 000, and the queue `order_events` is one that its server loses when it ends, which
//! has to be said. The services are one process here, which ends in order.
//!
//!     export $(dev/brokers up rabbitmq)
//!     EVENTBUS_URL=$EVENTBUS_TEST_RABBITMQ cargo run --example seed_001 --features rabbitmq
//!
//! Python needs pika: `pip install pika`, or name one that has it by `PYTHON=…`.

use eventbus::RabbitMqBroker;
use eventbus::format::FlatFormat;
use eventbus::prelude::*;
use serde::{Deserialize, Serialize};

#[path = "seeds/python.rs"]
mod python;

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "orders", key = "order_id")]
struct OrderCreated {
    order_id: u64,
    amount: u64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "PaymentCompleted", topic = "payments", key = "order_id")]
struct PaymentCompleted {
    order_id: u64,
}

async fn charge(order: OrderCreated, cx: Context) -> Result<(), BoxError> {
    let OrderCreated { order_id, amount } = order;
    println!("payment:      order {order_id} is charged {amount}");
    cx.publish(PaymentCompleted { order_id })?;
    Ok(())
}

async fn reserve(order: OrderCreated, _: Context) -> Result<(), BoxError> {
    println!("inventory:    order {} has its stock", order.order_id);
    Ok(())
}

async fn pack(payment: PaymentCompleted, _: Context) -> Result<(), BoxError> {
    println!("shipping:     order {} is packed", payment.order_id);
    Ok(())
}

async fn confirm(payment: PaymentCompleted, _: Context) -> Result<(), BoxError> {
    println!("notification: order {} is confirmed", payment.order_id);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let rabbit = RabbitMqBroker::from_url(&python::url()).await?;
    let bus = EventBus::builder(rabbit.clone()).format(FlatFormat).build();
    python::run("queues.py", &["completed_payments", "payments"]).await?;
    python::run("publish_001.py", &[]).await?;

    let payment = bus.consumer("payment").on(charge).spawn().await?;
    let inventory = bus.consumer("inventory").on(reserve).spawn().await?;
    let shipping = bus.consumer("shipping").on(pack).spawn().await?;
    let notification = bus.consumer("notification").on(confirm).spawn().await?;
    let orders = rabbit.ingress("order_events", OrderCreated::TOPIC);
    let orders = orders.key("order_id").volatile().spawn().await?;

    // Shipping is down, and three go on.
    python::until(|| handled(&shipping) == 1).await;
    shipping.shutdown().await?;
    python::run("publish_001.py", &[]).await?;
    python::until(|| [&payment, &inventory, &notification].map(handled) == [2, 2, 2]).await;

    // The shop's Python programs read what the services publish.
    let read = python::run("read.py", &["completed_payments", "2"]).await?;
    let completed = r#"{"event_type":"PaymentCompleted","order_id":123}"#;
    assert_eq!(read.lines().collect::<Vec<_>>(), [completed, completed]);

    // It is back, and nothing is missing.
    let shipping = bus.consumer("shipping").on(pack).spawn().await?;
    python::until(|| handled(&shipping) == 1).await;
    bus.service("shop")
        .background("orders", |stop| orders.run_until(stop))
        .consumer(payment)
        .consumer(inventory)
        .consumer(shipping)
        .consumer(notification)
        // In a service of your own: `.run_until(shutdown_signal())`.
        .run_until(async {})
        .await?;
    Ok(())
}

fn handled(service: &Consumer) -> u64 {
    service.status().counts.handled
}
