//! What is known about an event apart from its data, and how an id is derived from a cause.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

use crate::clock::Timestamp;
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Group, Key, Topic};

/// The identity of an event: a UUID, or the text a foreign publisher gave.
///
/// # Examples
///
/// ```
/// use eventbus_core::EventId;
///
/// let id = EventId::new();
/// assert_eq!(EventId::parse(&id.to_string())?, id);
/// assert_eq!(EventId::parse("order-42")?.to_string(), "order-42");
/// # Ok::<(), eventbus_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventId(IdText);

#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum IdText {
    Uuid(Uuid),
    Text(Arc<str>),
}

/// The namespace of derived ids (UUID version 5, RFC 9562).
const DERIVED: Uuid = Uuid::from_u128(0x6576_656e_7462_7573_8000_6465_7269_7665);
const ID_LENGTH_MAX: usize = 255;
/// Bytes of a UUID as it is written.
pub(crate) const UUID_LENGTH: usize = uuid::fmt::Hyphenated::LENGTH;

impl EventId {
    /// A new id: UUID version 7, later ids sort later.
    #[allow(clippy::new_without_default, reason = "each call makes another one")]
    #[must_use]
    pub fn new() -> Self {
        Self(IdText::Uuid(Uuid::now_v7()))
    }

    /// Reads an id: a UUID in any of its usual forms, or up to 255 bytes of other text.
    ///
    /// # Errors
    ///
    /// `Codec` when the text is empty or too long.
    pub fn parse(text: &str) -> Result<Self> {
        // Only the canonical form of a UUID, so that what is read is written back unchanged.
        if text.len() == UUID_LENGTH
            && !text.bytes().any(|byte| byte.is_ascii_uppercase())
            && let Ok(uuid) = Uuid::try_parse(text)
        {
            return Ok(Self(IdText::Uuid(uuid)));
        }
        if text.is_empty() || text.len() > ID_LENGTH_MAX {
            return Err(Error::new(
                ErrorKind::Codec,
                "read event id",
                "an id has 1 to 255 bytes",
            )
            .with("bytes", text.len()));
        }
        Ok(Self(IdText::Text(Arc::from(text))))
    }

    /// The id made from a name: the same name gives the same id.
    ///
    /// For events that a client may ask for twice, such as under an HTTP `Idempotency-Key`.
    #[must_use]
    pub fn from_name(name: &str) -> Self {
        Self::hashed(&[b"name", name.as_bytes()])
    }

    /// The id of an event that a handler publishes.
    ///
    /// Handling `cause` again publishes the same ids again, so every duplicate downstream can be
    /// recognised. `ordinal` counts events of the same type and key published for one cause.
    #[must_use]
    pub fn derived(
        cause: &EventId,
        group: &Group,
        event_type: &str,
        key: Option<&Key>,
        ordinal: u32,
    ) -> Self {
        let cause = cause.to_string();
        let (keyed, key): (&[u8], &[u8]) = match key {
            Some(key) => (b"k", key.as_bytes()),
            None => (b"-", b""),
        };
        Self::hashed(&[
            b"caused",
            cause.as_bytes(),
            group.as_str().as_bytes(),
            event_type.as_bytes(),
            keyed,
            key,
            &ordinal.to_be_bytes(),
        ])
    }

    /// As it is shown, written into `buffer` unless it is there already.
    pub(crate) fn text<'t>(&'t self, buffer: &'t mut [u8; UUID_LENGTH]) -> &'t str {
        match &self.0 {
            IdText::Uuid(uuid) => uuid.hyphenated().encode_lower(buffer),
            IdText::Text(text) => text,
        }
    }

    /// The id of a message that carries none: the same place in a topic gives the same id.
    pub(crate) fn of_place(topic: &Topic, partition: u32, position: u128) -> Self {
        Self::hashed(&[
            b"place",
            topic.as_str().as_bytes(),
            &partition.to_be_bytes(),
            &position.to_be_bytes(),
        ])
    }

    /// The id of an event whose publisher makes ids unique per source: both of them, as text where
    /// that can be told apart and is short enough.
    pub(crate) fn of_source(source: &str, id: &str) -> Self {
        let is_short = source.len() + 1 + id.len() <= ID_LENGTH_MAX;
        match is_short && !source.contains(' ') {
            true => Self(IdText::Text(Arc::from(format!("{source} {id}")))),
            false => Self::hashed(&[b"source", source.as_bytes(), id.as_bytes()]),
        }
    }

