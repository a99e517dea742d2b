//! What is answered beside the flow of messages.

use std::sync::Arc;

use eventbus_core::log::TopicLanes;
use eventbus_core::refusal::{group_has_members, never_subscribed, no_partition};
use eventbus_core::{
    AdminReply, AdminRequest, Error, ErrorKind, Group, GroupPosition, LaneLag, Position, Result,
    Start, Topic, TopicReport, TopicSpec,
};
use futures_util::FutureExt;
use sqlx::SqliteConnection;

use super::config::PARTITIONS_MAX;
use super::database::Database;
use super::error::into_error;
use super::janitor;
use super::leases;
use super::page::to_u64;
use super::settle::cursor_seal;
use super::tables::Tables;
use super::topics::{Applied, saturated};

impl Database {
    /// Answers an administrative request.
    pub(super) async fn answer(&self, request: AdminRequest) -> Result<AdminReply> {
        match request {
            AdminRequest::ApplyTopics(topics) => self.apply(topics).await,
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
                "the SQLite broker does not know this request",
            )),
        }
    }

    async fn apply(&self, specs: Vec<TopicSpec>) -> Result<AdminReply> {
        for spec in &specs {
            if spec.partitions.is_some_and(|count| count > PARTITIONS_MAX) {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "apply topics",
                    "a topic has at most 4096 partitions: declare fewer",
                )
                .with("topic", &spec.name));
            }
        }
        let applied = self.apply_topics(specs.clone()).await?;
        let reports = specs.iter().zip(&applied);
        let reports = reports.map(|(spec, applied)| report(&self.tables, spec, applied));
        Ok(AdminReply::Topics(reports.collect()))
    }

    async fn describe(&self, topics: &[Topic]) -> Result<AdminReply> {
        let topics = self.named_topics("describe topics", topics).await?;
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
        let all = match names {
            [] => self.topic_names(operation).await?,
            names => names.to_vec(),
        };
        let mut topics = Vec::with_capacity(all.len());
        for name in &all {
            topics.push(self.find_topic(operation, name).await?);
        }
        Ok(topics)
    }

    async fn group_positions(&self, topics: &[Topic]) -> Result<AdminReply> {
        let topics = self.named_topics(GROUPS, topics).await?;
        let mut positions = Vec::new();
        for (group, id) in self.groups(GROUPS).await? {
            for topic in &topics {
                let lanes: Vec<u32> = topic.lanes().map(|(_, lane)| lane).collect();
                // The places first: between the two reads the log only grows.
                let cursors = self.cursors(GROUPS, id, &lanes).await?;
                let rows = self.lanes(GROUPS, &lanes).await?;
                for (partition, lane) in topic.lanes() {
                    if let (Some(cursor), Some(row)) = (cursors.get(&lane), rows.get(&lane)) {
                        let position = cursor.position.max(row.base);
                        positions.push(GroupPosition::new(
                            group.clone(),
                            topic.name.clone(),
                            partition,
                            Position(position.into()),
                            row.next.saturating_sub(position),
                        ));
                    }
                }
            }
        }
        Ok(AdminReply::Groups(positions))
    }

    async fn lag(&self, group: &Group, topics: &[Topic]) -> Result<AdminReply> {
        let mut lags = Vec::new();
        for name in topics {
            let topic = self.find_topic(LAG, name).await?;
            let id = self.find_group(LAG, group).await?;
            let id = id.ok_or_else(|| never_subscribed(LAG, group, name))?;
            let lanes: Vec<u32> = topic.lanes().map(|(_, lane)| lane).collect();
            // The places first: between the two reads the log only grows.
            let cursors = self.cursors(LAG, id, &lanes).await?;
            let rows = self.lanes(LAG, &lanes).await?;
            for (partition, lane) in topic.lanes() {
                let (Some(cursor), Some(row)) = (cursors.get(&lane), rows.get(&lane)) else {
                    return Err(never_subscribed(LAG, group, name));
                };
                let messages = row.next.saturating_sub(cursor.position.max(row.base));
                lags.push(LaneLag::new(name.clone(), partition, messages));
            }
        }
        Ok(AdminReply::Lag(lags))
    }

    async fn reset_group(&self, group: &Group, name: &Topic, to: Start) -> Result<AdminReply> {
        let topic = self.find_topic(RESET, name).await?;
        let id = self.find_group(RESET, group).await?;
        let id = id.ok_or_else(|| never_subscribed(RESET, group, name))?;
        let mut moves = Vec::new();
        for (_, lane) in topic.lanes() {
            // Positions before the first one kept are no gap: they were asked for knowingly.
            let base = self.lane(lane).await?.base;
            moves.push((lane, self.start_position(lane, to).await?.max(base)));
        }
        let reset = Reset {
            tables: self.tables.clone(),
            group: id,
            topic: name.clone(),
            moves,
        };
        let moved = self.writer.run(RESET, move |connection| {
            let reset = reset.clone();
            async move { reset.run(connection).await }.boxed()
        });
        match moved.await? {
            Moved::All => Ok(AdminReply::Done),
            Moved::Missing => Err(never_subscribed(RESET, group, name)),
            Moved::Busy => Err(group_has_members(RESET, group, name)),
        }
    }

    async fn trim(&self, name: &Topic, partition: u32, before: Position) -> Result<AdminReply> {
        let topic = self.find_topic("trim", name).await?;
        if partition >= topic.partitions {
            return Err(no_partition("trim", name, partition));
        }
        let lane = topic.first_lane + partition;
        janitor::trim(&self.writer, &self.tables, lane, to_u64(before)).await?;
        Ok(AdminReply::Done)
    }

    /// Reads through another connection than it writes, and writes nothing.
    async fn health(&self) -> Result<AdminReply> {
        let query = sqlx::query(self.sql("SELECT version FROM {p}schema"));
        self.read("check health", query).await?;
        let asked = self
            .writer
            .run("check health", |_| async { Ok(()) }.boxed());
        asked.await?;
        Ok(AdminReply::Done)
    }
}

