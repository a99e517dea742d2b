use eventbus_macros::Event;

#[derive(Event)]
struct OrderCreated {
    order_id: u64,
}

fn main() {}
