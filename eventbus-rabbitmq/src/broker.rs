//! The client handle.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use async_trait::async_trait;
use eventbus_core::{
    AdminReply, AdminRequest, Broker, Capabilities, Durability, Error, ErrorKind, Member, Message,
    Outcome, PublishError, Publisher, Result, Start, Subscriber, Subscription, Topic, Unpublished,
    partition_of,
};

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::adopted::RabbitMqQueue;
use crate::config::RabbitMqConfig;
use crate::confirms::{Destination, Routed};
use crate::deliveries::{self, Owner, RabbitMqDeliveries, RabbitMqSettlement};
use crate::link::{SharedLink, closed, silent};
use crate::publisher::Publisher as Channels;
use crate::reader;
use crate::subscriber::{self, Reading};
use crate::topics::Topics;
use crate::{names, properties};

/// A client of RabbitMQ; clones are the same client.
///
/// An acknowledged message is on the disks of most nodes that keep its queue, for each group that
/// there was; a dead letter is in their memory at least, and written to disk later.
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> eventbus_core::Result<()> {
/// use eventbus_core::EventBus;
/// use eventbus_rabbitmq::{RabbitMqBroker, RabbitMqConfig};
///
/// let config = RabbitMqConfig::new("rabbit.example:5672").with_credentials("shop", "secret");
/// let bus = EventBus::builder(RabbitMqBroker::connect(config).await?).build();
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RabbitMqBroker(Arc<Shared>);

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: RabbitMqConfig,
    capabilities: Capabilities,
    /// Publishes, and nothing else: the server stops hearing it when it is short of memory.
    pub(crate) publishing: Arc<SharedLink>,
    /// Asks and declares.
    pub(crate) asking: Arc<SharedLink>,
    channels: Channels,
    pub(crate) topics: Arc<Topics>,
    /// Where the next message without a key goes.
    turn: AtomicU32,
    members: Mutex<Vec<Weak<deliveries::Member>>>,
    /// Whether it was closed; heard by what runs beside members, which `close` waits for.
    closing: watch::Sender<bool>,
}

impl RabbitMqBroker {
    /// Connects, and waits for an answer.
    ///
    /// # Errors
    ///
    /// `Unauthorized` for wrong credentials or a virtual host that is not there; `Unavailable` when
    /// no server answers within 8 seconds; `Unsupported` when it is to be encrypted and this build
    /// cannot.
    pub async fn connect(config: RabbitMqConfig) -> Result<Self> {
        let asking = Arc::new(SharedLink::new(config.clone(), "client"));
        asking.get("connect").await?;
        let publishing = Arc::new(SharedLink::new(config.clone(), "publisher"));
        let topics = Arc::new(Topics::new(Arc::clone(&asking), &config));
        Ok(Self(Arc::new(Shared {
            capabilities: capabilities(&config),
            channels: Channels::new(&publishing, &topics),
            publishing,
            asking,
            topics,
            turn: AtomicU32::new(fastrand::u32(..)),
            config,
            members: Mutex::default(),
            closing: watch::Sender::new(false),
        })))
    }

    /// Connects as a URL says, see [`RabbitMqConfig::from_url`].
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect), and those of reading the URL.
    pub async fn from_url(url: &str) -> Result<Self> {
        Self::connect(RabbitMqConfig::from_url(url)?).await
    }
}

impl RabbitMqBroker {
    pub(crate) fn shared(&self) -> &Shared {
        &self.0
    }
}

fn capabilities(config: &RabbitMqConfig) -> Capabilities {
    let mut capabilities = Capabilities::default();
    capabilities.system = "rabbitmq";
    capabilities.message_bytes_max = config.message_bytes_max;
    // Quorum queues write to disk before they confirm; streams, which keep dead letters, do not.
    capabilities.durability = Durability::PageCache;
    capabilities.hand_out_count = true;
    capabilities
}

impl Shared {
    pub(crate) fn check_open(&self, operation: &'static str) -> Result<()> {
        match *self.closing.borrow() {
            true => Err(closed(operation)),
            false => Ok(()),
        }
    }

