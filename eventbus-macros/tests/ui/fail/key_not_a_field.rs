use eventbus_macros::Event;

#[derive(Event)]
#[event(type = "OrderCreated", topic = "order-events", key = "orderId")]
struct OrderCreated {
    order_id: u64,
    amount: u64,
}

#[derive(Event)]
#[event(type = "Tuple", topic = "order-events", key = "2")]
struct Tuple(u8, u64);

#[derive(Event)]
#[event(type = "Unit", topic = "order-events", key = "id")]
struct Unit;

fn main() {}
