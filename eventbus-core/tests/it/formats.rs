//! What the formats write, byte for byte, and that they read back what they wrote.

use std::fmt::Write as _;
use std::path::PathBuf;

use bytes::Bytes;
use eventbus_core::{
    Envelope, EnvelopeFormat, ErrorKind, EventId, FlatFormat, Format, Formats, Headers, Message,
    Timestamp, Topic, header,
};
use proptest::prelude::{Strategy, any, prop, prop_assert_eq, proptest};

pub(super) const DATA: &[u8] = br#"{"order_id":123,"amount":250}"#;

pub(super) fn envelope() -> Envelope {
    let id = EventId::parse("0192f1c4-0000-7000-8000-00000000002a").expect("an id");
    let time = Timestamp::from_micros(1_795_244_400_123_000);
    let mut envelope = Envelope::new(id, "OrderCreated", 1, time);
    envelope.source = "order-service".into();
    envelope.correlation_id = "request-7".into();
    envelope.causation_id = Some("0192f1c3-0000-7000-8000-000000000001".into());
    envelope.metadata.insert("userId".into(), "user-1".into());
    envelope
        .metadata
        .insert("sessionId".into(), "session-2".into());
    envelope
}

pub(super) fn message(headers: Headers, payload: impl Into<Bytes>) -> Message {
    Message::new(Topic::from_static("order-events"), payload.into()).with_headers(headers)
}

pub(super) fn fallback() -> (EventId, Timestamp) {
    (
        EventId::parse("by-place").expect("an id"),
        Timestamp::from_micros(7),
    )
}

/// Compares with a file of `tests/golden`; `UPDATE_GOLDEN=1` writes it.
pub(super) fn assert_golden(name: &str, headers: &Headers, payload: &[u8]) {
    let mut text = String::new();
    for (name, value) in headers.iter() {
        writeln!(text, "{name}: {}", String::from_utf8_lossy(value)).expect("text grows");
    }
    writeln!(text, "\n{}", String::from_utf8_lossy(payload)).expect("text grows");
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).expect("the golden file can be written");
    }
    let golden = std::fs::read_to_string(&path).expect("the golden file is there");
    assert_eq!(
        text, golden,
        "{name} is not written as it was; UPDATE_GOLDEN=1 takes it over"
    );
}

#[test]
fn the_envelope_is_written_as_it_always_was() {
    let (headers, payload) = EnvelopeFormat
        .write(&envelope(), "application/json", DATA)
        .expect("it is written");
    assert_golden("envelope.txt", &headers, &payload);
}

#[test]
fn the_flat_format_is_written_as_it_always_was() {
    let (headers, payload) = FlatFormat
        .write(&envelope(), "application/json", DATA)
        .expect("it is written");
    assert_golden("flat.txt", &headers, &payload);
}

#[test]
fn an_envelope_without_headers_is_read_from_its_body() {
    let body = r#"{ "eventId": "e-1", "eventType": "OrderCreated", "eventVersion": "v3",
        "timestamp": "2026-11-21T07:00:00Z", "source": "legacy", "correlationId": "c-1",
        "causationId": null, "data": {"a": 1}, "metadata": {"userId": "u", "count": 3} }"#;
    let message = message(Headers::new(), body);
    let formats = Formats::default();
    let known = header::KnownHeaders::of(&message.headers);
    let (format, reading) = formats.read(&message, &known).expect("it is recognised");
    assert_eq!(format.name(), "envelope");
    assert_eq!(
        (reading.event_type.as_ref(), reading.version),
        ("OrderCreated", 3)
    );
    assert_eq!(&reading.data[..], br#"{"a": 1}"#);
    let envelope = formats.envelope(&message, fallback()).expect("it is whole");
    assert_eq!(envelope.id.to_string(), "e-1");
    assert_eq!(envelope.correlation_id, "c-1");
    assert_eq!(envelope.causation_id, None);
    assert_eq!(envelope.metadata["count"], "3");
}

