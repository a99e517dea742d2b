//! What the broker has taken and the outbox still holds: it is removed while the next is read, and a few
//! messages together.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use tracing::trace;

use super::runner::Runner;
use crate::error::Result;
use crate::outbox::{OUTBOX_LANES, OutboxMessage};

/// How many messages may wait for others to be removed with.
const FEW: usize = 16;
/// How long they wait at most.
const WAIT_MAX: Duration = Duration::from_millis(50);

/// Positions of messages that are published and not removed yet. Together with the batch under way
/// they are no more than one batch: a few count as part of it, and more are removed before it is published.
#[derive(Debug)]
pub(super) struct Taken {
    positions: BTreeSet<u64>,
    /// When the first of them was taken.
    since: Option<Instant>,
    few: usize,
}

impl Taken {
    /// For batches of so many messages.
    pub(super) fn new(batch: usize) -> Self {
        Self {
            positions: BTreeSet::new(),
            since: None,
            few: FEW.min(batch / (2 * OUTBOX_LANES as usize)),
        }
    }

    pub(super) fn add(&mut self, positions: impl Iterator<Item = u64>) {
        self.positions.extend(positions);
        self.since.get_or_insert_with(Instant::now);
    }

    fn removed(&mut self) {
        trace!(target: "eventbus::step", step = "relay.remove.after");
        self.positions.clear();
        self.since = None;
    }

    pub(super) fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether they may wait for others to be removed with.
    pub(super) fn is_few(&self) -> bool {
        self.len() <= self.few
    }

    /// When they are to be removed at the latest.
    pub(super) fn due(&self) -> Option<Instant> {
        self.since.map(|since| since + WAIT_MAX)
    }

    pub(super) fn is_due(&self) -> bool {
        self.due().is_some_and(|due| due <= Instant::now())
    }

    fn positions(&self) -> Vec<u64> {
        self.positions.iter().copied().collect()
    }
}

impl Runner {
    /// Removes what the broker took. What cannot be removed is not published again meanwhile.
    pub(super) async fn remove_taken(&mut self) -> Result<()> {
        let positions = self.taken.positions();
        if !positions.is_empty() {
            trace!(target: "eventbus::step", step = "relay.remove.before");
            self.relay.outbox.remove(&positions).await?;
            self.taken.removed();
        }
        Ok(())
    }

    /// What is next on the lanes. What the broker took before is removed at the same time, unless it
    /// may wait: to remove and to read take as long as each other.
    pub(super) async fn next(
        &mut self,
        lanes: &[u32],
        messages_max: usize,
    ) -> Result<Vec<OutboxMessage>> {
        let taken = self.taken.positions();
        let next = self.relay.outbox.next(lanes, messages_max, &taken);
        if self.taken.is_few() {
            return next.await;
        }
        trace!(target: "eventbus::step", step = "relay.remove.before");
        let (removed, next) = tokio::join!(self.relay.outbox.remove(&taken), next);
        removed?;
        self.taken.removed();
        next
    }
}
