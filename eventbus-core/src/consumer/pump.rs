//! Hears the broker: passes deliveries to workers by key and sees to it that lanes are given up.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::Runtime;
use super::backoff::Backoff;
use super::scope::Skip;
use super::settler::SettleItem;
use super::worker::{Inbox, Item, Revocation};
use crate::broker::Deliveries;
use crate::coalescer::Coalescer;
use crate::delivery::{Delivery, Lane, Signal, Verdict};
use crate::error::Result;
use crate::message::Message;

/// Hears the broker; one task.
pub(crate) struct Pump {
    runtime: Arc<Runtime>,
    inboxes: Vec<Arc<Inbox>>,
    settler: Coalescer<SettleItem>,
    /// Told when a bounded read has delivered everything.
    ended: watch::Sender<bool>,
    /// For each worker, what the present signal brings it.
    sorted: Vec<Vec<Delivery>>,
    /// The next worker for messages without a key.
    turn: usize,
    /// Lanes of a bounded read that have not ended.
    open: Vec<Lane>,
}

impl Pump {
    pub(crate) fn new(
        runtime: Arc<Runtime>,
        inboxes: Vec<Arc<Inbox>>,
        settler: Coalescer<SettleItem>,
        ended: watch::Sender<bool>,
    ) -> Self {
        Self {
            sorted: inboxes.iter().map(|_| Vec::new()).collect(),
            runtime,
            inboxes,
            settler,
            ended,
            turn: 0,
            open: Vec::new(),
        }
    }

    /// Hears until `stop` turns true, then gives the receiving half back to be closed.
    ///
    /// # Errors
    ///
    /// What the broker said cannot be mended by trying again.
    pub(crate) async fn run(
        mut self,
        mut deliveries: Box<dyn Deliveries>,
        mut stop: watch::Receiver<bool>,
    ) -> (Box<dyn Deliveries>, Result<()>) {
        let mut backoff = Backoff::new();
        loop {
            let signal = tokio::select! {
                signal = deliveries.next() => signal,
                _ = stop.wait_for(|stop| *stop) => return (deliveries, Ok(())),
            };
            let pause = match signal {
                Ok(signal) => {
                    backoff.reset();
                    self.hear(signal)
                }
                Err(error) if error.is_retryable() => {
                    tracing::warn!(group = %self.runtime.group, error = %error, "the broker is asked again");
                    Some(backoff.next())
                }
                Err(error) => return (deliveries, Err(error)),
            };
            // A test that waits for quiet looks again.
            self.runtime.bus.activity().touch();
            if let Some(pause) = pause {
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    _ = stop.wait_for(|stop| *stop) => return (deliveries, Ok(())),
                }
            }
        }
    }

    /// Passes a signal on and says how long to wait before the next one.
    fn hear(&mut self, signal: Signal) -> Option<Duration> {
        match signal {
            Signal::Delivered(deliveries) => return self.deliver(deliveries),
            Signal::Assigned(assignments) => {
                self.open
                    .extend(assignments.iter().map(|assignment| assignment.lane));
                self.runtime.lanes.open(assignments);
            }
            Signal::Revoking(lanes) => {
                // The broker counts from when it said so, and the verdicts and the release have to
                // get there in time, too: afterwards the next owner begins.
                let timeout = self.runtime.settings.limits.revoke_timeout;
                let until = Instant::now() + timeout / 10 * 9;
                self.revoke(lanes, Some(until));
            }
            Signal::Lost(lanes) => {
                tracing::warn!(group = %self.runtime.group, lanes = lanes.len(), "lanes were lost");
                self.runtime.lanes.close(&lanes);
                self.revoke(lanes, None);
            }
            Signal::Gap { lane, from, to } => {
                self.runtime.telemetry.gap();
                tracing::error!(
                    group = %self.runtime.group,
                    lane = lane.id,
                    %from,
                    %to,
                    "messages vanished before they were read"
                );
            }
            Signal::Ended(lanes) => {
                self.open.retain(|lane| !lanes.contains(lane));
                if self.open.is_empty() {
                    self.ended.send_replace(true);
                }
            }
        }
        None
    }

    fn deliver(&mut self, deliveries: Vec<Delivery>) -> Option<Duration> {
        let count = deliveries.len();
        self.runtime.telemetry.delivered(count);
        let deliveries = self.pass_over_other_keys(deliveries);
        self.runtime.lanes.delivered(&deliveries);
        match self.inboxes.as_slice() {
            // As they are: a delivery is large to be moved one by one.
            [inbox] => inbox.push(Item::Deliveries(deliveries)),
            _ => self.sort(deliveries),
        }
        let rate = self
            .runtime
            .replay
            .as_ref()
            .and_then(|replay| replay.rate)?;
        // A batch has far fewer than 2^32 messages.
        Some(Duration::from_secs(1) * count as u32 / rate)
    }

    /// In a replay of one key, settles deliveries of others.
    fn pass_over_other_keys(&self, mut deliveries: Vec<Delivery>) -> Vec<Delivery> {
        let replay = self.runtime.replay.as_ref();
        let Some(key_wanted) = replay.and_then(|replay| replay.key.as_ref()) else {
            return deliveries;
        };
        let mut passed_over = Vec::new();
        deliveries.retain(|delivery| {
            let wanted = delivery.message.key.as_ref() == Some(key_wanted);
            if !wanted {
                passed_over.push((delivery.receipt, Verdict::Done));
            }
            wanted
        });
        if !passed_over.is_empty() {
            let telemetry = &self.runtime.telemetry;
            telemetry.skipped(Skip::OtherKey, passed_over.len());
            self.settler.add(SettleItem::Settled(passed_over));
        }
        deliveries
    }

    /// Gives each worker what is its own.
    fn sort(&mut self, deliveries: Vec<Delivery>) {
        let share = deliveries.len().div_ceil(self.inboxes.len());
        for delivery in deliveries {
            let worker = self.worker_of(&delivery.message);
            let sorted = &mut self.sorted[worker];
            if sorted.capacity() == 0 {
                sorted.reserve(share);
            }
            sorted.push(delivery);
        }
        for (inbox, sorted) in self.inboxes.iter().zip(&mut self.sorted) {
            if !sorted.is_empty() {
                inbox.push(Item::Deliveries(std::mem::take(sorted)));
            }
        }
    }

    fn worker_of(&mut self, message: &Message) -> usize {
        match &message.key {
            // The low bits choose among a worker's keys; these are independent of them.
            Some(key) => (self.runtime.hash_key(key) >> 32) as usize % self.inboxes.len(),
            None => {
                self.turn = (self.turn + 1) % self.inboxes.len();
                self.turn
            }
        }
    }

    fn revoke(&self, lanes: Vec<Lane>, finish_until: Option<Instant>) {
        let revocation = Revocation::new(
            lanes,
            finish_until,
            self.inboxes.len(),
            self.settler.clone(),
        );
        for inbox in &self.inboxes {
            inbox.push(Item::Revoke(Arc::clone(&revocation)));
        }
    }
}
