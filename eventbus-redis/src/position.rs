//! Where an entry is, as a number: its id, and how many were ever added up to it.
//!
//! ```text
//!  128 bits:  milliseconds 48 · sequence 32 · number 47 · 1
//!                    the id in Redis       which entry   set: behind it
//! ```
//!
//! The number is what shows a gap: Redis says how many entries it ever added and how many are there,
//! and no id says how many there were before it.

use eventbus_core::{Error, ErrorKind, Position, Result};

const MILLIS_BITS: u32 = 48;
const SEQUENCE_BITS: u32 = 32;
const NUMBER_BITS: u32 = 47;

/// An entry's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct EntryId {
    pub(crate) millis: u64,
    pub(crate) sequence: u64,
}

/// What a position says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct From {
    /// Entries with this id and later ones are meant.
    pub(crate) id: EntryId,
    /// Entries that were ever added before them.
    pub(crate) before: u64,
    /// The entry of this id itself is not meant.
    pub(crate) is_behind: bool,
}

/// The place of an entry, the first one ever added having number 1.
pub(crate) fn entry(id: EntryId, number: u64) -> Position {
    let id = u128::from(id.millis) << SEQUENCE_BITS | u128::from(id.sequence);
    Position(id << (NUMBER_BITS + 1) | u128::from(number) << 1)
}

/// The place behind an entry.
pub(crate) fn behind(id: EntryId, number: u64) -> Position {
    Position(entry(id, number).0 | 1)
}

/// The place of whatever comes behind an entry that was just seen, and of which nobody said yet how
/// many there were before it: later than the entry's own.
pub(crate) fn beyond(id: EntryId) -> Position {
    behind(id, (1 << NUMBER_BITS) - 1)
}

/// Whether a place is one of [`beyond`], which says which entry comes before it and not how many.
pub(crate) fn is_beyond(position: Position) -> bool {
    position.0 & ((1 << (NUMBER_BITS + 1)) - 1) == (1 << (NUMBER_BITS + 1)) - 1
}

/// What a position says. One that is no place of this broker's lies where its id does.
pub(crate) fn from(position: Position) -> From {
    let number = (position.0 >> 1) as u64 & ((1 << NUMBER_BITS) - 1);
    let id = position.0 >> (NUMBER_BITS + 1);
    let is_behind = position.0 & 1 == 1;
    From {
        id: EntryId {
            millis: (id >> SEQUENCE_BITS) as u64,
            sequence: id as u64 & ((1 << SEQUENCE_BITS) - 1),
        },
        before: if is_behind {
            number
        } else {
            number.saturating_sub(1)
        },
        is_behind,
    }
}

impl From {
    /// The lowest id that is meant.
    pub(crate) fn first(self) -> EntryId {
        EntryId {
            sequence: self.id.sequence + u64::from(self.is_behind),
            ..self.id
        }
    }

    /// The id after which Redis is to read.
    pub(crate) fn after(self) -> EntryId {
        let EntryId { millis, sequence } = self.id;
        match (self.is_behind, sequence, millis) {
            (true, ..) => self.id,
            (false, 0, 0) => self.id,
            (false, 0, _) => EntryId {
                millis: millis - 1,
                sequence: u64::MAX,
            },
            (false, ..) => EntryId {
                millis,
                sequence: sequence - 1,
            },
        }
    }
}

impl std::fmt::Display for EntryId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.millis, self.sequence)
    }
}

impl EntryId {
    /// Reads an id as Redis writes it.
    ///
    /// # Errors
    ///
    /// `Codec` where it is none, or none that a server gives by its clock.
    pub(crate) fn read(text: &[u8]) -> Result<Self> {
        let parse = || {
            let (millis, sequence) = std::str::from_utf8(text).ok()?.split_once('-')?;
            let id = Self {
                millis: millis.parse().ok()?,
                sequence: sequence.parse().ok()?,
            };
            let fits = id.millis < 1 << MILLIS_BITS && id.sequence < 1 << SEQUENCE_BITS;
            fits.then_some(id)
        };
        parse().ok_or_else(|| {
            Error::new(
                ErrorKind::Codec,
                "read messages",
                "an entry's id is none that a server gives by its clock: publish with the id `*`",
            )
            .with("id", String::from_utf8_lossy(text))
        })
    }
}

/// Digits of the largest position.
const DIGITS: usize = 39;

/// A position as it is stored: texts of one length, which sort as the positions do. Of digits alone,
/// because Lua compares texts as the server's locale sorts them, and in some `aa` stands behind `z`.
pub(crate) fn stored(position: Position) -> String {
    format!("{:0DIGITS$}", position.0)
}

/// Reads what [`stored`] writes.
pub(crate) fn read(text: &[u8]) -> Option<Position> {
    let text = std::str::from_utf8(text).ok()?;
    let is_whole = text.len() == DIGITS;
    is_whole.then(|| text.parse().ok().map(Position))?
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(millis: u64, sequence: u64) -> EntryId {
        EntryId { millis, sequence }
    }

    #[test]
    fn reading_begins_at_an_entry_or_behind_it() {
        let at = from(entry(id(7, 3), 12));
        assert_eq!((at.after(), at.before), (id(7, 2), 11));
        assert_eq!(at.first(), id(7, 3));
        let at = from(entry(id(7, 0), 12));
        assert_eq!((at.after(), at.before), (id(6, u64::MAX), 11));
        let behind_it = from(behind(id(7, 3), 12));
        assert_eq!((behind_it.after(), behind_it.before), (id(7, 3), 12));
        assert_eq!(behind_it.first(), id(7, 4));
        let first = from(Position(0));
        assert_eq!((first.after(), first.before), (id(0, 0), 0));
    }

    #[test]
    fn ids_that_no_clock_gives_are_refused() {
        for text in [
            "",
            "1",
            "-",
            "1-",
            "a-1",
            "281474976710656-0",
            "1-4294967296",
        ] {
            assert!(EntryId::read(text.as_bytes()).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn later_entries_have_later_positions(
            a in (0..1_u64 << 48, 0..1_u64 << 32), b in (0..1_u64 << 48, 0..1_u64 << 32),
            number in 1..1_u64 << 40,
        ) {
            let (a, b) = (id(a.0, a.1), id(b.0, b.1));
            prop_assume!(a < b);
            prop_assert!(entry(a, number) < behind(a, number));
            prop_assert!(behind(a, number) < beyond(a));
            prop_assert!(beyond(a) < entry(b, number + 1));
            prop_assert_eq!(EntryId::read(a.to_string().as_bytes()).expect("an id"), a);
            let stored_text = stored(entry(a, number));
            prop_assert_eq!(read(stored_text.as_bytes()), Some(entry(a, number)));
            prop_assert!(stored_text < stored(entry(b, number)));
        }
    }
}
