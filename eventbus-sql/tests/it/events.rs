//! What the services of these tests tell each other.

use eventbus_core::{Event, Json, Key, Result, Topic, unknown_version};
use serde::{Deserialize, Serialize};

macro_rules! event {
    ($name:ident on $topic:literal by $key:expr) => {
        #[derive(Clone, Serialize, Deserialize)]
        pub(crate) struct $name {
            pub(crate) number: i64,
        }

        impl Event for $name {
            const TYPE: &'static str = stringify!($name);
            const TOPIC: Topic = Topic::from_static($topic);
            const VERSION: u32 = 1;
            type Codec = Json;

            fn key(&self) -> Option<Key> {
                let key: fn(i64) -> Option<Key> = $key;
                key(self.number)
            }

            fn upcast(version: u32, _: &[u8]) -> Result<Self> {
                Err(unknown_version::<Self>(version))
            }
        }
    };
}

event!(OrderPlaced on "order-events" by |number| Some(Key::display(number)));
event!(StockReserved on "stock-events" by |number| Some(Key::display(number)));
event!(MailWanted on "mail" by |_| None);
event!(Counted on "counted" by |number| Some(Key::display(number % 7)));
