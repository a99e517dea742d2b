//! A shop that was there before: queues that somebody else declares, and messages of a plain client.

use std::time::Duration;

use eventbus_core::{Context, Event, EventBus, Topic};
use eventbus_rabbitmq::{RabbitMqBroker, RabbitMqQueue};
use eventbus_testkit::within;
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, QueueDeclareOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection};
use tokio::sync::mpsc::UnboundedSender;

use crate::letters::OrderPlaced;
use crate::server::{Server, topic};

/// How the shop declares its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Durable,
    Quorum,
    /// Drops what it has taken back twice.
    Limited,
    Transient,
    AutoDelete,
    Stream,
}

pub(crate) struct Shop {
    _connection: Connection,
    pub(crate) channel: Channel,
    pub(crate) queue: String,
    /// What topics are called in this test.
    pub(crate) prefix: String,
}

impl Shop {
    /// One that has declared its queue.
    pub(crate) async fn new(server: &Server, kind: Kind) -> Self {
        let shop = Self::without_queue(server).await;
        shop.declare(kind).await;
        shop
    }

    pub(crate) async fn without_queue(server: &Server) -> Self {
        let (connection, channel) = server.confirming().await;
        Self {
            _connection: connection,
            channel,
            queue: topic("order_events").to_string(),
            prefix: format!("{}.", topic("shop")),
        }
    }

    pub(crate) async fn declare(&self, kind: Kind) {
        let mut arguments = FieldTable::default();
        let text = |text: &str| AMQPValue::LongString(text.into());
        match kind {
            Kind::Quorum | Kind::Limited => {
                arguments.insert("x-queue-type".into(), text("quorum"));
            }
            Kind::Stream => drop(arguments.insert("x-queue-type".into(), text("stream"))),
            _ => {}
        }
        if kind == Kind::Limited {
            arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(1));
        }
        let options = QueueDeclareOptions {
            durable: kind != Kind::Transient,
            auto_delete: kind == Kind::AutoDelete,
            ..QueueDeclareOptions::default()
        };
        let name = self.queue.as_str().into();
        let declared = self.channel.queue_declare(name, options, arguments);
        declared.await.expect("it is declared");
    }

    pub(crate) async fn publish(&self, body: impl AsRef<[u8]>) {
        self.publish_with(body, BasicProperties::default()).await;
    }

    pub(crate) async fn publish_with(&self, body: impl AsRef<[u8]>, properties: BasicProperties) {
        let sent = self.channel.basic_publish(
            "".into(),
            self.queue.as_str().into(),
            BasicPublishOptions::default(),
            body.as_ref(),
            properties,
        );
        let confirmed = sent.await.expect("it is sent").await;
        confirmed.expect("it is taken");
    }

    pub(crate) async fn order(&self, order_id: u64) {
        self.publish(order(order_id)).await;
    }

    /// A message of a queue, taken from it.
    pub(crate) async fn get(&self, queue: &str) -> Option<Vec<u8>> {
        let options = BasicGetOptions { no_ack: true };
        let got = self.channel.basic_get(queue.into(), options).await;
        got.expect("it answers").map(|it| it.delivery.data)
    }

    /// Whether nothing of the queue is left. What was handed out and not acknowledged is there again when
    /// nobody consumes it any more.
    pub(crate) async fn is_empty(&self) -> bool {
        let passive = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let is_left = async {
            loop {
                let name = self.queue.as_str().into();
                let none = FieldTable::default();
                let asked = self.channel.queue_declare(name, passive, none).await;
                if asked.expect("it is there").consumer_count() == 0 {
                    break;
                }
            }
        };
        within(Duration::from_secs(10), is_left).await;
        let purged = self
            .channel
            .queue_purge(self.queue.as_str().into(), QueuePurgeOptions::default());
        purged.await.expect("it is there") == 0
    }

    pub(crate) fn adopted(&self) -> RabbitMqQueue {
        RabbitMqQueue::new(self.queue.as_str()).with_key("order_id")
    }

    /// The topic of orders, by its name on the broker.
    pub(crate) fn topic(&self) -> Topic {
        Topic::new(&format!("{}{}", self.prefix, OrderPlaced::TOPIC)).expect("a good name")
    }

    /// A broker on which the topic of orders is the shop's queue.
    pub(crate) async fn broker_of(&self, queue: RabbitMqQueue) -> RabbitMqBroker {
        let config = Server::config().with_queue(self.topic(), queue);
        RabbitMqBroker::connect(config).await.expect("it answers")
    }

    pub(crate) fn bus(&self, broker: &RabbitMqBroker) -> EventBus {
        let builder = EventBus::builder(broker.clone()).topic_prefix(&self.prefix);
        builder.format(eventbus_core::FlatFormat).build()
    }
}

pub(crate) fn order(order_id: u64) -> String {
    format!(r#"{{"event_type": "OrderPlaced", "order_id": {order_id}}}"#)
}

/// A handler that tells which orders it has seen, under which ids.
pub(crate) async fn tell(
    order: OrderPlaced,
    cx: Context<UnboundedSender<(u64, String)>>,
) -> Result<(), eventbus_core::BoxError> {
    let id = cx.envelope()?.id.to_string();
    cx.state().send((order.order_id, id))?;
    Ok(())
}
