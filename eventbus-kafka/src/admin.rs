//! What is answered beside the flow of messages.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use eventbus_core::refusal::{group_has_members, never_subscribed, no_partition};
use eventbus_core::{
    AdminReply, AdminRequest, Error, ErrorKind, Group, GroupPosition, LaneLag, Position, Result,
    Start, Topic, TopicReport,
};
use futures_util::StreamExt as _;
use rdkafka::admin::AdminOptions;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, ConsumerContext};
use rdkafka::topic_partition_list::Offset;

use crate::broker::Shared;
use crate::client::{ANSWER, Context, blocking};
use crate::error::into_error;
use crate::lanes::{Place, position};
use crate::start::{bounds, commit, committed, list, offset, starts};

const LAG: &str = "read lag";
const GROUPS: &str = "look for groups";
const RESET: &str = "reset group";
const TRIM: &str = "trim";

impl ConsumerContext for Context {}

/// Groups that are asked for at the same time.
const GROUPS_AT_ONCE: usize = 16;

/// Asks as a group, without being a member of it.
type Asker = BaseConsumer<Context>;

/// Where a group is on a place: first unsettled offset, and one behind the last message.
struct At {
    place: Place,
    settled: i64,
    low: i64,
    high: i64,
}

impl At {
    fn lag(&self) -> u64 {
        (self.high - self.settled.max(self.low)).max(0) as u64
    }
}

