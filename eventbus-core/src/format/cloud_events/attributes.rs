//! The attributes of a CloudEvent: those of an envelope, and the envelope of those that were read.

use std::borrow::Cow;
use std::collections::BTreeMap;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use uuid::Uuid;

use crate::clock::Timestamp;
use crate::envelope::{Envelope, EventId, Metadata, UUID_LENGTH, parse_version};
use crate::error::{Error, ErrorKind, Result};
use crate::header::KnownHeaders;

/// Names that are no name of a metadata entry on the wire: attributes of the envelope, and those
/// that say something of one event alone, while metadata pass on to what follows from it.
const TAKEN: [&str; 26] = [
    "causationid",
    "correlationid",
    "data",
    "datacontenttype",
    "dataref",
    "dataschema",
    "eventversion",
    "expiration",
    "expirytime",
    "id",
    "metadata",
    "partitionkey",
    "pubsubname",
    "recordedtime",
    "sampledrate",
    "sequence",
    "sequencetype",
    "source",
    "specversion",
    "subject",
    "time",
    "topic",
    "traceid",
    "traceparent",
    "tracestate",
    "type",
];

/// Longest name of an attribute that CloudEvents recommends.
const NAME_LENGTH_MAX: usize = 20;
/// Most metadata entries that have an attribute each; as headers they share the room with others.
const OWN_MAX: usize = 16;

/// What a URI consists of.
const NOT_IN_URI: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b':')
    .remove(b'/')
    .remove(b'?')
    .remove(b'#')
    .remove(b'@')
    .remove(b'!')
    .remove(b'$')
    .remove(b'&')
    .remove(b'\'')
    .remove(b'(')
    .remove(b')')
    .remove(b'*')
    .remove(b'+')
    .remove(b',')
    .remove(b';')
    .remove(b'=')
    .remove(b'%');

/// Says each attribute of an envelope but `specversion` and what is about the data.
pub(super) fn describe(
    envelope: &Envelope,
    time: &str,
    mut say: impl FnMut(&str, &str) -> Result<()>,
) -> Result<()> {
    let id = &mut [0; UUID_LENGTH];
    say("id", required("id", envelope.id.text(id))?)?;
    let source = required("source", &envelope.source)?;
    say(
        "source",
        &Cow::from(utf8_percent_encode(source, NOT_IN_URI)),
    )?;
    say("type", required("type", &envelope.event_type)?)?;
    // Years beyond 9999 have no RFC 3339 form, and a time need not be said.
    if !time.ends_with("us") {
        say("time", time)?;
    }
    say("eventversion", &format!("v{}", envelope.version))?;
    if is_sayable(&envelope.correlation_id) {
        say("correlationid", &envelope.correlation_id)?;
    }
    if let Some(causation_id) = envelope.causation_id.as_deref().filter(|it| is_sayable(it)) {
        say("causationid", causation_id)?;
    }
    let mut together = BTreeMap::new();
    let mut own = 0;
    for (name, value) in &envelope.metadata {
        if own < OWN_MAX && is_name(name) && is_sayable(value) {
            say(name, value)?;
            own += 1;
        } else {
            together.insert(name, value);
        }
    }
    match together.is_empty() {
        true => Ok(()),
        false => say("metadata", &escaped_json(&together)?),
    }
}

/// A text that an attribute has to be.
fn required<'t>(name: &str, text: &'t str) -> Result<&'t str> {
    if is_sayable(text) {
        return Ok(text);
    }
    let message = match name {
        "source" => {
            "a CloudEvent names its source, without control characters: set it with `EventBusBuilder::source`"
        }
        _ => "a CloudEvent has an id and a type, without control characters: give the event such",
    };
    let error = Error::new(ErrorKind::InvalidInput, "write CloudEvent", message);
    Err(error.with("attribute", name))
}

/// Whether an attribute may be called so, and it means nothing else.
fn is_name(name: &str) -> bool {
    name.len() <= NAME_LENGTH_MAX
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && (name.bytes()).all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        && TAKEN.binary_search(&name).is_err()
}

/// Whether an attribute may be that text.
fn is_sayable(text: &str) -> bool {
    !text.is_empty() && !text.chars().any(is_forbidden)
}

/// What texts of CloudEvents do not have: controls, and what Unicode calls no characters.
fn is_forbidden(letter: char) -> bool {
    letter.is_control()
        || matches!(letter, '\u{fdd0}'..='\u{fdef}')
        || matches!(u32::from(letter) & 0xffff, 0xfffe | 0xffff)
}

/// A JSON object whose text has no forbidden letter.
fn escaped_json(entries: &BTreeMap<&String, &String>) -> Result<String> {
    let json = serde_json::to_string(entries).map_err(|error| {
        Error::new(ErrorKind::Codec, "write metadata", "it has no JSON form").with_source(error)
    })?;
    if !json.chars().any(is_forbidden) {
        return Ok(json);
    }
    // They stand in strings only.
    let mut escaped = String::with_capacity(json.len() + 16);
    for letter in json.chars() {
        match is_forbidden(letter) {
            true => {
                for unit in letter.encode_utf16(&mut [0; 2]) {
                    escaped.push_str(&format!("\\u{unit:04x}"));
                }
            }
            false => escaped.push(letter),
        }
    }
    Ok(escaped)
}

/// Whether data of that media type stand in a JSON document as they are.
pub(super) fn is_json(content_type: Option<&str>) -> bool {
    let Some(content_type) = content_type else {
        return true;
    };
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    let ends_with = |end: &str| {
        let from = media_type.len().checked_sub(end.len());
        from.and_then(|from| media_type.get(from..))
            .is_some_and(|found| found.eq_ignore_ascii_case(end))
    };
    ends_with("/json") || ends_with("+json")
}

