//! How far groups are: a position for each partition, moved only by who holds its lease.
//!
//! `eventbus:positions:TOPIC` holds, by `GROUP PARTITION`, the first position that is not settled, as 32
//! hexadecimal digits. What every group has read is found by one look at it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use eventbus_core::log::{Advance, Place, TopicLanes, furthest};
use eventbus_core::{Error, ErrorKind, Group, Lease, Position, Result, Start, Topic};
use tokio::sync::Notify;

use crate::database::Database;
use crate::leases::{leases_key, place_name};
use crate::pages;
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
        Ok(self.known.group(group))
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
                let position = position::read(text.as_bytes());
                let position = position.ok_or_else(|| damaged(operation, &topic.name))?;
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
        let mut places = Vec::with_capacity(leases.len());
        for lease in leases {
            let (name, partition) = (&lease.place.topic, lease.place.partition);
            let topic = self.expect_topic(OPEN, name).await?;
            if partition >= topic.partitions {
                continue;
            }
            let mut ask = redis::cmd("HGET");
            ask.arg(leases_key(&group)).arg(place_name(name, partition));
            let held: Option<String> = self.server.control.ask(OPEN, &ask).await?;
            let epoch = held.as_deref().and_then(|held| held.split(' ').next());
            if epoch != Some(lease.epoch.to_string().as_str()) {
                // It was granted to somebody else since.
                continue;
            }
            let mine = partition..partition + 1;
            let known = self.positions(OPEN, &group, &topic, mine).await?;
            let stream = stream(&topic, partition);
            let look = pages::look(&self.server, OPEN, &stream).await?;
            let row = topic.first_lane + partition;
            let end = self.wakes.lane(row, look.end());
            end.listen(notify);
            places.push(Place {
                position: known.get(&partition).copied().unwrap_or(look.base()),
                topic,
                partition,
                until: Position(u128::MAX),
                end,
                epoch: Some(lease.epoch),
            });
        }
        Ok(places)
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

pub(crate) fn damaged(operation: &'static str, topic: &Topic) -> Error {
    Error::new(
        ErrorKind::Codec,
        operation,
        "a group's position cannot be read: somebody else wrote to `eventbus:positions:*`",
    )
    .with("topic", topic)
}
