//! Moves messages, batch by batch. While a batch is being moved nothing more of the queue is handed out:
//! what comes back after an end has either been noted in the journal, or never been published.

use std::collections::HashSet;
use std::sync::Arc;

use eventbus_core::{
    Error, ErrorKind, EventId, Formats, Group, HeadersBuilder, Message, Result, Topic, header,
    partition_of,
};
use futures_util::StreamExt as _;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::trace;

use super::journal::{Doubt, Journal};
use super::{INGRESS, Status};
use crate::adopted::{self, RabbitMqQueue};
use crate::config::RabbitMqConfig;
use crate::confirms::{Came, Destination, Routed, WINDOW, WINDOW_BYTES, publish_all, publish_one};
use crate::error::{blocked, into_error, is_missing, is_too_large};
use crate::groups::declare_group;
use crate::link::{Link, RECONNECT, natively, within};
use crate::properties;
use crate::topics::{DURABLE, Topics, settle_down, text};
use crate::{deliveries::is_ending, names};

const MOVE: &str = "move messages";

/// What an ingress moves, and where.
#[derive(Debug)]
pub(super) struct Mover {
    pub(super) config: RabbitMqConfig,
    pub(super) queue: RabbitMqQueue,
    pub(super) topic: Topic,
    /// How many partitions it has.
    pub(super) topics: Arc<Topics>,
    pub(super) groups: Vec<Group>,
    pub(super) status: Arc<Status>,
}

/// What an ingress has on the server while one connection lasts. All of it goes through that one: when
/// the server takes it for dead, a process that stood still can neither move nor note anything.
pub(super) struct Session {
    /// The first, so that it is dropped first: a consumer that is dropped before would be cancelled, and
    /// the journal handed over while the messages are not back in their place.
    link: Link,
    journal: Journal,
    /// Brings messages, and acknowledges them.
    source: Channel,
    /// Publishes them.
    sink: Channel,
    /// As many as the topic was found to have.
    partitions: u32,
}

/// Why moving ends.
enum Over {
    Stopped,
    Failed(Error),
}

impl From<Error> for Over {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Who says that it is to end.
struct Stop {
    stopping: watch::Receiver<bool>,
    closing: watch::Receiver<bool>,
}

impl Stop {
    async fn is_wished(&self) {
        tokio::select! {
            () = is_ending(self.stopping.clone()) => {}
            () = is_ending(self.closing.clone()) => {}
        }
    }

    /// Does something, unless it is to end.
    async fn or<T>(&self, done: impl Future<Output = Result<T>>) -> Result<T, Over> {
        tokio::select! {
            done = done => done.map_err(Over::Failed),
            () = self.is_wished() => Err(Over::Stopped),
        }
    }
}

/// Why messages were not taken.
enum Why {
    Failed(Error),
    /// One among them is larger than the server takes.
    TooLarge,
}

/// A message of a batch.
struct Moving {
    routed: Routed,
    /// As it came, for when the topic cannot take it.
    properties: BasicProperties,
}

impl Mover {
    /// Connects, and checks what is there.
    pub(super) async fn open(&self) -> Result<Session> {
        let link = Link::connect(&self.config, &format!("ingress {}", self.queue.name)).await?;
        self.queue.adopt(INGRESS, &link, adopted::INGRESS).await?;
        let partitions = self.topics.ensure(INGRESS, &self.topic).await?;
        for group in &self.groups {
            declare_group(INGRESS, &link, group, &self.topic, partitions).await?;
        }
        let journal = names::journal_queue(INGRESS, &self.queue.name)?;
        let journal = Journal::join(&link, journal).await?;
        let source = link.channel(INGRESS).await?;
        let sink = link.confirming(INGRESS).await?;
        Ok(Session {
            link,
            journal,
            source,
            sink,
            partitions,
        })
    }

