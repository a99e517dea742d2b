//! The one that publishes: whatever is to be published joins the next pipeline of this client.
//!
//! ```text
//!  publish ─┐              ┌ a few pipelines of XADD, and WAIT where replicas are asked for
//!  publish ─┼─▶ [ next ] ──┤
//!  publish ─┘              └ then: each message is answered by itself, whoever reads is woken
//! ```
//!
//! The messages of one publish are sent in their order; of several that nobody awaited one after the
//! other, a lost connection may change it.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;

use eventbus_core::log::Wakes;
use eventbus_core::{Coalescer, Error, ErrorKind, Flushes, Message, Outcome, Position};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use redis::{Pipeline, RedisError, RedisResult, Value};
use tokio::sync::oneshot;
use tracing::trace;

use crate::config::RedisConfig;
use crate::error::{into_error, is_refused};
use crate::position::{EntryId, beyond};
use crate::record;
use crate::server::Server;

const PUBLISH: &str = "publish";

/// Most messages of a pipeline, and bytes after which no more are added. Larger ones leave the
/// processor's caches before they are written.
const MESSAGES_MAX: usize = 512;
const BYTES_MAX: usize = 1024 * 1024;
/// Most pipelines on their way, so that the server goes on while answers are read; one where replicas
/// are waited for, which holds up whatever comes behind.
const LOADS_MAX: usize = 4;

/// A message with the row and the key of its stream.
#[derive(Debug)]
pub(crate) struct Placed {
    pub(crate) row: u32,
    pub(crate) stream: Arc<str>,
    pub(crate) message: Message,
}

/// A message that was not acknowledged: its place in what was to be published.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) index: usize,
    pub(crate) message: Message,
    pub(crate) outcome: Outcome,
    pub(crate) error: Error,
}

impl Refused {
    fn new(index: usize, placed: Placed, outcome: Outcome, error: Error) -> Self {
        Self {
            index,
            message: placed.message,
            outcome,
            error,
        }
    }
}

/// Messages to be taken together. Dropped without an answer, it says that nobody knows what became of
/// them.
#[derive(Debug)]
struct Publish {
    messages: Vec<Placed>,
    reply: Option<oneshot::Sender<Vec<Refused>>>,
}

impl Publish {
    /// Whether whoever asked for it has given up: nothing of it was sent, and is not any more, or it would
    /// come behind what was published since.
    fn is_unwanted(&self) -> bool {
        self.reply.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    /// Says what became of each message, in their order.
    fn answer(mut self, mut answers: impl Iterator<Item = Answer>) {
        let messages = std::mem::take(&mut self.messages);
        let mut refused = Vec::new();
        for (index, placed) in messages.into_iter().enumerate() {
            if let Some(Err((outcome, error))) = answers.next() {
                let error = into_error(PUBLISH, RedisError::clone(&error));
                refused.push(Refused::new(index, placed, outcome, error));
            }
        }
        self.reply(refused);
    }

    fn reply(&mut self, refused: Vec<Refused>) {
        if let Some(reply) = self.reply.take() {
            // The publisher is gone, so nobody waits for the answer.
            let _ = reply.send(refused);
        }
    }
}

impl Drop for Publish {
    fn drop(&mut self) {
        let messages = std::mem::take(&mut self.messages);
        let unknown = |(index, placed)| {
            let message = "the task that publishes has ended: connect again";
            let error = Error::new(ErrorKind::Closed, PUBLISH, message);
            Refused::new(index, placed, Outcome::Unknown, error)
        };
        self.reply(messages.into_iter().enumerate().map(unknown).collect());
    }
}

/// Hands messages to the task that publishes them.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    publishes: Coalescer<Publish>,
}

