//! Keys that are put aside: messages go into the store of held keys and come back from there.

use std::sync::Arc;
use std::time::Duration;

use super::Worker;
use crate::clock::Timestamp;
use crate::consumer::dispatch::Layers;
use crate::consumer::held::{Held, HeldDelivery};
use crate::consumer::keys::{Keep, NodeId, Stage};
use crate::consumer::scope::Scope;
use crate::dead_letter::{Cause, Diagnosis};
use crate::delivery::Delivery;
use crate::header;
use crate::key_state::{HeldMessage, HeldName, HoldEntry, KeyAction, Wait};

impl<V: Layers> Worker<V> {
    /// Takes in the first message of a held name.
    pub(super) fn accept_held(&mut self, item: HeldDelivery) {
        let HeldDelivery { delivery, held } = item;
        let lane = delivery.receipt.lane;
        let Some(partition) = self.runtime.lanes.partition(lane) else {
            return;
        };
        if self.stopping || self.departure(lane).is_some() {
            // It stays in the store, for the next owner.
            return;
        }
        let key = self.runtime.key_hash(&delivery.message);
        let scope = self.held_scope(delivery, partition);
        let id = self.keys.push(scope, key);
        self.prepare_held(id, held);
    }

    fn held_scope(&mut self, delivery: Delivery, partition: u32) -> Arc<Scope> {
        let mut scope = Scope::new(Arc::clone(&self.runtime));
        scope.fill(Some(delivery), partition);
        Arc::new(scope)
    }

    /// Does with a held message what time or an operator has decided.
    fn prepare_held(&mut self, id: NodeId, held: Held) {
        let node = self.keys.get_mut(id);
        node.alone = true;
        node.failures = held.attempts;
        node.first_failed = held.first_failed;
        let cause = match &held.decision {
            None => None,
            Some(decision) => match decision.action {
                KeyAction::Retry => {
                    node.failures = 0;
                    node.first_failed = None;
                    None
                }
                KeyAction::Release => Some(Cause::Parked {
                    cause: held.cause.clone(),
                    error: held.error.clone(),
                }),
                KeyAction::Discard => Some(Cause::Discarded {
                    by: decision.by.clone(),
                    because: decision.because.clone(),
                    error: held.error.clone(),
                }),
            },
        };
        node.stage = match cause {
            None => Stage::Handle,
            Some(cause) => Stage::DeadLetter(Arc::new(Diagnosis {
                cause,
                attempts: node.failures,
                first_failed: node.first_failed,
            })),
        };
        node.held = Some(Box::new(held));
    }

    /// Whether a delivery from the broker waits behind held ones of its key.
    #[inline]
    pub(super) fn is_put_aside(&self, id: NodeId) -> bool {
        let Some(held) = &self.runtime.held else {
            return false;
        };
        let node = self.keys.get(id);
        node.held.is_none() && held.holds(node.scope.lane(), node.scope.message().key.as_ref())
    }

    /// Puts a delivery aside until its next attempt.
    pub(super) fn delay(&mut self, id: NodeId, delay: Duration, cause: &Cause) {
        let is_held = self.keys.get(id).held.is_some();
        if self.runtime.settings.retry.is_out_of_order() && !is_held && !self.is_leaving(id) {
            self.keys.detach(id);
        } else if self.runtime.held.is_some() {
            let until = self.runtime.bus.clock().now().plus(delay);
            return self.put_aside(id, Some(until), cause);
        } else {
            let scope = &self.keys.get(id).scope;
            tracing::warn!(
                group = %scope.group(),
                event_id = %scope.id(),
                topic = scope.message().topic.as_str(),
                delay = ?delay,
                "an event waits in the consumer, and whatever comes behind it unsettled: a rule delays it, and the bus has no store of held keys"
            );
        }
        self.again_after(id, delay);
    }

