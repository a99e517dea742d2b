//! What an operator does with the dead letters of a group.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

use super::letter::{DeadLetter, DeadLetterStatus};
use super::parts::Parts;
use super::record::{AT, BECAUSE, BY, DISCARDED, Entry, LETTER, REDRIVEN, STATUS, entry, redrives};
use super::topic_of;
use crate::bus::EventBus;
use crate::delivery::{Start, Until};
use crate::envelope::EventId;
use crate::error::{Error, ErrorKind, Result};
use crate::header;
use crate::message::{Group, Headers, Message, Topic};

/// Which dead letters to re-drive or discard, how fast, and on whose behalf.
///
/// # Examples
///
/// ```
/// use eventbus_core::Redrive;
///
/// let redrive = Redrive::matching(|letter| letter.error.contains("PSP"))
///     .by("ann")
///     .because("the PSP is back")
///     .rate(50);
/// ```
#[must_use]
pub struct Redrive {
    choose: Box<dyn Fn(&DeadLetter) -> bool + Send + Sync>,
    by: String,
    because: String,
    rate: Option<u32>,
}

impl Redrive {
    /// All open letters.
    pub fn all() -> Self {
        Self::matching(|_| true)
    }

    /// The open letter with this id.
    pub fn one(id: EventId) -> Self {
        Self::matching(move |letter| letter.id == id)
    }

    /// The open letters that `choose` picks.
    pub fn matching(choose: impl Fn(&DeadLetter) -> bool + Send + Sync + 'static) -> Self {
        Self {
            choose: Box::new(choose),
            by: "unknown".to_owned(),
            because: String::new(),
            rate: None,
        }
    }

    /// Records who decided.
    pub fn by(mut self, who: impl Into<String>) -> Self {
        self.by = who.into();
        self
    }

    /// Records why.
    pub fn because(mut self, reason: impl Into<String>) -> Self {
        self.because = reason.into();
        self
    }

    /// Re-drives at most so many a second.
    pub fn rate(mut self, per_second: u32) -> Self {
        self.rate = Some(per_second.max(1));
        self
    }
}

impl fmt::Debug for Redrive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redrive")
            .field("by", &self.by)
            .field("because", &self.because)
            .field("rate", &self.rate)
            .finish_non_exhaustive()
    }
}

/// The dead letters of one group; made by [`EventBus::dead_letters`].
///
/// # Examples
///
/// ```
/// # use eventbus_macros::Event;
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(crate = "eventbus_core", type = "OrderCreated", topic = "order-events", key = "order_id")]
/// # struct OrderCreated { order_id: u64 }
/// use eventbus_core::{Context, EventBus, MemoryBroker, Redrive, RetryPolicy};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let bus = EventBus::new(MemoryBroker::new());
/// let billing = bus
///     .consumer("billing")
///     .on(async |_: OrderCreated, _: Context| Err("no printer".into()))
///     .retry(RetryPolicy::none())
///     .spawn()
///     .await?;
/// bus.publish(OrderCreated { order_id: 42 }).await?;
///
/// let desk = billing.dead_letters();
/// while desk.list().await?.is_empty() {
///     tokio::task::yield_now().await;
/// }
/// let letter = desk.list().await?.remove(0);
/// assert_eq!((letter.cause.as_str(), letter.error.as_str()), ("error", "no printer"));
/// assert_eq!(desk.redrive(Redrive::one(letter.id).by("ann").because("it prints")).await?, 1);
/// # billing.shutdown().await?;
/// # Ok::<(), eventbus_core::Error>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct DeadLetters {
    bus: EventBus,
    group: Group,
    topics: Vec<Topic>,
}

/// Most letters that one call returns or re-drives; call again for more.
pub const DEAD_LETTERS_MAX: usize = 10_000;

impl DeadLetters {
    pub(crate) fn new(bus: EventBus, group: Group, topics: Vec<Topic>) -> Self {
        Self { bus, group, topics }
    }

    /// The open letters, oldest first, at most [`DEAD_LETTERS_MAX`].
    ///
    /// # Errors
    ///
    /// Those of reading a topic from its beginning.
    pub async fn list(&self) -> Result<Vec<DeadLetter>> {
        let mut letters: BTreeMap<usize, DeadLetter> = BTreeMap::new();
        let mut places = HashMap::new();
        let mut count = 0;
        self.read(|id, entry| match entry {
            // A letter stored twice after an unknown outcome is one letter; one that is stored
            // after a decision is open again, because its event has failed again.
            Entry::Letter(letter) => {
                places.entry(id).or_insert_with(|| {
                    count += 1;
                    letters.insert(count, *letter);
                    count
                });
            }
            Entry::Decided(_) => {
                if let Some(place) = places.remove(&id) {
                    letters.remove(&place);
                }
            }
            Entry::Part(..) => {}
        })
        .await?;
        let letters = letters.into_values().take(DEAD_LETTERS_MAX).collect();
        self.complete(letters).await
    }

