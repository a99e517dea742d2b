//! The store of held keys in memory: it survives consumers, not the process.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;

use crate::clock::{Clock, SystemClock, Timestamp};
use crate::delivery::Position;
use crate::error::{Error, ErrorKind, Result};
use crate::key_state::{
    Claim, Due, DueName, HELD_KEYS_MAX, HeldMessage, HeldName, HeldPlace, HeldReport, HoldEntry,
    KeyAction, KeyDecision, KeyStateDesk, KeyStateStore, Wait,
};
use crate::message::Group;
use crate::topic::TopicPartition;

/// Most bytes that one [`MemoryKeyState`] holds.
const HELD_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Keeps held keys in this process; clones share one store.
///
/// At most 64 MiB of messages are held; more is `RateLimited`.
#[derive(Clone, Debug)]
pub struct MemoryKeyState {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    /// Counts decisions.
    decided: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    places: HashMap<Group, BTreeMap<TopicPartition, Place>>,
    bytes: usize,
}

#[derive(Debug, Default)]
struct Place {
    fence: u64,
    names: BTreeMap<HeldName, Held>,
}

#[derive(Debug)]
struct Held {
    messages: VecDeque<HeldMessage>,
    next_number: u64,
    /// Of the last message that was held, also when that is gone.
    last_position: Option<Position>,
    wait: Wait,
    since: Timestamp,
    decision: Option<KeyDecision>,
}

impl Held {
    fn new(wait: Wait, since: Timestamp) -> Self {
        Self {
            messages: VecDeque::new(),
            next_number: 1,
            last_position: None,
            wait,
            since,
            decision: None,
        }
    }

    fn has(&self, position: Option<Position>) -> bool {
        position.is_some() && position <= self.last_position
    }

    /// The first message, with how it fared.
    fn first(&self) -> Option<HeldMessage> {
        let mut first = self.messages.front()?.clone();
        first.attempts = self.wait.attempts;
        first.first_failed = self.wait.first_failed;
        Some(first)
    }
}

impl Default for MemoryKeyState {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryKeyState {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::with_clock(Arc::new(SystemClock))
    }

