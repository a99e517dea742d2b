//! A member under test that notes what it hears, and a ledger that several of them write.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::future::Future;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use eventbus_core::{
    Assignment, Broker, Deliveries, Delivery, Key, Lane, Member, Position, Receipt, Result,
    Settlement, Signal, Subscription, Topic,
};
use tokio::sync::Notify;

/// Awaits `future`, and panics when it takes longer than `limit`: no test hangs.
///
/// # Panics
///
/// When the time is up.
pub async fn within<F: Future>(limit: Duration, future: F) -> F::Output {
    match tokio::time::timeout(limit, future).await {
        Ok(output) => output,
        Err(_) => panic!("it was not done within {limit:?}"),
    }
}

/// The payload as text.
///
/// # Panics
///
/// When it is not UTF-8.
pub fn text_of(delivery: &Delivery) -> String {
    String::from_utf8(delivery.message.payload.to_vec()).expect("the payload is text")
}

/// A member or reader that notes every signal. Deliveries wait in an inbox until they are
/// [collected](Probe::collect).
///
/// Lanes that are being revoked are released at once, unless it [holds](Probe::holding) them.
#[derive(Debug)]
pub struct Probe {
    deliveries: Box<dyn Deliveries>,
    settlement: Box<dyn Settlement>,
    holds: bool,
    inbox: VecDeque<Delivery>,
    assigned: Vec<Assignment>,
    revoking: Vec<Lane>,
    lost: Vec<Lane>,
    ended: Vec<Lane>,
    gaps: Vec<(Lane, Position, Position)>,
}

impl Probe {
    /// Subscribes.
    ///
    /// # Errors
    ///
    /// Those of the broker.
    pub async fn join(broker: &dyn Broker, subscription: Subscription) -> Result<Self> {
        let member = broker.subscribe(subscription).await?;
        Ok(Self::new(member))
    }

    /// Watches a member.
    #[must_use]
    pub fn new(member: Member) -> Self {
        Self {
            deliveries: member.deliveries,
            settlement: member.settlement,
            holds: false,
            inbox: VecDeque::new(),
            assigned: Vec::new(),
            revoking: Vec::new(),
            lost: Vec::new(),
            ended: Vec::new(),
            gaps: Vec::new(),
        }
    }

    /// Keeps lanes that are being revoked until [`release`](Self::release).
    #[must_use]
    pub fn holding(mut self) -> Self {
        self.holds = true;
        self
    }

    /// The lanes it holds, also those being revoked.
    pub fn assigned(&self) -> &[Assignment] {
        &self.assigned
    }

    /// The lane of a partition that it holds.
    ///
    /// # Panics
    ///
    /// When it does not hold it.
    pub fn lane(&self, topic: &Topic, partition: u32) -> Lane {
        self.assigned
            .iter()
            .find(|found| found.topic == *topic && found.partition == partition)
            .map(|found| found.lane)
            .expect("the partition is assigned to this member")
    }

    /// Lanes whose revocation was announced and that were not released yet.
    pub fn revoking(&self) -> &[Lane] {
        &self.revoking
    }

    /// Lanes that were lost.
    pub fn lost(&self) -> &[Lane] {
        &self.lost
    }

    /// Lanes whose end was reached.
    pub fn ended(&self) -> &[Lane] {
        &self.ended
    }

    /// Gaps that were reported.
    pub fn gaps(&self) -> &[(Lane, Position, Position)] {
        &self.gaps
    }

    /// Deliveries that were heard and not collected.
    pub fn waiting(&self) -> usize {
        self.inbox.len()
    }

    /// Hears one signal and notes it.
    ///
    /// # Cancellation
    ///
    /// Safe where `next` is: a release that was interrupted is made again by the next call.
    ///
    /// # Errors
    ///
    /// Those of `next`, and of releasing.
    ///
    /// # Panics
    ///
    /// When a signal breaks the contract: an empty one, a delivery on a lane that is not assigned
    /// or is being revoked, a lane that is assigned twice.
    pub async fn step(&mut self) -> Result<()> {
        self.give_way().await?;
        match self.deliveries.next().await? {
            Signal::Assigned(lanes) => {
                assert!(!lanes.is_empty(), "an empty `Assigned`");
                for assignment in lanes {
                    let twice = self.assigned.iter().any(|found| {
                        found.lane == assignment.lane
                            || (found.topic == assignment.topic
                                && found.partition == assignment.partition)
                    });
                    assert!(!twice, "assigned although it is held: {assignment:?}");
                    self.assigned.push(assignment);
                }
            }
            Signal::Delivered(batch) => {
                assert!(!batch.is_empty(), "an empty `Delivered`");
                for delivery in &batch {
                    let lane = delivery.receipt.lane;
                    assert!(self.holds_lane(lane), "delivered on {lane:?}, not assigned");
                    assert!(
                        !self.revoking.contains(&lane),
                        "delivered on {lane:?} after `Revoking`"
                    );
                }
                self.inbox.extend(batch);
            }
            Signal::Revoking(lanes) => {
                for lane in &lanes {
                    assert!(self.holds_lane(*lane), "revoking {lane:?}, not assigned");
                }
                self.revoking.extend(lanes);
                self.give_way().await?;
            }
            Signal::Lost(lanes) => {
                self.forget(&lanes);
                self.lost.extend(lanes);
            }
            Signal::Gap { lane, from, to } => {
                assert!(from != to, "an empty gap on {lane:?}");
                self.gaps.push((lane, from, to));
            }
            Signal::Ended(lanes) => {
                for lane in &lanes {
                    assert!(!self.ended.contains(lane), "{lane:?} ended twice");
                }
                self.ended.extend(lanes);
            }
            // A signal of a later version.
            _ => {}
        }
        Ok(())
    }

