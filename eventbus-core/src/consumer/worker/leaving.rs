//! What leaves: what of it is still handled, and when nothing of it is left.

use std::cmp::Reverse;
use std::sync::Arc;

use tokio::time::Instant;

use super::Worker;
use crate::consumer::departure::Departure;
use crate::consumer::dispatch::Layers;
use crate::consumer::gate::Probed;
use crate::consumer::keys::{Keep, Node, NodeId, NodeState, Stage};
use crate::delivery::{Lane, Receipt};

impl<V: Layers> Worker<V> {
    /// What a lane leaves with; none while it stays.
    pub(super) fn departure(&self, lane: Lane) -> Option<&Arc<Departure>> {
        // The first one knows what waits: a later one may have come when workers had ended.
        let mut departures = self.departures.iter();
        departures.find(|departure| departure.has(lane))
    }

    /// Whether a delivery is the next owner's, so that nothing more is done with it.
    pub(super) fn is_leaving(&self, id: NodeId) -> bool {
        !self.departures.is_empty() && self.leaves_before(id, Instant::now())
    }

    /// Whether a delivery is the next owner's at this time. A held one stays in its store.
    pub(super) fn leaves_before(&self, id: NodeId, time: Instant) -> bool {
        let node = self.keys.get(id);
        let lane = node.scope.lane();
        let mut departures = self.departures.iter();
        departures.any(|departure| {
            departure.has(lane) && (node.held.is_some() || departure.is_over(time))
        })
    }

    /// Whether nothing is started now: it is not known yet what is still to be handled.
    #[cold]
    pub(super) fn is_measuring(&self) -> bool {
        let mut departures = self.departures.iter();
        departures.any(|departure| !departure.is_known())
    }

    /// Notes that a delivery begins; false when it is the next owner's.
    #[inline]
    pub(super) fn begin(&self, id: NodeId) -> bool {
        self.departures.is_empty() || self.begin_leaving(id)
    }

    #[cold]
    fn begin_leaving(&self, id: NodeId) -> bool {
        let node = self.keys.get(id);
        let departure = self.departure(node.scope.lane());
        node.held.is_some() || departure.is_none_or(|departure| departure.begin(receipt_of(node)))
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
        let node = self.keys.get(id);
        if node.held.is_none()
            && let Some(departure) = self.departure(node.scope.lane())
        {
            departure.leave(receipt_of(node));
        }
    }

    pub(super) fn begin_departure(&mut self, departure: Arc<Departure>) {
        self.place = None;
        // From here on it is looked for in one place only.
        self.queue_incoming();
        self.departures.push(Arc::clone(&departure));
        self.to_leave = true;
        let Some(until) = departure.finish_until() else {
            self.drop_idle(&departure);
            self.cancel_runs(&departure);
            return self.settled.retain(|receipt| !departure.has(receipt.lane));
        };
        for id in self.hopeless(&departure, until) {
            self.drop_node(id);
        }
        departure.report(&self.waiting(&departure));
    }

    /// What waits in a lane that leaves.
    fn idle(&self, departure: &Departure) -> Vec<NodeId> {
        let is_idle = |id: &NodeId| {
            let node = self.keys.get(*id);
            let stays = matches!(node.state, NodeState::Running(_) | NodeState::Dropped);
            !stays && departure.has(node.scope.lane())
        };
        self.keys.ids().filter(is_idle).collect()
    }

    /// The receipts of what waits in a lane that leaves.
    fn waiting(&self, departure: &Departure) -> Vec<Receipt> {
        let idle = self.idle(departure).into_iter();
        let nodes = idle.map(|id| self.keys.get(id));
        nodes
            .filter(|node| node.held.is_none())
            .map(receipt_of)
            .collect()
    }

    /// Leaves what is not to be handled any more, when anything about that may have changed.
    #[cold]
    pub(super) fn leave(&mut self) {
        if !std::mem::take(&mut self.to_leave) {
            return;
        }
        let departures = self.departures.clone();
        for departure in &departures {
            departure.wait(&self.waiting(departure));
        }
        for departure in &departures {
            for id in self.idle(departure) {
                if !self.stays(id) {
                    self.drop_node(id);
                }
            }
        }
    }

    /// Whether what waits in a lane that leaves is still handled.
    fn stays(&self, id: NodeId) -> bool {
        let node = self.keys.get(id);
        if node.held.is_some() {
            // It is done, and the next owner is not to do it again.
            return matches!(&node.stage, Stage::Keep(keep) if matches!(**keep, Keep::Advance { .. }));
        }
        let departure = self.departure(node.scope.lane());
        self.runtime.gate.is_open()
            && !self.runtime.has_failed()
            && departure.is_none_or(|departure| departure.covers(receipt_of(node)))
    }

    /// What is not tried again before `until`, or would only fail.
    fn hopeless(&self, departure: &Departure, until: Instant) -> Vec<NodeId> {
        let waiting = self.timers.iter().filter(|Reverse((due, id, sequence))| {
            self.keys.is_current(*id, *sequence) && {
                let node = self.keys.get(*id);
                let is_hopeless = *due >= until || node.blocked;
                is_hopeless && node.state == NodeState::Waiting && departure.has(node.scope.lane())
            }
        });
        waiting.map(|Reverse((_, id, _))| *id).collect()
    }

    /// Lets go of the lanes that nothing is left of; says whether handlers had to be dropped.
    #[cold]
    pub(super) fn check_departures(&mut self, now: Instant) -> bool {
        let mut dropped = false;
        let mut index = 0;
        // Each stays in the list until it is done: what shares a run with it may be leaving, too.
        while let Some(departure) = self.departures.get(index).map(Arc::clone) {
            if departure.is_over(now) {
                self.drop_idle(&departure);
                dropped |= self.cancel_runs(&departure);
            }
            if self.has_any(&departure) {
                index += 1;
                continue;
            }
            // What is settled first, so that it stands before the release.
            self.flush();
            self.sweep();
            self.departures.remove(index);
        }
        dropped
    }

    /// Whether anything of lanes that leave runs or is still to be handled.
    fn has_any(&self, departure: &Departure) -> bool {
        self.keys.ids().any(|id| {
            let node = self.keys.get(id);
            node.state != NodeState::Dropped && departure.has(node.scope.lane())
        })
    }

    /// Leaves everything that waits.
    fn drop_idle(&mut self, departure: &Departure) {
        for id in self.idle(departure) {
            self.drop_node(id);
        }
    }

    /// Drops the handlers of lanes that leave; a group that holds others, too, is repeated for those.
    fn cancel_runs(&mut self, departure: &Departure) -> bool {
        let mut dropped = 0;
        let mut cancelled = false;
        for slot in 0..self.running.len() {
            let Some(running) = &self.running[slot] else {
                continue;
            };
            let of_lanes = |id: NodeId| departure.has(self.keys.get(id).scope.lane());
            if !running.nodes.iter().any(of_lanes) {
                continue;
            }
            if let Some(running) = self.running[slot].take() {
                cancelled = true;
                dropped += usize::from(running.is_handler);
                self.slots.cancel(slot);
                self.unstart(&running.nodes);
            }
        }
        departure.drop_handlers(dropped);
        cancelled
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

    pub(super) fn is_finished(&self) -> bool {
        self.stopping && self.keys.is_empty() && self.incoming.is_empty()
    }
}

fn receipt_of(node: &Node) -> Receipt {
    node.scope.delivery().receipt
}
