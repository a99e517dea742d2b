//! The client handle: publishing, and what is declared.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::log::{Members, TopicLanes};
use eventbus_core::{
    AdminReply, AdminRequest, Broker, Capabilities, Durability, Error, ErrorKind, Message, Outcome,
    PublishError, Publisher, Result, Topic, Unpublished,
};

use super::config::SqliteConfig;
use super::database::Shared;
use super::headers::Packed;
use super::schedule::SqliteSchedule;
use super::store::SqliteStore;
use super::writer::Refused;

/// Most bytes of one message.
const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// A client of a SQLite file: what is published is on disk when that is acknowledged.
///
/// Clones are the same client; each [`connect`](Self::connect) makes another one. Clients of one
/// file in one process share its writer and wake each other at once; other processes of the machine
/// hear of what was published within a few milliseconds.
///
/// # Contract
///
/// - **Durability.** An acknowledgement of a publish or a settlement comes after the commit's
///   `fsync`. Whatever comes while a commit runs is in the next one together.
/// - **Topics** are created by publishing and subscribing, with [`SqliteConfig::partitions`], or one
///   for dead letters (`….dlq`). Keyed messages go where [`partition_of`](eventbus_core::partition_of)
///   says, others to each partition in turn. The count of partitions never changes.
/// - **Batches** are taken whole: what is too large is refused before, together with later messages
///   of its key; all others are one transaction.
/// - **Groups** share partitions by leases. A member that died with its process, or was dropped, is
///   replaced at once, one that only stands still after [`SqliteConfig::lease`]; what it settles
///   afterwards is ignored and counted.
/// - **Retention** removes what is older or more than a topic is declared to keep, but nothing that a
///   group has not settled, unless it had no member for [`SqliteConfig::group_expiry`].
/// - **Damage** is found: every message carries a checksum, and one that is wrong is an error that
///   names the place.
///
/// # Examples
///
/// ```
/// use eventbus_core::{Group, Message, Publisher, Signal, Subscriber, Subscription, Topic};
/// use eventbus_sql::{SqliteBroker, SqliteConfig};
///
/// # let directory = std::env::temp_dir().join(format!("eventbus-doc-{}", std::process::id()));
/// # std::fs::create_dir_all(&directory).unwrap();
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let broker = SqliteBroker::connect(SqliteConfig::new(directory.join("shop.db"))).await?;
/// let topic = Topic::from_static("orders");
/// broker.publish(vec![Message::new(topic.clone(), "first").with_key("42")]).await?;
///
/// let group = Group::from_static("payments");
/// let mut member = broker.subscribe(Subscription::group(group, vec![topic])).await?;
/// assert!(matches!(member.deliveries.next().await?, Signal::Assigned(lanes) if lanes.len() == 4));
/// assert!(matches!(member.deliveries.next().await?, Signal::Delivered(batch) if batch.len() == 1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # }).unwrap();
/// # std::fs::remove_dir_all(&directory).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct SqliteBroker {
    client: Arc<Client>,
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) database: Shared,
    pub(super) members: Members<Shared>,
}

impl SqliteBroker {
    /// Opens the file, creates or updates the broker's tables in it, and returns a client.
    ///
    /// # Errors
    ///
    /// `NotFound` when the directory is missing, `Unauthorized` when the file cannot be written,
    /// `InvalidInput` when it is no SQLite database or an option is wrong, `Codec` when it is
    /// damaged, `Unavailable` when another process keeps it locked for longer than
    /// [`SqliteConfig::busy_timeout`] or the disk is full, `Unsupported` when a newer version of this
    /// crate made its tables, `AlreadyExists` when tables of these names are somebody else's,
    /// `Conflict` when this process has it open with other options.
    pub async fn connect(config: SqliteConfig) -> Result<Self> {
        Ok(Self {
            client: Arc::new(Client {
                database: Shared::open(&config).await?,
                members: Members::default(),
            }),
        })
    }

    /// Connects to the file that `url` names, see [`SqliteConfig::from_url`].
    ///
    /// # Errors
    ///
    /// Those of reading the url and of [`connect`](Self::connect).
    pub async fn from_url(url: &str) -> Result<Self> {
        Self::connect(SqliteConfig::from_url(url)?).await
    }

    /// Where buses on this file hold keys: in the same file.
    #[must_use]
    pub fn key_state(&self) -> SqliteStore {
        SqliteStore::on(self.client.database.clone())
    }

    /// Where events of buses on this file wait for their time: in the same file.
    #[must_use]
    pub fn schedule(&self) -> SqliteSchedule {
        SqliteSchedule::new(self.client.database.clone())
    }

    /// How many settlements were ignored because their lane had been given away or they had been
    /// made before, over all clients of this file in this process.
    pub fn stale_settlements(&self) -> u64 {
        self.client.database.stale()
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Packs messages for their lanes.
    async fn pack(&self, messages: &[(usize, Message)]) -> Result<Vec<Packed>> {
        let mut topics: HashMap<Topic, Arc<TopicLanes>> = HashMap::new();
        let mut packed = Vec::with_capacity(messages.len());
        for (_, message) in messages {
            let topic = match topics.get(&message.topic) {
                Some(topic) => topic,
                None => {
                    let names = std::slice::from_ref(&message.topic);
                    let found = self.client.database.topics_of(names).await?;
                    let [topic] = &found[..] else {
                        return Err(lost_topic(&message.topic));
                    };
                    let entry = topics.entry(message.topic.clone());
                    &*entry.or_insert_with(|| Arc::clone(topic))
                }
            };
            packed.push(Packed::new(topic.lane_for(message), message));
        }
        Ok(packed)
    }

    async fn take(&self, messages: &[(usize, Message)]) -> Result<(), Refused> {
        let not_taken = |error| Refused {
            error,
            outcome: Outcome::NotTaken,
        };
        self.client
            .members
            .check_open("publish")
            .map_err(not_taken)?;
        if messages.is_empty() {
            return Ok(());
        }
        let packed = self.pack(messages).await.map_err(not_taken)?;
        self.client.database.writer.publish(packed).await
    }
}

fn lost_topic(name: &Topic) -> Error {
    Error::new(ErrorKind::Internal, "publish", "the topic was not created").with("topic", name)
}

#[async_trait]
impl Publisher for SqliteBroker {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        let (sound, mut unpublished) = self.capabilities().check_batch(batch);
        if let Err(Refused { error, outcome }) = self.take(&sound).await {
            // One transaction failed, so each of its messages did, for the same reason.
            unpublished.extend(Unpublished::all(sound, outcome, error));
        }
        PublishError::of(unpublished)
    }
}

#[async_trait]
impl Broker for SqliteBroker {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.system = "sqlite";
        capabilities.message_bytes_max = MESSAGE_BYTES_MAX;
        capabilities.durability = Durability::Disk;
        capabilities.history = true;
        capabilities.replay = true;
        capabilities.gaps = true;
        capabilities.ordered_pipelining = true;
        capabilities.lag = true;
        capabilities
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        self.client.members.check_open("admin")?;
        self.client.database.answer(request).await
    }

    async fn close(&self) -> Result<()> {
        self.client.members.close().await
    }
}
