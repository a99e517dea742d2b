//! The queues of a group, one for each partition of a topic: creating those that are missing.

use std::collections::BTreeMap;

use eventbus_core::{Error, ErrorKind, Group, Result, Topic, TopicPartition};
use lapin::Channel;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use crate::error::{Current, Difference, difference, into_error};
use crate::link::{Link, natively};
use crate::names;
use crate::topics::{DURABLE, bind, text};

const SINGLE: &str = "x-single-active-consumer";
const LIMIT: &str = "x-delivery-limit";
const OVERFLOW: &str = "x-overflow";
/// What a queue does that is full and loses nothing.
const REFUSES: &str = "reject-publish";

/// Above the limit that servers from 4.0 on have by default, after which they drop a message: it is
/// taken back whenever its lane moves.
const DELIVERY_LIMIT: i32 = i32::MAX;

/// From so many queues of one group on, a warning says what they cost.
const MANY_QUEUES: u32 = 128;

/// Creates the queues of a group that are missing, so that all that is published from now on is kept
/// for it.
///
/// # Errors
///
/// `Conflict` when a queue of such a name would not keep the order, hand messages to several, or drop them.
pub(crate) async fn declare_group(
    operation: &'static str,
    link: &Link,
    group: &Group,
    topic: &Topic,
    partitions: u32,
) -> Result<()> {
    check(operation, group, topic, partitions)?;
    let mut channel = link.channel(operation).await?;
    for partition in 0..partitions {
        let place = TopicPartition::new(topic.clone(), partition);
        declare_queue(operation, link, &mut channel, group, &place).await?;
    }
    Ok(())
}

/// As [`declare_group`], for what answers: a queue whose nodes are away, or that has no leader, keeps
/// nobody from the other ones.
pub(crate) async fn declare_present(
    operation: &'static str,
    link: &Link,
    group: &Group,
    topic: &Topic,
    partitions: u32,
) -> Result<()> {
    check(operation, group, topic, partitions)?;
    let mut channel = link.channel(operation).await?;
    for partition in 0..partitions {
        let place = TopicPartition::new(topic.clone(), partition);
        let declared = declare_queue(operation, link, &mut channel, group, &place).await;
        let Err(error) = declared else { continue };
        let is_away = matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Unavailable);
        if !is_away || !link.is_open() {
            return Err(error);
        }
        tracing::error!(%error, %place, "a queue of a group does not answer");
        channel = link.channel(operation).await?;
    }
    Ok(())
}

fn check(operation: &'static str, group: &Group, topic: &Topic, partitions: u32) -> Result<()> {
    names::check(operation, topic, group)?;
    if partitions >= MANY_QUEUES {
        tracing::warn!(
            topic = topic.as_str(),
            group = group.as_str(),
            partitions,
            "many partitions: each is a quorum queue for every group"
        );
    }
    Ok(())
}

/// Creates the queue of one partition, unless it is there, and binds it.
pub(crate) async fn declare_queue(
    operation: &'static str,
    link: &Link,
    channel: &mut Channel,
    group: &Group,
    place: &TopicPartition,
) -> Result<()> {
    let (topic, partition) = (&place.topic, place.partition);
    let name = names::group_queue(topic, group, partition);
    declare(operation, link, channel, &name)
        .await
        .map_err(|error| error.with("topic", topic).with("queue", &name))?;
    bind(operation, channel, topic, name, partition).await
}

/// Creates a queue, unless it is there as a group can have it. The server names one difference at a time, so
/// it is declared again with what the server has, until nothing differs any more.
async fn declare(
    operation: &'static str,
    link: &Link,
    channel: &mut Channel,
    name: &ShortString,
) -> Result<()> {
    let mut settings = Settings::default();
    loop {
        let declared = channel.queue_declare(name.clone(), DURABLE, settings.arguments());
        let Err(error) = natively(operation, declared).await? else {
            break;
        };
        let other = difference(&error).filter(|other| settings.take(other));
        if other.is_none() {
            return Err(into_error(operation, error));
        }
        *channel = link.channel(operation).await?;
    }
    if settings.drops() {
        return Err(Error::new(
            ErrorKind::Conflict,
            operation,
            "the queue drops messages that nobody has read when it is full: let it refuse new ones (`x-overflow` is `reject-publish`), or delete it, so that it is created anew",
        ));
    }
    if settings.is_server_limited() {
        tracing::warn!(
            queue = name.as_str(),
            "a queue has no delivery limit of its own: from RabbitMQ 4.0 on it drops a message that was handed out 20 times"
        );
    }
    Ok(())
}

/// How a queue is declared: as groups do, but for what an operator has decided about it.
struct Settings {
    arguments: BTreeMap<ShortString, AMQPValue>,
    /// What was taken over from the server.
    taken: BTreeMap<String, Current>,
}