const GROUPS: &str = "look for groups";
const LAG: &str = "read lag";
const RESET: &str = "reset group";

fn report(tables: &Tables, declared: &TopicSpec, applied: &Applied) -> TopicReport {
    let TopicLanes { partitions, .. } = *applied.topic;
    let mut report = TopicReport::new(declared.name.clone(), partitions);
    if applied.created {
        return report.with_created();
    }
    report = report.compared_with(declared);
    let micros = declared.retention.map(|time| saturated(time.as_micros()));
    let bytes = declared.retention_bytes;
    let bytes = bytes.map(|bytes| saturated(bytes.into()));
    for (column, unit, declared, has) in [
        ("retention", "microseconds", micros, applied.retention),
        ("retention_bytes", "bytes", bytes, applied.retention_bytes),
    ] {
        let Some(wanted) = declared.filter(|_| declared != has) else {
            continue;
        };
        let has = has.map_or("none".to_owned(), |has| has.to_string());
        let change = tables.sql("UPDATE {p}topics SET");
        let (change, name) = (change.as_str(), &report.name);
        let drift = format!(
            "a retention of {wanted} {unit} is declared, the topic has {has}; messages could vanish, so it stays: to change it, execute in the file: {change} {column} = {wanted} WHERE name = '{name}'"
        );
        report = report.with_drift(drift);
    }
    report
}

/// Moves a group on one topic.
#[derive(Clone)]
struct Reset {
    tables: Tables,
    group: i64,
    topic: Topic,
    moves: Vec<(u32, u64)>,
}

enum Moved {
    All,
    /// It has no place on the topic.
    Missing,
    /// It has members there.
    Busy,
}

/// A raised epoch keeps away what a former holder may still settle.
const MOVE: &str = "
    UPDATE {p}cursors AS mine
    SET position = new.position, seal = new.seal, epoch = mine.epoch + 1, holder = NULL
    FROM (SELECT value->>0 AS lane, value->>1 AS position, value->>2 AS seal FROM json_each(?2)) AS new
    WHERE mine.consumer_group = ?1 AND mine.lane = new.lane
    RETURNING lane";

impl Reset {
    async fn run(&self, connection: &mut SqliteConnection) -> Result<Moved> {
        let Self { tables, group, .. } = self;
        leases::end_overdue(tables, &leases::LANES, *group, "[]", connection).await?;
        let members = leases::members(tables, *group, connection).await?;
        let busy = members.iter().any(|member| {
            let mut topics = member.topics.iter();
            topics.any(|topic| topic.name == self.topic) && !member.process.is_dead()
        });
        if busy {
            return Ok(Moved::Busy);
        }
        let rows: Vec<String> = self
            .moves
            .iter()
            .map(|(lane, position)| {
                let seal = cursor_seal(*group, *lane, *position);
                format!("[{lane},{position},{seal}]")
            })
            .collect();
        let moved = sqlx::query(tables.sql(MOVE))
            .bind(group)
            .bind(format!("[{}]", rows.join(",")))
            .fetch_all(connection)
            .await
            .map_err(|error| into_error(RESET, error))?;
        match moved.is_empty() {
            true => Ok(Moved::Missing),
            false => Ok(Moved::All),
        }
    }
}
