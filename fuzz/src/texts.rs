//! Short texts that are read everywhere: names, ids, times. What is read is written as it was.

use std::fmt::Display;
use std::str::FromStr;

use eventbus_core::{EventId, Group, Key, MemberId, ProcessId, Timestamp, Topic, partition_of};

use crate::Target;

pub(crate) const TARGET: Target = Target {
    name: "texts",
    run,
    words: &[
        "2026-01-01T00:00:00Z",
        "2026-01-01T00:00:00.123456789+23:59",
        "9999-12-31T23:59:59-23:59",
        "0000-01-01T00:00:00Z",
        "2016-12-31T23:59:60Z",
        "9223372036854775807us",
        "0192f1c4-0000-7000-8000-000000000000",
        "{0192f1c4-0000-7000-8000-000000000000}",
        "urn:uuid:0192f1c4-0000-7000-8000-000000000000",
        "boot/1/2",
        "orders.billing.dlq",
    ],
    cost: 1,
};

fn run(data: &[u8]) {
    let key = Key::new(data.to_vec());
    assert!(partition_of(&key, 7) < 7);
    // Shown whatever its bytes are.
    drop(format!("{key} {key:?}"));
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    comes_back::<Timestamp>(text);
    comes_back::<MemberId>(text);
    comes_back::<ProcessId>(text);
    if let Ok(id) = EventId::parse(text) {
        assert_eq!(id.to_string(), text);
        assert_eq!(EventId::parse(&id.to_string()).ok(), Some(id));
    }
    if let Ok(topic) = Topic::new(text) {
        assert_eq!(topic.as_str(), text);
    }
    assert_eq!(Topic::new(text).is_ok(), Group::new(text).is_ok());
    if let Ok(process) = text.parse::<ProcessId>() {
        // Whatever it says, this process is not the dead one.
        let is_this = process == ProcessId::current();
        assert!(!is_this || !process.is_dead());
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        let later = time.plus(std::time::Duration::MAX);
        assert!(later >= time && time.since(later).is_zero());
    }
}

fn comes_back<T: FromStr + Display + PartialEq + std::fmt::Debug>(text: &str) {
    let Ok(read) = text.parse::<T>() else {
        return;
    };
    let written = read.to_string();
    let again = written.parse::<T>().ok();
    assert_eq!(
        again.as_ref(),
        Some(&read),
        "{text:?} was written {written:?}"
    );
}