impl Default for Settings {
    fn default() -> Self {
        let limit = AMQPValue::LongInt(DELIVERY_LIMIT);
        Self {
            arguments: BTreeMap::from([
                ("x-queue-type".into(), text("quorum")),
                (SINGLE.into(), AMQPValue::Boolean(true)),
                (LIMIT.into(), limit),
            ]),
            taken: BTreeMap::new(),
        }
    }
}

impl Settings {
    fn arguments(&self) -> FieldTable {
        FieldTable::from(self.arguments.clone())
    }

    /// Takes over what the server has otherwise; false where a group cannot have it so.
    fn take(&mut self, other: &Difference) -> bool {
        let name = other.argument.as_str();
        let number = match &other.current {
            Current::Is(value) => value.parse::<i64>().ok(),
            Current::Unset | Current::Unread => None,
        };
        let is_fit = match name {
            // How large it may be, and on which nodes and in how much memory it is.
            "x-max-length"
            | "x-max-length-bytes"
            | "x-max-in-memory-length"
            | "x-max-in-memory-bytes"
            | "x-quorum-initial-group-size"
            | "x-quorum-target-group-size"
            | "x-queue-leader-locator" => true,
            OVERFLOW => other.current == Current::Is(REFUSES.to_owned()),
            // Without an end: servers from 4.0 on write that as -1.
            LIMIT => match number {
                Some(number) => number < 0 || number >= DELIVERY_LIMIT.into(),
                None => other.current == Current::Unset,
            },
            _ => false,
        };
        let is_new = !self.taken.contains_key(name);
        if !is_fit || !is_new {
            return false;
        }
        match (&other.current, number) {
            (Current::Unread, _) => return false,
            (Current::Unset, _) => drop(self.arguments.remove(name)),
            (Current::Is(_), Some(number)) => {
                let number = AMQPValue::LongLongInt(number);
                self.arguments.insert(name.into(), number);
            }
            (Current::Is(value), None) => drop(self.arguments.insert(name.into(), text(value))),
        }
        let current = other.current.clone();
        self.taken.insert(name.to_owned(), current);
        true
    }

    /// Whether it has an end, at which it makes room by dropping what was there first.
    fn drops(&self) -> bool {
        let has_end = ["x-max-length", "x-max-length-bytes"]
            .iter()
            .any(|name| self.taken.contains_key(*name));
        has_end && !self.taken.contains_key(OVERFLOW)
    }

    /// Whether how often a message may come back is left to the server.
    fn is_server_limited(&self) -> bool {
        self.taken.get(LIMIT) == Some(&Current::Unset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn other(argument: &str, current: Current) -> Difference {
        Difference {
            argument: argument.to_owned(),
            current,
        }
    }

    #[test]
    fn what_an_operator_may_decide_is_taken_over() {
        let is = |value: &str| Current::Is(value.to_owned());
        let cases = [
            ("x-max-length", is("5"), true),
            ("x-queue-leader-locator", is("balanced"), true),
            ("x-overflow", is("reject-publish"), true),
            ("x-overflow", is("drop-head"), false),
            ("x-delivery-limit", is("-1"), true),
            ("x-delivery-limit", is("2147483647"), true),
            ("x-delivery-limit", is("20"), false),
            ("x-delivery-limit", Current::Unset, true),
            ("x-delivery-limit", Current::Unread, false),
            ("x-max-length", Current::Unread, false),
            ("x-message-ttl", is("1000"), false),
            ("x-expires", is("1000"), false),
            ("x-dead-letter-exchange", is("others"), false),
            ("x-single-active-consumer", Current::Unset, false),
            ("x-queue-type", is("classic"), false),
            ("durable", is("false"), false),
            ("auto_delete", is("true"), false),
        ];
        for (argument, current, is_taken) in cases {
            let mut settings = Settings::default();
            let other = other(argument, current);
            assert_eq!(settings.take(&other), is_taken, "{other:?}");
            assert!(!settings.take(&other), "once is enough: {other:?}");
        }
    }

    #[test]
    fn a_queue_with_an_end_has_to_refuse_what_is_beyond_it() {
        let mut settings = Settings::default();
        assert!(!settings.drops());
        assert!(settings.take(&other("x-max-length", Current::Is("5".to_owned()))));
        assert!(settings.drops());
        let refuses = Current::Is("reject-publish".to_owned());
        assert!(settings.take(&other("x-overflow", refuses)));
        assert!(!settings.drops());
        let arguments = settings.arguments();
        let length = arguments.inner().get("x-max-length");
        assert_eq!(length, Some(&AMQPValue::LongLongInt(5)));
    }
}
