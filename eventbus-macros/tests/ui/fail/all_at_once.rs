use eventbus_macros::Event;

#[derive(Event)]
#[event(type = "", topic = "order events", key = "id", version = 0, colour = "red")]
struct OrderCreated<T> {
    order_id: T,
}

#[derive(Event)]
#[event(key = "id")]
enum OrderPaid {}

fn main() {}
