//! Topics: which there are, creating what is missing, and how they differ from what is declared.
//!
//! A topic is an exchange and a queue without messages whose `x-max-length` is the number of its
//! partitions: the server creates it once, whoever comes first, refuses any other number, and says
//! which one there is. A log has a stream for each partition beside them: of dead letters, and of
//! topics that are declared with a retention, so that they can be read again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use eventbus_core::{Error, ErrorKind, Result, Retry, Topic, TopicReport, TopicSpec};
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ExchangeKind};

use crate::config::{PARTITIONS_MAX, RabbitMqConfig};
use crate::error::{Difference, difference, into_error, is_invalid, is_missing};
use crate::link::{SharedLink, natively};
use crate::names;

/// The topics of a virtual host, through a connection that asks for them.
#[derive(Debug)]
pub(crate) struct Topics {
    link: Arc<SharedLink>,
    /// Partitions of topics that are known to be there.
    known: Mutex<HashMap<Topic, Known>>,
    /// Held while a topic is looked for, so that many who publish to it ask once.
    looking: tokio::sync::Mutex<()>,
    /// Whether what is missing is created.
    create: bool,
    /// Partitions of what is created without a declaration.
    partitions: u32,
    /// How often it is looked whether a topic is still as it was.
    check: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    partitions: u32,
    /// When somebody looked.
    looked: Instant,
}

const CHECK: &str = "check topic";

/// How a queue is set up on the server.
pub(crate) const DURABLE: QueueDeclareOptions = QueueDeclareOptions {
    passive: false,
    durable: true,
    exclusive: false,
    auto_delete: false,
    nowait: false,
};

/// Only asks whether a queue is there.
pub(crate) const PASSIVE: QueueDeclareOptions = QueueDeclareOptions {
    passive: true,
    ..DURABLE
};

impl Topics {
    pub(crate) fn new(link: Arc<SharedLink>, config: &RabbitMqConfig) -> Self {
        Self {
            link,
            known: Mutex::default(),
            looking: tokio::sync::Mutex::default(),
            create: config.create_topics,
            partitions: config.partitions,
            check: config.check(),
        }
    }

