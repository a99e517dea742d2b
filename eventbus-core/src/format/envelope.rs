//! The default format: one JSON document around the data, the ids again in headers.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use super::{
    Format, Reading, cloud_events, envelope_from_headers, envelope_headers, member, pack,
    require_json,
};
use crate::chunk;
use crate::clock::{RFC_3339_MAX, Timestamp};
use crate::envelope::{Envelope, EventId, UUID_LENGTH, parse_version};
use crate::error::{Error, ErrorKind, Result};
use crate::header::KnownHeaders;
use crate::message::{Headers, Message};

/// `{"eventId", "eventType", "eventVersion": "v1", "timestamp", "source", "correlationId",
/// "causationId", "data", "metadata"}`: readable by whoever reads JSON.
#[derive(Clone, Copy, Debug, Default)]
#[allow(clippy::exhaustive_structs, reason = "it has nothing to add")]
pub struct EnvelopeFormat;

const NAME: &str = "envelope";
const BEFORE_DATA: &[u8] = b",\"data\":";
const BEHIND_DATA: &[u8] = b",\"metadata\":";

/// Written as what it shows, without a text in between.
struct Text<T>(T);

impl<T: fmt::Display> Serialize for Text<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

/// The document as it is read: only `data` has to be there when headers give the rest.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    #[serde(borrow)]
    event_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    event_type: Option<Cow<'a, str>>,
    #[serde(borrow)]
    event_version: Option<Version<'a>>,
    #[serde(borrow)]
    timestamp: Option<Cow<'a, str>>,
    #[serde(borrow)]
    source: Option<Cow<'a, str>>,
    #[serde(borrow)]
    correlation_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    causation_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    metadata: Option<BTreeMap<String, &'a RawValue>>,
    #[serde(borrow, default, deserialize_with = "present")]
    data: Option<&'a RawValue>,
}

/// What is there, also where it is `null`: the data of an event without fields are.
fn present<'de, D: Deserializer<'de>>(from: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(from).map(Some)
}

#[derive(Deserialize)]
struct DataOnly<'a> {
    #[serde(borrow)]
    data: &'a RawValue,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Version<'a> {
    Number(u32),
    #[serde(borrow)]
    Text(Cow<'a, str>),
}

impl Version<'_> {
    fn number(&self) -> Result<u32> {
        match self {
            Self::Number(number) => Ok(*number),
            Self::Text(text) => parse_version(text),
        }
    }
}

impl Format for EnvelopeFormat {
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
        let mut buffer = [0; RFC_3339_MAX];
        let time = envelope.time.text(&mut buffer);
        let (mut begin, mut end) = (0, 0);
        let payload = chunk::write(320 + data.len(), |out| {
            let id = &mut [0; UUID_LENGTH];
            member(out, b"{\"eventId\":", envelope.id.text(id))?;
            member(out, b",\"eventType\":", &envelope.event_type)?;
            let version = Text(format_args!("v{}", envelope.version));
            member(out, b",\"eventVersion\":", &version)?;
            member(out, b",\"timestamp\":", &time)?;
            member(out, b",\"source\":", &envelope.source)?;
            member(out, b",\"correlationId\":", &envelope.correlation_id)?;
            member(out, b",\"causationId\":", &envelope.causation_id)?;
            // The data are JSON already: they are put in as they are instead of being parsed again.
            out.extend_from_slice(BEFORE_DATA);
            begin = out.len();
            out.extend_from_slice(data);
            end = out.len();
            member(out, BEHIND_DATA, &envelope.metadata)?;
            out.extend_from_slice(b"}");
            Ok::<_, Error>(())
        })?;
        let data_at = Some(begin..end);
        let headers = envelope_headers(NAME, envelope, &time, data_at, content_type)?;
        Ok((pack(headers), payload))
    }

    fn read<'m>(
        &self,
        message: &'m Message,
        known: &KnownHeaders<'m>,
    ) -> Result<Option<Reading<'m>>> {
        let format = known.format();
        if format.is_some_and(|format| format != NAME) {
            return Ok(None);
        }
        if format.is_some()
            && let Some(event_type) = known.event_type()
        {
            let version = known.version().map_or(Ok(1), parse_version)?;
            let data = match known
                .data()
                .and_then(|place| data_at(&message.payload, place))
            {
                Some(data) => data,
                None => {
                    let document: DataOnly<'m> = parse(&message.payload)?;
                    message.payload.slice_ref(document.data.get().as_bytes())
                }
            };
            return Ok(Some(Reading::new(event_type, version, data)));
        }
        if format.is_none() && cloud_events::mode_of(message).is_some() {
            return Ok(None);
        }
        let document: Document<'m> = match parse(&message.payload) {
            Ok(document) => document,
            Err(error) if format.is_some() => return Err(error),
            Err(_) => return Ok(None),
        };
        let (Some(event_type), Some(data)) = (document.event_type, document.data) else {
            return Ok(None);
        };
        let version = document
            .event_version
            .map_or(Ok(1), |version| version.number())?;
        let data = message.payload.slice_ref(data.get().as_bytes());
        Ok(Some(Reading::new(event_type, version, data)))
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
        let document: Document<'_> = parse(&message.payload)?;
        let id = document
            .event_id
            .map_or(Ok(fallback.0), |id| EventId::parse(&id))?;
        let time = document
            .timestamp
            .map_or(Ok(fallback.1), |time| time.parse())?;
        let version = document
            .event_version
            .map_or(Ok(1), |version| version.number())?;
        let event_type = document.event_type.unwrap_or_default();
        let mut envelope = Envelope::new(id, event_type, version, time);
        envelope.source = document.source.unwrap_or_default().into_owned();
        if let Some(correlation_id) = document.correlation_id {
            envelope.correlation_id = correlation_id.into_owned();
        }
        envelope.causation_id = document.causation_id.map(Cow::into_owned);
        envelope.metadata = document
            .metadata
            .unwrap_or_default()
            .into_iter()
            .map(|(name, value)| (name, text_of(value)))
            .collect();
        Ok(envelope)
    }
}

/// The data where the header says they are, if they stand between what `write` puts around them:
/// whoever rewrote the body may have left the header.
fn data_at(payload: &Bytes, place: &str) -> Option<Bytes> {
    let (begin, end) = place.split_once('-')?;
    let (begin, end) = (begin.parse().ok()?, end.parse().ok()?);
    let is_data = payload.get(..begin)?.ends_with(BEFORE_DATA)
        && payload.get(end..)?.starts_with(BEHIND_DATA)
        && begin <= end;
    is_data.then(|| payload.slice(begin..end))
}

/// A string as its text, anything else as its JSON: metadata of foreign publishers may be either.
fn text_of(value: &RawValue) -> String {
    serde_json::from_str(value.get()).unwrap_or_else(|_| value.get().to_owned())
}

fn parse<'m, T: Deserialize<'m>>(payload: &'m [u8]) -> Result<T> {
    serde_json::from_slice(payload).map_err(|error| {
        Error::new(
            ErrorKind::Codec,
            "read envelope",
            "the body is not a JSON envelope",
        )
        .with_source(error)
    })
}
