//! A message as a row, and back. Pure: no database is touched here.
//!
//! ```text
//! id      = lane << 44 | position
//! head    = checksum (4) · time in microseconds (8) · key length (2, 65535: no key)
//!           · length of packed headers (4) · payload length (4) · key · packed headers
//! payload = payload
//! ```
//!
//! Numbers are little endian. The checksum (CRC-32) covers everything behind it, the payload, the
//! id, and the names that stand in columns beside it, such as the topic of a message in the outbox, so
//! that a row is neither changed nor moved without notice. The lengths let rows that were read as one
//! value be told apart.

use bytes::Bytes;
use crc32fast::Hasher;
use eventbus_core::{Error, ErrorKind, Headers, KEY_BYTES_MAX, Key, Message, Timestamp, Topic};

use eventbus_core::log::Unpacked;

/// Bits of an id that are the position.
const POSITION_BITS: u32 = 44;
/// The first position that a lane cannot have.
pub(super) const POSITION_END: u64 = 1 << POSITION_BITS;
/// The first lane there cannot be: of the last one the end would be no id any more.
pub(super) const LANE_END: u32 = (1 << (63 - POSITION_BITS)) - 1;

const CHECKSUM: usize = 4;
const TIME: usize = 8;
/// Bytes of a head beside key and headers.
pub(super) const HEAD_FIXED: usize = CHECKSUM + TIME + 2 + 4 + 4;
const NO_KEY: u16 = u16::MAX;

const _: () = assert!(
    KEY_BYTES_MAX < NO_KEY as usize,
    "a key's length fits two bytes"
);

/// The id of a place.
pub(super) fn id_of(lane: u32, position: u64) -> i64 {
    debug_assert!(lane < LANE_END && position <= POSITION_END);
    // Lanes and positions are bounded, so that the sign stays free.
    (i64::from(lane) << POSITION_BITS) + position as i64
}

/// A message on its way into the table; what depends on its place is added there.
#[derive(Debug)]
pub(super) struct Packed {
    pub(super) lane: u32,
    /// Bytes of key, headers and payload.
    pub(super) size: u64,
    head: Vec<u8>,
    payload: Bytes,
}

impl Packed {
    pub(super) fn new(lane: u32, message: &Message) -> Self {
        let key = message.key.as_ref().map(Key::as_bytes);
        let headers = message.headers.packed();
        // Publishing checked the key's length.
        let key_length = key.map_or(NO_KEY, |key| key.len() as u16);
        let length = HEAD_FIXED + key.map_or(0, <[u8]>::len) + headers.len();
        let mut head = Vec::with_capacity(length);
        head.extend_from_slice(&[0; CHECKSUM + TIME]);
        head.extend_from_slice(&key_length.to_le_bytes());
        // Publishing checked the size of the whole message.
        head.extend_from_slice(&(headers.len() as u32).to_le_bytes());
        head.extend_from_slice(&(message.payload.len() as u32).to_le_bytes());
        head.extend_from_slice(key.unwrap_or_default());
        head.extend_from_slice(headers);
        Self {
            lane,
            size: message.size() as u64,
            head,
            payload: message.payload.clone(),
        }
    }

