//! What the broker has taken and the outbox still holds: a few messages are removed together.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use tracing::trace;

use super::runner::Runner;
use crate::error::Result;
use crate::outbox::OUTBOX_LANES;

/// How many messages may wait for others to be removed with: they are read again meanwhile.
const FEW: usize = 16;
/// How long they wait at most.
const WAIT_MAX: Duration = Duration::from_millis(50);

/// Positions of messages that are published and not removed yet. Together with the batch under way
/// they are no more than one batch, because they are part of what is read next.
#[derive(Debug)]
pub(super) struct Taken {
    positions: BTreeSet<u64>,
    /// When the first of them was taken.
    since: Option<Instant>,
    few: usize,
}

impl Taken {
    /// For batches of so many messages: what waits is less than the share of a lane, so that it is
    /// always read as part of the next batch.
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

    pub(super) fn contains(&self, position: u64) -> bool {
        self.positions.contains(&position)
    }

    /// Whether they may wait for others.
    pub(super) fn is_few(&self) -> bool {
        self.positions.len() <= self.few
    }

    /// When they are to be removed at the latest.
    pub(super) fn due(&self) -> Option<Instant> {
        self.since.map(|since| since + WAIT_MAX)
    }

    pub(super) fn is_due(&self) -> bool {
        self.due().is_some_and(|due| due <= Instant::now())
    }
}

impl Runner {
    /// Removes what the broker took, unless it may wait.
    pub(super) async fn remove_taken_unless(&mut self, may_wait: bool) -> Result<()> {
        match may_wait {
            true => Ok(()),
            false => self.remove_taken().await,
        }
    }

    /// Removes what the broker took. What cannot be removed is not published again meanwhile.
    pub(super) async fn remove_taken(&mut self) -> Result<()> {
        if self.taken.positions.is_empty() {
            return Ok(());
        }
        trace!(target: "eventbus::step", step = "relay.remove.before");
        let positions: Vec<_> = self.taken.positions.iter().copied().collect();
        self.relay.outbox.remove(&positions).await?;
        trace!(target: "eventbus::step", step = "relay.remove.after");
        self.taken.positions.clear();
        self.taken.since = None;
        Ok(())
    }
}
