use eventbus_macros::Event;

#[derive(Event)]
#[event(type = OrderCreated, topic = 7, key, codec("Json"), from = "not a path", version = 2, crate = "")]
struct OrderCreated;

fn main() {}
