use eventbus_macros::Event;

#[derive(Event)]
#[event(name = "OrderCreated", type = "OrderCreated", topic = "order-events", durable, limits(bytes = 1))]
struct OrderCreated;

fn main() {}
