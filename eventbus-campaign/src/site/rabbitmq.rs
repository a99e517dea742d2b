//! The queues of a round on `RabbitMQ`: made before it, counted while it lasts, and removed behind it.

use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use eventbus::broker::{
    AdminReply, AdminRequest, Broker, Capabilities, Member, PublishError, Publisher, Subscriber,
    Subscription,
};
use eventbus::prelude::{Error, ErrorKind, Result};
use eventbus::{Group, LaneLag, Message, RabbitMqBroker, Topic};
use lapin::options::{ExchangeDeleteOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection, ConnectionProperties};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use super::PARTITIONS;
use crate::recorded::group_name;
use crate::tried::TOPIC;

/// How long the server may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// A server that is killed sooner after a queue was made may not know its members any more (see
/// `docs/brokers/rabbitmq.md`).
const SETTLE: Duration = Duration::from_secs(5);

/// Makes the queues of the groups, so that a message has somewhere to go before any member is there.
pub(super) async fn make_groups(broker: &dyn Broker, groups: &[u16]) -> anyhow::Result<()> {
    for group in groups {
        let group = Group::new(&group_name(*group))?;
        let subscription = Subscription::group(group, vec![TOPIC]);
        let member = broker.subscribe(subscription).await?;
        member.deliveries.close().await?;
    }
    sleep(SETTLE).await;
    Ok(())
}

/// Removes all queues and exchanges of a prefix's topic and groups.
pub(super) async fn remove(url: &str, prefix: &str, groups: &[u16]) -> anyhow::Result<()> {
    let connection = connect(url).await?;
    let channel = connection.create_channel().await?;
    let topic = format!("{prefix}{TOPIC}");
    let mut queues = vec![format!("{topic}:partitions")];
    let mut exchanges = vec![topic.clone()];
    for group in groups {
        let group = format!("{prefix}{}", group_name(*group));
        queues.extend((0..PARTITIONS).map(|number| format!("{topic}:{group}:{number}")));
        let letters = format!("{topic}.{group}.dlq");
        queues.extend([format!("{letters}:0"), format!("{letters}:partitions")]);
        exchanges.extend([letters, format!("{group}:members")]);
    }
    // One that is not there counts as deleted.
    for queue in queues {
        let deleted = channel.queue_delete(queue.into(), QueueDeleteOptions::default());
        deleted.await.context("delete a queue")?;
    }
    for exchange in exchanges {
        let deleted = channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default());
        deleted.await.context("delete an exchange")?;
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn connect(url: &str) -> anyhow::Result<Connection> {
    let url = url.split('?').next().unwrap_or(url);
    let connected = Connection::connect(url, ConnectionProperties::default());
    let connected = timeout(ANSWER, connected).await;
    Ok(connected.context("the server does not answer")??)
}

/// A broker that also answers how much waits for a group, as the server counts it: not what is handed
/// out and not settled.
#[derive(Debug)]
pub struct Counted {
    broker: RabbitMqBroker,
    url: String,
    /// Which asks the server; made anew when it was lost.
    asking: Mutex<Option<(Connection, Channel)>>,
}

impl Counted {
    /// Asks the server at a URL.
    #[must_use]
    pub fn new(broker: RabbitMqBroker, url: &str) -> Self {
        Self {
            broker,
            url: url.to_owned(),
            asking: Mutex::new(None),
        }
    }

    /// How many messages wait in each partition's queue of a group.
    async fn waiting(&self, group: &Group, topic: &Topic) -> anyhow::Result<Vec<LaneLag>> {
        let mut asking = self.asking.lock().await;
        let (connection, channel) = match asking.take() {
            Some(open) if open.1.status().connected() => open,
            _ => {
                let connection = connect(&self.url).await?;
                let channel = connection.create_channel().await?;
                (connection, channel)
            }
        };
        let mut lanes = Vec::new();
        for partition in 0..PARTITIONS {
            let queue = format!("{topic}:{group}:{partition}");
            let declared = timeout(ANSWER, count(&channel, queue.into())).await;
            let messages = declared.context("the server does not answer")??;
            lanes.push(LaneLag::new(topic.clone(), partition, messages));
        }
        *asking = Some((connection, channel));
        Ok(lanes)
    }
}

async fn count(channel: &Channel, queue: ShortString) -> lapin::Result<u64> {
    let passive = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let declared = channel.queue_declare(queue, passive, FieldTable::default());
    Ok(declared.await?.message_count().into())
}

#[async_trait]
impl Publisher for Counted {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        self.broker.publish(batch).await
    }
}

#[async_trait]
impl Subscriber for Counted {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        self.broker.subscribe(subscription).await
    }
}

#[async_trait]
impl Broker for Counted {
    fn capabilities(&self) -> Capabilities {
        self.broker.capabilities()
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        let AdminRequest::Lag { group, topics } = request else {
            return self.broker.admin(request).await;
        };
        let mut lanes = Vec::new();
        for topic in &topics {
            let waiting = self.waiting(&group, topic).await.map_err(|error| {
                let what = format!("the queues cannot be counted: {error:#}");
                Error::new(ErrorKind::Unavailable, "ask for lag", what)
            })?;
            lanes.extend(waiting);
        }
        Ok(AdminReply::Lag(lanes))
    }

    async fn close(&self) -> Result<()> {
        if let Some((connection, _)) = self.asking.lock().await.take() {
            // Nobody waits for it, and it may be gone already.
            drop(connection.close(200, "done".into()).await);
        }
        self.broker.close().await
    }
}
