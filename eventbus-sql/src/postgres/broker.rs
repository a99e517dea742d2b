//! The client handle: publishing, and what is declared.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::log::{Members, TopicLanes};
use eventbus_core::{
    AdminReply, AdminRequest, Broker, Capabilities, Durability, Error, ErrorKind, Message,
    PublishError, Publisher, Result, Topic, Unpublished,
};

use super::config::PostgresConfig;
use super::database::Shared;
use super::leases::PostgresLeases;
use super::schedule::PostgresSchedule;
use super::store::PostgresStore;
use super::tables::Tables;
use super::writer::Refused;

/// Most bytes of one message.
const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// A client of a PostgreSQL database: what is published is on its disk when that is acknowledged.
///
/// Clones are the same client; each [`connect`](Self::connect) makes another one, with connections
/// of its own. Processes on any number of machines share the log.
///
/// # Contract
///
/// - **Durability.** An acknowledgement of a publish or a settlement comes after the commit, with
///   `synchronous_commit` at least `on` or as the server is set to wait for standbys. Whatever comes
///   while a commit runs is in the next one together.
/// - **Topics** are created by publishing and subscribing, with [`PostgresConfig::partitions`], or
///   one for dead letters (`….dlq`). Keyed messages go where
///   [`partition_of`](eventbus_core::partition_of) says, others to each partition in turn. The count
///   of partitions never changes.
/// - **Batches** are taken whole: what is too large is refused before, together with later messages
///   of its key; all others are one transaction. Where the answer to its commit is lost, the outcome
///   is [`Unknown`](eventbus_core::Outcome::Unknown).
/// - **Groups** share partitions by leases on the clock of the database. A member that was dropped,
///   or died with its process where another one of its machine sees it, is replaced at once, any
///   other after [`PostgresConfig::lease`]; what it settles afterwards is ignored and counted.
/// - **Retention** removes what is older or more than a topic is declared to keep, but nothing that a
///   group has not settled, unless it had no member for [`PostgresConfig::group_expiry`].
/// - **Recovery.** A lost connection is a retryable error; the next call opens another.
///
/// # Examples
///
/// ```no_run
/// use eventbus_core::{Group, Message, Publisher, Signal, Subscriber, Subscription, Topic};
/// use eventbus_sql::PostgresBroker;
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let broker = PostgresBroker::from_url("postgres://shop:secret@localhost/shop").await?;
/// let topic = Topic::from_static("orders");
/// broker.publish(vec![Message::new(topic.clone(), "first").with_key("42")]).await?;
///
/// let group = Group::from_static("payments");
/// let mut member = broker.subscribe(Subscription::group(group, vec![topic])).await?;
/// assert!(matches!(member.deliveries.next().await?, Signal::Assigned(lanes) if lanes.len() == 4));
/// assert!(matches!(member.deliveries.next().await?, Signal::Delivered(batch) if batch.len() == 1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct PostgresBroker {
    client: Arc<Client>,
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) database: Shared,
    pub(super) members: Members<Shared>,
}

impl PostgresBroker {
    /// Connects, creates the schema and the broker's tables or brings them up to date, and returns a
    /// client.
    ///
    /// # Errors
    ///
    /// Within [`PostgresConfig::timeout`]: `Unavailable` when the server does not answer, is a
    /// standby, or cannot encrypt as asked for; `Unauthorized` when it refuses user or password, or
    /// the role may not use or create the tables; `NotFound` when there is no such database;
    /// `Unsupported` when the server is older than PostgreSQL 13, or a newer version of this crate
    /// made the tables; `AlreadyExists` when the schema holds tables of somebody else;
    /// `InvalidInput` when an option is wrong.
    pub async fn connect(config: PostgresConfig) -> Result<Self> {
        Ok(Self {
            client: Arc::new(Client {
                database: Shared::open(&config).await?,
                members: Members::default(),
            }),
        })
    }

    /// Connects to the database that `url` names, see [`PostgresConfig::from_url`].
    ///
    /// # Errors
    ///
    /// Those of reading the url and of [`connect`](Self::connect).
    pub async fn from_url(url: &str) -> Result<Self> {
        Self::connect(PostgresConfig::from_url(url)?).await
    }

    /// What [`connect`](Self::connect) does to an empty database, as SQL: for a role that may create
    /// what the program's own may not. That one needs usage of the schema and all rights on its tables.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when it is no name for a schema.
    pub fn migrations(schema: &str) -> Result<String> {
        Ok(Tables::new(schema)?.script())
    }

    /// Where buses on this database hold keys: in the same schema.
    #[must_use]
    pub fn key_state(&self) -> PostgresStore {
        PostgresStore::on(self.client.database.clone())
    }

    /// Where buses on this database keep events until their time: in the same schema.
    #[must_use]
    pub fn schedule(&self) -> PostgresSchedule {
        PostgresSchedule::new(self.client.database.clone())
    }

    /// Where members of any groups on this database hold leases: in the same schema.
    #[must_use]
    pub fn leases(&self) -> PostgresLeases {
        PostgresLeases::new(self.client.database.clone(), Arc::default())
    }

    /// How many settlements of this client were ignored because their lane had been given away or
    /// they had been made before.
    pub fn stale_settlements(&self) -> u64 {
        self.client.database.stale()
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Finds the lane of each message.
    async fn place(&self, messages: &[(usize, Message)]) -> Result<Vec<(u32, Message)>> {
        let mut topics: HashMap<&Topic, Arc<TopicLanes>> = HashMap::new();
        let mut placed = Vec::with_capacity(messages.len());
        for (_, message) in messages {
            let topic = match topics.get(&message.topic) {
                Some(topic) => topic,
                None => {
                    let names = std::slice::from_ref(&message.topic);
                    let found = self.client.database.topics_of(names).await?;
                    let [topic] = &found[..] else {
                        return Err(lost_topic(&message.topic));
                    };
                    let entry = topics.entry(&message.topic);
                    &*entry.or_insert_with(|| Arc::clone(topic))
                }
            };
            placed.push((topic.lane_for(message), message.clone()));
        }
        Ok(placed)
    }

    async fn take(&self, messages: &[(usize, Message)]) -> Result<(), Refused> {
        let open = self.client.members.check_open("publish");
        open.map_err(Refused::not_taken)?;
        if messages.is_empty() {
            return Ok(());
        }
        let placed = self.place(messages).await.map_err(Refused::not_taken)?;
        self.client.database.writer.publish(placed).await
    }
}

fn lost_topic(name: &Topic) -> Error {
    Error::new(ErrorKind::Internal, "publish", "the topic was not created").with("topic", name)
}

#[async_trait]
impl Publisher for PostgresBroker {
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
impl Broker for PostgresBroker {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.system = "postgres";
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
