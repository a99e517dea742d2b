//! The contracts a broker implements. Users meet them through [`EventBus`](crate::EventBus).

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;

use crate::delivery::{Lane, Position, Receipt, Signal, Start, Subscription};
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Group, Key, Message, Topic};
use crate::topic::TopicSpec;

/// Takes messages durably.
#[async_trait]
pub trait Publisher: Debug + Send + Sync + 'static {
    /// Publishes `batch` and resolves when the broker has taken every message as durably as
    /// [`Capabilities::durability`] says.
    ///
    /// # Contract
    ///
    /// - Messages of one key and topic are on the broker in the order of the batch; two calls
    ///   awaited one after the other keep their order; concurrent calls promise none.
    /// - A message that the broker does not take as it is (too large, too many headers) is
    ///   `NotTaken` with kind `InvalidInput` before anything is sent. A dead letter that is refused
    ///   so is stored in parts.
    /// - After `close` every message is `NotTaken` with kind `Closed`.
    ///
    /// # Cancellation
    ///
    /// A dropped future leaves the outcome of the batch unknown.
    ///
    /// # Errors
    ///
    /// Names each message that was not acknowledged; the others were. After a partial failure
    /// later messages of the same key may be on the broker, unless `ordered_pipelining` is declared.
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError>;
}

/// Messages that were not acknowledged; all others of the batch were.
#[derive(Debug)]
#[non_exhaustive]
pub struct PublishError {
    /// At least one.
    pub unpublished: Vec<Unpublished>,
}

impl PublishError {
    /// Reports these messages; there has to be at least one.
    #[must_use]
    pub fn new(unpublished: Vec<Unpublished>) -> Self {
        debug_assert!(!unpublished.is_empty(), "an error without a failure");
        Self { unpublished }
    }

    /// What a batch came to of which these messages were not acknowledged, in their order; `Ok` without
    /// any.
    ///
    /// # Errors
    ///
    /// Where there is one.
    pub fn of(mut unpublished: Vec<Unpublished>) -> Result<(), Self> {
        if unpublished.is_empty() {
            return Ok(());
        }
        unpublished.sort_by_key(|unpublished| unpublished.index);
        Err(Self::new(unpublished))
    }

    /// Whether each of the messages may succeed when it is published again.
    pub fn is_retryable(&self) -> bool {
        self.unpublished
            .iter()
            .all(|unpublished| unpublished.error.is_retryable())
    }

    /// The messages, to be published again.
    pub fn into_messages(self) -> Vec<Message> {
        self.unpublished
            .into_iter()
            .map(|unpublished| unpublished.message)
            .collect()
    }
}

impl std::fmt::Display for PublishError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let count = self.unpublished.len();
        match self.unpublished.first() {
            Some(first) if count == 1 => {
                write!(f, "publish: {} ({:?})", first.error, first.outcome)
            }
            Some(first) => write!(
                f,
                "publish: {count} messages were not acknowledged, the first because: {} ({:?})",
                first.error, first.outcome
            ),
            None => f.write_str("publish: nothing was acknowledged"),
        }
    }
}

impl std::error::Error for PublishError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.unpublished
            .first()
            .and_then(|unpublished| std::error::Error::source(&unpublished.error))
    }
}

/// One message that was not acknowledged.
#[derive(Debug)]
#[non_exhaustive]
pub struct Unpublished {
    /// Its place in the batch.
    pub index: usize,
    /// The message, given back.
    pub message: Message,
    /// Whether it may be on the broker all the same.
    pub outcome: Outcome,
    /// Why.
    pub error: Error,
}

impl Unpublished {
    /// Reports one message.
    #[must_use]
    pub fn new(index: usize, message: Message, outcome: Outcome, error: Error) -> Self {
        Self {
            index,
            message,
            outcome,
            error,
        }
    }

    /// Reports messages of a batch, with their places in it, that were all not acknowledged for the same
    /// reason.
    pub fn all(
        messages: impl IntoIterator<Item = (usize, Message)>,
        outcome: Outcome,
        error: impl Into<Arc<Error>>,
    ) -> impl Iterator<Item = Self> {
        let error = error.into();
        messages.into_iter().map(move |(index, message)| {
            let again = Error::new(error.kind(), error.operation(), "the batch was not taken")
                .with_retry(error.retry())
                .with_source(Arc::clone(&error));
            Self::new(index, message, outcome, again)
        })
    }
}

