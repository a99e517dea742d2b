use eventbus_macros::Event;

mod v1 {
    pub struct OrderCreated;
}

#[derive(Event)]
#[event(type = "OrderCreated", topic = "order-events", from = "v1::OrderCreated")]
struct OrderCreated;

#[derive(Event)]
#[event(type = "OrderPaid", topic = "order-events", version = 1, from = "v1::OrderPaid")]
struct OrderPaid;

fn main() {}
