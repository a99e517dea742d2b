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
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use crate::confirms::{Came, Routed, WINDOW, WINDOW_BYTES, publish_all};
use crate::error::{blocked, into_error, is_too_large, missing_exchange};
use crate::link::{Link, SharedLink, closed};
use crate::properties;
use crate::topics::Topics;

const PUBLISH: &str = "publish";

/// How many channels publish at once.
const CHANNELS: usize = 4;
/// Most bytes that wait or are under way, but for a single call.
const WAITING_BYTES: usize = 64 * 1024 * 1024;
/// How much longer than its time a call waits for what a channel says of its messages.
const GRACE: Duration = Duration::from_millis(500);

/// Publishes to one server.
#[derive(Debug)]
pub(crate) struct Publisher {
    queue: Arc<Queue>,
    /// Kept here while they are waited for, so that whoever stops waiting ends none of them.
    tasks: tokio::sync::Mutex<JoinSet<()>>,
    /// Room for what waits or is under way, in bytes.
    room: Arc<Semaphore>,
}

/// What is to be published, in the order in which it was asked for.
#[derive(Debug)]
struct Queue {
    waiting: Mutex<Waiting>,
    /// There is something, or it is closed.
    changed: Notify,
}

#[derive(Debug)]
struct Waiting {
    requests: VecDeque<Request>,
    closed: bool,
    /// Tasks that take from it.
    workers: usize,
    /// What the next request is called.
    next: u64,
}

/// Messages of one call.
#[derive(Debug)]
struct Request {
    number: u64,
    messages: Vec<Routed>,
    deadline: Instant,
    answer: oneshot::Sender<Vec<Unpublished>>,
    /// Held until it is answered.
    _room: OwnedSemaphorePermit,
}

