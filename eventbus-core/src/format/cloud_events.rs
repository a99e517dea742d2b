//! CloudEvents 1.0 as one JSON document around the data: what its SDKs call structured mode.

use std::borrow::Cow;
use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::value::RawValue;

use super::{Format, Reading, envelope_from_headers, envelope_headers, member, pack};
use crate::chunk;
use crate::clock::{RFC_3339_MAX, Timestamp};
use crate::envelope::{Envelope, EventId, parse_version};
use crate::error::{Error, Result};
use crate::header::KnownHeaders;
use crate::message::{Headers, Message};

mod attributes;
mod binary;
mod binding;

use attributes::{Attributes, describe, is_json};
pub use binary::CloudEventsBinaryFormat;
pub use binding::CloudEventsBinding;
pub(super) use binding::{Mode, mode_of};

/// `{"specversion":"1.0", "id", "source", "type", "time", …, "datacontenttype", "data"}`: what Dapr
/// and every CloudEvents SDK reads.
///
/// The envelope beyond that stands in extension attributes: `eventversion`, `correlationid`,
/// `causationid`, and a metadata entry in one of its own name where that is a legal one, such as
/// `tenant`. The others, such as `userId`, are together in `metadata`, as the text of a JSON object.
/// Data that are no JSON are written as `data_base64`.
///
/// Reading takes what anybody wrote. Attributes that are not of the envelope, such as `subject`, are
/// metadata, and are not claimed of events that follow from it. An id of somebody else that is no
/// UUID counts together with its source, because CloudEvents makes only both together unique.
#[derive(Clone, Copy, Debug, Default)]
pub struct CloudEventsFormat {
    copies: Option<CloudEventsBinding>,
}

const NAME: &str = "cloudevents";
const MEDIA_TYPE: &str = "application/cloudevents+json";
const BEFORE_DATA: &[u8] = b",\"data\":";
const BEHIND_DATA: &[u8] = b"}";

impl CloudEventsFormat {
    /// The format without copies of the attributes in headers.
    #[must_use]
    pub const fn new() -> Self {
        Self { copies: None }
    }

    /// Adds the attributes as headers, too, for readers that look at no body. A reader that takes
    /// such headers for the binary mode, as the Python SDK does on Kafka, misreads the event then.
    #[must_use]
    pub const fn with_header_copies(mut self, binding: CloudEventsBinding) -> Self {
        self.copies = Some(binding);
        self
    }
}

impl Format for CloudEventsFormat {
    fn name(&self) -> &'static str {
        NAME
    }

    fn write(
        &self,
        envelope: &Envelope,
        content_type: &str,
        data: &[u8],
    ) -> Result<(Headers, Bytes)> {
        let mut buffer = [0; RFC_3339_MAX];
        let time = envelope.time.text(&mut buffer);
        let mut data_at = None;
        let payload = chunk::write(320 + data.len(), |out| {
            out.extend_from_slice(b"{\"specversion\":\"1.0\"");
            describe(envelope, &time, |name, value| {
                out.extend_from_slice(b",\"");
                out.extend_from_slice(name.as_bytes());
                member(out, b"\":", value)
            })?;
            member(out, b",\"datacontenttype\":", content_type)?;
            if is_json(Some(content_type)) {
                out.extend_from_slice(BEFORE_DATA);
                let begin = out.len();
                out.extend_from_slice(data);
                data_at = Some(begin..out.len());
            } else {
                member(out, b",\"data_base64\":", &STANDARD.encode(data))?;
            }
            out.extend_from_slice(BEHIND_DATA);
            Ok::<_, Error>(())
        })?;
        let headers = envelope_headers(NAME, envelope, &time, data_at, MEDIA_TYPE)?;
        let headers = match self.copies {
            Some(binding) => binding.write(headers, envelope, &time)?,
            None => headers,
        };
        Ok((pack(headers), payload))
    }

    fn read<'m>(
        &self,
        message: &'m Message,
        known: &KnownHeaders<'m>,
    ) -> Result<Option<Reading<'m>>> {
        match known.format() {
            Some(NAME) => {}
            Some(_) => return Ok(None),
            None => return read_foreign(message),
        }
        let Some(event_type) = known.event_type() else {
            return Document::of(message)?.read(message).map(Some);
        };
        let version = known.version().map_or(Ok(1), parse_version)?;
        if let Some(place) = known.data()
            && let Some(data) = data_at(&message.payload, place)
        {
            return Ok(Some(Reading::new(event_type, version, data)));
        }
        let document = Document::of(message)?;
        let content_type = document.content_type()?;
        let data = document.data(message, content_type.as_deref())?;
        let reading = Reading::new(event_type, version, data);
        Ok(Some(reading.with_content_type(content_type)))
    }

    fn envelope(
        &self,
        message: &Message,
        known: &KnownHeaders<'_>,
        fallback: (EventId, Timestamp),
    ) -> Result<Envelope> {
        if known.format().is_some()
            && let Some(envelope) = envelope_from_headers(known, fallback.1)?
        {
            return Ok(envelope);
        }
        let attributes = Document::of(message)?.attributes()?;
        attributes.into_envelope(known, fallback.1)
    }
}