    /// An empty store that dates by `clock`.
    #[must_use]
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        Self {
            shared: Arc::new(Shared {
                clock,
                state: Mutex::default(),
                decided: watch::Sender::new(0),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is made after all that can fail.
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The place of a claim, unless somebody claimed it later.
    fn claimed(&mut self, operation: &'static str, claim: &Claim) -> Result<&mut Place> {
        self.places
            .get_mut(&claim.group)
            .and_then(|places| places.get_mut(&claim.place))
            .filter(|place| place.fence == claim.fence)
            .ok_or_else(|| stale_claim(operation, claim))
    }

    fn find(&self, group: &Group, held: &HeldPlace) -> Option<&Held> {
        self.places
            .get(group)?
            .get(&held.place)?
            .names
            .get(&held.name)
    }

    fn find_mut(&mut self, group: &Group, held: &HeldPlace) -> Option<&mut Held> {
        self.places
            .get_mut(group)?
            .get_mut(&held.place)?
            .names
            .get_mut(&held.name)
    }
}

/// Says that another member has claimed the partition.
fn stale_claim(operation: &'static str, claim: &Claim) -> Error {
    Error::new(
        ErrorKind::Conflict,
        operation,
        "another member has taken this partition over",
    )
    .with("group", &claim.group)
    .with("topic", &claim.place.topic)
    .with("partition", claim.place.partition)
}

#[async_trait]
impl KeyStateStore for MemoryKeyState {
    async fn claim(&self, group: &Group, place: &TopicPartition) -> Result<(Claim, Vec<HeldName>)> {
        let mut state = self.lock();
        let places = state.places.entry(group.clone()).or_default();
        let found = places.entry(place.clone()).or_default();
        found.fence += 1;
        let claim = Claim::new(group.clone(), place.clone(), found.fence);
        Ok((claim, found.names.keys().cloned().collect()))
    }

    async fn hold(&self, claim: &Claim, entries: &[HoldEntry]) -> Result<()> {
        let now = self.shared.clock.now();
        let mut state = self.lock();
        let added: usize = entries.iter().map(|entry| entry.message.size()).sum();
        let full = state.bytes + added > HELD_BYTES_MAX;
        let place = state.claimed("hold messages", claim)?;
        let new = entries
            .iter()
            .filter(|entry| !place.names.contains_key(&entry.name))
            .count();
        if full || place.names.len() + new > HELD_KEYS_MAX {
            return Err(Error::new(
                ErrorKind::RateLimited,
                "hold messages",
                "as much is held as may be: retry, release or discard what is parked",
            )
            .with("group", &claim.group)
            .with("topic", &claim.place.topic)
            .with("partition", claim.place.partition));
        }
        let mut bytes = 0;
        for entry in entries {
            let held = place
                .names
                .entry(entry.name.clone())
                .or_insert_with(|| Held::new(entry.wait.clone(), now));
            if held.has(entry.position) {
                continue;
            }
            bytes += entry.message.size();
            let message =
                HeldMessage::new(held.next_number, entry.message.detached(), entry.position);
            held.messages.push_back(message);
            held.next_number += 1;
            held.last_position = entry.position.or(held.last_position);
        }
        state.bytes += bytes;
        Ok(())
    }

    async fn advance(
        &self,
        claim: &Claim,
        name: &HeldName,
        done: Option<u64>,
    ) -> Result<Option<HeldMessage>> {
        let mut state = self.lock();
        let place = state.claimed("take held messages", claim)?;
        let Some(held) = place.names.get_mut(name) else {
            return Ok(None);
        };
        let mut freed = 0;
        if done.is_some() && held.messages.front().map(|first| first.number) == done {
            freed = held
                .messages
                .pop_front()
                .map_or(0, |done| done.message.size());
            held.wait = Wait::nothing();
            held.decision
                .take_if(|decision| decision.action != KeyAction::Discard);
        }
        let first = held.first();
        if first.is_none() {
            place.names.remove(name);
        }
        state.bytes -= freed;
        Ok(first)
    }

    async fn wait(
        &self,
        claim: &Claim,
        name: &HeldName,
        wait: &Wait,
        carried_out: bool,
    ) -> Result<()> {
        let mut state = self.lock();
        let place = state.claimed("park key", claim)?;
        if let Some(held) = place.names.get_mut(name) {
            held.wait = wait.clone();
            if carried_out {
                held.decision = None;
            }
        }
        Ok(())
    }

    async fn due(
        &self,
        _group: &Group,
        claims: &[Claim],
        now: Timestamp,
        names_max: usize,
    ) -> Result<Due> {
        // Read first: a decision made meanwhile resolves `decided` for nothing, and is not missed.
        let version = *self.shared.decided.borrow();
        let mut state = self.lock();
        let mut due = Vec::new();
        let mut next: Option<Timestamp> = None;
        let mut superseded = Vec::new();
        for claim in claims {
            let Ok(place) = state.claimed("look for due keys", claim) else {
                superseded.push(claim.clone());
                continue;
            };
            for (name, held) in &place.names {
                let until = match &held.decision {
                    Some(decision) => Some(decision.at),
                    None => held.wait.until,
                };
                match until {
                    None => {}
                    Some(until) if held.decision.is_none() && until > now => {
                        next = Some(next.map_or(until, |next| next.min(until)));
                    }
                    Some(until) => {
                        let place = HeldPlace::new(claim.place.clone(), name.clone());
                        let name = DueName::new(place, held.wait.clone(), held.decision.clone());
                        due.push((until, name));
                    }
                }
            }
        }
        due.sort_by_key(|(until, _)| *until);
        due.truncate(names_max);
        let names = due.into_iter().map(|(_, name)| name).collect();
        Ok(Due::new(names, next, version).with_superseded(superseded))
    }

    async fn decided(&self, _group: &Group, seen: u64) {
        let mut decided = self.shared.decided.subscribe();
        // The sender lives as long as this store.
        let _ = decided.wait_for(|version| *version != seen).await;
    }
}

#[async_trait]
impl KeyStateDesk for MemoryKeyState {
    async fn list(
        &self,
        group: &Group,
        after: Option<&HeldPlace>,
        names_max: usize,
    ) -> Result<Vec<HeldReport>> {
        let state = self.lock();
        let places = state.places.get(group).into_iter().flatten();
        let reports = places.flat_map(|(place, found)| {
            found.names.iter().map(|(name, held)| {
                HeldReport::new(
                    HeldPlace::new(place.clone(), name.clone()),
                    held.wait.clone(),
                    held.since,
                    held.messages.len() as u64,
                    held.decision.clone(),
                )
            })
        });
        Ok(reports
            .filter(|report| after.is_none_or(|after| report.held > *after))
            .take(names_max)
            .collect())
    }

    async fn messages(
        &self,
        group: &Group,
        held: &HeldPlace,
        after: Option<u64>,
        messages_max: usize,
    ) -> Result<Vec<HeldMessage>> {
        let state = self.lock();
        let Some(held) = state.find(group, held) else {
            return Ok(Vec::new());
        };
        let first = held.first();
        let rest = held.messages.iter().skip(1).cloned();
        Ok(first
            .into_iter()
            .chain(rest)
            .filter(|message| after.is_none_or(|after| message.number > after))
            .take(messages_max)
            .collect())
    }

    async fn decide(
        &self,
        group: &Group,
        held: &HeldPlace,
        decision: &KeyDecision,
    ) -> Result<bool> {
        let mut state = self.lock();
        let Some(held) = state
            .find_mut(group, held)
            .filter(|held| held.decision.is_none())
        else {
            return Ok(false);
        };
        held.decision = Some(decision.clone());
        drop(state);
        self.shared.decided.send_modify(|version| *version += 1);
        Ok(true)
    }
}
