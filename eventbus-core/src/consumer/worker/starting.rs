//! Which run is started next: what waits in the queue, then what has just come, past the queue
//! where it can.

use std::cmp::Reverse;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Poll;

use tokio::time::Instant;

use super::receiving::own;
use super::{Nodes, Running, Worker};
use crate::consumer::dispatch::Layers;
use crate::consumer::gate::{Admission, Probed};
use crate::consumer::keys::{Keep, NodeId, NodeState, Stage};
use crate::consumer::run::{Ended, Run};
use crate::consumer::scope::{Routed, Scope, Skip};
use crate::consumer::slots::{Caught, panic_text};
use crate::dead_letter::Cause;
use crate::delivery::Delivery;
use crate::error::{Error, ErrorKind};
use crate::key_state::{HeldName, HoldEntry, Wait};

/// How many runs a worker starts before it looks anew.
const STARTS_MAX: usize = 64;

/// What starting the next delivery came to.
enum Step {
    Started,
    /// It was queued, skipped or dropped: the next one may be started.
    PassedOver,
    /// Nothing may be started now, or nothing is there.
    Stopped,
}

/// Why no handler gets a delivery.
enum Unhandled {
    Skip(Skip),
    Poison(Cause),
}

impl<V: Layers> Worker<V> {
    pub(super) fn fire_timers(&mut self, now: Instant) -> bool {
        let mut fired = false;
        while let Some(Reverse((due, id, sequence))) = self.timers.peek().copied()
            && due <= now
        {
            self.timers.pop();
            if self.keys.is_current(id, sequence) && self.keys.get(id).state == NodeState::Waiting {
                self.keys.push_ready(id);
                fired = true;
            }
        }
        fired
    }

    /// Starts what is ready: first what is in the queue, then what has just come.
    pub(super) fn start_ready(&mut self) -> bool {
        let mut started = 0;
        self.held = false;
        self.probe_at = None;
        if !self.departures.is_empty() && self.is_measuring() {
            return false;
        }
        while started < STARTS_MAX && self.slots.has_room() {
            let step = match self.keys.pop_ready() {
                Some(id) => self.start_queued(id),
                None => self.start_incoming(),
            };
            match step {
                Step::Started => started += 1,
                Step::PassedOver => {}
                Step::Stopped => break,
            }
        }
        self.measure_ended_at_once();
        started > 0
    }

    fn start_queued(&mut self, mut id: NodeId) -> Step {
        if self.keys.get(id).state == NodeState::Dropped {
            let scope = self.keys.remove(id);
            self.recycle(scope);
            return Step::PassedOver;
        }
        if self.runtime.gate.holds_for_failures() {
            // Only a handler can show that handlers succeed again; dead letters wait till then.
            self.keys.push_ready_first(id);
            self.queue_incoming();
            let handler = self.keys.bring_handler_forward();
            let Some(handler) = handler.then(|| self.keys.pop_ready()).flatten() else {
                self.held = true;
                return Step::Stopped;
            };
            id = handler;
        }
        let probe = match self.runtime.gate.admit(self.number) {
            Admission::Yes => false,
            Admission::Probe => true,
            Admission::Wait(probe_at) => {
                self.keys.push_ready_first(id);
                self.held = true;
                self.probe_at = probe_at;
                return Step::Stopped;
            }
        };
        self.keys.get_mut(id).probe = probe;
        if !self.begin(id) {
            self.forget(id);
            self.drop_settled(id);
            return Step::PassedOver;
        }
        self.start_one(id);
        Step::Started
    }

    /// Starts what has come next, past the queue where nothing of its key is there.
    fn start_incoming(&mut self) -> Step {
        let Some(partition) = self.next_partition() else {
            return Step::Stopped;
        };
        if !self.runtime.gate.is_open() {
            self.queue_incoming();
            return Step::PassedOver;
        }
        if self.is_behind() {
            self.queue_next(partition);
            return Step::PassedOver;
        }
        self.start_next(partition);
        Step::Started
    }

