//! What is answered beside the flow of messages.

use std::sync::Arc;

use eventbus_core::log::TopicLanes;
use eventbus_core::refusal::{group_has_members, never_subscribed, no_partition};
use eventbus_core::{
    AdminReply, AdminRequest, Error, ErrorKind, Group, GroupPosition, LaneLag, Position, Result,
    Start, Topic, TopicReport, TopicSpec,
};

use super::config::PARTITIONS_MAX;
use super::database::Database;
use super::groups::lanes_of;
use super::leases;
use super::page::{ids, stored, to_u64};
use super::tables::Tables;
use super::topics::{Applied, saturated};

impl Database {
    /// Answers an administrative request.
    pub(super) async fn answer(&self, request: AdminRequest) -> Result<AdminReply> {
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
            } => self.trim_topic(&topic, partition, before).await,
            AdminRequest::Health => self.health().await,
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                "admin",
                "the PostgreSQL broker does not know this request",
            )),
        }
    }

    async fn apply(&self, specs: &[TopicSpec]) -> Result<AdminReply> {
        for spec in specs {
            if spec.partitions.is_some_and(|count| count > PARTITIONS_MAX) {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "apply topics",
                    "a topic has at most 4096 partitions: declare fewer",
                )
                .with("topic", &spec.name));
            }
        }
        let applied = self.apply_topics(specs).await?;
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
        let lanes = ids(&lanes_of(&topics));
        let sql = self.tables.sql(SELECT_GROUPS);
        let rows = self.query(GROUPS, || sqlx::query(sql.clone()).bind(&lanes));
        let mut positions = Vec::new();
        for row in &rows.await? {
            let group: String = self.column(GROUPS, row, 0)?;
            let topic: String = self.column(GROUPS, row, 1)?;
            let partition: i32 = self.column(GROUPS, row, 2)?;
            let position: i64 = self.column(GROUPS, row, 3)?;
            let lag: i64 = self.column(GROUPS, row, 4)?;
            positions.push(GroupPosition::new(
                Group::new(&group)?,
                Topic::new(&topic)?,
                partition as u32,
                Position(position as u128),
                lag as u64,
            ));
        }
        Ok(AdminReply::Groups(positions))
    }

    async fn lag(&self, group: &Group, topics: &[Topic]) -> Result<AdminReply> {
        let mut lags = Vec::new();
        for name in topics {
            let topic = self.find_topic(LAG, name).await?;
            let id = self.find_group(LAG, group).await?;
            let id = id.ok_or_else(|| never_subscribed(LAG, group, name))?;
            let sql = self.tables.sql(SELECT_LAG);
            let rows = self
                .query(LAG, || {
                    let query = sqlx::query(sql.clone()).bind(id);
                    query
                        .bind(topic.first_lane as i32)
                        .bind(topic.partitions as i32)
                })
                .await?;
            if rows.len() < topic.partitions as usize {
                return Err(never_subscribed(LAG, group, name));
            }
            for row in &rows {
                let partition: i32 = self.column(LAG, row, 0)?;
                let messages: i64 = self.column(LAG, row, 1)?;
                lags.push(LaneLag::new(
                    name.clone(),
                    partition as u32,
                    messages as u64,
                ));
            }
        }
        Ok(AdminReply::Lag(lags))
    }

    async fn reset_group(&self, group: &Group, name: &Topic, to: Start) -> Result<AdminReply> {
        let topic = self.find_topic(RESET, name).await?;
        let id = self.find_group(RESET, group).await?;
        let id = id.ok_or_else(|| never_subscribed(RESET, group, name))?;
        let lanes: Vec<u32> = topic.lanes().map(|(_, lane)| lane).collect();
        let found = self.start_positions(RESET, &lanes, to).await?;
        let positions = lanes.iter().map(|lane| found.get(lane).copied());
        let positions: Vec<Option<i64>> = positions.map(|found| found.map(stored)).collect();

        let mut session = self.begin(RESET).await?;
        leases::lock_group(&self.tables, id, &mut session).await?;
        leases::end_overdue(&self.tables, id, &[], &mut session).await?;
        let members = leases::members(&self.tables, id, &mut session).await?;
        let busy = members.iter().any(|member| {
            let mut topics = member.topics.iter();
            topics.any(|topic| topic.name == *name) && !member.process.is_dead()
        });
        if busy {
            return Err(group_has_members(RESET, group, name));
        }
        let fence = sqlx::query(self.tables.sql(FENCE))
            .bind(id)
            .bind(ids(&lanes));
        session.rows(fence).await?;
        let moves = sqlx::query(self.tables.sql(MOVE))
            .bind(id)
            .bind(ids(&lanes))
            .bind(positions);
        if session.rows(moves).await?.is_empty() {
            return Err(never_subscribed(RESET, group, name));
        }
        session.commit().await?;
        Ok(AdminReply::Done)
    }

    async fn trim_topic(
        &self,
        name: &Topic,
        partition: u32,
        before: Position,
    ) -> Result<AdminReply> {
        let topic = self.find_topic("trim", name).await?;
        if partition >= topic.partitions {
            return Err(no_partition("trim", name, partition));
        }
        self.trim(topic.first_lane + partition, to_u64(before))
            .await?;
        Ok(AdminReply::Done)
    }

    /// Asks for the right to write, and writes nothing.
    async fn health(&self) -> Result<AdminReply> {
        let sql = self
            .tables
            .sql("SELECT id FROM {s}.lanes ORDER BY id LIMIT 1 FOR SHARE SKIP LOCKED");
        self.query("check health", || sqlx::query(sql.clone()))
            .await?;
        Ok(AdminReply::Done)
    }
}

