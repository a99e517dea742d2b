//! Data of every older version are read, one step after another; newer ones are refused.

use eventbus_core::{ErrorKind, Event as _, Result, read_event};
use eventbus_macros::Event;
use serde::{Deserialize, Serialize};

mod v1 {
    use super::{Deserialize, Event, Serialize};

    #[derive(Event, Serialize, Deserialize)]
    #[event(type = "OrderCreated", topic = "order-events", crate = "eventbus_core")]
    pub struct OrderCreated {
        pub amount: u64,
    }
}

mod v2 {
    use super::{Deserialize, Event, Serialize, v1};

    #[derive(Event, Serialize, Deserialize)]
    #[event(type = "OrderCreated", topic = "order-events", crate = "eventbus_core")]
    #[event(version = 2, from = "v1::OrderCreated")]
    pub struct OrderCreated {
        pub amount: u64,
        pub currency: String,
    }

    impl From<v1::OrderCreated> for OrderCreated {
        fn from(before: v1::OrderCreated) -> Self {
            Self {
                amount: before.amount,
                currency: "EUR".to_owned(),
            }
        }
    }
}

#[derive(Debug, PartialEq, Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", crate = "eventbus_core")]
#[event(version = 3, from = "v2::OrderCreated")]
struct OrderCreated {
    total: String,
}

impl From<v2::OrderCreated> for OrderCreated {
    fn from(before: v2::OrderCreated) -> Self {
        Self {
            total: format!("{} {}", before.amount, before.currency),
        }
    }
}

fn total(version: u32, data: &str) -> Result<String> {
    read_event::<OrderCreated>(version, data.as_bytes()).map(|order| order.total)
}

fn main() -> Result<()> {
    assert_eq!(OrderCreated::VERSION, 3);
    assert_eq!(total(1, r#"{"amount":250}"#)?, "250 EUR");
    assert_eq!(total(2, r#"{"amount":250,"currency":"USD"}"#)?, "250 USD");
    assert_eq!(total(3, r#"{"total":"250 GBP"}"#)?, "250 GBP");
    for unknown in [0, 4] {
        let error = total(unknown, r#"{"total":"250 GBP"}"#).expect_err("no such version");
        assert_eq!(error.kind(), ErrorKind::Codec);
    }
    Ok(())
}
