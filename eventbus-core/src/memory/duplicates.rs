//! The in-memory store of duplicate windows: what a real one does, on tokio's clock.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

use crate::clock::FOREVER;
use crate::duplicates::{ClaimEvents, DUPLICATES_FORGOTTEN, DuplicateStore, EventClaim};
use crate::envelope::EventId;
use crate::error::{Error, ErrorKind, Result};
use crate::lease::MemberId;
use crate::message::Group;

/// How often it says at most that it forgets events early.
const TOLD_EVERY: Duration = Duration::from_secs(60);

/// Remembers in this process which events were handled; clones remember the same.
///
/// It takes up to [`IDS_MAX`](Self::IDS_MAX) events over all groups, unless
/// [`with_ids_max`](Self::with_ids_max) says otherwise: some 200 bytes each, as they come. When there
/// are more, those whose windows end first are forgotten; that is logged, and counted by
/// [`forgotten`](Self::forgotten) and the metric [`DUPLICATES_FORGOTTEN`].
#[derive(Clone, Debug)]
pub struct MemoryDuplicates {
    state: Arc<Mutex<State>>,
}

/// An event as a group knows it.
type GroupEvent = (Group, EventId);
/// When an entry ends, and a number that tells those apart which end at once.
type End = (Instant, u64);

#[derive(Debug)]
struct State {
    ids_max: usize,
    events: HashMap<GroupEvent, Entry>,
    /// Claims by their ends, and what is handled: apart, because only the latter may be forgotten.
    claims: BTreeMap<End, GroupEvent>,
    handled: BTreeMap<End, GroupEvent>,
    last_number: u64,
    forgotten: u64,
    told: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    /// Whose claim it is; none when the event was handled.
    member: Option<MemberId>,
    end: End,
}

impl Default for MemoryDuplicates {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryDuplicates {
    /// How many events are remembered by default.
    pub const IDS_MAX: usize = 1_000_000;

    /// Remembers nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::with_ids_max(Self::IDS_MAX)
    }

    /// As [`new`](Self::new), with room for so many events, at least one.
    #[must_use]
    pub fn with_ids_max(ids: usize) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                ids_max: ids.max(1),
                events: HashMap::new(),
                claims: BTreeMap::new(),
                handled: BTreeMap::new(),
                last_number: 0,
                forgotten: 0,
                told: None,
            })),
        }
    }

    /// How many events it forgot before their window was over, for want of room.
    pub fn forgotten(&self) -> u64 {
        self.lock().forgotten
    }

    /// How many events it knows: handled within their window, or claimed.
    pub fn known(&self) -> usize {
        let mut state = self.lock();
        state.expire(Instant::now());
        state.events.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is made after all that can fail.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Forgets what has ended.
    fn expire(&mut self, now: Instant) {
        for ends in [&mut self.claims, &mut self.handled] {
            while let Some(first) = ends.first_entry()
                && first.key().0 <= now
            {
                self.events.remove(&first.remove());
            }
        }
    }

    fn remove(&mut self, event: &GroupEvent) {
        if let Some(entry) = self.events.remove(event) {
            match entry.member {
                Some(_) => self.claims.remove(&entry.end),
                None => self.handled.remove(&entry.end),
            };
        }
    }

    fn insert(&mut self, event: GroupEvent, member: Option<MemberId>, until: Instant) {
        self.remove(&event);
        self.last_number += 1;
        let end = (until, self.last_number);
        let ends = match member {
            Some(_) => &mut self.claims,
            None => &mut self.handled,
        };
        ends.insert(end, event.clone());
        self.events.insert(event, Entry { member, end });
    }

    /// Makes room for one more event; false when claims take all of it.
    fn make_room(&mut self, now: Instant) -> bool {
        while self.events.len() >= self.ids_max {
            let Some((_, oldest)) = self.handled.pop_first() else {
                return false;
            };
            self.events.remove(&oldest);
            self.note_forgotten(now);
        }
        true
    }

    fn note_forgotten(&mut self, now: Instant) {
        self.forgotten += 1;
        metrics::counter!(DUPLICATES_FORGOTTEN).increment(1);
        if self.told.is_none_or(|told| told + TOLD_EVERY <= now) {
            self.told = Some(now);
            tracing::warn!(
                ids_max = self.ids_max,
                forgotten = self.forgotten,
                "handled events are forgotten before their window is over: duplicates of them are handled again; make room, or shorten the window"
            );
        }
    }

    fn claim(&mut self, request: &ClaimEvents, id: &EventId, now: Instant) -> Option<EventClaim> {
        let event = (request.group.clone(), id.clone());
        let known = self.events.get(&event);
        match known.map(|entry| (entry.member, entry.end.0)) {
            Some((None, _)) => return Some(EventClaim::Handled),
            Some((Some(member), until)) if member != request.member => {
                let free_in = until.saturating_duration_since(now);
                return Some(EventClaim::Busy { free_in });
            }
            Some(_) => {}
            None if self.make_room(now) => {}
            None => return None,
        }
        let until = now + request.lease.min(FOREVER);
        self.insert(event, Some(request.member), until);
        Some(EventClaim::Granted)
    }
}

#[async_trait]
impl DuplicateStore for MemoryDuplicates {
    async fn claim(&self, request: &ClaimEvents) -> Result<Vec<EventClaim>> {
        let now = Instant::now();
        let mut state = self.lock();
        state.expire(now);
        let ids = request.ids.iter();
        let claims: Option<Vec<_>> = ids.map(|id| state.claim(request, id, now)).collect();
        claims.ok_or_else(|| {
            Error::new(
                ErrorKind::RateLimited,
                "claim event",
                "as many events are being handled as may be known: make room with `MemoryDuplicates::with_ids_max`",
            )
            .with("ids max", state.ids_max)
        })
    }

    async fn mark_handled(&self, group: &Group, ids: &[EventId], window: Duration) -> Result<()> {
        let now = Instant::now();
        let mut state = self.lock();
        state.expire(now);
        for id in ids {
            let event = (group.clone(), id.clone());
            state.remove(&event);
            match state.make_room(now) {
                true => state.insert(event, None, now + window.min(FOREVER)),
                // Its claim was lost, and nothing but claims is there.
                false => state.note_forgotten(now),
            }
        }
        Ok(())
    }

    async fn release(&self, group: &Group, member: MemberId, ids: &[EventId]) -> Result<()> {
        let mut state = self.lock();
        for id in ids {
            let event = (group.clone(), id.clone());
            let entry = state.events.get(&event);
            if entry.is_some_and(|entry| entry.member == Some(member)) {
                state.remove(&event);
            }
        }
        Ok(())
    }
}
