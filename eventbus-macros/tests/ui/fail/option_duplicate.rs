use eventbus_macros::Event;

#[derive(Event)]
#[event(type = "OrderCreated", topic = "order-events", topic = "orders")]
#[event(type = "OrderCreated")]
struct OrderCreated;

fn main() {}
