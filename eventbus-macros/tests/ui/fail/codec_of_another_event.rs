use eventbus_macros::Event;

#[derive(Debug)]
struct Bytes;

#[derive(Event)]
#[event(type = "OrderCreated", topic = "order-events", codec = "Bytes", crate = "eventbus_core")]
struct OrderCreated {
    order_id: u64,
}

fn main() {}