    /// Whether anything is before what has come next: in the queue, or put aside.
    #[inline]
    fn is_behind(&self) -> bool {
        let Some(Delivery {
            message, receipt, ..
        }) = self.incoming.front()
        else {
            return false;
        };
        let held = self.runtime.held.as_ref();
        if held.is_some_and(|held| held.holds(receipt.lane, message.key.as_ref())) {
            return true;
        }
        // Mostly nothing is there, and no key has to be hashed.
        let key = || self.runtime.key_hash(message);
        !self.keys.is_empty() && key().is_some_and(|key| self.keys.has_key(key))
    }

    /// Starts what has come next. What is handled at once never gets into the queue.
    #[inline]
    fn start_next(&mut self, partition: u32) {
        let mut scope = self.take_scope();
        let inner = own(&mut scope);
        inner.fill(self.incoming.pop_front(), partition);
        if let Err(unhandled) = find_route(inner) {
            let id = self.queue_started(scope);
            return self.pass_over(id, unhandled);
        }
        let (slot, polled) = self.slots.start(Run::Handle(Arc::clone(&scope)));
        if let Poll::Ready(Ok(Ended::Done)) = polled {
            self.ended_at_once += 1;
            self.tally.handled(true);
            return self.settle_scope(scope);
        }
        let id = self.queue_started(scope);
        self.follow(Nodes::One(id), slot, polled, true);
    }

    /// Gives what was started a place in the queue.
    fn queue_started(&mut self, scope: Arc<Scope>) -> NodeId {
        let key = self.runtime.key_hash(scope.message());
        self.keys.insert(scope, key)
    }

    /// Those that ended at once share the time between them: reading the clock for each of them
    /// would cost more than most of them take.
    fn measure_ended_at_once(&mut self) {
        let count = std::mem::take(&mut self.ended_at_once);
        if count == 0 {
            return;
        }
        let spent = self.since_begun(Instant::now()).saturating_sub(self.turn);
        self.tally.ran(spent / count, count);
    }

    pub(super) fn start_one(&mut self, id: NodeId) {
        if self.is_put_aside(id) {
            let node = self.keys.get_mut(id);
            let message = node.scope.message();
            if let (Stage::Handle, Some(key)) = (&node.stage, message.key.clone()) {
                let (message, position) = (message.clone(), node.scope.position());
                let entry = HoldEntry::new(HeldName::Key(key), message, position, Wait::nothing());
                node.stage = Stage::Keep(Arc::new(Keep::Hold(entry)));
                self.end_probe(id, Probed::Nothing);
            }
        }
        let node = self.keys.get_mut(id);
        if node.scope.route().is_none()
            && matches!(node.stage, Stage::Handle)
            && let Err(unhandled) = find_route(own(&mut node.scope))
        {
            return self.pass_over(id, unhandled);
        }
        let run = match std::mem::replace(&mut node.stage, Stage::Handle) {
            Stage::Handle => return self.start_handler(id),
            Stage::Publish(messages) => {
                node.stage = Stage::Publish(messages.clone());
                Run::Publish(Arc::clone(&node.scope), messages)
            }
            Stage::DeadLetter(cause) => {
                node.stage = Stage::DeadLetter(Arc::clone(&cause));
                Run::DeadLetter(Arc::clone(&node.scope), cause)
            }
            Stage::Keep(keep) => {
                node.stage = Stage::Keep(Arc::clone(&keep));
                Run::Keep(Arc::clone(&node.scope), keep)
            }
        };
        self.start_run(Nodes::One(id), run, false);
    }

    /// Deals with a delivery that no handler can handle.
    fn pass_over(&mut self, id: NodeId, unhandled: Unhandled) {
        self.end_probe(id, Probed::Nothing);
        match unhandled {
            Unhandled::Skip(skip) => {
                self.tally.skipped(skip);
                self.settle(id);
            }
            Unhandled::Poison(cause) => self.give_up(id, cause),
        }
    }

    fn start_handler(&mut self, id: NodeId) {
        let node = self.keys.get(id);
        let batch_max = match node.alone || node.probe {
            true => 1,
            false => self.runtime.batch_max(&node.scope),
        };
        if batch_max <= 1 && !self.runtime.is_batch(&node.scope) {
            self.begin_attempt(id);
            let scope = Arc::clone(&self.keys.get(id).scope);
            return self.start_run(Nodes::One(id), Run::Handle(scope), true);
        }
        let ids = self.gather(id, batch_max);
        for id in &ids {
            self.begin_attempt(*id);
        }
        let scopes = ids
            .iter()
            .map(|id| Arc::clone(&self.keys.get(*id).scope))
            .collect();
        self.start_run(Nodes::Group(ids), Run::Group(scopes), true);
    }

