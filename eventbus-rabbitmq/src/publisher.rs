//! Publishing: a few channels, each with a task that owns it, writes messages side by side, and waits
//! for what the server says of them.
//!
//! A channel is nobody else's while its messages are under way: the server says which message it could
//! not route by giving it back before it confirms, and the client pairs what was given back with the
//! next confirmation, whichever that is.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use eventbus_core::{Error, ErrorKind, Message, Outcome, Result, Retry, Unpublished};
use lapin::message::BasicReturnMessage;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{Channel, Confirmation, PublisherConfirm};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use crate::error::{into_error, is_too_large, missing_exchange};
use crate::link::{Link, SharedLink, closed, within};
use crate::names;
use crate::properties::to_properties;
use crate::topics::Topics;

const PUBLISH: &str = "publish";

/// How many channels publish at once.
const CHANNELS: usize = 4;
/// Most messages that are under way on a channel.
const WINDOW: usize = 1000;
/// Most of their bytes, but for a single message.
const WINDOW_BYTES: usize = 16 * 1024 * 1024;

/// Publishes to one server.
#[derive(Debug)]
pub(crate) struct Publisher {
    queue: Arc<Queue>,
    tasks: Mutex<Option<JoinSet<()>>>,
    timeout: Duration,
}

/// What is to be published, in the order in which it was asked for.
#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    /// There is something, or it is closed.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    requests: VecDeque<Request>,
    closed: bool,
}

/// Messages of one call.
#[derive(Debug)]
struct Request {
    messages: Vec<Routed>,
    deadline: Instant,
    answer: oneshot::Sender<Vec<Unpublished>>,
}

/// A message with its place in the batch and its partition.
#[derive(Debug)]
pub(crate) struct Routed {
    pub(crate) index: usize,
    pub(crate) partition: u32,
    pub(crate) message: Message,
}

/// What came of a message.
enum Came {
    Taken,
    Failed(Outcome, Error),
    /// The channel or the connection is gone: it may be on the server.
    Lost(lapin::Error),
    /// Nothing has been heard of it in time.
    Silent,
}

impl Publisher {
    pub(crate) fn new(link: &Arc<SharedLink>, topics: &Arc<Topics>, timeout: Duration) -> Self {
        let queue = Arc::<Queue>::default();
        let mut tasks = JoinSet::new();
        for _ in 0..CHANNELS {
            let worker = Worker {
                queue: Arc::clone(&queue),
                link: Arc::clone(link),
                topics: Arc::clone(topics),
                channel: None,
            };
            tasks.spawn(worker.run());
        }
        Self {
            queue,
            tasks: Mutex::new(Some(tasks)),
            timeout,
        }
    }

    /// Publishes messages whose topics are known. Answers which failed.
    pub(crate) async fn publish(&self, messages: Vec<Routed>) -> Vec<Unpublished> {
        let (answer, answered) = oneshot::channel();
        let request = Request {
            messages,
            deadline: Instant::now() + self.timeout,
            answer,
        };
        {
            let mut waiting = self.queue.lock();
            if waiting.closed {
                return refuse(request.messages, Outcome::NotTaken, || closed(PUBLISH));
            }
            waiting.requests.push_back(request);
        }
        self.queue.changed.notify_one();
        answered
            .await
            .expect("each request that was taken is answered, unless a task has panicked")
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.queue.lock().closed
    }

    /// Publishes what was asked for before, and ends.
    pub(crate) async fn close(&self) {
        self.queue.lock().closed = true;
        self.queue.changed.notify_waiters();
        let tasks = {
            let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
            tasks.take()
        };
        if let Some(mut tasks) = tasks {
            while tasks.join_next().await.is_some() {}
        }
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes as many whole requests as fit a window, one at least; none when it is closed and empty.
    async fn take(&self) -> Option<Vec<Request>> {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // A change between the look and the wait is not missed.
            changed.as_mut().enable();
            {
                let mut waiting = self.lock();
                let taken = waiting.take();
                if !taken.is_empty() {
                    if !waiting.requests.is_empty() {
                        self.changed.notify_one();
                    }
                    return Some(taken);
                }
                if waiting.closed {
                    return None;
                }
            }
            changed.await;
        }
    }
}

impl Waiting {
    fn take(&mut self) -> Vec<Request> {
        let (mut messages, mut bytes) = (0, 0);
        let mut taken = Vec::new();
        while let Some(request) = self.requests.front() {
            messages += request.messages.len();
            let sizes = request.messages.iter().map(|it| it.message.size());
            bytes += sizes.sum::<usize>();
            let fits = messages <= WINDOW && bytes <= WINDOW_BYTES;
            if !taken.is_empty() && !fits {
                break;
            }
            taken.extend(self.requests.pop_front());
        }
        taken
    }
}

