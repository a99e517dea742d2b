//! What becomes of scheduled messages that the broker did not take: which are due still, which are
//! postponed so that they hold up no other, and which wait behind those of their key.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tracing::{error, warn};

use super::super::{Refused, ScheduleStore, Scheduled, ScheduledReport};
use crate::broker::{self, Unpublished};
use crate::bus::EventBus;
use crate::clock::Timestamp;
use crate::envelope::EventId;
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Key, Message, Topic};

/// When a message is tried again that the broker refused, and the longest pause of one that failed.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// The shortest pause of a message that failed.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// How many keys are remembered to be stopped; what is stopped beyond may be overtaken by its key.
const STOPPED_MAX: usize = 10_000;
/// After so many batches of which nothing was taken it is looked whether they hold up others.
const ROUNDS_MAX: u32 = 5;
/// How much is looked at for that: so many pages of so many messages.
const PAGES_MAX: usize = 20;
const PAGE: usize = 500;

/// More than the difference between the first and the last of a batch that is postponed.
const BATCH: Duration = Duration::from_millis(1);

/// What became of messages that were sent.
pub(super) struct Outcome {
    pub(super) published: Vec<EventId>,
    /// What was not taken, in its order.
    pub(super) left: Vec<Left>,
}

/// A message that was not taken.
pub(super) struct Left {
    id: EventId,
    not_before: Timestamp,
    unpublished: Unpublished,
}

impl Outcome {
    /// Sends messages.
    pub(super) async fn of(bus: &EventBus, messages: Vec<Scheduled>) -> Self {
        let (places, messages): (Vec<_>, Vec<_>) = messages
            .into_iter()
            .map(|it| ((it.id, it.not_before), it.message))
            .unzip();
        let unpublished = match messages.is_empty() {
            true => Vec::new(),
            false => (bus.send(messages).await.err()).map_or(Vec::new(), |it| it.unpublished),
        };
        let mut unpublished: HashMap<_, _> =
            unpublished.into_iter().map(|it| (it.index, it)).collect();
        let mut outcome = Self {
            published: Vec::new(),
            left: Vec::new(),
        };
        for (index, (id, not_before)) in places.into_iter().enumerate() {
            match unpublished.remove(&index) {
                None => outcome.published.push(id),
                Some(unpublished) => outcome.left.push(Left {
                    id,
                    not_before,
                    unpublished,
                }),
            }
        }
        outcome
    }

    /// Whether the broker judged any of it.
    fn is_answered(&self) -> bool {
        !self.published.is_empty() || self.left.iter().any(Left::is_refused)
    }

    /// Leaves out what is not to be postponed, and says why it failed.
    pub(super) fn keep_due(&mut self, holds_up: bool) -> Option<Error> {
        if holds_up || self.is_answered() {
            return None;
        }
        let failure = self.left.drain(..).next();
        failure.map(|left| left.unpublished.error)
    }
}

impl Left {
    /// Whether the broker did not take it, and will not either.
    fn is_refused(&self) -> bool {
        let error = &self.unpublished.error;
        self.unpublished.outcome == broker::Outcome::NotTaken
            && !error.is_retryable()
            && error.kind() != ErrorKind::Closed
    }

    /// How long it is not tried: the longer, the later it is.
    fn pause(&self, now: Timestamp) -> Duration {
        let (id, topic) = (&self.id, &self.unpublished.message.topic);
        let error = &self.unpublished.error;
        if self.is_refused() {
            error!(%id, %topic, error = %error,
                "a scheduled message is refused by the broker, and tried again in a minute: mend it, or cancel the message");
            return PAUSE_MAX;
        }
        warn!(%id, %topic, error = %error, "a scheduled message is tried again later than others");
        now.since(self.not_before).clamp(PAUSE_MIN, PAUSE_MAX)
    }
}

/// Batches of which the broker took nothing. As long as that is all there is to send, nothing is
/// postponed: the broker is away.
#[derive(Default)]
pub(super) struct Outage {
    rounds: u32,
    topics: HashSet<Topic>,
}

