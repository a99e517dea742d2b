//! The queues of a group, one for each partition of a topic: creating those that are missing.

use eventbus_core::{Group, Result, Topic};
use lapin::types::{AMQPValue, FieldTable};

use crate::error::difference;
use crate::link::{Link, natively};
use crate::names;
use crate::topics::{DURABLE, bind, explain, text};

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
/// `Conflict` when a queue of such a name would not keep the order or hand messages to several.
pub(crate) async fn declare_group(
    operation: &'static str,
    link: &Link,
    group: &Group,
    topic: &Topic,
    partitions: u32,
) -> Result<()> {
    names::check(operation, topic, group)?;
    if partitions >= MANY_QUEUES {
        tracing::warn!(
            topic = topic.as_str(),
            group = group.as_str(),
            partitions,
            "many partitions: each is a quorum queue for every group"
        );
    }
    let mut channel = link.channel(operation).await?;
    for partition in 0..partitions {
        let name = names::group_queue(topic, group, partition);
        let declared = channel.queue_declare(name.clone(), DURABLE, group_arguments());
        if let Err(error) = natively(operation, declared).await? {
            let is_fit = difference(&error).is_some_and(|difference| {
                !matches!(
                    difference.argument.as_str(),
                    "x-queue-type" | "x-single-active-consumer"
                )
            });
            if !is_fit {
                return Err(explain(operation, topic, error).with("queue", name));
            }
            // An operator has set it up otherwise, in what is theirs to decide.
            channel = link.channel(operation).await?;
        }
        bind(operation, &channel, topic, name, partition).await?;
    }
    Ok(())
}

fn group_arguments() -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    let single = AMQPValue::Boolean(true);
    arguments.insert("x-single-active-consumer".into(), single);
    let limit = AMQPValue::LongInt(DELIVERY_LIMIT);
    arguments.insert("x-delivery-limit".into(), limit);
    arguments
}