/// Reads what has no header of ours, if it is a CloudEvent by its content type or its body.
fn read_foreign(message: &Message) -> Result<Option<Reading<'_>>> {
    match mode_of(message) {
        Some(Mode::Structured(media_type)) => binding::require_json_format(media_type)?,
        Some(Mode::Binary) => return Ok(None),
        None => {
            // Dapr says on no broker what it is: only the body does.
            let is_one = |document: &Document<'_>| document.is_cloud_event();
            return match may_be_one(&message.payload) {
                true => Document::of(message).ok().filter(is_one),
                false => None,
            }
            .map(|document| document.read(message))
            .transpose();
        }
    }
    Document::of(message)?.read(message).map(Some)
}

/// Whether it is worth parsing.
fn may_be_one(payload: &[u8]) -> bool {
    const REQUIRED: &[u8] = b"\"specversion\"";
    payload.trim_ascii_start().starts_with(b"{")
        && payload.windows(REQUIRED.len()).any(|part| part == REQUIRED)
}

/// The members of the document, as they stand there.
struct Document<'m>(BTreeMap<String, &'m RawValue>);

impl<'m> Document<'m> {
    fn of(message: &'m Message) -> Result<Self> {
        let members = serde_json::from_slice(&message.payload).map_err(|error| {
            attributes::unreadable("the body is not a JSON object").with_source(error)
        })?;
        Ok(Self(members))
    }

    /// Whether it says so, and is not a flat event or an envelope with a member of that name.
    fn is_cloud_event(&self) -> bool {
        let has = |name| self.0.contains_key(name);
        has("specversion") && !has("event_type") && !(has("eventType") && has("data"))
    }

    fn read(&self, message: &'m Message) -> Result<Reading<'m>> {
        let attributes = self.attributes()?;
        let content_type = self.content_type()?;
        let data = self.data(message, content_type.as_deref())?;
        let reading = Reading::new(attributes.event_type, attributes.version, data);
        Ok(reading.with_content_type(content_type))
    }

    fn attributes(&self) -> Result<Attributes<'m>> {
        let are_data = ["data", "data_base64", "datacontenttype"];
        let others = self.0.iter().filter(|(name, value)| {
            // An attribute that is null is none.
            !are_data.contains(&name.as_str()) && value.get() != "null"
        });
        let mut found = Attributes::default();
        for (name, value) in others {
            let value = match text(value) {
                Some(text) => text,
                // Numbers and truth values have a form as text; of what has none, it is the JSON.
                None if !attributes::is_text(name) => Cow::Borrowed(value.get()),
                None => return Err(attributes::wrong(name, "an attribute that has to be text")),
            };
            found.add(name, value)?;
        }
        found.check()
    }

    fn content_type(&self) -> Result<Option<Cow<'m, str>>> {
        match self.0.get("datacontenttype") {
            Some(value) if value.get() != "null" => match text(value) {
                Some(text) => Ok(Some(text)),
                None => Err(attributes::wrong("datacontenttype", "it has to be text")),
            },
            _ => Ok(None),
        }
    }

    /// The data as bytes of their media type.
    fn data(&self, message: &'m Message, content_type: Option<&str>) -> Result<Bytes> {
        let encoded = self.0.get("data_base64").filter(|it| it.get() != "null");
        match (self.0.get("data"), encoded) {
            (None, None) => Ok(Bytes::new()),
            (Some(data), None) => match text(data) {
                Some(text) if !is_json(content_type) => Ok(match text {
                    Cow::Borrowed(text) => message.payload.slice_ref(text.as_bytes()),
                    Cow::Owned(text) => Bytes::from(text),
                }),
                _ => Ok(message.payload.slice_ref(data.get().as_bytes())),
            },
            (None, Some(encoded)) => {
                let decoded = text(encoded).and_then(|text| STANDARD.decode(&*text).ok());
                let is_wrong = || attributes::wrong("data_base64", "it is not base64");
                decoded.map(Bytes::from).ok_or_else(is_wrong)
            }
            (Some(_), Some(_)) => Err(attributes::unreadable(
                "the event has both data and data_base64: write one of them",
            )),
        }
    }
}

/// The value, if it is a text.
fn text(value: &RawValue) -> Option<Cow<'_, str>> {
    let text: Text<'_> = serde_json::from_str(value.get()).ok()?;
    Some(text.0)
}

/// Borrowed where nothing in it is escaped.
#[derive(serde::Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// The data where the header says they are, if they stand between what `write` puts around them:
/// whoever rewrote the body may have left the header.
fn data_at(payload: &Bytes, place: &str) -> Option<Bytes> {
    let (begin, end) = place.split_once('-')?;
    let (begin, end) = (begin.parse().ok()?, end.parse().ok()?);
    let is_data = payload.get(..begin)?.ends_with(BEFORE_DATA)
        && payload.get(end..)? == BEHIND_DATA
        && begin <= end;
    is_data.then(|| payload.slice(begin..end))
}