impl Writer {
    /// The handle, and the task behind it.
    pub(crate) fn new(
        server: Server,
        config: &RedisConfig,
        wakes: &Arc<Wakes>,
    ) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (publishes, flushes) = Coalescer::new();
        let sender = Sender {
            server,
            replicas: config.replicas,
            wait: config.timeout.as_millis() as u64 / 2,
            wakes: Arc::clone(wakes),
        };
        let task = WriterTask {
            flushes,
            waiting: VecDeque::new(),
            sender,
        };
        (Self { publishes }, task.run())
    }

    /// Publishes messages in their order; returns those that were not acknowledged.
    pub(crate) async fn publish(&self, messages: Vec<Placed>) -> Vec<Refused> {
        let (reply, answer) = oneshot::channel();
        let reply = Some(reply);
        self.publishes.add(Publish { messages, reply });
        let refused = answer.await;
        refused.expect("a publish answers, at the latest when it is dropped")
    }
}

/// The task behind [`Writer`].
struct WriterTask {
    flushes: Flushes<Publish>,
    waiting: VecDeque<Publish>,
    sender: Sender,
}

/// What became of one message.
type Answer = Result<EntryId, Failure>;
type Failure = (Outcome, Arc<RedisError>);

impl WriterTask {
    async fn run(mut self) {
        let mut taken = Vec::new();
        let mut on_their_way = FuturesUnordered::new();
        let loads_max = match self.sender.replicas {
            0 => LOADS_MAX,
            _ => 1,
        };
        loop {
            while on_their_way.len() < loads_max
                && let Some(load) = self.load(on_their_way.is_empty())
            {
                on_their_way.push(self.sender.clone().write(load));
            }
            tokio::select! {
                biased;
                Some(()) = on_their_way.next() => {}
                // The outcome is told to each caller, so the ticket's is not asked for.
                ticket = self.flushes.next(&mut taken), if self.waiting.is_empty() || on_their_way.len() < loads_max => {
                    ticket.done();
                    self.waiting.extend(taken.drain(..));
                }
            }
        }
    }

    /// What is to be sent next: as many whole publishes as fit one pipeline, one at least. While others
    /// are on their way, a pipeline waits until it is half full, so that it costs little.
    fn load(&mut self, is_idle: bool) -> Option<Vec<Publish>> {
        self.waiting.retain(|publish| !publish.is_unwanted());
        let (mut count, mut messages, mut bytes) = (0, 0, 0);
        for publish in &self.waiting {
            let sizes = publish.messages.iter().map(|it| it.message.size());
            messages += publish.messages.len();
            bytes += sizes.sum::<usize>();
            if count > 0 && (messages > MESSAGES_MAX || bytes > BYTES_MAX) {
                break;
            }
            count += 1;
        }
        let is_half_full = messages >= MESSAGES_MAX / 2 || bytes >= BYTES_MAX / 2;
        let is_load = count > 0 && (is_idle || is_half_full);
        is_load.then(|| self.waiting.drain(..count).collect())
    }
}

/// Sends pipelines.
#[derive(Clone)]
struct Sender {
    server: Server,
    replicas: u32,
    /// For how many milliseconds replicas are waited for.
    wait: u64,
    wakes: Arc<Wakes>,
}