    /// Puts a delivery aside, with its key, until a time or until an operator decides.
    pub(super) fn put_aside(&mut self, id: NodeId, until: Option<Timestamp>, cause: &Cause) {
        if self.is_leaving(id) {
            return self.drop_node(id);
        }
        let node = self.keys.get_mut(id);
        let wait = Wait {
            until,
            attempts: node.failures,
            first_failed: node.first_failed,
            cause: cause.name().to_owned(),
            error: cause.to_string(),
        };
        let keep = match &node.held {
            Some(held) => Keep::Wait {
                name: held.name.clone(),
                wait,
                carried_out: held.decision.is_some(),
            },
            None => {
                let message = node.scope.message().clone();
                let name = match &message.key {
                    Some(key) => HeldName::Key(key.clone()),
                    None => HeldName::Message(node.scope.id().clone()),
                };
                Keep::Hold(HoldEntry::new(name, message, node.scope.position(), wait))
            }
        };
        node.stage = Stage::Keep(Arc::new(keep));
        self.keys.push_ready_first(id);
    }

    /// The store of held keys has done what it was to do.
    pub(super) fn kept(&mut self, id: NodeId, first: Option<HeldMessage>) {
        let node = self.keys.get_mut(id);
        let lane = node.scope.lane();
        let stage = std::mem::replace(&mut node.stage, Stage::Handle);
        let (Stage::Keep(keep), Some(held)) = (stage, &self.runtime.held) else {
            return self.again(id);
        };
        match (&*keep, first) {
            (Keep::Hold(entry), _) => {
                held.add(lane, &entry.name);
                self.tally.held += 1;
                if entry.wait.is_parked() {
                    log_parked(&self.keys.get(id).scope, &entry.wait);
                }
                self.settle(id);
            }
            (Keep::Wait { name, wait, .. }, _) => {
                held.rest(lane, name);
                if wait.is_parked() {
                    log_parked(&self.keys.get(id).scope, wait);
                }
                self.drop_settled(id);
            }
            (Keep::Advance { name, .. }, None) => {
                held.free(lane, name);
                self.drop_settled(id);
            }
            (Keep::Advance { name, .. }, Some(first)) => {
                let next = HeldDelivery::new(lane, name.clone(), first);
                self.go_on_with(id, next);
            }
        }
    }

    /// Goes on with the next message of a held name, in the place of the one before.
    fn go_on_with(&mut self, id: NodeId, next: HeldDelivery) {
        let HeldDelivery { delivery, mut held } = next;
        let partition = self.keys.get(id).scope.partition();
        let scope = self.held_scope(delivery, partition);
        let node = self.keys.get_mut(id);
        let done = std::mem::replace(&mut node.scope, scope);
        let decision = node.held.take().and_then(|held| held.decision);
        // What was to be discarded is so to its end; the other decisions were about the first.
        held.decision = decision.filter(|decision| decision.action == KeyAction::Discard);
        self.recycle(done);
        self.prepare_held(id, held);
        self.again(id);
    }

    /// Takes a held message that is done out of its store.
    #[cold]
    pub(super) fn advance(&mut self, id: NodeId) {
        let node = self.keys.get_mut(id);
        let Some(held) = &node.held else { return };
        let (name, number) = (held.name.clone(), held.number);
        node.stage = Stage::Keep(Arc::new(Keep::Advance { name, number }));
        // At once, also where its lane is leaving: it is done, and the next owner is not to do it again.
        match self.slots.has_room() {
            true => self.start_one(id),
            false => self.keys.push_ready_first(id),
        }
    }
}

fn log_parked(scope: &Scope, wait: &Wait) {
    tracing::error!(
        group = %scope.group(),
        id = %scope.id(),
        event_type = scope.message().headers.get_str(header::TYPE),
        topic = scope.message().topic.as_str(),
        partition = scope.partition(),
        key = scope.message().key.as_ref().map(tracing::field::display),
        cause = wait.error,
        "key parked"
    );
}