    /// Resolves when the handle is closed, for who ends then. Closing waits until it is dropped.
    ///
    /// # Errors
    ///
    /// `Closed` when it was closed before.
    pub(crate) fn closing(&self, operation: &'static str) -> Result<watch::Receiver<bool>> {
        let closing = self.closing.subscribe();
        self.check_open(operation).map(|()| closing)
    }

    fn members(&self) -> MutexGuard<'_, Vec<Weak<deliveries::Member>>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a message goes on a topic of so many partitions.
    fn partition(&self, message: &Message, partitions: u32) -> u32 {
        match &message.key {
            Some(key) => partition_of(key, partitions),
            None => self.turn.fetch_add(1, Ordering::Relaxed) % partitions.max(1),
        }
    }

    /// Finds out where messages go; what goes nowhere is refused.
    async fn route(
        &self,
        batch: Vec<Message>,
        deadline: Instant,
        refused: &mut Vec<Unpublished>,
    ) -> Vec<Routed> {
        const PUBLISH: &str = "publish";
        let (sound, unsound) = self.capabilities.check_batch(batch);
        refused.extend(unsound);
        let mut routed = Vec::with_capacity(sound.len());
        let mut last: Option<(Topic, Result<u32>)> = None;
        for (index, message) in sound {
            if let Some(queue) = self.config.queues.get(&message.topic) {
                match properties::check(&message).and_then(|()| queue.short_name(PUBLISH)) {
                    Ok(name) => routed.push(Routed {
                        index,
                        to: Destination::Queue(name),
                        message,
                        deadline,
                    }),
                    Err(error) => {
                        let outcome = Outcome::NotTaken;
                        refused.push(Unpublished::new(index, message, outcome, error));
                    }
                }
                continue;
            }
            // Mostly a batch is of one topic.
            let known = match last.take().filter(|(topic, _)| *topic == message.topic) {
                Some((_, known)) => known,
                None => {
                    let found = self.topics.ensure(PUBLISH, &message.topic);
                    let found = timeout_at(deadline, found).await;
                    found.unwrap_or_else(|_| Err(silent(PUBLISH)))
                }
            };
            let partitions = match &known {
                Ok(partitions) => properties::check(&message).map(|()| *partitions),
                Err(error) => Err(Error::new(error.kind(), PUBLISH, error.to_string())
                    .with_retry(error.retry())
                    .with("topic", &message.topic)),
            };
            last = Some((message.topic.clone(), known));
            match partitions {
                Ok(partitions) => {
                    let partition = self.partition(&message, partitions);
                    routed.push(Routed {
                        index,
                        to: Destination::Partition(partition),
                        message,
                        deadline,
                    });
                }
                Err(error) => {
                    let outcome = Outcome::NotTaken;
                    refused.push(Unpublished::new(index, message, outcome, error));
                }
            }
        }
        routed
    }
}

#[async_trait]
impl Publisher for RabbitMqBroker {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        if batch.is_empty() {
            return Ok(());
        }
        if self.0.channels.is_closed() {
            let all = batch.into_iter().enumerate();
            let refused = all.map(|(index, message)| {
                Unpublished::new(index, message, Outcome::NotTaken, closed("publish"))
            });
            return Err(PublishError::new(refused.collect()));
        }
        let mut refused = Vec::new();
        // One for all of it, from here on.
        let deadline = Instant::now() + self.0.config.publish_timeout;
        let routed = self.0.route(batch, deadline, &mut refused).await;
        if !routed.is_empty() {
            refused.extend(self.0.channels.publish(routed, deadline).await);
        }
        PublishError::of(refused)
    }
}

