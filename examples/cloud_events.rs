//! Services of other languages on one topic: what Dapr publishes is handled here, and what is published
//! here is a CloudEvent that any of its SDKs reads.
//!
//!     cargo run --example cloud_events

use eventbus::format::{CloudEventsBinaryFormat, CloudEventsFormat};
use eventbus::prelude::*;
use eventbus::{MemoryBroker, Message};
use serde::{Deserialize, Serialize};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "orders.order.created", topic = "orders", key = "order_id")]
struct OrderCreated {
    order_id: u64,
    amount: u64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(
    type = "payments.payment.processed",
    topic = "payments",
    key = "order_id"
)]
struct PaymentProcessed {
    order_id: u64,
}

async fn charge(order: OrderCreated, cx: Context) -> Result<(), BoxError> {
    let envelope = cx.envelope()?;
    println!("{} has order {}", envelope.source, order.order_id);
    println!("charging {}", order.amount);
    cx.publish(PaymentProcessed {
        order_id: order.order_id,
    })?;
    Ok(())
}

/// What the sidecar of a service in Go, Python or Java puts on a broker: no header says what it is.
const OF_DAPR: &str = r#"{"specversion":"1.0","id":"7b6d4c3e-0f61-4b87-9d0a-52ad3c5f8a11",
    "source":"checkout","type":"orders.order.created","time":"2026-11-21T08:00:00+01:00",
    "datacontenttype":"application/json","data":{"order_id":42,"amount":250},
    "topic":"orders","pubsubname":"orders-pubsub"}"#;

#[tokio::main]
async fn main() -> eventbus::Result<()> {
    let bus = EventBus::builder(MemoryBroker::new())
        .source("/shop/payments") // a URI reference, as CloudEvents has it
        .format(CloudEventsFormat::new()) // of all topics, but of those with one of their own
        .topic_format(
            Topic::from_static("exports"),
            CloudEventsBinaryFormat::new(),
        )
        .build();
    let payments = bus.consumer("payments").on(charge).spawn().await?;

    let order = Message::new(Topic::from_static("orders"), OF_DAPR).with_key("42");
    bus.publish_messages(vec![order]).await?;

    let topics = [PaymentProcessed::TOPIC];
    let mut published = bus.read(&topics, Start::Earliest, None).await?;
    if let Some(record) = published.next().await? {
        println!("{}", String::from_utf8_lossy(&record.message.payload));
    }
    payments.shutdown().await
}
