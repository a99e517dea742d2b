//! How far groups are: a position for each partition, moved only by who holds its lease.
//!
//! `eventbus:positions:TOPIC` holds, by `GROUP PARTITION`, the first position that is not settled, as 39
//! digits. What every group has read is found by one look at it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use eventbus_core::log::{Advance, Place, TopicLanes, furthest};
use eventbus_core::{
    Error, ErrorKind, Group, Lease, Position, Result, Start, Topic, TopicPartition,
};
use redis::{FromRedisValue, Pipeline, Value};
use tokio::sync::Notify;

use crate::database::Database;
use crate::error::into_error;
use crate::leases::{EXPIRIES, leases_key, place_name};
use crate::pages::{self, Look};
use crate::position;
use crate::topics::stream;

const OPEN: &str = "open partitions";
const SETTLE: &str = "settle";

/// A server whose memory is full lets it run all the same: what is settled makes room.
///
/// Moves positions whose epoch is the lease's, never back; answers how many of them were.
const ADVANCE: &str = "#!lua flags=allow-oom
    local moved = 0
    for i = 1, #ARGV, 4 do
        local place, epoch, field, position = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
        local number = (i + 3) / 4
        local lease = redis.call('HGET', KEYS[2 * number - 1], place)
        if lease and string.match(lease, '^(%d+) ') == epoch then
            local known = redis.call('HGET', KEYS[2 * number], field)
            if not known or known < position then
                redis.call('HSET', KEYS[2 * number], field, position)
            end
            moved = moved + 1
        end
    end
    return moved";

/// Raises for how long a group is remembered.
const REMEMBER: &str = "#!lua flags=allow-oom
    local known = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0')
    if known < tonumber(ARGV[2]) then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
    return 1";

/// Sets a position whose epoch is the lease's, wherever it was.
const BEGIN: &str = "#!lua flags=allow-oom
    local lease = redis.call('HGET', KEYS[1], ARGV[1])
    if not lease or string.match(lease, '^(%d+) ') ~= ARGV[2] then return 0 end
    redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
    return 1";

pub(crate) fn positions_key(topic: &Topic) -> String {
    format!("eventbus:positions:{topic}")
}

pub(crate) fn position_name(group: &Group, partition: u32) -> String {
    format!("{group} {partition}")
}

impl Database {
    /// Has a group begin where it has not begun yet, and returns its number.
    pub(crate) async fn join_group(
        &self,
        operation: &'static str,
        group: &Group,
        topics: &[Arc<TopicLanes>],
        start: Start,
    ) -> Result<i64> {
        for topic in topics {
            let all = 0..topic.partitions;
            let known = self.positions(operation, group, topic, all).await?;
            for partition in 0..topic.partitions {
                if known.contains_key(&partition) {
                    continue;
                }
                let stream = stream(topic, partition);
                let look = pages::look(&self.server, operation, &stream).await?;
                let begin = pages::start(&self.server, operation, &stream, look, start).await?;
                let mut set = redis::cmd("HSETNX");
                set.arg(positions_key(&topic.name));
                set.arg(position_name(group, partition));
                set.arg(position::stored(begin));
                let _: bool = self.server.control.ask(operation, &set).await?;
            }
        }
        self.remember_for(operation, group).await?;
        for topic in topics {
            self.known.reads(&topic.name);
        }
        Ok(self.known.group(group))
    }

    /// Has the group remembered as long as this client is set up to, or as another one is for longer.
    async fn remember_for(&self, operation: &'static str, group: &Group) -> Result<()> {
        let millis = u64::try_from(self.config.group_expiry.as_millis()).unwrap_or(u64::MAX);
        let mut set = redis::cmd("EVAL");
        set.arg(REMEMBER).arg(1).arg(EXPIRIES);
        // What Lua counts exactly; longer is for ever.
        set.arg(group.as_str()).arg(millis.min(1 << 53));
        let _: Value = self.server.control.ask(operation, &set).await?;
        Ok(())
    }

    /// How far a group is on these partitions of a topic.
    pub(crate) async fn positions(
        &self,
        operation: &'static str,
        group: &Group,
        topic: &TopicLanes,
        partitions: Range<u32>,
    ) -> Result<HashMap<u32, Position>> {
        let mut get = redis::cmd("HMGET");
        get.arg(positions_key(&topic.name));
        for partition in partitions.clone() {
            get.arg(position_name(group, partition));
        }
        let found: Vec<Option<String>> = self.server.control.ask(operation, &get).await?;
        let mut positions = HashMap::new();
        for (partition, text) in partitions.zip(found) {
            if let Some(text) = text {
                let position = stored_position(operation, &topic.name, &text)?;
                positions.insert(partition, position);
            }
        }
        Ok(positions)
    }

