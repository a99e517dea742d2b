//! The schedule in memory: it survives buses, not the process.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::clock::{FOREVER, Timestamp};
use crate::envelope::EventId;
use crate::error::{Error, ErrorKind, Result};
use crate::lease::{MemberId, ProcessId};
use crate::schedule::{
    BusyTaker, Refused, SCHEDULED_MAX, ScheduleStore, Scheduled, ScheduledReport, TakeScheduled,
    Taken,
};

/// Most bytes that one [`MemorySchedule`] holds.
const SCHEDULED_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Keeps scheduled messages in this process; clones share one store.
///
/// At most 64 MiB of messages wait; more is `RateLimited`.
#[derive(Clone, Debug, Default)]
pub struct MemorySchedule {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Counts how often another message became the earliest.
    changed: watch::Sender<u64>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }
}

/// When a message is due, and its number in the order of adding.
type Place = (Timestamp, u64);

#[derive(Debug, Default)]
struct State {
    waiting: BTreeMap<Place, Entry>,
    places: HashMap<EventId, Place>,
    bytes: usize,
    last_number: u64,
    claim: u64,
    holder: Option<Holder>,
}

#[derive(Debug)]
struct Entry {
    scheduled: Scheduled,
    is_taken: bool,
}

/// Who is at what is due.
#[derive(Debug)]
struct Holder {
    taker: MemberId,
    process: ProcessId,
    until: Instant,
}

impl MemorySchedule {
    /// An empty schedule.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is made after all that can fail.
        let state = self.shared.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn insert(&mut self, scheduled: Scheduled) {
        self.last_number += 1;
        let place = (scheduled.not_before, self.last_number);
        self.bytes += scheduled.message.size();
        self.places.insert(scheduled.id.clone(), place);
        self.waiting.insert(
            place,
            Entry {
                scheduled,
                is_taken: false,
            },
        );
    }

    fn remove(&mut self, id: &EventId) -> Option<Entry> {
        let removed = self.waiting.remove(&self.places.remove(id)?)?;
        self.bytes -= removed.scheduled.message.size();
        Some(removed)
    }

    fn postpone(&mut self, id: &EventId, again: Timestamp, is_taken: bool) {
        let Some(place) = self.places.get_mut(id) else {
            return;
        };
        if let Some(mut entry) = self.waiting.remove(place) {
            place.0 = again;
            entry.is_taken = is_taken;
            self.waiting.insert(*place, entry);
        }
    }

    fn earliest(&self) -> Option<Timestamp> {
        self.waiting.keys().next().map(|(due, _)| *due)
    }

    fn next_after(&self, now: Timestamp) -> Option<Timestamp> {
        let later = (Bound::Excluded((now, u64::MAX)), Bound::Unbounded);
        self.waiting.range(later).next().map(|((due, _), _)| *due)
    }

    /// Another taker that is at what is due.
    fn busy(&self, request: &TakeScheduled) -> Option<BusyTaker> {
        let holder = self.holder.as_ref()?;
        let free_in = holder.until.saturating_duration_since(Instant::now());
        let is_other = holder.taker != request.taker && Some(holder.taker) != request.dead;
        (is_other && !free_in.is_zero()).then(|| BusyTaker {
            taker: holder.taker,
            process: holder.process.clone(),
            free_in,
        })
    }

    fn take_due(&mut self, request: &TakeScheduled) -> Vec<Scheduled> {
        let mut messages: Vec<Scheduled> = Vec::new();
        let mut bytes = 0;
        let due = self.waiting.range_mut(..=(request.now, u64::MAX));
        for (_, entry) in due.take(request.messages_max) {
            bytes += entry.scheduled.message.size();
            if bytes > request.bytes_max && !messages.is_empty() {
                break;
            }
            entry.is_taken = true;
            messages.push(entry.scheduled.clone());
        }
        messages
    }
}

#[async_trait]
impl ScheduleStore for MemorySchedule {
    async fn add(&self, messages: &[Scheduled]) -> Result<()> {
        let mut state = self.lock();
        let is_new = |it: &&Scheduled| !state.places.contains_key(&it.id);
        let new: Vec<_> = messages.iter().filter(is_new).collect();
        let bytes: usize = new.iter().map(|it| it.message.size()).sum();
        let count = (state.waiting.len() + new.len()) as u64;
        if count > SCHEDULED_MAX || state.bytes + bytes > SCHEDULED_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::RateLimited,
                "schedule event",
                "as many messages wait as may be: schedule again when some were published, or cancel some",
            )
            .with("waiting", state.waiting.len()));
        }
        let before = state.earliest();
        for scheduled in new {
            // One call may name an id twice.
            if !state.places.contains_key(&scheduled.id) {
                let mut scheduled = scheduled.clone();
                scheduled.message = scheduled.message.detached();
                state.insert(scheduled);
            }
        }
        let is_earlier = state.earliest() != before;
        drop(state);
        if is_earlier {
            self.shared.changed.send_modify(|version| *version += 1);
        }
        Ok(())
    }

    async fn cancel(&self, id: &EventId) -> Result<bool> {
        let mut state = self.lock();
        let place = state.places.get(id);
        let entry = place.and_then(|place| state.waiting.get(place));
        if entry.is_none_or(|entry| entry.is_taken) {
            return Ok(false);
        }
        state.remove(id);
        Ok(true)
    }

    async fn take(&self, request: &TakeScheduled) -> Result<Taken> {
        // Read first: what is added meanwhile resolves `changed` for nothing, and is not missed.
        let version = *self.shared.changed.borrow();
        let mut state = self.lock();
        let mut taken = Taken {
            version,
            next: state.next_after(request.now),
            waiting: state.waiting.len() as u64,
            busy: state.busy(request),
            ..Taken::default()
        };
        if taken.busy.is_some() {
            return Ok(taken);
        }
        taken.messages = state.take_due(request);
        state.holder = None;
        if !taken.messages.is_empty() {
            state.claim += 1;
            state.holder = Some(Holder {
                taker: request.taker,
                process: request.process.clone(),
                until: Instant::now() + request.ttl.min(FOREVER),
            });
        }
        taken.claim = state.claim;
        Ok(taken)
    }

    async fn done(&self, claim: u64, published: &[EventId], refused: &Refused) -> Result<()> {
        let mut state = self.lock();
        if state.claim != claim || state.holder.is_none() {
            return Err(Error::new(
                ErrorKind::Conflict,
                "report published messages",
                "another scheduler has taken over",
            ));
        }
        state.holder = None;
        for id in published {
            state.remove(id);
        }
        for (micros, id) in (0..).zip(&refused.ids) {
            let again = refused.again.plus(Duration::from_micros(micros));
            state.postpone(id, again, refused.unknown.contains(id));
        }
        Ok(())
    }

    async fn list(
        &self,
        after: Option<&ScheduledReport>,
        reports_max: usize,
    ) -> Result<Vec<ScheduledReport>> {
        let state = self.lock();
        let from = after.map_or(Bound::Unbounded, |after| {
            Bound::Excluded((after.due, after.number))
        });
        let found = state.waiting.range((from, Bound::Unbounded));
        let reports = found.take(reports_max).map(|((due, number), entry)| {
            let report = ScheduledReport::new(*number, &entry.scheduled).with_due(*due);
            match entry.is_taken {
                true => report.with_taken(),
                false => report,
            }
        });
        Ok(reports.collect())
    }

    async fn changed(&self, seen: u64) {
        let mut changed = self.shared.changed.subscribe();
        // The sender lives as long as this store.
        let _ = changed.wait_for(|version| *version != seen).await;
    }
}
