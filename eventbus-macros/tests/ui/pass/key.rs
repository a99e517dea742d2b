//! A key is the text of a field, of a field's field, or of a place in a tuple.

use eventbus_core::{Event as _, Key};
use eventbus_macros::Event;
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Order {
    id: String,
    lines: (u32, u32),
}

#[derive(Event, Serialize, Deserialize)]
#[event(
    type = "Nested",
    topic = "order-events",
    key = "order.id",
    crate = "eventbus_core"
)]
struct Nested {
    order: Order,
}

#[derive(Event, Serialize, Deserialize)]
#[event(
    type = "Deep",
    topic = "order-events",
    key = "order.lines.1",
    crate = "eventbus_core"
)]
struct Deep {
    order: Order,
}

#[derive(Event, Serialize, Deserialize)]
#[event(
    type = "Tuple",
    topic = "order-events",
    key = "1",
    crate = "eventbus_core"
)]
struct Tuple(u8, u64);

#[derive(Event, Serialize, Deserialize)]
#[event(
    type = "Keyword",
    topic = "order-events",
    key = "r#type",
    crate = "eventbus_core"
)]
struct Keyword {
    r#type: char,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "Unit", topic = "order-events", crate = "eventbus_core")]
struct Unit;

/// The attribute and the struct come from different places.
macro_rules! keyed {
    ($name:ident, $field:ident, $key:literal) => {
        #[derive(Event, Serialize, Deserialize)]
        #[event(type = "FromMacro", topic = "order-events", key = $key, crate = "eventbus_core")]
        struct $name {
            $field: u8,
        }

        #[derive(Event, Serialize, Deserialize)]
        #[event(
            type = "InMacro",
            topic = "order-events",
            key = "id",
            crate = "eventbus_core"
        )]
        struct InMacro {
            id: u8,
        }
    };
}

keyed!(FromMacro, id, "id");

fn order() -> Order {
    Order {
        id: "A-7".to_owned(),
        lines: (1, 2),
    }
}

fn main() {
    assert_eq!(Nested { order: order() }.key(), Some(Key::from("A-7")));
    assert_eq!(Deep { order: order() }.key(), Some(Key::from("2")));
    assert_eq!(Tuple(1, 42).key(), Some(Key::from("42")));
    assert_eq!(Keyword { r#type: 'x' }.key(), Some(Key::from("x")));
    assert_eq!(Unit.key(), None);
    assert_eq!(FromMacro { id: 3 }.key(), Some(Key::from("3")));
    assert_eq!(InMacro { id: 4 }.key(), Some(Key::from("4")));
}
