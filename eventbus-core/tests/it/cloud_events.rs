//! CloudEvents, byte for byte as we write them, and as others do.

use std::collections::BTreeMap;

use bytes::Bytes;
use eventbus_core::{
    CloudEventsBinaryFormat, CloudEventsBinding, CloudEventsFormat, Envelope, ErrorKind, EventId,
    Format, Formats, Headers, Message, Timestamp, header,
};
use proptest::prelude::{Strategy, any, prop, prop_assert_eq, proptest};
use serde_json::{Value, json};

mod consumed;
mod foreign;

use crate::formats::{DATA, assert_golden, envelope, fallback, message, texts};

const JSON: &str = "application/json";
const STRUCTURED: CloudEventsFormat = CloudEventsFormat::new();
const BINARY: CloudEventsBinaryFormat = CloudEventsBinaryFormat::new();

/// What a consumer sees of a message.
struct Seen {
    format: &'static str,
    content_type: Option<String>,
    data: Bytes,
    envelope: Envelope,
}

fn see(message: &Message) -> eventbus_core::Result<Seen> {
    let formats = Formats::default();
    let known = header::KnownHeaders::of(&message.headers);
    let (format, reading) = formats.read(message, &known)?;
    Ok(Seen {
        format: format.name(),
        content_type: reading.content_type.map(|it| it.into_owned()),
        data: reading.data,
        envelope: formats.envelope(message, fallback())?,
    })
}

fn headers(of: &[(&str, &str)]) -> Headers {
    let mut headers = Headers::builder();
    for (name, value) in of {
        headers = headers.push(name, value).expect("within limits");
    }
    headers.build()
}

#[test]
fn the_structured_mode_is_written_as_it_always_was() {
    let written = STRUCTURED.write(&envelope(), JSON, DATA);
    let (headers, payload) = written.expect("it is written");
    assert_golden("cloudevents.txt", &headers, &payload);

    let copies = STRUCTURED.with_header_copies(CloudEventsBinding::Amqp);
    let written = copies.write(&envelope(), "application/avro", b"\0\x01\xff");
    let (headers, payload) = written.expect("it is written");
    assert_golden("cloudevents_copies.txt", &headers, &payload);
}

#[test]
fn the_binary_mode_is_written_as_it_always_was() {
    let written = BINARY.write(&envelope(), JSON, DATA);
    let (headers, payload) = written.expect("it is written");
    assert_golden("cloudevents_binary.txt", &headers, &payload);
    assert_eq!(payload, DATA);
}

#[test]
fn a_legal_name_is_an_attribute_and_other_metadata_stand_together() {
    let mut envelope = envelope();
    envelope.source = "Order Service/ä".into();
    envelope.metadata = BTreeMap::from(
        [
            ("tenant", "acme"),
            ("userId", "u-1"),
            ("subject", "somebody else's"),
            ("empty", ""),
            ("line", "one\ntwo"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned())),
    );
    let (headers, payload) = STRUCTURED
        .write(&envelope, JSON, DATA)
        .expect("it is written");
    let body: Value = serde_json::from_slice(&payload).expect("JSON");
    assert_eq!(body["tenant"], "acme");
    assert_eq!(body["source"], "Order%20Service/%C3%A4", "a URI reference");
    assert_eq!(body.get("subject"), None);
    let rest = body["metadata"].as_str().expect("text");
    let rest: Value = serde_json::from_str(rest).expect("JSON");
    let expected =
        json!({"userId": "u-1", "subject": "somebody else's", "empty": "", "line": "one\ntwo"});
    assert_eq!(rest, expected);

    // With our headers all of it comes back, without them all but the letters of the source.
    let seen = see(&message(headers, payload.clone())).expect("it is read");
    assert_eq!(seen.envelope, envelope);
    let seen = see(&message(Headers::new(), payload)).expect("the body says it");
    envelope.source = "Order%20Service/%C3%A4".into();
    assert_eq!(seen.envelope, envelope);
}

/// Metadata are the user's: an entry with the name of an attribute must not become that attribute, by
/// which others route the event.
#[test]
fn metadata_called_as_an_attribute_stay_metadata() {
    let names = ["specversion", "id", "source", "type", "time", "subject"];
    let mut event = envelope();
    let entries = names.map(|name| (name.to_owned(), "of the user".to_owned()));
    event.metadata = entries.into_iter().collect();
    for format in [&STRUCTURED as &dyn Format, &BINARY] {
        let (headers, payload) = format.write(&event, JSON, DATA).expect("it is written");
        let of_others = headers.iter().filter(|(name, _)| !name.starts_with("eb-"));
        let mut foreign = Headers::builder();
        for (name, value) in of_others {
            foreign = foreign.push(name, value).expect("within limits");
        }
        let seen = see(&message(foreign.build(), payload)).expect("it is one");
        assert_eq!(seen.envelope.event_type, "OrderCreated");
        assert_eq!(seen.envelope.source, event.source);
        assert_eq!(seen.envelope.metadata, event.metadata);
    }
}