/// What is known of a message that was not acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums, reason = "there is no third answer")]
pub enum Outcome {
    /// It is not on the broker.
    NotTaken,
    /// It may be on the broker: publishing it again may duplicate it, with the same id.
    Unknown,
}

/// Lets a member join.
#[async_trait]
pub trait Subscriber: Debug + Send + Sync + 'static {
    /// Joins the group, or opens a reader, and resolves when that is certain.
    ///
    /// # Contract
    ///
    /// - A new group begins at [`Subscription::start`]; an existing one goes on where it was.
    /// - A topic that does not exist is created with the broker's defaults where brokers do that,
    ///   otherwise it is `NotFound`.
    /// - A `start` or `until` that the broker cannot honour is `Unsupported`.
    ///
    /// # Cancellation
    ///
    /// A dropped future has joined nothing, or what it joined is left at once.
    async fn subscribe(&self, subscription: Subscription) -> Result<Member>;
}

/// One member of a group, in two halves with one task each: a slow settlement hides no revocation,
/// and `next` is never cancelled to settle.
///
/// Dropping both halves without [`Deliveries::close`] is a crash: nothing more is settled, and the
/// next owner gets what was unsettled.
#[derive(Debug)]
#[non_exhaustive]
pub struct Member {
    /// Hears what comes.
    pub deliveries: Box<dyn Deliveries>,
    /// Says what became of it.
    pub settlement: Box<dyn Settlement>,
}

impl Member {
    /// Joins the two halves.
    #[must_use]
    pub fn new(deliveries: Box<dyn Deliveries>, settlement: Box<dyn Settlement>) -> Self {
        Self {
            deliveries,
            settlement,
        }
    }
}

/// The receiving half of a [`Member`].
#[async_trait]
pub trait Deliveries: Debug + Send {
    /// Waits for one signal.
    ///
    /// # Contract
    ///
    /// - Keeps to the subscription's limits itself, counted until settled, so that the caller
    ///   never stops calling it and control signals always pass.
    /// - The first signal of a reader without a group assigns all its lanes; they stay its own.
    ///   A bounded one whose topics have no partitions says `Ended` without a lane instead.
    /// - Messages of one lane come in order, each once per epoch.
    /// - After `Revoking` no delivery of these lanes comes until they are assigned again.
    /// - What others published is delivered whole, beyond the limits for publishing, too: headers
    ///   are read with [`HeadersBuilder::unlimited`](crate::HeadersBuilder::unlimited). A header
    ///   whose name is not 1 to 255 bytes of text is left out, and
    ///   [`HEADERS_LEFT_OUT`](crate::header::HEADERS_LEFT_OUT) says how many were.
    ///
    /// # Cancellation
    ///
    /// Safe: a dropped future has consumed no signal.
    ///
    /// # Errors
    ///
    /// A retryable error says that the broker is away; the next call tries again. Any other ends
    /// the member.
    async fn next(&mut self) -> Result<Signal>;

    /// Leaves the group. What is unsettled goes to the next owner, first and in order.
    async fn close(self: Box<Self>) -> Result<()>;
}

/// The answering half of a [`Member`].
#[async_trait]
pub trait Settlement: Debug + Send {
    /// Records that these deliveries are done, handled, dead-lettered or skipped, and never handed out
    /// again, and resolves when that is as durable as the broker can. What is not done is not settled:
    /// it is retried where it is, since to hand it out again later would break the order of its key.
    ///
    /// # Contract
    ///
    /// - A group's position moves up to the first delivery that is not settled. After a crash what is
    ///   behind that is handed out again, also where it was settled.
    /// - Receipts of an older epoch, or settled before, are ignored and counted.
    /// - The same call may be repeated after an error.
    ///
    /// # Cancellation
    ///
    /// A dropped future leaves it unknown what was recorded.
    async fn settle(&mut self, settled: &[Receipt]) -> Result<()>;

