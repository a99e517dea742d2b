//! An outbox in memory: for tests of whoever publishes through one.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;

use crate::clock::{Clock, SystemClock, Timestamp};
use crate::envelope::EventId;
use crate::error::{Error, ErrorKind, Result};
use crate::message::Message;
use crate::outbox::{OUTBOX_LANES, OutboxDepth, OutboxMessage, OutboxStore, outbox_lane};

/// Most bytes of messages that one [`MemoryOutbox`] holds.
const BYTES_MAX: usize = 64 * 1024 * 1024;

/// Holds messages in this process until a relay has published them; clones share them.
///
/// At most 64 MiB wait; more is `RateLimited`.
#[derive(Clone, Debug)]
pub struct MemoryOutbox {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    /// Counts what was appended.
    appended: watch::Sender<u64>,
}

#[derive(Debug)]
struct State {
    lanes: [BTreeMap<u64, (Timestamp, OutboxMessage)>; OUTBOX_LANES as usize],
    next_position: u64,
    bytes: usize,
}

impl Default for MemoryOutbox {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryOutbox {
    /// An empty outbox.
    #[must_use]
    pub fn new() -> Self {
        Self::with_clock(Arc::new(SystemClock))
    }

    /// An empty outbox that dates by `clock`.
    #[must_use]
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        Self {
            shared: Arc::new(Shared {
                clock,
                state: Mutex::new(State {
                    lanes: std::array::from_fn(|_| BTreeMap::new()),
                    next_position: 1,
                    bytes: 0,
                }),
                appended: watch::Sender::new(0),
            }),
        }
    }

    /// Appends messages, such as those of an [`OutgoingBatch`](crate::OutgoingBatch). All or nothing.
    ///
    /// # Errors
    ///
    /// `RateLimited` when more than 64 MiB would wait.
    pub fn append(&self, messages: Vec<(EventId, Message)>) -> Result<()> {
        let now = self.shared.clock.now();
        let bytes: usize = messages.iter().map(|(_, message)| message.size()).sum();
        let mut state = self.lock();
        if state.bytes + bytes > BYTES_MAX {
            return Err(Error::new(
                ErrorKind::RateLimited,
                "append to outbox",
                "64 MiB wait for the relay: look at what keeps it",
            ));
        }
        state.bytes += bytes;
        for (id, message) in messages {
            let position = state.next_position;
            state.next_position += 1;
            let lane = outbox_lane(message.key.as_ref(), &id);
            let row = OutboxMessage::new(position, lane, id, message);
            state.lanes[lane as usize].insert(position, (now, row));
        }
        drop(state);
        self.shared.appended.send_modify(|appended| *appended += 1);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is made after all that can fail.
        let state = self.shared.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl OutboxStore for MemoryOutbox {
    async fn next(
        &self,
        lanes: &[u32],
        messages_max: usize,
        except: &[u64],
    ) -> Result<Vec<OutboxMessage>> {
        let except: HashSet<u64> = except.iter().copied().collect();
        let state = self.lock();
        let waiting = lanes.iter().filter_map(|lane| {
            let lane = state.lanes.get(usize::try_from(*lane).ok()?)?;
            (!lane.is_empty()).then_some(lane)
        });
        let waiting: Vec<_> = waiting.collect();
        let share = messages_max.div_ceil(waiting.len().max(1));
        let next = waiting
            .iter()
            .flat_map(|lane| {
                let others = lane.values().map(|(_, message)| message);
                others
                    .filter(|message| !except.contains(&message.position))
                    .take(share)
            })
            .cloned();
        Ok(next.take(messages_max).collect())
    }

    async fn remove(&self, positions: &[u64]) -> Result<()> {
        let mut state = self.lock();
        for position in positions {
            let removed = state
                .lanes
                .iter_mut()
                .find_map(|lane| lane.remove(position));
            if let Some((_, removed)) = removed {
                state.bytes -= removed.message.size();
            }
        }
        Ok(())
    }

    async fn appended(&self) {
        let mut appended = self.shared.appended.subscribe();
        // The sender is part of this store, so it is there.
        let _ = appended.changed().await;
    }

    async fn depth(&self) -> Result<OutboxDepth> {
        let state = self.lock();
        let mut depth = OutboxDepth::new();
        for (number, lane) in (0..).zip(&state.lanes) {
            if let Some((_, (at, _))) = lane.first_key_value() {
                depth.lanes.push((number, lane.len() as u64));
                depth.oldest = Some(depth.oldest.map_or(*at, |oldest| oldest.min(*at)));
            }
        }
        Ok(depth)
    }
}
