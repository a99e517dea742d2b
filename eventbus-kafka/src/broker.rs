//! The client handle.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use eventbus_core::{
    AdminReply, AdminRequest, Broker, Capabilities, Durability, Error, ErrorKind, Member, Message,
    PublishError, Publisher, Result, Subscriber, Subscription,
};
use rdkafka::admin::AdminClient;
use rdkafka::config::FromClientConfigAndContext;

use crate::client::{ANSWER, Complaints, Context, blocking};
use crate::config::KafkaConfig;
use crate::deliveries::{KafkaDeliveries, KafkaSettlement, Owner};
use crate::error::{into_error, of_code};
use crate::lanes::Place;
use crate::producer::Producer;
use crate::subscriber;
use crate::topics::Topics;

/// A client of a Kafka cluster; clones are the same client.
///
/// An acknowledged message is on every replica in sync, which Kafka writes to disk later; with one
/// replica it survives the broker's process, not the machine's power.
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> eventbus_core::Result<()> {
/// use eventbus_core::EventBus;
/// use eventbus_kafka::{KafkaBroker, KafkaConfig};
///
/// let config = KafkaConfig::new("kafka.example:9092").with_option("compression.type", "zstd")?;
/// let bus = EventBus::builder(KafkaBroker::connect(config).await?).build();
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct KafkaBroker(Arc<Shared>);

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: KafkaConfig,
    capabilities: Capabilities,
    pub(crate) complaints: Complaints,
    producer: Producer,
    pub(crate) topics: Topics,
    members: Mutex<Vec<Weak<subscriber::Member>>>,
    closed: AtomicBool,
}

impl KafkaBroker {
    /// Connects, and waits for an answer.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for an option that does not exist or fit; `Unauthorized` for wrong
    /// credentials; `Unavailable` when no broker answers within 8 seconds, with the reason.
    pub async fn connect(config: KafkaConfig) -> Result<Self> {
        const CONNECT: &str = "connect";
        let complaints = Complaints::default();
        let producer = Producer::new(config.producer()?, complaints.clone())?;
        let context = Context {
            complaints: complaints.clone(),
        };
        let client = AdminClient::from_config_and_context(&config.producer()?, context);
        let client = Arc::new(client.map_err(|error| into_error(CONNECT, error))?);
        let (asked, heard) = (Arc::clone(&client), complaints.clone());
        let answered = blocking(move || {
            let deadline = Instant::now() + ANSWER;
            while Instant::now() < deadline {
                let look = Duration::from_millis(500);
                if asked.inner().fetch_cluster_id(look).is_some() {
                    return Ok(());
                }
                if let Some(error) = heard.hopeless(CONNECT) {
                    return Err(error);
                }
            }
            let error = of_code(CONNECT, rdkafka::types::RDKafkaErrorCode::AllBrokersDown);
            Err(heard.explain(CONNECT, error))
        });
        answered
            .await?
            .map_err(|error| error.with("servers", &config.servers))?;
        complaints.forget();
        Ok(Self(Arc::new(Shared {
            capabilities: capabilities(&config),
            topics: Topics::new(client, config.create_topics),
            complaints,
            producer,
            config,
            members: Mutex::default(),
            closed: AtomicBool::new(false),
        })))
    }

    /// Connects as a URL says, see [`KafkaConfig::from_url`].
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect), and those of reading the URL.
    pub async fn from_url(url: &str) -> Result<Self> {
        Self::connect(KafkaConfig::from_url(url)?).await
    }
}

fn capabilities(config: &KafkaConfig) -> Capabilities {
    let mut capabilities = Capabilities::default();
    capabilities.system = "kafka";
    capabilities.message_bytes_max = config.message_bytes_max();
    capabilities.durability = Durability::PageCache;
    capabilities.history = true;
    capabilities.replay = true;
    capabilities.gaps = true;
    capabilities.lag = true;
    capabilities
}

impl Shared {
    pub(crate) fn check_open(&self, operation: &'static str) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::Closed,
                operation,
                "the broker handle was closed: connect again",
            ));
        }
        Ok(())
    }

    /// The members that have not ended.
    fn members(&self) -> Vec<Arc<subscriber::Member>> {
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        members.retain(|member| member.strong_count() > 0);
        members.iter().filter_map(Weak::upgrade).collect()
    }
}

#[async_trait]
impl Publisher for KafkaBroker {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        let Shared {
            producer,
            capabilities,
            topics,
            ..
        } = &*self.0;
        producer.publish(capabilities, topics, batch).await
    }
}

#[async_trait]
impl Subscriber for KafkaBroker {
    async fn subscribe(&self, mut subscription: Subscription) -> Result<Member> {
        self.0.check_open("subscribe")?;
        subscription.check()?;
        subscription.topics.sort();
        subscription.topics.dedup();
        let mut places = Vec::new();
        for topic in &subscription.topics {
            let partitions = self.0.topics.ensure("subscribe", topic).await?;
            places.extend((0..partitions).map(|partition| Place {
                topic: topic.clone(),
                partition: partition as i32,
            }));
        }
        let member = subscriber::subscribe(&self.0.config, subscription, places).await?;
        {
            let mut members = self
                .0
                .members
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            members.retain(|member| member.strong_count() > 0);
            members.push(Arc::downgrade(&member));
        }
        let owner = Arc::new(Owner(member));
        // It may have been closed meanwhile, and have ended all members but this one.
        self.0.check_open("subscribe")?;
        let settlement = KafkaSettlement::new(Arc::clone(&owner))?;
        Ok(Member::new(
            Box::new(KafkaDeliveries(owner)),
            Box::new(settlement),
        ))
    }
}

#[async_trait]
impl Broker for KafkaBroker {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities.clone()
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        self.0.check_open(request.operation())?;
        self.0.answer(request).await
    }

    async fn close(&self) -> Result<()> {
        self.0.closed.store(true, Ordering::Release);
        let members = self.0.members();
        for member in &members {
            member.end();
        }
        let timeout = self.0.config.publish_timeout;
        let closed = self.0.producer.close(timeout).await;
        for member in &members {
            let gone = member.gone().await;
            // The others have been leaving meanwhile; they do not get as long once more.
            if gone.is_err() {
                return closed.and(gone);
            }
        }
        closed
    }
}
