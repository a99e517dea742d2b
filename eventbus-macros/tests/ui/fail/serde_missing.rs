use eventbus_macros::Event;

#[derive(Event)]
#[event(type = "OrderCreated", topic = "order-events", crate = "eventbus_core")]
struct OrderCreated {
    order_id: u64,
}

fn main() {}
