//! CloudEvents 1.0 in binary mode: the data alone are the payload, the attributes are headers.

use bytes::Bytes;

use super::binding::{self, CloudEventsBinding, Mode, mode_of};
use crate::clock::{RFC_3339_MAX, Timestamp};
use crate::envelope::{Envelope, EventId, parse_version};
use crate::error::Result;
use crate::format::{Format, Reading, envelope_from_headers, envelope_headers, pack};
use crate::header::KnownHeaders;
use crate::message::{Headers, Message};

/// The data as they are, of any codec; `ce_id`, `ce_source`, `ce_type` and the other attributes of
/// [`CloudEventsFormat`](super::CloudEventsFormat) as headers.
///
/// Dapr does not read it: its sidecar takes the data for the event.
#[derive(Clone, Copy, Debug, Default)]
pub struct CloudEventsBinaryFormat {
    binding: CloudEventsBinding,
}

const NAME: &str = "cloudevents-binary";

impl CloudEventsBinaryFormat {
    /// The format with the headers of Kafka.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            binding: CloudEventsBinding::Kafka,
        }
    }

    /// Sets whose names the headers have.
    #[must_use]
    pub const fn with_binding(mut self, binding: CloudEventsBinding) -> Self {
        self.binding = binding;
        self
    }
}

impl Format for CloudEventsBinaryFormat {
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
        let headers = envelope_headers(NAME, envelope, &time, None, content_type)?;
        let headers = self.binding.write(headers, envelope, &time)?;
        Ok((pack(headers), Bytes::copy_from_slice(data)))
    }

    fn read<'m>(
        &self,
        message: &'m Message,
        known: &KnownHeaders<'m>,
    ) -> Result<Option<Reading<'m>>> {
        let data = message.payload.clone();
        match known.format() {
            Some(NAME) => {
                if let Some(event_type) = known.event_type() {
                    let version = known.version().map_or(Ok(1), parse_version)?;
                    return Ok(Some(Reading::new(event_type, version, data)));
                }
            }
            Some(_) => return Ok(None),
            None if mode_of(message) != Some(Mode::Binary) => return Ok(None),
            None => {}
        }
        let (attributes, content_type) = binding::read(message)?;
        let reading = Reading::new(attributes.event_type, attributes.version, data);
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
        let (attributes, _) = binding::read(message)?;
        attributes.into_envelope(known, fallback.1)
    }
}
