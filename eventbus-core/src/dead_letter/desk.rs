//! What an operator does with the dead letters of a group.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::edit::{Edit, without};
use super::letter::{DeadLetter, DeadLetterStatus, Decision, DeskAction, DeskEntry};
use super::log::{Log, Page, Place, Room};
use super::record::{Entry, redrives};
use super::redrive::{DeskReport, Redrive};
use super::run::{Operator, Run};
use crate::bus::EventBus;
use crate::clock::Timestamp;
use crate::envelope::EventId;
use crate::error::{Error, ErrorKind, Result};
use crate::header::{self, KnownHeaders};
use crate::message::{Group, Key, Message, Topic};

/// The dead letters of one group; made by [`EventBus::dead_letters`].
///
/// Everything is on the dead-letter topics, letters and what was done with them, and every method
/// reads them from the beginning: memory is bounded, time grows with the queue.
///
/// Several operators may work at once. Who re-drives, edits or discards first writes a claim beside
/// each letter and reads back; the first claim in the log counts, others pass the letter by. A claim
/// ends after [`DEAD_LETTER_CLAIM_TIME`], so that a crash blocks nobody: the letter is open again then. An event
/// that was published before such a crash is published again, with the same id. So it is when an
/// operator's process stands still for longer than that between its last look and its publish, or
/// when operators' clocks differ by as much.
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
/// let report = desk.redrive(Redrive::one(letter.id.clone()).by("ann").because("it prints")).await?;
/// assert_eq!(report.done, 1);
/// for entry in desk.history(&letter.id).await? {
///     println!("{:?} by {}: {}", entry.action, entry.decision.by, entry.decision.because);
/// }
/// # billing.shutdown().await?;
/// # Ok::<(), eventbus_core::Error>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct DeadLetters {
    pub(super) bus: EventBus,
    group: Group,
    topics: Vec<Topic>,
    page: usize,
}

/// Most letters of a page.
pub const DEAD_LETTERS_MAX: usize = 10_000;
/// Most bytes that the letters of a page may have; one letter may exceed it, when it is alone.
pub const DEAD_LETTERS_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Most kinds of errors that are told apart; what is beyond is counted as one.
pub const ERROR_GROUPS_MAX: usize = 1_000;
/// How long a claim keeps other operators away when its holder has crashed.
pub const DEAD_LETTER_CLAIM_TIME: Duration = Duration::from_secs(60);

/// Most entries of a history: an event is not dealt with as often.
const HISTORY_MAX: usize = 1_000;

/// Letters with one error in common, as [`DeadLetters::by_error`] counts them.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ErrorGroup {
    /// What they have in common: see [`DeadLetter::fingerprint`].
    pub fingerprint: String,
    /// How many are open.
    pub count: u64,
    /// When the first of them failed for good.
    pub first_seen: Timestamp,
    /// When the last of them failed for good.
    pub last_seen: Timestamp,
    /// The error of one of them as it was.
    pub error: String,
    /// The id of that letter.
    pub example: EventId,
}

impl DeadLetters {
    pub(crate) fn new(bus: EventBus, group: Group, topics: Vec<Topic>) -> Self {
        Self {
            bus,
            group,
            topics,
            page: DEAD_LETTERS_MAX,
        }
    }

    /// Sets the most letters of a page, 1 to [`DEAD_LETTERS_MAX`].
    #[must_use]
    pub fn with_page(mut self, letters: usize) -> Self {
        self.page = letters.clamp(1, DEAD_LETTERS_MAX);
        self
    }

    /// The open letters of the first page: topic by topic and partition by partition, oldest first,
    /// at most [`DEAD_LETTERS_MAX`] and about [`DEAD_LETTERS_BYTES_MAX`].
    ///
    /// # Errors
    ///
    /// Those of reading a topic from its beginning.
    pub async fn list(&self) -> Result<Vec<DeadLetter>> {
        self.list_from(0, Place::default()).await
    }

