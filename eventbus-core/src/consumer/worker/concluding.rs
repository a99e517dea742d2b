//! What follows from how a run ended: a verdict, another attempt, a dead letter, or waiting.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Nodes, Running, Worker};
use crate::consumer::OnPoison;
use crate::consumer::dispatch::Layers;
use crate::consumer::gate::Probed;
use crate::consumer::held::RECLAIM;
use crate::consumer::keys::{NodeId, NodeState, Stage};
use crate::consumer::run::{Ended, Ending, Outcome};
use crate::consumer::scope::Scope;
use crate::consumer::slots::{Caught, panic_text};
use crate::dead_letter::{Cause, Diagnosis};
use crate::retry::{NextAttempt, OnError, with_jitter};

impl<V: Layers> Worker<V> {
    pub(super) fn conclude(&mut self) {
        if self.ended.is_empty() {
            return;
        }
        let now = self.since_begun(Instant::now());
        let mut ended = std::mem::take(&mut self.ended);
        // All of them first: what one of them lets start may get the slot of another.
        let mut concluded = std::mem::take(&mut self.concluded);
        concluded.extend(ended.drain(..).filter_map(|(slot, result)| {
            let running = self.running[slot].take()?;
            Some((running, result))
        }));
        for (running, result) in concluded.drain(..) {
            if running.is_handler {
                self.tally.ran(now.saturating_sub(running.started), 1);
            }
            self.conclude_run(running, result);
        }
        self.ended = ended;
        self.concluded = concluded;
    }

    pub(super) fn conclude_run(&mut self, running: Running, result: Caught<Ended>) {
        self.to_leave |= !matches!(result, Ok(Ended::Done));
        match result {
            Ok(Ended::Done) => running.nodes.iter().for_each(|id| self.done(id)),
            Ok(Ended::Otherwise(ending)) => match (running.nodes, *ending) {
                (Nodes::One(id), Ending::One(outcome)) => self.conclude_one(id, outcome),
                (Nodes::Group(ids), Ending::Each(outcomes)) => self.conclude_each(&ids, outcomes),
                (nodes, _) => self.split(&nodes),
            },
            Err(panic) => {
                let text = panic_text(panic.as_ref()).to_owned();
                self.fail_run(running, || Cause::Panic(text.clone()));
            }
        }
    }

    /// Concludes a group. What stands behind a delivery of its key that is not done waits: it is
    /// handled once more if that one was not handled, because what came of it then is not kept.
    pub(super) fn conclude_each(&mut self, ids: &[NodeId], outcomes: Vec<Outcome>) {
        let mut undone: Vec<NodeId> = Vec::new();
        for (id, outcome) in ids.iter().copied().zip(outcomes) {
            let older = undone
                .iter()
                .copied()
                .find(|older| self.keys.successor(*older) == Some(id));
            if let Some(older) = older {
                if matches!(self.keys.get(older).stage, Stage::Publish(_))
                    && let Outcome::Unsent(messages) = outcome
                {
                    self.keys.get_mut(id).stage = Stage::Publish(messages);
                }
                self.put_behind(id);
                undone.push(id);
                continue;
            }
            let sequence = self.keys.get(id).sequence;
            self.conclude_one(id, outcome);
            if self.keys.is_current(id, sequence) {
                undone.push(id);
            }
        }
    }

    /// Repeats the deliveries of a failed group one at a time; no attempt is counted.
    fn split(&mut self, nodes: &Nodes) {
        for id in nodes.iter() {
            self.keys.get_mut(id).alone = true;
        }
        self.unstart(nodes);
    }

    /// Puts back what was started: to the next owner where it is leaving, else to be started again,
    /// each behind the older ones of its key.
    pub(super) fn unstart(&mut self, nodes: &Nodes) {
        let ids: Vec<_> = nodes.iter().collect();
        for id in &ids {
            self.end_probe(*id, Probed::Nothing);
        }
        // From the last to the first, so that the first is first again.
        for id in ids.iter().copied().rev() {
            let is_behind = ids
                .iter()
                .any(|older| self.keys.successor(*older) == Some(id));
            match (is_behind, self.is_leaving(id)) {
                (true, _) => self.put_behind(id),
                (false, true) => self.drop_node(id),
                (false, false) => self.keys.push_ready_first(id),
            }
        }
    }

    /// Puts a delivery that was started together with an older one of its key behind that one again.
    fn put_behind(&mut self, id: NodeId) {
        if self.is_leaving(id) {
            self.forget(id);
            self.keys.get_mut(id).state = NodeState::Dropped;
        } else {
            self.keys.get_mut(id).state = NodeState::Behind;
        }
    }

    pub(super) fn fail_run(&mut self, running: Running, cause: impl Fn() -> Cause) {
        match running.nodes {
            Nodes::Group(ids) if ids.len() > 1 => self.split(&Nodes::Group(ids)),
            nodes => {
                for id in nodes.iter() {
                    let outcome = match running.is_handler {
                        true => Outcome::Failed(cause()),
                        false => Outcome::Unavailable(cause().to_string().into()),
                    };
                    self.conclude_one(id, outcome);
                }
            }
        }
    }

