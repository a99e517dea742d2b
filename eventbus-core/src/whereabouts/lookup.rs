//! How the events of a key are looked for: groups first, then one bounded read, then
//! what waits for its time, what is held, then dead letters.

use std::collections::{HashMap, VecDeque};
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;

use super::report::{EventPlace, GroupProgress, HeldFor, Progress, Unknown, Whereabouts};
use crate::broker::{AdminRequest, GroupPosition};
use crate::bus::EventBus;
use crate::dead_letter::{DeadLetter, DeadLetters, topic_of};
use crate::delivery::{Position, Start, Until};
use crate::envelope::EventId;
use crate::error::{ErrorKind, Result};
use crate::header::KnownHeaders;
use crate::held_keys::HeldKeys;
use crate::message::{Group, Key, Topic};
use crate::reader::Record;

/// A question for the events of a key; made by [`EventBus::whereabouts`] and asked by `.await`.
#[derive(Clone, Debug)]
#[must_use = "nothing is asked until it is awaited"]
pub struct Lookup {
    bus: EventBus,
    topic: Topic,
    key: Key,
    start: Start,
    latest: usize,
    read_max: u64,
    groups: Vec<String>,
}

impl Lookup {
    pub(crate) fn new(bus: EventBus, topic: Topic, key: Key) -> Self {
        Self {
            bus,
            topic,
            key,
            start: Start::Earliest,
            latest: 100,
            read_max: 10_000_000,
            groups: Vec::new(),
        }
    }

    /// Looks from here on; by default at everything the broker has kept. A key says nothing about
    /// where its events stand, so what is before them is read, too: begin late on a large topic.
    pub fn since(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Shows this many events and dead letters, the latest; by default 100.
    pub fn latest(mut self, count: usize) -> Self {
        self.latest = count;
        self
    }

    /// Reads at most so many messages of the topic; by default ten millions. What is left unread is
    /// named in [`Whereabouts::unknown`].
    pub fn read_max(mut self, messages: u64) -> Self {
        self.read_max = messages;
        self
    }

    /// Asks for what is held for this group and for its dead letters, too: for brokers that do not
    /// know their groups.
    pub fn group(mut self, name: impl Into<String>) -> Self {
        self.groups.push(name.into());
        self
    }

    async fn ask(self) -> Result<Whereabouts> {
        let topic = self.bus.topic(&self.topic)?;
        // A misspelt topic is an error here; reading would create it on some brokers.
        let known = AdminRequest::DescribeTopics(vec![topic.clone()]);
        self.bus.broker().admin(known).await?;
        let mut found = Whereabouts {
            topic,
            key: self.key.clone(),
            events: Vec::new(),
            earlier: 0,
            held: Vec::new(),
            scheduled: Vec::new(),
            dead_letters: Vec::new(),
            unknown: Vec::new(),
        };
        let positions = self.positions(&mut found).await?;
        self.read_events(&mut found, &positions).await?;
        if self.bus.schedule().is_some() {
            let scheduled = self.bus.scheduled()?;
            found.scheduled = scheduled.of_key(&self.topic, &self.key).await?;
        }
        for group in self.groups(&mut found, &positions)? {
            self.find_held(&mut found, &group).await?;
            let letters = self.letters_of(&found.topic, group).await;
            if let Some(letters) = found.or_unknown("dead letters", letters)? {
                found.dead_letters.extend(letters);
            }
        }
        Ok(found)
    }

    async fn positions(&self, found: &mut Whereabouts) -> Result<Vec<GroupPosition>> {
        let positions = self.bus.lags(std::slice::from_ref(&self.topic)).await;
        let positions = found.or_unknown("groups", positions)?;
        Ok(positions.unwrap_or_default())
    }

    async fn read_events(
        &self,
        found: &mut Whereabouts,
        positions: &[GroupPosition],
    ) -> Result<()> {
        let topics = vec![found.topic.clone()];
        let reader = self.bus.read_physical(topics, self.start, Some(Until::Now));
        let Some(mut reader) = found.or_unknown("events", reader.await)? else {
            return Ok(());
        };
        let mut trail = Trail::new(self.start, positions);
        let mut events = VecDeque::new();
        let mut read = 0;
        while let Some(record) = reader.next().await? {
            read += 1;
            if read > self.read_max {
                found.unknown.push(Unknown {
                    what: "events",
                    reason: format!(
                        "{} messages were read and more are there: begin later with `since`, or read more with `read_max`",
                        self.read_max
                    ),
                });
                break;
            }
            trail.pass(&record);
            if record.message.key.as_ref() == Some(&self.key) {
                events.push_back(self.place(&record, &trail));
            }
            if events.len() > self.latest {
                events.pop_front();
                found.earlier += 1;
            }
        }
        found.events = events.into();
        Ok(())
    }

    fn place(&self, record: &Record, trail: &Trail<'_>) -> EventPlace {
        let message = &record.message;
        let fallback = match record.position {
            Some(position) => EventId::of_place(&message.topic, record.partition, position.0),
            None => EventId::new(),
        };
        let now = self.bus.clock().now();
        let formats = self.bus.formats();
        let known = KnownHeaders::of(&message.headers);
        EventPlace {
            id: formats.id_of(message, || fallback.clone(), now),
            envelope: formats.envelope(message, (fallback.clone(), now)).ok(),
            partition: record.partition,
            position: record.position,
            to_group: known.to_group().and_then(|name| Group::new(name).ok()),
            groups: trail.progress(record),
        }
    }

    /// The groups that are asked for, and those that the broker knows.
    fn groups(&self, found: &mut Whereabouts, positions: &[GroupPosition]) -> Result<Vec<Group>> {
        let named = self.groups.iter().map(|name| Group::new(name));
        let mut groups = named.collect::<Result<Vec<_>>>()?;
        groups.extend(positions.iter().map(|position| position.group.clone()));
        groups.sort();
        groups.dedup();
        let groups_are_unknown = found.unknown.iter().any(|it| it.what == "groups");
        if groups.is_empty() && groups_are_unknown {
            found.unknown.push(Unknown {
                what: "held keys and dead letters",
                reason: "the broker does not know its groups: name them with `group`".to_owned(),
            });
        }
        Ok(groups)
    }

    /// Finds out whether the key is held for a group: then its messages are settled on the broker,
    /// and wait elsewhere.
    async fn find_held(&self, found: &mut Whereabouts, group: &Group) -> Result<()> {
        let Some(store) = self.bus.key_state() else {
            return Ok(());
        };
        let desk = HeldKeys::new(self.bus.clone(), Arc::clone(store), group.clone());
        let Some(report) = desk.find(&self.topic, &self.key).await? else {
            return Ok(());
        };
        let messages = desk.messages(&report.held).await?;
        for (before, message) in (0..).zip(&messages) {
            let until = report.wait.until;
            let progress = Progress::Held { before, until };
            let place = (report.held.place.partition, message.position);
            found.set_progress(group, place, progress);
        }
        found.held.push(HeldFor {
            group: group.clone(),
            report,
        });
        Ok(())
    }

    /// The latest letters of the key that one group left.
    async fn letters_of(&self, topic: &Topic, group: Group) -> Result<Vec<DeadLetter>> {
        // Too long together: a consumer of that group would have been refused.
        let Ok(desk_topic) = topic_of(topic, &group) else {
            return Ok(Vec::new());
        };
        let known = AdminRequest::DescribeTopics(vec![desk_topic]);
        match self.bus.broker().admin(known).await {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            answer => answer?,
        };
        let desk = DeadLetters::new(self.bus.clone(), group, vec![topic.clone()]);
        desk.of_key(&self.key, self.latest).await
    }
}

impl IntoFuture for Lookup {
    type Output = Result<Whereabouts>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    /// Asks.
    ///
    /// # Errors
    ///
    /// Those of the broker, and `NotFound` for a missing topic. What the broker does not support
    /// is no error: it stands in [`Whereabouts::unknown`].
    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.ask())
    }
}

