use eventbus_macros::Event;

#[derive(Event)]
#[event(type = " ", topic = "order-events")]
struct OrderCreated;

fn main() {}