    /// Hashes fields, each with its length, so that no two lists of fields run together.
    fn hashed(fields: &[&[u8]]) -> Self {
        let mut bytes = Vec::with_capacity(fields.iter().map(|field| field.len() + 4).sum());
        for field in fields {
            // Fields are names, keys and numbers: far below 4 GiB.
            bytes.extend_from_slice(&(field.len() as u32).to_be_bytes());
            bytes.extend_from_slice(field);
        }
        Self(IdText::Uuid(Uuid::new_v5(&DERIVED, &bytes)))
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text(&mut [0; UUID_LENGTH]))
    }
}

impl fmt::Debug for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Uuid> for EventId {
    fn from(uuid: Uuid) -> Self {
        Self(IdText::Uuid(uuid))
    }
}

impl Serialize for EventId {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for EventId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// Names and texts that travel along a flow, such as `userId`, `sessionId` or `tenant`.
pub type Metadata = BTreeMap<String, String>;

/// What is known about an event apart from its data.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Envelope {
    /// The event's identity.
    pub id: EventId,
    /// Its type, such as `OrderCreated`.
    pub event_type: String,
    /// The version of its data: 1 is written `v1`.
    pub version: u32,
    /// When it happened.
    pub time: Timestamp,
    /// The service that published it.
    pub source: String,
    /// What is constant along a flow; a first event's own id.
    pub correlation_id: String,
    /// The id of the event that caused it.
    pub causation_id: Option<String>,
    /// What travels along.
    pub metadata: Metadata,
}

impl Envelope {
    /// The envelope of a first event: it correlates with itself and has no cause.
    #[must_use]
    pub fn new(id: EventId, event_type: impl Into<String>, version: u32, time: Timestamp) -> Self {
        Self {
            correlation_id: id.to_string(),
            id,
            event_type: event_type.into(),
            version,
            time,
            source: String::new(),
            causation_id: None,
            metadata: Metadata::new(),
        }
    }
}

/// Reads a version as it is written on the wire: `v2` or `2`.
pub(crate) fn parse_version(text: &str) -> Result<u32> {
    let digits = text.strip_prefix('v').unwrap_or(text);
    digits.parse().map_err(|error| {
        Error::new(
            ErrorKind::Codec,
            "read version",
            "a version is a number such as v1",
        )
        .with("version", format_args!("{text:?}"))
        .with_source(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_ids_differ_in_every_part() {
        let cause = EventId::new();
        let group = Group::from_static("payments");
        let key = Key::from("1");
        let base = EventId::derived(&cause, &group, "Paid", Some(&key), 0);
        assert_eq!(
            base,
            EventId::derived(&cause, &group, "Paid", Some(&key), 0)
        );
        let others = [
            EventId::derived(&EventId::new(), &group, "Paid", Some(&key), 0),
            EventId::derived(
                &cause,
                &Group::from_static("payment"),
                "sPaid",
                Some(&key),
                0,
            ),
            EventId::derived(&cause, &group, "Paid1", Some(&Key::from("")), 0),
            EventId::derived(&cause, &group, "Paid", None, 0),
            EventId::derived(&cause, &group, "Paid", Some(&key), 1),
        ];
        for other in others {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn an_id_is_written_as_it_was_read() {
        for text in [
            "0192f1c4-0000-7000-8000-000000000000",
            "0192F1C4-0000-7000-8000-000000000000",
            "{0192f1c4-0000-7000-8000-000000000000}",
            "order 42",
        ] {
            assert_eq!(EventId::parse(text).expect("an id").to_string(), text);
        }
        assert!(EventId::parse("").is_err());
        assert!(EventId::parse(&"x".repeat(256)).is_err());
    }

    #[test]
    fn versions_are_read_with_and_without_the_letter() {
        assert_eq!(parse_version("v12").expect("a version"), 12);
        assert_eq!(parse_version("3").expect("a version"), 3);
        assert!(parse_version("one").is_err());
        assert!(parse_version("v-1").is_err());
    }
}