    pub(super) fn conclude_one(&mut self, id: NodeId, outcome: Outcome) {
        // Before anything else is decided, and for every outcome: while a probe has not ended, nothing
        // is started.
        if self.keys.get(id).probe {
            let probed = self.probed_by(&outcome);
            self.end_probe(id, probed);
        }
        match outcome {
            Outcome::Done => self.done(id),
            Outcome::Settled => {
                self.handled(id);
                if self.keys.get(id).held.is_some() {
                    return self.settle(id);
                }
                let scope = self.remove(id);
                let receipt = scope.delivery().receipt;
                self.runtime.lanes.settled(&[receipt]);
                self.recycle(scope);
            }
            Outcome::Duplicate => {
                self.tally.duplicates += 1;
                self.settle(id);
            }
            Outcome::DeadLettered => {
                self.tally.dead_lettered += 1;
                self.settle(id);
            }
            Outcome::Failed(cause) => self.failed(id, cause),
            Outcome::Kept(first) => self.kept(id, first),
            // Nobody claims anew for a consumer that ends.
            Outcome::Fenced if self.stopping => self.drop_node(id),
            Outcome::Fenced => self.again_after(id, RECLAIM),
            Outcome::Full(error) => {
                self.block(id, &error);
            }
            Outcome::Unavailable(error) => {
                self.hold(id, || crate::error::error_chain(error.as_ref()));
            }
            Outcome::Unpublished(messages, error) => {
                self.keys.get_mut(id).stage = Stage::Publish(messages);
                self.hold(id, || error.to_string());
            }
            Outcome::Unsent(messages) => {
                self.keys.get_mut(id).stage = Stage::Publish(messages);
                self.again(id);
            }
            Outcome::Unmarked(error) => {
                self.keys.get_mut(id).stage = Stage::Publish(Vec::new());
                self.hold(id, || error.to_string());
            }
            Outcome::Busy(free_in) => self.again_after(id, free_in),
        }
    }

    /// What a run shows of the gate's reason to hold.
    fn probed_by(&self, outcome: &Outcome) -> Probed {
        match outcome {
            Outcome::Done | Outcome::Settled => Probed::Handled,
            Outcome::Duplicate
            | Outcome::DeadLettered
            | Outcome::Kept(_)
            | Outcome::Full(_)
            | Outcome::Fenced
            | Outcome::Busy(_) => Probed::Reached,
            Outcome::Failed(Cause::Undecodable(_)) | Outcome::Unsent(_) => Probed::Nothing,
            // A message that its policy rejects says nothing against the consumer.
            Outcome::Failed(cause) => match self.classify(cause) {
                decision if decision.rejects() => Probed::Handled,
                OnError::Hold => Probed::Away,
                _ => Probed::HandlerFailed,
            },
            Outcome::Unavailable(_) | Outcome::Unpublished(..) | Outcome::Unmarked(_) => {
                Probed::Away
            }
        }
    }

    /// What the retry policy says of a failure.
    fn classify(&self, cause: &Cause) -> OnError {
        match cause {
            Cause::Error(error) => self.runtime.settings.retry.classify(error.as_ref()),
            _ => OnError::Next,
        }
    }

    #[inline]
    fn done(&mut self, id: NodeId) {
        self.handled(id);
        self.settle(id);
    }

    #[inline]
    fn handled(&mut self, id: NodeId) {
        self.tally.handled(self.keys.get(id).failures == 0);
        self.end_probe(id, Probed::Handled);
    }

    /// Something is away: the delivery goes back as it was, and the gate holds.
    fn hold(&mut self, id: NodeId, reason: impl FnOnce() -> String) {
        self.runtime.gate.hold(reason);
        self.again(id);
    }

    fn failed(&mut self, id: NodeId, cause: Cause) {
        let first_attempt = self.keys.get(id).failures == 0;
        self.keys.get_mut(id).stage = Stage::Handle;
        if let Cause::Undecodable(_) = cause {
            return self.give_up(id, cause);
        }
        let decision = self.classify(&cause);
        if decision == OnError::Hold {
            return self.hold(id, || cause.to_string());
        }
        let rejected = decision.rejects();
        if first_attempt && !rejected && self.runtime.gate.is_open() {
            // At once and not with the next flush: the attempt that makes it hold is the last.
            self.tally.first_failed();
            self.count_first_attempts(Some(&cause));
        }
        if !rejected && self.runtime.gate.is_held() {
            // While the consumer holds, no attempt is counted.
            return self.again(id);
        }
        self.tally.failed_attempts += 1;
        let random = self.random();
        let now = self.runtime.bus.clock().now();
        let node = self.keys.get_mut(id);
        node.failures += 1;
        node.first_failed.get_or_insert(now);
        tracing::info!(
            group = %node.scope.group(),
            event_id = %node.scope.id(),
            topic = node.scope.message().topic.as_str(),
            key = node.scope.message().key.as_ref().map(tracing::field::display),
            attempt = node.failures,
            cause = %cause,
            "attempt failed"
        );
        let attempt = node.failures;
        match self.runtime.settings.retry.next(attempt, decision, random) {
            Some(NextAttempt::InPlace(delay)) => self.again_after(id, delay),
            Some(NextAttempt::Delayed(delay)) => self.delay(id, delay, &cause),
            // The policy says what it is: nothing to wait for.
            None if decision == OnError::DeadLetter && self.parks(id) => {
                self.dead_letter(id, cause);
            }
            None => self.give_up(id, cause),
        }
    }

