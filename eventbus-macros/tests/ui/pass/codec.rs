//! A codec of one's own needs no serde.

use eventbus_core::{Codec, Event as _, Result, read_event};
use eventbus_macros::Event;

mod codecs {
    use super::{Codec, Ping, Result};

    #[derive(Debug)]
    pub struct Bytes;

    impl Codec<Ping> for Bytes {
        const CONTENT_TYPE: &'static str = "application/octet-stream";

        fn encode(event: &Ping) -> Result<Vec<u8>> {
            Ok(event.0.clone())
        }

        fn decode(data: &[u8]) -> Result<Ping> {
            Ok(Ping(data.to_vec()))
        }
    }
}

#[derive(Event)]
#[event(
    type = "Ping",
    topic = "pings",
    codec = "codecs::Bytes",
    crate = "eventbus_core"
)]
pub struct Ping(Vec<u8>);

fn main() -> Result<()> {
    assert_eq!(Ping(vec![7]).key(), None);
    assert_eq!(read_event::<Ping>(1, &[1, 2])?.0, [1, 2]);
    Ok(())
}