    /// Moves messages until it is told to end, or cannot go on.
    pub(super) async fn run(
        self,
        session: Session,
        stopping: watch::Receiver<bool>,
        closing: watch::Receiver<bool>,
    ) -> Result<()> {
        let stop = Stop { stopping, closing };
        let mut session = Some(session);
        let mut pause = RECONNECT.0;
        loop {
            let over = match session.take() {
                Some(mut open) => {
                    let over = self.serve(&mut open, &stop, &mut pause).await;
                    let is_blocked = open.link.blocked().is_some();
                    open.link.close().await;
                    match over {
                        // That is why, whatever did not come to its end.
                        Over::Failed(_) if is_blocked => silent(&open.link).into(),
                        over => over,
                    }
                }
                None => match stop.or(self.open()).await {
                    Ok(open) => {
                        session = Some(open);
                        continue;
                    }
                    Err(over) => over,
                },
            };
            self.status.lock().is_active = false;
            let Over::Failed(error) = over else {
                return Ok(());
            };
            self.note_waiting(&error);
            if !error.is_retryable() {
                return Err(error);
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.is_wished() => return Ok(()),
            }
            pause = (pause * 2).min(RECONNECT.1);
        }
    }

    /// Moves messages as long as the connection lasts.
    async fn serve(
        &self,
        session: &mut Session,
        stop: &Stop,
        pause: &mut std::time::Duration,
    ) -> Over {
        let mut doubt = match stop.or(session.journal.lead()).await {
            Ok(doubt) => doubt,
            Err(over) => return over,
        };
        match self.queue.find(INGRESS, &session.link).await {
            Ok(others) => self.note_competitors(others),
            Err(error) => return error.into(),
        }
        // What may have been published before comes back all at once.
        let prefetch = usize::from(self.config.prefetch).max(doubt.len());
        let prefetch = u16::try_from(prefetch).unwrap_or(u16::MAX);
        let limited = session
            .source
            .basic_qos(prefetch, BasicQosOptions::default());
        if let Err(error) = within(INGRESS, limited).await {
            return error.into();
        }
        {
            let mut status = self.status.lock();
            (status.is_active, status.error) = (true, None);
        }
        tracing::info!(
            queue = self.queue.name,
            topic = self.topic.as_str(),
            in_doubt = doubt.len(),
            "an ingress moves messages"
        );
        loop {
            match self.move_batch(session, stop, &mut doubt).await {
                Ok(()) => *pause = RECONNECT.0,
                Err(over) => return over,
            }
            // What has not come back was acknowledged, or other messages would have come behind it.
            doubt = Doubt::default();
        }
    }

    async fn move_batch(
        &self,
        session: &mut Session,
        stop: &Stop,
        doubt: &mut Doubt,
    ) -> Result<(), Over> {
        let batch = self.take(session, stop).await?;
        let Some(last) = batch.last().map(|it| it.delivery_tag) else {
            return Ok(());
        };
        let mut given = Vec::new();
        let mut moving = Vec::with_capacity(batch.len());
        let formats = Formats::default();
        for (index, delivery) in batch.into_iter().enumerate() {
            moving.push(self.read(index, delivery, &formats, doubt, &mut given)?);
        }
        session.journal.note(given).await?;
        trace!(target: "eventbus::step", step = "ingress.publish.before");
        self.publish(session, stop, moving).await?;
        trace!(target: "eventbus::step", step = "ingress.publish.after");
        let options = BasicAckOptions { multiple: true };
        let acked = async {
            session.source.basic_ack(last, options).await?;
            settle_down(&session.source, self.queue.name.as_str().into()).await
        };
        let settled = natively(MOVE, acked).await?;
        trace!(target: "eventbus::step", step = "ingress.acknowledge.after");
        match settled {
            Ok(_) => {}
            Err(error) if is_missing(&error) => return Err(self.queue.missing(MOVE).into()),
            Err(error) => return Err(into_error(MOVE, error).into()),
        }
        session.journal.forget().await?;
        Ok(())
    }

