//! What a member has on the server while one connection lasts: its queues, and what it hears of the
//! other members.

use std::sync::Arc;
use std::time::Duration;

use eventbus_core::{Group, Result, Topic};
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ExchangeDeclareOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Consumer, ExchangeKind};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::config::RabbitMqConfig;
use crate::groups::declare_present;
use crate::lanes::Source;
use crate::link::{Link, SharedLink, within};
use crate::names;
use crate::roster::Announcement;
use crate::subscriber::Reading;
use crate::topics::Topics;

const SUBSCRIBE: &str = "subscribe";

/// Most messages of a queue that lasts as long as its connection.
const OWN_LENGTH: i32 = 100_000;

/// One connection of a member.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) link: Arc<Link>,
    /// What the other members say, and the queue that it comes through.
    pub(crate) news: Consumer,
    hears: ShortString,
    /// Its topics, with the partitions that they have now.
    pub(crate) topics: Vec<(Topic, u32)>,
}

impl Session {
    /// Connects, creates what the group needs, and begins to hear the other members.
    pub(crate) async fn open(
        config: &RabbitMqConfig,
        known: &Topics,
        reading: &Reading,
    ) -> Result<Self> {
        let group = &reading.group;
        let link = Link::connect(config, &format!("consumer {group}")).await?;
        for queue in reading.queues.values() {
            queue.adopt(SUBSCRIBE, &link, group.as_str()).await?;
        }
        let mut topics = reading.topics.clone();
        for (topic, partitions) in &mut topics {
            *partitions = known.count_again(SUBSCRIBE, topic, *partitions).await?;
            declare_present(SUBSCRIBE, &link, group, topic, *partitions).await?;
        }
        let hearing = link.channel(SUBSCRIBE).await?;
        let (hears, news) = hear_members(&hearing, group).await?;
        Ok(Self {
            link: Arc::new(link),
            news,
            hears,
            topics,
        })
    }

    /// What looks whether all of it is still there; see [`check`].
    pub(crate) fn check(
        &self,
        known: &Arc<Topics>,
        group: &Group,
    ) -> impl Future<Output = Result<bool>> + Send + use<> {
        let (link, known, group) = (Arc::clone(&self.link), Arc::clone(known), group.clone());
        let (hears, topics) = (self.hears.clone(), self.topics.clone());
        async move { check(&link, &known, &group, hears, topics).await }
    }
}

/// Binds anew what somebody has unbound, by deleting an exchange and creating it anew: a group would get
/// nothing any more, and no member hear of another. Answers whether the topics have as many partitions as
/// before.
async fn check(
    link: &Link,
    known: &Topics,
    group: &Group,
    hears: ShortString,
    topics: Vec<(Topic, u32)>,
) -> Result<bool> {
    for (topic, partitions) in topics {
        if known.count_again(SUBSCRIBE, &topic, partitions).await? != partitions {
            return Ok(false);
        }
        declare_present(SUBSCRIBE, link, group, &topic, partitions).await?;
    }
    let channel = link.channel(SUBSCRIBE).await?;
    let exchange = names::members_exchange(group);
    declare_members(&channel, exchange.clone()).await?;
    bind_own(SUBSCRIBE, &channel, hears, exchange, "".into()).await?;
    Ok(true)
}

/// Begins to consume a queue through a channel of its own.
pub(crate) async fn consume(
    link: &Link,
    queue: ShortString,
    prefetch: u16,
    arguments: FieldTable,
) -> Result<Source> {
    let channel = link.channel(SUBSCRIBE).await?;
    let limited = channel.basic_qos(prefetch, BasicQosOptions::default());
    within(SUBSCRIBE, limited).await?;
    let options = BasicConsumeOptions::default();
    let consumer = channel.basic_consume(queue.clone(), "".into(), options, arguments);
    let consumer = within(SUBSCRIBE, consumer).await?;
    Ok(Source::new(channel, consumer, queue))
}