const GROUPS: &str = "look for groups";
const LAG: &str = "read lag";
const RESET: &str = "reset group";

const SELECT_GROUPS: &str = "
    SELECT consumer.name, topic.name, lane.id - topic.first_lane,
        greatest(mine.position, lane.base),
        greatest(lane.next - greatest(mine.position, lane.base), 0)
    FROM {s}.cursors AS mine
    JOIN {s}.consumer_groups AS consumer ON consumer.id = mine.consumer_group
    JOIN {s}.lanes AS lane ON lane.id = mine.lane
    JOIN {s}.topics AS topic
        ON lane.id >= topic.first_lane AND lane.id < topic.first_lane + topic.partitions
    WHERE mine.lane = ANY($1)
    ORDER BY consumer.name COLLATE \"C\", array_position($1, topic.first_lane), lane.id";

const SELECT_LAG: &str = "
    SELECT lane.id - $2, greatest(lane.next - greatest(mine.position, lane.base), 0)
    FROM {s}.cursors AS mine JOIN {s}.lanes AS lane ON lane.id = mine.lane
    WHERE mine.consumer_group = $1 AND lane.id >= $2 AND lane.id < $2 + $3
    ORDER BY lane.id";

/// A raised epoch keeps away what a former holder may still settle.
const FENCE: &str = "
    WITH locked AS MATERIALIZED (
        SELECT lane FROM {s}.leases WHERE consumer_group = $1 AND lane = ANY($2)
        ORDER BY lane FOR UPDATE
    )
    UPDATE {s}.leases AS mine SET epoch = mine.epoch + 1, holder = NULL
    FROM locked WHERE mine.consumer_group = $1 AND mine.lane = locked.lane";

/// Positions before the first one kept are no gap: they were asked for knowingly.
const MOVE: &str = "
    UPDATE {s}.cursors AS mine
    SET position = greatest(new.position, lane.base)
    FROM unnest($2::int[], $3::bigint[]) AS new(lane, position)
    JOIN {s}.lanes AS lane ON lane.id = new.lane
    WHERE mine.consumer_group = $1 AND mine.lane = new.lane
    RETURNING mine.lane";

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
        let change = tables.sql("UPDATE {s}.topics SET");
        let (change, name) = (change.as_str(), &report.name);
        let drift = format!(
            "a retention of {wanted} {unit} is declared, the topic has {has}; messages could vanish, so it stays: to change it, execute in the database: {change} {column} = {wanted} WHERE name = '{name}'"
        );
        report = report.with_drift(drift);
    }
    report
}
