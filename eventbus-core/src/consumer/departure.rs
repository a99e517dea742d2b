//! Lanes that leave a consumer: until when, and how much of what has come on them is still handled.
//!
//! ```text
//!  tag   1  2  3  4  5  6  7  8
//!        ✓  ·  ✓  ▶  ·  ✓  ·  ·     ✓ settled, ▶ running, · waiting
//!        └─ still handled ─┘ └──┘ left to the next owner
//! ```

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::Runtime;
use super::settler::SettleItem;
use crate::coalescer::Coalescer;
use crate::delivery::{Lane, Receipt};

/// Lanes that leave, by a revocation, a loss, or the end of the consumer.
///
/// A group's place on a lane is its first message that is not settled: what is settled behind that
/// one is handled again by the next owner. So what waits before anything that has begun is still
/// handled, and what waits behind all of it is left. The workers share the lanes; they start
/// nothing before all have said what waits with them.
///
/// Each worker lets go of it when it has nothing of these lanes any more. The last one thereby
/// passes revoked lanes on, behind all verdicts that the workers gave before.
#[derive(Debug)]
pub(crate) struct Departure {
    runtime: Arc<Runtime>,
    lanes: Vec<Lane>,
    /// Until then what has come may be handled; without it nothing may.
    finish_until: Option<Instant>,
    /// Where revoked lanes are passed on.
    release: Option<Coalescer<SettleItem>>,
    /// Handlers that had to be dropped.
    dropped: AtomicUsize,
    rest: Mutex<Rest>,
}

/// What of the lanes is not done.
#[derive(Debug)]
struct Rest {
    /// Workers that have not said what waits with them.
    silent: usize,
    lanes: HashMap<Lane, LaneRest>,
}

#[derive(Debug)]
struct LaneRest {
    /// Behind the last tag that was delivered.
    delivered: u64,
    /// What waits before this tag is still handled, from it on it is left. It only falls, so that
    /// nothing begins behind what was left.
    end: u64,
    /// Tags of what waits or was left.
    waiting: BTreeSet<u64>,
}

impl Departure {
    /// Lanes that were lost: nothing of them is handled any more.
    pub(crate) fn lost(runtime: &Arc<Runtime>, lanes: Vec<Lane>) -> Self {
        Self::new(runtime, lanes, None, 0)
    }

    /// Lanes that are finished in time, when so many workers have said what waits with them.
    pub(crate) fn until(
        runtime: &Arc<Runtime>,
        lanes: Vec<Lane>,
        until: Instant,
        workers: usize,
    ) -> Self {
        Self::new(runtime, lanes, Some(until), workers)
    }

    fn new(
        runtime: &Arc<Runtime>,
        lanes: Vec<Lane>,
        finish_until: Option<Instant>,
        silent: usize,
    ) -> Self {
        let ends = runtime.lanes.delivered_ends(&lanes);
        let rest = ends
            .into_iter()
            .map(|(lane, end)| (lane, LaneRest::new(end)))
            .collect();
        Self {
            runtime: Arc::clone(runtime),
            lanes,
            finish_until,
            release: None,
            dropped: AtomicUsize::new(0),
            rest: Mutex::new(Rest {
                silent,
                lanes: rest,
            }),
        }
    }

    /// Passes the lanes on when the last worker lets go of them.
    pub(crate) fn with_release(mut self, settler: Coalescer<SettleItem>) -> Self {
        self.release = Some(settler);
        self
    }

    pub(crate) fn has(&self, lane: Lane) -> bool {
        self.lanes.contains(&lane)
    }

    pub(crate) fn finish_until(&self) -> Option<Instant> {
        self.finish_until
    }

    /// Whether nothing of the lanes may be handled at this time.
    pub(crate) fn is_over(&self, at: Instant) -> bool {
        self.finish_until.is_none_or(|until| until <= at)
    }

    fn lock(&self) -> MutexGuard<'_, Rest> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One worker says for the first time what waits with it.
    pub(crate) fn report(&self, waiting: &[Receipt]) {
        let mut rest = self.lock();
        rest.note(waiting);
        rest.silent = rest.silent.saturating_sub(1);
        if rest.silent == 0 {
            rest.lower();
            drop(rest);
            self.runtime.gate.wake();
        }
    }

    /// Whether all workers have said what waits with them.
    pub(crate) fn is_known(&self) -> bool {
        self.lock().silent == 0
    }

