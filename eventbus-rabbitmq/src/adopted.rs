//! Queues that somebody else has declared: what is said about one, whether it can be read, and by whom.
//! Nothing of them is declared or changed here.

use eventbus_core::{Error, ErrorKind, Key, Result, Retry};
use lapin::options::{BasicConsumeOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::Value;

use crate::error::{difference, into_error, is_invalid, is_missing, is_refused};
use crate::link::{Link, natively};
use crate::names;
use crate::topics::{DURABLE, PASSIVE, text};

/// A queue that somebody else has declared, such as a shop's `order_events`, and that is read as it is.
///
/// # Examples
///
/// ```
/// use eventbus_rabbitmq::RabbitMqQueue;
///
/// let orders = RabbitMqQueue::new("order_events").with_key("order_id");
/// assert!(!orders.volatile);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RabbitMqQueue {
    /// Its name.
    pub name: String,
    /// Which field of a JSON body is the key, such as `order_id` or `data.order_id`. Without it, and where a
    /// body does not have it, messages have the key of their header `eb-key`, if any, and else no order.
    pub key: Option<String>,
    /// Whether it may be one that loses everything when the server ends.
    pub volatile: bool,
}

impl RabbitMqQueue {
    /// A durable queue whose messages have no key.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            key: None,
            volatile: false,
        }
    }

    /// Takes the key of each message from a field of its JSON body.
    #[must_use]
    pub fn with_key(mut self, field: impl Into<String>) -> Self {
        self.key = Some(field.into());
        self
    }

    /// Allows that the queue is not durable: a restart of the server loses it and all that is in it.
    #[must_use]
    pub fn volatile(mut self) -> Self {
        self.volatile = true;
        self
    }

    /// The key that a body says.
    pub(crate) fn key_of(&self, payload: &[u8]) -> Option<Key> {
        key_at(self.key.as_deref()?, payload)
    }

    /// Checks that the queue can be read and is this reader's to read, and notes that it is.
    ///
    /// # Errors
    ///
    /// `NotFound` when there is no such queue, to be tried again; `Unsupported` when it is not durable
    /// and that was not allowed, when it goes with its last consumer, or when it is a stream; `Conflict`
    /// when somebody else reads it.
    pub(crate) async fn adopt(
        &self,
        operation: &'static str,
        link: &Link,
        reader: &str,
    ) -> Result<()> {
        let marker = names::reader_queue(operation, &self.name)?;
        self.find(operation, link).await?;
        self.check_kind(operation, link).await?;
        self.check_is_emptied(operation, link).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), text("quorum"));
        arguments.insert("x-dead-letter-exchange".into(), text(""));
        arguments.insert("x-dead-letter-routing-key".into(), text(reader));
        let channel = link.channel(operation).await?;
        let claimed = channel.queue_declare(marker.clone(), DURABLE, arguments);
        let Err(error) = natively(operation, claimed).await? else {
            return Ok(());
        };
        match difference(&error) {
            None => Err(self.explain(operation, error)),
            Some(difference) => Err(Error::new(
                ErrorKind::Conflict,
                operation,
                "somebody else reads this queue, which hands each message to one reader only: let an ingress move its messages to a topic, which every group gets, or, when nobody reads it any more, delete the queue that notes who does",
            )
            .with("queue", &self.name)
            .with("read by", name_of(difference.current.value()))
            .with("noted in", marker)),
        }
    }

    /// How many others consume it now.
    pub(crate) async fn find(&self, operation: &'static str, link: &Link) -> Result<u32> {
        let channel = link.channel(operation).await?;
        let name = self.short_name(operation)?;
        let asked = channel.queue_declare(name, PASSIVE, FieldTable::default());
        match natively(operation, asked).await? {
            Ok(queue) => Ok(queue.consumer_count()),
            Err(error) if is_missing(&error) => Err(self.missing(operation)),
            Err(error) => Err(self.explain(operation, error)),
        }
    }

    /// Asks what kind of queue it is, by declaring what no server creates: where it is there, the server
    /// says what differs first.
    async fn check_kind(&self, operation: &'static str, link: &Link) -> Result<()> {
        let is_durable = match self.first_difference(operation, link, true).await? {
            Some(argument) => argument != "durable",
            // It may not be asked.
            None if self.volatile => return Ok(()),
            None => {
                return Err(self.refuse(
                    operation,
                    ErrorKind::Unauthorized,
                    "whether the queue outlives its server cannot be found out: give the user permission to configure it, or say `volatile` where it may be lost",
                ));
            }
        };
        if !is_durable && !self.volatile {
            return Err(self.refuse(
                operation,
                ErrorKind::Unsupported,
                "the queue is not durable: when the server ends, it is gone with all that nobody has read. Declare it durable, or say `volatile` where that may be",
            ));
        }
        let difference = self.first_difference(operation, link, is_durable).await?;
        match difference.as_deref() {
            Some("auto_delete") => Err(self.refuse(
                operation,
                ErrorKind::Unsupported,
                "the queue is deleted with its last consumer, and what was not read with it: declare it without auto-delete",
            )),
            _ => Ok(()),
        }
    }

    /// Refuses a stream. It is asked by wanting a consumer that no queue can have: the server names the
    /// argument that this kind of queue does not know, and hands out nothing.
    async fn check_is_emptied(&self, operation: &'static str, link: &Link) -> Result<()> {
        let channel = link.channel(operation).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-priority".into(), AMQPValue::LongInt(0));
        arguments.insert("x-stream-offset".into(), text("next"));
        let options = BasicConsumeOptions::default();
        let name = self.short_name(operation)?;
        let consumed = channel.basic_consume(name, "".into(), options, arguments);
        match natively(operation, consumed).await? {
            Err(error) if is_invalid(&error, "x-priority") => Err(self.refuse(
                operation,
                ErrorKind::Unsupported,
                "the queue is a stream, from which nothing is taken away: its messages would be read again and again, or not at all",
            )),
            Err(error) if is_invalid(&error, "x-stream-offset") => Ok(()),
            Err(error) if is_missing(&error) => Err(self.missing(operation)),
            Err(error) => Err(self.explain(operation, error)),
            Ok(_) => Err(self.refuse(
                operation,
                ErrorKind::Internal,
                "the server took what it should have refused",
            )),
        }
    }

    /// What the server says first to a declaration that never fits; none where it may not be asked.
    async fn first_difference(
        &self,
        operation: &'static str,
        link: &Link,
        durable: bool,
    ) -> Result<Option<String>> {
        let channel = link.channel(operation).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(-1));
        let options = QueueDeclareOptions { durable, ..DURABLE };
        let name = self.short_name(operation)?;
        let declared = channel.queue_declare(name, options, arguments);
        match natively(operation, declared).await? {
            Err(error) if is_refused(&error) => Ok(None),
            Err(error) => match difference(&error) {
                Some(difference) => Ok(Some(difference.argument)),
                // It was deleted just now, and the server has refused to create such a one.
                None => Err(self.missing(operation)),
            },
            Ok(_) => Err(self.refuse(
                operation,
                ErrorKind::Internal,
                "the server took what it should have refused",
            )),
        }
    }

    pub(crate) fn short_name(&self, operation: &'static str) -> Result<lapin::types::ShortString> {
        match self.name.len() {
            1..=255 => Ok(self.name.as_str().into()),
            _ => Err(self.refuse(
                operation,
                ErrorKind::InvalidInput,
                "the name of a queue has 1 to 255 bytes",
            )),
        }
    }

    pub(crate) fn missing(&self, operation: &'static str) -> Error {
        self.refuse(
            operation,
            ErrorKind::NotFound,
            "there is no such queue, and it is not ours to create: start whoever declares it, or look at its name and the virtual host of the url",
        )
        .with_retry(Retry::Later)
    }

    fn refuse(&self, operation: &'static str, kind: ErrorKind, message: &str) -> Error {
        Error::new(kind, operation, message).with("queue", &self.name)
    }

    fn explain(&self, operation: &'static str, error: lapin::Error) -> Error {
        into_error(operation, error).with("queue", &self.name)
    }
}

