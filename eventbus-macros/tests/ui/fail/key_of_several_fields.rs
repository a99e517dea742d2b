use eventbus_macros::Event;

#[derive(Event)]
#[event(type = "OrderCreated", topic = "order-events", key = "tenant, order_id")]
struct OrderCreated {
    tenant: String,
    order_id: u64,
}

fn main() {}
