//! What is answered beside the flow of messages.

use std::collections::HashMap;
use std::sync::Arc;

use eventbus_core::log::TopicLanes;
use eventbus_core::refusal::{group_has_members, never_subscribed, no_partition};
use eventbus_core::{
    AdminReply, AdminRequest, Error, ErrorKind, Group, GroupPosition, LaneLag, Position, Result,
    Start, Topic, TopicReport, TopicSpec,
};

use crate::config::PARTITIONS_MAX;
use crate::database::Database;
use crate::groups::{damaged, position_name, positions_key, stored_position};
use crate::leases::{self, leases_key, place_name};
use crate::pages::{self, Look};
use crate::position::{self, From};
use crate::topics::{StoredTopic, TOPICS, stream};

const APPLY: &str = "apply topics";
const DESCRIBE: &str = "describe topics";
const GROUPS: &str = "look for groups";
const LAG: &str = "read lag";
const RESET: &str = "reset group";
const TRIM: &str = "trim";

/// Moves a group, and raises the epoch of the lease, which keeps away what a former holder may still
/// settle.
const MOVE: &str = "
    local lease = redis.call('HGET', KEYS[1], ARGV[1]) or '0 -'
    local epoch = string.match(lease, '^(%d+) ')
    redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', epoch + 1) .. ' -')
    redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
    return 1";

impl Database {
    /// Answers an administrative request.
    pub(crate) async fn answer(&self, request: AdminRequest) -> Result<AdminReply> {
        match request {
            AdminRequest::ApplyTopics(topics) => self.apply(&topics).await,
            AdminRequest::DescribeTopics(topics) => self.describe(&topics).await,
            AdminRequest::Lag { group, topics } => self.lag(&group, &topics).await,
            AdminRequest::Groups { topics } => self.group_positions(&topics).await,
            AdminRequest::ResetGroup { group, topic, to } => {
                self.reset_group(&group, &topic, to).await
            }
            AdminRequest::Trim {
                topic,
                partition,
                before,
            } => self.trim(&topic, partition, before).await,
            AdminRequest::Health => self.health().await,
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                "admin",
                "the Redis broker does not know this request",
            )),
        }
    }

    async fn apply(&self, specs: &[TopicSpec]) -> Result<AdminReply> {
        for spec in specs {
            if spec.partitions.is_some_and(|count| count > PARTITIONS_MAX) {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    APPLY,
                    "a topic has at most 4096 partitions: declare fewer",
                )
                .with("topic", &spec.name));
            }
        }
        let mut reports = Vec::with_capacity(specs.len());
        for spec in specs {
            let (stored, created) = self.apply_topic(APPLY, spec).await?;
            reports.push(report(spec, stored, created));
        }
        Ok(AdminReply::Topics(reports))
    }

    async fn describe(&self, names: &[Topic]) -> Result<AdminReply> {
        let topics = self.named_topics(DESCRIBE, names).await?;
        let report =
            |topic: &Arc<TopicLanes>| TopicReport::new(topic.name.clone(), topic.partitions);
        Ok(AdminReply::Topics(topics.iter().map(report).collect()))
    }

    /// The topics of these names; all there are, by name, where none is given.
    async fn named_topics(
        &self,
        operation: &'static str,
        names: &[Topic],
    ) -> Result<Vec<Arc<TopicLanes>>> {
        let names = match names {
            [] => {
                let mut list = redis::cmd("HKEYS");
                list.arg(TOPICS);
                let mut all: Vec<String> = self.server.control.ask(operation, &list).await?;
                all.sort();
                all.iter()
                    .map(|name| Topic::new(name))
                    .collect::<Result<_>>()?
            }
            names => names.to_vec(),
        };
        let mut topics = Vec::with_capacity(names.len());
        for name in &names {
            topics.push(self.expect_topic(operation, name).await?);
        }
        Ok(topics)
    }

    async fn look(
        &self,
        operation: &'static str,
        topic: &TopicLanes,
        partition: u32,
    ) -> Result<Look> {
        pages::look(&self.server, operation, &stream(topic, partition)).await
    }

    async fn group_positions(&self, names: &[Topic]) -> Result<AdminReply> {
        let mut positions = Vec::new();
        for topic in self.named_topics(GROUPS, names).await? {
            let mut all = redis::cmd("HGETALL");
            all.arg(positions_key(&topic.name));
            let all: Vec<(String, String)> = self.server.control.ask(GROUPS, &all).await?;
            // Every group has the same partitions.
            let mut looks = HashMap::new();
            for (name, text) in all {
                let unread = || damaged(GROUPS, &topic.name);
                let (group, partition) = name.rsplit_once(' ').ok_or_else(unread)?;
                let partition = partition.parse().map_err(|_| unread())?;
                let position = stored_position(GROUPS, &topic.name, &text)?;
                let look = match looks.get(&partition) {
                    Some(look) => *look,
                    None => self.look(GROUPS, &topic, partition).await?,
                };
                looks.insert(partition, look);
                positions.push(GroupPosition::new(
                    Group::new(group)?,
                    topic.name.clone(),
                    partition,
                    position.max(look.base()),
                    behind(position::from(position), look),
                ));
            }
        }
        let places = names.to_vec();
        let rank = |topic: &Topic| places.iter().position(|name| name == topic);
        positions.sort_by(|a, b| {
            let key = |it: &GroupPosition| {
                (
                    it.group.clone(),
                    rank(&it.topic),
                    it.topic.clone(),
                    it.partition,
                )
            };
            key(a).cmp(&key(b))
        });
        Ok(AdminReply::Groups(positions))
    }

    async fn lag(&self, group: &Group, topics: &[Topic]) -> Result<AdminReply> {
        let mut lags = Vec::new();
        for name in topics {
            let topic = self.expect_topic(LAG, name).await?;
            let positions = self
                .positions(LAG, group, &topic, 0..topic.partitions)
                .await?;
            for partition in 0..topic.partitions {
                let position = positions.get(&partition);
                let position = position.ok_or_else(|| never_subscribed(LAG, group, name))?;
                let look = self.look(LAG, &topic, partition).await?;
                let messages = behind(position::from(*position), look);
                lags.push(LaneLag::new(name.clone(), partition, messages));
            }
        }
        Ok(AdminReply::Lag(lags))
    }

    async fn reset_group(&self, group: &Group, name: &Topic, to: Start) -> Result<AdminReply> {
        let topic = self.expect_topic(RESET, name).await?;
        if self
            .positions(RESET, group, &topic, 0..topic.partitions)
            .await?
            .is_empty()
        {
            return Err(never_subscribed(RESET, group, name));
        }
        let members = leases::members(&self.server, RESET, group).await?;
        let is_busy = members.iter().any(|member| {
            let mut topics = member.topics.iter();
            topics.any(|topic| topic.name == *name) && !member.process.is_dead()
        });
        if is_busy {
            return Err(group_has_members(RESET, group, name));
        }
        for partition in 0..topic.partitions {
            let place = stream(&topic, partition);
            let look = pages::look(&self.server, RESET, &place).await?;
            let position = pages::start(&self.server, RESET, &place, look, to).await?;
            // Positions before the first one kept are no gap: they were asked for knowingly.
            let position = position.max(look.base());
            let mut ask = redis::cmd("EVAL");
            ask.arg(MOVE)
                .arg(2)
                .arg(leases_key(group))
                .arg(positions_key(name));
            ask.arg(place_name(name, partition))
                .arg(position_name(group, partition));
            ask.arg(position::stored(position));
            let _: i64 = self.server.control.ask(RESET, &ask).await?;
        }
        Ok(AdminReply::Done)
    }

    async fn trim(&self, name: &Topic, partition: u32, before: Position) -> Result<AdminReply> {
        let topic = self.expect_topic(TRIM, name).await?;
        if partition >= topic.partitions {
            return Err(no_partition(TRIM, name, partition));
        }
        let look = self.look(TRIM, &topic, partition).await?;
        let kept = position::from(before.min(look.end())).first();
        let mut trim = redis::cmd("XTRIM");
        trim.arg(stream(&topic, partition))
            .arg("MINID")
            .arg("=")
            .arg(kept.to_string());
        let _: u64 = self.server.control.ask(TRIM, &trim).await?;
        Ok(AdminReply::Done)
    }

    /// Asks for the right to write, and writes nothing.
    async fn health(&self) -> Result<AdminReply> {
        let mut remove = redis::cmd("HDEL");
        remove.arg(TOPICS).arg("");
        let _: i64 = self.server.control.ask("check health", &remove).await?;
        Ok(AdminReply::Done)
    }
}

