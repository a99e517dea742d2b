//! The events of a run: each says which message it is, and carries a text that tells a change.

use eventbus_core::{Event, Json, Key, Message, Result, Topic, unknown_version};
use eventbus_verify::{Stamp, crc32c};
use serde::{Deserialize, Serialize};

/// The run, in the ids of messages: one ledger, one run.
pub(crate) const RUN: eventbus_verify::RunId = eventbus_verify::RunId(1);

/// Where producers publish.
pub(crate) const WORK: Topic = Topic::from_static("work");
/// Where handlers publish.
pub(crate) const FOLLOWED: Topic = Topic::from_static("followed");

/// A numbered event: of a producer, or of a handler where `FOLLOWS`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Numbered<const FOLLOWS: bool> {
    producer: u16,
    key: u32,
    key_seq: u32,
    text: String,
}

impl<const FOLLOWS: bool> Numbered<FOLLOWS> {
    pub(crate) fn of(stamp: Stamp) -> Self {
        Self {
            producer: stamp.producer,
            key: stamp.key,
            key_seq: stamp.key_seq,
            text: text_of(stamp),
        }
    }

    pub(crate) fn stamp(&self) -> Stamp {
        Stamp::new(self.producer, self.key, self.key_seq)
    }

    /// That of the text as it came.
    pub(crate) fn checksum(&self) -> u32 {
        crc32c(self.text.as_bytes())
    }
}

fn text_of(stamp: Stamp) -> String {
    format!("the text of {stamp}")
}

/// The checksum that a message of this stamp has.
pub(crate) fn checksum_of(stamp: Stamp) -> u32 {
    crc32c(text_of(stamp).as_bytes())
}

impl<const FOLLOWS: bool> Event for Numbered<FOLLOWS> {
    const TYPE: &'static str = if FOLLOWS { "Followed" } else { "Work" };
    const TOPIC: Topic = if FOLLOWS { FOLLOWED } else { WORK };
    const VERSION: u32 = 1;
    type Codec = Json;

    fn key(&self) -> Option<Key> {
        // Producers have keys of their own: their calls have no order between them.
        Some(Key::display(format_args!("{}-{}", self.producer, self.key)))
    }

    fn upcast(version: u32, _: &[u8]) -> Result<Self> {
        Err(unknown_version::<Self>(version))
    }
}

/// Which message it is, and the checksum of its text; none where it is none of a run.
pub(crate) fn read(message: &Message) -> Option<(Stamp, u32)> {
    #[derive(Deserialize)]
    struct Envelope {
        data: Numbered<false>,
    }
    let Envelope { data } = serde_json::from_slice(&message.payload).ok()?;
    Some((data.stamp(), data.checksum()))
}
