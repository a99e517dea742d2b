//! Stores with a bug: outbox, leases, held keys, schedule, duplicate window.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    Claim, ClaimEvents, Due, DuplicateStore, EventClaim, EventId, Group, HeldMessage, HeldName,
    HeldPlace, HeldReport, HoldEntry, KeyDecision, KeyStateDesk, KeyStateStore, Lease, LeaseReply,
    LeaseRequest, LeaseStore, MemberId, MemoryDuplicates, OutboxDepth, OutboxMessage, OutboxStore,
    Refused, Result, ScheduleStore, Scheduled, ScheduledReport, TakeScheduled, Taken, Timestamp,
    TopicPartition, Wait,
};

use super::{Bed, Plant};
use crate::stores::Stores;

/// The stores of a run with the bug of a [`Bed`], if that is one of theirs.
#[derive(Clone, Debug)]
pub(crate) struct PlantedStores {
    inner: Stores,
    bed: Bed,
    /// The last position of an outbox that was seen.
    seen: Arc<AtomicU64>,
    /// How far an answer of `next` went.
    read: Arc<AtomicU64>,
}

impl PlantedStores {
    pub(crate) fn new(inner: Stores, bed: Bed) -> Self {
        Self {
            inner,
            bed,
            seen: Arc::default(),
            read: Arc::default(),
        }
    }
}

#[async_trait]
impl OutboxStore for PlantedStores {
    async fn next(
        &self,
        lanes: &[u32],
        messages_max: usize,
        except: &[u64],
    ) -> Result<Vec<OutboxMessage>> {
        let bed = &self.bed;
        let mut rows = match bed.has(Plant::PublishesUncommitted) {
            true => {
                let rows = self.inner.outbox.next(lanes, messages_max, except);
                rows.await?
            }
            false => self.inner.next(lanes, messages_max, except).await?,
        };
        if bed.has(Plant::SkipsLateCommits) {
            let seen = self.seen.load(Ordering::SeqCst);
            rows.retain(|row| row.position > seen);
        }
        if bed.has(Plant::ReadsBackwards) {
            rows.reverse();
        }
        let positions: Vec<u64> = rows.iter().map(|row| row.position).collect();
        if bed.has(Plant::RemovesFirst) {
            self.inner.outbox.remove(&positions).await?;
        }
        let last = positions.iter().copied().max().unwrap_or(0);
        self.read.fetch_max(last, Ordering::SeqCst);
        Ok(rows)
    }

    async fn remove(&self, positions: &[u64]) -> Result<()> {
        let bed = &self.bed;
        let mut positions = positions.to_vec();
        let last = positions.iter().copied().max().unwrap_or(0);
        self.seen.fetch_max(last, Ordering::SeqCst);
        if bed.strikes_once(Plant::RemovesNothing) {
            return Ok(());
        }
        if bed.has(Plant::RemovesOneMore) {
            positions.push(last + 1);
        }
        if bed.has(Plant::RemovesAll) {
            positions.extend(1..=self.read.load(Ordering::SeqCst));
        }
        self.inner.remove(&positions).await
    }

    async fn appended(&self) {
        self.inner.appended().await;
    }

    async fn depth(&self) -> Result<OutboxDepth> {
        self.inner.depth().await
    }
}

#[async_trait]
impl LeaseStore for PlantedStores {
    async fn exchange(&self, request: &LeaseRequest) -> Result<LeaseReply> {
        let mut reply = self.inner.exchange(request).await?;
        if self.bed.has(Plant::GrantsToAll) {
            for member in &mut reply.members {
                if member.id == request.member {
                    member.leases = grants(request);
                }
            }
        }
        Ok(reply)
    }

    async fn leave(&self, group: &Group, member: MemberId) -> Result<()> {
        self.inner.leave(group, member).await
    }

    async fn changed(&self, group: &Group) {
        LeaseStore::changed(&self.inner, group).await;
    }
}

/// All there is.
fn grants(request: &LeaseRequest) -> Vec<Lease> {
    let topics = request.topics.iter();
    topics
        .flat_map(|topic| {
            let places = (0..topic.partitions).map(|partition| {
                let place = TopicPartition::new(topic.name.clone(), partition);
                Lease { place, epoch: 1 }
            });
            places.collect::<Vec<_>>()
        })
        .collect()
}

#[async_trait]
impl KeyStateDesk for PlantedStores {
    async fn list(
        &self,
        group: &Group,
        after: Option<&HeldPlace>,
        names_max: usize,
    ) -> Result<Vec<HeldReport>> {
        KeyStateDesk::list(&self.inner, group, after, names_max).await
    }

    async fn messages(
        &self,
        group: &Group,
        held: &HeldPlace,
        after: Option<u64>,
        messages_max: usize,
    ) -> Result<Vec<HeldMessage>> {
        self.inner.messages(group, held, after, messages_max).await
    }

