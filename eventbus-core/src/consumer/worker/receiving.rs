//! What a worker is told: what comes is taken in, and scopes are used again.

use std::sync::Arc;
use std::task::Context;

use super::{Item, Worker};
use crate::consumer::dispatch::Layers;
use crate::consumer::scope::Scope;
use crate::delivery::Delivery;

impl<V: Layers> Worker<V> {
    pub(super) fn receive(&mut self, cx: &mut Context<'_>) -> bool {
        let mut received = std::mem::take(&mut self.received);
        let progress = self.inbox.poll_take(cx, &mut received).is_ready();
        for item in received.drain(..) {
            match item {
                Item::Deliveries(deliveries) => self.accept(deliveries),
                Item::Held(held) => self.accept_held(*held),
                Item::Leave(departure) => self.begin_departure(departure),
                Item::Stop => self.stopping = true,
                Item::Wake => self.to_leave = true,
            }
        }
        self.received = received;
        progress
    }

    fn accept(&mut self, mut deliveries: Vec<Delivery>) {
        if !self.departures.is_empty() {
            self.leave_new(&mut deliveries);
        }
        self.place = None;
        match self.incoming.is_empty() {
            // As they are: a delivery is large to be moved one by one.
            true => self.incoming = deliveries.into(),
            false => self.incoming.extend(deliveries),
        }
        if self.runtime.has_groups() {
            // What is to be handled together is looked for in the queue.
            self.queue_incoming();
        }
    }

    /// Leaves what comes on lanes that leave: it has never begun.
    #[cold]
    fn leave_new(&self, deliveries: &mut Vec<Delivery>) {
        deliveries.retain(|delivery| self.departure(delivery.receipt.lane).is_none());
    }

    /// Puts everything that has come into the queue.
    pub(super) fn queue_incoming(&mut self) {
        while let Some(partition) = self.next_partition() {
            self.queue_next(partition);
        }
    }

    pub(super) fn queue_next(&mut self, partition: u32) {
        let mut scope = self.take_scope();
        own(&mut scope).fill(self.incoming.pop_front(), partition);
        let key = self.runtime.key_hash(scope.message());
        self.keys.push(scope, key);
    }

    /// The partition of what has come next; none when there is nothing.
    #[inline]
    pub(super) fn next_partition(&mut self) -> Option<u32> {
        while let Some(delivery) = self.incoming.front() {
            let lane = delivery.receipt.lane;
            // Looked up once for all that come in a row.
            let partition = match self.place {
                Some((known, partition)) if known == lane => partition,
                _ => {
                    let partition = self.runtime.lanes.partition(lane);
                    self.place = Some((lane, partition));
                    partition
                }
            };
            if partition.is_some() {
                return partition;
            }
            // What comes on a lane that is closed already is the next owner's.
            self.incoming.pop_front();
        }
        None
    }

    /// A scope to be filled.
    #[inline]
    pub(super) fn take_scope(&mut self) -> Arc<Scope> {
        let spare = self.pool.pop();
        spare.unwrap_or_else(|| Arc::new(Scope::new(Arc::clone(&self.runtime))))
    }

    #[inline]
    pub(super) fn recycle(&mut self, mut scope: Arc<Scope>) {
        // A context that outlived its handler keeps its scope; a new one is made for the next.
        match Arc::get_mut(&mut scope) {
            Some(inner) => {
                inner.clear();
                self.pool.push(scope);
            }
            // Also where the handler panicked or was dropped, and its run saw no end of it.
            None => {
                scope.end();
                scope.give_up_claim();
            }
        }
    }
}

/// The scope of a delivery that was never started.
#[inline]
pub(super) fn own(scope: &mut Arc<Scope>) -> &mut Scope {
    Arc::get_mut(scope).expect("before a delivery is started its scope is nobody else's")
}
