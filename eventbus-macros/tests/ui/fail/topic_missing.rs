use eventbus_macros::Event;

#[derive(Event)]
#[event(type = "OrderCreated")]
#[event(version = 2)]
struct OrderCreated;

fn main() {}
