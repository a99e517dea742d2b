//! How protocols carry a CloudEvent: which headers its attributes are, and how to see that it is one.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;

use super::attributes::{Attributes, describe, unreadable, wrong};
use crate::envelope::Envelope;
use crate::error::Result;
use crate::header;
use crate::message::{HeadersBuilder, Message};

/// Whose names the attributes have as headers when they are written; all are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CloudEventsBinding {
    /// `ce_id`, as the binding for Kafka says.
    #[default]
    Kafka,
    /// `cloudEvents_id`, as the binding for AMQP says.
    Amqp,
}

/// What the names of attributes begin with. Those of HTTP and NATS are percent-encoded.
const PREFIXES: [&str; 4] = ["ce_", "cloudEvents_", "cloudEvents:", ENCODED];
const ENCODED: &str = "ce-";
const MEDIA_TYPES: &str = "application/cloudevents";

impl CloudEventsBinding {
    fn prefix(self) -> &'static str {
        match self {
            Self::Kafka => "ce_",
            Self::Amqp => "cloudEvents_",
        }
    }

    /// Adds the attributes of an envelope.
    pub(super) fn write(
        self,
        mut headers: HeadersBuilder,
        envelope: &Envelope,
        time: &str,
    ) -> Result<HeadersBuilder> {
        let prefix = self.prefix();
        let mut name_of = String::from(prefix);
        let mut add = |name: &str, value: &str| {
            name_of.truncate(prefix.len());
            name_of.push_str(name);
            headers.add(&name_of, value.as_bytes())
        };
        add("specversion", "1.0")?;
        describe(envelope, time, add)?;
        Ok(headers)
    }
}

/// How a message says that it is a CloudEvent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::format) enum Mode<'m> {
    /// It is a document of this media type.
    Structured(&'m str),
    /// Its attributes are headers.
    Binary,
}

/// What the headers of a message say, whoever wrote them; nothing where they do not speak of it.
pub(in crate::format) fn mode_of(message: &Message) -> Option<Mode<'_>> {
    let mut is_binary = false;
    for (name, value) in message.headers.iter() {
        if name.eq_ignore_ascii_case(header::CONTENT_TYPE)
            && let Ok(media_type) = std::str::from_utf8(value)
            && strip_prefix(media_type.trim_start(), MEDIA_TYPES).is_some()
        {
            return Some(Mode::Structured(media_type));
        }
        is_binary |= attribute(name).is_some_and(|name| name.eq_ignore_ascii_case("specversion"));
    }
    is_binary.then_some(Mode::Binary)
}

/// Refuses documents other than a single event in JSON.
pub(super) fn require_json_format(media_type: &str) -> Result<()> {
    let rest = strip_prefix(media_type.trim(), MEDIA_TYPES).unwrap_or_default();
    let kind = rest.split(';').next().unwrap_or_default().trim_end();
    if kind.is_empty() || kind.eq_ignore_ascii_case("+json") {
        return Ok(());
    }
    let message = match strip_prefix(kind, "-batch") {
        Some(_) => "a batch of events is no event: publish each as a message of its own",
        None => "of the formats of CloudEvents JSON alone is read: publish the event in that",
    };
    Err(unreadable(message).with("content type", media_type))
}

/// Reads the attributes that are headers, and the media type of the data.
pub(super) fn read(message: &Message) -> Result<(Attributes<'_>, Option<Cow<'_, str>>)> {
    let mut attributes = Attributes::default();
    let mut content_type = None;
    for (name, value) in message.headers.iter() {
        let is_content_type = name.eq_ignore_ascii_case(header::CONTENT_TYPE);
        let Some(attribute) = attribute(name).or(is_content_type.then_some("datacontenttype"))
        else {
            continue;
        };
        let Ok(value) = std::str::from_utf8(value) else {
            return Err(wrong(attribute, "a header of this name is no text"));
        };
        let value = match strip_prefix(name, ENCODED) {
            Some(_) => decoded(value),
            None => Cow::Borrowed(value),
        };
        if attribute.eq_ignore_ascii_case("datacontenttype") {
            content_type = Some(value);
        } else {
            attributes.add(&attribute.to_ascii_lowercase(), value)?;
        }
    }
    Ok((attributes.check()?, content_type))
}

/// The attribute that a header is, if it is one.
fn attribute(name: &str) -> Option<&str> {
    let mut stripped = PREFIXES.iter().map(|prefix| strip_prefix(name, prefix));
    stripped.find_map(|name| name.filter(|name| !name.is_empty()))
}

/// As the method of texts, whatever the case: HTTP has no other names for `ce-id` and `Ce-Id`.
fn strip_prefix<'t>(text: &'t str, prefix: &str) -> Option<&'t str> {
    let begin = text.get(..prefix.len())?;
    let is_prefix = begin.eq_ignore_ascii_case(prefix);
    is_prefix.then(|| &text[prefix.len()..])
}

/// A value that was percent-encoded. On RabbitMQ values of this prefix are not, which shows in
/// letters that an encoded one does not have.
fn decoded(value: &str) -> Cow<'_, str> {
    let is_encoded = value.bytes().all(|byte| byte.is_ascii_graphic());
    let decoded = percent_decode_str(value).decode_utf8();
    match decoded {
        Ok(decoded) if is_encoded => decoded,
        _ => Cow::Borrowed(value),
    }
}