    /// Notes what waits with a worker, again or still.
    pub(crate) fn wait(&self, waiting: &[Receipt]) {
        let mut rest = self.lock();
        rest.note(waiting);
        if rest.silent == 0 && rest.lower() {
            drop(rest);
            self.runtime.gate.wake();
        }
    }

    /// Whether a delivery that waits is still to be handled, as far as is known.
    pub(crate) fn covers(&self, receipt: Receipt) -> bool {
        let rest = self.lock();
        let lane = rest.lanes.get(&receipt.lane);
        rest.silent > 0 || lane.is_some_and(|lane| receipt.tag < lane.end)
    }

    /// Notes that a delivery begins; false when it was to be left.
    pub(crate) fn begin(&self, receipt: Receipt) -> bool {
        let mut rest = self.lock();
        let Some(lane) = rest.lanes.get_mut(&receipt.lane) else {
            return false;
        };
        let begins = receipt.tag < lane.end;
        if begins {
            lane.waiting.remove(&receipt.tag);
        }
        begins
    }

    /// Leaves a delivery to the next owner, and with it what waits behind it on the lane: that
    /// would be handled again.
    pub(crate) fn leave(&self, receipt: Receipt) {
        let mut rest = self.lock();
        let Some(lane) = rest.lanes.get_mut(&receipt.lane) else {
            return;
        };
        lane.waiting.insert(receipt.tag);
        if receipt.tag < lane.end {
            lane.end = receipt.tag;
            drop(rest);
            self.runtime.gate.wake();
        }
    }

    /// Counts handlers that had to be dropped.
    pub(crate) fn drop_handlers(&self, count: usize) {
        self.dropped.fetch_add(count, Ordering::Relaxed);
    }

    /// How many handlers had to be dropped.
    pub(crate) fn dropped(&self) -> usize {
        self.dropped.load(Ordering::Relaxed)
    }

    /// How many deliveries were settled behind one that was left: the next owner handles them again.
    pub(crate) fn handled_again(&self) -> u64 {
        self.lock()
            .lanes
            .values()
            .map(LaneRest::handled_again)
            .sum()
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        if let Some(settler) = &self.release {
            settler.add(SettleItem::Release(std::mem::take(&mut self.lanes)));
        }
    }
}

impl Rest {
    fn note(&mut self, waiting: &[Receipt]) {
        for receipt in waiting {
            if let Some(lane) = self.lanes.get_mut(&receipt.lane) {
                lane.waiting.insert(receipt.tag);
            }
        }
    }

    /// Leaves what waits behind all that has begun; whether that is more than before.
    fn lower(&mut self) -> bool {
        let lowered = self.lanes.values_mut().filter_map(LaneRest::lower);
        lowered.count() > 0
    }
}

impl LaneRest {
    fn new(delivered: u64) -> Self {
        Self {
            delivered,
            end: delivered,
            waiting: BTreeSet::new(),
        }
    }

    fn lower(&mut self) -> Option<u64> {
        let before = self.end;
        while let Some(last) = self.end.checked_sub(1)
            && self.waiting.contains(&last)
        {
            self.end = last;
        }
        (self.end < before).then_some(self.end)
    }

    fn handled_again(&self) -> u64 {
        let first = self.waiting.first();
        first.map_or(0, |first| {
            self.delivered - first - self.waiting.len() as u64
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane<const N: usize>(delivered: u64, waiting: [u64; N]) -> LaneRest {
        let mut lane = LaneRest::new(delivered);
        lane.waiting.extend(waiting);
        lane.lower();
        lane
    }

    #[test]
    fn what_waits_before_anything_begun_is_handled() {
        assert_eq!(lane(8, [1, 4, 6, 7]).end, 6);
        assert_eq!(lane(8, [1, 4]).end, 8);
        assert_eq!(lane(8, []).end, 8);
        assert_eq!(lane(3, [0, 1, 2]).end, 0);
    }

    #[test]
    fn more_is_left_when_the_last_that_ran_waits_again() {
        let mut lane = lane(8, [1, 4, 6, 7]);
        lane.waiting.insert(5);
        lane.lower();
        assert_eq!(lane.end, 4);
    }

    #[test]
    fn what_is_settled_behind_the_first_that_waits_is_handled_again() {
        assert_eq!(lane(8, [6, 7]).handled_again(), 0);
        assert_eq!(lane(8, [1, 6, 7]).handled_again(), 4);
    }
}
