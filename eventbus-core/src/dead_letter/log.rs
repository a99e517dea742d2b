//! Reads one topic of dead letters: pages of what is open, and on from where it was read last.

use std::collections::{BTreeMap, HashMap};

use super::letter::DeadLetter;
use super::parts::Parts;
use super::record::{Entry, Note, entry};
use super::standing::Standing;
use super::topic_of;
use crate::bus::EventBus;
use crate::delivery::{Position, Start, Until};
use crate::envelope::EventId;
use crate::error::Result;
use crate::message::{Group, Topic};

/// Where a record stands on its topic: letters are listed in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    partition: u32,
    /// The position; its number where the broker has none.
    at: u128,
}

impl Place {
    /// The first place behind this one.
    pub(super) fn next(self) -> Self {
        Self {
            at: self.at.saturating_add(1),
            ..self
        }
    }
}

/// How much a page may hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub(super) letters: usize,
    pub(super) bytes: usize,
}

/// Letters that are open, and where the next page begins; nowhere when they are the last.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) letters: Vec<DeadLetter>,
    pub(super) next: Option<Place>,
}

/// The dead letters of one group from one topic.
#[derive(Debug)]
pub(super) struct Log<'d> {
    bus: &'d EventBus,
    group: &'d Group,
    topic: Topic,
    /// The last record that the page took into account, where reading on from it passes over nothing.
    seen: Option<Position>,
}

impl<'d> Log<'d> {
    pub(super) fn new(bus: &'d EventBus, group: &'d Group, topic: &Topic) -> Result<Self> {
        Ok(Self {
            bus,
            group,
            topic: topic_of(topic, group)?,
            seen: None,
        })
    }

    /// Visits every record from the oldest to the newest. Returns where to read on, if that can be
    /// said.
    pub(super) async fn read(
        &self,
        visit: impl FnMut(Place, EventId, Entry) + Send,
    ) -> Result<Option<Position>> {
        self.read_from(Start::Earliest, visit).await
    }

    async fn read_from(
        &self,
        start: Start,
        mut visit: impl FnMut(Place, EventId, Entry) + Send,
    ) -> Result<Option<Position>> {
        let topics = vec![self.topic.clone()];
        let mut reader = self
            .bus
            .read_physical(topics, start, Some(Until::Now))
            .await?;
        let mut numbers: HashMap<u32, u128> = HashMap::new();
        let mut seen = None;
        while let Some(record) = reader.next().await? {
            let number = numbers.entry(record.partition).or_default();
            *number += 1;
            // Positions of several partitions say nothing of each other.
            seen = record.position.filter(|_| reader.partitions() == 1);
            let place = Place {
                partition: record.partition,
                at: record.position.map_or(*number, |position| position.0),
            };
            match entry(self.group, &record.message) {
                Ok(Some((id, entry))) => visit(place, id, entry),
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
        Ok(seen)
    }

    /// The open letters from a place on, as many as there is room for, each as `keep` leaves it.
    pub(super) async fn page(
        &mut self,
        from: Place,
        room: Room,
        keep: fn(&mut DeadLetter),
    ) -> Result<Page> {
        let mut window = Window::new(from, room, keep);
        self.seen = self
            .read(|place, id, entry| window.visit(place, id, entry))
            .await?;
        let Window { letters, cut, .. } = window;
        Ok(Page {
            letters: self.complete(letters.into_values().collect()).await?,
            next: cut,
        })
    }

    /// What the log says now of letters that a page of it gave.
    pub(super) async fn standings(
        &self,
        letters: &[DeadLetter],
    ) -> Result<HashMap<EventId, Standing>> {
        let (start, known) = match self.seen {
            Some(position) => (Start::Position(position), true),
            None => (Start::Earliest, false),
        };
        let standing = |letter: &DeadLetter| match known {
            true => letter.standing.clone(),
            false => Standing::default(),
        };
        let mut standings: HashMap<_, _> = letters
            .iter()
            .map(|letter| (letter.id.clone(), standing(letter)))
            .collect();
        self.read_from(start, |_, id, entry| {
            let Some(standing) = standings.get_mut(&id) else {
                return;
            };
            match entry {
                Entry::Letter(_) => standing.stored(),
                Entry::Note(note) => standing.noted(&note),
                Entry::Part(..) => {}
            }
        })
        .await?;
        Ok(standings)
    }

    /// Gives letters that were stored in parts their bytes; one whose parts are missing is left out.
    pub(super) async fn complete(&self, mut letters: Vec<DeadLetter>) -> Result<Vec<DeadLetter>> {
        let mut parts: HashMap<EventId, Parts> = letters
            .iter()
            .filter(|letter| letter.whole.is_some())
            .map(|letter| (letter.id.clone(), Parts::default()))
            .collect();
        if parts.is_empty() {
            return Ok(letters);
        }
        self.read(|_, id, entry| {
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
}

/// The first open letters from a place on. Whatever is read, it holds no more than there is room for.
#[derive(Debug)]
struct Window {
    from: Place,
    room: Room,
    keep: fn(&mut DeadLetter),
    letters: BTreeMap<Place, DeadLetter>,
    places: HashMap<EventId, Place>,
    bytes: usize,
    /// The first place that was given up for want of room: everything before it is here.
    cut: Option<Place>,
}

impl Window {
    fn new(from: Place, room: Room, keep: fn(&mut DeadLetter)) -> Self {
        Self {
            from,
            room,
            keep,
            letters: BTreeMap::new(),
            places: HashMap::new(),
            bytes: 0,
            cut: None,
        }
    }

    fn visit(&mut self, place: Place, id: EventId, entry: Entry) {
        match entry {
            Entry::Letter(letter) => self.add(place, *letter),
            Entry::Note(note) => self.note(&id, note),
            Entry::Part(..) => {}
        }
    }

    fn add(&mut self, place: Place, mut letter: DeadLetter) {
        let is_behind = self.cut.is_some_and(|cut| place >= cut);
        if place < self.from || is_behind || self.places.contains_key(&letter.id) {
            return;
        }
        (self.keep)(&mut letter);
        letter.place = place;
        self.bytes += letter.weight();
        self.places.insert(letter.id.clone(), place);
        self.letters.insert(place, letter);
        // One letter is held whatever its size: otherwise nobody would ever see it.
        while self.letters.len() > self.room.letters.max(1)
            || (self.bytes > self.room.bytes && self.letters.len() > 1)
        {
            let Some((place, letter)) = self.letters.pop_last() else {
                break;
            };
            self.forget(&letter);
            self.cut = Some(place);
        }
    }

    fn note(&mut self, id: &EventId, note: Note) {
        let Some(place) = self.places.get(id).copied() else {
            return;
        };
        let Some(letter) = self.letters.get_mut(&place) else {
            return;
        };
        letter.noted(note);
        if !letter.standing.is_open()
            && let Some(letter) = self.letters.remove(&place)
        {
            self.forget(&letter);
        }
    }

    fn forget(&mut self, letter: &DeadLetter) {
        self.places.remove(&letter.id);
        self.bytes -= letter.weight();
    }
}
