//! What tells a message from all others: run, producer, key and number, and the id that they make.

use std::fmt;

/// Which run of the campaign something belongs to, so that what an earlier run left in a broker or
/// a database is told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RunId(pub u32);

impl fmt::Display for RunId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:08x}", self.0)
    }
}

/// A message within a run.
///
/// Order is judged within a producer and a key: the calls of two producers have no order between
/// them. A producer numbers the messages of a key without a hole, and begins to publish them in
/// that order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Stamp {
    /// Who publishes it.
    pub producer: u16,
    /// The key that keeps it in order.
    pub key: u32,
    /// Which of its producer and key it is.
    pub key_seq: u32,
}

impl Stamp {
    /// A message of a producer.
    #[must_use]
    pub fn new(producer: u16, key: u32, key_seq: u32) -> Self {
        Self {
            producer,
            key,
            key_seq,
        }
    }

    /// The id of this message in a run.
    #[must_use]
    pub fn id(self, run: RunId) -> MessageId {
        let (run, producer) = (u128::from(run.0), u128::from(self.producer));
        let (key, key_seq) = (u128::from(self.key), u128::from(self.key_seq));
        let key_parts = (key >> 20) << 64 | ((key >> 8) & 0xfff) << 48 | (key & 0xff) << 40;
        MessageId(run << 96 | producer << 80 | VERSION_8 | VARIANT | key_parts | key_seq)
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            producer,
            key,
            key_seq,
        } = self;
        write!(formatter, "{producer}/{key}#{key_seq}")
    }
}

const VERSION_8: u128 = 0x8 << 76;
const VARIANT: u128 = 0x8 << 60;
/// The bits that are the same in every id: version, variant, and eight that are zero.
const FIXED: u128 = 0xf << 76 | 0xf << 60 | 0xff << 32;

/// The id of a message: a UUID of version 8 that run, producer, key and number are written into,
/// and can be read from again. So no two messages share one, and whoever meets an id in a database
/// knows whose it is.
///
/// ```text
/// rrrrrrrr-pppp-8kkk-8kkk-kk00nnnnnnnn    r run  p producer  k key  n key_seq
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId(u128);

impl MessageId {
    /// The id that has these bits, of whomever.
    #[must_use]
    pub fn from_u128(bits: u128) -> Self {
        Self(bits)
    }

    /// The bits of the UUID.
    #[must_use]
    pub fn as_u128(self) -> u128 {
        self.0
    }

    /// The run and the message that this id was made of, if it was made by [`Stamp::id`].
    #[must_use]
    pub fn origin(self) -> Option<(RunId, Stamp)> {
        if self.0 & FIXED != VERSION_8 | VARIANT {
            return None;
        }
        let bits = |shift: u32, mask: u128| ((self.0 >> shift) & mask) as u32;
        let key = bits(64, 0xfff) << 20 | bits(48, 0xfff) << 8 | bits(40, 0xff);
        let producer = ((self.0 >> 80) & 0xffff) as u16;
        let stamp = Stamp::new(producer, key, bits(0, 0xffff_ffff));
        Some((RunId(bits(96, 0xffff_ffff)), stamp))
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |shift: u32, mask: u128| (self.0 >> shift) & mask;
        write!(
            formatter,
            "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
            part(96, 0xffff_ffff),
            part(80, 0xffff),
            part(64, 0xffff),
            part(48, 0xffff),
            part(0, 0xffff_ffff_ffff),
        )
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "MessageId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::{MessageId, RunId, Stamp};

    #[test]
    fn an_id_is_a_uuid_of_version_8_that_can_be_read() {
        let id = Stamp::new(0xbeef, 0x1234_5678, 0x9abc_def0).id(RunId(0xcafe_0001));
        assert_eq!(id.to_string(), "cafe0001-beef-8123-8456-78009abcdef0");
    }

    #[test]
    fn run_and_message_come_back() {
        let ends = [0, 1, 0xff, 0x100, 0xf_ffff, 0x10_0000, u32::MAX];
        for key in ends {
            for other in ends {
                let (run, stamp) = (RunId(other), Stamp::new(other as u16, key, !other));
                assert_eq!(stamp.id(run).origin(), Some((run, stamp)));
            }
        }
    }

    #[test]
    fn a_foreign_id_has_no_origin() {
        let id = Stamp::new(1, 2, 3).id(RunId(4)).as_u128();
        for bit in [32, 39, 60, 63, 76, 79] {
            let foreign = MessageId::from_u128(id ^ (1 << bit));
            assert_eq!(foreign.origin(), None, "{foreign}");
        }
    }
}