/// A queue that gets what an exchange routes by this key, and lasts as long as the connection. When it is full
/// it drops what is oldest: whoever does not read must not fill the server.
pub(crate) async fn own_queue(
    operation: &'static str,
    channel: &Channel,
    exchange: ShortString,
    routing_key: ShortString,
) -> Result<ShortString> {
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(OWN_LENGTH));
    let options = QueueDeclareOptions {
        exclusive: true,
        auto_delete: true,
        ..QueueDeclareOptions::default()
    };
    let queue = channel.queue_declare("".into(), options, arguments);
    let queue = within(operation, queue).await?.name().clone();
    bind_own(operation, channel, queue.clone(), exchange, routing_key).await?;
    Ok(queue)
}

async fn bind_own(
    operation: &'static str,
    channel: &Channel,
    queue: ShortString,
    exchange: ShortString,
    routing_key: ShortString,
) -> Result<()> {
    let bound = channel.queue_bind(
        queue,
        exchange,
        routing_key,
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    within(operation, bound).await
}

async fn hear_members(channel: &Channel, group: &Group) -> Result<(ShortString, Consumer)> {
    let exchange = names::members_exchange(group);
    declare_members(channel, exchange.clone()).await?;
    let queue = own_queue(SUBSCRIBE, channel, exchange, "".into()).await?;
    let options = BasicConsumeOptions {
        no_ack: true,
        ..BasicConsumeOptions::default()
    };
    let news = channel.basic_consume(queue.clone(), "".into(), options, FieldTable::default());
    Ok((queue, within(SUBSCRIBE, news).await?))
}

async fn declare_members(channel: &Channel, exchange: ShortString) -> Result<()> {
    let options = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let kind = ExchangeKind::Fanout;
    let declared = channel.exchange_declare(exchange, kind, options, FieldTable::default());
    within(SUBSCRIBE, declared).await
}

/// Says to the other members what one says of itself, the latest only. It uses the connection that
/// publishes: the server may stop hearing that one when it is short of memory, and must not stop
/// hearing acknowledgements.
#[derive(Debug)]
pub(crate) struct Announcer {
    latest: watch::Sender<Announcement>,
    task: JoinHandle<()>,
}

impl Announcer {
    pub(crate) fn spawn(link: Arc<SharedLink>, group: &Group, first: Announcement) -> Self {
        let (latest, heard) = watch::channel(first);
        let exchange = names::members_exchange(group);
        let task = tokio::spawn(announce(link, exchange, heard));
        Self { latest, task }
    }

    /// Says this, and nothing older any more.
    pub(crate) fn say(&self, announcement: Announcement) {
        self.latest.send_replace(announcement);
    }

    /// Says the last thing, and waits a moment for it to be sent.
    pub(crate) async fn say_last(self, announcement: Announcement) {
        let Self { latest, mut task } = self;
        latest.send_replace(announcement);
        drop(latest);
        if timeout(Duration::from_secs(2), &mut task).await.is_err() {
            task.abort();
        }
    }
}

async fn announce(
    link: Arc<SharedLink>,
    exchange: ShortString,
    mut heard: watch::Receiver<Announcement>,
) {
    let mut channel = None;
    while heard.changed().await.is_ok() {
        let text = heard.borrow_and_update().write();
        let said = say(&link, &mut channel, exchange.clone(), &text).await;
        if let Err(error) = said {
            channel = None;
            // It is said again with the next beat.
            tracing::debug!(%error, "a member could not announce itself");
        }
    }
}

async fn say(
    link: &SharedLink,
    channel: &mut Option<Channel>,
    exchange: ShortString,
    text: &str,
) -> Result<()> {
    const ANNOUNCE: &str = "announce";
    let present = link.get(ANNOUNCE).await?;
    if present.blocked().is_some() {
        // Who is not heard is forgotten by the others, who then wait for its partitions to be free.
        return Ok(());
    }
    let open = match channel.take().filter(|it| it.status().connected()) {
        Some(open) => open,
        None => present.channel(ANNOUNCE).await?,
    };
    let sent = open.basic_publish(
        exchange,
        "".into(),
        BasicPublishOptions::default(),
        text.as_bytes(),
        BasicProperties::default(),
    );
    within(ANNOUNCE, sent).await?;
    *channel = Some(open);
    Ok(())
}