    /// Where the group goes on at places that were granted.
    pub(crate) async fn places(
        &self,
        group: i64,
        leases: &[Lease],
        notify: &Arc<Notify>,
    ) -> Result<Vec<Place>> {
        let Some(group) = self.known.group_name(group) else {
            return Ok(Vec::new());
        };
        let mut topics = Vec::with_capacity(leases.len());
        let mut questions = Pipeline::with_capacity(3 * leases.len());
        for lease in leases {
            let TopicPartition { topic, partition } = &lease.place;
            let found = self.expect_topic(OPEN, topic).await?;
            if *partition >= found.partitions {
                return Err(shrunk(&found, *partition));
            }
            let held = questions.cmd("HGET").arg(leases_key(&group));
            held.arg(place_name(topic, *partition));
            let known = questions.cmd("HGET").arg(positions_key(topic));
            known.arg(position_name(&group, *partition));
            questions.add_command(pages::ask_look(&stream(&found, *partition)));
            topics.push(found);
        }
        let answers = self.server.control.send(&questions).await;
        let answers: Vec<Value> = answers.map_err(|error| into_error(OPEN, error))?;
        let mut answers = answers.into_iter();
        let mut places = Vec::with_capacity(leases.len());
        for (lease, topic) in leases.iter().zip(topics) {
            let held: Option<String> = read(answers.next())?;
            let known: Option<String> = read(answers.next())?;
            let look = Look::read(answers.next().unwrap_or(Value::Nil))?;
            let epoch = held.as_deref().and_then(|held| held.split(' ').next());
            if epoch != Some(lease.epoch.to_string().as_str()) {
                // It was granted to somebody else since.
                continue;
            }
            let known = known.map(|text| stored_position(OPEN, &topic.name, &text));
            let known = known.transpose()?;
            let (position, left) = self.begin(&group, lease, &topic, known, look).await?;
            let partition = lease.place.partition;
            let row = topic.first_lane + partition;
            let end = self.wakes.lane(row, look.end());
            end.listen(notify);
            places.push(Place {
                position,
                topic,
                partition,
                until: Position(u128::MAX),
                left,
                end,
                epoch: Some(lease.epoch),
            });
        }
        Ok(places)
    }

    /// Where a group goes on that was as far as is `known`, and where it was, if it cannot go on there: the
    /// server may have lost how far it was, or the end of the stream.
    async fn begin(
        &self,
        group: &Group,
        lease: &Lease,
        topic: &TopicLanes,
        known: Option<Position>,
        look: Look,
    ) -> Result<(Position, Option<Position>)> {
        let TopicPartition {
            topic: name,
            partition,
        } = &lease.place;
        let position = match known {
            Some(known) if !look.has_lost(position::from(known)) => return Ok((known, None)),
            Some(known) => {
                let stream = stream(topic, *partition);
                let again = pages::again(&self.server, OPEN, &stream, look, known).await?;
                tracing::error!(
                    %group, topic = %name, partition, from = %known, to = %again,
                    "the stream has lost its end, as in a failover to a replica that had not got all of it: what was added in the last minute before is handled again"
                );
                again
            }
            None => {
                tracing::error!(
                    %group, topic = %name, partition,
                    "the server has lost how far the group was: it begins with the first message there is"
                );
                look.base()
            }
        };
        let mut set = redis::cmd("EVAL");
        set.arg(BEGIN).arg(2);
        set.arg(leases_key(group)).arg(positions_key(name));
        set.arg(place_name(name, *partition)).arg(lease.epoch);
        set.arg(position_name(group, *partition));
        set.arg(position::stored(position));
        let _: u64 = self.server.control.ask(OPEN, &set).await?;
        Ok((position, Some(known.unwrap_or(Position(0)))))
    }

    /// Records how far groups are; what comes too late is counted.
    pub(crate) async fn advance(&self, advances: &[Advance]) -> Result<()> {
        let furthest = furthest(advances);
        let mut keys = Vec::with_capacity(2 * furthest.len());
        let mut values = Vec::with_capacity(4 * furthest.len());
        for advance in &furthest {
            let group = self.known.group_name(advance.group);
            let (Some(group), Some((topic, partition))) = (group, self.known.place(advance.lane))
            else {
                continue;
            };
            keys.extend([leases_key(&group), positions_key(&topic)]);
            values.extend([
                place_name(&topic, partition),
                advance.epoch.to_string(),
                position_name(&group, partition),
                position::stored(advance.position),
            ]);
        }
        let mut ask = redis::cmd("EVAL");
        ask.arg(ADVANCE).arg(keys.len()).arg(keys).arg(values);
        let moved: u64 = self.server.control.ask(SETTLE, &ask).await?;
        self.count_stale((furthest.len() as u64).saturating_sub(moved));
        Ok(())
    }
}

fn read<T: FromRedisValue>(answer: Option<Value>) -> Result<T> {
    let read = redis::from_redis_value(answer.unwrap_or(Value::Nil));
    read.map_err(|error| into_error(OPEN, error.into()))
}

/// A group shares out a partition that its topic does not have.
fn shrunk(topic: &TopicLanes, partition: u32) -> Error {
    Error::new(
        ErrorKind::Conflict,
        OPEN,
        "the topic has fewer partitions than other members of the group know of: it was created anew, so restart those that knew it before",
    )
    .with("topic", &topic.name)
    .with("partitions", topic.partitions)
    .with("partition", partition)
}

/// A position as a group has it on the server.
pub(crate) fn stored_position(
    operation: &'static str,
    topic: &Topic,
    text: &str,
) -> Result<Position> {
    position::read(text.as_bytes()).ok_or_else(|| damaged(operation, topic))
}

pub(crate) fn damaged(operation: &'static str, topic: &Topic) -> Error {
    Error::new(
        ErrorKind::Codec,
        operation,
        "a group's position cannot be read: somebody else wrote to `eventbus:positions:*`",
    )
    .with("topic", topic)
}