    /// Hears signals until `condition` holds.
    ///
    /// # Panics
    ///
    /// When `next` fails.
    pub async fn hear_until(&mut self, condition: impl Fn(&Self) -> bool) {
        while !condition(self) {
            self.step().await.expect("the member goes on");
        }
    }

    /// Hears signals until it holds `count` lanes that are not being revoked.
    ///
    /// # Panics
    ///
    /// When `next` fails.
    pub async fn hold(&mut self, count: usize) {
        self.hear_until(|probe| probe.assigned.len() - probe.revoking.len() == count)
            .await;
    }

    /// Takes the next `count` deliveries.
    ///
    /// # Panics
    ///
    /// When `next` fails.
    pub async fn collect(&mut self, count: usize) -> Vec<Delivery> {
        self.hear_until(|probe| probe.inbox.len() >= count).await;
        self.inbox.drain(..count).collect()
    }

    /// Takes the next `count` deliveries as text.
    ///
    /// # Panics
    ///
    /// When `next` fails, or a payload is not text.
    pub async fn collect_texts(&mut self, count: usize) -> Vec<String> {
        self.collect(count).await.iter().map(text_of).collect()
    }

    /// Settles deliveries as done.
    ///
    /// # Panics
    ///
    /// When the broker refuses.
    pub async fn settle<'d>(&mut self, deliveries: impl IntoIterator<Item = &'d Delivery>) {
        let settled: Vec<_> = deliveries
            .into_iter()
            .map(|delivery| delivery.receipt)
            .collect();
        let recorded = self.settle_receipts(&settled).await;
        recorded.expect("settling is recorded");
    }

    /// Settles what these receipts stand for as done.
    ///
    /// # Errors
    ///
    /// Those of the broker.
    pub async fn settle_receipts(&mut self, receipts: &[Receipt]) -> Result<()> {
        self.settlement.settle(receipts).await
    }

    /// Releases lanes and forgets what of them was not collected.
    ///
    /// # Errors
    ///
    /// Those of the broker.
    pub async fn release(&mut self, lanes: &[Lane]) -> Result<()> {
        self.settlement.release(lanes).await?;
        self.forget(lanes);
        Ok(())
    }

    /// Releases what is being revoked, unless it holds such lanes.
    async fn give_way(&mut self) -> Result<()> {
        if self.holds || self.revoking.is_empty() {
            return Ok(());
        }
        let lanes = self.revoking.clone();
        self.release(&lanes).await
    }

    /// Leaves in order.
    ///
    /// # Panics
    ///
    /// When the broker refuses.
    pub async fn close(self) {
        self.deliveries.close().await.expect("a member can leave");
    }

    /// Drops both halves: a crash.
    pub fn crash(self) {
        drop(self);
    }

    /// The two halves, with what was noted forgotten.
    pub fn into_member(self) -> Member {
        Member::new(self.deliveries, self.settlement)
    }

    /// Settles everything it hears and records it, until the ledger is closed; then leaves.
    ///
    /// # Panics
    ///
    /// When the broker fails.
    pub async fn work(mut self, worker: usize, ledger: &Ledger) {
        loop {
            tokio::select! {
                biased;
                () = ledger.closed() => break,
                step = self.step() => step.expect("the member goes on"),
            }
            let batch: Vec<_> = self.inbox.drain(..).collect();
            if batch.is_empty() {
                continue;
            }
            // Recorded first: a message must not be settled before it counts.
            ledger.record(worker, &batch);
            self.settle(&batch).await;
        }
        self.close().await;
    }

    fn holds_lane(&self, lane: Lane) -> bool {
        self.assigned.iter().any(|found| found.lane == lane)
    }

    fn forget(&mut self, lanes: &[Lane]) {
        self.assigned.retain(|found| !lanes.contains(&found.lane));
        self.revoking.retain(|lane| !lanes.contains(lane));
        self.inbox
            .retain(|delivery| !lanes.contains(&delivery.receipt.lane));
    }
}

/// What several workers were given, in the order in which they said so.
#[derive(Debug, Default)]
pub struct Ledger {
    records: Mutex<Vec<Record>>,
    changed: Notify,
    closed: Mutex<bool>,
}

/// One delivery of a [`Ledger`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Record {
    /// Who got it.
    pub worker: usize,
    /// On which topic.
    pub topic: Topic,
    /// With which key.
    pub key: Option<Key>,
    /// Its payload.
    pub text: String,
}

impl Ledger {
    /// An empty ledger.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds deliveries.
    pub fn record(&self, worker: usize, batch: &[Delivery]) {
        lock(&self.records).extend(batch.iter().map(|delivery| Record {
            worker,
            topic: delivery.message.topic.clone(),
            key: delivery.message.key.clone(),
            text: text_of(delivery),
        }));
        self.changed.notify_waiters();
    }

    /// Everything recorded.
    pub fn records(&self) -> Vec<Record> {
        lock(&self.records).clone()
    }

    /// Waits until so many deliveries are recorded.
    pub async fn reaches(&self, count: usize) {
        self.changes_until(|| lock(&self.records).len() >= count)
            .await;
    }

    /// Lets the workers leave.
    pub fn close(&self) {
        *lock(&self.closed) = true;
        self.changed.notify_waiters();
    }

    async fn closed(&self) {
        self.changes_until(|| *lock(&self.closed)).await;
    }

    async fn changes_until(&self, condition: impl Fn() -> bool) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // A change between the look and the wait is not missed.
            changed.as_mut().enable();
            if condition() {
                return;
            }
            changed.await;
        }
    }
}

fn lock<T: Debug>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
