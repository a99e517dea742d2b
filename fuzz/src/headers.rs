//! Packed headers, as a store keeps them, and headers built of names and values.

use bytes::Bytes;
use eventbus_core::header::KnownHeaders;
use eventbus_core::{HEADER_BYTES_MAX, HEADERS_MAX, Headers};

use crate::Target;

pub(crate) const TARGET: Target = Target {
    name: "headers",
    run,
    words: &[
        "\u{5}\u{1}\0\0\0eb-id1",
        "\u{7}\u{2}\0\0\0eb-typeAb",
        "\u{1}\0\0\0\0a",
        "\0\0\0\0\0",
        "eb-version",
        "eb-data",
    ],
    cost: 1,
};

fn run(data: &[u8]) {
    packed(data);
    built(data);
}

/// What is not whole is refused; the rest comes back, also with another header behind it.
fn packed(data: &[u8]) {
    let Ok(headers) = Headers::from_packed(Bytes::copy_from_slice(data)) else {
        return;
    };
    assert_eq!(headers.packed(), data);
    let all: Vec<_> = headers.iter().collect();
    let mut again = Headers::builder().unlimited();
    for (name, value) in &all {
        assert!(headers.get(name).is_some(), "{name:?} is not found");
        again = again.push(name, value).expect("it was one before");
    }
    assert_eq!(again.build(), headers, "a header is lost");
    let more = headers.to_builder().unlimited();
    let more = more.push("last", "value").expect("there is no limit");
    let more = more.build();
    assert_eq!(more.iter().count(), all.len() + 1);
    assert_eq!(more.iter().last(), Some(("last", &b"value"[..])));
    let known = KnownHeaders::of(&headers);
    if let Some(id) = known.id() {
        assert!(all.contains(&("eb-id", id.as_bytes())));
    }
}

/// What is pushed is there, in order; what is refused breaks a limit.
fn built(data: &[u8]) {
    let mut expected: Vec<(&str, &[u8])> = Vec::new();
    let mut headers = Headers::builder();
    for line in data.split(|byte| *byte == b'\n') {
        let (name, value) = line.split_at(line.len().min(usize::from(line.len() as u8 / 2)));
        let Ok(name) = std::str::from_utf8(name) else {
            continue;
        };
        let fits = (1..=255).contains(&name.len())
            && value.len() <= HEADER_BYTES_MAX
            && expected.len() < HEADERS_MAX;
        match headers.push(name, value) {
            Ok(more) => {
                assert!(fits, "a header beyond the limits");
                headers = more;
                expected.push((name, value));
            }
            Err(_) => {
                assert!(!fits, "a header within the limits is refused");
                return;
            }
        }
    }
    let headers = headers.build();
    assert_eq!(headers.iter().collect::<Vec<_>>(), expected);
    let again = Headers::from_packed(headers.packed().clone());
    assert_eq!(again.expect("the builder packs whole headers"), headers);
}
