//! How many bytes are stored, and what goes when there is no more room.

use super::state::{State, TopicState};
use crate::header::CAUSATION_ID;
use crate::message::Message;

/// What a message may use beyond [`MemoryConfig::bytes`]: without it, a server that is full of
/// messages nobody has settled would keep their handlers from ending, and never be less full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reserve {
    /// Nothing: it comes from outside.
    None,
    /// A sixteenth: it follows from a message that is settled when it is taken.
    Consequence,
    /// An eighth: a message is settled when its dead letter is taken.
    DeadLetter,
}

impl Reserve {
    pub(super) fn of(message: &Message) -> Self {
        if message.topic.is_dead_letters() {
            return Self::DeadLetter;
        }
        match message.headers.get(CAUSATION_ID) {
            Some(_) => Self::Consequence,
            None => Self::None,
        }
    }

    fn share_of(self, room: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Consequence => room / 16,
            Self::DeadLetter => room / 8,
        }
    }
}

impl State {
    /// Makes room for a message of `needed` bytes by dropping, oldest first, what nobody is owed.
    pub(super) fn make_room(&mut self, needed: usize, reserve: Reserve) -> bool {
        let room = self.config.bytes;
        if self.stored + needed > room {
            // A sixteenth more than asked for, so that this is not done for each message.
            self.drop_oldest((self.stored + needed + room / 16).saturating_sub(room));
        }
        self.stored + needed <= room + reserve.share_of(room)
    }

    /// Drops, oldest first over all topics, `wanted` bytes of what nobody is owed; all of it when
    /// that is less.
    fn drop_oldest(&mut self, wanted: usize) {
        // The numbers of messages rise over all topics: the lowest one to keep is found by halving.
        let (mut keep, mut high) = (0, self.sequence);
        while keep < high {
            let middle = keep + (high - keep) / 2;
            let freed: usize = self
                .droppable_before(middle)
                .map(|(topic, partition, before)| {
                    let log = &self.topics[topic].partitions[partition].log;
                    log.bytes_before(before)
                })
                .sum();
            if freed < wanted {
                keep = middle + 1;
            } else {
                high = middle;
            }
        }
        let trims: Vec<_> = self.droppable_before(keep).collect();
        for (topic, partition, before) in trims {
            self.trim(topic, partition, before);
        }
    }

    /// Topic, partition and first position to keep, where messages with lower numbers than
    /// `sequence` can go.
    fn droppable_before(&self, sequence: u64) -> impl Iterator<Item = (usize, usize, u64)> {
        let topics = self.topics.iter().enumerate();
        topics.flat_map(move |(topic_index, topic)| {
            (0..topic.partitions.len()).filter_map(move |index| {
                let log = &topic.partitions[index].log;
                let before = log.first_from(sequence).min(topic.owed_from(index));
                (before > log.base()).then_some((topic_index, index, before))
            })
        })
    }

    /// Drops messages before a position and tells whoever had not read them.
    pub(super) fn trim(&mut self, topic: usize, partition: usize, before: u64) {
        let partition = &mut self.topics[topic].partitions[partition];
        self.stored -= partition.log.trim(before);
        let base = partition.log.base();
        for listener in &partition.listeners {
            if let Some(member) = &mut self.members[listener.member] {
                member.skip_to(listener.lane, base);
            }
        }
        self.announce_space();
    }

    /// Wakes publishes that wait for room.
    pub(super) fn announce_space(&mut self) {
        if std::mem::take(&mut self.is_full) {
            self.space.notify_waiters();
        }
    }
}

impl TopicState {
    /// The first position of a partition that somebody is owed and that is therefore kept.
    fn owed_from(&self, partition: usize) -> u64 {
        let partition = &self.partitions[partition];
        if self.name.is_dead_letters() {
            return partition.log.base();
        }
        partition
            .cursors
            .iter()
            .map(|cursor| cursor.committed)
            .min()
            .unwrap_or_else(|| partition.log.end())
    }
}
