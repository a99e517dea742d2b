use eventbus_macros::Event;

#[derive(Event)]
#[event(topic = "order-events")]
struct OrderCreated;

fn main() {}
