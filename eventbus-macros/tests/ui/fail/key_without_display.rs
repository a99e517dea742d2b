use eventbus_macros::Event;
use serde::{Deserialize, Serialize};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", key = "order_id", crate = "eventbus_core")]
struct OrderCreated {
    order_id: Option<u64>,
}

fn main() {}
