//! Messages written side by side to one channel, and what the server says of each.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use eventbus_core::{Error, ErrorKind, Message, Outcome, Result, Retry};
use futures_util::FutureExt as _;
use lapin::message::Delivery;
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation, PublisherConfirm};
use tokio::time::{Instant, sleep_until};

use crate::link::within;
use crate::names;
use crate::properties::to_properties;

const PUBLISH: &str = "publish";

/// Most messages that are under way on a channel.
pub(crate) const WINDOW: usize = 1000;
/// Most of their bytes, but for a single message.
pub(crate) const WINDOW_BYTES: usize = 16 * 1024 * 1024;

/// What is bound to nothing is given back.
const MANDATORY: BasicPublishOptions = BasicPublishOptions {
    mandatory: true,
    immediate: false,
};

/// A message with its place in the batch and where it goes.
#[derive(Clone, Debug)]
pub(crate) struct Routed {
    pub(crate) index: usize,
    pub(crate) to: Destination,
    pub(crate) message: Message,
    /// Until when it is waited for.
    pub(crate) deadline: Instant,
}

/// Where a message goes.
#[derive(Clone, Debug)]
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

/// Publishes one message to an exchange by a routing key. Answers whether the server keeps it.
pub(crate) async fn publish_one(
    operation: &'static str,
    channel: &Channel,
    (exchange, routing_key): (ShortString, ShortString),
    payload: &[u8],
    properties: BasicProperties,
) -> Result<bool> {
    let sent = channel.basic_publish(exchange, routing_key, MANDATORY, payload, properties);
    let confirmed = within(operation, async { sent.await?.await }).await?;
    Ok(matches!(confirmed, Confirmation::Ack(None)))
}

type Sending<'m> = Pin<Box<dyn Future<Output = lapin::Result<PublisherConfirm>> + Send + 'm>>;

/// Writes messages side by side, in their order, and waits for what becomes of each.
pub(crate) async fn publish_all(channel: &Channel, window: &[&Routed]) -> Vec<Came> {
    let mut sending: Vec<Sending<'_>> = window
        .iter()
        .map(|it| {
            let (exchange, routing_key) = it.route();
            let sent = channel.basic_publish(
                exchange,
                routing_key,
                MANDATORY,
                &it.message.payload,
                to_properties(&it.message),
            );
            Box::pin(sent) as Sending<'_>
        })
        .collect();
    // The first poll of each puts its frames behind those of the one before.
    let early: Vec<Option<lapin::Result<PublisherConfirm>>> = poll_fn(|cx| {
        let polled = sending.iter_mut().map(|it| match it.as_mut().poll(cx) {
            Poll::Ready(sent) => Some(sent),
            Poll::Pending => None,
        });
        Poll::Ready(polled.collect())
    })
    .await;
    let mut confirming: Vec<_> = sending
        .into_iter()
        .zip(early)
        .map(|(sent, early)| {
            Box::pin(async move {
                let confirm = match early {
                    Some(sent) => sent?,
                    None => sent.await?,
                };
                confirm.await
            })
        })
        .collect();
    // One timer for all of them, mostly of one call.
    let mut too_late = std::pin::pin!(sleep_until(Instant::now()));
    let mut heard = Vec::with_capacity(window.len());
    for (confirmed, it) in confirming.iter_mut().zip(window) {
        if too_late.deadline() != it.deadline {
            too_late.as_mut().reset(it.deadline);
        }
        heard.push(tokio::select! {
            biased;
            confirmed = confirmed => Some(confirmed),
            () = &mut too_late => None,
        });
    }
    // What was late for itself may have brought what another one came to, which was heard after it.
    for (confirmed, heard) in confirming.into_iter().zip(&mut heard) {
        if heard.is_none() {
            *heard = confirmed.now_or_never();
        }
    }
    let mut returned = Vec::new();
    let mut came: Vec<_> = heard
        .into_iter()
        .map(|heard| match heard {
            None | Some(Ok(Confirmation::NotRequested)) => Came::Silent,
            Some(Err(error)) => Came::Lost(error),
            Some(Ok(confirmation)) => {
                let is_taken = confirmation.is_ack();
                returned.extend(confirmation.take_message().map(|it| it.delivery));
                match is_taken {
                    true => Came::Taken,
                    false => Came::Failed(Outcome::Unknown, nacked()),
                }
            }
        })
        .collect();
    if !returned.is_empty() {
        sort_out(window, &mut came, &returned);
    }
    came
}

