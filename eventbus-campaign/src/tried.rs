//! The event that is published over and over, and how it is made of a message of the ledger.

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use eventbus::prelude::{Event, EventId, Outgoing, Topic};
use eventbus_verify::{Entry, MessageId, Operation, Payload, PayloadError, RunId, Stamp};
use serde::{Deserialize, Serialize};

/// The topic on which everything is tried.
pub const TOPIC: Topic = Tried::TOPIC;

/// Whose messages are only there to ask whether messages pass.
pub const PROBER: u16 = 1;

/// A message of the ledger as an event.
#[derive(Clone, Debug, Deserialize, Event, Serialize)]
#[event(type = "Tried", topic = "tried", key = "key")]
pub struct Tried {
    /// The key of its stamp.
    pub key: u32,
    /// A [`Payload`] in Base64.
    pub payload: String,
}

impl Tried {
    /// Reads whose message it is.
    ///
    /// # Errors
    ///
    /// What is wrong with the payload; bytes that are no Base64 are no payload either.
    pub fn read(&self, run: RunId) -> Result<Payload, PayloadError> {
        let bytes = STANDARD_NO_PAD.decode(&self.payload).unwrap_or_default();
        Payload::decode_of(run, &bytes)
    }
}

/// A message that is to be published, as often as it takes.
#[derive(Clone, Debug)]
pub struct Draft {
    /// Which one it is.
    pub stamp: Stamp,
    event: Tried,
    id: EventId,
    checksum: u32,
}

impl Draft {
    /// Writes the message of a stamp, with so many bytes of payload.
    #[must_use]
    pub fn new(run: RunId, stamp: Stamp, bytes: usize) -> Self {
        let (payload, checksum) = Payload::encode(run, stamp, bytes);
        let id = EventId::parse(&stamp.id(run).to_string());
        Self {
            stamp,
            event: Tried {
                key: stamp.key,
                payload: STANDARD_NO_PAD.encode(payload),
            },
            id: id.expect("a UUID is an id"),
            checksum,
        }
    }

    /// What the ledger says of it.
    #[must_use]
    pub fn entry(&self, operation: Operation) -> Entry {
        Entry::of(operation, self.stamp).with_checksum(self.checksum)
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &EventId {
        &self.id
    }

    /// The event, ready to be published.
    #[must_use]
    pub fn outgoing(&self) -> Outgoing<Tried> {
        Outgoing::new(self.event.clone()).with_id(self.id.clone())
    }
}

/// The id of a message, read from its text.
///
/// # Errors
///
/// When it is no UUID.
pub fn message_id(text: &str) -> anyhow::Result<MessageId> {
    let digits: String = text.chars().filter(|one| *one != '-').collect();
    let bits = u128::from_str_radix(&digits, 16);
    let bits = bits.with_context(|| format!("{text:?} is no UUID"))?;
    Ok(MessageId::from_u128(bits))
}

#[cfg(test)]
mod tests {
    use super::{Draft, message_id};
    use eventbus_verify::{RunId, Stamp};

    #[test]
    fn an_event_says_whose_it_is() {
        let (run, stamp) = (RunId(7), Stamp::new(1, 2, 3));
        let draft = Draft::new(run, stamp, 100);
        assert_eq!(draft.event.read(run).expect("it is whole").stamp, stamp);
        assert!(draft.event.read(RunId(8)).is_err());
        let id = message_id(&draft.id().to_string()).expect("a UUID");
        assert_eq!(id, stamp.id(run));
    }
}
