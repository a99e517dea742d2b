//! One partition's messages: positions that only rise, a base that trimming raises.

use std::collections::VecDeque;

use super::config::MemoryConfig;
use crate::clock::Timestamp;
use crate::message::Message;

/// Messages of one partition by position; everything before `base` is gone.
#[derive(Debug)]
pub(super) struct Log {
    base: u64,
    entries: VecDeque<Stored>,
    /// When the last message was taken; kept when it is trimmed, because times never fall.
    newest: Timestamp,
    /// Bytes ever taken, with the overhead of each message.
    taken: u64,
}

/// A message as it is kept.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) message: Message,
    /// `Message::size`, read at each hand-out.
    pub(super) size: usize,
    /// When it was taken; within a log it never falls, so that it can be searched.
    time: Timestamp,
    /// Its number over all topics, by which the oldest of several partitions is found.
    sequence: u64,
    /// Bytes taken before it, from which the bytes of any range follow.
    offset: u64,
}

impl Log {
    pub(super) fn new() -> Self {
        Self {
            base: 0,
            entries: VecDeque::new(),
            newest: Timestamp::from_micros(i64::MIN),
            taken: 0,
        }
    }

    /// The first position kept.
    pub(super) fn base(&self) -> u64 {
        self.base
    }

    /// The position the next message gets.
    pub(super) fn end(&self) -> u64 {
        self.base + self.entries.len() as u64
    }

    pub(super) fn append(&mut self, message: Message, size: usize, time: Timestamp, sequence: u64) {
        self.newest = self.newest.max(time);
        self.entries.push_back(Stored {
            message,
            size,
            time: self.newest,
            sequence,
            offset: self.taken,
        });
        self.taken += (size + MemoryConfig::MESSAGE_OVERHEAD) as u64;
    }

    pub(super) fn get(&self, position: u64) -> Option<&Stored> {
        let index = position.checked_sub(self.base)?;
        self.entries.get(usize::try_from(index).ok()?)
    }

    /// Whether the message at `position` was taken at or after `time`.
    pub(super) fn is_at_or_after(&self, position: u64, time: Timestamp) -> bool {
        self.get(position).is_some_and(|stored| stored.time >= time)
    }

    /// The first position taken at or after `time`; the end if there is none yet.
    pub(super) fn first_at_or_after(&self, time: Timestamp) -> u64 {
        self.base + self.entries.partition_point(|stored| stored.time < time) as u64
    }

    /// The first position whose number over all topics is `sequence` or more.
    pub(super) fn first_from(&self, sequence: u64) -> u64 {
        let before = |stored: &Stored| stored.sequence < sequence;
        self.base + self.entries.partition_point(before) as u64
    }

    /// The bytes, with overhead, that trimming before a position would give back.
    pub(super) fn bytes_before(&self, position: u64) -> usize {
        let offset = |position| {
            self.get(position)
                .map_or(self.taken, |stored| stored.offset)
        };
        // What is stored fits the memory.
        offset(position.max(self.base)).saturating_sub(offset(self.base)) as usize
    }

    /// Drops what is before `before` and returns the bytes, with overhead, that this gave back.
    pub(super) fn trim(&mut self, before: u64) -> usize {
        let bytes = self.bytes_before(before);
        let count = before.min(self.end()).saturating_sub(self.base);
        // At most the number of entries.
        self.entries.drain(..count as usize);
        self.base += count;
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Topic;

    const WEIGHT: usize = 10 + MemoryConfig::MESSAGE_OVERHEAD;

    fn log(times: &[i64]) -> Log {
        let mut log = Log::new();
        for (number, time) in times.iter().enumerate() {
            let message = Message::new(Topic::from_static("t"), vec![0; 10]);
            log.append(message, 10, Timestamp::from_micros(*time), number as u64);
        }
        log
    }

    #[test]
    fn positions_survive_trimming() {
        let mut log = log(&[1, 2, 3, 4]);
        assert_eq!(log.trim(2), 2 * WEIGHT);
        assert_eq!((log.base(), log.end()), (2, 4));
        assert!(log.get(1).is_none());
        assert_eq!(log.get(2).map(|stored| stored.sequence), Some(2));
        assert_eq!((log.first_from(0), log.first_from(3)), (2, 3));
        assert_eq!(log.bytes_before(3), WEIGHT);
        assert_eq!(log.trim(1), 0, "the base never falls");
        assert_eq!(log.trim(u64::MAX), 2 * WEIGHT);
        assert_eq!(log.trim(u64::MAX), 0);
        assert_eq!((log.base(), log.end()), (4, 4));
    }

    #[test]
    fn times_never_fall_and_are_searched() {
        let log = log(&[10, 20, 15, 30]);
        assert_eq!(log.first_at_or_after(Timestamp::from_micros(0)), 0);
        assert_eq!(log.first_at_or_after(Timestamp::from_micros(16)), 1);
        assert_eq!(log.first_at_or_after(Timestamp::from_micros(21)), 3);
        assert_eq!(log.first_at_or_after(Timestamp::from_micros(31)), 4);
        assert!(log.is_at_or_after(2, Timestamp::from_micros(20)));
    }
}