/// How many entries come at or behind a place.
fn behind(from: From, look: Look) -> u64 {
    let before = from.before.max(look.gone());
    match look.added < from.before {
        // Another stream has begun, of which nothing was read.
        true => look.length,
        false => look.added.saturating_sub(before),
    }
}

fn report(declared: &TopicSpec, stored: StoredTopic, created: bool) -> TopicReport {
    let mut report = TopicReport::new(declared.name.clone(), stored.partitions);
    if created {
        report = report.with_created();
    }
    report = report.compared_with(declared);
    if declared.retention.is_some() && declared.retention != stored.retention {
        let millis = |time: Option<std::time::Duration>| {
            time.map_or("none".to_owned(), |time| format!("{} ms", time.as_millis()))
        };
        let wanted = declared.retention.map_or(0, |time| time.as_millis());
        report = report.with_drift(format!(
            "a retention of {} is declared, the topic has {}; messages could vanish, so it stays: to change it, execute on the server: HSET {TOPICS} {} '{} {wanted}'",
            millis(declared.retention),
            millis(stored.retention),
            declared.name,
            stored.partitions,
        ));
    }
    if declared.retention_bytes.is_some() {
        report = report.with_drift(
            "a retention in bytes is declared, which Redis does not count: declare one in time"
                .to_owned(),
        );
    }
    report
}