    /// The open letters of the page behind `letter`, the last one of the page before; none at the
    /// end.
    ///
    /// # Errors
    ///
    /// As [`list`](Self::list); `InvalidInput` when the letter is from another topic.
    ///
    /// # Examples
    ///
    /// ```
    /// # async fn print_all(desk: eventbus_core::DeadLetters) -> eventbus_core::Result<()> {
    /// let mut page = desk.list().await?;
    /// while let Some(last) = page.last() {
    ///     page.iter().for_each(|letter| println!("{}: {}", letter.id, letter.error));
    ///     page = desk.list_after(last).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn list_after(&self, letter: &DeadLetter) -> Result<Vec<DeadLetter>> {
        let is_theirs = |topic: &Topic| *topic == letter.message.topic;
        let topic = self.topics.iter().position(is_theirs).ok_or_else(|| {
            self.refused("the letter is from none of the topics of this desk")
                .with("topic", &letter.message.topic)
        })?;
        self.list_from(topic, letter.place.next()).await
    }

    async fn list_from(&self, topic: usize, place: Place) -> Result<Vec<DeadLetter>> {
        let mut letters: Vec<DeadLetter> = Vec::new();
        let mut pages = self.pages(topic, place, |_| {});
        let mut room = self.room();
        while let Some((_, page)) = pages.next(room).await? {
            let bytes: usize = page.iter().map(DeadLetter::weight).sum();
            room.letters -= page.len();
            room.bytes = room.bytes.saturating_sub(bytes);
            letters.extend(page);
            if room.letters == 0 || room.bytes == 0 {
                break;
            }
        }
        Ok(letters)
    }

    /// One letter, whatever has become of it.
    ///
    /// # Errors
    ///
    /// `NotFound` when there is none with this id; `Codec` when parts of it are missing.
    pub async fn show(&self, id: &EventId) -> Result<DeadLetter> {
        for topic in &self.topics {
            let log = Log::new(&self.bus, &self.group, topic)?;
            let mut found: Option<DeadLetter> = None;
            log.read(|place, entry_id, entry| {
                if entry_id != *id {
                    return;
                }
                match (entry, &mut found) {
                    (Entry::Letter(_), Some(letter)) if letter.standing.is_open() => {}
                    (Entry::Letter(letter), found) => {
                        found.insert(*letter).place = place;
                    }
                    (Entry::Note(note), Some(letter)) => letter.noted(note),
                    (Entry::Note(_), None) | (Entry::Part(..), _) => {}
                }
            })
            .await?;
            let Some(letter) = found else { continue };
            let whole = log.complete(vec![letter]).await?.pop();
            let letter = whole.ok_or_else(|| {
                Error::new(
                    ErrorKind::Codec,
                    "show dead letter",
                    "parts of its bytes are missing: look at the retention of the dead-letter topic",
                )
                .with("id", id)
            })?;
            return Ok(letter.with_claim_at(self.now()));
        }
        Err(self.unknown(id))
    }

    /// The latest letters of a key, whatever has become of them, oldest first in each topic.
    pub(crate) async fn of_key(&self, key: &Key, latest: usize) -> Result<Vec<DeadLetter>> {
        let mut all = Vec::new();
        for topic in &self.topics {
            let log = Log::new(&self.bus, &self.group, topic)?;
            let mut letters: VecDeque<DeadLetter> = VecDeque::new();
            log.read(|_, id, entry| {
                let known = letters.iter_mut().find(|letter| letter.id == id);
                match (entry, known) {
                    (Entry::Letter(letter), Some(known)) if !known.standing.is_open() => {
                        *known = *letter;
                    }
                    // The key of one that is stored in parts is among them.
                    (Entry::Letter(letter), None)
                        if letter.whole.is_some() || letter.message.key.as_ref() == Some(key) =>
                    {
                        letters.push_back(*letter);
                    }
                    (Entry::Note(note), Some(known)) => known.noted(note),
                    _ => {}
                }
                if letters.len() > latest {
                    letters.pop_front();
                }
            })
            .await?;
            let mut letters = log.complete(letters.into()).await?;
            letters.retain(|letter| letter.message.key.as_ref() == Some(key));
            let now = self.now();
            all.extend(letters.into_iter().map(|letter| letter.with_claim_at(now)));
        }
        Ok(all)
    }

    /// Everything that happened to a letter, in the order of the log: when it was stored, who
    /// claimed it, who did what, when and why.
    ///
    /// # Errors
    ///
    /// `NotFound` when there is none with this id.
    pub async fn history(&self, id: &EventId) -> Result<Vec<DeskEntry>> {
        let mut history = VecDeque::new();
        for topic in &self.topics {
            let log = Log::new(&self.bus, &self.group, topic)?;
            log.read(|_, entry_id, entry| {
                if entry_id != *id {
                    return;
                }
                history.extend(history_entry(entry));
                if history.len() > HISTORY_MAX {
                    history.pop_front();
                }
            })
            .await?;
        }
        match history.is_empty() {
            true => Err(self.unknown(id)),
            false => Ok(history.into()),
        }
    }

    /// How often each error stands behind an open letter, the most frequent first; at most
    /// [`ERROR_GROUPS_MAX`], and one for all others.
    ///
    /// # Errors
    ///
    /// As [`list`](Self::list).
    pub async fn by_error(&self) -> Result<Vec<ErrorGroup>> {
        let mut groups: BTreeMap<String, ErrorGroup> = BTreeMap::new();
        // Only what is known about the letters is kept, so that a page holds more of them.
        let mut pages = self.pages(0, Place::default(), |letter| {
            letter.whole = None;
            letter.message = Message::new(letter.message.topic.clone(), Vec::new());
        });
        let room = Room {
            letters: usize::MAX,
            ..self.room()
        };
        while let Some((_, page)) = pages.next(room).await? {
            for letter in page {
                count(&mut groups, letter);
            }
        }
        let mut groups: Vec<_> = groups.into_values().collect();
        groups.sort_by_key(|group| std::cmp::Reverse(group.count));
        Ok(groups)
    }

    /// Gives letters to their group again, and to no other: each event keeps its id and key, its
    /// attempts start anew. It comes behind what was published of its key meanwhile; where that is
    /// not right, consume with [`OnPoison::BlockKey`](crate::OnPoison::BlockKey).
    ///
    /// # Cancellation
    ///
    /// As a crash: what is claimed and not dealt with is open again after [`DEAD_LETTER_CLAIM_TIME`].
    ///
    /// # Errors
    ///
    /// Those of reading and publishing; letters before the failing one are re-driven.
    pub async fn redrive(&self, redrive: Redrive) -> Result<DeskReport> {
        Run::new(self, &redrive, DeskAction::Redriven)
            .finish()
            .await
    }

    /// Puts letters aside for good: they stay readable but are open no more.
    ///
    /// # Cancellation
    ///
    /// As for [`redrive`](Self::redrive).
    ///
    /// # Errors
    ///
    /// Those of reading and publishing; letters before the failing one are discarded.
    pub async fn discard(&self, discard: Redrive) -> Result<DeskReport> {
        Run::new(self, &discard, DeskAction::Discarded)
            .finish()
            .await
    }

    /// Gives a changed event to the group in place of the letter's, and to no other group. It is
    /// another event with an id of its own, caused by the old one; the header
    /// [`EDITED_FROM`](header::EDITED_FROM) names the letter. Returns its id.
    ///
    /// # Errors
    ///
    /// `NotFound` when there is no such letter; `Conflict` when another operator has claimed it or
    /// dealt with it; `Codec` when new data are given for an event that can't be read; and those of
    /// publishing.
    pub async fn edit(&self, id: &EventId, edit: Edit) -> Result<EventId> {
        let letter = self.show(id).await?;
        if letter.status != DeadLetterStatus::Open {
            return Err(self.conflict(&letter));
        }
        let old = self.event_id(&letter);
        let (new_id, message) = edit.apply(&self.bus, &letter, &old)?;
        let message = self.directed(&letter, message)?;
        if let Some(expiry) = self.expired(&message) {
            return Err(self
                .refused("the edited event has expired: set another expiry with `.header(…)`, or take it away with `.without_header(…)`")
                .with(header::EXPIRES_AT, expiry));
        }
        message.check(self.bus.capabilities().message_bytes_max)?;
        let operator = Operator::new(self, &edit.by, &edit.because);
        let log = Log::new(&self.bus, &self.group, &letter.message.topic)?;
        let won = operator.claim(&log, vec![letter]).await?;
        let Some(letter) = won.into_iter().next() else {
            return Err(self.conflict(&self.show(id).await?));
        };
        self.bus.send(vec![message]).await?;
        let action = DeskAction::Edited {
            new_id: new_id.clone(),
        };
        operator.note(action, std::slice::from_ref(&letter)).await?;
        Ok(new_id)
    }

    pub(super) fn room(&self) -> Room {
        Room {
            letters: self.page,
            bytes: DEAD_LETTERS_BYTES_MAX,
        }
    }

    pub(super) fn pages(&self, topic: usize, from: Place, keep: fn(&mut DeadLetter)) -> Pages<'_> {
        Pages {
            desk: self,
            topic,
            from: Some(from),
            keep,
        }
    }

    pub(super) fn now(&self) -> Timestamp {
        self.bus.clock().now()
    }

    /// The id that its handler knows the event by: one made from its place would change with it.
    fn event_id(&self, letter: &DeadLetter) -> EventId {
        let place = || match letter.position {
            Some(position) => {
                EventId::of_place(&letter.message.topic, letter.partition, position.0)
            }
            None => EventId::derived(&letter.id, &letter.group, "event", None, 0),
        };
        let formats = self.bus.formats();
        formats.id_of(&letter.message, place, self.now())
    }

    /// The event of a letter, directed to the letter's group alone.
    pub(super) fn redriven(&self, letter: &DeadLetter) -> Result<Message> {
        let headers = without(&letter.message.headers, &[header::ID])?
            .push(header::ID, self.event_id(letter).to_string())?
            .build();
        self.directed(letter, letter.message.clone().with_headers(headers))
    }

    fn directed(&self, letter: &DeadLetter, message: Message) -> Result<Message> {
        // A foreign header may say as many as there can be.
        let count = redrives(&letter.message.headers).saturating_add(1);
        let headers = without(&message.headers, &[header::TO_GROUP, header::REDRIVES])?
            .push(header::TO_GROUP, letter.group.as_str())?
            .push(header::REDRIVES, count.to_string())?
            .build();
        Ok(message.with_headers(headers))
    }

    /// The expiry of an event that its consumer would pass over.
    pub(super) fn expired(&self, message: &Message) -> Option<Timestamp> {
        let expiry = KnownHeaders::of(&message.headers).expires_at()?.parse();
        expiry.ok().filter(|expiry| *expiry <= self.now())
    }

    fn refused(&self, message: &str) -> Error {
        Error::new(ErrorKind::InvalidInput, "deal with dead letter", message)
            .with("group", &self.group)
    }

    fn conflict(&self, letter: &DeadLetter) -> Error {
        Error::new(
            ErrorKind::Conflict,
            "deal with dead letter",
            "it is not open, somebody else deals or has dealt with it: `show` says who",
        )
        .with("group", &self.group)
        .with("id", &letter.id)
        .with("status", format_args!("{:?}", letter.status))
    }

    fn unknown(&self, id: &EventId) -> Error {
        Error::new(
            ErrorKind::NotFound,
            "show dead letter",
            "there is no such letter: `list` shows the open ones",
        )
        .with("group", &self.group)
        .with("id", id)
    }
}