    /// Gives these lanes away: no handler of theirs runs any more. Without it they are taken
    /// `revoke_timeout` after `Revoking`.
    async fn release(&mut self, lanes: &[Lane]) -> Result<()>;
}

/// How durable an acknowledgement is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
#[non_exhaustive]
pub enum Durability {
    /// Gone when the broker's process ends.
    #[default]
    Process,
    /// Survives the broker's process, not the machine's power.
    PageCache,
    /// On disk.
    Disk,
    /// On the disks of several machines.
    Replicated,
}

/// What a broker can do. Declared: the conformance suite proves it. Not declared: `Unsupported`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Capabilities {
    /// How the broker is called in spans and metrics, such as `kafka`.
    pub system: &'static str,
    /// Most bytes of one message: key, headers and payload.
    pub message_bytes_max: usize,
    /// What an acknowledged publish survives.
    pub durability: Durability,
    /// A new group sees what was published before it existed.
    pub history: bool,
    /// Readers without a group can start and end anywhere in every topic; groups can be reset. A broker
    /// that does not declare it may let some topics be read again, and says `Unsupported` of others.
    pub replay: bool,
    /// Messages that no group has read yet can vanish by age or size; it is reported as a gap.
    pub gaps: bool,
    /// `Delivery::handed_out` is counted.
    pub hand_out_count: bool,
    /// After a partial failure no later message of the same key is on the broker.
    pub ordered_pipelining: bool,
    /// `AdminRequest::Lag` and `AdminRequest::Groups` are answered.
    pub lag: bool,
}

impl Capabilities {
    /// Whether [`check_batch`](Self::check_batch) would refuse nothing, and the batch can go as it is.
    #[must_use]
    pub fn is_sound(&self, batch: &[Message]) -> bool {
        let mut messages = batch.iter();
        messages.all(|message| message.check(self.message_bytes_max).is_ok())
    }

    /// Takes the messages at fault out of a batch and, where `ordered_pipelining` is declared, those
    /// that must not overtake them. Returns the others, with their places in the batch, and what is
    /// refused. For adapters, before anything is sent.
    #[must_use]
    pub fn check_batch(&self, batch: Vec<Message>) -> (Vec<(usize, Message)>, Vec<Unpublished>) {
        let mut sound = Vec::with_capacity(batch.len());
        let mut refused = Vec::new();
        let mut held: HashSet<(Topic, Key)> = HashSet::new();
        for (index, message) in batch.into_iter().enumerate() {
            let place = || Some((message.topic.clone(), message.key.clone()?));
            let behind = !held.is_empty() && place().is_some_and(|place| held.contains(&place));
            let fault = match message.check(self.message_bytes_max) {
                Err(fault) => fault,
                Ok(()) if behind => Error::new(
                    ErrorKind::Conflict,
                    "publish",
                    "an earlier message of this key was refused: decide about that one first",
                ),
                Ok(()) => {
                    sound.push((index, message));
                    continue;
                }
            };
            if self.ordered_pipelining {
                held.extend(place());
            }
            refused.push(Unpublished::new(index, message, Outcome::NotTaken, fault));
        }
        (sound, refused)
    }
}

/// A broker: publishes, subscribes, and can be asked.
#[async_trait]
pub trait Broker: Publisher + Subscriber {
    /// What it can do; constant after connecting.
    fn capabilities(&self) -> Capabilities;

    /// Asks for something beside the flow of messages; an unknown request is `Unsupported`, so
    /// that the contract can grow.
    async fn admin(&self, request: AdminRequest) -> Result<AdminReply>;

    /// Ends all members and connections of this handle. Idempotent.
    async fn close(&self) -> Result<()>;
}

