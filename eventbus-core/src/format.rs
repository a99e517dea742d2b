//! How an envelope and its data become a message, and how a message is recognised again.

use std::borrow::Cow;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use serde::Serialize;

use crate::chunk;
use crate::clock::Timestamp;
use crate::envelope::{Envelope, EventId, Metadata, UUID_LENGTH};
use crate::error::{Error, ErrorKind, Result};
use crate::header::{self, KnownHeaders};
use crate::message::{Headers, HeadersBuilder, Message};

mod cloud_events;
mod envelope;
mod flat;

pub use cloud_events::{CloudEventsBinaryFormat, CloudEventsBinding, CloudEventsFormat};
pub use envelope::EnvelopeFormat;
pub use flat::FlatFormat;

/// How an envelope and its data become a message; belongs to a topic.
///
/// # Contract
///
/// - `read` and `envelope` give back what `write` was given.
/// - `read` claims a message by its headers, its content type or the shape of its body, and never
///   claims another format's.
pub trait Format: Debug + Send + Sync + 'static {
    /// Its name, as the header [`header::FORMAT`] gives it.
    fn name(&self) -> &'static str;

    /// Lays out an event.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the content type does not fit this format, or a header is too large.
    fn write(
        &self,
        envelope: &Envelope,
        content_type: &str,
        data: &[u8],
    ) -> Result<(Headers, Bytes)>;

    /// Reads as much as routing and decoding need, or `None` when the message is another format's.
    ///
    /// # Errors
    ///
    /// `Codec` when the message claims to be of this format and is not.
    fn read<'m>(
        &self,
        message: &'m Message,
        known: &KnownHeaders<'m>,
    ) -> Result<Option<Reading<'m>>>;

    /// Reads the envelope of a message that `read` claimed. `fallback` is the id of a message that
    /// carries none, and the time at which it was read.
    ///
    /// # Errors
    ///
    /// `Codec` when the message claims to be of this format and is not.
    fn envelope(
        &self,
        message: &Message,
        known: &KnownHeaders<'_>,
        fallback: (EventId, Timestamp),
    ) -> Result<Envelope>;
}

/// As much of an event as routing and decoding need.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Reading<'m> {
    /// The event's type.
    pub event_type: Cow<'m, str>,
    /// The version of the data.
    pub version: u32,
    /// The data, a part of the payload where they stand in it as they are.
    pub data: Bytes,
    /// The media type of the data, where it is not the header [`header::CONTENT_TYPE`] that says it.
    pub content_type: Option<Cow<'m, str>>,
}

impl<'m> Reading<'m> {
    /// What a format read.
    pub fn new(event_type: impl Into<Cow<'m, str>>, version: u32, data: Bytes) -> Self {
        Self {
            event_type: event_type.into(),
            version,
            data,
            content_type: None,
        }
    }

    /// Sets the media type of the data, for a format that says it in the payload.
    #[must_use]
    pub fn with_content_type(mut self, content_type: Option<Cow<'m, str>>) -> Self {
        self.content_type = content_type;
        self
    }
}

/// The formats a bus reads, in the order in which they are asked.
#[derive(Clone, Debug)]
pub struct Formats(Arc<[Arc<dyn Format>]>);

impl Default for Formats {
    fn default() -> Self {
        Self(Arc::from([
            Arc::new(EnvelopeFormat) as Arc<dyn Format>,
            Arc::new(FlatFormat),
            Arc::new(CloudEventsFormat::new()),
            Arc::new(CloudEventsBinaryFormat::new()),
        ]))
    }
}

impl Formats {
    /// Asks `first` before the formats there are.
    #[must_use]
    pub fn with(self, first: Arc<dyn Format>) -> Self {
        let mut formats = vec![first];
        formats.extend(
            self.0
                .iter()
                .filter(|format| format.name() != formats[0].name())
                .map(Arc::clone)
                .collect::<Vec<_>>(),
        );
        Self(Arc::from(formats))
    }

