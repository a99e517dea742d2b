//! Dead letters that a broker does not take whole: too large, or with too many headers. Their bytes
//! stand in several records before the letter, and the desk joins them.
//!
//! Each part has the letter's id and its place among the bytes as headers. The letter comes last,
//! without payload, and says how many bytes there are, so that one that is seen is complete. All of
//! them have the letter's id as key: the original key may be what the broker refused. The bytes:
//!
//! ```text
//! key length (u32, little endian; all ones: no key) · key · headers' length · headers · payload
//! ```

use std::collections::BTreeMap;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::letter::DeadLetter;
use super::record::{LETTER, PART, STATUS, WHOLE, original_key, original_name};
use crate::broker::{Outcome, PublishError};
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Headers, Key, Message};

const NO_KEY: u32 = u32::MAX;

/// The records of a letter that was refused for what it is, or the error when it is another one.
pub(crate) fn in_parts(
    refused: PublishError,
    message_bytes_max: usize,
) -> Result<Vec<Message>, PublishError> {
    let [unpublished] = refused.unpublished.as_slice() else {
        return Err(refused);
    };
    if unpublished.outcome != Outcome::NotTaken
        || unpublished.error.kind() != ErrorKind::InvalidInput
    {
        return Err(refused);
    }
    split(&unpublished.message, message_bytes_max).ok_or(refused)
}

/// The parts of `letter` and itself, or `None` when it is no letter or none of it would fit.
fn split(letter: &Message, message_bytes_max: usize) -> Option<Vec<Message>> {
    let id = letter.headers.get_str(LETTER)?;
    let is_letter = [STATUS, PART, WHOLE]
        .iter()
        .all(|name| letter.headers.get(name).is_none());
    if !is_letter {
        return None;
    }
    let (mut original, mut own) = (Headers::builder().unlimited(), Headers::builder());
    for (name, value) in letter.headers.iter() {
        match original_name(name) {
            None => own = own.push(name, value).ok()?,
            Some(name) => original = original.push(&name, value).ok()?,
        }
    }
    let mut bytes = whole(original_key(letter), &original.build(), &letter.payload)?;
    let total = bytes.len();
    let record = |headers: Headers, payload: Bytes| {
        Message::new(letter.topic.clone(), payload)
            .with_key(id)
            .with_headers(headers)
    };
    let part = |offset: usize, payload: Bytes| {
        let headers = Headers::builder()
            .push(LETTER, id)
            .and_then(|headers| headers.push(PART, offset.to_string()));
        Some(record(headers.ok()?.build(), payload))
    };
    // No part has a longer offset than this one.
    let room = message_bytes_max.checked_sub(part(total, Bytes::new())?.size())?;
    let letter = record(
        own.push(WHOLE, total.to_string()).ok()?.build(),
        Bytes::new(),
    );
    if room == 0 || letter.size() > message_bytes_max {
        return None;
    }
    let mut records = Vec::with_capacity(total / room + 2);
    while !bytes.is_empty() {
        let payload = bytes.split_to(room.min(bytes.len()));
        records.push(part(total - bytes.len() - payload.len(), payload)?);
    }
    records.push(letter);
    Some(records)
}

/// The bytes that the parts share out.
fn whole(key: Option<&Key>, headers: &Headers, payload: &[u8]) -> Option<Bytes> {
    let (length, key) = match key {
        None => (NO_KEY, &[][..]),
        Some(key) => (u32::try_from(key.as_bytes().len()).ok()?, key.as_bytes()),
    };
    let mut bytes = BytesMut::with_capacity(8 + key.len() + headers.packed_len() + payload.len());
    bytes.put_u32_le(length);
    bytes.put_slice(key);
    bytes.put_u32_le(u32::try_from(headers.packed_len()).ok()?);
    bytes.put_slice(headers.packed());
    bytes.put_slice(payload);
    Some(bytes.freeze())
}

/// The parts of one letter as they are found, by their places. A part stored twice counts once.
#[derive(Debug, Default)]
pub(super) struct Parts(BTreeMap<usize, Bytes>);

impl Parts {
    pub(super) fn add(&mut self, offset: usize, bytes: Bytes) {
        let part = self.0.entry(offset).or_default();
        // Of two attempts the shorter part would leave a hole, where the other parts are those of
        // the longer one.
        if bytes.len() > part.len() {
            *part = bytes;
        }
    }

    /// Gives `letter` the key, headers and payload that it was published with.
    ///
    /// # Errors
    ///
    /// `Codec` when parts are missing or are not what they should be.
    pub(super) fn complete(self, letter: &mut DeadLetter) -> Result<()> {
        let damaged = || {
            Error::new(
                ErrorKind::Codec,
                "read dead letter",
                "parts of its bytes are missing or damaged: look at the retention of the dead-letter topic",
            )
            .with("id", &letter.id)
        };
        let total = letter.whole.unwrap_or_default();
        let joined = self.join(total).and_then(unpack);
        let (key, headers, payload) = joined.ok_or_else(damaged)?;
        letter.message.key = key;
        letter.message.headers = headers;
        letter.message.payload = payload;
        Ok(())
    }

