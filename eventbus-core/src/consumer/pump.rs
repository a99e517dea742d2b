//! Hears the broker: passes deliveries to workers by key and sees to it that lanes are given up.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Runtime;
use super::backoff::Backoff;
use super::departure::Departure;
use super::scope::Skip;
use super::settler::SettleItem;
use super::worker::{Inbox, Item};
use crate::broker::Deliveries;
use crate::coalescer::Coalescer;
use crate::delivery::{Assignment, Delivery, Lane, Signal};
use crate::error::Result;
use crate::key_state::{Claim, HeldName};
use crate::message::Message;
use crate::topic::TopicPartition;

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
    /// Lanes that are being claimed in the store of held keys, and what came on them meanwhile: as
    /// long as it is not known which keys are held, nothing is handled.
    unclaimed: HashMap<Lane, Vec<Delivery>>,
    claims: FuturesUnordered<BoxFuture<'static, Claimed>>,
}

/// What came of claiming a lane.
struct Claimed {
    lane: Lane,
    result: Result<(Claim, Vec<HeldName>)>,
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
            unclaimed: HashMap::new(),
            claims: FuturesUnordered::new(),
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
                Some(claimed) = self.claims.next() => {
                    self.hear_claimed(claimed);
                    continue;
                }
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
        let runtime = Arc::clone(&self.runtime);
        let ending = runtime.ending();
        match signal {
            // The next owner gets them.
            Signal::Delivered(_) if *ending => {}
            Signal::Delivered(deliveries) => return self.deliver(deliveries),
            Signal::Assigned(assignments) => {
                tracing::info!(group = %runtime.group, lanes = assignments.len(), "lanes were assigned");
                self.open
                    .extend(assignments.iter().map(|assignment| assignment.lane));
                self.claim(&assignments);
                self.runtime.lanes.open(assignments);
            }
            Signal::Revoking(lanes) => {
                // The broker counts from when it said so, and the verdicts and the release have to
                // get there in time, too: afterwards the next owner begins.
                let timeout = self.runtime.settings.limits.revoke_timeout;
                let until = Instant::now() + timeout / 10 * 9;
                tracing::info!(group = %runtime.group, lanes = lanes.len(), "lanes are given up");
                self.unclaim(&lanes);
                if let Some(held) = &self.runtime.held {
                    held.leave(&lanes);
                }
                // Some workers may have ended; the others know already what they still handle.
                let workers = if *ending { 0 } else { self.inboxes.len() };
                let departure = Departure::until(&runtime, lanes, until, workers);
                self.leave(departure.with_release(self.settler.clone()));
            }
            Signal::Lost(lanes) => {
                tracing::warn!(group = %self.runtime.group, lanes = lanes.len(), "lanes were lost");
                self.unclaim(&lanes);
                runtime.close_lanes(&lanes);
                self.leave(Departure::lost(&runtime, lanes));
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
        let deliveries = self.keep_unclaimed(deliveries);
        self.pass(deliveries);
        let rate = self
            .runtime
            .replay
            .as_ref()
            .and_then(|replay| replay.rate)?;
        // A batch has far fewer than 2^32 messages.
        Some(Duration::from_secs(1) * count as u32 / rate)
    }

    fn pass(&mut self, deliveries: Vec<Delivery>) {
        if deliveries.is_empty() {
            return;
        }
        match self.inboxes.as_slice() {
            // As they are: a delivery is large to be moved one by one.
            [inbox] => inbox.push(Item::Deliveries(deliveries)),
            _ => self.sort(deliveries),
        }
    }

    /// Claims lanes in the store of held keys.
    fn claim(&mut self, assignments: &[Assignment]) {
        let Some(held) = &self.runtime.held else {
            return;
        };
        for assignment in assignments {
            let lane = assignment.lane;
            let place = TopicPartition::new(assignment.topic.clone(), assignment.partition);
            let (held, runtime) = (Arc::clone(held), Arc::clone(&self.runtime));
            let claim = async move {
                let result = held.claim_place(&runtime.group, &place).await;
                Claimed { lane, result }
            };
            self.unclaimed.insert(lane, Vec::new());
            self.claims.push(Box::pin(claim));
        }
    }

    /// Forgets what came on lanes that leave before they were claimed: it is the next owner's.
    fn unclaim(&mut self, lanes: &[Lane]) {
        for lane in lanes {
            self.unclaimed.remove(lane);
        }
    }

    /// Lets a lane go on that was claimed.
    fn hear_claimed(&mut self, claimed: Claimed) {
        let runtime = Arc::clone(&self.runtime);
        let ending = runtime.ending();
        let Some(deliveries) = self.unclaimed.remove(&claimed.lane) else {
            return;
        };
        match claimed.result {
            Ok((claim, names)) => {
                if let Some(held) = &self.runtime.held {
                    held.open(claimed.lane, claim, names);
                }
                if !*ending {
                    self.pass(deliveries);
                }
            }
            Err(error) => self.runtime.fail(error),
        }
        self.runtime.bus.activity().touch();
    }

    /// Keeps back what is on lanes that are not claimed yet.
    fn keep_unclaimed(&mut self, deliveries: Vec<Delivery>) -> Vec<Delivery> {
        if self.unclaimed.is_empty() {
            return deliveries;
        }
        let mut claimed = Vec::with_capacity(deliveries.len());
        for delivery in deliveries {
            match self.unclaimed.get_mut(&delivery.receipt.lane) {
                Some(kept) => kept.push(delivery),
                None => claimed.push(delivery),
            }
        }
        claimed
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
                passed_over.push(delivery.receipt);
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
            Some(key) => self.runtime.worker_of_key(key, self.inboxes.len()),
            None => {
                self.turn = (self.turn + 1) % self.inboxes.len();
                self.turn
            }
        }
    }

    fn leave(&self, departure: Departure) {
        let departure = Arc::new(departure);
        for inbox in &self.inboxes {
            inbox.push(Item::Leave(Arc::clone(&departure)));
        }
    }
}
