//! Without `crate`, the SDK is found at `::eventbus`, whatever the names around the struct mean.
#![deny(warnings, missing_docs, unused_qualifications)]

extern crate eventbus_core as eventbus;

use eventbus_macros::Event;
use serde::{Deserialize, Serialize};

/// Names that the derive uses too.
pub mod shadowed {
    use super::{Deserialize, Event, Serialize};

    mod eventbus {}
    /// Not core's.
    pub struct Key;
    /// Not core's.
    pub struct Option;
    /// Not core's.
    pub struct Result;

    /// An order is there.
    #[derive(Event, Serialize, Deserialize)]
    #[event(type = "OrderCreated", topic = "order-events", key = "order_id")]
    pub struct OrderCreated {
        /// Its number.
        pub order_id: u64,
    }
}

fn main() {
    use eventbus::Event as _;

    let order = shadowed::OrderCreated { order_id: 7 };
    assert_eq!(order.key(), Some(eventbus::Key::from("7")));
}