#[test]
fn more_metadata_than_there_is_room_for_in_headers_stand_together() {
    let mut written = envelope();
    written.metadata = (0..200)
        .map(|it| (format!("m{it}"), it.to_string()))
        .collect();
    for format in [&STRUCTURED as &dyn Format, &BINARY] {
        let (headers, payload) = format.write(&written, JSON, DATA).expect("it is written");
        let ours_left_out = headers.iter().filter(|(name, _)| !name.starts_with("eb-"));
        let ours_left_out = ours_left_out.fold(Headers::builder(), |headers, (name, value)| {
            headers.push(name, value).expect("within limits")
        });
        let seen = see(&message(ours_left_out.build(), payload)).expect("it is read");
        assert_eq!(seen.envelope, written);
    }
}

#[test]
fn an_event_that_can_be_no_cloud_event_is_refused() {
    let mut nameless = envelope();
    nameless.source.clear();
    let mut untyped = envelope();
    untyped.event_type = "two\nlines".into();
    for wrong in [nameless, untyped] {
        for format in [&STRUCTURED as &dyn Format, &BINARY] {
            let error = format.write(&wrong, JSON, DATA).expect_err("it is none");
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
    }
}

#[test]
fn data_of_any_codec_come_back() {
    for format in [&STRUCTURED as &dyn Format, &BINARY] {
        for data in [&b""[..], b"\0\xff", b"text"] {
            let written = format.write(&envelope(), "application/avro", data);
            let (headers, payload) = written.expect("it is written");
            let seen = see(&message(headers, payload)).expect("it is read");
            assert_eq!(seen.data, data);
        }
    }
}

#[test]
fn a_body_that_was_rewritten_is_read_although_the_header_says_where_the_data_were() {
    let (headers, payload) = STRUCTURED
        .write(&envelope(), JSON, DATA)
        .expect("it is written");
    let document: Value = serde_json::from_slice(&payload).expect("JSON");
    let pretty = serde_json::to_vec_pretty(&document).expect("JSON");
    let seen = see(&message(headers, pretty)).expect("it is read");
    assert_eq!(
        serde_json::from_slice::<Value>(&seen.data).expect("JSON"),
        document["data"]
    );
}

proptest! {
    #[test]
    fn both_modes_read_back_what_they_wrote(
        source in texts(),
        correlation in texts(),
        cause in prop::option::of(texts()),
        metadata in prop::collection::btree_map(names(), texts(), 0..5),
        event_type in "[A-Za-z.]{1,30}",
        version in 1u32..100,
        micros in 0i64..4_000_000_000_000_000,
        data in prop::collection::vec(any::<u8>(), 0..40),
        number in any::<i64>(),
        amqp in any::<bool>(),
    ) {
        let mut written = Envelope::new(EventId::new(), event_type, version, Timestamp::from_micros(micros));
        written.source = format!("s{}", source.replace(char::is_control, "").replace(is_no_character, ""));
        written.correlation_id = correlation;
        written.causation_id = cause;
        written.metadata = metadata;
        let as_json = serde_json::to_vec(&json!({ "number": number })).expect("JSON");
        let binding = if amqp { CloudEventsBinding::Amqp } else { CloudEventsBinding::Kafka };
        let formats: [&dyn Format; 3] = [&STRUCTURED, &STRUCTURED.with_header_copies(binding), &BINARY.with_binding(binding)];
        for format in formats {
            for (content_type, data) in [(JSON, &as_json), ("application/avro", &data)] {
                let (headers, payload) = format.write(&written, content_type, data).expect("it is written");
                let seen = see(&message(headers.clone(), payload.clone())).expect("it is read");
                prop_assert_eq!(seen.format, format.name());
                prop_assert_eq!(&seen.data, data);
                prop_assert_eq!(&seen.envelope, &written);

                // By who sees nothing of ours.
                let mut others = Headers::builder();
                for (name, value) in headers.iter().filter(|(name, _)| !name.starts_with("eb-")) {
                    others = others.push(name, value).expect("within limits");
                }
                let seen = see(&message(others.build(), payload)).expect("it is read");
                prop_assert_eq!(seen.format, format.name());
                prop_assert_eq!(&seen.data, data);
                prop_assert_eq!(seen.content_type.as_deref(), Some(content_type));
                prop_assert_eq!(&seen.envelope.id, &written.id);
                prop_assert_eq!(seen.envelope.time, written.time);
                prop_assert_eq!(seen.envelope.version, version);
                prop_assert_eq!(&seen.envelope.metadata, &written.metadata);
            }
        }
    }

    #[test]
    fn no_bytes_make_them_panic(
        payload in prop::collection::vec(any::<u8>(), 0..200),
        names in prop::collection::vec("(ce_|ce-|cloudEvents[_:])(id|type|source|specversion|time|data)|content-type", 0..6),
        value in "[ -~é]{0,12}|1\\.0|application/cloudevents[-+a-z]{0,9}",
    ) {
        let pairs: Vec<_> = names.iter().map(|name| (name.as_str(), value.as_str())).collect();
        // Any answer is good.
        let _ = see(&message(headers(&pairs), payload));
    }
}

fn is_no_character(letter: char) -> bool {
    matches!(letter, '\u{fdd0}'..='\u{fdef}') || u32::from(letter) & 0xfffe == 0xfffe
}

/// Names of metadata, legal and not.
fn names() -> impl Strategy<Value = String> {
    let taken = prop::sample::select(vec!["subject", "metadata", "data", "topic", "tenant"]);
    proptest::prop_oneof![
        taken.prop_map(str::to_owned),
        "[a-z][a-z0-9]{0,24}",
        texts()
    ]
}