/// Owns one channel.
struct Worker {
    queue: Arc<Queue>,
    link: Arc<SharedLink>,
    topics: Arc<Topics>,
    channel: Option<Open>,
}

struct Open {
    link: Arc<Link>,
    channel: Channel,
}

/// A message on its way, and whose it is.
struct OnItsWay {
    request: usize,
    routed: Routed,
}

impl Worker {
    async fn run(mut self) {
        while let Some(requests) = self.queue.take().await {
            self.serve(requests).await;
        }
    }

    /// Publishes requests, as much at a time as a window holds, and answers each.
    async fn serve(&mut self, requests: Vec<Request>) {
        let mut answers = Vec::with_capacity(requests.len());
        let mut waiting = VecDeque::new();
        // What was asked for first has the earliest end.
        let mut deadline = None;
        for (number, request) in requests.into_iter().enumerate() {
            deadline.get_or_insert(request.deadline);
            let all = request.messages.into_iter();
            waiting.extend(all.map(|routed| OnItsWay {
                request: number,
                routed,
            }));
            answers.push((request.answer, Vec::new()));
        }
        let deadline = deadline.unwrap_or_else(Instant::now);
        while !waiting.is_empty() {
            let window = window(&mut waiting);
            for (number, failed) in self.send(window, deadline).await {
                answers[number].1.push(failed);
            }
        }
        for (answer, failed) in answers {
            // Whoever asked may have given up.
            let _ = answer.send(failed);
        }
    }

    /// Publishes one window and waits for what becomes of it. What is lost with its connection is
    /// published again until the time is up; that may duplicate it.
    async fn send(
        &mut self,
        mut window: Vec<OnItsWay>,
        deadline: Instant,
    ) -> Vec<(usize, Unpublished)> {
        let mut failed = Vec::new();
        let mut was_sent = false;
        let mut pause = Duration::from_millis(50);
        // What waits to be sent alone, because one among it is too large and has closed the channel.
        let mut alone = VecDeque::new();
        while !window.is_empty() {
            if Instant::now() >= deadline {
                let outcome = if was_sent {
                    Outcome::Unknown
                } else {
                    Outcome::NotTaken
                };
                failed.extend(window.into_iter().map(|it| it.fail(outcome, silent(None))));
                let rest = alone.into_iter();
                failed.extend(rest.map(|it: OnItsWay| it.fail(Outcome::Unknown, silent(None))));
                break;
            }
            let open = match self.open(deadline).await {
                Ok(open) => open,
                Err(error) if error.is_retryable() && Instant::now() + pause < deadline => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(1));
                    continue;
                }
                Err(error) => {
                    let outcome = if was_sent {
                        Outcome::Unknown
                    } else {
                        Outcome::NotTaken
                    };
                    let rest = window.into_iter().chain(alone);
                    failed.extend(rest.map(|it| it.fail(outcome, copy(&error))));
                    break;
                }
            };
            was_sent = true;
            let count = window.len();
            let came = publish_all(&open.channel, &window, deadline).await;
            let blocked = open.link.blocked();
            let mut again = Vec::new();
            let mut is_used_up = false;
            let mut is_too_large_for_it = false;
            for (it, came) in window.into_iter().zip(came) {
                match came {
                    Came::Taken => {}
                    Came::Failed(outcome, error) => failed.push(it.fail(outcome, error)),
                    Came::Silent => {
                        is_used_up = true;
                        failed.push(it.fail(Outcome::Unknown, silent(blocked.as_deref())));
                    }
                    Came::Lost(error) => {
                        is_used_up = true;
                        if is_too_large(&error) && count > 1 {
                            is_too_large_for_it = true;
                            again.push(it);
                            continue;
                        }
                        match self.judge(&it.routed.message, &error) {
                            Some((outcome, error)) => failed.push(it.fail(outcome, error)),
                            None => again.push(it),
                        }
                    }
                }
            }
            if is_used_up {
                self.channel = None;
            }
            if !again.is_empty() {
                tracing::debug!(
                    messages = again.len(),
                    "messages are published again: whether the server took them is unknown"
                );
            }
            if is_too_large_for_it {
                alone.extend(again.drain(..));
            }
            window = again;
            if window.is_empty() {
                window.extend(alone.pop_front());
            }
        }
        failed
    }

    /// What a message came to that was lost with its channel; none where it may be tried again.
    fn judge(&self, message: &Message, error: &lapin::Error) -> Option<(Outcome, Error)> {
        if let Some(exchange) = missing_exchange(error) {
            self.topics.forget(&exchange);
            let is_its = exchange == message.topic.as_str();
            return is_its.then(|| (Outcome::Unknown, explain(message, error.clone())));
        }
        let outcome = match is_too_large(error) {
            true => Outcome::NotTaken,
            false => Outcome::Unknown,
        };
        let made = explain(message, error.clone());
        (!made.is_retryable()).then_some((outcome, made))
    }

    /// The channel, made anew where need be, once the server takes messages.
    async fn open(&mut self, deadline: Instant) -> Result<&Open> {
        let is_open = |open: &Open| open.link.is_open() && open.channel.status().connected();
        if !self.channel.as_ref().is_some_and(is_open) {
            self.channel = None;
            let link = self.link.get(PUBLISH).await?;
            let channel = link.channel(PUBLISH).await?;
            let confirms = channel.confirm_select(ConfirmSelectOptions::default());
            within(PUBLISH, confirms).await?;
            self.channel = Some(Open { link, channel });
        }
        let gone = || Error::new(ErrorKind::Internal, PUBLISH, "there is no channel");
        let open = self.channel.as_ref().ok_or_else(gone)?;
        if let Some(reason) = open.link.blocked()
            && timeout_at(deadline, open.link.unblocked()).await.is_err()
        {
            return Err(silent(Some(&reason)).with_retry(Retry::Later));
        }
        Ok(open)
    }
}

