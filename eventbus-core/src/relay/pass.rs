//! One pass: what is next on the lanes is published, or put aside, and removed.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use metrics::counter;
use tracing::trace;

use super::runner::Runner;
use super::{OnRefused, RELAY_HELD, RELAYED};
use crate::broker::{PublishError, Unpublished};
use crate::clock::Timestamp;
use crate::delivery::Position;
use crate::error::{Error, ErrorKind, Result, error_chain};
use crate::key_state::{HeldName, HoldEntry, Wait};
use crate::outbox::{OUTBOX_BYTES_MIN, OutboxMessage};

/// After so many passes that took others of its lanes, a message that fails waits elsewhere.
const ATTEMPTS_MAX: u32 = 5;
/// The longest wait of a message that was put aside because it failed.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// What a pass came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// Nothing waits any more.
    Idle,
    /// There may be more.
    Progress,
    /// The broker or the store is away; the next pass is for later.
    Away,
}

impl Runner {
    /// Publishes what is next on the lanes.
    pub(super) async fn publish_next(&mut self) -> Result<Pass> {
        let lanes = self.lanes.numbers();
        self.attempts.retain(|(lane, _), _| lanes.contains(lane));
        if lanes.is_empty() {
            return Ok(Pass::Idle);
        }
        // What stays in the outbox meanwhile is part of what may be published twice.
        let messages_max = match self.taken.is_few() {
            true => self.relay.batch - self.taken.len(),
            false => self.relay.batch,
        };
        let batch = self.next(&lanes, messages_max).await?;
        trace!(target: "eventbus::step", step = "relay.next.after");
        let rest = match is_all(&batch, messages_max / lanes.len()) {
            true => Pass::Idle,
            false => Pass::Progress,
        };
        if batch.is_empty() {
            self.attempts.clear();
            return Ok(rest);
        }
        // Reading took time: of a lane that is lost by now nothing more is published.
        let ours = self.lanes.numbers();
        let (behind, mut ahead): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .filter(|next| ours.contains(&next.lane))
            .partition(|next| self.lanes.holds(next.lane, &self.name_of(next)));
        self.put_aside(behind, &Wait::nothing()).await?;
        // So did holding, which may have told that a lane is another relay's by now.
        let ours = self.lanes.numbers();
        ahead.retain(|next| ours.contains(&next.lane));
        if ahead.is_empty() {
            return Ok(Pass::Progress);
        }
        self.publish(ahead, rest).await
    }

    /// Publishes messages of which `rest` says whether there are more.
    async fn publish(&mut self, ahead: Vec<OutboxMessage>, rest: Pass) -> Result<Pass> {
        let messages = ahead.iter().map(|next| next.message.clone()).collect();
        let Err(error) = self.relay.bus.send_in_time(messages).await else {
            self.took(&ahead);
            // Where there is more it is read at the same time.
            if rest == Pass::Idle && !self.taken.is_few() {
                self.remove_taken().await?;
            }
            return Ok(rest);
        };
        let failures = Failures::new(ahead, error);
        self.took(&failures.taken);
        self.remove_taken().await?;
        let is_away = failures.taken.is_empty() && failures.refused.is_empty();
        if let Some(error) = &failures.first {
            tracing::warn!(relay = %self.relay.name, error = %error, "not everything was published");
            self.relay.shared.lock().error = Some(error.clone());
        }
        for (refused, error) in failures.refused {
            self.park(refused, &error).await?;
        }
        if is_away {
            return Ok(Pass::Away);
        }
        for (failed, error) in failures.failed {
            let attempts = self
                .attempts
                .entry((failed.lane, failed.position))
                .or_default();
            *attempts += 1;
            if *attempts >= ATTEMPTS_MAX {
                self.set_waiting(failed, &error).await?;
            }
        }
        Ok(Pass::Progress)
    }

    /// Takes note of what the broker took: it is to be removed.
    fn took(&mut self, taken: &[OutboxMessage]) {
        if taken.is_empty() {
            return;
        }
        self.taken.add(taken.iter().map(|next| next.position));
        if !self.attempts.is_empty() {
            for next in taken {
                self.attempts.remove(&(next.lane, next.position));
            }
        }
        self.relay.shared.lock().published += taken.len() as u64;
        counter!(RELAYED).increment(taken.len() as u64);
    }

    /// Parks what the broker refuses for what it is.
    async fn park(&mut self, refused: OutboxMessage, error: &Error) -> Result<()> {
        tracing::error!(
            relay = %self.relay.name, id = %refused.id, topic = %refused.message.topic, error = %error,
            "the broker refuses a committed message: it is parked, look at the held keys of this group"
        );
        let wait = self.wait(None, error, 1);
        self.put_aside(vec![refused], &wait).await
    }