    async fn decide(
        &self,
        group: &Group,
        held: &HeldPlace,
        decision: &KeyDecision,
    ) -> Result<bool> {
        self.inner.decide(group, held, decision).await
    }
}

#[async_trait]
impl KeyStateStore for PlantedStores {
    async fn claim(&self, group: &Group, place: &TopicPartition) -> Result<(Claim, Vec<HeldName>)> {
        self.inner.claim(group, place).await
    }

    async fn hold(&self, claim: &Claim, entries: &[HoldEntry]) -> Result<()> {
        let mut entries = entries.to_vec();
        if self.bed.has(Plant::HoldsOnlyFirst) {
            let held = KeyStateDesk::list(&self.inner, &claim.group, None, usize::MAX).await?;
            let mut known: Vec<_> = held.into_iter().map(|report| report.held.name).collect();
            entries.retain(|entry| {
                let is_new = !known.contains(&entry.name);
                known.push(entry.name.clone());
                is_new
            });
        }
        self.inner.hold(claim, &entries).await
    }

    async fn advance(
        &self,
        claim: &Claim,
        name: &HeldName,
        done: Option<u64>,
    ) -> Result<Option<HeldMessage>> {
        let mut next = self.inner.advance(claim, name, done).await?;
        while self.bed.has(Plant::FreesHeldKeys)
            && done.is_some()
            && let Some(behind) = &next
        {
            let number = Some(behind.number);
            next = self.inner.advance(claim, name, number).await?;
        }
        Ok(next)
    }

    async fn wait(
        &self,
        claim: &Claim,
        name: &HeldName,
        wait: &Wait,
        carried_out: bool,
    ) -> Result<()> {
        self.inner.wait(claim, name, wait, carried_out).await
    }

    async fn due(
        &self,
        group: &Group,
        claims: &[Claim],
        now: Timestamp,
        names_max: usize,
    ) -> Result<Due> {
        self.inner.due(group, claims, now, names_max).await
    }

    async fn decided(&self, group: &Group, seen: u64) {
        self.inner.decided(group, seen).await;
    }
}

#[async_trait]
impl ScheduleStore for PlantedStores {
    async fn add(&self, messages: &[Scheduled]) -> Result<()> {
        self.inner.add(messages).await
    }

    async fn cancel(&self, id: &EventId) -> Result<bool> {
        self.inner.cancel(id).await
    }

    async fn take(&self, request: &TakeScheduled) -> Result<Taken> {
        let taken = self.inner.take(request).await?;
        if self.bed.has(Plant::TakesForGood) {
            let ids: Vec<_> = taken.messages.iter().map(|one| one.id.clone()).collect();
            let nothing = Refused {
                ids: Vec::new(),
                unknown: Vec::new(),
                again: request.now,
            };
            self.inner.done(taken.claim, &ids, &nothing).await?;
        }
        Ok(taken)
    }

    async fn done(&self, claim: u64, published: &[EventId], refused: &Refused) -> Result<()> {
        if self.bed.has(Plant::TakesForGood) {
            return Ok(());
        }
        let published = match self.bed.strikes_once(Plant::FiresTwice) {
            true => &[],
            false => published,
        };
        self.inner.done(claim, published, refused).await
    }

    async fn list(
        &self,
        after: Option<&ScheduledReport>,
        reports_max: usize,
    ) -> Result<Vec<ScheduledReport>> {
        ScheduleStore::list(&self.inner, after, reports_max).await
    }

    async fn changed(&self, seen: u64) {
        ScheduleStore::changed(&self.inner, seen).await;
    }
}

/// What a duplicate window remembers, with the bug of a [`Bed`], if that is one of its.
#[derive(Clone, Debug)]
pub(crate) struct PlantedDuplicates {
    inner: MemoryDuplicates,
    bed: Bed,
}

impl PlantedDuplicates {
    pub(crate) fn new(bed: Bed) -> Self {
        Self {
            inner: MemoryDuplicates::new(),
            bed,
        }
    }
}

#[async_trait]
impl DuplicateStore for PlantedDuplicates {
    async fn claim(&self, request: &ClaimEvents) -> Result<Vec<EventClaim>> {
        let claims = self.inner.claim(request).await?;
        if self.bed.has(Plant::MarksFirst) {
            let day = Duration::from_secs(24 * 60 * 60);
            let marked = self.inner.mark_handled(&request.group, &request.ids, day);
            marked.await?;
        }
        Ok(claims)
    }

    async fn mark_handled(&self, group: &Group, ids: &[EventId], window: Duration) -> Result<()> {
        let window = match self.bed.has(Plant::ShortWindow) {
            true => Duration::from_millis(1),
            false => window,
        };
        self.inner.mark_handled(group, ids, window).await
    }

    async fn release(&self, group: &Group, member: MemberId, ids: &[EventId]) -> Result<()> {
        self.inner.release(group, member, ids).await
    }
}
