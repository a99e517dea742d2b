//! The names of all headers the SDK writes, and one pass over a message that finds them.

use crate::message::Headers;

/// How the payload is laid out, such as `envelope`.
pub const FORMAT: &str = "eb-format";
/// The event's id.
pub const ID: &str = "eb-id";
/// The event's type.
pub const TYPE: &str = "eb-type";
/// The version of the event's data, a number.
pub const VERSION: &str = "eb-version";
/// When the event happened, RFC 3339.
pub const TIME: &str = "eb-time";
/// The service that published it.
pub const SOURCE: &str = "eb-source";
/// What is constant along a flow.
pub const CORRELATION_ID: &str = "eb-correlation-id";
/// The id of the event that caused it.
pub const CAUSATION_ID: &str = "eb-causation-id";
/// Metadata as one JSON object of strings.
pub const METADATA: &str = "eb-metadata";
/// After this time, RFC 3339, it is not handled any more.
pub const EXPIRES_AT: &str = "eb-expires-at";
/// The only group that is to handle it: set by a re-drive.
pub const TO_GROUP: &str = "eb-to-group";
/// How often it was re-driven from the dead letters.
pub const REDRIVES: &str = "eb-redrives";
/// The media type of the data.
pub const CONTENT_TYPE: &str = "content-type";
/// W3C trace context.
pub const TRACEPARENT: &str = "traceparent";
/// W3C trace context.
pub const TRACESTATE: &str = "tracestate";

/// Headers of dead letters begin with this; see `dead_letter.rs`.
pub const DEAD_LETTER_PREFIX: &str = "eb-dlq-";

/// The headers the SDK knows, found in one pass.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct KnownHeaders<'m> {
    /// [`FORMAT`].
    pub format: Option<&'m str>,
    /// [`ID`].
    pub id: Option<&'m str>,
    /// [`TYPE`].
    pub event_type: Option<&'m str>,
    /// [`VERSION`].
    pub version: Option<&'m str>,
    /// [`TIME`].
    pub time: Option<&'m str>,
    /// [`SOURCE`].
    pub source: Option<&'m str>,
    /// [`CORRELATION_ID`].
    pub correlation_id: Option<&'m str>,
    /// [`CAUSATION_ID`].
    pub causation_id: Option<&'m str>,
    /// [`METADATA`].
    pub metadata: Option<&'m str>,
    /// [`EXPIRES_AT`].
    pub expires_at: Option<&'m str>,
    /// [`TO_GROUP`].
    pub to_group: Option<&'m str>,
    /// [`REDRIVES`].
    pub redrives: Option<&'m str>,
    /// [`CONTENT_TYPE`].
    pub content_type: Option<&'m str>,
    /// [`TRACEPARENT`].
    pub traceparent: Option<&'m str>,
    /// [`TRACESTATE`].
    pub tracestate: Option<&'m str>,
}

impl<'m> KnownHeaders<'m> {
    /// Finds them; of repeated ones the last counts, and one that is not text is not there.
    pub fn of(headers: &'m Headers) -> Self {
        let mut known = Self::default();
        for (name, value) in headers.iter() {
            let place = match name {
                FORMAT => &mut known.format,
                ID => &mut known.id,
                TYPE => &mut known.event_type,
                VERSION => &mut known.version,
                TIME => &mut known.time,
                SOURCE => &mut known.source,
                CORRELATION_ID => &mut known.correlation_id,
                CAUSATION_ID => &mut known.causation_id,
                METADATA => &mut known.metadata,
                EXPIRES_AT => &mut known.expires_at,
                TO_GROUP => &mut known.to_group,
                REDRIVES => &mut known.redrives,
                CONTENT_TYPE => &mut known.content_type,
                TRACEPARENT => &mut known.traceparent,
                TRACESTATE => &mut known.tracestate,
                _ => continue,
            };
            *place = std::str::from_utf8(value).ok();
        }
        known
    }
}
