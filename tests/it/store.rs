//! Held keys and events for later beside a broker that keeps neither.

use std::time::Duration;

use eventbus::prelude::*;
use eventbus::{ErrorKind, EventBusConfig};
use serde::{Deserialize, Serialize};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "PaymentDue", topic = "reminders", key = "order_id")]
struct PaymentDue {
    order_id: u64,
}

#[tokio::test]
async fn what_a_store_keeps_beside_the_broker_is_there_for_the_next_process() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = format!("sqlite://{}", directory.path().join("held.db").display());
    let config = EventBusConfig::new("memory:?like=kafka").with_store(&store);
    let bus = EventBus::connect_with(&config).await.expect("it connects");
    let held = bus.held_keys("payments").expect("there is a store");
    assert!(held.list().await.expect("it answers").is_empty());
    let hour = Duration::from_secs(3600);
    let id = bus.publish_after(PaymentDue { order_id: 42 }, hour).await;
    let id = id.expect("it waits");
    bus.close().await.expect("it closes");

    // The broker in memory is another one.
    let bus = EventBus::connect_with(&config).await.expect("it connects");
    let scheduled = bus.scheduled().expect("there is a schedule");
    let waiting = scheduled.list().await.expect("it answers");
    assert_eq!(waiting.len(), 1);
    assert!(bus.cancel(&id).await.expect("it answers"));
}

#[tokio::test]
async fn a_store_ends_with_no_process() {
    let config = EventBusConfig::new("memory:").with_store("memory:");
    let error = EventBus::connect_with(&config).await.expect_err("it would");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("sqlite://FILE"), "{error}");
}
