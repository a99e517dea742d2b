//! Topics as a database has them: created once, with a partition count that never changes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::{Message, Topic, partition_of};

/// A topic: its lanes are `first_lane` and the following ones.
#[derive(Debug)]
pub struct TopicLanes {
    /// What it is called.
    pub name: Topic,
    /// How many partitions it has.
    pub partitions: u32,
    /// The row of its partition 0.
    pub first_lane: u32,
    /// Where the next message without key goes.
    turn: AtomicU32,
}

impl TopicLanes {
    /// A topic whose rows begin there.
    pub fn new(name: Topic, partitions: u32, first_lane: u32) -> Self {
        Self {
            name,
            partitions,
            first_lane,
            turn: AtomicU32::new(0),
        }
    }

    /// The lane that a message belongs to.
    pub fn lane_for(&self, message: &Message) -> u32 {
        let partition = match &message.key {
            Some(key) => partition_of(key, self.partitions),
            None => self.turn.fetch_add(1, Ordering::Relaxed) % self.partitions,
        };
        self.first_lane + partition
    }

    /// The lanes, by partition.
    pub fn lanes(&self) -> impl Iterator<Item = (u32, u32)> + use<> {
        let first = self.first_lane;
        (0..self.partitions).map(move |partition| (partition, first + partition))
    }
}

/// What is known of topics; what is in it stays true.
#[derive(Debug, Default)]
pub struct Topics(HashMap<Topic, Arc<TopicLanes>>);

impl Topics {
    /// A topic, if it is known.
    pub fn get(&self, name: &Topic) -> Option<Arc<TopicLanes>> {
        self.0.get(name).cloned()
    }

    /// Keeps the first that was read: it counts whose turn it is.
    pub fn remember(&mut self, topic: &Arc<TopicLanes>) -> Arc<TopicLanes> {
        let known = self.0.entry(topic.name.clone());
        Arc::clone(known.or_insert_with(|| Arc::clone(topic)))
    }
}

/// Each topic once, in their order.
pub fn distinct(topics: Vec<Arc<TopicLanes>>) -> Vec<Arc<TopicLanes>> {
    let mut distinct: Vec<Arc<TopicLanes>> = Vec::with_capacity(topics.len());
    for topic in topics {
        if distinct.iter().all(|known| known.name != topic.name) {
            distinct.push(topic);
        }
    }
    distinct
}
