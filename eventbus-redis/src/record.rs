//! A message as an entry of a stream, and back. No connection is here.
//!
//! | field | holds |
//! | --- | --- |
//! | `data` | the payload; Dapr calls it so, too |
//! | `key` | the key, where there is one |
//! | `eb-headers` | headers, a line `name: value` for each |
//! | `h:NAME` | a header that is not text of one line |
//! | `metadata` | headers as somebody else writes them: a JSON object of texts |
//!
//! An entry without `data` is somebody else's: its fields are headers of an empty message.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use eventbus_core::{Headers, HeadersBuilder, Key, Message, Topic, header, lines};
use redis::{Cmd, Value};

const DATA: &str = "data";
const KEY: &str = "key";
const METADATA: &str = "metadata";
const HEADER: &str = "h:";

/// The command that adds a message to a stream; `text` is memory to write into.
pub(crate) fn add(stream: &str, message: &Message, text: &mut Vec<u8>) -> Cmd {
    let in_lines = lines::write(&message.headers, b"", text);
    let key = message.key.as_ref().map_or(0, |key| key.as_bytes().len());
    let mut cmd = Cmd::with_capacity(9, message.payload.len() + key + text.len() + 128);
    cmd.arg("XADD").arg(stream).arg("*");
    cmd.arg(DATA).arg(&message.payload[..]);
    if let Some(key) = &message.key {
        cmd.arg(KEY).arg(key.as_bytes());
    }
    if in_lines > 0 {
        cmd.arg(lines::NAME).arg(&text[..]);
    }
    for (name, value) in message.headers.iter_bytes().skip(in_lines) {
        cmd.arg([HEADER.as_bytes(), name].concat()).arg(value);
    }
    cmd
}

/// What messages that are read one after the other share memory by, and what has memory of its own.
const CHUNK: usize = 64 * 1024;
const LARGE: usize = 2 * 1024;

/// Makes messages of entries.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// When it is used up, as much is taken again.
    chunk: BytesMut,
}

impl Reader {
    /// A message as an entry's fields say, in whatever order they come. Fields that nothing reads here
    /// become headers of their own name.
    pub(crate) fn read(&mut self, topic: &Topic, fields: Vec<Value>) -> Message {
        let mut entry = Entry::default();
        let mut fields = fields.into_iter();
        while let (Some(Value::BulkString(name)), Some(value)) = (fields.next(), fields.next()) {
            let Value::BulkString(value) = value else {
                continue;
            };
            entry.take(name, value);
        }
        entry.into_message(topic, self)
    }

    /// Memory that is left of what was taken.
    fn memory(&mut self) -> BytesMut {
        let chunk = std::mem::take(&mut self.chunk);
        match chunk.capacity() < LARGE {
            true => BytesMut::with_capacity(CHUNK),
            false => chunk,
        }
    }

    fn keep(&mut self, bytes: Vec<u8>) -> Bytes {
        if bytes.len() >= LARGE {
            return bytes.into();
        }
        let mut chunk = self.memory();
        chunk.extend_from_slice(&bytes);
        let kept = chunk.split().freeze();
        self.chunk = chunk;
        kept
    }
}

#[derive(Default)]
struct Entry {
    data: Option<Vec<u8>>,
    key: Option<Vec<u8>>,
    lines: Option<Vec<u8>>,
    metadata: Option<Vec<u8>>,
    others: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    fn take(&mut self, name: Vec<u8>, value: Vec<u8>) {
        let place = match name.as_slice() {
            b"data" => &mut self.data,
            b"key" => &mut self.key,
            b"eb-headers" => &mut self.lines,
            b"metadata" => &mut self.metadata,
            _ => return self.others.push((name, value)),
        };
        match place {
            None => *place = Some(value),
            // A field that comes twice is somebody's own.
            Some(_) => self.others.push((name, value)),
        }
    }

    fn into_message(mut self, topic: &Topic, reader: &mut Reader) -> Message {
        let is_whole = self.data.is_some();
        let mut headers = HeadersBuilder::on(reader.memory()).unlimited();
        if let Some(text) = self.lines.take() {
            headers = match lines::read(&text, b"", headers) {
                Some(read) => read,
                None => {
                    self.others.push((lines::NAME.into(), text));
                    Headers::builder().unlimited()
                }
            };
        }
        if let Some(text) = self.metadata.take() {
            match serde_json::from_slice::<BTreeMap<String, String>>(&text) {
                Ok(metadata) => {
                    let of_metadata = |(name, value): (String, String)| (name.into(), value.into());
                    self.others.extend(metadata.into_iter().map(of_metadata));
                }
                Err(_) => self.others.push((METADATA.into(), text)),
            }
        }
        if let Some(key) = self.key.take_if(|_| !is_whole) {
            self.others.push((KEY.into(), key));
        }
        let mut left_out = 0_u64;
        for (name, value) in &self.others {
            left_out += u64::from(!push(&mut headers, name, value));
        }
        if left_out > 0 {
            push(
                &mut headers,
                header::HEADERS_LEFT_OUT.as_bytes(),
                left_out.to_string().as_bytes(),
            );
        }
        let (headers, rest) = headers.build_with_rest();
        reader.chunk = rest;
        let payload = self.data.map_or_else(Bytes::new, |data| reader.keep(data));
        let mut message = Message::new(topic.clone(), payload).with_headers(headers);
        message.key = self.key.map(|key| Key::new(reader.keep(key)));
        message
    }
}

/// Adds a header, if its name can be one.
fn push(headers: &mut HeadersBuilder, name: &[u8], value: &[u8]) -> bool {
    let name = name.strip_prefix(HEADER.as_bytes()).unwrap_or(name);
    let name = std::str::from_utf8(name).ok();
    name.is_some_and(|name| headers.add(name, value).is_ok())
}
