//! A message as a record of Kafka, and back.

use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::{Bytes, BytesMut};
use eventbus_core::{Headers, HeadersBuilder, Key, Message, Result, Topic, header, lines};
use rdkafka::message::{
    BorrowedHeaders, BorrowedMessage, Header, Headers as _, Message as _, OwnedHeaders,
};
use rdkafka::producer::BaseRecord;

/// Payloads of this size and more get memory of their own: a small part of a message that is kept
/// does not keep them.
const LARGE: usize = 16 * 1024;
/// How much memory is taken at once for messages that are small.
const CHUNK: usize = 64 * 1024;

/// A message as it is given to the client, which copies it; `lines` is memory to write into.
pub(crate) fn to_record<'m>(
    message: &'m Message,
    token: usize,
    lines: &mut Vec<u8>,
) -> BaseRecord<'m, [u8], [u8], usize> {
    let mut record =
        BaseRecord::with_opaque_to(message.topic.as_str(), token).payload(message.payload.as_ref());
    if let Some(key) = &message.key {
        record = record.key(key.as_bytes());
    }
    let in_lines = lines::write(&message.headers, lines::OURS, lines);
    let rest = message.headers.iter().skip(in_lines);
    // One of that name that is not ours comes behind ours, if need be behind none: it stays what it is.
    // To the client a name ends at a NUL.
    let is_theirs = |(name, _): (&str, _)| name.split('\0').next() == Some(lines::NAME);
    if in_lines > 0 || rest.clone().any(is_theirs) {
        let ours = (lines::NAME, lines.as_slice());
        record = record.headers(owned(std::iter::once(ours).chain(rest)));
    } else if !message.headers.is_empty() {
        record = record.headers(owned(rest));
    }
    record
}

fn owned<'h>(headers: impl Iterator<Item = (&'h str, &'h [u8])>) -> OwnedHeaders {
    let owned = OwnedHeaders::new_with_capacity(4);
    headers.fold(owned, |owned, (key, value)| {
        let value = Some(value);
        owned.insert(Header { key, value })
    })
}

/// Makes messages of records; those that come one after another share memory.
#[derive(Debug)]
pub(crate) struct Reader {
    /// When it is used up, as much is taken again.
    chunk: BytesMut,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            chunk: BytesMut::with_capacity(CHUNK),
        }
    }
}

impl Reader {
    /// The message of a record.
    ///
    /// # Errors
    ///
    /// When it has headers that no message can have; Kafka has none that large.
    pub(crate) fn read(&mut self, topic: &Topic, record: &BorrowedMessage<'_>) -> Result<Message> {
        // A tombstone has no payload; what it means is for whoever reads it to say.
        let payload = self.copy(record.payload().unwrap_or_default());
        let mut message = Message::new(topic.clone(), payload);
        message.key = record.key().map(|key| Key::new(self.copy(key)));
        if let Some(headers) = record.headers() {
            message.headers = self.headers(headers, false)?;
        }
        Ok(message)
    }

    fn copy(&mut self, bytes: &[u8]) -> Bytes {
        if bytes.len() >= LARGE {
            return Bytes::copy_from_slice(bytes);
        }
        self.chunk.extend_from_slice(bytes);
        self.chunk.split().freeze()
    }

    /// The headers of a record; of those called like the one with lines, the first has them, unless
    /// all are `somebodys` else.
    fn headers(&mut self, headers: &BorrowedHeaders, somebodys: bool) -> Result<Headers> {
        let (mut has_lines, mut left_out) = (somebodys, 0_usize);
        let mut builder = HeadersBuilder::on(std::mem::take(&mut self.chunk)).unlimited();
        for index in 0..headers.count() {
            match read_header(headers, index) {
                Some((lines::NAME, lines)) if !has_lines => {
                    has_lines = true;
                    let is_block = !lines.is_empty() || has_another(headers, index + 1);
                    match lines::read(lines, lines::OURS, builder).filter(|_| is_block) {
                        Some(read) => builder = read,
                        None => {
                            self.chunk = BytesMut::with_capacity(CHUNK);
                            return self.headers(headers, true);
                        }
                    }
                }
                Some((name, value)) if (1..=255).contains(&name.len()) => {
                    builder.add(name, value)?;
                }
                _ => left_out += 1,
            }
        }
        if left_out > 0 {
            builder = builder.push(header::HEADERS_LEFT_OUT, left_out.to_string())?;
        }
        let (headers, rest) = builder.build_with_rest();
        self.chunk = rest;
        Ok(headers)
    }
}

/// Whether there is a header called like the one with lines from here on: one without lines is ours
/// only before one that is not.
fn has_another(headers: &BorrowedHeaders, from: usize) -> bool {
    let mut rest = (from..headers.count()).filter_map(|index| read_header(headers, index));
    rest.any(|(name, _)| name == lines::NAME)
}

/// One header; none where its name is no text, which the client answers with a panic.
fn read_header(headers: &BorrowedHeaders, index: usize) -> Option<(&str, &[u8])> {
    let header = catch_unwind(AssertUnwindSafe(|| headers.try_get(index)));
    let header = header.ok().flatten()?;
    Some((header.key, header.value.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name() -> impl Strategy<Value = &'static str> {
        let names = [
            "eb-id",
            "eb-type",
            "eb-headers",
            "eb-a: b",
            "eb-b\n",
            "content-type",
            "x",
        ];
        proptest::sample::select(names.to_vec())
    }

    fn value() -> impl Strategy<Value = &'static [u8]> {
        let values: [&[u8]; 6] = [
            b"",
            b"17",
            b"eb-id: 18\n",
            b"one\ntwo",
            b"\xff",
            b"eb-id: 19",
        ];
        proptest::sample::select(values.to_vec())
    }

    fn read(sent: &[(&str, &[u8])]) -> Headers {
        let sent = owned(sent.iter().copied());
        let read = Reader::default().headers(sent.as_borrowed(), false);
        read.expect("they can be read")
    }

    fn all(of: &Headers) -> Vec<(&str, &[u8])> {
        of.iter().collect()
    }

    proptest! {
        #[test]
        fn headers_come_back_as_they_were(sent in proptest::collection::vec((name(), value()), 0..7)) {
            let mut headers = Headers::builder();
            for (name, value) in &sent {
                headers = headers.push(name, value).expect("within limits");
            }
            let message = Message::new(Topic::from_static("orders"), "").with_headers(headers.build());
            let mut lines = Vec::new();
            let record = to_record(&message, 7, &mut lines);
            let read = record.headers.map(|sent| {
                Reader::default().headers(sent.as_borrowed(), false).expect("they can be read")
            });
            let read = read.unwrap_or_default();
            prop_assert_eq!(all(&read), sent);
        }
    }

    #[test]
    fn lines_are_found_wherever_somebody_put_them() {
        let read = read(&[("x", b"1"), ("eb-headers", b"eb-id: 17\neb-type: Paid\n")]);
        let expected: [(&str, &[u8]); 3] = [("x", b"1"), ("eb-id", b"17"), ("eb-type", b"Paid")];
        assert_eq!(all(&read), expected);
    }

    #[test]
    fn what_is_called_like_lines_and_has_none_is_kept() {
        for value in [&b""[..], b"text", b"x: 17\n", b"eb-id: 17\ntext"] {
            let sent = [("eb-headers", value), ("x", b"1")];
            assert_eq!(all(&read(&sent)), sent);
        }
    }
}
