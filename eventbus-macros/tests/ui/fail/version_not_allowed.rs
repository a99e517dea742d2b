use eventbus_macros::Event;

#[derive(Event)]
#[event(type = "Zero", topic = "order-events", version = 0)]
struct Zero;

#[derive(Event)]
#[event(type = "Text", topic = "order-events", version = "2")]
struct Text;

#[derive(Event)]
#[event(type = "Negative", topic = "order-events", version = -1)]
struct Negative;

#[derive(Event)]
#[event(type = "Large", topic = "order-events", version = 4294967296)]
struct Large;

#[derive(Event)]
#[event(type = "Empty", topic = "order-events", version)]
struct Empty;

fn main() {}