    /// No attempt is left: dead letter, block, or the end of a replay.
    pub(super) fn give_up(&mut self, id: NodeId, cause: Cause) {
        if self.is_leaving(id) {
            return self.drop_node(id);
        }
        if self.runtime.replay.is_some() {
            let scope = &self.keys.get(id).scope;
            self.runtime.fail_replay(scope, &cause);
            // It holds its key until the replay has ended: nothing behind it is handled.
            self.keys.get_mut(id).state = NodeState::Waiting;
            return;
        }
        let has_key = self.keys.get(id).scope.message().key.is_some();
        let on_poison = match self.runtime.on_poison {
            OnPoison::ParkKey if !has_key => OnPoison::SkipKey,
            on_poison => on_poison,
        };
        match on_poison {
            OnPoison::ParkKey => self.put_aside(id, None, &cause),
            OnPoison::SkipKey => self.dead_letter(id, cause),
            OnPoison::BlockKey => self.block(id, &cause),
        }
    }

    /// Whether poison parks its key, and this delivery is still ours.
    fn parks(&self, id: NodeId) -> bool {
        self.runtime.on_poison == OnPoison::ParkKey && !self.is_leaving(id)
    }

    fn dead_letter(&mut self, id: NodeId, cause: Cause) {
        let node = self.keys.get_mut(id);
        node.stage = Stage::DeadLetter(Arc::new(Diagnosis {
            cause,
            attempts: node.failures,
            first_failed: node.first_failed,
        }));
        self.keys.push_ready_first(id);
    }

    /// Lets a delivery hold its key on the broker, and tries again at the longest time there is.
    fn block(&mut self, id: NodeId, cause: &dyn std::fmt::Display) {
        if self.departure(self.keys.get(id).scope.lane()).is_some() {
            return self.drop_node(id);
        }
        let node = self.keys.get_mut(id);
        if !std::mem::replace(&mut node.blocked, true) {
            self.tally.blocked += 1;
            tracing::error!(
                topic = node.scope.message().topic.as_str(),
                partition = node.scope.partition(),
                key = node.scope.message().key.as_ref().map(tracing::field::display),
                cause = %cause,
                "key blocked"
            );
        }
        let longest = self.runtime.settings.retry.longest();
        let random = self.random();
        self.again_after(id, with_jitter(longest.max(Duration::from_secs(1)), random));
    }

    pub(super) fn again(&mut self, id: NodeId) {
        match self.is_leaving(id) {
            true => self.drop_node(id),
            false => self.keys.push_ready(id),
        }
    }

    pub(super) fn again_after(&mut self, id: NodeId, delay: Duration) {
        let due = Instant::now() + delay;
        if self.leaves_before(id, due) {
            return self.drop_node(id);
        }
        if delay.is_zero() {
            return self.keys.push_ready(id);
        }
        let node = self.keys.get_mut(id);
        node.state = NodeState::Waiting;
        let sequence = node.sequence;
        self.timers.push(Reverse((due, id, sequence)));
    }

    #[inline]
    pub(super) fn end_probe(&mut self, id: NodeId, probed: Probed) {
        if std::mem::take(&mut self.keys.get_mut(id).probe) {
            self.runtime.gate.probed(probed);
        }
    }

    pub(super) fn settle(&mut self, id: NodeId) {
        if self.keys.get(id).held.is_some() {
            return self.advance(id);
        }
        let scope = self.remove(id);
        self.settle_scope(scope);
    }

    #[inline]
    pub(super) fn settle_scope(&mut self, scope: Arc<Scope>) {
        let receipt = scope.delivery().receipt;
        self.settled.push(receipt);
        self.recycle(scope);
    }

    pub(super) fn drop_settled(&mut self, id: NodeId) {
        let scope = self.remove(id);
        self.recycle(scope);
    }

    /// Takes out of the queue what is done.
    fn remove(&mut self, id: NodeId) -> Arc<Scope> {
        if self.keys.get(id).blocked {
            self.tally.blocked -= 1;
        }
        self.keys.remove(id)
    }
}
