//! The data with one more member `event_type`: what services without an envelope exchange.

use std::borrow::Cow;
use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{
    Format, Reading, cloud_events, envelope_from_headers, envelope_headers, pack, require_json,
};
use crate::clock::Timestamp;
use crate::envelope::{Envelope, EventId, parse_version};
use crate::error::{Error, ErrorKind, Result};
use crate::header::KnownHeaders;
use crate::message::{Headers, Message};

/// `{"event_type":"OrderCreated","order_id":123,"amount":250}`.
///
/// The version is that of the header `eb-version`, or of a member `event_version` (`2`, `"2"` or `"v2"`),
/// or 1.
///
/// Reading needs no headers, unless the event has members `eventType` and `data` of its own, which
/// are an envelope's: a message without an id gets one from its place in the topic, where the broker
/// has positions. Writing adds the envelope as headers, which foreign readers ignore.
#[derive(Clone, Copy, Debug, Default)]
#[allow(clippy::exhaustive_structs, reason = "it has nothing to add")]
pub struct FlatFormat;

const NAME: &str = "flat";

#[derive(Deserialize)]
struct Type<'a> {
    #[serde(borrow)]
    event_type: Cow<'a, str>,
    #[serde(default)]
    event_version: Option<serde_json::Value>,
}

impl Type<'_> {
    fn version(&self) -> Result<u32> {
        match &self.event_version {
            None => Ok(1),
            Some(serde_json::Value::String(text)) => parse_version(text),
            Some(other) => parse_version(&other.to_string()),
        }
    }
}

impl Format for FlatFormat {
    fn name(&self) -> &'static str {
        NAME
    }

    fn write(
        &self,
        envelope: &Envelope,
        content_type: &str,
        data: &[u8],
    ) -> Result<(Headers, Bytes)> {
        require_json(NAME, content_type)?;
        let refuse = || {
            Error::new(
                ErrorKind::InvalidInput,
                "write event",
                "the flat format takes an object: give the event named fields",
            )
            .with("type", &envelope.event_type)
        };
        let members = data.strip_prefix(b"{").ok_or_else(refuse)?;
        let time = envelope.time.to_string();
        let headers = pack(envelope_headers(NAME, envelope, &time, None, content_type)?);
        if names_event_type(data) {
            let own: Option<Type<'_>> = serde_json::from_slice(data).ok();
            if own.is_none_or(|own| own.event_type != envelope.event_type) {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "write event",
                    "the flat format says the type in a member `event_type`: give the event's own field another name",
                )
                .with("type", &envelope.event_type));
            }
            // It says so itself; a second member of the name nobody could read.
            return Ok((headers, Bytes::copy_from_slice(data)));
        }
        let event_type = serde_json::to_string(&envelope.event_type).map_err(|_| refuse())?;
        let mut payload = Vec::with_capacity(data.len() + event_type.len() + 16);
        payload.extend_from_slice(b"{\"event_type\":");
        payload.extend_from_slice(event_type.as_bytes());
        if !members.trim_ascii_start().starts_with(b"}") {
            payload.push(b',');
        }
        payload.extend_from_slice(members);
        Ok((headers, Bytes::from(payload)))
    }

    fn read<'m>(
        &self,
        message: &'m Message,
        known: &KnownHeaders<'m>,
    ) -> Result<Option<Reading<'m>>> {
        if known.format().is_some_and(|format| format != NAME) {
            return Ok(None);
        }
        let version = known.version().map(parse_version).transpose()?;
        if known.format().is_some()
            && let Some(event_type) = known.event_type()
        {
            return Ok(Some(Reading::new(
                event_type,
                version.unwrap_or(1),
                message.payload.clone(),
            )));
        }
        if known.format().is_none() && cloud_events::mode_of(message).is_some() {
            return Ok(None);
        }
        match serde_json::from_slice::<Type<'m>>(&message.payload) {
            Ok(body) => {
                let version = version.map_or_else(|| body.version(), Ok)?;
                let payload = message.payload.clone();
                Ok(Some(Reading::new(body.event_type, version, payload)))
            }
            Err(error) if known.format().is_some() => Err(Error::new(
                ErrorKind::Codec,
                "read flat event",
                "the body is not a JSON object with an event_type",
            )
            .with_source(error)),
            Err(_) => Ok(None),
        }
    }

    fn envelope(
        &self,
        message: &Message,
        known: &KnownHeaders<'_>,
        fallback: (EventId, Timestamp),
    ) -> Result<Envelope> {
        if let Some(envelope) = envelope_from_headers(known, fallback.1)? {
            return Ok(envelope);
        }
        let (event_type, version) = match self.read(message, known)? {
            Some(reading) => (reading.event_type.into_owned(), reading.version),
            None => (String::new(), 1),
        };
        Ok(Envelope::new(fallback.0, event_type, version, fallback.1))
    }
}

/// Whether the data have a member of the name that the format adds.
fn names_event_type(data: &[u8]) -> bool {
    const NAME: &[u8] = br#""event_type""#;
    // Parsed only when the name may stand in it: as it is, or with letters that are escaped.
    let may_stand = data.windows(NAME.len()).any(|part| part == NAME)
        || data.windows(2).any(|part| part == br"\u");
    let members = || serde_json::from_slice::<BTreeMap<Cow<'_, str>, IgnoredAny>>(data);
    may_stand && members().is_ok_and(|members| members.contains_key("event_type"))
}
