//! What a member has on the server while one connection lasts: its queues, and what it hears of the
//! other members.

use std::sync::Arc;
use std::time::Duration;

use eventbus_core::{Group, Result};
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ExchangeDeclareOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Consumer, ExchangeKind};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::config::RabbitMqConfig;
use crate::groups::declare_group;
use crate::lanes::Source;
use crate::link::{Link, SharedLink, within};
use crate::names;
use crate::roster::Announcement;
use crate::subscriber::Reading;
use crate::topics::consumers;

const SUBSCRIBE: &str = "subscribe";

/// One connection of a member.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) link: Link,
    /// What the other members say.
    pub(crate) news: Consumer,
    /// Asks about queues; made anew when a question has closed it.
    asking: Channel,
}

impl Session {
    /// Connects, creates what the group needs, and begins to hear the other members.
    pub(crate) async fn open(config: &RabbitMqConfig, reading: &Reading) -> Result<Self> {
        let group = &reading.group;
        let link = Link::connect(config, &format!("consumer {group}")).await?;
        for queue in reading.queues.values() {
            queue.adopt(SUBSCRIBE, &link, group.as_str()).await?;
        }
        for (topic, partitions) in &reading.topics {
            declare_group(SUBSCRIBE, &link, group, topic, *partitions).await?;
        }
        let hearing = link.channel(SUBSCRIBE).await?;
        let news = hear_members(&hearing, group).await?;
        let asking = link.channel(SUBSCRIBE).await?;
        Ok(Self { link, news, asking })
    }

    /// How many consumers a queue has that are handed its messages; none where the queue is gone.
    pub(crate) async fn consumers(&mut self, queue: ShortString) -> Result<Option<u32>> {
        if !self.asking.status().connected() {
            self.asking = self.link.channel(SUBSCRIBE).await?;
        }
        consumers(SUBSCRIBE, &self.asking, queue).await
    }

    /// Begins to consume a queue of the group.
    pub(crate) async fn consume(&self, queue: ShortString, prefetch: u16) -> Result<Source> {
        consume(&self.link, queue, prefetch, FieldTable::default()).await
    }
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

/// A queue that gets what an exchange routes by this key, and lasts as long as the connection.
pub(crate) async fn own_queue(
    operation: &'static str,
    channel: &Channel,
    exchange: ShortString,
    routing_key: ShortString,
) -> Result<ShortString> {
    let options = QueueDeclareOptions {
        exclusive: true,
        auto_delete: true,
        ..QueueDeclareOptions::default()
    };
    let queue = channel.queue_declare("".into(), options, FieldTable::default());
    let queue = within(operation, queue).await?.name().clone();
    let bound = channel.queue_bind(
        queue.clone(),
        exchange,
        routing_key,
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    within(operation, bound).await?;
    Ok(queue)
}

async fn hear_members(channel: &Channel, group: &Group) -> Result<Consumer> {
    let exchange = names::members_exchange(group);
    declare_members(channel, exchange.clone()).await?;
    let queue = own_queue(SUBSCRIBE, channel, exchange, "".into()).await?;
    let options = BasicConsumeOptions {
        no_ack: true,
        ..BasicConsumeOptions::default()
    };
    let news = channel.basic_consume(queue, "".into(), options, FieldTable::default());
    within(SUBSCRIBE, news).await
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
