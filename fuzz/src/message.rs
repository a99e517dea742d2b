//! Messages as text, so that what stands in a corpus can be read and written by hand.
//!
//! ```text
//! @key: 42
//! eb-type: OrderCreated
//!
//! {"order_id":42}
//! ```
//!
//! Each line before the first empty one is a header; `@key` is the key. What follows is the payload.

use bytes::Bytes;
use eventbus_core::{Headers, Key, Message, Topic};

/// Stands between two messages.
const BETWEEN: &[u8] = b"\n====\n";

/// Words that the text of a message consists of.
pub(crate) const WORDS: &[&str] = &[
    "@key: 42\n",
    "eb-format: envelope\n",
    "eb-format: flat\n",
    "eb-format: cloudevents\n",
    "eb-format: cloudevents-binary\n",
    "ce_specversion: 1.0\n",
    "ce_id: 1\n",
    "ce_source: /shop\n",
    "ce_type: OrderCreated\n",
    "ce_time: 2026-01-01T00:00:00Z\n",
    "cloudEvents_eventversion: v2\n",
    "cloudEvents:tenant: acme\n",
    "ce-subject: order%201\n",
    "ce_metadata: {\"userId\":\"1\"}\n",
    "content-type: application/cloudevents+json\n",
    "eb-id: 0192f1c4-0000-7000-8000-000000000000\n",
    "eb-type: OrderCreated\n",
    "eb-version: 2\n",
    "eb-time: 2026-01-01T00:00:00Z\n",
    "eb-source: orders\n",
    "eb-correlation-id: 1\n",
    "eb-causation-id: 1\n",
    "eb-metadata: {\"tenant\":\"acme\"}\n",
    "eb-expires-at: 2020-01-01T00:00:00Z\n",
    "eb-not-before: 2030-01-01T00:00:00Z\n",
    "eb-to-group: billing\n",
    "eb-redrives: 4294967295\n",
    "eb-data: 10-20\n",
    "eb-headers-left-out: 1\n",
    "content-type: application/json\n",
    "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n",
    "\n\n",
    "\n====\n",
    "{\"event_type\":\"OrderCreated\"}",
    "\"event_type\"",
    "\"\\u0065vent_type\"",
    "\"eventId\":\"1\"",
    "\"eventType\":\"OrderCreated\"",
    "\"eventVersion\":\"v2\"",
    "\"timestamp\":\"2026-01-01T00:00:00Z\"",
    ",\"data\":",
    ",\"metadata\":{}",
    "\"specversion\":\"1.0\",",
    "\"id\":\"1\",\"source\":\"/shop\",\"type\":\"OrderCreated\",",
    "\"datacontenttype\":\"text/plain\",",
    "\"data_base64\":\"AAH/\"",
    "\"eventversion\":\"v2\",",
    "\"order_id\":1",
    "\"amount\":250",
    "\"currency\":\"EUR\"",
    "{}",
    "{ }",
    "null",
    "[[[[[[[[",
];

/// Reads a message; whatever is no header is left out.
pub(crate) fn read(topic: &Topic, text: &[u8]) -> Message {
    let (head, body) = match find(text, b"\n\n") {
        Some(end) => (&text[..end], &text[end + 2..]),
        None => (text, &[][..]),
    };
    let mut headers = Headers::builder().unlimited();
    let mut key = None;
    for line in head.split(|byte| *byte == b'\n') {
        let Some(colon) = find(line, b": ") else {
            continue;
        };
        let (name, value) = (&line[..colon], &line[colon + 2..]);
        match std::str::from_utf8(name) {
            Ok("@key") => key = Some(Key::new(value.to_vec())),
            Ok(name) if (1..=255).contains(&name.len()) => {
                headers = headers.push(name, value).expect("there is no limit");
            }
            _ => {}
        }
    }
    let mut message = Message::new(topic.clone(), Bytes::copy_from_slice(body));
    message.headers = headers.build();
    message.key = key;
    message
}

/// Reads messages that stand one behind the other.
pub(crate) fn read_all(topic: &Topic, mut text: &[u8]) -> Vec<Message> {
    let mut messages = Vec::new();
    while let Some(end) = find(text, BETWEEN) {
        messages.push(read(topic, &text[..end]));
        text = &text[end + BETWEEN.len()..];
    }
    messages.push(read(topic, text));
    messages
}

pub(crate) fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}
