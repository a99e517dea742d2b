//! A message as a record of Kafka, and back.

use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::{Bytes, BytesMut};
use eventbus_core::{Headers, HeadersBuilder, Key, Message, Result, Topic, header};
use rdkafka::message::{
    BorrowedHeaders, BorrowedMessage, Header, Headers as _, Message as _, OwnedHeaders,
};
use rdkafka::producer::BaseRecord;

use crate::lines;

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
    let in_lines = lines::write(&message.headers, lines);
    let rest = message.headers.iter().skip(in_lines);
    // One of that name that is not ours is not the first, so that it stays what it is.
    if in_lines > 0 || rest.clone().any(|(name, _)| name == lines::NAME) {
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
            message.headers = self.headers(headers)?;
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

    fn headers(&mut self, headers: &BorrowedHeaders) -> Result<Headers> {
        let mut left_out = 0_usize;
        let mut builder = HeadersBuilder::on(std::mem::take(&mut self.chunk)).unlimited();
        let mut first = 0;
        if let Some((lines::NAME, lines)) = read_header(headers, 0) {
            let read = lines::read(lines, builder);
            first = usize::from(read.is_some());
            builder = read.unwrap_or_else(|| HeadersBuilder::default().unlimited());
        }
        for index in first..headers.count() {
            match read_header(headers, index) {
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

/// One header; none where its name is no text, which the client answers with a panic.
fn read_header(headers: &BorrowedHeaders, index: usize) -> Option<(&str, &[u8])> {
    let header = catch_unwind(AssertUnwindSafe(|| headers.try_get(index)));
    let header = header.ok().flatten()?;
    Some((header.key, header.value.unwrap_or_default()))
}
