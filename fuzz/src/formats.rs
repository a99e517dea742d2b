//! A message of whatever format, read as far as a handler's event.

use eventbus_core::header::KnownHeaders;
use eventbus_core::{
    CloudEventsBinaryFormat, CloudEventsBinding, CloudEventsFormat, Envelope, EnvelopeFormat,
    ErrorKind, EventId, FlatFormat, Format, Formats, Headers, Message, Reading, Timestamp, Topic,
    read_event,
};
use serde_json::Value;

use crate::handling::OrderCreated;
use crate::{Target, message};

pub(crate) const TARGET: Target = Target {
    name: "formats",
    run,
    words: message::WORDS,
    cost: 1,
};

const TOPIC: Topic = Topic::from_static("orders");

fn run(data: &[u8]) {
    let message = message::read(&TOPIC, data);
    let formats = Formats::default();
    let known = KnownHeaders::of(&message.headers);
    let envelope = formats.envelope(&message, fallback());
    let (format, reading) = match formats.read(&message, &known) {
        Ok((format, reading)) => (format, reading),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Codec, "{error}");
            assert!(envelope.is_err(), "an envelope of what cannot be read");
            return;
        }
    };
    // Only this one may hold them as another text: escaped, or as base64.
    let is_part = format.name() == CloudEventsFormat::new().name()
        || reading.data.is_empty()
        || message::find(&message.payload, &reading.data).is_some();
    assert!(is_part, "the data are no part of the payload");
    // Any version, through the conversion of the one before.
    if let Err(error) = read_event::<OrderCreated>(reading.version, &reading.data) {
        assert_eq!(error.kind(), ErrorKind::Codec, "{error}");
    }
    let Ok(envelope) = envelope else {
        return;
    };
    assert_eq!(envelope.event_type, reading.event_type, "two types");
    assert_eq!(envelope.version, reading.version, "two versions");
    if let Ok(data) = serde_json::from_slice::<Value>(&reading.data) {
        comes_back(&EnvelopeFormat, &envelope, &reading, &data);
        comes_back(&FlatFormat, &envelope, &reading, &data);
    }
    let (kafka, amqp) = (CloudEventsBinding::Kafka, CloudEventsBinding::Amqp);
    for content_type in ["application/json", "application/avro"] {
        let data = &reading.data;
        // What is no JSON has no place in a document.
        if content_type.ends_with("avro") || serde_json::from_slice::<Value>(data).is_ok() {
            let structured = CloudEventsFormat::new();
            comes_back_to_all(&structured, &envelope, content_type, data);
            let with_copies = structured.with_header_copies(amqp);
            comes_back_to_all(&with_copies, &envelope, content_type, data);
            let binary = CloudEventsBinaryFormat::new().with_binding(kafka);
            comes_back_to_all(&binary, &envelope, content_type, data);
        }
    }
}

fn fallback() -> (EventId, Timestamp) {
    (
        EventId::from_name("of its place"),
        Timestamp::from_micros(1),
    )
}

/// What is written is read as it was given, also by who does not see the headers.
fn comes_back(format: &dyn Format, envelope: &Envelope, before: &Reading<'_>, data: &Value) {
    let (headers, payload) = match format.write(envelope, "application/json", &before.data) {
        Ok(written) => written,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
            return;
        }
    };
    let bare = Message::new(TOPIC, payload);
    let whole = bare.clone().with_headers(headers);
    let formats = Formats::default();
    let read = |message: &Message| {
        let known = KnownHeaders::of(&message.headers);
        let (found, reading) = formats
            .read(message, &known)
            .unwrap_or_else(|error| panic!("{} is not read: {error:?}", format.name()));
        assert_eq!(found.name(), format.name(), "claimed by another format");
        assert_eq!(reading.event_type, envelope.event_type);
        let mut found: Value = serde_json::from_slice(&reading.data).expect("JSON stays JSON");
        if format.name() == FlatFormat.name()
            && let (Some(found), Some(before)) = (found.as_object_mut(), data.as_object())
            && !before.contains_key("event_type")
        {
            let own = found.remove("event_type");
            assert_eq!(own, Some(Value::from(envelope.event_type.as_str())));
        }
        assert_eq!(found, *data, "other data");
        reading.version
    };
    assert_eq!(read(&whole), envelope.version);
    let again = formats.envelope(&whole, fallback());
    assert_eq!(&again.expect("it was just written"), envelope);
    if format.name() == FlatFormat.name() && data.get("eventType").is_some() {
        // Without headers it is an envelope whose data are a member of the event's own.
        return;
    }
    let version = read(&bare);
    if format.name() == EnvelopeFormat.name() {
        assert_eq!(version, envelope.version);
        let again = formats.envelope(&bare, fallback());
        assert_eq!(&again.expect("the body says all of it"), envelope);
    }
    assert_eq!(bare.headers, Headers::new());
}

/// As [`comes_back`], for what also those read who know nothing of our headers.
fn comes_back_to_all(format: &dyn Format, envelope: &Envelope, content_type: &str, data: &[u8]) {
    let (headers, payload) = match format.write(envelope, content_type, data) {
        Ok(written) => written,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
            return;
        }
    };
    let mut others = Headers::builder();
    for (name, value) in headers.iter().filter(|(name, _)| !name.starts_with("eb-")) {
        others = others.push(name, value).expect("within limits");
    }
    let whole = Message::new(TOPIC, payload).with_headers(headers);
    let foreign = whole.clone().with_headers(others.build());
    let formats = Formats::default();
    for message in [&whole, &foreign] {
        let known = KnownHeaders::of(&message.headers);
        let (found, reading) = formats
            .read(message, &known)
            .unwrap_or_else(|error| panic!("{} is not read: {error:?}", format.name()));
        assert_eq!(found.name(), format.name(), "claimed by another format");
        assert_eq!(reading.event_type, envelope.event_type);
        assert_eq!(reading.version, envelope.version);
        let is_same = match content_type {
            "application/json" => {
                let value = |data: &[u8]| serde_json::from_slice::<Value>(data).expect("JSON");
                value(&reading.data) == value(data)
            }
            _ => reading.data == data,
        };
        assert!(is_same, "other data");
    }
    let again = formats.envelope(&whole, fallback());
    assert_eq!(&again.expect("it was just written"), envelope);
    // The rest of it may have no form that every reader of CloudEvents takes.
    let again = formats
        .envelope(&foreign, fallback())
        .expect("it says what it is");
    assert_eq!(again.id, envelope.id);
    assert_eq!(again.metadata, envelope.metadata);
}