    /// The two values of its row at this place, with these names beside it.
    pub(super) fn row(&self, id: i64, names: &[&str], time: Timestamp) -> (Vec<u8>, Vec<u8>) {
        let mut head = self.head.clone();
        head[CHECKSUM..CHECKSUM + TIME].copy_from_slice(&time.as_micros().to_le_bytes());
        let mut hasher = Hasher::new();
        hasher.update(&head[CHECKSUM..]);
        hasher.update(&self.payload);
        let checksum = finished(hasher, id, names);
        head[..CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
        (head, self.payload.to_vec())
    }
}

/// Reads the first of rows whose heads and payloads stand one behind the other, and takes it off.
/// What is not as it was written is an error that says where.
pub(super) fn unpack(
    topic: &Topic,
    place: (u32, u64),
    names: &[&str],
    rows: &mut Bytes,
) -> Result<Unpacked, Error> {
    let (lane, position) = place;
    let is_place = lane < LANE_END && position < POSITION_END;
    let lengths = Lengths::read(rows).filter(|_| is_place);
    let unpacked = lengths.and_then(|lengths| {
        let total = lengths.total()?;
        let row = (total <= rows.len()).then(|| rows.split_to(total))?;
        let (sum, covered) = row.split_at_checked(CHECKSUM)?;
        let sum = u32::from_le_bytes(sum.try_into().ok()?);
        if sum != checksum(id_of(lane, position), names, covered) {
            return None;
        }
        let headers_at = HEAD_FIXED + lengths.key.unwrap_or(0);
        let payload_at = headers_at + lengths.headers;
        let headers = Headers::from_packed(row.slice(headers_at..payload_at)).ok()?;
        let mut message =
            Message::new(topic.clone(), row.slice(payload_at..)).with_headers(headers);
        message.key = lengths
            .key
            .map(|_| Key::new(row.slice(HEAD_FIXED..headers_at)));
        Some(Unpacked {
            position: position.into(),
            time: time_of(&row)?,
            size: total - HEAD_FIXED,
            message,
        })
    });
    unpacked.ok_or_else(|| damaged(topic, position))
}

/// Reads a message without its payload from its head, unchecked: where it is only shown.
pub(super) fn peek(topic: &Topic, head: Bytes) -> Message {
    let mut message = Message::new(topic.clone(), Bytes::new());
    let lengths = Lengths::read(&head);
    let Some(key) = lengths.map(|lengths| lengths.key) else {
        return message;
    };
    let headers_at = HEAD_FIXED + key.unwrap_or(0);
    if headers_at <= head.len() {
        let headers = Headers::from_packed(head.slice(headers_at..));
        message = message.with_headers(headers.unwrap_or_default());
        message.key = key.map(|_| Key::new(head.slice(HEAD_FIXED..headers_at)));
    }
    message
}

/// What a head says of the parts of its row.
struct Lengths {
    key: Option<usize>,
    headers: usize,
    payload: usize,
}

impl Lengths {
    fn read(head: &[u8]) -> Option<Self> {
        let lengths = head.get(CHECKSUM + TIME..HEAD_FIXED)?;
        let (key, rest) = lengths.split_at_checked(2)?;
        let (headers, payload) = rest.split_at_checked(4)?;
        let key = u16::from_le_bytes(key.try_into().ok()?);
        Some(Self {
            key: (key != NO_KEY).then_some(usize::from(key)),
            headers: u32::from_le_bytes(headers.try_into().ok()?) as usize,
            payload: u32::from_le_bytes(payload.try_into().ok()?) as usize,
        })
    }