#[test]
fn a_flat_event_says_its_type_once() {
    let write = |data: &str| FlatFormat.write(&envelope(), "application/json", data.as_bytes());
    for data in [
        r#"{"event_type":"OrderCreated","order_id":123}"#,
        r#"{"order_id":123,"event_type":"OrderCreated"}"#,
    ] {
        let (headers, payload) = write(data).expect("it says what it is");
        assert_eq!(payload, data);
        let read = message(headers, payload);
        let known = header::KnownHeaders::of(&read.headers);
        let reading = FlatFormat.read(&read, &known).expect("it is flat");
        assert_eq!(reading.expect("it is flat").data, data);
    }
    for data in [r#"{"event_type":"sale"}"#, r#"{"event_type":7}"#] {
        let error = write(data).expect_err("two members of one name");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
    let nested = r#"{"order":{"event_type":"sale"},"note":"\"event_type\""}"#;
    assert!(write(nested).is_ok());
}

#[test]
fn a_flat_message_of_another_language_says_its_version_in_its_body_or_its_headers() {
    let formats = Formats::default();
    let read = |headers: Headers, version: &str| {
        let body = format!(r#"{{"event_type":"OrderCreated","order_id":1{version}}}"#);
        let message = message(headers, body);
        let known = header::KnownHeaders::of(&message.headers);
        let (_, reading) = formats.read(&message, &known)?;
        let envelope = formats.envelope(&message, fallback())?;
        assert_eq!(envelope.version, reading.version);
        Ok::<_, eventbus_core::Error>(reading.version)
    };
    for (version, expected) in [
        ("", 1),
        (r#","event_version":2"#, 2),
        (r#","event_version":"3""#, 3),
        (r#","event_version":"v4""#, 4),
        (r#","version":5"#, 1),
    ] {
        assert_eq!(read(Headers::new(), version).expect(version), expected);
    }
    let headers = Headers::builder().push(header::VERSION, "7");
    let headers = headers.expect("a good header").build();
    assert_eq!(
        read(headers, r#","event_version":2"#).expect("it says so"),
        7
    );
    for version in [
        r#","event_version":"new""#,
        r#","event_version":[2]"#,
        r#","event_version":-1"#,
    ] {
        read(Headers::new(), version).expect_err("it is none");
    }
}

#[test]
fn a_flat_message_of_another_language_needs_no_headers() {
    let message = message(
        Headers::new(),
        r#"{"event_type":"OrderCreated","order_id":123,"amount":250}"#,
    );
    let formats = Formats::default();
    let known = header::KnownHeaders::of(&message.headers);
    let (format, reading) = formats.read(&message, &known).expect("it is recognised");
    assert_eq!(format.name(), "flat");
    assert_eq!(
        (reading.event_type.as_ref(), reading.version),
        ("OrderCreated", 1)
    );
    let envelope = formats.envelope(&message, fallback()).expect("it is whole");
    assert_eq!(envelope.id.to_string(), "by-place");
}

#[test]
fn what_no_format_claims_is_an_error_and_never_a_guess() {
    let formats = Formats::default();
    for body in [
        "",
        "null",
        "[]",
        "{}",
        "plain text",
        r#"{"eventType":"X"}"#,
        r#"{"data":{}}"#,
    ] {
        let message = message(Headers::new(), body);
        let known = header::KnownHeaders::of(&message.headers);
        let error = formats.read(&message, &known).expect_err(body);
        assert_eq!(error.kind(), ErrorKind::Codec, "{body}");
    }
}

#[test]
fn a_body_that_was_rewritten_is_read_although_the_header_says_where_the_data_were() {
    let (headers, payload) = EnvelopeFormat
        .write(&envelope(), "application/json", DATA)
        .expect("it is written");
    let document: serde_json::Value = serde_json::from_slice(&payload).expect("JSON");
    let pretty = serde_json::to_vec_pretty(&document).expect("JSON");
    let message = message(headers, pretty);
    let known = header::KnownHeaders::of(&message.headers);
    let (_, reading) = Formats::default()
        .read(&message, &known)
        .expect("it is read");
    let data: serde_json::Value = serde_json::from_slice(&reading.data).expect("JSON");
    assert_eq!(data, document["data"]);
}

#[test]
fn data_that_are_not_json_have_no_place_in_a_json_document() {
    for format in [&EnvelopeFormat as &dyn Format, &FlatFormat] {
        let refused = format.write(&envelope(), "application/avro", b"\x00");
        assert_eq!(
            refused.expect_err("not JSON").kind(),
            ErrorKind::InvalidInput
        );
    }
    assert!(
        FlatFormat
            .write(&envelope(), "application/json", b"[1]")
            .is_err()
    );
}

pub(super) fn texts() -> impl Strategy<Value = String> {
    // Anything a service may be called: quotes, controls and other scripts included.
    prop::collection::vec(any::<char>(), 0..20).prop_map(String::from_iter)
}

proptest! {
    #[test]
    fn both_formats_read_back_what_they_wrote(
        source in texts(),
        correlation in texts(),
        cause in prop::option::of(texts()),
        metadata in prop::collection::btree_map(texts(), texts(), 0..5),
        event_type in "[A-Za-z.]{1,30}",
        version in 1u32..100,
        micros in 0i64..4_000_000_000_000_000,
        number in any::<i64>(),
        text in texts(),
    ) {
        let mut written = Envelope::new(EventId::new(), event_type, version, Timestamp::from_micros(micros));
        written.source = source;
        written.correlation_id = correlation;
        written.causation_id = cause;
        written.metadata = metadata;
        let data = serde_json::json!({ "number": number, "text": text });
        let bytes = serde_json::to_vec(&data).expect("JSON");
        for format in [&EnvelopeFormat as &dyn Format, &FlatFormat] {
            let (headers, payload) = format.write(&written, "application/json", &bytes).expect("it is written");
            let message = message(headers, payload);
            let known = header::KnownHeaders::of(&message.headers);
            let (found, reading) = Formats::default().read(&message, &known).map(|(f, r)| (f.name().to_owned(), r)).expect("it is read");
            prop_assert_eq!(found, format.name());
            prop_assert_eq!(reading.event_type.as_ref(), written.event_type.as_str());
            prop_assert_eq!(reading.version, version);
            let read: serde_json::Value = serde_json::from_slice(&reading.data).expect("JSON");
            prop_assert_eq!(&read["number"], &data["number"]);
            prop_assert_eq!(&read["text"], &data["text"]);
            prop_assert_eq!(&Formats::default().envelope(&message, fallback()).expect("it is whole"), &written);
        }
    }

    #[test]
    fn no_bytes_make_a_format_panic(
        payload in prop::collection::vec(any::<u8>(), 0..200),
        format in prop::option::of("envelope|flat|cloudevents|cloudevents-binary|other"),
        place in prop::option::of("[0-9]{0,4}-?[0-9]{0,4}"),
    ) {
        let headers = Headers::builder()
            .push_some(header::FORMAT, format)
            .and_then(|builder| builder.push(header::TYPE, "X"))
            .and_then(|builder| builder.push_some(header::DATA, place))
            .expect("within limits")
            .build();
        let message = message(headers, payload);
        let known = header::KnownHeaders::of(&message.headers);
        // Any answer is good.
        let _ = Formats::default().read(&message, &known);
        let _ = Formats::default().envelope(&message, fallback());
    }
}

// ---- what fuzzing found

#[test]
fn a_flat_event_without_members_is_json_however_it_is_spaced() {
    for data in [&b"{}"[..], b"{ }", b"{\n}"] {
        let written = FlatFormat.write(&envelope(), "application/json", data);
        let (_, payload) = written.expect("an object");
        let read: serde_json::Value = serde_json::from_slice(&payload).expect("JSON");
        assert_eq!(read, serde_json::json!({"event_type": "OrderCreated"}));
    }
}

#[test]
fn a_member_event_type_is_seen_also_with_escaped_letters_and_twice() {
    for data in [
        &br#"{"\u0065vent_type":"Other"}"#[..],
        br#"{"event_type":"Other","event_type":"Other"}"#,
    ] {
        let written = FlatFormat.write(&envelope(), "application/json", data);
        let error = written.expect_err("nobody could read a second member of the name");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn an_envelope_is_of_the_type_and_version_by_which_its_handler_is_found() {
    let headers = Headers::builder()
        .push(header::FORMAT, "envelope")
        .and_then(|headers| headers.push(header::TYPE, "OrderCreated"))
        .and_then(|headers| headers.push(header::VERSION, "2"));
    let headers = headers.expect("within limits").build();
    let foreign = message(
        headers,
        r#"{"eventType":"OrderPaid","eventVersion":1,"data":{}}"#,
    );
    let read = Formats::default().envelope(&foreign, fallback());
    let read = read.expect("an envelope");
    assert_eq!(
        (read.event_type.as_str(), read.version),
        ("OrderCreated", 2)
    );

    let headers = Headers::builder().push(header::VERSION, "3");
    let headers = headers.expect("within limits").build();
    let flat = message(headers, r#"{"event_type":"OrderCreated"}"#);
    let read = Formats::default().envelope(&flat, fallback());
    assert_eq!(read.expect("an envelope").version, 3);
}

/// An event without fields has `null` as its data.
#[test]
fn an_envelope_whose_data_are_null_is_read_without_its_headers() {
    let formats = Formats::default();
    let (headers, payload) = EnvelopeFormat
        .write(&envelope(), "application/json", b"null")
        .expect("it is written");
    for headers in [headers, Headers::new()] {
        let message = message(headers, payload.clone());
        let known = header::KnownHeaders::of(&message.headers);
        let (found, reading) = formats.read(&message, &known).expect("it is an envelope");
        assert_eq!(found.name(), EnvelopeFormat.name());
        assert_eq!(reading.event_type, "OrderCreated");
        assert_eq!(&reading.data[..], b"null");
    }
    let without_data = message(Headers::new(), r#"{"eventType":"OrderCreated"}"#);
    let known = header::KnownHeaders::of(&without_data.headers);
    let read = formats.read(&without_data, &known);
    assert_ne!(read.map_or("none", |(found, _)| found.name()), "envelope");
}
