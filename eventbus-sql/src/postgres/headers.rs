//! A message as values of a row, and back. Pure: no database is touched here.

use bytes::{Bytes, BytesMut};
use eventbus_core::log::Unpacked;
use eventbus_core::{Headers, Key, Message, Result, Timestamp, Topic};
use sqlx::Row;
use sqlx::postgres::PgRow;

/// Messages of a statement, as arrays with a value for each row.
#[derive(Debug, Default)]
pub(super) struct Columns<'m> {
    pub(super) lanes: Vec<i32>,
    /// How many messages of its lane are before it.
    pub(super) offsets: Vec<i64>,
    pub(super) keys: Vec<Option<&'m [u8]>>,
    pub(super) headers: Vec<&'m [u8]>,
    pub(super) payloads: Vec<&'m [u8]>,
    /// Each lane once, with how many messages and bytes it gets.
    pub(super) lane_ids: Vec<i32>,
    pub(super) lane_counts: Vec<i64>,
    pub(super) lane_bytes: Vec<i64>,
}

impl<'m> Columns<'m> {
    /// Adds a message; those of a lane come one after the other.
    pub(super) fn push(&mut self, lane: u32, message: &'m Message) {
        let lane = lane as i32;
        if self.lane_ids.last() != Some(&lane) {
            self.lane_ids.push(lane);
            self.lane_counts.push(0);
            self.lane_bytes.push(0);
        }
        let last = self.lane_ids.len() - 1;
        self.lanes.push(lane);
        self.offsets.push(self.lane_counts[last]);
        self.keys.push(message.key.as_ref().map(Key::as_bytes));
        self.headers.push(message.headers.packed());
        self.payloads.push(&message.payload);
        self.lane_counts[last] += 1;
        self.lane_bytes[last] += message.size() as i64;
    }
}

/// Where the parts of one row lie in the bytes of its page.
#[derive(Debug)]
pub(super) struct Packed {
    lane: u32,
    position: u64,
    time: Timestamp,
    /// The ends of key, headers and payload; no end where there is no key.
    start: usize,
    key: Option<usize>,
    headers: usize,
    payload: usize,
}

/// Rows of a page: their bytes are copied once, behind each other.
#[derive(Debug, Default)]
pub(super) struct Packer {
    bytes: BytesMut,
    rows: Vec<Packed>,
}

impl Packer {
    /// Adds a row of `lane, position, taken, key, headers, payload`.
    pub(super) fn push(&mut self, row: &PgRow) -> Result<(), sqlx::Error> {
        let (lane, position): (i32, i64) = (row.try_get(0)?, row.try_get(1)?);
        let time = Timestamp::from_micros(row.try_get(2)?);
        let start = self.bytes.len();
        let key: Option<&[u8]> = row.try_get(3)?;
        self.bytes.extend_from_slice(key.unwrap_or_default());
        let key = key.map(|_| self.bytes.len());
        self.bytes.extend_from_slice(row.try_get(4)?);
        let headers = self.bytes.len();
        self.bytes.extend_from_slice(row.try_get(5)?);
        self.rows.push(Packed {
            // Neither is ever negative: the broker counts them from 0.
            lane: lane as u32,
            position: position as u64,
            time,
            start,
            key,
            headers,
            payload: self.bytes.len(),
        });
        Ok(())
    }

    pub(super) fn finish(self) -> (Bytes, Vec<Packed>) {
        (self.bytes.freeze(), self.rows)
    }
}

impl Packed {
    pub(super) fn lane(&self) -> u32 {
        self.lane
    }

    pub(super) fn position(&self) -> u64 {
        self.position
    }

    pub(super) fn unpack(&self, topic: &Topic, page: &Bytes) -> Result<Unpacked> {
        let headers = self.key.unwrap_or(self.start)..self.headers;
        let headers = Headers::from_packed(page.slice(headers)).map_err(|error| {
            let error = error.with("topic", topic);
            error.with("position", self.position)
        })?;
        let payload = page.slice(self.headers..self.payload);
        let mut message = Message::new(topic.clone(), payload).with_headers(headers);
        message.key = self.key.map(|end| Key::new(page.slice(self.start..end)));
        Ok(Unpacked {
            position: self.position.into(),
            time: self.time,
            size: self.payload - self.start,
            message,
        })
    }
}