    /// Waits for messages, and takes what is there; then nothing more is handed out.
    async fn take(&self, session: &Session, stop: &Stop) -> Result<Vec<Delivery>, Over> {
        let options = BasicConsumeOptions::default();
        let none = FieldTable::default();
        let name = ShortString::from(self.queue.name.as_str());
        let consumer = session.source.basic_consume(name, "".into(), options, none);
        let mut consumer = match natively(MOVE, consumer).await? {
            Ok(consumer) => consumer,
            Err(error) if is_missing(&error) => return Err(self.queue.missing(MOVE).into()),
            Err(error) => return Err(into_error(MOVE, error).into()),
        };
        let first = stop.or(async { Ok(consumer.next().await) }).await?;
        let Some(first) = first else {
            return Err(self.queue.missing(MOVE).into());
        };
        let cancelled = session
            .source
            .basic_cancel(consumer.tag(), BasicCancelOptions::default());
        within(MOVE, cancelled).await?;
        let mut batch = vec![first.map_err(|error| into_error(MOVE, error))?];
        while let Some(delivery) = consumer.next().await {
            batch.push(delivery.map_err(|error| into_error(MOVE, error))?);
        }
        Ok(batch)
    }

    /// Makes a message of the topic, with an id and a key.
    fn read(
        &self,
        index: usize,
        delivery: Delivery,
        formats: &Formats,
        doubt: &mut Doubt,
        given: &mut Vec<(u64, EventId)>,
    ) -> Result<Moving> {
        let properties = delivery.properties.clone();
        let is_back = delivery.redelivered;
        let read = properties::read(&self.topic, delivery, false);
        let mut message = read.message;
        if let Some(key) = self.queue.key_of(&message.payload) {
            message.key = Some(key);
        }
        if formats.own_id(&message).is_none() {
            let print = names::fnv(&message.payload);
            let known = is_back.then(|| doubt.take(print)).flatten();
            let id = known.clone().unwrap_or_else(EventId::new);
            message.headers = with_id(&message, &id)?;
            // Of one that was handed out before nothing says later whether it came back.
            if known.is_some() || !is_back {
                given.push((print, id));
            }
        }
        Ok(Moving {
            routed: Routed {
                index,
                // Found when it is sent.
                to: Destination::Partition(0),
                message,
                deadline: Instant::now(),
            },
            properties,
        })
    }

    /// Publishes all of a batch, however long that takes.
    async fn publish(
        &self,
        session: &mut Session,
        stop: &Stop,
        moving: Vec<Moving>,
    ) -> Result<(), Over> {
        let (mut moving, mut unfit): (Vec<_>, Vec<_>) =
            moving.into_iter().partition(|it| self.is_fit(session, it));
        let mut pause = RECONNECT.0;
        let mut most = WINDOW;
        while !moving.is_empty() {
            if let Some(reason) = session.link.blocked() {
                self.note_waiting(&blocked(MOVE, &reason));
                let unblocked = async {
                    session.link.unblocked().await;
                    Ok(())
                };
                stop.or(unblocked).await?;
            }
            let (wave, mut rest) = wave(moving, most);
            let is_one = wave.len() == 1;
            let (left, why) = self.send(session, wave).await?;
            let failure = match why {
                None => None,
                // The next one of its key is not sent before it is taken.
                Some(Why::Failed(error)) => Some(error),
                Some(Why::TooLarge) if is_one => {
                    unfit.extend(left);
                    moving = rest;
                    continue;
                }
                // It takes the others with it: which it is, is found out one by one.
                Some(Why::TooLarge) => {
                    most = 1;
                    None
                }
            };
            rest.extend(left);
            rest.sort_by_key(|it| it.routed.index);
            moving = rest;
            let Some(error) = failure else {
                pause = RECONNECT.0;
                continue;
            };
            self.note_waiting(&error);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.is_wished() => return Err(Over::Stopped),
            }
            pause = (pause * 2).min(RECONNECT.1);
        }
        for it in unfit {
            self.put_aside(session, it).await?;
        }
        self.status.lock().error = None;
        Ok(())
    }