impl Publisher {
    pub(crate) fn new(link: &Arc<SharedLink>, topics: &Arc<Topics>) -> Self {
        let queue = Arc::new(Queue {
            waiting: Mutex::new(Waiting {
                requests: VecDeque::new(),
                closed: false,
                workers: CHANNELS,
                next: 0,
            }),
            changed: Notify::new(),
        });
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
            tasks: tokio::sync::Mutex::new(tasks),
            room: Arc::new(Semaphore::new(WAITING_BYTES)),
        }
    }

    /// Publishes messages whose topics are known. Answers which failed, soon after the deadline at the
    /// latest.
    pub(crate) async fn publish(
        &self,
        messages: Vec<Routed>,
        deadline: Instant,
    ) -> Vec<Unpublished> {
        let bytes = messages.iter().map(|it| it.message.size()).sum::<usize>();
        let bytes = bytes.min(WAITING_BYTES) as u32;
        let room = Arc::clone(&self.room).acquire_many_owned(bytes);
        let Ok(Ok(room)) = timeout_at(deadline, room).await else {
            return refuse(messages, Outcome::NotTaken, crowded);
        };
        let copies = messages.clone();
        let (answer, answered) = oneshot::channel();
        let number = {
            let mut waiting = self.queue.lock();
            if waiting.closed {
                return refuse(messages, Outcome::NotTaken, || closed(PUBLISH));
            }
            waiting.next += 1;
            let number = waiting.next;
            waiting.requests.push_back(Request {
                number,
                messages,
                deadline,
                answer,
                _room: room,
            });
            number
        };
        self.queue.changed.notify_one();
        match timeout_at(deadline + GRACE, answered).await {
            Ok(Ok(failed)) => failed,
            Ok(Err(_)) => refuse(copies, Outcome::Unknown, || closed(PUBLISH)),
            Err(_) => {
                let outcome = match self.queue.lock().strike(number) {
                    true => Outcome::NotTaken,
                    false => Outcome::Unknown,
                };
                refuse(copies, outcome, || silent(None))
            }
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.queue.lock().closed
    }

    /// Publishes what was asked for before, and ends.
    pub(crate) async fn close(&self) {
        self.queue.lock().closed = true;
        self.queue.changed.notify_waiters();
        let mut tasks = self.tasks.lock().await;
        while tasks.join_next().await.is_some() {}
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
                let taken = waiting.take(Instant::now());
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
    fn take(&mut self, now: Instant) -> Vec<Request> {
        let (mut messages, mut bytes) = (0, 0);
        let mut taken = Vec::new();
        while let Some(request) = self.requests.pop_front() {
            if request.answer.is_closed() {
                // Nobody waits for it, and whoever asked for it may have published something else since.
                continue;
            }
            if request.deadline <= now {
                request.refuse();
                continue;
            }
            messages += request.messages.len();
            let sizes = request.messages.iter().map(|it| it.message.size());
            bytes += sizes.sum::<usize>();
            let fits = messages <= WINDOW && bytes <= WINDOW_BYTES;
            if !taken.is_empty() && !fits {
                self.requests.push_front(request);
                break;
            }
            taken.push(request);
        }
        taken
    }

    /// Strikes out a request, if it was not taken yet.
    fn strike(&mut self, number: u64) -> bool {
        let before = self.requests.len();
        self.requests.retain(|it| it.number != number);
        self.requests.len() < before
    }
}

impl Request {
    /// Gives its messages back: its time is up, and nothing of it was sent.
    fn refuse(self) {
        let failed = refuse(self.messages, Outcome::NotTaken, || silent(None));
        // Whoever asked may have given up.
        let _ = self.answer.send(failed);
    }
}

/// Owns one channel.
struct Worker {
    queue: Arc<Queue>,
    link: Arc<SharedLink>,
    topics: Arc<Topics>,
    channel: Option<Open>,
}

impl Drop for Worker {
    /// When the last one ends, however it does, nobody waits for an answer that never comes.
    fn drop(&mut self) {
        let mut waiting = self.queue.lock();
        waiting.workers -= 1;
        if waiting.workers == 0 {
            waiting.closed = true;
            waiting.requests.clear();
        }
    }
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

/// What is to be sent again.
enum Again {
    Together(Vec<OnItsWay>),
    /// One by one, since one among them closes the channel.
    Alone(Vec<OnItsWay>),
}

/// Who waits for a request, and what of it failed.
struct Asking {
    answer: oneshot::Sender<Vec<Unpublished>>,
    failed: Vec<Unpublished>,
    _room: OwnedSemaphorePermit,
}

impl Worker {
    async fn run(mut self) {
        while let Some(requests) = self.queue.take().await {
            self.serve(requests).await;
        }
    }

    /// Publishes requests, as much at a time as a window holds, and answers each.
    async fn serve(&mut self, requests: Vec<Request>) {
        let mut asking = Vec::with_capacity(requests.len());
        let mut waiting = VecDeque::new();
        for (number, request) in requests.into_iter().enumerate() {
            let all = request.messages.into_iter();
            waiting.extend(all.map(|routed| OnItsWay {
                request: number,
                routed,
            }));
            asking.push(Asking {
                answer: request.answer,
                failed: Vec::new(),
                _room: request._room,
            });
        }
        while !waiting.is_empty() {
            let window = window(&mut waiting);
            self.send(window, &mut asking).await;
        }
        for it in asking {
            // Whoever asked may have given up.
            let _ = it.answer.send(it.failed);
        }
    }

    /// Publishes one window and waits for what becomes of it. What is lost with its connection is
    /// published again until its time is up; that may duplicate it.
    async fn send(&mut self, mut window: Vec<OnItsWay>, asking: &mut [Asking]) {
        let mut was_sent = false;
        let mut pause = Duration::from_millis(50);
        // What waits to be sent alone, because one among it has closed the channel.
        let mut alone = VecDeque::new();
        while !window.is_empty() {
            let outcome = match was_sent {
                true => Outcome::Unknown,
                false => Outcome::NotTaken,
            };
            let now = Instant::now();
            // Whoever has given up may have published something else since.
            window.retain(|it| !asking[it.request].answer.is_closed());
            let (late, timely): (Vec<_>, Vec<_>) =
                window.into_iter().partition(|it| it.routed.deadline <= now);
            fail(asking, late, outcome, || silent(None));
            window = timely;
            let Some(deadline) = window.iter().map(|it| it.routed.deadline).min() else {
                window.extend(alone.pop_front());
                continue;
            };
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
                    let (late, timely): (Vec<_>, Vec<_>) = window
                        .into_iter()
                        .partition(|it| it.routed.deadline <= deadline || !error.is_retryable());
                    fail(asking, late, outcome, || copy(&error));
                    window = timely;
                    if window.is_empty() {
                        window.extend(alone.pop_front());
                    }
                    continue;
                }
            };
            let sound = fitting(window, open.link.frame_bytes_max(), asking);
            was_sent = true;
            let routed: Vec<_> = sound.iter().map(|it| &it.routed).collect();
            let came = publish_all(&open.channel, &routed).await;
            let blocked = open.link.blocked();
            let again = self.hear(sound, came, blocked.as_deref(), asking);
            window = match again {
                Again::Together(again) => again,
                Again::Alone(again) => {
                    alone.extend(again);
                    Vec::new()
                }
            };
            if window.is_empty() {
                window.extend(alone.pop_front());
            }
        }
    }

    /// Notes what became of messages. Answers which are to be sent again.
    fn hear(
        &mut self,
        sent: Vec<OnItsWay>,
        came: Vec<Came>,
        blocked: Option<&str>,
        asking: &mut [Asking],
    ) -> Again {
        let count = sent.len();
        let mut again = Vec::new();
        let mut is_one_by_one = false;
        for (it, came) in sent.into_iter().zip(came) {
            match came {
                Came::Taken => {}
                Came::Failed(outcome, error) => {
                    // Nobody is bound, or not to this partition: the topic may be another by now.
                    self.topics.forget(it.routed.message.topic.as_str());
                    it.fail(asking, outcome, error);
                }
                Came::Silent => {
                    self.channel = None;
                    it.fail(asking, Outcome::Unknown, silent(blocked));
                }
                Came::Lost(error) => {
                    self.channel = None;
                    match self.judge(&it.routed.message, &error) {
                        // Which of them the server would not have, it does not say.
                        Some(_) if count > 1 && missing_exchange(&error).is_none() => {
                            is_one_by_one = true;
                            again.push(it);
                        }
                        Some((outcome, error)) => it.fail(asking, outcome, error),
                        None => again.push(it),
                    }
                }
            }
        }
        if !again.is_empty() {
            tracing::debug!(
                messages = again.len(),
                "messages are published again: whether the server took them is unknown"
            );
        }
        match is_one_by_one {
            true => Again::Alone(again),
            false => Again::Together(again),
        }
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
            let channel = link.confirming(PUBLISH).await?;
            self.channel = Some(Open { link, channel });
        }
        let gone = || {
            Error::new(
                ErrorKind::Unavailable,
                PUBLISH,
                "the connection to the server is gone",
            )
        };
        let open = self.channel.as_ref().ok_or_else(gone)?;
        unblocked(&open.link, deadline).await?;
        match open.link.is_open() {
            true => Ok(open),
            false => Err(gone()),
        }
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
    fn fail(self, asking: &mut [Asking], outcome: Outcome, error: Error) {
        let Routed { index, message, .. } = self.routed;
        let failed = Unpublished::new(index, message, outcome, error);
        asking[self.request].failed.push(failed);
    }
}