/// A request to [`Broker::admin`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum AdminRequest {
    /// Create what is missing and report what differs. Answer: `Topics`.
    ApplyTopics(Vec<TopicSpec>),
    /// Describe topics; a missing one is `NotFound`. Where none is named, all there are, in the
    /// order of their names; `Unsupported` where the broker can't list them. Answer: `Topics`.
    DescribeTopics(Vec<Topic>),
    /// How far a group is behind. Answer: `Lag`.
    Lag {
        /// The group.
        group: Group,
        /// Of these topics.
        topics: Vec<Topic>,
    },
    /// How far every group is that ever subscribed to these topics; a missing topic is `NotFound`.
    /// Where none is named, to any. Answer: `Groups`, by group, topic and partition.
    Groups {
        /// The topics.
        topics: Vec<Topic>,
    },
    /// Move a group that has no member. Answer: `Done`.
    ResetGroup {
        /// The group.
        group: Group,
        /// On this topic.
        topic: Topic,
        /// To here.
        to: Start,
    },
    /// Remove messages before a position of one partition, read or not. Answer: `Done`.
    Trim {
        /// The topic.
        topic: Topic,
        /// Its partition.
        partition: u32,
        /// The first position kept.
        before: Position,
    },
    /// Whether the broker answers. Answer: `Done`.
    Health,
}

impl AdminRequest {
    /// What it asks for, as the operation of its errors.
    pub fn operation(&self) -> &'static str {
        match self {
            Self::ApplyTopics(_) => "apply topics",
            Self::DescribeTopics(_) => "describe topics",
            Self::Lag { .. } => "read lag",
            Self::Groups { .. } => "look for groups",
            Self::ResetGroup { .. } => "reset group",
            Self::Trim { .. } => "trim",
            Self::Health => "check health",
        }
    }
}

/// An answer of [`Broker::admin`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdminReply {
    /// It is done.
    Done,
    /// One a topic asked for.
    Topics(Vec<TopicReport>),
    /// One a partition.
    Lag(Vec<LaneLag>),
    /// One a group and partition.
    Groups(Vec<GroupPosition>),
}

/// What a topic is like on the broker, and how that differs from its declaration.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicReport {
    /// Its name.
    pub name: Topic,
    /// How many partitions it has.
    pub partitions: u32,
    /// Whether it was created just now.
    pub created: bool,
    /// Each difference between declaration and broker, as a sentence. Never mended silently.
    pub drift: Vec<String>,
}

impl TopicReport {
    /// A topic as declared.
    #[must_use]
    pub fn new(name: Topic, partitions: u32) -> Self {
        Self {
            name,
            partitions,
            created: false,
            drift: Vec::new(),
        }
    }

    /// Says that it was created just now.
    #[must_use]
    pub fn with_created(mut self) -> Self {
        self.created = true;
        self
    }

    /// Adds that another count of partitions is declared than there is, if so.
    #[must_use]
    pub fn compared_with(self, declared: &TopicSpec) -> Self {
        let there = self.partitions;
        match declared.partitions.filter(|count| *count != there) {
            Some(count) => self.with_drift(format!(
                "{count} partitions are declared, the topic has {there}; keys would move to other partitions, so it stays"
            )),
            None => self,
        }
    }

    /// Adds a difference.
    #[must_use]
    pub fn with_drift(mut self, difference: impl Into<String>) -> Self {
        self.drift.push(difference.into());
        self
    }
}

/// How far a group is behind on one partition.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LaneLag {
    /// The topic, by its name on the broker, with the bus's prefix.
    pub topic: Topic,
    /// Its partition.
    pub partition: u32,
    /// Messages published and not settled.
    pub messages: u64,
}

impl LaneLag {
    /// A lag of so many messages.
    #[must_use]
    pub fn new(topic: Topic, partition: u32, messages: u64) -> Self {
        Self {
            topic,
            partition,
            messages,
        }
    }
}

/// Where a group is on one partition.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupPosition {
    /// The group.
    pub group: Group,
    /// The topic.
    pub topic: Topic,
    /// Its partition.
    pub partition: u32,
    /// The first place that is not settled; behind the last message when all are.
    pub position: Position,
    /// Messages published and not settled.
    pub lag: u64,
}

impl GroupPosition {
    /// A group that has settled everything before `position`.
    #[must_use]
    pub fn new(group: Group, topic: Topic, partition: u32, position: Position, lag: u64) -> Self {
        Self {
            group,
            topic,
            partition,
            position,
            lag,
        }
    }
}
