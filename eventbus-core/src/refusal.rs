//! What brokers answer alike to what an operator asks for and they refuse. For adapters.

use crate::error::{Error, ErrorKind};
use crate::message::{Group, Topic};

/// The group has no place on the topic.
#[must_use]
pub fn never_subscribed(operation: &'static str, group: &Group, topic: &Topic) -> Error {
    Error::new(
        ErrorKind::NotFound,
        operation,
        "the group never subscribed to the topic: look at its name, or spawn its consumer first",
    )
    .with("group", group)
    .with("topic", topic)
}

/// The group is not moved while it has members.
#[must_use]
pub fn group_has_members(operation: &'static str, group: &Group, topic: &Topic) -> Error {
    Error::new(
        ErrorKind::Conflict,
        operation,
        "the group has members: stop its consumers first",
    )
    .with("group", group)
    .with("topic", topic)
}

/// The topic has no partition of this number.
#[must_use]
pub fn no_partition(operation: &'static str, topic: &Topic, partition: u32) -> Error {
    Error::new(
        ErrorKind::NotFound,
        operation,
        "the topic has fewer partitions: they count from 0",
    )
    .with("topic", topic)
    .with("partition", partition)
}
