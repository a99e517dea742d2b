//! Messages written side by side to one channel, and what the server says of each.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use eventbus_core::{Error, ErrorKind, Message, Outcome, Retry};
use lapin::message::BasicReturnMessage;
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{Channel, Confirmation, PublisherConfirm};
use tokio::time::{Instant, timeout_at};

use crate::names;
use crate::properties::to_properties;

const PUBLISH: &str = "publish";

/// A message with its place in the batch and where it goes.
#[derive(Debug)]
pub(crate) struct Routed {
    pub(crate) index: usize,
    pub(crate) exchange: ShortString,
    pub(crate) routing_key: ShortString,
    pub(crate) message: Message,
}

impl Routed {
    /// A message for a partition of its topic.
    pub(crate) fn to_partition(index: usize, partition: u32, message: Message) -> Self {
        Self {
            index,
            exchange: names::exchange(&message.topic),
            routing_key: names::routing_key(partition),
            message,
        }
    }

    /// A message for a queue of somebody else.
    pub(crate) fn to_queue(index: usize, queue: ShortString, message: Message) -> Self {
        Self {
            index,
            exchange: ShortString::default(),
            routing_key: queue,
            message,
        }
    }
}

/// What came of a message.
pub(crate) enum Came {
    Taken,
    Failed(Outcome, Error),
    /// The channel or the connection is gone: it may be on the server.
    Lost(lapin::Error),
    /// Nothing has been heard of it in time.
    Silent,
}

type Sending<'m> = Pin<Box<dyn Future<Output = lapin::Result<PublisherConfirm>> + Send + 'm>>;

/// Writes messages side by side, in their order, and waits for what becomes of each.
pub(crate) async fn publish_all(
    channel: &Channel,
    window: &[&Routed],
    deadline: Instant,
) -> Vec<Came> {
    let mut sending: Vec<Sending<'_>> = window
        .iter()
        .map(|it| {
            let Routed {
                exchange,
                routing_key,
                message,
                ..
            } = *it;
            let sent = channel.basic_publish(
                exchange.clone(),
                routing_key.clone(),
                BasicPublishOptions {
                    mandatory: true,
                    immediate: false,
                },
                &message.payload,
                to_properties(message),
            );
            Box::pin(sent) as Sending<'_>
        })
        .collect();
    // The first poll of each puts its frames behind those of the one before.
    let mut early: Vec<Option<lapin::Result<PublisherConfirm>>> = poll_fn(|cx| {
        let polled = sending.iter_mut().map(|it| match it.as_mut().poll(cx) {
            Poll::Ready(sent) => Some(sent),
            Poll::Pending => None,
        });
        Poll::Ready(polled.collect())
    })
    .await;
    let mut came = Vec::with_capacity(window.len());
    let mut returned = Vec::new();
    for (sent, early) in sending.into_iter().zip(&mut early) {
        let confirmed = async {
            let confirm = match early.take() {
                Some(sent) => sent?,
                None => sent.await?,
            };
            confirm.await
        };
        came.push(match timeout_at(deadline, confirmed).await {
            Err(_) => Came::Silent,
            Ok(Err(error)) => Came::Lost(error),
            Ok(Ok(confirmation)) => {
                let taken = match &confirmation {
                    Confirmation::Ack(_) => Came::Taken,
                    Confirmation::Nack(_) => Came::Failed(Outcome::Unknown, nacked()),
                    Confirmation::NotRequested => Came::Silent,
                };
                returned.extend(confirmation.take_message());
                taken
            }
        });
    }
    for message in returned {
        if let Some(index) = find(window, &came, &message) {
            came[index] = Came::Failed(Outcome::NotTaken, unrouted(window[index]));
        }
    }
    came
}

/// Which message was given back: one that counts as taken and is the same.
fn find(window: &[&Routed], came: &[Came], returned: &BasicReturnMessage) -> Option<usize> {
    let mut places = window.iter().zip(came);
    places.position(|(it, came)| {
        let Routed {
            exchange,
            routing_key,
            message,
            ..
        } = *it;
        matches!(came, Came::Taken)
            && returned.exchange == *exchange
            && returned.routing_key == *routing_key
            && message.payload == returned.data
            && to_properties(message) == returned.properties
    })
}

fn unrouted(routed: &Routed) -> Error {
    let message = match routed.exchange.as_str() {
        "" => {
            "the queue that keeps this topic is not there: start whoever declares it, or look at its name and the virtual host of the url"
        }
        _ => {
            "no group is bound to this topic, so nobody would ever get the message: start a consumer of it first, whose group then keeps what is published"
        }
    };
    Error::new(ErrorKind::NotFound, PUBLISH, message)
        .with("topic", &routed.message.topic)
        // It is there as soon as a consumer has started.
        .with_retry(Retry::Later)
}

fn nacked() -> Error {
    Error::new(
        ErrorKind::Unavailable,
        PUBLISH,
        "the server could not keep the message in every queue: look at its log, and at the queues' limits",
    )
}