    fn total(&self) -> Option<usize> {
        let key = HEAD_FIXED + self.key.unwrap_or(0);
        key.checked_add(self.headers)?.checked_add(self.payload)
    }
}

/// The time in a head, unchecked: where it only steers a search.
pub(super) fn time_of(head: &[u8]) -> Option<Timestamp> {
    let time = head.get(CHECKSUM..CHECKSUM + TIME)?;
    Some(Timestamp::from_micros(i64::from_le_bytes(
        time.try_into().ok()?,
    )))
}

/// Says that the message at this place is not what was published.
pub(super) fn damaged(topic: &Topic, position: u64) -> Error {
    Error::new(
        ErrorKind::Codec,
        "read messages",
        "the stored message is damaged, its checksum is wrong or it is missing: restore the file from a copy, or stop the group and reset it to the next position",
    )
    .with("topic", topic)
    .with("position", position)
}

/// The checksum of a few numbers that belong together.
pub(super) fn seal<const N: usize>(numbers: [i64; N]) -> i64 {
    let mut hasher = Hasher::new();
    for number in numbers {
        hasher.update(&number.to_le_bytes());
    }
    i64::from(hasher.finalize())
}

/// The checksum of a row's bytes behind the checksum, at this place and with these names.
fn checksum(id: i64, names: &[&str], row: &[u8]) -> u32 {
    let mut hasher = Hasher::new();
    hasher.update(row);
    finished(hasher, id, names)
}

/// The checksum of a row whose bytes were gone through.
fn finished(mut hasher: Hasher, id: i64, names: &[&str]) -> u32 {
    hasher.update(&id.to_le_bytes());
    for name in names {
        // With its length, so that no two lists of names run together.
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
    }
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> Message {
        let headers = Headers::builder()
            .push("name", "value")
            .expect("within limits")
            .build();
        Message::new(Topic::from_static("orders"), "payload")
            .with_key("key")
            .with_headers(headers)
    }

    fn read(place: (u32, u64), head: &[u8], payload: &[u8]) -> Result<Unpacked, Error> {
        let mut row = Bytes::from([head, payload].concat());
        let unpacked = unpack(&Topic::from_static("orders"), place, &[], &mut row);
        assert!(unpacked.is_err() || row.is_empty());
        unpacked
    }

    #[test]
    fn a_message_is_read_as_it_was_written() {
        let plain = Message::new(Topic::from_static("orders"), "");
        for message in [message(), plain.clone(), plain.with_key("")] {
            let time = Timestamp::from_micros(-7);
            let (head, payload) = Packed::new(3, &message).row(id_of(3, 9), &[], time);
            let read = read((3, 9), &head, &payload).expect("it is sound");
            assert_eq!(read.size, message.size());
            assert_eq!(
                (read.message, read.time, read.position),
                (message, time, 9.into())
            );
            assert_eq!(time_of(&head), Some(time));
        }
    }

    #[test]
    fn a_flipped_bit_or_another_place_is_found() {
        let (head, payload) =
            Packed::new(3, &message()).row(id_of(3, 9), &[], Timestamp::from_micros(1));
        for bit in 0..head.len() * 8 {
            let mut flipped = head.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(
                read((3, 9), &flipped, &payload).is_err(),
                "bit {bit} of the head"
            );
        }
        for bit in 0..payload.len() * 8 {
            let mut flipped = payload.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(
                read((3, 9), &head, &flipped).is_err(),
                "bit {bit} of the payload"
            );
        }
        assert!(read((3, 10), &head, &payload).is_err());
        assert!(read((4, 9), &head, &payload).is_err());
        let row = [&head[..], &payload].concat();
        for length in 0..row.len() {
            assert!(read((3, 9), &row[..length], b"").is_err());
        }
        let error = read((3, 9), &head, b"other").expect_err("it is another payload");
        assert_eq!(error.kind(), ErrorKind::Codec);
        assert!(
            error.to_string().contains("topic: orders, position: 9"),
            "{error}"
        );
    }

    #[test]
    fn a_place_that_cannot_be_is_damage() {
        let (head, payload) =
            Packed::new(3, &message()).row(id_of(3, 9), &[], Timestamp::from_micros(1));
        for place in [
            (LANE_END, 9),
            (u32::MAX, 9),
            (3, POSITION_END),
            (3, u64::MAX),
        ] {
            assert!(read(place, &head, &payload).is_err(), "{place:?}");
        }
    }

    #[test]
    fn names_beside_a_message_are_covered_each_by_itself() {
        let time = Timestamp::from_micros(1);
        let (head, payload) = Packed::new(0, &message()).row(id_of(0, 9), &["7", "orders"], time);
        let read = |names: &[&str]| {
            let mut row = Bytes::from([&head[..], &payload].concat());
            unpack(&Topic::from_static("orders"), (0, 9), names, &mut row)
        };
        assert!(read(&["7", "orders"]).is_ok());
        for names in [&[][..], &["7"], &["7", "ordert"], &["7o", "rders"]] {
            assert!(read(names).is_err(), "{names:?}");
        }
    }

    #[test]
    fn any_bytes_are_damage_or_a_message() {
        let mut random = fastrand::Rng::with_seed(7);
        let (head, payload) =
            Packed::new(3, &message()).row(id_of(3, 9), &[], Timestamp::from_micros(1));
        let sound = [&head[..], &payload].concat();
        for _ in 0..10_000 {
            let mut row = sound.clone();
            for _ in 0..random.usize(1..8) {
                let at = random.usize(..row.len());
                row[at] = random.u8(..);
            }
            row.truncate(random.usize(..=row.len()));
            // Lengths and names are looked at behind the checksum, too.
            if row.len() > CHECKSUM {
                let sum = checksum(id_of(3, 9), &[], &row[CHECKSUM..]);
                row[..CHECKSUM].copy_from_slice(&sum.to_le_bytes());
            }
            if let Ok(unpacked) = read((3, 9), &row, b"") {
                assert_eq!(unpacked.message.size(), unpacked.size);
                let headers = unpacked.message.headers;
                assert_eq!(
                    headers
                        .iter()
                        .map(|(name, value)| 5 + name.len() + value.len())
                        .sum::<usize>(),
                    headers.packed_len()
                );
            }
            drop(peek(&Topic::from_static("orders"), row.into()));
        }
    }

    #[test]
    fn ids_hold_lane_and_position() {
        let last = id_of(LANE_END - 1, POSITION_END - 1);
        assert!(id_of(LANE_END - 1, POSITION_END) > last);
        assert!(id_of(1, POSITION_END - 1) < id_of(2, 0));
    }
}