    fn begin_attempt(&mut self, id: NodeId) {
        let node = self.keys.get_mut(id);
        if Arc::strong_count(&node.scope) > 1 {
            node.scope = Arc::new(node.scope.renewed());
        }
        node.scope.begin_attempt(node.failures + 1);
    }

    /// Collects deliveries for one run: of the same key in their order, then other ready ones.
    fn gather(&mut self, first: NodeId, batch_max: usize) -> Vec<NodeId> {
        let mut ids = vec![first];
        let mut last = first;
        while ids.len() < batch_max {
            let successor = self
                .keys
                .successor(last)
                .filter(|id| self.keys.get(*id).state == NodeState::Behind);
            let candidate = match successor {
                Some(id) if self.may_join(id, first) => Some(id),
                _ => self
                    .keys
                    .peek_ready()
                    .filter(|id| self.keys.get(*id).state == NodeState::Ready)
                    .filter(|id| self.may_join(*id, first))
                    .inspect(|_| {
                        self.keys.pop_ready();
                    }),
            };
            let Some(id) = candidate else { break };
            // Its slot is set when the run starts; until then it only has to be out of the queues.
            self.keys.get_mut(id).state = NodeState::Running(usize::MAX);
            ids.push(id);
            last = id;
        }
        ids
    }

    fn may_join(&mut self, id: NodeId, first: NodeId) -> bool {
        if self.is_put_aside(id) {
            return false;
        }
        let node = self.keys.get_mut(id);
        if node.alone || !matches!(node.stage, Stage::Handle) || node.failures > 0 {
            return false;
        }
        if node.scope.route().is_none() {
            let Some(scope) = Arc::get_mut(&mut node.scope) else {
                return false;
            };
            if scope.delivery().handed_out.unwrap_or(0) > self.runtime.settings.hand_outs_max {
                return false;
            }
            let routed = catch_unwind(AssertUnwindSafe(|| scope.find_route()));
            if !matches!(routed, Ok(Routed::Handle)) {
                return false;
            }
        }
        let (scope, first) = (&self.keys.get(id).scope, &self.keys.get(first).scope);
        self.runtime.may_share_run(scope, first) && self.begin(id)
    }

    fn start_run(&mut self, nodes: Nodes, run: Run, is_handler: bool) {
        let (slot, polled) = self.slots.start(run);
        self.follow(nodes, slot, polled, is_handler);
    }

    /// Notes what runs in a slot, or concludes it when it has ended already.
    fn follow(&mut self, nodes: Nodes, slot: usize, polled: Poll<Caught<Ended>>, is_handler: bool) {
        for id in nodes.iter() {
            self.keys.get_mut(id).state = NodeState::Running(slot);
        }
        let running = Running {
            nodes,
            started: self.turn,
            is_handler,
        };
        match polled {
            Poll::Pending => self.running[slot] = Some(running),
            Poll::Ready(result) => {
                self.ended_at_once += u64::from(is_handler);
                self.conclude_run(running, result);
            }
        }
    }
}

/// Finds the handler of a delivery that was never started.
#[inline(always)]
fn find_route(scope: &mut Scope) -> Result<(), Unhandled> {
    let routed = catch_unwind(AssertUnwindSafe(|| scope.find_route())).unwrap_or_else(|panic| {
        let panic = panic_text(panic.as_ref());
        let error = Error::new(ErrorKind::Internal, "read message", "the format panicked");
        Routed::Undecodable(error.with("panic", panic))
    });
    let handed_out = scope.delivery().handed_out.unwrap_or(0);
    Err(match routed {
        Routed::Handle if handed_out <= scope.runtime().settings.hand_outs_max => return Ok(()),
        Routed::Handle => Unhandled::Poison(Cause::HandOuts(handed_out)),
        Routed::Skip(skip) => Unhandled::Skip(skip),
        Routed::NoHandler(event_type) => Unhandled::Poison(Cause::NoHandler(event_type)),
        Routed::Undecodable(error) => Unhandled::Poison(Cause::Undecodable(error)),
    })
}
