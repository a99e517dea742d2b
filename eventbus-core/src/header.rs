//! The names of all headers the SDK writes, and one pass over a message that finds them.

use crate::event::is_same;
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
/// When it was to be published at the earliest, RFC 3339: until then it waits in a schedule.
pub const NOT_BEFORE: &str = "eb-not-before";
/// The only group that is to handle it: set by a re-drive.
pub const TO_GROUP: &str = "eb-to-group";
/// How often it was re-driven from the dead letters.
pub const REDRIVES: &str = "eb-redrives";
/// The dead letter whose event was changed to be this one.
pub const EDITED_FROM: &str = "eb-edited-from";
/// How many headers of a foreign message an adapter had to leave out, because their names are none
/// of 1 to 255 bytes of text.
pub const HEADERS_LEFT_OUT: &str = "eb-headers-left-out";
/// The media type of the data.
pub const CONTENT_TYPE: &str = "content-type";
/// W3C trace context.
pub const TRACEPARENT: &str = "traceparent";
/// W3C trace context.
pub const TRACESTATE: &str = "tracestate";

/// Headers of dead letters begin with this; see `dead_letter.rs`.
pub const DEAD_LETTER_PREFIX: &str = "eb-dlq-";

/// Where the data stand in a payload that is a document around them, such as `213-260`: saves
/// reading the document. It is checked before it is trusted.
pub const DATA: &str = "eb-data";

/// The headers the SDK knows, found in one pass; read as text only when asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct KnownHeaders<'m> {
    values: [Option<&'m [u8]>; NAMES.len()],
}

/// Every header there is a getter for.
const NAMES: [&str; 16] = [
    FORMAT,
    ID,
    TYPE,
    VERSION,
    TIME,
    SOURCE,
    CORRELATION_ID,
    CAUSATION_ID,
    METADATA,
    EXPIRES_AT,
    TO_GROUP,
    REDRIVES,
    DATA,
    CONTENT_TYPE,
    TRACEPARENT,
    TRACESTATE,
];

/// The place of a name in [`NAMES`], found when this is compiled.
const fn place(name: &str) -> usize {
    let mut index = 0;
    while index < NAMES.len() {
        if is_same(NAMES[index], name) {
            return index;
        }
        index += 1;
    }
    panic!("not a known header")
}

/// The place of a name that is on a message.
#[inline]
fn place_of(name: &[u8]) -> Option<usize> {
    // Among names of its length, each compared as a whole: a match on the bytes alone would look at
    // them one by one.
    Some(match name.len() {
        5 if name == b"eb-id" => const { place(ID) },
        7 if name == b"eb-type" => const { place(TYPE) },
        7 if name == b"eb-time" => const { place(TIME) },
        7 if name == b"eb-data" => const { place(DATA) },
        9 if name == b"eb-format" => const { place(FORMAT) },
        9 if name == b"eb-source" => const { place(SOURCE) },
        10 if name == b"eb-version" => const { place(VERSION) },
        10 if name == b"tracestate" => const { place(TRACESTATE) },
        11 if name == b"eb-metadata" => const { place(METADATA) },
        11 if name == b"eb-to-group" => const { place(TO_GROUP) },
        11 if name == b"eb-redrives" => const { place(REDRIVES) },
        11 if name == b"traceparent" => const { place(TRACEPARENT) },
        12 if name == b"content-type" => const { place(CONTENT_TYPE) },
        13 if name == b"eb-expires-at" => const { place(EXPIRES_AT) },
        15 if name == b"eb-causation-id" => const { place(CAUSATION_ID) },
        17 if name == b"eb-correlation-id" => const { place(CORRELATION_ID) },
        _ => return None,
    })
}

macro_rules! getters {
    ($($getter:ident $name:ident,)*) => {
        impl<'m> KnownHeaders<'m> {
            $(
                #[doc = concat!("[`", stringify!($name), "`], if it is there and text.")]
                #[inline]
                pub fn $getter(&self) -> Option<&'m str> {
                    self.text(const { place($name) })
                }
            )*
        }
    };
}

getters! {
    format FORMAT,
    id ID,
    event_type TYPE,
    version VERSION,
    time TIME,
    source SOURCE,
    correlation_id CORRELATION_ID,
    causation_id CAUSATION_ID,
    metadata METADATA,
    expires_at EXPIRES_AT,
    to_group TO_GROUP,
    redrives REDRIVES,
    data DATA,
    content_type CONTENT_TYPE,
    traceparent TRACEPARENT,
    tracestate TRACESTATE,
}

impl<'m> KnownHeaders<'m> {
    /// Finds them; of repeated ones the last counts.
    pub fn of(headers: &'m Headers) -> Self {
        let mut known = Self::default();
        for (name, value) in headers.iter_bytes() {
            if let Some(place) = place_of(name) {
                known.values[place] = Some(value);
            }
        }
        known
    }

    #[inline]
    fn text(&self, place: usize) -> Option<&'m str> {
        std::str::from_utf8(self.values[place]?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_header_is_found_by_its_getter() {
        for (index, name) in NAMES.iter().enumerate() {
            assert_eq!(place_of(name.as_bytes()), Some(index), "{name}");
        }
        assert_eq!(place_of(b"eb-unknown"), None);
    }

    #[test]
    fn the_last_of_repeated_headers_counts_and_bytes_are_no_text() {
        let headers = Headers::builder()
            .push(ID, "first")
            .and_then(|builder| builder.push(ID, "second"))
            .and_then(|builder| builder.push(TYPE, [0xff]))
            .expect("within limits")
            .build();
        let known = KnownHeaders::of(&headers);
        assert_eq!(known.id(), Some("second"));
        assert_eq!(known.event_type(), None);
        assert_eq!(known.version(), None);
    }
}
