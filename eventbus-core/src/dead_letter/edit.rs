//! A changed event in place of one that could not be handled.

use bytes::Bytes;

use super::letter::DeadLetter;
use crate::bus::EventBus;
use crate::envelope::EventId;
use crate::error::Result;
use crate::header::{self, KnownHeaders};
use crate::message::{Headers, HeadersBuilder, Key, Message};

/// How the event of a dead letter is changed before it is given to its group again.
///
/// # Examples
///
/// ```
/// use eventbus_core::Edit;
///
/// let edit = Edit::new()
///     .data(r#"{"parcel":3,"street":"Elm Street 7"}"#)
///     .header("tenant", "north")
///     .by("ann")
///     .because("the street was missing");
/// ```
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Edit {
    body: Body,
    headers: Vec<(String, Option<Bytes>)>,
    pub(super) by: String,
    pub(super) because: String,
}

#[derive(Clone, Debug, Default)]
enum Body {
    #[default]
    Kept,
    Data(Bytes),
    Payload(Bytes),
}

impl Edit {
    /// An edit that changes nothing yet.
    pub fn new() -> Self {
        Self {
            by: "unknown".to_owned(),
            ..Self::default()
        }
    }

    /// Replaces the event's data, such as its JSON; the format of the event is kept.
    pub fn data(mut self, data: impl Into<Bytes>) -> Self {
        self.body = Body::Data(data.into());
        self
    }

    /// Replaces the whole payload, whatever the format: for an event that can't be read.
    pub fn payload(mut self, payload: impl Into<Bytes>) -> Self {
        self.body = Body::Payload(payload.into());
        self
    }

    /// Sets a header in place of all of this name.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.headers.push((name.into(), Some(value.into())));
        self
    }

    /// Takes the headers of this name away, such as an expiry that is past.
    pub fn without_header(mut self, name: impl Into<String>) -> Self {
        self.headers.push((name.into(), None));
        self
    }

    /// Records who decided.
    pub fn by(mut self, who: impl Into<String>) -> Self {
        self.by = who.into();
        self
    }

    /// Records why.
    pub fn because(mut self, reason: impl Into<String>) -> Self {
        self.because = reason.into();
        self
    }

    /// The changed event of `letter`, whose event was `old`: another event, caused by the old one.
    pub(super) fn apply(
        &self,
        bus: &EventBus,
        letter: &DeadLetter,
        old: &EventId,
    ) -> Result<(EventId, Message)> {
        let id = self.id_for(letter);
        let original = &letter.message;
        let mut message = original.clone();
        match &self.body {
            Body::Kept => {}
            Body::Payload(payload) => {
                message.headers = without(&original.headers, &[header::DATA])?.build();
                message.payload = payload.clone();
            }
            Body::Data(data) => {
                // Without the place of the data, so that the document is read, which may say what
                // they are.
                let headers = without(&original.headers, &[header::DATA])?.build();
                let original = original.clone().with_headers(headers);
                let known = KnownHeaders::of(&original.headers);
                let (format, reading) = bus.formats().read(&original, &known)?;
                let mut envelope =
                    format.envelope(&original, &known, (old.clone(), bus.clock().now()))?;
                envelope.id = id.clone();
                envelope.causation_id = Some(old.to_string());
                let said = reading.content_type.as_deref().or(known.content_type());
                let content_type = said.unwrap_or("application/json");
                let (written, payload) = format.write(&envelope, content_type, data)?;
                message.headers = joined(&written, &original.headers)?;
                message.payload = payload;
            }
        }
        let edited: Vec<_> = self.headers.iter().map(|(name, _)| name.as_str()).collect();
        let mut headers = without(&message.headers, &edited)?;
        for (name, value) in &self.headers {
            headers = headers.push_some(name, value.as_ref())?;
        }
        let own = [header::ID, header::CAUSATION_ID, header::EDITED_FROM];
        message.headers = without(&headers.build(), &own)?
            .push(header::ID, id.to_string())?
            .push(header::CAUSATION_ID, old.to_string())?
            .push(header::EDITED_FROM, letter.id.to_string())?
            .build();
        Ok((id, message))
    }

    /// The id of the changed event. The same edit of the same letter gives the same id, so that it
    /// can be repeated after a crash; another edit is another event.
    fn id_for(&self, letter: &DeadLetter) -> EventId {
        let (kind, body): (_, &[u8]) = match &self.body {
            Body::Kept => ("edited headers", &[]),
            Body::Data(data) => ("edited data", data),
            Body::Payload(payload) => ("edited payload", payload),
        };
        let mut id = EventId::derived(&letter.id, &letter.group, kind, Some(&key(body)), 0);
        for (name, value) in &self.headers {
            let value = value.as_deref().map(key);
            id = EventId::derived(&id, &letter.group, name, value.as_ref(), 0);
        }
        id
    }
}

fn key(bytes: &[u8]) -> Key {
    Key::new(bytes.to_vec())
}

/// The headers of other names.
pub(super) fn without(headers: &Headers, names: &[&str]) -> Result<HeadersBuilder> {
    let mut kept = Headers::builder().unlimited();
    for (name, value) in headers.iter() {
        if !names.contains(&name) {
            kept = kept.push(name, value)?;
        }
    }
    Ok(kept)
}

/// `written`, and of `original` what stands beside an envelope.
fn joined(written: &Headers, original: &Headers) -> Result<Headers> {
    let mut headers = written.to_builder().unlimited();
    for (name, value) in original.iter() {
        if written.get(name).is_none() {
            headers = headers.push(name, value)?;
        }
    }
    Ok(headers.build())
}
