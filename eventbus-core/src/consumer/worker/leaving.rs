//! What leaves: lanes that are revoked or lost, and everything when the consumer ends.

use std::cmp::Reverse;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::time::Instant;

use super::Worker;
use crate::coalescer::Coalescer;
use crate::consumer::dispatch::Layers;
use crate::consumer::gate::Probed;
use crate::consumer::keys::{NodeId, NodeState};
use crate::consumer::settler::SettleItem;
use crate::delivery::Lane;

/// Lanes being taken away, until no worker runs a handler of theirs.
#[derive(Debug)]
pub(crate) struct Revocation {
    lanes: Vec<Lane>,
    /// Revoked lanes are finished and settled until then; lost ones are dropped at once.
    pub(super) finish_until: Option<Instant>,
    workers: AtomicUsize,
    settler: Coalescer<SettleItem>,
}

impl Revocation {
    pub(crate) fn new(
        lanes: Vec<Lane>,
        finish_until: Option<Instant>,
        workers: usize,
        settler: Coalescer<SettleItem>,
    ) -> Arc<Self> {
        Arc::new(Self {
            lanes,
            finish_until,
            workers: AtomicUsize::new(workers),
            settler,
        })
    }

    /// One worker has nothing of these lanes any more. The last one passes them on, behind all
    /// verdicts that the workers gave before.
    fn cleared(&self) {
        if self.workers.fetch_sub(1, Ordering::AcqRel) == 1 && self.finish_until.is_some() {
            self.settler.add(SettleItem::Release(self.lanes.clone()));
        }
    }
}

/// The end of a consumer.
#[derive(Debug)]
pub(crate) struct Stop {
    /// Runs may go on until then.
    pub(crate) deadline: Instant,
    /// Whether what has not been started is handled, too: at the end of a replay.
    pub(crate) finish: bool,
}

impl<V: Layers> Worker<V> {
    pub(super) fn is_leaving(&self, id: NodeId) -> bool {
        if self.stop.as_ref().is_some_and(|stop| !stop.finish) {
            return true;
        }
        self.is_revoked(self.keys.get(id).scope.lane())
    }

    /// Whether a lane is being taken away.
    pub(super) fn is_revoked(&self, lane: Lane) -> bool {
        let mut revocations = self.revocations.iter();
        revocations.any(|revocation| revocation.lanes.contains(&lane))
    }

    /// Leaves a delivery to the next owner.
    pub(super) fn drop_node(&mut self, id: NodeId) {
        self.forget(id);
        let state = self.keys.get(id).state;
        // Behind and ready ones are passed over where they stand; others have to stand somewhere.
        if matches!(state, NodeState::Waiting | NodeState::Running(_)) {
            self.keys.push_ready_first(id);
        }
        self.keys.get_mut(id).state = NodeState::Dropped;
    }

    /// Undoes what a delivery that leaves has said of itself.
    pub(super) fn forget(&mut self, id: NodeId) {
        self.end_probe(id, Probed::Nothing);
        if std::mem::take(&mut self.keys.get_mut(id).blocked) {
            self.tally.blocked -= 1;
        }
    }

    pub(super) fn begin_revocation(&mut self, revocation: Arc<Revocation>) {
        self.place = None;
        self.incoming
            .retain(|delivery| !revocation.lanes.contains(&delivery.receipt.lane));
        let of_lanes: Vec<_> = self
            .keys
            .ids()
            .filter(|id| revocation.lanes.contains(&self.keys.get(*id).scope.lane()))
            .collect();
        for id in of_lanes {
            if !matches!(
                self.keys.get(id).state,
                NodeState::Running(_) | NodeState::Dropped
            ) {
                self.drop_node(id);
            }
        }
        self.revocations.push(Arc::clone(&revocation));
        if revocation.finish_until.is_none() {
            self.cancel_runs(&revocation.lanes);
            self.settled
                .retain(|(receipt, _)| !revocation.lanes.contains(&receipt.lane));
        }
    }

    /// Forgets what was left to the next owner: while nothing may be started, or an older delivery
    /// of a key waits, lanes that come and go would leave more and more.
    fn sweep(&mut self) {
        for scope in self.keys.sweep() {
            self.recycle(scope);
        }
        let keys = &self.keys;
        self.timers
            .retain(|Reverse((_, id, sequence))| keys.is_current(*id, *sequence));
    }

    /// Passes on the lanes that nothing runs on any more; says whether handlers had to be dropped.
    pub(super) fn check_revocations(&mut self, now: Instant) -> bool {
        let mut dropped = false;
        let mut index = 0;
        // Each stays in the list until it is done: what shares a run with it may be leaving, too.
        while let Some(revocation) = self.revocations.get(index).map(Arc::clone) {
            if revocation.finish_until.is_some_and(|until| until <= now) {
                dropped |= self.cancel_runs(&revocation.lanes);
            }
            if self.runs_any(&revocation.lanes) {
                index += 1;
                continue;
            }
            // Verdicts first, so that they stand before the release.
            self.flush();
            self.sweep();
            self.revocations.remove(index);
            revocation.cleared();
        }
        dropped
    }

    fn runs_any(&self, lanes: &[Lane]) -> bool {
        self.running.iter().flatten().any(|running| {
            running
                .nodes
                .iter()
                .any(|id| lanes.contains(&self.keys.get(id).scope.lane()))
        })
    }

    /// Drops the handlers of these lanes; a group that holds others, too, is repeated for those.
    fn cancel_runs(&mut self, lanes: &[Lane]) -> bool {
        let mut cancelled = false;
        for slot in 0..self.running.len() {
            let Some(running) = &self.running[slot] else {
                continue;
            };
            let of_lanes = |id: NodeId| lanes.contains(&self.keys.get(id).scope.lane());
            if !running.nodes.iter().any(of_lanes) {
                continue;
            }
            if let Some(running) = self.running[slot].take() {
                cancelled = true;
                self.slots.cancel(slot);
                self.unstart(&running.nodes);
            }
        }
        cancelled
    }

    pub(super) fn begin_stop(&mut self, stop: Arc<Stop>, now: Instant) {
        if !stop.finish {
            self.incoming.clear();
            let idle: Vec<_> = self
                .keys
                .ids()
                .filter(|id| {
                    !matches!(
                        self.keys.get(*id).state,
                        NodeState::Running(_) | NodeState::Dropped
                    )
                })
                .collect();
            for id in idle {
                self.drop_node(id);
            }
        }
        self.stop = Some(stop);
        self.check_stop(now);
    }

    pub(super) fn check_stop(&mut self, now: Instant) {
        if self.stop.as_ref().is_none_or(|stop| stop.deadline > now) {
            return;
        }
        self.incoming.clear();
        for slot in 0..self.running.len() {
            if let Some(running) = self.running[slot].take() {
                self.slots.cancel(slot);
                self.unstart(&running.nodes);
            }
        }
        let left: Vec<_> = self.keys.ids().collect();
        for id in left {
            if self.keys.get(id).state != NodeState::Dropped {
                self.drop_node(id);
            }
        }
        while let Some(id) = self.keys.pop_ready() {
            let scope = self.keys.remove(id);
            self.recycle(scope);
        }
    }

    pub(super) fn is_finished(&self) -> bool {
        self.stop.is_some() && self.keys.is_empty() && self.incoming.is_empty()
    }
}
