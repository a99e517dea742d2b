use eventbus_macros::Event;

#[derive(Event)]
#[event(type = "OrderCreated", topic = "order events")]
struct OrderCreated;

#[derive(Event)]
#[event(type = "OrderPaid", topic = "")]
struct OrderPaid;

fn main() {}
