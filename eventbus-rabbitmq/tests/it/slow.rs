//! Queues of a plain client that get what a topic gets, and can be slow to take it.

use eventbus_core::Topic;
use lapin::Channel;
use lapin::options::{QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;

use crate::server::{Server, topic};

/// Binds such a queue. Answers its name.
pub(crate) async fn bind(channel: &Channel, to: &Topic, arguments: FieldTable) -> String {
    let name = topic("plain").to_string();
    let options = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    let declared = channel.queue_declare(name.as_str().into(), options, arguments);
    declared.await.expect("it is declared");
    let bound = channel.queue_bind(
        name.as_str().into(),
        to.as_str().into(),
        "#".into(),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    bound.await.expect("it is bound");
    name
}

/// One whose process can stand still: nothing that is published to the topic is confirmed meanwhile.
pub(crate) struct Slow<'s> {
    server: &'s Server,
    name: String,
}

impl<'s> Slow<'s> {
    pub(crate) async fn bind(server: &'s Server, channel: &Channel, to: &Topic) -> Self {
        let name = bind(channel, to, FieldTable::default()).await;
        Self { server, name }
    }

    /// The queue of this name, whose process is that of its leader.
    pub(crate) fn named(server: &'s Server, name: String) -> Self {
        Self { server, name }
    }

    async fn tell(&self, what: &str) {
        let name = &self.name;
        let command = format!(
            "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{name}\">>)), sys:{what}(amqqueue:get_pid(Q))."
        );
        self.server.control(&["eval", &command]).await;
    }

    pub(crate) async fn stand_still(&self) {
        self.tell("suspend").await;
    }

    pub(crate) async fn go_on(&self) {
        self.tell("resume").await;
    }
}
