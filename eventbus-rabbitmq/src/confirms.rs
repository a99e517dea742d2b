//! Messages written side by side to one channel, and what the server says of each.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use eventbus_core::{Error, ErrorKind, Message, Outcome, Retry};
use lapin::message::BasicReturnMessage;
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{Channel, Confirmation, PublisherConfirm};
use tokio::time::{Instant, sleep_until};

use crate::names;
use crate::properties::to_properties;

const PUBLISH: &str = "publish";

/// A message with its place in the batch and where it goes.
#[derive(Debug)]
pub(crate) struct Routed {
    pub(crate) index: usize,
    pub(crate) to: Destination,
    pub(crate) message: Message,
}

/// Where a message goes.
#[derive(Debug)]
pub(crate) enum Destination {
    /// A partition of its topic.
    Partition(u32),
    /// A queue of somebody else.
    Queue(ShortString),
}

impl Routed {
    /// The exchange and the routing key.
    fn route(&self) -> (ShortString, ShortString) {
        match &self.to {
            Destination::Partition(partition) => (
                names::exchange(&self.message.topic),
                names::routing_key(*partition),
            ),
            Destination::Queue(queue) => (ShortString::default(), queue.clone()),
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
            let (exchange, routing_key) = it.route();
            let sent = channel.basic_publish(
                exchange,
                routing_key,
                BasicPublishOptions {
                    mandatory: true,
                    immediate: false,
                },
                &it.message.payload,
                to_properties(&it.message),
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
    // One timer for all of them.
    let mut too_late = std::pin::pin!(sleep_until(deadline));
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
        let confirmed = tokio::select! {
            biased;
            confirmed = confirmed => Some(confirmed),
            () = &mut too_late => None,
        };
        came.push(match confirmed {
            None => Came::Silent,
            Some(Err(error)) => Came::Lost(error),
            Some(Ok(confirmation)) => {
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
        matches!(came, Came::Taken)
            && it.message.payload == returned.data
            && it.route() == (returned.exchange.clone(), returned.routing_key.clone())
            && to_properties(&it.message) == returned.properties
    })
}

fn unrouted(routed: &Routed) -> Error {
    let message = match routed.to {
        Destination::Queue(_) => {
            "the queue that keeps this topic is not there: start whoever declares it, or look at its name and the virtual host of the url"
        }
        Destination::Partition(_) => {
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