    /// Publishes messages side by side. Answers which were not taken, and why. Where only the channel has
    /// gone there is another one then: what the queue has handed out stays with this process, since
    /// some queues count how often they take a message back, and drop it at last.
    async fn send(
        &self,
        session: &mut Session,
        mut wave: Vec<Moving>,
    ) -> Result<(Vec<Moving>, Option<Why>)> {
        // Where that cannot be found out just now it is as it was.
        if let Ok(partitions) = self.topics.ensure(MOVE, &self.topic).await {
            session.partitions = partitions.max(1);
        }
        let deadline = Instant::now() + self.config.publish_timeout;
        for it in &mut wave {
            let partition = match &it.routed.message.key {
                Some(key) => partition_of(key, session.partitions),
                None => fastrand::u32(..) % session.partitions,
            };
            it.routed.to = Destination::Partition(partition);
            it.routed.deadline = deadline;
        }
        let routed: Vec<_> = wave.iter().map(|it| &it.routed).collect();
        let came = publish_all(&session.sink, &routed).await;
        let mut left = Vec::new();
        let mut why = None;
        let mut is_used_up = false;
        for (it, came) in wave.into_iter().zip(came) {
            match came {
                Came::Taken => {
                    let mut status = self.status.lock();
                    status.moved += 1;
                    status.unkeyed += u64::from(it.routed.message.key.is_none());
                    continue;
                }
                Came::Failed(_, error) => {
                    // Nobody is bound, or not to this partition: the topic may be another by now.
                    self.topics.forget(self.topic.as_str());
                    why = Some(Why::Failed(error));
                }
                Came::Lost(error) if is_too_large(&error) => {
                    is_used_up = true;
                    why = Some(Why::TooLarge);
                }
                Came::Lost(error) => {
                    is_used_up = true;
                    why = Some(Why::Failed(into_error(MOVE, error)));
                }
                Came::Silent => {
                    is_used_up = true;
                    why = Some(Why::Failed(silent(&session.link)));
                }
            }
            left.push(it);
        }
        if !is_used_up {
            return Ok((left, why));
        }
        match why {
            Some(Why::Failed(error)) if !error.is_retryable() || !session.link.is_open() => {
                return Err(error);
            }
            _ => {}
        }
        // What was sent through it is done, or never will be, when it is closed.
        if session.sink.status().connected() {
            within(MOVE, session.sink.close(200, "too slow".into())).await?;
        }
        session.sink = session.link.confirming(INGRESS).await?;
        Ok((left, why))
    }

    fn is_fit(&self, session: &Session, moving: &Moving) -> bool {
        let message = &moving.routed.message;
        let frame = session.link.frame_bytes_max();
        message.check(self.config.message_bytes_max).is_ok()
            && properties::fits(message, frame).is_ok()
    }

    /// Keeps a message that the topic cannot take, as it came.
    async fn put_aside(&self, session: &Session, moving: Moving) -> Result<()> {
        let name = names::refused_queue(MOVE, &self.queue.name)?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), text("quorum"));
        let declared = session.sink.queue_declare(name.clone(), DURABLE, arguments);
        within(MOVE, declared).await?;
        let message = moving.routed.message;
        let place = (ShortString::default(), name.clone());
        let properties = properties::to_keep(&moving.properties);
        if !publish_one(MOVE, &session.sink, place, &message.payload, properties).await? {
            return Err(Error::new(
                ErrorKind::Unavailable,
                MOVE,
                "the server did not keep a message that the topic cannot take",
            )
            .with("queue", name));
        }
        tracing::error!(
            queue = self.queue.name,
            topic = self.topic.as_str(),
            bytes = message.payload.len(),
            kept_in = name.as_str(),
            "a message is too large for the topic, or its key or headers are: it is put aside as it came"
        );
        self.status.lock().refused += 1;
        Ok(())
    }

    /// Says why nothing is moved, once for each reason.
    fn note_waiting(&self, error: &Error) {
        let reason = error.to_string();
        let mut status = self.status.lock();
        if status.error.as_ref() != Some(&reason) {
            tracing::warn!(%error, queue = self.queue.name, "an ingress waits");
            status.error = Some(reason);
        }
    }

    fn note_competitors(&self, others: u32) {
        let mut status = self.status.lock();
        if others > status.competitors {
            tracing::warn!(
                queue = self.queue.name,
                consumers = others,
                "others consume the queue of an ingress: what they take does not come to the topic"
            );
        }
        status.competitors = others;
    }
}