impl OnItsWay {
    fn fail(self, outcome: Outcome, error: Error) -> (usize, Unpublished) {
        let Routed { index, message, .. } = self.routed;
        (
            self.request,
            Unpublished::new(index, message, outcome, error),
        )
    }
}

/// As many messages as may be under way at once.
fn window(waiting: &mut VecDeque<OnItsWay>) -> Vec<OnItsWay> {
    let mut bytes = 0;
    let count = waiting.iter().take(WINDOW).take_while(|it| {
        bytes += it.routed.message.size();
        bytes <= WINDOW_BYTES
    });
    let count = count.count().max(1);
    waiting.drain(..count).collect()
}

type Sending<'m> = Pin<Box<dyn Future<Output = lapin::Result<PublisherConfirm>> + Send + 'm>>;

/// Writes messages side by side, in their order, and waits for what becomes of each.
async fn publish_all(channel: &Channel, window: &[OnItsWay], deadline: Instant) -> Vec<Came> {
    let mut sending: Vec<Sending<'_>> = window
        .iter()
        .map(|it| {
            let Routed {
                partition, message, ..
            } = &it.routed;
            let sent = channel.basic_publish(
                names::exchange(&message.topic),
                names::routing_key(*partition),
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
            let topic = &window[index].routed.message.topic;
            came[index] = Came::Failed(Outcome::NotTaken, unrouted(topic.as_str()));
        }
    }
    came
}

/// Which message was given back: one that counts as taken and is the same.
fn find(window: &[OnItsWay], came: &[Came], returned: &BasicReturnMessage) -> Option<usize> {
    let (exchange, key) = (&returned.exchange, &returned.routing_key);
    let mut places = window.iter().zip(came);
    places.position(|(it, came)| {
        let Routed {
            partition, message, ..
        } = &it.routed;
        matches!(came, Came::Taken)
            && names::exchange(&message.topic) == *exchange
            && names::routing_key(*partition) == *key
            && message.payload == returned.data
            && to_properties(message) == returned.properties
    })
}

fn unrouted(topic: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        PUBLISH,
        "no group is bound to this topic, so nobody would ever get the message: start a consumer of it first, whose group then keeps what is published",
    )
    .with("topic", topic)
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

fn silent(blocked: Option<&str>) -> Error {
    match blocked {
        Some(reason) => Error::new(
            ErrorKind::Unavailable,
            PUBLISH,
            "the server takes no messages until it has memory and disk again: look at its alarms",
        )
        .with("blocked", reason),
        None => Error::new(
            ErrorKind::Timeout,
            PUBLISH,
            "the server has not confirmed the message in time",
        ),
    }
}

fn explain(message: &Message, error: lapin::Error) -> Error {
    into_error(PUBLISH, error).with("topic", &message.topic)
}

/// The same error once more.
fn copy(error: &Error) -> Error {
    Error::new(error.kind(), PUBLISH, error.to_string()).with_retry(error.retry())
}

/// Gives messages back that were not sent.
pub(crate) fn refuse(
    messages: Vec<Routed>,
    outcome: Outcome,
    error: impl Fn() -> Error,
) -> Vec<Unpublished> {
    let refused = messages
        .into_iter()
        .map(|it| Unpublished::new(it.index, it.message, outcome, error()));
    refused.collect()
}