    /// What is known of a topic. Now and then it is looked, beside whoever asks, whether it is so still.
    fn known(self: &Arc<Self>, topic: &Topic) -> Option<u32> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let found = known.get_mut(topic)?;
        let partitions = found.partitions;
        if found.looked.elapsed() >= self.check {
            found.looked = Instant::now();
            let (topics, topic) = (Arc::clone(self), topic.clone());
            drop(tokio::spawn(async move {
                if let Err(error) = topics.count_again(CHECK, &topic, partitions).await {
                    tracing::debug!(%error, "whether a topic is as it was is looked for later");
                }
            }));
        }
        Some(partitions)
    }

    fn note(&self, topic: &Topic, partitions: u32) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let looked = Instant::now();
        known.insert(topic.clone(), Known { partitions, looked });
    }

    /// Looks for the topic anew when it is needed next: it may have been deleted.
    pub(crate) fn forget(&self, topic: &str) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.remove(topic);
    }

    /// Partitions of a topic, which is created where it is missing and that is wished.
    pub(crate) async fn ensure(
        self: &Arc<Self>,
        operation: &'static str,
        topic: &Topic,
    ) -> Result<u32> {
        if let Some(partitions) = self.known(topic) {
            return Ok(partitions);
        }
        let _looking = self.looking.lock().await;
        if let Some(partitions) = self.known(topic) {
            return Ok(partitions);
        }
        if let Some(partitions) = self.find(operation, topic).await? {
            if names::is_log(topic) {
                // Whoever began to create it may have ended before its streams were there.
                let spec = TopicSpec::new(topic.clone());
                let created = self.create_log(operation, &spec, partitions).await;
                created.inspect_err(|_| self.forget(topic.as_str()))?;
            }
            return Ok(partitions);
        }
        // What a message that cannot be handled goes to has to be there.
        if !self.create && !names::is_log(topic) {
            return Err(missing(operation, topic));
        }
        self.create(operation, &TopicSpec::new(topic.clone())).await
    }

    /// Partitions of a topic, as the server says now.
    ///
    /// # Errors
    ///
    /// `NotFound` when there is no such topic.
    pub(crate) async fn partitions(&self, operation: &'static str, topic: &Topic) -> Result<u32> {
        let found = self.find(operation, topic).await?;
        found.ok_or_else(|| missing(operation, topic))
    }

    /// Partitions of a topic of which so many are known, as the server says now: somebody may have deleted
    /// it and created it anew. What is not there is not created by that.
    pub(crate) async fn count_again(
        &self,
        operation: &'static str,
        topic: &Topic,
        known: u32,
    ) -> Result<u32> {
        let channel = self.link.channel(operation).await?;
        let name = names::partitions_queue(topic);
        let asked = channel.queue_declare(name, PASSIVE, FieldTable::default());
        match natively(operation, asked).await? {
            Err(error) if is_missing(&error) => return Ok(known),
            asked => drop(asked.map_err(|error| explain(operation, topic, error))?),
        }
        // At most 1,024.
        let found = self.declare_count(operation, topic, known as i32).await?;
        let found = found.unwrap_or(known);
        if found != known {
            tracing::error!(
                topic = topic.as_str(),
                partitions = found,
                before = known,
                "a topic was created anew with another number of partitions: keys move between them, and what was published meanwhile may be on partitions that are not there"
            );
        }
        self.note(topic, found);
        Ok(found)
    }

    /// Partitions of a topic, as the server says now; none where there is none.
    async fn find(&self, operation: &'static str, topic: &Topic) -> Result<Option<u32>> {
        let channel = self.link.channel(operation).await?;
        let is_there = exchange(&channel, topic, true);
        match natively(operation, is_there).await? {
            Err(error) if is_missing(&error) => return Ok(None),
            is_there => is_there.map_err(|error| explain(operation, topic, error))?,
        }
        // No queue has such a length: the server creates none, and says how many there are.
        let partitions = match self.declare_count(operation, topic, -1).await? {
            Some(partitions) => partitions,
            // Its exchange is there, so somebody is creating it, or it is no topic of ours.
            None => return Ok(None),
        };
        self.note(topic, partitions);
        Ok(Some(partitions))
    }

    /// Creates the queue that says how many partitions there are, unless it is there. Answers how many
    /// there are; none where it is not there, and cannot be created with this number.
    async fn declare_count(
        &self,
        operation: &'static str,
        topic: &Topic,
        partitions: i32,
    ) -> Result<Option<u32>> {
        let channel = self.link.channel(operation).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), text("quorum"));
        let count = AMQPValue::LongInt(partitions);
        arguments.insert("x-max-length".into(), count);
        let name = names::partitions_queue(topic);
        let declared = channel.queue_declare(name, DURABLE, arguments);
        let Err(error) = natively(operation, declared).await? else {
            return Ok(u32::try_from(partitions).ok());
        };
        match difference(&error) {
            Some(Difference { argument, current }) if argument == "x-max-length" => {
                let current = current.value().and_then(|text| text.parse().ok());
                let unread = || explain(operation, topic, error);
                current.map(Some).ok_or_else(unread)
            }
            None if partitions < 0 && is_invalid(&error, "x-max-length") => Ok(None),
            _ => Err(explain(operation, topic, error)),
        }
    }

    /// Creates what of a topic is missing. Answers how many partitions it has, which is what whoever
    /// came first has declared.
    async fn create(&self, operation: &'static str, spec: &TopicSpec) -> Result<u32> {
        let topic = &spec.name;
        let is_log = names::is_log(topic);
        let default = if is_log { 1 } else { self.partitions };
        let partitions = spec.partitions.unwrap_or(default);
        if partitions > PARTITIONS_MAX {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                operation,
                "a topic has at most 1,024 partitions: each is a queue for every group",
            )
            .with("topic", topic)
            .with("partitions", partitions));
        }
        // At most 1,024.
        let count = self.declare_count(operation, topic, partitions as i32);
        let partitions = count.await?.unwrap_or(partitions);
        let channel = self.link.channel(operation).await?;
        let declared = natively(operation, exchange(&channel, topic, false)).await?;
        declared.map_err(|error| explain(operation, topic, error))?;
        if is_log || keeps(spec) {
            self.create_log(operation, spec, partitions).await?;
        }
        tracing::info!(topic = topic.as_str(), partitions, "topic created");
        self.note(topic, partitions);
        Ok(partitions)
    }

    /// Whether a topic has streams, from which it can be read again.
    pub(crate) async fn has_log(&self, operation: &'static str, topic: &Topic) -> Result<bool> {
        let channel = self.link.channel(operation).await?;
        let stream = names::log_queue(topic, 0);
        Ok(consumers(operation, &channel, stream).await?.is_some())
    }

    /// Creates the streams of a log that are missing, and binds them.
    async fn create_log(
        &self,
        operation: &'static str,
        spec: &TopicSpec,
        partitions: u32,
    ) -> Result<()> {
        let topic = &spec.name;
        let mut channel = self.link.channel(operation).await?;
        for partition in 0..partitions {
            let name = names::log_queue(topic, partition);
            let arguments = log_arguments(spec, partitions);
            let declared = channel.queue_declare(name.clone(), DURABLE, arguments);
            if let Err(error) = natively(operation, declared).await? {
                let is_kept_otherwise = difference(&error).is_some_and(|it| {
                    matches!(it.argument.as_str(), "x-max-age" | "x-max-length-bytes")
                });
                if !is_kept_otherwise {
                    return Err(explain(operation, topic, error));
                }
                // Who has declared it before has said how much it keeps.
                channel = self.link.channel(operation).await?;
            }
            bind(operation, &channel, topic, name, partition).await?;
        }
        Ok(())
    }

    /// Creates what is missing and says what differs.
    pub(crate) async fn apply(&self, spec: &TopicSpec) -> Result<TopicReport> {
        const APPLY: &str = "apply topics";
        let topic = &spec.name;
        let found = self.find(APPLY, topic).await?;
        let partitions = match found {
            Some(partitions) => partitions,
            None => self.create(APPLY, spec).await?,
        };
        let report = TopicReport::new(topic.clone(), partitions);
        let mut report = report.compared_with(spec);
        if keeps(spec) && found.is_some() {
            self.create_log(APPLY, spec, partitions).await?;
            report = self.compare_log(report, spec, partitions).await?;
        }
        if found.is_none() && report.partitions == spec.partitions.unwrap_or(partitions) {
            report = report.with_created();
        }
        Ok(report)
    }

    /// Whether a log keeps what is declared.
    async fn compare_log(
        &self,
        report: TopicReport,
        spec: &TopicSpec,
        partitions: u32,
    ) -> Result<TopicReport> {
        const APPLY: &str = "apply topics";
        let channel = self.link.channel(APPLY).await?;
        let name = names::log_queue(&spec.name, 0);
        let declared = channel.queue_declare(name, DURABLE, log_arguments(spec, partitions));
        let Err(error) = natively(APPLY, declared).await? else {
            return Ok(report);
        };
        let Some(Difference { argument, current }) = difference(&error) else {
            return Err(explain(APPLY, &spec.name, error));
        };
        let current = current.value().unwrap_or("none");
        Ok(report.with_drift(format!(
            "another {argument} is declared than the topic has, which is {current}; messages could vanish, so it stays: to change it, set a policy"
        )))
    }
}

