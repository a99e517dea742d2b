//! A message of whatever format, read as far as a handler's event.

use eventbus_core::header::KnownHeaders;
use eventbus_core::{
    Envelope, EnvelopeFormat, ErrorKind, EventId, FlatFormat, Format, Formats, Headers, Message,
    Reading, Timestamp, Topic, read_event,
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
    let reading = match formats.read(&message, &known) {
        Ok((_, reading)) => reading,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Codec, "{error}");
            assert!(envelope.is_err(), "an envelope of what cannot be read");
            return;
        }
    };
    let is_part =
        reading.data.is_empty() || message::find(&message.payload, &reading.data).is_some();
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
