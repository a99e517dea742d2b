//! Topics: which there are, creating what is missing, and how they differ from what is declared.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use eventbus_core::{Error, ErrorKind, Result, Topic, TopicReport, TopicSpec};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::Client;
use rdkafka::error::RDKafkaErrorCode as Code;

use crate::client::{ANSWER, Context, blocking, patiently};
use crate::error::{into_error, of_code};

/// The topics of a cluster, through one client that asks for them.
pub(crate) struct Topics {
    client: Arc<AdminClient<Context>>,
    /// Partitions of topics that are known to be there.
    known: Mutex<HashMap<Topic, u32>>,
    /// Held while a topic is looked for, so that many who publish to it ask once.
    looking: tokio::sync::Mutex<()>,
    /// Whether what is missing is created.
    create: bool,
}

impl std::fmt::Debug for Topics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Topics")
            .field("known", &self.known)
            .finish_non_exhaustive()
    }
}

impl Topics {
    pub(crate) fn new(client: Arc<AdminClient<Context>>, create: bool) -> Self {
        Self {
            client,
            known: Mutex::default(),
            looking: tokio::sync::Mutex::default(),
            create,
        }
    }

    pub(crate) fn client(&self) -> &Arc<AdminClient<Context>> {
        &self.client
    }

    fn known(&self, topic: &Topic) -> Option<u32> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(topic).copied()
    }

    fn note(&self, topic: &Topic, partitions: u32) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(topic.clone(), partitions);
    }

    /// Looks for the topic anew when it is needed next: it may have been deleted.
    pub(crate) fn forget(&self, topic: &Topic) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.remove(topic);
    }

    /// Partitions of a topic, which is created where it is missing and that is wished.
    pub(crate) async fn ensure(&self, operation: &'static str, topic: &Topic) -> Result<u32> {
        if let Some(partitions) = self.known(topic) {
            return Ok(partitions);
        }
        let _looking = self.looking.lock().await;
        if let Some(partitions) = self.known(topic) {
            return Ok(partitions);
        }
        match self.partitions(operation, topic).await {
            Err(error) if error.kind() == ErrorKind::NotFound && self.create => {
                self.create(operation, &TopicSpec::new(topic.clone()))
                    .await?;
                Ok(self.appeared(operation, topic).await?.partitions)
            }
            result => result,
        }
    }

    /// Partitions of a topic, as the cluster says now.
    ///
    /// # Errors
    ///
    /// `NotFound` when there is no such topic.
    pub(crate) async fn partitions(&self, operation: &'static str, topic: &Topic) -> Result<u32> {
        Ok(self.shape(operation, topic).await?.partitions)
    }

    /// What a topic is like, as the cluster says now.
    async fn shape(&self, operation: &'static str, topic: &Topic) -> Result<Shape> {
        let (client, name) = (Arc::clone(&self.client), topic.clone());
        let found = blocking(move || {
            let deadline = Instant::now() + ANSWER;
            patiently(deadline, |left| {
                describe(operation, client.inner(), &name, left)
            })
        });
        let shape = found.await?;
        let shape = shape.map_err(|error| self.explain(operation, error))?;
        self.note(topic, shape.partitions);
        Ok(shape)
    }

    pub(crate) fn explain(&self, operation: &'static str, error: Error) -> Error {
        let complaints = &self.client.inner().context().complaints;
        complaints.explain(operation, error)
    }

    /// All topics there are but those of Kafka itself, by name.
    pub(crate) async fn list(&self, operation: &'static str) -> Result<Vec<(Topic, u32)>> {
        let client = Arc::clone(&self.client);
        let found = blocking(move || {
            let metadata = client.inner().fetch_metadata(None, ANSWER);
            let metadata = metadata.map_err(|error| into_error(operation, error))?;
            let topics = metadata.topics().iter();
            let mut topics: Vec<_> = topics
                .filter(|topic| !topic.name().starts_with("__"))
                .filter_map(|topic| {
                    // A name that no topic of ours can have is none.
                    let name = Topic::new(topic.name()).ok()?;
                    Some((name, topic.partitions().len() as u32))
                })
                .collect();
            topics.sort();
            Ok(topics)
        });
        found.await?.map_err(|error| self.explain(operation, error))
    }

    /// Creates a topic; that it is there already is no error.
    async fn create(&self, operation: &'static str, spec: &TopicSpec) -> Result<bool> {
        let single = spec.name.is_dead_letters().then_some(1);
        let partitions = spec.partitions.or(single);
        let retention = spec.retention.map(|time| time.as_millis().to_string());
        let bytes = spec
            .retention_bytes
            .map(|bytes| per_partition(bytes, partitions));
        // -1 leaves a number to the brokers (KIP-464).
        let mut topic = NewTopic::new(
            spec.name.as_str(),
            partitions.map_or(-1, |count| i32::try_from(count).unwrap_or(i32::MAX)),
            TopicReplication::Fixed(spec.replication.map_or(-1, i32::from)),
        );
        if let Some(retention) = &retention {
            topic = topic.set("retention.ms", retention);
        }
        if let Some(bytes) = &bytes {
            topic = topic.set("retention.bytes", bytes);
        }
        if let Some(compression) = spec.compression {
            topic = topic.set("compression.type", compression.as_str());
        }
        let options = AdminOptions::new()
            .request_timeout(Some(ANSWER))
            .operation_timeout(Some(ANSWER));
        let created = self.client.create_topics([&topic], &options).await;
        let created =
            created.map_err(|error| self.explain(operation, into_error(operation, error)))?;
        match created.into_iter().next() {
            Some(Ok(_)) => {
                tracing::info!(topic = %spec.name, "topic created");
                Ok(true)
            }
            Some(Err((_, Code::TopicAlreadyExists))) => Ok(false),
            Some(Err((_, code))) => Err(of_code(operation, code).with("topic", &spec.name)),
            None => Err(Error::new(
                ErrorKind::Internal,
                operation,
                "the broker answered without an answer",
            )),
        }
    }

    /// Creates what is missing and says what differs.
    pub(crate) async fn apply(&self, spec: &TopicSpec) -> Result<TopicReport> {
        const APPLY: &str = "apply topics";
        if self.create(APPLY, spec).await? {
            let shape = self.appeared(APPLY, &spec.name).await?;
            return Ok(TopicReport::new(spec.name.clone(), shape.partitions).with_created());
        }
        // Another client may have created it just now.
        let shape = self.appeared(APPLY, &spec.name).await?;
        let report = TopicReport::new(spec.name.clone(), shape.partitions);
        let mut report = report.compared_with(spec);
        if let Some(count) = spec
            .replication
            .filter(|count| usize::from(*count) != shape.replicas)
        {
            report = report.with_drift(format!(
                "a replication of {count} is declared, the topic has {}; its partitions would have to be moved between brokers, so it stays: to change it, run kafka-reassign-partitions.sh",
                shape.replicas
            ));
        }
        let time = spec.retention.map(|time| time.as_millis().to_string());
        let bytes = spec.retention_bytes;
        let bytes = bytes.map(|bytes| per_partition(bytes, Some(shape.partitions)));
        let compression = spec.compression.map(|it| it.as_str().to_owned());
        let declared = [
            ("retention.ms", time, "messages could vanish"),
            ("retention.bytes", bytes, "messages could vanish"),
            (
                "compression.type",
                compression,
                "another team may count on it",
            ),
        ];
        if declared.iter().all(|(_, wanted, _)| wanted.is_none()) {
            return Ok(report);
        }
        let settings = self.settings(APPLY, &spec.name).await?;
        for (name, wanted, reason) in declared {
            let has = settings.get(name);
            let Some(wanted) = wanted.filter(|wanted| has != Some(wanted)) else {
                continue;
            };
            let has = has.map_or("none", String::as_str);
            report = report.with_drift(format!(
                "{name}={wanted} is declared, the topic has {has}; {reason}, so it stays: to change it, run kafka-configs.sh --alter --topic {} --add-config {name}={wanted}",
                spec.name
            ));
        }
        Ok(report)
    }

    /// Waits for a topic that is there to be known to the broker that is asked, which hears of it a
    /// moment later.
    async fn appeared(&self, operation: &'static str, topic: &Topic) -> Result<Shape> {
        let deadline = Instant::now() + ANSWER;
        loop {
            match self.shape(operation, topic).await {
                Err(error) if error.kind() == ErrorKind::NotFound && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                result => return result,
            }
        }
    }

    /// The settings of a topic by their names.
    async fn settings(
        &self,
        operation: &'static str,
        topic: &Topic,
    ) -> Result<HashMap<String, String>> {
        let resource = ResourceSpecifier::Topic(topic.as_str());
        let options = AdminOptions::new().request_timeout(Some(ANSWER));
        let found = self.client.describe_configs([&resource], &options).await;
        let found = found.map_err(|error| self.explain(operation, into_error(operation, error)))?;
        match found.into_iter().next() {
            Some(Ok(resource)) => Ok(resource
                .entries
                .into_iter()
                .filter_map(|entry| Some((entry.name, entry.value?)))
                .collect()),
            Some(Err(code)) => Err(of_code(operation, code).with("topic", topic)),
            None => Ok(HashMap::new()),
        }
    }
}

