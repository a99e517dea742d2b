//! CloudEvents as others write them, and what is wrong with some.

use std::path::PathBuf;
use std::sync::Arc;

use eventbus_core::{ErrorKind, FlatFormat, Formats, Headers, Message, Timestamp, header};
use serde_json::{Value, json};

use super::{JSON, Seen, headers, see};
use crate::formats::{fallback, message};

fn golden_json(name: &str) -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let text = std::fs::read_to_string(path.join(name)).expect("the golden file is there");
    serde_json::from_str(&text).expect("JSON")
}

/// A message as the script has it.
fn message_of(sent: &Value) -> Message {
    let pairs = sent["headers"].as_object().expect("headers");
    let pairs = pairs
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str().expect("text")));
    let payload = match sent["bytes"].as_str() {
        Some(hex) => (0..hex.len() / 2)
            .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("hexadecimal"))
            .collect(),
        None => sent["payload"]
            .as_str()
            .expect("a payload")
            .to_owned()
            .into_bytes(),
    };
    message(headers(&pairs.collect::<Vec<_>>()), payload)
}

/// What every event of the script says.
fn assert_is_of_the_sdk(name: &str, seen: &Seen) {
    let envelope = &seen.envelope;
    assert_eq!(
        (&*envelope.event_type, envelope.version),
        ("OrderCreated", 1),
        "{name}"
    );
    assert_eq!(envelope.source, "/shop/orders", "{name}");
    let metadata = &envelope.metadata;
    assert_eq!(metadata["tenant"], "Zürich & Söhne", "{name}");
    assert_eq!(metadata["subject"], "order/123", "{name}");
    assert_eq!(metadata["sampledrate"], "30", "{name}");
    assert_eq!(
        metadata.len(),
        if name == "kafka_structured" { 4 } else { 3 },
        "{name}"
    );
    // AMQP has a time of its own, of milliseconds.
    let micros = if name.starts_with("amqp_binary") {
        123_000
    } else {
        123_456
    };
    let time = Timestamp::from_micros(1_795_244_400_000_000 + micros);
    assert_eq!(envelope.time, time, "{name}");
    let is_structured = name.contains("structured");
    assert_eq!(
        seen.format,
        if is_structured {
            "cloudevents"
        } else {
            "cloudevents-binary"
        },
        "{name}"
    );
}