fn history_entry(entry: Entry) -> Option<DeskEntry> {
    match entry {
        Entry::Part(..) => None,
        Entry::Note(note) => Some(DeskEntry {
            action: note.action,
            decision: note.decision,
        }),
        Entry::Letter(letter) => Some(DeskEntry {
            action: DeskAction::Stored,
            decision: Decision {
                by: letter.group.to_string(),
                because: letter.error,
                at: letter.failed_at,
            },
        }),
    }
}

fn count(groups: &mut BTreeMap<String, ErrorGroup>, letter: DeadLetter) {
    let mut fingerprint = letter.fingerprint();
    if groups.len() >= ERROR_GROUPS_MAX && !groups.contains_key(&fingerprint) {
        fingerprint = "other errors".to_owned();
    }
    let group = groups
        .entry(fingerprint)
        .or_insert_with_key(|fingerprint| ErrorGroup {
            fingerprint: fingerprint.clone(),
            count: 0,
            first_seen: letter.failed_at,
            last_seen: letter.failed_at,
            error: letter.error,
            example: letter.id,
        });
    group.count += 1;
    group.first_seen = group.first_seen.min(letter.failed_at);
    group.last_seen = group.last_seen.max(letter.failed_at);
}

/// Goes through the open letters of a desk, topic by topic and page by page.
pub(super) struct Pages<'d> {
    desk: &'d DeadLetters,
    topic: usize,
    /// Where the next page of this topic begins; nowhere when there is none.
    from: Option<Place>,
    keep: fn(&mut DeadLetter),
}

impl<'d> Pages<'d> {
    /// The next page that holds any letters, with the log it is from; `None` at the end.
    pub(super) async fn next(&mut self, room: Room) -> Result<Option<(Log<'d>, Vec<DeadLetter>)>> {
        let desk = self.desk;
        loop {
            let Some(topic) = desk.topics.get(self.topic) else {
                return Ok(None);
            };
            let Some(from) = self.from else {
                self.topic += 1;
                self.from = Some(Place::default());
                continue;
            };
            let mut log = Log::new(&desk.bus, &desk.group, topic)?;
            let Page { letters, next } = log.page(from, room, self.keep).await?;
            self.from = next;
            if letters.is_empty() {
                continue;
            }
            let now = desk.now();
            let claimed = |letter: DeadLetter| letter.with_claim_at(now);
            return Ok(Some((log, letters.into_iter().map(claimed).collect())));
        }
    }
}
