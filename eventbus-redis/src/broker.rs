//! The client handle: publishing, and what is declared.

use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::log::Members;
use eventbus_core::{
    AdminReply, AdminRequest, Broker, Capabilities, Error, Message, Outcome, PublishError,
    Publisher, Result, Unpublished,
};

use crate::config::RedisConfig;
use crate::database::Shared;
use crate::key_state::RedisKeyState;
use crate::leases::RedisLeases;
use crate::topics::Streams;
use crate::writer::Placed;

const PUBLISH: &str = "publish";

/// Most bytes of one message.
const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// A client of a Redis server: each partition is a stream, which is read as a log.
///
/// Clones are the same client; each [`connect`](Self::connect) makes another one, with connections
/// of its own. Processes on any number of machines share the log.
///
/// # Contract
///
/// - **Durability** is the server's: with `appendfsync always` what is acknowledged is on its disk, with
///   `everysec` it survives the server's process and not the last second before its machine fails, and
///   without an append-only file it is gone with the process; [`Capabilities::durability`] says which.
///   A failover to a replica may lose what [`RedisConfig::replicas`] did not wait for.
/// - **Topics** are created by publishing and subscribing, with [`RedisConfig::partitions`], or one for
///   dead letters (`….dlq`). A partition is the stream `TOPIC:NUMBER`, or `TOPIC` where there is one.
///   Keyed messages go where [`partition_of`](eventbus_core::partition_of) says, others to each
///   partition in turn. The count of partitions never changes.
/// - **Groups** share partitions by leases on the server's clock, and positions are moved by who holds the
///   lease. Redis's own consumer groups are not used: they hand an entry to whoever asks, in no order of
///   keys, and cannot refuse a member that stood still.
/// - **Retention** removes what every group that lives has settled and that is older than the topic keeps,
///   nothing else. What somebody else removes is a gap; so is the end of a stream that a failover lost,
///   behind which a group goes on a minute before where it was.
/// - **Recovery.** A lost connection is a retryable error; the next call opens another.
///
/// # Examples
///
/// ```no_run
/// use eventbus_core::{Group, Message, Publisher, Signal, Subscriber, Subscription, Topic};
/// use eventbus_redis::RedisBroker;
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let broker = RedisBroker::from_url("redis://localhost").await?;
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
pub struct RedisBroker {
    client: Arc<Client>,
}

#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) shared: Shared,
    pub(crate) members: Members<Shared>,
}

impl RedisBroker {
    /// Connects, looks whether the server keeps what it takes, and returns a client.
    ///
    /// # Errors
    ///
    /// Within [`RedisConfig::timeout`]: `Unavailable` when the server does not answer; `Unauthorized`
    /// when it refuses user or password; `Unsupported` when it is older than Redis 7.0, part of a cluster,
    /// or throws keys away when its memory is full; `InvalidInput` when an option is wrong.
    pub async fn connect(config: RedisConfig) -> Result<Self> {
        Ok(Self {
            client: Arc::new(Client {
                shared: Shared::open(config).await?,
                members: Members::default(),
            }),
        })
    }

    /// Connects to the server that `url` names, see [`RedisConfig::from_url`].
    ///
    /// # Errors
    ///
    /// Those of reading the url and of [`connect`](Self::connect).
    pub async fn from_url(url: &str) -> Result<Self> {
        Self::connect(RedisConfig::from_url(url)?).await
    }

    /// Where members of any groups on this server hold leases.
    #[must_use]
    pub fn leases(&self) -> RedisLeases {
        RedisLeases::new(Arc::clone(&self.client.shared.database), Arc::default())
    }

    /// Where keys of any groups are held on this server.
    #[must_use]
    pub fn key_state(&self) -> RedisKeyState {
        RedisKeyState::new(self.client.shared.clone())
    }

    /// How many settlements of this client were ignored because their lane had been given away or
    /// they had been made before.
    pub fn stale_settlements(&self) -> u64 {
        self.client.shared.database.stale()
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Finds the stream of each message.
    async fn place(&self, messages: Vec<Message>) -> Result<Vec<Placed>, (Error, Vec<Message>)> {
        let database = &self.client.shared.database;
        // A batch has few topics: the one of the message before is mostly that of the next.
        let mut met: Vec<Streams> = Vec::with_capacity(1);
        let mut places = Vec::with_capacity(messages.len());
        for message in &messages {
            let known = met.iter().position(|met| met.topic.name == message.topic);
            let index = match known {
                Some(index) => index,
                None => {
                    let topic = database.meet_topic(PUBLISH, &message.topic).await;
                    match topic.and_then(|topic| database.streams(PUBLISH, topic.first_lane)) {
                        Ok((streams, _)) => met.push(streams),
                        Err(error) => return Err((error, messages)),
                    }
                    met.len() - 1
                }
            };
            let Streams { topic, keys } = &met[index];
            let row = topic.lane_for(message);
            places.push((row, Arc::clone(&keys[(row - topic.first_lane) as usize])));
        }
        let placed = places.into_iter().zip(messages);
        let placed = placed.map(|((row, stream), message)| Placed {
            row,
            stream,
            message,
        });
        Ok(placed.collect())
    }
}

#[async_trait]
impl Publisher for RedisBroker {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        let (sound, mut unpublished) = self.capabilities().check_batch(batch);
        let (indexes, messages): (Vec<usize>, Vec<Message>) = sound.into_iter().unzip();
        let placed = match self.client.members.check_open(PUBLISH) {
            Ok(()) => self.place(messages).await,
            Err(error) => Err((error, messages)),
        };
        match placed {
            Err((error, messages)) => {
                let all = indexes.into_iter().zip(messages);
                unpublished.extend(Unpublished::all(all, Outcome::NotTaken, error));
            }
            Ok(placed) if placed.is_empty() => {}
            Ok(placed) => {
                let refused = self.client.shared.writer.publish(placed).await;
                unpublished.extend(refused.into_iter().map(|it| {
                    Unpublished::new(indexes[it.index], it.message, it.outcome, it.error)
                }));
            }
        }
        PublishError::of(unpublished)
    }
}

#[async_trait]
impl Broker for RedisBroker {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.system = "redis";
        capabilities.message_bytes_max = MESSAGE_BYTES_MAX;
        capabilities.durability = self.client.shared.database.server.durability;
        capabilities.history = true;
        capabilities.replay = true;
        capabilities.gaps = true;
        capabilities.lag = true;
        capabilities
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        self.client.members.check_open(request.operation())?;
        self.client.shared.database.answer(request).await
    }

    async fn close(&self) -> Result<()> {
        let closed = self.client.members.close().await;
        self.client.shared.end();
        closed
    }
}