impl Whereabouts {
    /// Corrects how far a group is with the event at a place, where the broker has positions.
    fn set_progress(
        &mut self,
        group: &Group,
        (partition, position): (u32, Option<Position>),
        progress: Progress,
    ) {
        let is_there = |event: &&mut EventPlace| {
            position.is_some() && event.partition == partition && event.position == position
        };
        let Some(event) = self.events.iter_mut().find(is_there) else {
            return;
        };
        if let Some(found) = event.groups.iter_mut().find(|it| it.group == *group) {
            found.progress = progress;
        }
    }

    /// Notes what the broker does not support and goes on without it.
    fn or_unknown<T>(&mut self, what: &'static str, answer: Result<T>) -> Result<Option<T>> {
        match answer {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                let reason = error.to_string();
                self.unknown.push(Unknown { what, reason });
                Ok(None)
            }
            answer => answer.map(Some),
        }
    }
}

/// Counts what is read, so that it can be said how much stands between a group and an event.
/// Positions tell only an order: brokers may leave some out.
struct Trail<'a> {
    from_earliest: bool,
    lanes: HashMap<u32, LaneTrail<'a>>,
}

#[derive(Default)]
struct LaneTrail<'a> {
    /// Messages read.
    count: u64,
    /// Where the last of them stands.
    last: Option<Position>,
    groups: Vec<GroupTrail<'a>>,
}

struct GroupTrail<'a> {
    place: &'a GroupPosition,
    /// How many messages were read before the group's place, once that is reached; `None` also
    /// when the read began behind it.
    before: Option<u64>,
}

impl<'a> Trail<'a> {
    fn new(start: Start, positions: &'a [GroupPosition]) -> Self {
        let mut lanes: HashMap<u32, LaneTrail<'a>> = HashMap::new();
        for place in positions {
            let groups = &mut lanes.entry(place.partition).or_default().groups;
            groups.push(GroupTrail {
                place,
                before: None,
            });
        }
        Self {
            from_earliest: start == Start::Earliest,
            lanes,
        }
    }

    /// Notes one more message.
    fn pass(&mut self, record: &Record) {
        let Some(position) = record.position else {
            return;
        };
        let lane = self.lanes.entry(record.partition).or_default();
        for group in &mut lane.groups {
            let reached = match lane.last {
                None => self.from_earliest && position > group.place.position,
                Some(last) => last < group.place.position && position > group.place.position,
            };
            if reached || position == group.place.position {
                group.before = Some(lane.count);
            }
        }
        lane.count += 1;
        lane.last = Some(position);
    }

    /// How far each group is with the message passed last.
    fn progress(&self, record: &Record) -> Vec<GroupProgress> {
        let Some(lane) = self.lanes.get(&record.partition) else {
            return Vec::new();
        };
        let progress = |group: &GroupTrail<'_>| match record.position {
            Some(position) if position < group.place.position => Progress::Settled,
            _ => Progress::Waiting {
                before: group.before.map(|before| lane.count - 1 - before),
            },
        };
        let groups = lane.groups.iter().map(|group| GroupProgress {
            group: group.place.group.clone(),
            progress: progress(group),
        });
        groups.collect()
    }
}