/// Notes of the messages that were given back that they were not taken. Nothing says which they are but
/// what they look like, and their properties may be others than were sent: servers can be set up to
/// change them. What could be one of them, and may be another, does not count as taken.
fn sort_out(window: &[&Routed], came: &mut [Came], returned: &[Delivery]) {
    let unheard = came.iter().find_map(|it| match it {
        Came::Lost(error) => Some(Some(error.clone())),
        Came::Silent => Some(None),
        _ => None,
    });
    if let Some(cause) = unheard {
        // A confirmation that is still to come may be the one that says what became of another message.
        for it in came.iter_mut().filter(|it| matches!(it, Came::Taken)) {
            *it = match &cause {
                Some(error) => Came::Lost(error.clone()),
                None => Came::Failed(Outcome::Unknown, ambiguous()),
            };
        }
        return;
    }
    let routes: Vec<_> = window.iter().map(|it| it.route()).collect();
    let mut alike: HashMap<_, Alike<'_>> = HashMap::new();
    for it in returned {
        let looks = (&it.exchange, &it.routing_key, it.data.as_slice());
        alike.entry(looks).or_default().returned.push(it);
    }
    for (index, it) in window.iter().enumerate() {
        let (exchange, routing_key) = &routes[index];
        let looks = (exchange, routing_key, it.message.payload.as_ref());
        if matches!(came[index], Came::Taken)
            && let Some(alike) = alike.get_mut(&looks)
        {
            alike.sent.push(index);
        }
    }
    for ((exchange, routing_key, _), alike) in alike {
        let (not_taken, doubtful, is_one_unknown) = alike.tell_apart(window);
        for index in not_taken {
            came[index] = Came::Failed(Outcome::NotTaken, unrouted(window[index]));
        }
        for index in doubtful {
            came[index] = Came::Failed(Outcome::Unknown, ambiguous());
        }
        if !is_one_unknown {
            continue;
        }
        let is_its =
            |index: &usize| routes[*index].0 == *exchange && routes[*index].1 == *routing_key;
        let all = 0..window.len();
        let is_any_its = all.clone().any(|index| is_its(&index));
        for index in all.filter(|index| !is_any_its || is_its(index)) {
            if matches!(came[index], Came::Taken) {
                came[index] = Came::Failed(Outcome::Unknown, ambiguous());
            }
        }
    }
}

/// Messages of one route and one payload.
#[derive(Default)]
struct Alike<'r> {
    returned: Vec<&'r Delivery>,
    /// Those that count as taken, by their places in the window.
    sent: Vec<usize>,
}

impl Alike<'_> {
    /// Which were given back, which may have been, and whether one was that is none of them.
    fn tell_apart(self, window: &[&Routed]) -> (Vec<usize>, Vec<usize>, bool) {
        let Self { returned, sent } = self;
        if returned.len() >= sent.len() {
            let is_one_unknown = returned.len() > sent.len();
            return (sent, Vec::new(), is_one_unknown);
        }
        let mut left: VecDeque<_> = sent
            .into_iter()
            .map(|index| (index, to_properties(&window[index].message)))
            .collect();
        let mut not_taken = Vec::new();
        let mut is_doubtful = false;
        for it in returned {
            match left.iter().position(|(_, sent)| *sent == it.properties) {
                Some(place) => not_taken.extend(left.remove(place).map(|(index, _)| index)),
                None => is_doubtful = true,
            }
        }
        let left = left.into_iter().filter(|_| is_doubtful);
        let doubtful = left.map(|(index, _)| index).collect();
        (not_taken, doubtful, false)
    }
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

fn ambiguous() -> Error {
    Error::new(
        ErrorKind::Unavailable,
        PUBLISH,
        "the server has given messages back that cannot be told from others, so this one may be among them: start a consumer of the topic, whose group keeps what is published",
    )
}