    /// Lets what goes on failing wait where it holds up nothing but its key.
    async fn set_waiting(&mut self, failed: OutboxMessage, error: &Error) -> Result<()> {
        self.attempts.remove(&(failed.lane, failed.position));
        let until = self.later(ATTEMPTS_MAX);
        let wait = self.wait(Some(until), error, ATTEMPTS_MAX);
        self.put_aside(vec![failed], &wait).await
    }

    /// When a message that failed so often is tried again: twice as late each time.
    pub(super) fn later(&self, attempts: u32) -> Timestamp {
        let wait = Duration::from_millis(100).saturating_mul(1 << attempts.min(16));
        self.relay.bus.clock().now().plus(wait.min(WAIT_MAX))
    }

    pub(super) fn wait(&self, until: Option<Timestamp>, error: &Error, attempts: u32) -> Wait {
        let cause = if until.is_some() { "failed" } else { "refused" };
        Wait {
            until,
            attempts,
            first_failed: Some(self.relay.bus.clock().now()),
            cause: cause.to_owned(),
            error: error_chain(error),
        }
    }

    /// Holds messages durably, each behind those of its name, and only then removes them.
    async fn put_aside(&mut self, messages: Vec<OutboxMessage>, wait: &Wait) -> Result<()> {
        let mut by_lane: HashMap<u32, Vec<OutboxMessage>> = HashMap::new();
        for message in messages {
            by_lane.entry(message.lane).or_default().push(message);
        }
        for (number, messages) in by_lane {
            self.due.changed();
            let names: Vec<_> = messages.iter().map(|next| self.name_of(next)).collect();
            let entries: Vec<_> = messages
                .iter()
                .zip(&names)
                .map(|(next, name)| {
                    let position = Some(Position(u128::from(next.position)));
                    HoldEntry::new(name.clone(), next.message.clone(), position, wait.clone())
                })
                .collect();
            let Some(lane) = self.lanes.get_mut(number) else {
                continue;
            };
            match self.relay.held.hold(&lane.claim, &entries).await {
                Ok(()) => lane.names.extend(names),
                Err(error) if error.kind() == ErrorKind::Conflict => {
                    self.lanes.reclaim(number);
                    continue;
                }
                Err(error) => return Err(error),
            }
            let positions: Vec<_> = messages.iter().map(|next| next.position).collect();
            self.relay.outbox.remove(&positions).await?;
            self.relay.shared.lock().held += positions.len() as u64;
            counter!(RELAY_HELD).increment(positions.len() as u64);
        }
        Ok(())
    }

    fn name_of(&self, next: &OutboxMessage) -> HeldName {
        match (&next.message.key, self.relay.on_refused) {
            (Some(key), OnRefused::ParkKey) => HeldName::Key(key.clone()),
            _ => HeldName::Message(next.id.clone()),
        }
    }
}

/// Whether a batch is all that waited: it is nothing, or no lane has its share of it, and no store
/// stops short of so few bytes.
fn is_all(batch: &[OutboxMessage], share: usize) -> bool {
    let bytes = || batch.iter().map(|next| next.message.size()).sum::<usize>();
    batch.is_empty() || (batch.len() < share && bytes() < OUTBOX_BYTES_MIN)
}

/// Whether the error is about the message, so that sending it again is no help. A topic that is not
/// there may be created.
pub(super) fn is_of_the_message(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::InvalidInput | ErrorKind::Unsupported
    )
}

/// What became of a batch that was not taken as a whole.
struct Failures {
    taken: Vec<OutboxMessage>,
    /// The first of its key each.
    refused: Vec<(OutboxMessage, Error)>,
    /// The first of its key each.
    failed: Vec<(OutboxMessage, Error)>,
    /// Why the first was not taken.
    first: Option<String>,
}

impl Failures {
    fn new(batch: Vec<OutboxMessage>, error: PublishError) -> Self {
        let mut unpublished: HashMap<usize, Unpublished> = error
            .unpublished
            .into_iter()
            .map(|unpublished| (unpublished.index, unpublished))
            .collect();
        let mut failures = Self {
            taken: Vec::with_capacity(batch.len()),
            refused: Vec::new(),
            failed: Vec::new(),
            first: None,
        };
        let mut keys = HashSet::new();
        for (index, next) in batch.into_iter().enumerate() {
            let Some(unpublished) = unpublished.remove(&index) else {
                failures.taken.push(next);
                continue;
            };
            let error = unpublished.error;
            if failures.first.is_none() {
                failures.first = Some(error_chain(&error));
            }
            // What is behind it was not taken for that reason, and is tried again after it.
            let is_first = next.message.key.clone().is_none_or(|key| keys.insert(key));
            match is_of_the_message(&error) {
                _ if !is_first => {}
                true => failures.refused.push((next, error)),
                false => failures.failed.push((next, error)),
            }
        }
        failures
    }
}
