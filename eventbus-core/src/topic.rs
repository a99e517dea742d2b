//! What a topic is declared to be, and which partition a key belongs to.

use std::fmt;
use std::time::Duration;

use crate::message::{Key, Topic};

/// The declaration of a topic, created or checked by [`apply_topics`](crate::EventBus::apply_topics).
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use eventbus_core::{Topic, TopicSpec};
///
/// let orders = TopicSpec::new(Topic::from_static("order-events"))
///     .with_partitions(20)
///     .with_retention(Duration::from_secs(365 * 24 * 60 * 60));
/// assert_eq!(orders.partitions, Some(20));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicSpec {
    /// Its name.
    pub name: Topic,
    /// How many partitions; `None` takes the broker's default when it is created.
    pub partitions: Option<u32>,
    /// How long messages are kept; `None` leaves it to the broker.
    pub retention: Option<Duration>,
    /// How many bytes of keys, headers and payloads are kept; `None` leaves it to the broker.
    pub retention_bytes: Option<u64>,
    /// On how many machines each message is kept; `None` leaves it to the broker. One without
    /// replicas passes over it: [`Capabilities::durability`](crate::Capabilities::durability) says
    /// what it keeps.
    pub replication: Option<u16>,
    /// How messages are kept; `None` leaves it to the broker. One that keeps them as they are passes
    /// over it.
    pub compression: Option<Compression>,
}

/// How a broker keeps messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compression {
    /// As they are.
    None,
    /// As zlib makes them.
    Gzip,
    /// Fast, and not very small.
    Snappy,
    /// Faster still.
    Lz4,
    /// The smallest for its time.
    Zstd,
}

impl Compression {
    /// Its name in the settings of brokers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "uncompressed",
            Self::Gzip => "gzip",
            Self::Snappy => "snappy",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

impl TopicSpec {
    /// A topic with the broker's defaults.
    #[must_use]
    pub fn new(name: Topic) -> Self {
        Self {
            name,
            partitions: None,
            retention: None,
            retention_bytes: None,
            replication: None,
            compression: None,
        }
    }

    /// Sets the number of partitions, at least one.
    #[must_use]
    pub fn with_partitions(mut self, partitions: u32) -> Self {
        self.partitions = Some(partitions.max(1));
        self
    }

    /// Sets how long messages are kept.
    #[must_use]
    pub fn with_retention(mut self, retention: Duration) -> Self {
        self.retention = Some(retention);
        self
    }

    /// Sets how many bytes are kept, over all partitions.
    #[must_use]
    pub fn with_retention_bytes(mut self, bytes: u64) -> Self {
        self.retention_bytes = Some(bytes);
        self
    }

    /// Sets on how many machines each message is kept, at least one.
    #[must_use]
    pub fn with_replication(mut self, machines: u16) -> Self {
        self.replication = Some(machines.max(1));
        self
    }

    /// Sets how messages are kept.
    #[must_use]
    pub fn with_compression(mut self, compression: Compression) -> Self {
        self.compression = Some(compression);
        self
    }
}

/// One partition of a topic: the place that messages of a key go to, and what a lease is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(
    clippy::exhaustive_structs,
    reason = "a plain pair that adapters create"
)]
pub struct TopicPartition {
    /// The topic.
    pub topic: Topic,
    /// The partition's number in it.
    pub partition: u32,
}

impl TopicPartition {
    /// Partition number `partition` of `topic`.
    #[must_use]
    pub fn new(topic: Topic, partition: u32) -> Self {
        Self { topic, partition }
    }
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.partition)
    }
}

/// The partition of `key`: murmur2 modulo the count, as Kafka's Java client places it.
///
/// # Examples
///
/// ```
/// use eventbus_core::{Key, partition_of};
///
/// // The same number on every broker, and as `kafka-console-producer` finds it.
/// assert_eq!(partition_of(&Key::from("21"), 1000), (-973_932_308i32 & 0x7fff_ffff) as u32 % 1000);
/// ```
pub fn partition_of(key: &Key, partitions: u32) -> u32 {
    (murmur2(key.as_bytes()) & 0x7fff_ffff) % partitions.max(1)
}

/// `org.apache.kafka.common.utils.Utils.murmur2`.
fn murmur2(data: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const M: u32 = 0x5bd1_e995;
    const R: u32 = 24;
    // Kafka's length is a Java int; a key has at most 4 KiB.
    let mut hash = SEED ^ data.len() as u32;
    let mut chunks = data.chunks_exact(4);
    for chunk in &mut chunks {
        let mut k = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        k = k.wrapping_mul(M);
        k ^= k >> R;
        hash = hash.wrapping_mul(M) ^ k.wrapping_mul(M);
    }
    let rest = chunks.remainder();
    if !rest.is_empty() {
        for (index, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * index);
        }
        hash = hash.wrapping_mul(M);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(M);
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors of Kafka's own `UtilsTest.testMurmur2`.
    #[test]
    fn murmur2_agrees_with_kafka() {
        let cases: [(&str, i32); 6] = [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            (
                "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8",
                -58_897_971,
            ),
            ("abc", 479_470_107),
        ];
        for (text, expected) in &cases {
            assert_eq!(murmur2(text.as_bytes()) as i32, *expected, "{text}");
        }
    }

    #[test]
    fn every_partition_is_within_the_count() {
        for number in 0..1000 {
            assert!(partition_of(&Key::display(number), 7) < 7);
        }
        assert_eq!(partition_of(&Key::from("x"), 0), 0);
    }
}