fn fail(asking: &mut [Asking], failed: Vec<OnItsWay>, outcome: Outcome, error: impl Fn() -> Error) {
    for it in failed {
        it.fail(asking, outcome, error());
    }
}

/// Messages whose properties fit a frame of the server, which ends the connection for others.
fn fitting(window: Vec<OnItsWay>, frame: usize, asking: &mut [Asking]) -> Vec<OnItsWay> {
    let mut sound = Vec::with_capacity(window.len());
    for it in window {
        match properties::fits(&it.routed.message, frame) {
            Ok(()) => sound.push(it),
            Err(error) => it.fail(asking, Outcome::NotTaken, error),
        }
    }
    sound
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

fn crowded() -> Error {
    Error::new(
        ErrorKind::Timeout,
        PUBLISH,
        "too much waits to be published, and the server takes it too slowly: publish less at once, or look at its load",
    )
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

#[cfg(test)]
mod tests {
    use eventbus_core::Topic;

    use super::*;
    use crate::confirms::Destination;

    fn request(number: u64, deadline: Instant) -> (Request, oneshot::Receiver<Vec<Unpublished>>) {
        let (answer, answered) = oneshot::channel();
        let room = Arc::new(Semaphore::new(1)).try_acquire_owned();
        let message = Message::new(Topic::from_static("t"), number.to_string());
        let request = Request {
            number,
            messages: vec![Routed {
                index: 0,
                to: Destination::Partition(0),
                message,
                deadline,
            }],
            deadline,
            answer,
            _room: room.expect("there is room"),
        };
        (request, answered)
    }

    #[test]
    fn what_nobody_waits_for_or_is_too_late_is_not_taken() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut waiting = Waiting {
            requests: VecDeque::new(),
            closed: false,
            workers: 1,
            next: 4,
        };
        let mut answers = Vec::new();
        for (number, deadline) in [(1, later), (2, later), (3, now), (4, later), (5, later)] {
            let (request, answered) = request(number, deadline);
            waiting.requests.push_back(request);
            answers.push(answered);
        }
        drop(answers.remove(1));
        assert!(waiting.strike(4));
        assert!(!waiting.strike(4));
        let taken: Vec<_> = waiting.take(now).iter().map(|it| it.number).collect();
        assert_eq!(taken, [1, 5]);
        let refused = answers[1].try_recv().expect("it is answered");
        assert_eq!(refused[0].outcome, Outcome::NotTaken);
    }
}
