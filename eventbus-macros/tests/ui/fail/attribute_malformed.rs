use eventbus_macros::Event;

#[derive(Event)]
#[event]
struct WithoutOptions;

#[derive(Event)]
#[event("OrderCreated")]
struct WithoutNames;

#[derive(Event)]
#[event(type = "OrderCreated" topic = "order-events")]
struct WithoutComma;

fn main() {}