/// What is published next, at most so many, and the rest: one message of each key, so that none overtakes
/// an earlier one that is not taken.
fn wave(moving: Vec<Moving>, most: usize) -> (Vec<Moving>, Vec<Moving>) {
    let mut keys = HashSet::new();
    let (mut wave, mut rest) = (Vec::new(), Vec::new());
    let mut bytes = 0;
    for it in moving {
        let message = &it.routed.message;
        let is_first = message
            .key
            .as_ref()
            .is_none_or(|key| keys.insert(key.clone()));
        let size = message.size();
        let fits = wave.is_empty() || (wave.len() < most && bytes + size <= WINDOW_BYTES);
        match is_first && fits {
            true => {
                bytes += size;
                wave.push(it);
            }
            false => rest.push(it),
        }
    }
    (wave, rest)
}

fn with_id(message: &Message, id: &EventId) -> Result<eventbus_core::Headers> {
    let builder: HeadersBuilder = message.headers.to_builder().unlimited();
    Ok(builder.push(header::ID, id.to_string())?.build())
}

fn silent(link: &Link) -> Error {
    match link.blocked() {
        Some(reason) => blocked(MOVE, &reason),
        None => Error::new(
            ErrorKind::Unavailable,
            MOVE,
            "the server has not confirmed the messages in time",
        ),
    }
}

#[cfg(test)]
mod tests {
    use eventbus_core::Key;

    use super::*;

    fn moving(index: usize, key: Option<&str>, bytes: usize) -> Moving {
        let mut message = Message::new(Topic::from_static("t"), vec![b'x'; bytes]);
        message.key = key.map(Key::from);
        Moving {
            routed: Routed {
                index,
                to: Destination::Partition(0),
                message,
                deadline: Instant::now(),
            },
            properties: BasicProperties::default(),
        }
    }

    fn places(moving: &[Moving]) -> Vec<usize> {
        moving.iter().map(|it| it.routed.index).collect()
    }

    #[test]
    fn a_wave_has_one_message_of_each_key_in_their_order() {
        let keys = [Some("a"), Some("b"), Some("a"), None, Some("c"), None];
        let all = keys.iter().enumerate();
        let all = || {
            all.clone()
                .map(|(index, key)| moving(index, *key, 1))
                .collect()
        };
        let (first, rest) = wave(all(), WINDOW);
        assert_eq!(
            (places(&first), places(&rest)),
            (vec![0, 1, 3, 4, 5], vec![2])
        );
        let (first, rest) = wave(all(), 1);
        assert_eq!(
            (places(&first), places(&rest)),
            (vec![0], vec![1, 2, 3, 4, 5])
        );
    }

    #[test]
    fn a_wave_has_a_bound_in_bytes_that_no_key_gets_around() {
        let large = WINDOW_BYTES - 100;
        let all = [
            moving(0, Some("a"), large),
            moving(1, Some("b"), 1000),
            moving(2, Some("b"), 1),
            moving(3, Some("c"), 1),
        ];
        let (first, rest) = wave(all.into(), WINDOW);
        assert_eq!((places(&first), places(&rest)), (vec![0, 3], vec![1, 2]));
        let (first, _) = wave(vec![moving(0, None, 2 * WINDOW_BYTES)], WINDOW);
        assert_eq!(places(&first), [0]);
    }
}
