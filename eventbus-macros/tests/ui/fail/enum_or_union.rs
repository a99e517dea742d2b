use eventbus_macros::Event;

#[derive(Event)]
#[event(type = "OrderEvent", topic = "order-events", key = "order_id")]
enum OrderEvent {
    Created { order_id: u64 },
}

#[derive(Event)]
#[event(type = "OrderUnion", topic = "order-events")]
union OrderUnion {
    order_id: u64,
}

fn main() {}
