//! Topics as a database has them: created once, with a partition count that never changes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use eventbus_core::{Message, Topic, partition_of};

/// A topic: its lanes are `first_lane` and the following ones.
#[derive(Debug)]
pub(crate) struct TopicLanes {
    pub(crate) name: Topic,
    pub(crate) partitions: u32,
    pub(crate) first_lane: u32,
    /// Where the next message without key goes.
    turn: AtomicU32,
}

impl TopicLanes {
    pub(crate) fn new(name: Topic, partitions: u32, first_lane: u32) -> Self {
        Self {
            name,
            partitions,
            first_lane,
            turn: AtomicU32::new(0),
        }
    }

    /// The lane that a message belongs to.
    pub(crate) fn lane_for(&self, message: &Message) -> u32 {
        let partition = match &message.key {
            Some(key) => partition_of(key, self.partitions),
            None => self.turn.fetch_add(1, Ordering::Relaxed) % self.partitions,
        };
        self.first_lane + partition
    }

    /// The lanes, by partition.
    pub(crate) fn lanes(&self) -> impl Iterator<Item = (u32, u32)> + use<> {
        let first = self.first_lane;
        (0..self.partitions).map(move |partition| (partition, first + partition))
    }
}

/// What is known of topics; what is in it stays true.
#[derive(Debug, Default)]
pub(crate) struct Topics(HashMap<Topic, Arc<TopicLanes>>);

impl Topics {
    pub(crate) fn get(&self, name: &Topic) -> Option<Arc<TopicLanes>> {
        self.0.get(name).cloned()
    }

    /// Keeps the first that was read: it counts whose turn it is.
    pub(crate) fn remember(&mut self, topic: &Arc<TopicLanes>) -> Arc<TopicLanes> {
        let known = self.0.entry(topic.name.clone());
        Arc::clone(known.or_insert_with(|| Arc::clone(topic)))
    }
}

/// Dead letters have a topic of their own, `{topic}.{group}.dlq`: few, and read rarely.
pub(crate) fn is_dead_letters(topic: &Topic) -> bool {
    topic.as_str().ends_with(".dlq")
}
