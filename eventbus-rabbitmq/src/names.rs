//! What exchanges and queues are called. A `:` is in no name of a topic or a group, so that no two of
//! them make the same name.

use eventbus_core::{Error, ErrorKind, Group, Result, Topic};
use lapin::types::ShortString;

/// Most bytes of the name of a queue.
const NAME_BYTES_MAX: usize = 255;

/// Whether a topic is kept as a log only (streams that everybody reads again), as dead letters are, and
/// not as queues of its groups.
pub(crate) fn is_log(topic: &Topic) -> bool {
    topic.is_dead_letters()
}

/// The exchange that messages of a topic are published to; they are routed by their partition.
pub(crate) fn exchange(topic: &Topic) -> ShortString {
    // A topic has at most 200 bytes.
    ShortString::from(topic.as_str())
}

/// What messages of a partition are routed by.
pub(crate) fn routing_key(partition: u32) -> ShortString {
    ShortString::from(partition.to_string())
}

/// The queue that has no messages and says by an argument how many partitions a topic has.
///
/// It is short: how the server says what the argument is has 255 bytes, this name among them.
pub(crate) fn partitions_queue(topic: &Topic) -> ShortString {
    let name = topic.as_str();
    ShortString::from(match name.len() {
        ..=64 => format!("{name}:partitions"),
        // A name has ASCII only.
        _ => format!("{}~{:016x}:partitions", &name[..40], fnv(name.as_bytes())),
    })
}

/// The hash of Fowler, Noll and Vo (1a, 64 bits).
pub(crate) fn fnv(bytes: &[u8]) -> u64 {
    let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, fold)
}

/// The stream that keeps a partition of a log.
pub(crate) fn log_queue(topic: &Topic, partition: u32) -> ShortString {
    ShortString::from(format!("{topic}:{partition}"))
}

/// The queue of a group for a partition.
pub(crate) fn group_queue(topic: &Topic, group: &Group, partition: u32) -> ShortString {
    ShortString::from(format!("{topic}:{group}:{partition}"))
}

/// The queue without messages that says by an argument who reads a queue of somebody else.
pub(crate) fn reader_queue(operation: &'static str, queue: &str) -> Result<ShortString> {
    beside(operation, queue, "reader")
}

/// The queue that keeps what an ingress was about to do with messages of a queue.
pub(crate) fn journal_queue(operation: &'static str, queue: &str) -> Result<ShortString> {
    beside(operation, queue, "ingress")
}

/// The queue of messages that an ingress could not move.
pub(crate) fn refused_queue(operation: &'static str, queue: &str) -> Result<ShortString> {
    beside(operation, queue, "refused")
}

/// A queue that goes with one of somebody else.
fn beside(operation: &'static str, queue: &str, purpose: &str) -> Result<ShortString> {
    let name = format!("{queue}:{purpose}");
    if name.len() <= NAME_BYTES_MAX {
        return Ok(ShortString::from(name));
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        operation,
        "the name of the queue is too long: 247 bytes at most, because queues beside it are named after it",
    )
    .with("queue", queue))
}

/// The exchange by which the members of a group hear of each other.
pub(crate) fn members_exchange(group: &Group) -> ShortString {
    ShortString::from(format!("{group}:members"))
}

/// Whether the queues of a group can be named at all.
pub(crate) fn check(operation: &'static str, topic: &Topic, group: &Group) -> Result<()> {
    let longest = topic.as_str().len() + group.as_str().len() + ":".len() + ":1023".len();
    if longest <= NAME_BYTES_MAX {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        operation,
        "topic and group together have more than 249 characters, and a queue is named by both: choose shorter names",
    )
    .with("topic", topic)
    .with("group", group))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_groups_share_a_queue() {
        let name = |topic, group| {
            let (topic, group) = (Topic::from_static(topic), Group::from_static(group));
            group_queue(&topic, &group, 0).to_string()
        };
        assert_ne!(name("a.b", "c"), name("a", "b.c"));
        assert_eq!(name("orders", "payments"), "orders:payments:0");
    }

    #[test]
    fn the_count_of_a_long_name_is_kept_under_a_short_one() {
        assert_eq!(fnv(b"foobar"), 0x85944171f73967e8);
        let topic = |end| Topic::new(&format!("{}{end}", "t".repeat(199))).expect("a good name");
        let name = partitions_queue(&topic("a"));
        assert!(name.as_str().len() <= 75);
        assert_ne!(name, partitions_queue(&topic("b")));
    }

    #[test]
    fn names_that_are_too_long_together_are_refused() {
        let topic = Topic::new(&"t".repeat(149)).expect("a good name");
        let group = |length| Group::new(&"g".repeat(length)).expect("a good name");
        assert!(check("subscribe", &topic, &group(100)).is_ok());
        let error = check("subscribe", &topic, &group(101)).expect_err("it is too long");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        // What is not refused can be named.
        group_queue(&topic, &group(100), 1023);
    }
}
