//! Publishing: a few channels, each with a task that owns it, writes messages side by side, and waits
//! for what the server says of them.
//!
//! A channel is nobody else's while its messages are under way: the server says which message it could
//! not route by giving it back before it confirms, and the client pairs what was given back with the
//! next confirmation, whichever that is.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use eventbus_core::{Error, ErrorKind, Message, Outcome, Result, Unpublished};
use lapin::Channel;
use lapin::options::ConfirmSelectOptions;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use crate::confirms::{Came, Routed, WINDOW, WINDOW_BYTES, publish_all};
use crate::error::{blocked, into_error, is_too_large, missing_exchange};
use crate::link::{Link, SharedLink, closed, within};
use crate::topics::Topics;

const PUBLISH: &str = "publish";

/// How many channels publish at once.
const CHANNELS: usize = 4;

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
            // Connecting has its own time, which may be longer.
            let opened = timeout_at(deadline, self.open(deadline)).await;
            let open = match opened.unwrap_or_else(|_| Err(silent(None))) {
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
            let routed: Vec<_> = window.iter().map(|it| &it.routed).collect();
            let came = publish_all(&open.channel, &routed, deadline).await;
            let blocked = open.link.blocked();
            let mut again = Vec::new();
            let mut is_used_up = false;
            let mut is_too_large_for_it = false;
            for (it, came) in window.into_iter().zip(came) {
                match came {
                    Came::Taken => {}
                    Came::Failed(outcome, error) => {
                        // Nobody is bound, or not to this partition: the topic may be another by now.
                        self.topics.forget(it.routed.message.topic.as_str());
                        failed.push(it.fail(outcome, error));
                    }
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
            // Until then it opens no channel either.
            unblocked(&link, deadline).await?;
            let channel = link.channel(PUBLISH).await?;
            let confirms = channel.confirm_select(ConfirmSelectOptions::default());
            within(PUBLISH, confirms).await?;
            self.channel = Some(Open { link, channel });
        }
        let gone = || Error::new(ErrorKind::Internal, PUBLISH, "there is no channel");
        let open = self.channel.as_ref().ok_or_else(gone)?;
        unblocked(&open.link, deadline).await?;
        Ok(open)
    }
}

/// Waits until the server takes messages.
async fn unblocked(link: &Link, deadline: Instant) -> Result<()> {
    match link.blocked() {
        Some(reason) => timeout_at(deadline, link.unblocked())
            .await
            .map_err(|_| silent(Some(&reason))),
        None => Ok(()),
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

fn silent(reason: Option<&str>) -> Error {
    match reason {
        Some(reason) => blocked(PUBLISH, reason),
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
