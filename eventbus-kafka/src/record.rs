//! A message as a record of Kafka, and back.

use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::{Bytes, BytesMut};
use eventbus_core::{Headers, HeadersBuilder, Key, Message, Result, Topic, header};
use rdkafka::message::{
    BorrowedHeaders, BorrowedMessage, Header, Headers as _, Message as _, OwnedHeaders,
};
use rdkafka::producer::BaseRecord;

/// Payloads of this size and more get memory of their own: a small part of a message that is kept
/// does not keep them.
const LARGE: usize = 16 * 1024;
/// How much memory is taken at once for messages that are small.
const CHUNK: usize = 64 * 1024;

/// A message as it is given to the client, which copies it.
pub(crate) fn to_record(message: &Message, token: usize) -> BaseRecord<'_, [u8], [u8], usize> {
    let mut record =
        BaseRecord::with_opaque_to(message.topic.as_str(), token).payload(message.payload.as_ref());
    if let Some(key) = &message.key {
        record = record.key(key.as_bytes());
    }
    if !message.headers.is_empty() {
        let mut headers = OwnedHeaders::new_with_capacity(12);
        for (name, value) in message.headers.iter() {
            headers = headers.insert(Header {
                key: name,
                value: Some(value),
            });
        }
        record = record.headers(headers);
    }
    record
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
        for index in 0..headers.count() {
            match read_header(headers, index) {
                Some((name, value)) if (1..=255).contains(&name.len()) => {
                    builder = builder.push(name, value)?;
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
