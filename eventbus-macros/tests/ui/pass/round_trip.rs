//! Type, topic and version are constants; data survive the codec; without a key there is no order.

use eventbus_core::{Codec, ErrorKind, Event as _, Result, read_event};
use eventbus_macros::Event;
use serde::{Deserialize, Serialize};

#[derive(Debug, PartialEq, Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", crate = "eventbus_core")]
struct OrderCreated {
    order_id: u64,
    amount: u64,
}

type CodecOf<E> = <E as eventbus_core::Event>::Codec;

fn main() -> Result<()> {
    assert_eq!(OrderCreated::TYPE, "OrderCreated");
    assert_eq!(OrderCreated::TOPIC.as_str(), "order-events");
    assert_eq!(OrderCreated::VERSION, 1);

    let order = OrderCreated {
        order_id: 123,
        amount: 250,
    };
    assert_eq!(order.key(), None);
    let data = CodecOf::<OrderCreated>::encode(&order)?;
    assert_eq!(data, br#"{"order_id":123,"amount":250}"#);
    assert_eq!(read_event::<OrderCreated>(1, &data)?, order);

    let newer = read_event::<OrderCreated>(2, &data).expect_err("no such version");
    assert_eq!(newer.kind(), ErrorKind::Codec);
    Ok(())
}