/// Bytes that each partition keeps, so that all together keep so many.
fn per_partition(bytes: u64, partitions: Option<u32>) -> String {
    let bytes = bytes.div_ceil(u64::from(partitions.unwrap_or(1).max(1)));
    bytes.min(i64::MAX as u64).to_string()
}

/// How a topic is laid out.
struct Shape {
    partitions: u32,
    /// Of the partition that has the fewest.
    replicas: usize,
}

/// How a topic is laid out, if there is one.
fn describe(
    operation: &'static str,
    client: &Client<Context>,
    topic: &Topic,
    timeout: Duration,
) -> Result<Shape> {
    let metadata = client.fetch_metadata(Some(topic.as_str()), timeout);
    let metadata = metadata.map_err(|error| into_error(operation, error))?;
    let missing = || of_code(operation, Code::UnknownTopicOrPartition).with("topic", topic);
    let found = metadata.topics().first().ok_or_else(missing)?;
    if let Some(error) = found.error() {
        return Err(of_code(operation, error.into()).with("topic", topic));
    }
    let replicas = found
        .partitions()
        .iter()
        .map(|partition| partition.replicas().len());
    // A partition without a leader has one soon; publishing and reading wait for it.
    match found.partitions().len() {
        0 => Err(missing()),
        count => Ok(Shape {
            partitions: count as u32,
            replicas: replicas.min().unwrap_or(0),
        }),
    }
}
