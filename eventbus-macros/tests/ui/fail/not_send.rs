use eventbus_macros::Event;
use serde::{Deserialize, Serialize};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", crate = "eventbus_core")]
struct OrderCreated {
    #[serde(skip)]
    order: std::rc::Rc<u64>,
}

fn main() {}