impl Sender {
    /// Publishes a load and answers everybody in it. One that is larger than a pipeline goes piece after
    /// piece, as its messages have an order, and ends with a piece of which nobody knows what became.
    async fn write(self, load: Vec<Publish>) {
        let mut answers = Vec::new();
        let messages: Vec<&Placed> = load.iter().flat_map(|it| &it.messages).collect();
        let mut rest = &messages[..];
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(piece(rest));
            rest = behind;
            match self.add(piece).await {
                Ok(answered) if answers.is_empty() => answers = answered,
                Ok(answered) => answers.extend(answered),
                Err((outcome, error)) => {
                    let fail = |outcome| Err((outcome, Arc::clone(&error)));
                    answers.extend(piece.iter().map(|_| fail(outcome)));
                    answers.extend(rest.iter().map(|_| fail(Outcome::NotTaken)));
                    break;
                }
            }
        }
        drop(messages);
        let mut answers = answers.into_iter();
        for publish in load {
            let count = publish.messages.len();
            publish.answer(answers.by_ref().take(count));
        }
    }

    /// What became of each message, or of all of them, where the server did not answer.
    async fn add(&self, piece: &[&Placed]) -> Result<Vec<Answer>, Failure> {
        trace!(target: "eventbus::step", step = "redis.publish.before");
        let sent = self.send(piece).await;
        trace!(target: "eventbus::step", step = "redis.publish.after");
        let mut replies = match sent {
            Ok(replies) => replies.into_iter(),
            Err(error) => {
                let outcome = match is_refused(&error) || error.is_connection_refusal() {
                    true => Outcome::NotTaken,
                    false => Outcome::Unknown,
                };
                return Err((outcome, Arc::new(error)));
            }
        };
        let mut answers = Vec::with_capacity(piece.len());
        let mut ends: Vec<(u32, Position)> = Vec::new();
        for placed in piece {
            let answer = answer(replies.next());
            if let Ok(id) = &answer {
                // Ids of a stream rise.
                match ends.iter_mut().find(|(row, _)| *row == placed.row) {
                    Some((_, end)) => *end = beyond(*id),
                    None => ends.push((placed.row, beyond(*id))),
                }
            }
            answers.push(answer);
        }
        self.wakes.appended(&ends);
        if self.replicas > 0 && !has_replicas(replies.next(), self.replicas) {
            let error = Arc::new(RedisError::from((
                redis::ErrorKind::Extension,
                "NOREPLICAS",
                "fewer replicas than `replicas` asks for have it".to_owned(),
            )));
            for answer in answers.iter_mut().filter(|answer| answer.is_ok()) {
                *answer = Err((Outcome::Unknown, Arc::clone(&error)));
            }
        }
        Ok(answers)
    }

    async fn send(&self, piece: &[&Placed]) -> RedisResult<Vec<RedisResult<Value>>> {
        let mut text = Vec::new();
        let mut pipeline = Pipeline::with_capacity(piece.len() + 1);
        for placed in piece {
            pipeline.add_command(record::add(&placed.stream, &placed.message, &mut text));
        }
        if self.replicas > 0 {
            pipeline.cmd("WAIT").arg(self.replicas).arg(self.wait);
        }
        pipeline.ignore_errors();
        self.server.writes.send(&pipeline).await
    }
}

/// How many of the messages go together.
fn piece(messages: &[&Placed]) -> usize {
    let mut bytes = 0;
    let count = messages.iter().take(MESSAGES_MAX).take_while(|placed| {
        let has_room = bytes < BYTES_MAX;
        bytes += placed.message.size();
        has_room
    });
    count.count()
}

fn answer(reply: Option<RedisResult<Value>>) -> Answer {
    let unread = || {
        let message = "the id of an entry cannot be read";
        let error = RedisError::from((redis::ErrorKind::UnexpectedReturnType, message));
        (Outcome::Unknown, Arc::new(error))
    };
    match reply {
        Some(Ok(Value::BulkString(id))) => EntryId::read(&id).map_err(|_| unread()),
        Some(Err(error)) => Err((Outcome::NotTaken, Arc::new(error))),
        _ => Err(unread()),
    }
}

fn has_replicas(reply: Option<RedisResult<Value>>, wanted: u32) -> bool {
    matches!(reply, Some(Ok(Value::Int(count))) if count >= wanted.into())
}

#[cfg(test)]
mod tests {
    use eventbus_core::Topic;

    use super::*;

    #[tokio::test]
    async fn what_is_dropped_unanswered_is_unknown_and_never_taken() {
        let place = |number: u32| Placed {
            row: 0,
            stream: "orders".into(),
            message: Message::new(Topic::from_static("orders"), number.to_string()),
        };
        let (reply, answer) = oneshot::channel();
        let publish = Publish {
            messages: (0..2).map(place).collect(),
            reply: Some(reply),
        };
        drop(publish);
        let refused = answer.await.expect("it says so");
        let outcomes: Vec<_> = refused.iter().map(|it| (it.index, it.outcome)).collect();
        assert_eq!(outcomes, [(0, Outcome::Unknown), (1, Outcome::Unknown)]);
    }
}