impl Outage {
    /// Whether what the broker does not take keeps messages of other topics from being tried.
    pub(super) async fn holds_up(
        &mut self,
        store: &dyn ScheduleStore,
        outcome: &Outcome,
        now: Timestamp,
    ) -> Result<bool> {
        if outcome.is_answered() {
            *self = Self::default();
        }
        if outcome.left.is_empty() || outcome.is_answered() {
            return Ok(false);
        }
        self.rounds = self.rounds.saturating_add(1);
        let topics = outcome.left.iter();
        self.topics
            .extend(topics.map(|left| left.unpublished.message.topic.clone()));
        if self.rounds < ROUNDS_MAX {
            return Ok(false);
        }
        self.others_are_due(store, now).await
    }

    async fn others_are_due(&self, store: &dyn ScheduleStore, now: Timestamp) -> Result<bool> {
        let mut last: Option<ScheduledReport> = None;
        for _ in 0..PAGES_MAX {
            let page = store.list(last.as_ref(), PAGE).await?;
            let mut due = page.iter().take_while(|report| report.due <= now);
            if due.any(|report| !self.topics.contains(&report.topic)) {
                return Ok(true);
            }
            match page.last().filter(|end| end.due <= now) {
                Some(end) => last = Some(end.clone()),
                None => return Ok(false),
            }
        }
        // Behind so many there may be others.
        Ok(true)
    }
}

/// Keys of which a message is postponed, so that none of theirs overtakes it.
#[derive(Default)]
pub(super) struct StoppedKeys(HashMap<(Topic, Key), Stop>);

struct Stop {
    /// When the first is tried again.
    until: Timestamp,
    /// Behind the last one that waits.
    last: Timestamp,
}

impl StoppedKeys {
    /// Parts what waits behind postponed messages from what is to be sent.
    pub(super) fn part(
        &mut self,
        messages: Vec<Scheduled>,
        now: Timestamp,
    ) -> (Vec<Scheduled>, Vec<Scheduled>) {
        self.0.retain(|_, stop| stop.last > now);
        let waits = |it: &Scheduled| {
            let stop = place(&it.message).and_then(|place| self.0.get(&place));
            stop.is_some_and(|stop| stop.until > now)
        };
        messages.into_iter().partition(waits)
    }

    /// Postpones what was not taken, and what waits `behind` such messages.
    pub(super) fn postpone(
        &mut self,
        behind: Vec<Scheduled>,
        left: Vec<Left>,
        now: Timestamp,
    ) -> Refused {
        let pause = left.iter().map(|left| left.pause(now)).max();
        let messages = behind.iter().map(|it| &it.message);
        let messages = messages.chain(left.iter().map(|left| &left.unpublished.message));
        let places: HashSet<_> = messages.filter_map(place).collect();
        let last = places.iter().filter_map(|place| self.0.get(place));
        let last = last.map(|stop| stop.last).max();
        let again = last.into_iter().chain(pause.map(|pause| now.plus(pause)));
        let again = again.max().unwrap_or(now);
        for left in left
            .iter()
            .filter_map(|left| place(&left.unpublished.message))
        {
            if self.0.len() < STOPPED_MAX {
                let (until, last) = (again, again);
                self.0.insert(left, Stop { until, last });
            }
        }
        for place in &places {
            if let Some(stop) = self.0.get_mut(place) {
                stop.last = again.plus(BATCH);
            }
        }
        let unknown = left.iter();
        let unknown = unknown.filter(|it| it.unpublished.outcome == broker::Outcome::Unknown);
        let unknown = unknown.map(|left| left.id.clone()).collect();
        let ids = behind.into_iter().map(|it| it.id);
        Refused {
            ids: ids.chain(left.into_iter().map(|left| left.id)).collect(),
            unknown,
            again,
        }
    }
}

fn place(message: &Message) -> Option<(Topic, Key)> {
    let key = message.key.clone()?;
    Some((message.topic.clone(), key))
}
