//! What an in-memory server answers beside the flow of messages.

use super::config::PARTITIONS_MAX;
use super::group::Cursor;
use super::state::State;
use crate::broker::{AdminReply, AdminRequest, GroupPosition, LaneLag, TopicReport};
use crate::delivery::{Position, Start};
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Group, Topic};
use crate::refusal::{group_has_members, never_subscribed, no_partition};
use crate::topic::TopicSpec;

impl State {
    /// Answers an administrative request.
    pub(super) fn answer(&mut self, request: AdminRequest) -> Result<AdminReply> {
        match request {
            AdminRequest::ApplyTopics(topics) => self.apply_topics(&topics),
            AdminRequest::DescribeTopics(topics) => self.describe_topics(&topics),
            AdminRequest::Lag { group, topics } => self.lag(&group, &topics),
            AdminRequest::Groups { topics } => self.group_positions(&topics),
            AdminRequest::ResetGroup { group, topic, to } => self.reset_group(&group, &topic, to),
            AdminRequest::Trim {
                topic,
                partition,
                before,
            } => self.trim_topic(&topic, partition, before),
            AdminRequest::Health => Ok(AdminReply::Done),
        }
    }

    fn apply_topics(&mut self, topics: &[TopicSpec]) -> Result<AdminReply> {
        for topic in topics {
            if topic.partitions.is_some_and(|count| count > PARTITIONS_MAX) {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "apply topics",
                    "a topic in memory has at most 4096 partitions: declare fewer",
                )
                .with("topic", &topic.name));
            }
        }
        let reports = topics.iter().map(|topic| self.apply_topic(topic)).collect();
        Ok(AdminReply::Topics(reports))
    }

    fn apply_topic(&mut self, declared: &TopicSpec) -> TopicReport {
        let existing = self.find_topic(&declared.name);
        let topic = existing.unwrap_or_else(|| {
            let default = self.default_partitions(&declared.name);
            self.create_topic(&declared.name, declared.partitions.unwrap_or(default))
        });
        let mut report = self.report(topic);
        if existing.is_none() {
            report = report.with_created();
        }
        let there = report.partitions;
        if let Some(count) = declared.partitions.filter(|count| *count != there) {
            report = report.with_drift(format!(
                "{count} partitions are declared, the topic has {there}"
            ));
        }
        if declared.retention.is_some() {
            report = report.with_drift(
                "a retention time is declared, the in-memory broker keeps by size only",
            );
        }
        if declared.retention_bytes.is_some() {
            report = report.with_drift(
                "a retention size is declared, the in-memory broker keeps by its own size only",
            );
        }
        report
    }

    fn describe_topics(&self, topics: &[Topic]) -> Result<AdminReply> {
        let topics = self.known_topics("describe topics", topics)?;
        let reports = topics.into_iter().map(|topic| self.report(topic));
        Ok(AdminReply::Topics(reports.collect()))
    }

    /// The topics of these names; without names all, in the order of their names.
    fn known_topics(&self, operation: &'static str, names: &[Topic]) -> Result<Vec<usize>> {
        if names.is_empty() {
            let mut all: Vec<usize> = (0..self.topics.len()).collect();
            all.sort_by(|a, b| self.topics[*a].name.cmp(&self.topics[*b].name));
            return Ok(all);
        }
        let known = names.iter().map(|name| self.known_topic(operation, name));
        known.collect()
    }

    fn report(&self, topic: usize) -> TopicReport {
        let topic = &self.topics[topic];
        // A topic has at most 4096 partitions.
        TopicReport::new(topic.name.clone(), topic.partitions.len() as u32)
    }

    fn lag(&self, group: &Group, topics: &[Topic]) -> Result<AdminReply> {
        let mut lanes = Vec::new();
        for name in topics {
            let (topic, cursor) = self.known_cursor("read lag", group, name)?;
            for (index, partition) in self.topics[topic].partitions.iter().enumerate() {
                let messages =
                    partition.cursors[cursor].lag(partition.log.base(), partition.log.end());
                // A topic has at most 4096 partitions.
                lanes.push(LaneLag::new(name.clone(), index as u32, messages));
            }
        }
        Ok(AdminReply::Lag(lanes))
    }

    fn group_positions(&self, topics: &[Topic]) -> Result<AdminReply> {
        let mut positions = Vec::new();
        for topic in self.known_topics("read groups", topics)? {
            let topic = &self.topics[topic];
            for (cursor, group) in topic.groups.iter().enumerate() {
                for (index, partition) in topic.partitions.iter().enumerate() {
                    let (base, end) = (partition.log.base(), partition.log.end());
                    let cursor = &partition.cursors[cursor];
                    positions.push(GroupPosition::new(
                        self.groups[*group].name.clone(),
                        topic.name.clone(),
                        // A topic has at most 4096 partitions.
                        index as u32,
                        Position(cursor.committed.max(base).into()),
                        cursor.lag(base, end),
                    ));
                }
            }
        }
        positions.sort_by(|a, b| {
            (&a.group, &a.topic, a.partition).cmp(&(&b.group, &b.topic, b.partition))
        });
        Ok(AdminReply::Groups(positions))
    }

    fn reset_group(&mut self, group: &Group, name: &Topic, to: Start) -> Result<AdminReply> {
        self.check_start("reset group", name, to)?;
        let (topic, cursor) = self.known_cursor("reset group", group, name)?;
        let busy = self.find_group(group).is_some_and(|group| {
            let mut members = self.groups[group].members.iter();
            members.any(|member| self.member(*member).reads(topic))
        });
        if busy {
            return Err(group_has_members("reset group", group, name));
        }
        for index in 0..self.topics[topic].partitions.len() {
            let position = self.start_position(topic, index, to);
            // Positions before the first one kept are no gap: they were asked for knowingly.
            let partition = &mut self.topics[topic].partitions[index];
            partition.cursors[cursor] = Cursor::new(position.max(partition.log.base()));
        }
        self.announce_space();
        Ok(AdminReply::Done)
    }

    fn trim_topic(&mut self, name: &Topic, partition: u32, before: Position) -> Result<AdminReply> {
        if !self.capabilities.gaps {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "trim",
                "this broker does not declare `gaps`: messages go when every group has settled them",
            )
            .with("topic", name));
        }
        let topic = self.known_topic("trim", name)?;
        if partition as usize >= self.topics[topic].partitions.len() {
            return Err(no_partition("trim", name, partition));
        }
        self.trim(topic, partition as usize, to_u64(before));
        Ok(AdminReply::Done)
    }

    /// Refuses a start that needs a capability this topic does not have.
    pub(super) fn check_start(
        &self,
        operation: &'static str,
        topic: &Topic,
        start: Start,
    ) -> Result<()> {
        let resetting = operation == "reset group";
        let free = matches!(start, Start::Earliest | Start::Latest) && !resetting;
        if free || self.config.keeps_history(topic) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            operation,
            "this broker does not declare `replay`, and a new group begins with what is published from then on: leave `start` out",
        )
        .with("topic", topic))
    }

    /// Where a group or reader that begins at `start` begins on one partition.
    pub(super) fn start_position(&self, topic: usize, partition: usize, start: Start) -> u64 {
        let name = &self.topics[topic].name;
        let log = &self.topics[topic].partitions[partition].log;
        match start {
            Start::Earliest if self.config.keeps_history(name) => log.base(),
            Start::Earliest | Start::Latest => log.end(),
            Start::Position(position) => to_u64(position),
            Start::Time(time) => log.first_at_or_after(time.into()),
        }
    }

    fn known_topic(&self, operation: &'static str, name: &Topic) -> Result<usize> {
        self.find_topic(name).ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                operation,
                "the topic does not exist: create it with `apply_topics`",
            )
            .with("topic", name)
        })
    }

    fn known_cursor(
        &self,
        operation: &'static str,
        group: &Group,
        name: &Topic,
    ) -> Result<(usize, usize)> {
        let topic = self.known_topic(operation, name)?;
        self.find_group(group)
            .and_then(|group| self.topics[topic].cursor_of(group))
            .map(|cursor| (topic, cursor))
            .ok_or_else(|| never_subscribed(operation, group, name))
    }
}

/// Positions of this broker are 64 bits wide; a greater one lies behind all of them.
pub(super) fn to_u64(position: Position) -> u64 {
    u64::try_from(position.0).unwrap_or(u64::MAX)
}
