use eventbus_macros::Event;
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Order {
    id: u64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", key = "order.number", crate = "eventbus_core")]
struct OrderCreated {
    order: Order,
}

fn main() {}
