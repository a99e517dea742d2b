//! What an ingress was about to do, in a queue beside the one that it reads: the ids that messages
//! without one were given, noted before they are published. The queue has a single active consumer,
//! which is how the processes of an ingress agree on who moves messages.
//!
//! ```text
//!  join ─▶ first record ─▶ mark ─▶ all before the mark is read: this one moves messages
//!                                   │ keeps the mark, so that there is always one record
//!    a batch: note ids ─▶ publish ─▶ acknowledge ─▶ forget the note, before the next batch is taken
//! ```

use std::collections::HashMap;
use std::fmt::Write as _;

use eventbus_core::{Error, ErrorKind, EventId, Result};
use futures_util::StreamExt as _;
use lapin::options::{BasicAckOptions, BasicConsumeOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Consumer};

use tokio::time::timeout;

use super::INGRESS;
use crate::confirms::publish_one;
use crate::link::{ANSWER, Link, within};
use crate::topics::{DURABLE, settle_down, text};

/// The first line of a record.
const HEAD: &str = "eventbus-ingress 1";

/// Ids that were given to messages which may have been published and not acknowledged, by what the
/// messages look like, in the order of the queue.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Doubt {
    ids: HashMap<u64, Vec<EventId>>,
    left: usize,
}

impl Doubt {
    fn add(&mut self, print: u64, id: EventId) {
        self.ids.entry(print).or_default().insert(0, id);
        self.left += 1;
    }

    /// The first id that was given to such a message and was not taken yet.
    pub(super) fn take(&mut self, print: u64) -> Option<EventId> {
        let id = self.ids.get_mut(&print)?.pop()?;
        self.left -= 1;
        Some(id)
    }

    pub(super) fn len(&self) -> usize {
        self.left
    }
}

/// A record of the journal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Record {
    /// Who wrote it, and when in its life.
    mark: u128,
    /// Whether these ids are looked for in the queue just now, after an end: what is handed out again
    /// then may have been handed out for the first time by that look.
    is_resolving: bool,
    /// Ids by what their messages look like.
    given: Vec<(u64, EventId)>,
}

impl Record {
    fn write(&self) -> String {
        let mut text = format!("{HEAD}\nmark {:032x}\n", self.mark);
        if self.is_resolving {
            text.push_str("resolving\n");
        }
        for (print, id) in &self.given {
            let _ = writeln!(text, "gives {print:016x} {id}");
        }
        text
    }

    fn read(text: &[u8]) -> Option<Self> {
        let mut lines = std::str::from_utf8(text).ok()?.lines();
        if lines.next()? != HEAD {
            return None;
        }
        let mut record = Self::default();
        for line in lines {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "mark" => record.mark = u128::from_str_radix(rest, 16).ok()?,
                "resolving" => record.is_resolving = true,
                "gives" => {
                    let (print, id) = rest.split_once(' ')?;
                    let print = u64::from_str_radix(print, 16).ok()?;
                    record.given.push((print, EventId::parse(id).ok()?));
                }
                _ => {}
            }
        }
        Some(record)
    }
}

/// The journal of an ingress, through the connection that moves its messages: when that ends, all of it
/// does.
#[derive(Debug)]
pub(super) struct Journal {
    channel: Channel,
    queue: ShortString,
    records: Consumer,
    /// What has been handed to this process and stands in the journal beside its mark.
    notes: Vec<u64>,
}