    /// Reads a message by the format that claims it.
    ///
    /// # Errors
    ///
    /// `Codec` when no format claims it, or the one that does cannot read it.
    pub fn read<'m>(
        &self,
        message: &'m Message,
        known: &KnownHeaders<'m>,
    ) -> Result<(&dyn Format, Reading<'m>)> {
        for format in self.0.iter() {
            if let Some(reading) = format.read(message, known)? {
                return Ok((format.as_ref(), reading));
            }
        }
        Err(Error::new(
            ErrorKind::Codec,
            "read message",
            "no format claims it: neither its headers nor its body say what event it is",
        ))
    }

    /// The id that a message carries, in a header or in its body; none where it carries none, or
    /// nothing can be read of it. For bridges, which give such a message an id.
    pub fn own_id(&self, message: &Message) -> Option<EventId> {
        let none = EventId::new();
        let found = self.id_of(message, || none.clone(), Timestamp::from_micros(0));
        (found != none).then_some(found)
    }

    /// The id of a message: its header, else its body, else `place`, which is made from where it
    /// stands.
    pub(crate) fn id_of(
        &self,
        message: &Message,
        place: impl FnOnce() -> EventId,
        now: Timestamp,
    ) -> EventId {
        let known = KnownHeaders::of(&message.headers);
        if let Some(Ok(id)) = known.id().map(EventId::parse) {
            return id;
        }
        let place = place();
        match self.envelope(message, (place.clone(), now)) {
            Ok(envelope) => envelope.id,
            Err(_) => place,
        }
    }

    /// Reads the envelope of a message.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn envelope(&self, message: &Message, fallback: (EventId, Timestamp)) -> Result<Envelope> {
        let known = KnownHeaders::of(&message.headers);
        let (format, reading) = self.read(message, &known)?;
        let mut envelope = format.envelope(message, &known, fallback)?;
        // As its handler is found: headers and body of a foreign message may say different things.
        envelope.event_type = reading.event_type.into_owned();
        envelope.version = reading.version;
        Ok(envelope)
    }
}

/// Writes an envelope as headers, the same for every format, with its time as text, and where the
/// data stand in a document around them. The content type, which is nobody's own,
/// goes behind those of ours: an adapter may send what is at the front as one.
pub(crate) fn envelope_headers(
    format: &str,
    envelope: &Envelope,
    time: &str,
    data: Option<Range<usize>>,
    content_type: &str,
) -> Result<HeadersBuilder> {
    let metadata = match envelope.metadata.is_empty() {
        true => None,
        false => Some(metadata_json(&envelope.metadata)?),
    };
    // By their names: an adapter whose table has no order needs no note of it then.
    let mut headers = HeadersBuilder::on(chunk::take())
        .push_some(header::CAUSATION_ID, envelope.causation_id.as_ref())?
        .push(header::CORRELATION_ID, &envelope.correlation_id)?;
    if let Some(Range { start, end }) = data {
        headers = headers.push_display(header::DATA, format_args!("{start}-{end}"))?;
    }
    let headers = headers
        .push(header::FORMAT, format)?
        .push(header::ID, envelope.id.text(&mut [0; UUID_LENGTH]))?
        .push_some(header::METADATA, metadata)?
        .push(header::SOURCE, &envelope.source)?
        .push(header::TIME, time)?
        .push(header::TYPE, &envelope.event_type)?
        .push_display(header::VERSION, envelope.version)?;
    headers.push(header::CONTENT_TYPE, content_type)
}

/// The headers that are written, packed into memory that small messages share.
fn pack(headers: HeadersBuilder) -> Headers {
    let (headers, rest) = headers.build_with_rest();
    chunk::give_back(rest);
    headers
}

/// Writes the value of a member of a JSON document behind its name.
fn member(out: &mut BytesMut, name: &[u8], value: &(impl Serialize + ?Sized)) -> Result<()> {
    out.extend_from_slice(name);
    serde_json::to_writer(out.writer(), value).map_err(|error| {
        Error::new(ErrorKind::Codec, "write event", "it has no JSON form").with_source(error)
    })
}

/// Reads an envelope from headers alone, where they hold at least id and type.
fn envelope_from_headers(known: &KnownHeaders<'_>, now: Timestamp) -> Result<Option<Envelope>> {
    let (Some(id), Some(event_type)) = (known.id(), known.event_type()) else {
        return Ok(None);
    };
    let version = known
        .version()
        .map_or(Ok(1), crate::envelope::parse_version)?;
    let time = known.time().map_or(Ok(now), str::parse)?;
    let mut envelope = Envelope::new(EventId::parse(id)?, event_type, version, time);
    envelope.source = known.source().unwrap_or_default().to_owned();
    if let Some(correlation_id) = known.correlation_id() {
        envelope.correlation_id = correlation_id.to_owned();
    }
    envelope.causation_id = known.causation_id().map(str::to_owned);
    if let Some(metadata) = known.metadata() {
        envelope.metadata = serde_json::from_str(metadata).map_err(|error| {
            Error::new(
                ErrorKind::Codec,
                "read metadata",
                "not a JSON object of strings",
            )
            .with_source(error)
        })?;
    }
    Ok(Some(envelope))
}

fn metadata_json(metadata: &Metadata) -> Result<String> {
    serde_json::to_string(metadata).map_err(|error| {
        Error::new(ErrorKind::Codec, "write metadata", "it has no JSON form").with_source(error)
    })
}

/// Whether the data may stand inside a JSON document.
fn require_json(format: &'static str, content_type: &str) -> Result<()> {
    if content_type == "application/json" || content_type.ends_with("+json") {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        "write event",
        "this format is a JSON document and takes JSON data only: give the topic a binary format",
    )
    .with("format", format)
    .with("content type", content_type))
}
