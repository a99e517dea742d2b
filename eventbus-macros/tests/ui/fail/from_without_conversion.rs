use eventbus_macros::Event;
use serde::{Deserialize, Serialize};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", crate = "eventbus_core")]
struct Before {
    order_id: u64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", crate = "eventbus_core")]
#[event(version = 2, from = "Before")]
struct OrderCreated {
    order_id: u64,
}

fn main() {}
