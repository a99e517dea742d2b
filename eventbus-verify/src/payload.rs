//! The bytes that messages carry: whose they are, and a checksum that notices any change.

use std::fmt;

use crate::checksum::crc32c_of;
use crate::stamp::{MessageId, RunId, Stamp};

const MAGIC: [u8; 4] = *b"EBP1";
/// Magic, run, producer, key, number, id and length.
const COVERED_BYTES: usize = 38;
/// All that, and the checksum.
const HEAD_BYTES: usize = COVERED_BYTES + 4;

/// What a message carries.
///
/// ```text
/// "EBP1" run:u32 producer:u16 key:u32 key_seq:u32 id:u128 length:u32 crc32c:u32 filler…
/// ```
///
/// Numbers are little-endian, except for the id, which is a UUID's sixteen bytes. The checksum is
/// over all bytes but its own; `length` counts all of them. The filler follows from the message, so
/// that no two messages have the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Payload {
    /// Of which run it is.
    pub run: RunId,
    /// Which message it is.
    pub stamp: Stamp,
    /// The id it says it has, which is the one that run and stamp make.
    pub id: MessageId,
    /// The checksum it carries: what the ledger keeps of it.
    pub checksum: u32,
}

impl Payload {
    /// The fewest bytes that a payload has.
    pub const BYTES_MIN: usize = HEAD_BYTES;

    /// Writes the payload of a message, filled up to a size; a smaller one than
    /// [`BYTES_MIN`](Self::BYTES_MIN) is that many bytes. The checksum is in the second answer.
    ///
    /// # Panics
    ///
    /// When the size is above 4 GiB.
    #[must_use]
    pub fn encode(run: RunId, stamp: Stamp, size: usize) -> (Vec<u8>, u32) {
        let size = size.max(HEAD_BYTES);
        let length = u32::try_from(size).expect("a payload has less than 4 GiB");
        let id = stamp.id(run);
        let mut bytes = Vec::with_capacity(size);
        bytes.extend(MAGIC);
        bytes.extend(run.0.to_le_bytes());
        bytes.extend(stamp.producer.to_le_bytes());
        bytes.extend(stamp.key.to_le_bytes());
        bytes.extend(stamp.key_seq.to_le_bytes());
        bytes.extend(id.as_u128().to_be_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend([0; 4]);
        fill(&mut bytes, size, id);
        let checksum = crc32c_of(&[&bytes[..COVERED_BYTES], &bytes[HEAD_BYTES..]]);
        bytes[COVERED_BYTES..HEAD_BYTES].copy_from_slice(&checksum.to_le_bytes());
        (bytes, checksum)
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, from the outside in: what it is, its length, its checksum,
    /// its id.
    pub fn decode(bytes: &[u8]) -> Result<Self, PayloadError> {
        if bytes.len() < HEAD_BYTES {
            return Err(PayloadError::TooShort {
                length: bytes.len(),
            });
        }
        if bytes[..4] != MAGIC {
            let found = array_at(bytes, 0);
            return Err(PayloadError::NotAPayload { found });
        }
        let said = u32::from_le_bytes(array_at(bytes, 34));
        if said as usize != bytes.len() {
            let length = bytes.len();
            return Err(PayloadError::WrongLength { said, length });
        }
        let checksum = u32::from_le_bytes(array_at(bytes, COVERED_BYTES));
        let computed = crc32c_of(&[&bytes[..COVERED_BYTES], &bytes[HEAD_BYTES..]]);
        if checksum != computed {
            return Err(PayloadError::Changed {
                said: checksum,
                computed,
            });
        }
        let run = RunId(u32::from_le_bytes(array_at(bytes, 4)));
        let stamp = Stamp {
            producer: u16::from_le_bytes(array_at(bytes, 8)),
            key: u32::from_le_bytes(array_at(bytes, 10)),
            key_seq: u32::from_le_bytes(array_at(bytes, 14)),
        };
        let id = MessageId::from_u128(u128::from_be_bytes(array_at(bytes, 18)));
        if id != stamp.id(run) {
            return Err(PayloadError::WrongId { run, stamp, id });
        }
        Ok(Self {
            run,
            stamp,
            id,
            checksum,
        })
    }

    /// Reads a payload, and refuses that of another run.
    ///
    /// # Errors
    ///
    /// Those of [`decode`](Self::decode), and [`PayloadError::ForeignRun`].
    pub fn decode_of(run: RunId, bytes: &[u8]) -> Result<Self, PayloadError> {
        let payload = Self::decode(bytes)?;
        match payload.run == run {
            true => Ok(payload),
            false => Err(PayloadError::ForeignRun {
                expected: run,
                found: payload.run,
            }),
        }
    }
}

/// What is wrong with bytes that should be a payload.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PayloadError {
    /// Fewer bytes than any payload has.
    TooShort {
        /// How many there are.
        length: usize,
    },
    /// They begin with something else.
    NotAPayload {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// Bytes are missing at the end, or there are more.
    WrongLength {
        /// How many the payload says it has.
        said: u32,
        /// How many there are.
        length: usize,
    },
    /// Some byte is not what was written.
    Changed {
        /// The checksum in the payload.
        said: u32,
        /// The one its bytes have.
        computed: u32,
    },
    /// The parts are whole, but do not belong together.
    WrongId {
        /// The run it says it is of.
        run: RunId,
        /// The message it says it is.
        stamp: Stamp,
        /// The id it says it has.
        id: MessageId,
    },
    /// It is of another run.
    ForeignRun {
        /// The run that reads.
        expected: RunId,
        /// The run that wrote.
        found: RunId,
    },
}

impl fmt::Display for PayloadError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort { length } => write!(
                formatter,
                "{length} bytes are fewer than the {HEAD_BYTES} of the smallest payload"
            ),
            Self::NotAPayload { found } => write!(
                formatter,
                "a payload begins with \"EBP1\", not with \"{}\"",
                found.escape_ascii()
            ),
            Self::WrongLength { said, length } => write!(
                formatter,
                "the payload says it has {said} bytes, and has {length}"
            ),
            Self::Changed { said, computed } => write!(
                formatter,
                "the payload was changed: it carries the checksum {said:08x}, its bytes have {computed:08x}"
            ),
            Self::WrongId { run, stamp, id } => write!(
                formatter,
                "the payload says it is {stamp} of run {run}, but has the id {id}, not {}",
                stamp.id(*run)
            ),
            Self::ForeignRun { expected, found } => {
                write!(
                    formatter,
                    "the payload is of run {found}, not of {expected}"
                )
            }
        }
    }
}