impl From<&str> for RabbitMqQueue {
    fn from(name: &str) -> Self {
        Self::new(name)
    }
}

/// Who an ingress is to those who want to read the same queue: no group is called so.
pub(crate) const INGRESS: &str = ":ingress";

fn name_of(reader: Option<&str>) -> String {
    match reader {
        Some(INGRESS) => "an ingress".to_owned(),
        Some(group) => format!("the group {group}"),
        None => "another group".to_owned(),
    }
}

/// The text or number at a path of a JSON document, as a key.
fn key_at(path: &str, payload: &[u8]) -> Option<Key> {
    let document: Value = serde_json::from_slice(payload).ok()?;
    let found = path
        .split('.')
        .try_fold(&document, |value, name| value.get(name))?;
    match found {
        Value::String(text) => Some(Key::from(text.as_str())),
        Value::Number(number) => Some(Key::display(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_the_text_or_number_of_a_field() {
        let body = br#"{"order_id":123,"customer":{"name":"Ann"},"tags":["a"],"none":null}"#;
        let cases = [
            ("order_id", Some("123")),
            ("customer.name", Some("Ann")),
            ("customer", None),
            ("tags", None),
            ("none", None),
            ("missing", None),
            ("order_id.x", None),
            ("", None),
        ];
        for (path, key) in cases {
            let found = RabbitMqQueue::new("q").with_key(path).key_of(body);
            assert_eq!(found, key.map(Key::from), "{path}");
        }
        // As our own events have it: a message comes to the same partition, whoever publishes it.
        assert_eq!(key_at("order_id", body), Some(Key::display(123_u64)));
        assert_eq!(key_at("order_id", b"no json"), None);
        assert_eq!(RabbitMqQueue::new("q").key_of(body), None);
    }
}