impl Shared {
    /// Answers an administrative request.
    pub(crate) async fn answer(&self, request: AdminRequest) -> Result<AdminReply> {
        match request {
            AdminRequest::ApplyTopics(specs) => {
                let mut reports = Vec::with_capacity(specs.len());
                for spec in &specs {
                    reports.push(self.topics.apply(spec).await?);
                }
                Ok(AdminReply::Topics(reports))
            }
            AdminRequest::DescribeTopics(topics) => self.describe(topics).await,
            AdminRequest::Lag { group, topics } => self.lag(group, topics).await,
            AdminRequest::Groups { topics } => self.groups(topics).await,
            AdminRequest::ResetGroup { group, topic, to } => self.reset(group, topic, to).await,
            AdminRequest::Trim {
                topic,
                partition,
                before,
            } => self.trim(topic, partition, before).await,
            AdminRequest::Health => self.health().await,
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                "admin",
                "the Kafka broker does not know this request",
            )),
        }
    }

    async fn describe(&self, topics: Vec<Topic>) -> Result<AdminReply> {
        const DESCRIBE: &str = "describe topics";
        let found = self.named(DESCRIBE, topics).await?;
        let reports = found.into_iter();
        let reports = reports.map(|(name, partitions)| TopicReport::new(name, partitions));
        Ok(AdminReply::Topics(reports.collect()))
    }

    /// The topics of these names with their partitions; all there are where none is given.
    async fn named(&self, operation: &'static str, names: Vec<Topic>) -> Result<Vec<(Topic, u32)>> {
        if names.is_empty() {
            return self.topics.list(operation).await;
        }
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            let partitions = self.topics.partitions(operation, &name).await?;
            found.push((name, partitions));
        }
        Ok(found)
    }

    /// Runs what asks as a group.
    async fn ask<T: Send + 'static>(
        &self,
        operation: &'static str,
        group: &Group,
        question: impl FnOnce(&Asker) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let settings = self.config.consumer(group.as_str())?;
        let context = Context {
            complaints: self.complaints.clone(),
        };
        let answer = blocking(move || {
            let asker = Asker::from_config_and_context(&settings, context);
            question(&asker.map_err(|error| into_error(operation, error))?)
        });
        let answer = answer.await?;
        answer.map_err(|error| self.complaints.explain(operation, error))
    }

    async fn lag(&self, group: Group, topics: Vec<Topic>) -> Result<AdminReply> {
        let topics = self.named(LAG, topics).await?;
        let all = places(&topics);
        let known = all.clone();
        let found = self.ask(LAG, &group, move |asker| whereabouts(LAG, asker, &known));
        let found = found.await?;
        for (topic, _) in &topics {
            if !found.iter().any(|at| at.place.topic == *topic) {
                return Err(never_subscribed(LAG, &group, topic));
            }
        }
        let lags = found
            .iter()
            .map(|at| LaneLag::new(at.place.topic.clone(), at.place.partition as u32, at.lag()));
        Ok(AdminReply::Lag(lags.collect()))
    }

    async fn groups(&self, topics: Vec<Topic>) -> Result<AdminReply> {
        let topics = self.named(GROUPS, topics).await?;
        let all = places(&topics);
        // Each group is asked for by a client of its own: Kafka's protocol could ask for many at once
        // (KIP-709), librdkafka does not.
        let asked = futures_util::stream::iter(self.group_names().await?).map(|group| {
            let places = all.clone();
            async move {
                let found = self.ask(GROUPS, &group, move |asker| {
                    whereabouts(GROUPS, asker, &places)
                });
                Ok::<(Group, Vec<At>), Error>((group.clone(), found.await?))
            }
        });
        let mut answers = asked.buffered(GROUPS_AT_ONCE);
        let mut positions = Vec::new();
        while let Some(answer) = answers.next().await {
            let (group, found) = answer?;
            positions.extend(found.into_iter().map(|at| {
                let lag = at.lag();
                let settled = position(at.settled.max(at.low));
                let (topic, partition) = (at.place.topic, at.place.partition as u32);
                GroupPosition::new(group.clone(), topic, partition, settled, lag)
            }));
        }
        Ok(AdminReply::Groups(positions))
    }

    /// The names of all groups, in their order.
    async fn group_names(&self) -> Result<Vec<Group>> {
        let client = Arc::clone(self.topics.client());
        let found = blocking(move || {
            let groups = client.inner().fetch_group_list(None, ANSWER);
            let groups = groups.map_err(|error| into_error(GROUPS, error))?;
            let groups = groups.groups().iter();
            // A name that no group of ours can have is none.
            let mut names: Vec<_> = groups.filter_map(|it| Group::new(it.name()).ok()).collect();
            names.sort();
            Ok(names)
        });
        found
            .await?
            .map_err(|error| self.complaints.explain(GROUPS, error))
    }

    async fn reset(&self, group: Group, topic: Topic, to: Start) -> Result<AdminReply> {
        let topics = self.named(RESET, vec![topic.clone()]).await?;
        let places = places(&topics);
        let (name, of) = (group.clone(), topic.clone());
        let reset = self.ask(RESET, &group, move |asker| {
            if committed(RESET, asker, &places)?.is_empty() {
                return Err(never_subscribed(RESET, &name, &of));
            }
            if has_members(asker, &name)? {
                return Err(group_has_members(RESET, &name, &of));
            }
            let deadline = Instant::now() + ANSWER;
            let mut moves = starts(RESET, asker, &places, to, deadline)?;
            for (place, start) in &mut moves {
                // Positions before the first one kept are no gap: they were asked for knowingly.
                *start = (*start).max(bounds(RESET, asker, place, deadline)?.0);
            }
            // A member that came meanwhile has it refused.
            commit(RESET, asker, &moves).map_err(|error| match error.kind() {
                ErrorKind::Unavailable => group_has_members(RESET, &name, &of).with_source(error),
                _ => error,
            })
        });
        reset.await?;
        Ok(AdminReply::Done)
    }

    async fn trim(&self, topic: Topic, partition: u32, before: Position) -> Result<AdminReply> {
        let partitions = self.topics.partitions(TRIM, &topic).await?;
        if partition >= partitions {
            return Err(no_partition(TRIM, &topic, partition));
        }
        let place = Place {
            topic,
            partition: partition as i32,
        };
        let client = Arc::clone(self.topics.client());
        let (asked, of) = (Arc::clone(&client), place.clone());
        let high = blocking(move || {
            let name = of.topic.as_str();
            let bounds = asked.inner().fetch_watermarks(name, of.partition, ANSWER);
            bounds
                .map(|(_, high)| high)
                .map_err(|error| into_error(TRIM, error))
        });
        // Beyond the end there is nothing to remove.
        let before = offset(before).min(high.await??);
        let options = AdminOptions::new()
            .request_timeout(Some(ANSWER))
            .operation_timeout(Some(ANSWER));
        let list = list([(&place, Offset::Offset(before))]);
        let list = list.map_err(|error| into_error(TRIM, error))?;
        let trimmed = client.delete_records(&list, &options).await;
        let trimmed = trimmed.map_err(|error| into_error(TRIM, error))?;
        for element in trimmed.elements() {
            element.error().map_err(|error| into_error(TRIM, error))?;
        }
        Ok(AdminReply::Done)
    }

    async fn health(&self) -> Result<AdminReply> {
        const HEALTH: &str = "check health";
        let client = Arc::clone(self.topics.client());
        let asked = blocking(move || {
            // Of one topic that need not be there: the answer matters, not what is in it.
            let metadata = client
                .inner()
                .fetch_metadata(Some("__consumer_offsets"), ANSWER);
            metadata
                .map(drop)
                .map_err(|error| into_error(HEALTH, error))
        });
        asked
            .await?
            .map_err(|error| self.complaints.explain(HEALTH, error))?;
        Ok(AdminReply::Done)
    }
}

fn places(topics: &[(Topic, u32)]) -> Vec<Place> {
    let places = topics.iter().flat_map(|(topic, partitions)| {
        (0..*partitions).map(|partition| Place {
            topic: topic.clone(),
            partition: partition as i32,
        })
    });
    places.collect()
}

/// Where a group is, on the places where it has one.
fn whereabouts(operation: &'static str, asker: &Asker, places: &[Place]) -> Result<Vec<At>> {
    // The places first: between the two reads the log only grows.
    let settled: HashMap<_, _> = committed(operation, asker, places)?;
    let deadline = Instant::now() + ANSWER;
    let known = places
        .iter()
        .filter_map(|place| Some((place, *settled.get(place)?)));
    let known = known.map(|(place, settled)| {
        let (low, high) = bounds(operation, asker, place, deadline)?;
        Ok(At {
            place: place.clone(),
            settled,
            low,
            high,
        })
    });
    known.collect()
}

fn has_members(asker: &Asker, group: &Group) -> Result<bool> {
    use rdkafka::consumer::Consumer as _;
    let groups = asker.fetch_group_list(Some(group.as_str()), ANSWER);
    let groups = groups.map_err(|error| into_error(RESET, error))?;
    Ok(groups
        .groups()
        .iter()
        .any(|group| !group.members().is_empty()))
}
