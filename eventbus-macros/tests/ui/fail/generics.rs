use eventbus_macros::Event;

#[derive(Event)]
#[event(type = "Changed", topic = "changes")]
struct Changed<T> {
    value: T,
}

#[derive(Event)]
#[event(type = "Borrowed", topic = "changes")]
struct Borrowed<'a> {
    value: &'a str,
}

fn main() {}