    /// One letter, whatever has become of it.
    ///
    /// # Errors
    ///
    /// `NotFound` when there is none with this id.
    pub async fn show(&self, id: &EventId) -> Result<DeadLetter> {
        let mut found: Option<DeadLetter> = None;
        self.read(|entry_id, entry| match (entry, &mut found) {
            _ if entry_id != *id => {}
            (Entry::Letter(_), Some(open)) if open.status == DeadLetterStatus::Open => {}
            (Entry::Letter(letter), found) => *found = Some(*letter),
            (Entry::Decided(status), Some(letter)) => letter.status = status,
            (Entry::Decided(_), None) | (Entry::Part(..), _) => {}
        })
        .await?;
        let found = self.complete(found.into_iter().collect()).await?;
        found.into_iter().next().ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                "show dead letter",
                "there is no such letter: `list` shows the open ones",
            )
            .with("group", &self.group)
            .with("id", id)
        })
    }

    /// Gives letters to their group again, and to no other: each event keeps its id and key, its
    /// attempts start anew. It comes behind what was published of its key meanwhile; where that is
    /// not right, consume with [`OnPoison::BlockKey`](crate::OnPoison::BlockKey). Returns how many.
    ///
    /// A letter counts as re-driven once the event is on the broker; after a crash in between it
    /// is still open, and re-driving it again publishes the same event id again.
    ///
    /// # Errors
    ///
    /// Those of reading and publishing; letters before the failing one are re-driven.
    pub async fn redrive(&self, redrive: Redrive) -> Result<usize> {
        let begun = Instant::now();
        let mut count = 0u32;
        for letter in self.chosen(&redrive).await? {
            if let Some(rate) = redrive.rate {
                tokio::time::sleep_until(begun + Duration::from_secs(1) * count / rate).await;
            }
            let event = self.redriven(&letter)?;
            self.bus.send(vec![event]).await.map_err(Error::from)?;
            self.decide(&letter, REDRIVEN, &redrive).await?;
            count += 1;
        }
        Ok(count as usize)
    }

    /// Puts letters aside for good: they stay readable but are open no more. Returns how many.
    ///
    /// # Errors
    ///
    /// Those of reading and publishing; letters before the failing one are discarded.
    pub async fn discard(&self, discard: Redrive) -> Result<usize> {
        let chosen = self.chosen(&discard).await?;
        for letter in &chosen {
            self.decide(letter, DISCARDED, &discard).await?;
        }
        Ok(chosen.len())
    }

    /// Gives letters that were stored in parts their bytes; one whose parts are missing is left out.
    async fn complete(&self, mut letters: Vec<DeadLetter>) -> Result<Vec<DeadLetter>> {
        let mut parts: HashMap<EventId, Parts> = letters
            .iter()
            .filter(|letter| letter.whole.is_some())
            .map(|letter| (letter.id.clone(), Parts::default()))
            .collect();
        if parts.is_empty() {
            return Ok(letters);
        }
        self.read(|id, entry| {
            if let Entry::Part(offset, bytes) = entry
                && let Some(parts) = parts.get_mut(&id)
            {
                parts.add(offset, bytes);
            }
        })
        .await?;
        letters.retain_mut(|letter| {
            let Some(parts) = parts.remove(&letter.id) else {
                return true;
            };
            let completed = parts.complete(letter);
            if let Err(error) = &completed {
                tracing::error!(%error, "a dead letter is left out");
            }
            completed.is_ok()
        });
        Ok(letters)
    }

    async fn chosen(&self, redrive: &Redrive) -> Result<Vec<DeadLetter>> {
        let mut letters = self.list().await?;
        letters.retain(|letter| (redrive.choose)(letter));
        Ok(letters)
    }

    /// Records a decision beside the letter.
    async fn decide(&self, letter: &DeadLetter, status: &str, decision: &Redrive) -> Result<()> {
        let headers = Headers::builder()
            .push(LETTER, letter.id.to_string())?
            .push(STATUS, status)?
            .push(BY, &decision.by)?
            .push(BECAUSE, &decision.because)?
            .push(AT, self.bus.clock().now().to_string())?
            .build();
        let mut record = Message::new(topic_of(&letter.message.topic, &self.group)?, Vec::new())
            .with_headers(headers);
        record.key = Some(letter.record_key());
        self.bus.send(vec![record]).await.map_err(Error::from)
    }

    /// The event of a letter, directed to the letter's group alone.
    fn redriven(&self, letter: &DeadLetter) -> Result<Message> {
        let message = &letter.message;
        let count = redrives(&message.headers) + 1;
        let mut headers = Headers::builder().unlimited();
        for (name, value) in message.headers.iter() {
            if ![header::ID, header::TO_GROUP, header::REDRIVES].contains(&name) {
                headers = headers.push(name, value)?;
            }
        }
        // The id that its handler knows it by: one made from its place would change with the place.
        let place = || match letter.position {
            Some(position) => EventId::of_place(&message.topic, letter.partition, position.0),
            None => EventId::new(),
        };
        let now = self.bus.clock().now();
        let id = self.bus.formats().id_of(message, place, now);
        let headers = headers
            .push(header::ID, id.to_string())?
            .push(header::TO_GROUP, letter.group.as_str())?
            .push(header::REDRIVES, count.to_string())?
            .build();
        Ok(message.clone().with_headers(headers))
    }

    /// Reads all letters and what was decided about them, from the oldest to the newest.
    async fn read(&self, mut visit: impl FnMut(EventId, Entry) + Send) -> Result<()> {
        let topics = self
            .topics
            .iter()
            .map(|topic| topic_of(topic, &self.group))
            .collect::<Result<Vec<_>>>()?;
        let mut reader = self
            .bus
            .read_physical(topics, Start::Earliest, Some(Until::Now))
            .await?;
        while let Some(record) = reader.next().await? {
            match entry(&self.group, &record.message) {
                Ok(Some((id, entry))) => visit(id, entry),
                Ok(None) => {}
                Err(error) => tracing::warn!(
                    topic = record.message.topic.as_str(),
                    partition = record.partition,
                    position = record.position.map(tracing::field::display),
                    %error,
                    "a record among dead letters can't be read"
                ),
            }
        }
        Ok(())
    }
}