impl Journal {
    /// Joins those who want to move the messages.
    pub(super) async fn join(link: &Link, queue: ShortString) -> Result<Self> {
        let channel = link.confirming(INGRESS).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), text("quorum"));
        let single = AMQPValue::Boolean(true);
        arguments.insert("x-single-active-consumer".into(), single);
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(i32::MAX));
        let declared = channel.queue_declare(queue.clone(), DURABLE, arguments);
        within(INGRESS, declared).await?;
        let options = BasicConsumeOptions::default();
        let none = FieldTable::default();
        let records = channel.basic_consume(queue.clone(), "".into(), options, none);
        let records = within(INGRESS, records).await?;
        let journal = Self {
            channel,
            queue,
            records,
            notes: Vec::new(),
        };
        // Whoever is active has something to read, also where there was nothing.
        journal.append(&Record::default()).await?;
        Ok(journal)
    }

    /// Waits until it is this process that moves messages. Answers what the one before left in doubt.
    pub(super) async fn lead(&mut self) -> Result<Doubt> {
        let mut read = self.next().await?;
        let mark = Record {
            mark: fastrand::u128(1..),
            ..Record::default()
        };
        self.append(&mark).await?;
        let (mut given, mut is_resolving, mut passed) = (Vec::new(), false, Vec::new());
        // The mark itself stays, so that there is a record for the next one.
        while read.1.mark != mark.mark {
            let (tag, record) = read;
            match record.given.is_empty() {
                true => passed.push(tag),
                false => self.notes.push(tag),
            }
            is_resolving |= record.is_resolving;
            given.extend(record.given);
            read = self.next().await?;
        }
        for tag in passed {
            self.acknowledge(tag).await?;
        }
        if given.is_empty() || is_resolving {
            // Ended twice: whether a message was handed out before, nothing says any more.
            self.forget().await?;
            return Ok(Doubt::default());
        }
        self.replace(given.clone(), true).await?;
        let mut doubt = Doubt::default();
        for (print, id) in given {
            doubt.add(print, id);
        }
        Ok(doubt)
    }

    /// Notes ids in the place of what was noted before; it is on the server when this resolves.
    pub(super) async fn note(&mut self, given: Vec<(u64, EventId)>) -> Result<()> {
        match given.is_empty() {
            true => self.forget().await,
            false => self.replace(given, false).await,
        }
    }

    async fn replace(&mut self, given: Vec<(u64, EventId)>, is_resolving: bool) -> Result<()> {
        let record = Record {
            mark: fastrand::u128(1..),
            is_resolving,
            given,
        };
        self.append(&record).await?;
        let mut before = std::mem::take(&mut self.notes);
        loop {
            // It is there, and this process is who is handed what is there.
            let next = timeout(ANSWER, self.next()).await;
            let (tag, read) =
                next.map_err(|_| lost("the server does not hand out what an ingress has noted"))??;
            if read.mark == record.mark {
                self.notes.push(tag);
                break;
            }
            // Of somebody who has joined and waits.
            before.push(tag);
        }
        for tag in before {
            self.acknowledge(tag).await?;
        }
        self.settle().await
    }

    /// Forgets what was noted: all of it is done. The server has forgotten it when this resolves.
    pub(super) async fn forget(&mut self) -> Result<()> {
        if self.notes.is_empty() {
            return Ok(());
        }
        for tag in std::mem::take(&mut self.notes) {
            self.acknowledge(tag).await?;
        }
        self.settle().await
    }

    async fn append(&self, record: &Record) -> Result<()> {
        let text = record.write();
        let to = (ShortString::default(), self.queue.clone());
        let properties = BasicProperties::default().with_delivery_mode(2);
        match publish_one(INGRESS, &self.channel, to, text.as_bytes(), properties).await? {
            true => Ok(()),
            false => Err(lost(
                "the server did not keep what an ingress is about to do",
            )),
        }
    }

    /// The next record with its tag, however long that takes.
    async fn next(&mut self) -> Result<(u64, Record)> {
        loop {
            let Some(delivery) = self.records.next().await else {
                return Err(lost("the queue beside the ingress is gone"));
            };
            let delivery = delivery.map_err(|error| crate::error::into_error(INGRESS, error))?;
            if let Some(record) = Record::read(&delivery.data) {
                return Ok((delivery.delivery_tag, record));
            }
            tracing::warn!(
                queue = self.queue.as_str(),
                "a message that is no record of an ingress is passed over"
            );
            self.acknowledge(delivery.delivery_tag).await?;
        }
    }

    async fn acknowledge(&self, tag: u64) -> Result<()> {
        let acked = self.channel.basic_ack(tag, BasicAckOptions::default());
        within(INGRESS, acked).await
    }

    async fn settle(&self) -> Result<()> {
        let settled = settle_down(&self.channel, self.queue.clone());
        within(INGRESS, settled).await.map(drop)
    }
}

fn lost(message: &str) -> Error {
    Error::new(ErrorKind::Unavailable, INGRESS, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_as_it_was() {
        for is_resolving in [false, true] {
            let record = Record {
                mark: 17,
                is_resolving,
                given: vec![(3, EventId::new()), (u64::MAX, EventId::new())],
            };
            assert_eq!(Record::read(record.write().as_bytes()), Some(record));
        }
        for text in ["", "hello", "eventbus-ingress 2\nmark 1"] {
            assert_eq!(Record::read(text.as_bytes()), None, "{text:?}");
        }
    }

    #[test]
    fn messages_that_look_alike_get_their_ids_in_order() {
        let ids = [EventId::new(), EventId::new(), EventId::new()];
        let mut doubt = Doubt::default();
        for (print, id) in [1, 2, 1].into_iter().zip(&ids) {
            doubt.add(print, id.clone());
        }
        assert_eq!(doubt.len(), 3);
        assert_eq!(doubt.take(1).as_ref(), Some(&ids[0]));
        assert_eq!(doubt.take(1).as_ref(), Some(&ids[2]));
        assert_eq!(doubt.take(1), None);
        assert_eq!(doubt.take(2).as_ref(), Some(&ids[1]));
        assert_eq!(doubt.len(), 0);
    }
}