#[async_trait]
impl Subscriber for RabbitMqBroker {
    async fn subscribe(&self, mut subscription: Subscription) -> Result<Member> {
        const SUBSCRIBE: &str = "subscribe";
        let shared = &self.0;
        shared.check_open(SUBSCRIBE)?;
        subscription.check()?;
        subscription.topics.sort();
        subscription.topics.dedup();
        check(&subscription, &shared.config.queues)?;
        let mut topics = Vec::with_capacity(subscription.topics.len());
        let mut queues = BTreeMap::new();
        for topic in &subscription.topics {
            if let Some(queue) = shared.config.queues.get(topic) {
                queues.insert(topic.clone(), queue.clone());
                continue;
            }
            let partitions = shared.topics.ensure(SUBSCRIBE, topic).await?;
            topics.push((topic.clone(), partitions));
        }
        let member = match &subscription.group {
            Some(group) => {
                let reading = Reading {
                    group: group.clone(),
                    topics,
                    queues,
                    prefetch: shared.config.prefetch_within(&subscription.limits),
                    limits: subscription.limits,
                };
                subscriber::join(&shared.config, &shared.publishing, &shared.topics, reading)
                    .await?
            }
            None => {
                let Shared {
                    config, publishing, ..
                } = &**shared;
                let is_log = shared.reads_log(SUBSCRIBE, &subscription).await?;
                reader::open(config, publishing, &subscription, topics, is_log).await?
            }
        };
        {
            let mut members = shared.members();
            members.retain(|member| member.strong_count() > 0);
            members.push(Arc::downgrade(&member));
        }
        let owner = Arc::new(Owner(member));
        // It may have been closed meanwhile, and have ended all members but this one.
        shared.check_open(SUBSCRIBE)?;
        Ok(Member::new(
            Box::new(RabbitMqDeliveries(Arc::clone(&owner))),
            Box::new(RabbitMqSettlement(owner)),
        ))
    }
}

impl Shared {
    /// Whether a reader reads streams, and not what comes from now on.
    async fn reads_log(
        &self,
        operation: &'static str,
        subscription: &Subscription,
    ) -> Result<bool> {
        if reader::is_tail(subscription) {
            // They are all of one kind.
            return Ok(subscription.topics.iter().all(names::is_log));
        }
        for topic in &subscription.topics {
            if !self.topics.has_log(operation, topic).await? {
                return Err(reader::not_kept(topic));
            }
        }
        Ok(true)
    }
}

/// Refuses what RabbitMQ cannot honour.
fn check(subscription: &Subscription, queues: &BTreeMap<Topic, RabbitMqQueue>) -> Result<()> {
    let refuse = |message: &str| Err(Error::new(ErrorKind::Unsupported, "subscribe", message));
    let logs = subscription.topics.iter().filter(|it| names::is_log(it));
    let logs = logs.count();
    if subscription.group.is_some() {
        if logs > 0 {
            return refuse(
                "dead letters are kept in a log that is read without a group: use `bus.dead_letters` or a reader",
            );
        }
        return match subscription.start {
            Start::Earliest | Start::Latest => Ok(()),
            _ => refuse(
                "a group's queues have what was published since they were created, and cannot be read from another place: start at the earliest or the latest",
            ),
        };
    }
    if subscription.topics.iter().any(|it| queues.contains_key(it)) {
        return refuse(
            "a queue of somebody else hands each message to one reader: a group can read it, a reader without a group would take its messages",
        );
    }
    if reader::is_tail(subscription) && logs > 0 && logs < subscription.topics.len() {
        return refuse("dead letters and other topics are read apart: open a reader for each");
    }
    reader::check(subscription)
}

#[async_trait]
impl Broker for RabbitMqBroker {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities.clone()
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        self.0.check_open(request.operation())?;
        self.0.answer(request).await
    }

    async fn close(&self) -> Result<()> {
        let shared = &self.0;
        shared.closing.send_replace(true);
        let members: Vec<_> = shared.members().iter().filter_map(Weak::upgrade).collect();
        for member in &members {
            member.end();
        }
        shared.channels.close().await;
        shared.closing.closed().await;
        for member in &members {
            member.left().await;
        }
        shared.publishing.close().await;
        shared.asking.close().await;
        Ok(())
    }
}