    fn join(self, total: usize) -> Option<Bytes> {
        let mut bytes = BytesMut::new();
        for (offset, part) in self.0 {
            // Parts of several attempts may overlap; they are cut from the same bytes.
            let known = bytes.len().checked_sub(offset)?;
            bytes.extend_from_slice(part.get(known..).unwrap_or_default());
        }
        (bytes.len() == total).then(|| bytes.freeze())
    }
}

fn unpack(mut bytes: Bytes) -> Option<(Option<Key>, Headers, Bytes)> {
    let key = match length(&mut bytes)? {
        NO_KEY => None,
        length => Some(Key::new(field(&mut bytes, length)?)),
    };
    let length = length(&mut bytes)?;
    let headers = Headers::from_packed(field(&mut bytes, length)?).ok()?;
    Some((key, headers, bytes))
}

fn length(bytes: &mut Bytes) -> Option<u32> {
    Some(field(bytes, 4)?.get_u32_le())
}

fn field(bytes: &mut Bytes, length: u32) -> Option<Bytes> {
    let length = usize::try_from(length).ok()?;
    (bytes.len() >= length).then(|| bytes.split_to(length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::Unpublished;
    use crate::message::Topic;

    fn letter(key: Option<Key>, bytes: usize) -> Message {
        let headers = Headers::builder()
            .push("trace", [0u8, 255])
            .and_then(|headers| headers.push(LETTER, "7"));
        let payload: Vec<u8> = (0..bytes).map(|byte| byte as u8).collect();
        let mut letter = Message::new(Topic::from_static("orders.billing.dlq"), payload)
            .with_headers(headers.expect("within limits").build());
        letter.key = key;
        letter
    }

    /// Joins what `records` hold, in any order and with repetitions.
    fn joined(records: &[&Message], total: usize) -> Option<(Option<Key>, Headers, Bytes)> {
        let mut parts = Parts::default();
        for record in records {
            let offset = record.headers.get_str(PART).expect("a part");
            parts.add(offset.parse().expect("a number"), record.payload.clone());
        }
        parts.join(total).and_then(unpack)
    }

    #[test]
    fn parts_fit_and_join_to_the_original_also_when_cut_anew() {
        for (key, bytes) in [
            (None, 0),
            (Some(Key::from("k")), 1),
            (Some(Key::new(vec![7; 5000])), 2000),
        ] {
            let letter = letter(key, bytes);
            let once = split(&letter, 200).expect("it can be split");
            let again = split(&letter, 333).expect("it can be split");
            assert!(once.iter().all(|record| record.check(200).is_ok()));
            let (last, parts) = once.split_last().expect("there is a letter");
            let total = last.headers.get_str(WHOLE).expect("it says how many");
            let total = total.parse().expect("a number");
            let all: Vec<_> = again[..again.len() - 1].iter().chain(parts).rev().collect();
            let (key, headers, payload) = joined(&all, total).expect("all is there");
            assert_eq!((&key, &payload), (&letter.key, &letter.payload));
            assert_eq!(headers.get("trace"), Some(&[0u8, 255][..]));
            assert!(headers.get(LETTER).is_none());
            for missing in 0..parts.len() {
                let mut some: Vec<_> = parts.iter().collect();
                some.remove(missing);
                assert!(joined(&some, total).is_none(), "without {missing}");
            }
        }
    }

    #[test]
    fn a_shorter_part_of_another_attempt_leaves_no_hole() {
        let letter = letter(Some(Key::from("k")), 1000);
        let whole = split(&letter, 333).expect("it can be split");
        let begun = split(&letter, 200).expect("it can be split");
        let (last, parts) = whole.split_last().expect("there is a letter");
        let total = last.headers.get_str(WHOLE).expect("it says how many");
        let total = total.parse().expect("a number");
        // The other attempt ended after its first part.
        for all in [
            parts.iter().chain(&begun[..1]).collect::<Vec<_>>(),
            begun[..1].iter().chain(parts).collect(),
        ] {
            let (_, _, payload) = joined(&all, total).expect("all is there");
            assert_eq!(payload, letter.payload);
        }
    }

    #[test]
    fn only_letters_that_are_refused_for_what_they_are_are_split() {
        let refused = |message, outcome, kind| {
            let error = Error::new(kind, "publish", "as the test asked for");
            PublishError::new(vec![Unpublished::new(0, message, outcome, error)])
        };
        let (not_taken, invalid) = (Outcome::NotTaken, ErrorKind::InvalidInput);
        let is_split = |error| in_parts(error, 200).is_ok();
        assert!(is_split(refused(letter(None, 300), not_taken, invalid)));
        let unknown = refused(letter(None, 300), Outcome::Unknown, invalid);
        assert!(!is_split(unknown));
        let away = refused(letter(None, 300), not_taken, ErrorKind::Unavailable);
        assert!(!is_split(away));
        let event = Message::new(Topic::from_static("orders"), vec![0; 300]);
        assert!(!is_split(refused(event, not_taken, invalid)));
        let part = split(&letter(None, 300), 200)
            .expect("it can be split")
            .remove(0);
        assert!(!is_split(refused(part, not_taken, invalid)));
        assert!(in_parts(refused(letter(None, 300), not_taken, invalid), 20).is_err());
    }
}