/// The attributes of an event that was read.
#[derive(Debug, Default)]
pub(super) struct Attributes<'m> {
    id: Option<Cow<'m, str>>,
    source: Option<Cow<'m, str>>,
    spec_version: Option<Cow<'m, str>>,
    pub(super) event_type: Cow<'m, str>,
    pub(super) version: u32,
    /// Whether it says a version, which is what we write.
    is_ours: bool,
    time: Option<Timestamp>,
    correlation_id: Option<Cow<'m, str>>,
    causation_id: Option<Cow<'m, str>>,
    metadata: Metadata,
}

/// Whether the attribute is a text by its definition.
pub(super) fn is_text(name: &str) -> bool {
    matches!(name, "id" | "source" | "specversion" | "type" | "time")
}

impl<'m> Attributes<'m> {
    /// Takes another one.
    pub(super) fn add(&mut self, name: &str, value: Cow<'m, str>) -> Result<()> {
        match name {
            "id" => self.id = Some(value),
            "source" => self.source = Some(value),
            "specversion" => self.spec_version = Some(value),
            "type" => self.event_type = value,
            "time" => self.time = Some(value.parse()?),
            "eventversion" => {
                self.version = parse_version(&value)?;
                self.is_ours = true;
            }
            "correlationid" => self.correlation_id = Some(value),
            "causationid" => self.causation_id = Some(value),
            "metadata" => match serde_json::from_str::<Metadata>(&value) {
                Ok(entries) => self.metadata.extend(entries),
                // Somebody else's attribute of the name.
                Err(_) => self.add_entry(name, value),
            },
            _ => self.add_entry(name, value),
        }
        Ok(())
    }

    fn add_entry(&mut self, name: &str, value: Cow<'m, str>) {
        let entry = self.metadata.entry(name.to_owned());
        entry.or_insert_with(|| value.into_owned());
    }

    /// Refuses an event that lacks what every CloudEvent has.
    pub(super) fn check(mut self) -> Result<Self> {
        let is_said =
            |value: &Option<Cow<'_, str>>| value.as_ref().is_some_and(|it| !it.is_empty());
        let missing = [
            ("specversion", is_said(&self.spec_version)),
            ("id", is_said(&self.id)),
            ("source", is_said(&self.source)),
            ("type", !self.event_type.is_empty()),
        ];
        if let Some((name, _)) = missing.iter().find(|(_, is_said)| !is_said) {
            return Err(wrong(
                name,
                "it is missing: every CloudEvent has specversion, id, source and type",
            ));
        }
        let spec_version = self.spec_version.as_deref().unwrap_or_default();
        if !spec_version.starts_with("1.") {
            let message = "this version of CloudEvents is not read: publish the event as 1.0";
            return Err(
                wrong("specversion", message).with("value", format_args!("{spec_version:?}"))
            );
        }
        if !self.is_ours {
            self.version = 1;
        }
        Ok(self)
    }

    pub(super) fn into_envelope(
        self,
        known: &KnownHeaders<'_>,
        now: Timestamp,
    ) -> Result<Envelope> {
        let source = self.source.unwrap_or_default();
        let id = match (known.id(), &self.id) {
            // A re-drive says it, so that it is the same wherever the event stands.
            (Some(id), _) => EventId::parse(id)?,
            (None, Some(id)) if self.is_ours || Uuid::try_parse(id).is_ok() => EventId::parse(id)?,
            (None, id) => EventId::of_source(&source, id.as_deref().unwrap_or_default()),
        };
        let time = self.time.unwrap_or(now);
        let mut envelope = Envelope::new(id, self.event_type, self.version, time);
        envelope.source = source.into_owned();
        if let Some(correlation_id) = self.correlation_id {
            envelope.correlation_id = correlation_id.into_owned();
        }
        envelope.causation_id = self.causation_id.map(Cow::into_owned);
        envelope.metadata = self.metadata;
        Ok(envelope)
    }
}

/// What keeps a message from being read.
pub(super) fn unreadable(message: &str) -> Error {
    Error::new(ErrorKind::Codec, "read CloudEvent", message)
}

/// What is wrong with an attribute.
pub(super) fn wrong(name: &str, message: &str) -> Error {
    unreadable(message).with("attribute", name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_mean_something_else_are_no_names_of_metadata() {
        assert!(TAKEN.is_sorted(), "they are searched");
        for name in ["tenant", "a", "region2", "abcdefghijklmnopqrst"] {
            assert!(is_name(name), "{name}");
        }
        for name in [
            "",
            "userId",
            "user_id",
            "2nd",
            "größe",
            "subject",
            "data",
            "metadata",
            "type",
            "abcdefghijklmnopqrstu",
        ] {
            assert!(!is_name(name), "{name}");
        }
    }

    #[test]
    fn media_types_of_json_are_told_from_others() {
        for json in [
            "application/json",
            "Application/JSON; charset=utf-8",
            "text/json",
            "application/vnd.shop+json",
        ] {
            assert!(is_json(Some(json)), "{json}");
        }
        assert!(is_json(None));
        for other in ["", "json", "text/plain", "application/jsonl", "avro/binary"] {
            assert!(!is_json(Some(other)), "{other}");
        }
    }

    #[test]
    fn what_no_attribute_may_be_is_escaped_in_the_json_of_metadata() {
        let (name, value) = ("n".to_owned(), "a\u{85}\u{1fffe}\u{7f}\n".to_owned());
        let entries = BTreeMap::from([(&name, &value)]);
        let json = escaped_json(&entries).expect("it has a form");
        assert!(is_sayable(&json), "{json:?}");
        let read: Metadata = serde_json::from_str(&json).expect("JSON");
        assert_eq!(read[&name], value);
    }
}