#[cfg(test)]
mod tests {
    use eventbus_core::{Headers, Topic};

    use super::*;

    /// A message of a partition, with a body and an id.
    fn sent(index: usize, partition: u32, body: &'static str, id: &str) -> Routed {
        let headers = Headers::builder().push("eb-id", id).expect("within limits");
        Routed {
            index,
            to: Destination::Partition(partition),
            message: Message::new(Topic::from_static("t"), body).with_headers(headers.build()),
            deadline: Instant::now(),
        }
    }

    fn returned(of: &Routed) -> Delivery {
        let (exchange, routing_key) = of.route();
        let body = of.message.payload.to_vec();
        let mut delivery = Delivery::mock(0, exchange, routing_key, false, body);
        delivery.properties = to_properties(&of.message);
        delivery
    }

    /// As a server does that is set up to change properties.
    fn rewritten(of: &Routed) -> Delivery {
        let mut delivery = returned(of);
        delivery.properties = BasicProperties::default().with_timestamp(17);
        delivery
    }

    fn taken(count: usize) -> Vec<Came> {
        (0..count).map(|_| Came::Taken).collect()
    }

    /// A letter for each: taken, not taken, unknown, silent or lost.
    fn outcomes(window: &[Routed], mut came: Vec<Came>, returned: &[Delivery]) -> String {
        let window: Vec<_> = window.iter().collect();
        sort_out(&window, &mut came, returned);
        let letter = |came: &Came| match came {
            Came::Taken => 't',
            Came::Failed(Outcome::NotTaken, _) => 'n',
            Came::Failed(..) => 'u',
            Came::Silent => 's',
            Came::Lost(_) => 'l',
        };
        came.iter().map(letter).collect()
    }

    #[test]
    fn what_was_given_back_is_not_taken() {
        let window = [
            sent(0, 0, "a", "1"),
            sent(1, 1, "a", "2"),
            sent(2, 1, "a", "3"),
            sent(3, 1, "b", "4"),
        ];
        let back = [returned(&window[2]), returned(&window[3])];
        assert_eq!(outcomes(&window, taken(4), &back), "ttnn");
    }

    #[test]
    fn properties_that_the_server_has_changed_do_not_hide_what_was_given_back() {
        let window = [
            sent(0, 0, "a", "1"),
            sent(1, 0, "b", "2"),
            sent(2, 0, "b", "3"),
        ];
        assert_eq!(outcomes(&window, taken(3), &[rewritten(&window[0])]), "ntt");
        // One of two that look alike.
        assert_eq!(outcomes(&window, taken(3), &[rewritten(&window[1])]), "tuu");
        let both = [rewritten(&window[1]), rewritten(&window[2])];
        assert_eq!(outcomes(&window, taken(3), &both), "tnn");
    }

    #[test]
    fn what_is_not_recognised_leaves_its_route_in_doubt() {
        let window = [
            sent(0, 0, "a", "1"),
            sent(1, 1, "b", "2"),
            sent(2, 1, "c", "3"),
        ];
        let mut other = returned(&window[1]);
        other.data = b"of nobody".to_vec();
        assert_eq!(outcomes(&window, taken(3), &[other]), "tuu");
        let elsewhere = sent(9, 7, "a", "1");
        assert_eq!(outcomes(&window, taken(3), &[returned(&elsewhere)]), "uuu");
    }

    #[test]
    fn a_confirmation_that_is_missing_may_have_said_what_became_of_another() {
        let window = [
            sent(0, 0, "a", "1"),
            sent(1, 0, "b", "2"),
            sent(2, 1, "c", "3"),
        ];
        let back = [returned(&window[1])];
        let came = vec![Came::Silent, Came::Taken, Came::Taken];
        assert_eq!(outcomes(&window, came, &back), "suu");
        let gone: lapin::Error = lapin::ErrorKind::MissingHeartbeatError.into();
        let came = vec![Came::Lost(gone), Came::Taken, Came::Taken];
        assert_eq!(outcomes(&window, came, &back), "lll");
    }
}