impl std::error::Error for PayloadError {}

/// Bytes that do not repeat and that nobody else has, so that a mixed-up tail is noticed.
fn fill(bytes: &mut Vec<u8>, size: usize, id: MessageId) {
    let mut state = (id.as_u128() ^ (id.as_u128() >> 64)) as u64 | 1;
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let missing = size - bytes.len();
        bytes.extend(state.to_le_bytes().iter().take(missing));
    }
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

#[cfg(test)]
mod tests {
    use super::{HEAD_BYTES, Payload, PayloadError};
    use crate::checksum::crc32c_of;
    use crate::stamp::{RunId, Stamp};

    const RUN: RunId = RunId(7);
    const STAMP: Stamp = Stamp {
        producer: 1,
        key: 2,
        key_seq: 3,
    };

    #[test]
    fn what_was_written_is_read() {
        for size in [0, HEAD_BYTES, HEAD_BYTES + 1, 1000] {
            let (bytes, checksum) = Payload::encode(RUN, STAMP, size);
            assert_eq!(bytes.len(), size.max(HEAD_BYTES));
            let payload = Payload::decode_of(RUN, &bytes).unwrap();
            assert_eq!((payload.stamp, payload.checksum), (STAMP, checksum));
            assert_eq!(payload.id, STAMP.id(RUN));
        }
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let (bytes, _) = Payload::encode(RUN, STAMP, 80);
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(Payload::decode(&changed).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn an_error_says_what_is_wrong() {
        let (bytes, _) = Payload::encode(RUN, STAMP, 80);
        let cut = Payload::decode(&bytes[..79]).unwrap_err();
        assert_eq!(
            cut.to_string(),
            "the payload says it has 80 bytes, and has 79"
        );
        let short = Payload::decode(&bytes[..9]).unwrap_err();
        assert_eq!(short, PayloadError::TooShort { length: 9 });
        let other = Payload::decode(&[b'{'; 50]).unwrap_err();
        assert_eq!(
            other.to_string(),
            "a payload begins with \"EBP1\", not with \"{{{{\""
        );
        let foreign = Payload::decode_of(RunId(8), &bytes).unwrap_err();
        assert!(matches!(foreign, PayloadError::ForeignRun { .. }));

        let mut mixed = bytes;
        mixed[14] = 4;
        let checksum = crc32c_of(&[&mixed[..38], &mixed[42..]]);
        mixed[38..42].copy_from_slice(&checksum.to_le_bytes());
        let mixed = Payload::decode(&mixed).unwrap_err();
        assert!(matches!(mixed, PayloadError::WrongId { .. }), "{mixed}");
    }
}