#[test]
fn events_of_the_python_sdk_are_read_in_every_mode_and_binding() {
    let golden = golden_json("cloudevents_sdk.json");
    let golden = golden.as_object().expect("messages by name");
    assert_eq!(golden.len(), 10);
    for (name, sent) in golden {
        let seen = see(&message_of(sent)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_is_of_the_sdk(name, &seen);
        let (content_type, data) = match name.as_str() {
            "kafka_structured_bytes" => ("application/avro", &b"\0\x01\xff"[..]),
            "kafka_binary_bytes" => ("application/avro", &b"\0\x01\x7f"[..]),
            "kafka_structured_text" => ("text/plain", &b"12 glasses"[..]),
            _ => {
                let data: Value = serde_json::from_slice(&seen.data).expect("JSON");
                assert_eq!(
                    data,
                    json!({"order_id": 123, "amount": 250, "note": "zwölf Gläser ☕"})
                );
                (JSON, &seen.data[..])
            }
        };
        assert_eq!(
            (seen.content_type.as_deref(), &seen.data[..]),
            (Some(content_type), data),
            "{name}"
        );
        let id = seen.envelope.id.to_string();
        match name.as_str() {
            "kafka_structured" | "kafka_binary" => {
                assert_eq!(id, "5c1b2f0e-9a63-4f0e-8f5e-0a3f7c9d1b22");
                assert_eq!(seen.envelope.correlation_id, "request-7");
                assert_eq!(
                    seen.envelope.causation_id.as_deref(),
                    Some("A234-1234-1233")
                );
            }
            _ => assert_eq!(id, "/shop/orders A234-1234-1234"),
        }
    }
}

#[test]
fn an_event_of_dapr_is_known_by_its_body_alone() {
    let body = serde_json::to_vec(&golden_json("cloudevents_dapr.json")).expect("JSON");
    for said in [headers(&[]), headers(&[("content-type", "text/plain")])] {
        let seen = see(&message(said, body.clone())).expect("it is read");
        assert_eq!(seen.format, "cloudevents");
        assert_eq!(seen.envelope.event_type, "com.dapr.event.sent");
        assert_eq!(
            seen.envelope.id.to_string(),
            "7b6d4c3e-0f61-4b87-9d0a-52ad3c5f8a11"
        );
        assert_eq!(seen.envelope.source, "checkout");
        assert_eq!(seen.envelope.time.as_micros(), 1_795_244_400_000_000);
        assert_eq!(seen.envelope.metadata["pubsubname"], "orders-pubsub");
        let data: Value = serde_json::from_slice(&seen.data).expect("JSON");
        assert_eq!(data, json!({"order_id": 123, "amount": 250}));
    }
}

pub(super) const MINIMAL: [(&str, &str); 4] = [
    ("ce_specversion", "1.0"),
    ("ce_id", "7"),
    ("ce_source", "/shop"),
    ("ce_type", "OrderCreated"),
];

#[test]
fn ids_of_two_sources_are_two_ids() {
    let of = |source: &str, id: &str| {
        let mut said = MINIMAL;
        said[1].1 = id;
        said[2].1 = source;
        see(&message(headers(&said), "{}"))
            .expect("it is read")
            .envelope
            .id
    };
    assert_ne!(
        of("/a", "partition:0/offset:7"),
        of("/b", "partition:0/offset:7")
    );
    assert_eq!(of("/a", "7"), of("/a", "7"));
    assert_ne!(of("a b", "c"), of("a", "b c"));
    let long = "x".repeat(300);
    assert_ne!(of("/a", &long), of("/b", &long));
    let uuid = "5C1B2F0E-9A63-4F0E-8F5E-0A3F7C9D1B22";
    assert_eq!(of("/a", uuid).to_string(), uuid);
}

#[test]
fn the_headers_decide_before_what_the_data_look_like() {
    for body in [
        r#"{"event_type":"Other"}"#,
        r#"{"eventType":"Other","data":{}}"#,
        r#"{"specversion":"1.0","id":"x"}"#,
        "",
    ] {
        let said = message(headers(&MINIMAL), body);
        for formats in [
            Formats::default(),
            Formats::default().with(Arc::new(FlatFormat)),
        ] {
            let known = header::KnownHeaders::of(&said.headers);
            let (format, reading) = formats.read(&said, &known).expect(body);
            assert_eq!(format.name(), "cloudevents-binary");
            assert_eq!(reading.data, body);
        }
    }
}

#[test]
fn a_member_called_like_an_attribute_makes_no_cloud_event() {
    for (body, format) in [
        (
            r#"{"event_type":"SpecReleased","specversion":"1.0"}"#,
            "flat",
        ),
        (
            r#"{"eventType":"X","specversion":"1.0","data":{}}"#,
            "envelope",
        ),
        (
            r#"{"eventType":"X","data":{"specversion":"1.0","id":"1","type":"t"}}"#,
            "envelope",
        ),
    ] {
        let seen = see(&message(Headers::new(), body)).expect(body);
        assert_eq!(seen.format, format);
    }
}

#[test]
fn what_is_wrong_with_a_cloud_event_is_said() {
    let json = [(
        "content-type",
        "application/cloudevents+json; charset=UTF-8",
    )];
    let body = |change: &dyn Fn(&mut Value)| {
        let mut event =
            json!({"specversion": "1.0", "id": "7", "source": "/shop", "type": "OrderCreated"});
        change(&mut event);
        message(headers(&json), event.to_string())
    };
    assert!(see(&body(&|_| {})).is_ok());
    let no_time = see(&body(&|event| event["time"] = Value::Null)).expect("null is none");
    assert_eq!(no_time.envelope.time, fallback().1);
    assert_eq!(no_time.data, "");

    let mut wrong: Vec<(&str, Message)> = Vec::new();
    for name in ["specversion", "id", "source", "type"] {
        wrong.push((
            "missing",
            body(&|event| drop(event.as_object_mut().expect("one").remove(name))),
        ));
        wrong.push(("missing", body(&|event| event[name] = "".into())));
        wrong.push(("text", body(&|event| event[name] = 7.into())));
        let fewer: Vec<_> = MINIMAL
            .into_iter()
            .filter(|(it, _)| !it.ends_with(name))
            .collect();
        let text = if name == "specversion" {
            "no format claims it"
        } else {
            "missing"
        };
        wrong.push((text, message(headers(&fewer), "{}")));
    }
    wrong.extend([
        (
            "not read",
            body(&|event| event["specversion"] = "0.3".into()),
        ),
        (
            "RFC 3339",
            body(&|event| event["time"] = "yesterday".into()),
        ),
        (
            "a version is",
            body(&|event| event["eventversion"] = "new".into()),
        ),
        ("base64", body(&|event| event["data_base64"] = "?".into())),
        (
            "both",
            body(&|event| {
                event["data"] = 1.into();
                event["data_base64"] = "AA==".into();
            }),
        ),
        ("JSON object", message(headers(&json), "[]")),
        ("JSON object", message(headers(&json), "")),
        (
            "batch",
            message(
                headers(&[("Content-Type", "application/cloudevents-batch+json")]),
                "[]",
            ),
        ),
        (
            "JSON alone",
            message(
                headers(&[("content-type", "Application/CloudEvents+protobuf")]),
                "{}",
            ),
        ),
    ]);
    for (text, message) in wrong {
        let error = see(&message)
            .err()
            .unwrap_or_else(|| panic!("{message:?} is read"));
        assert_eq!(error.kind(), ErrorKind::Codec, "{message:?}");
        assert!(error.to_string().contains(text), "{error} of {message:?}");
    }
}
