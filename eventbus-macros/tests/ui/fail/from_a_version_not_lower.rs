use eventbus_macros::Event;
use serde::{Deserialize, Serialize};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", version = 2, crate = "eventbus_core")]
struct Before {
    order_id: u64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", crate = "eventbus_core")]
#[event(version = 2, from = "Before")]
struct OrderCreated {
    order_id: u64,
}

impl From<Before> for OrderCreated {
    fn from(before: Before) -> Self {
        Self { order_id: before.order_id }
    }
}

fn main() {}