/// Whether messages are to be kept that each group has settled.
fn keeps(spec: &TopicSpec) -> bool {
    spec.retention.is_some() || spec.retention_bytes.is_some()
}

fn log_arguments(spec: &TopicSpec, partitions: u32) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("stream"));
    if let Some(time) = spec.retention {
        let seconds = time.max(Duration::from_secs(1)).as_secs();
        arguments.insert("x-max-age".into(), text(&format!("{seconds}s")));
    }
    if let Some(bytes) = spec.retention_bytes {
        let bytes = bytes.div_ceil(u64::from(partitions.max(1)));
        let bytes = AMQPValue::LongLongInt(i64::try_from(bytes).unwrap_or(i64::MAX));
        arguments.insert("x-max-length-bytes".into(), bytes);
    }
    arguments
}

async fn exchange(channel: &Channel, topic: &Topic, passive: bool) -> lapin::Result<()> {
    let options = ExchangeDeclareOptions {
        passive,
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let (name, none) = (names::exchange(topic), FieldTable::default());
    let declared = channel.exchange_declare(name, ExchangeKind::Topic, options, none);
    declared.await
}

pub(crate) async fn bind(
    operation: &'static str,
    channel: &Channel,
    topic: &Topic,
    queue: ShortString,
    partition: u32,
) -> Result<()> {
    let bound = channel.queue_bind(
        queue,
        names::exchange(topic),
        names::routing_key(partition),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    let bound = natively(operation, bound).await?;
    bound.map_err(|error| explain(operation, topic, error))
}

/// How many consumers a queue has that are handed messages; none where there is no such queue.
pub(crate) async fn consumers(
    operation: &'static str,
    channel: &Channel,
    queue: ShortString,
) -> Result<Option<u32>> {
    let asked = channel.queue_declare(queue, PASSIVE, FieldTable::default());
    match natively(operation, asked).await? {
        Ok(queue) => Ok(Some(queue.consumer_count())),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(into_error(operation, error)),
    }
}

/// Returns when the server has done whatever was asked of a queue through this channel before.
pub(crate) async fn settle_down(
    channel: &Channel,
    queue: ShortString,
) -> lapin::Result<lapin::Queue> {
    let asked = channel.queue_declare(queue, PASSIVE, FieldTable::default());
    asked.await
}

fn explain(operation: &'static str, topic: &Topic, error: lapin::Error) -> Error {
    into_error(operation, error).with("topic", topic)
}

fn missing(operation: &'static str, topic: &Topic) -> Error {
    Error::new(
        ErrorKind::NotFound,
        operation,
        "the topic does not exist: create it with `apply_topics`",
    )
    .with("topic", topic)
    .with_retry(Retry::Never)
}

pub(crate) fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}
