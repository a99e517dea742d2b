//! The stores of a run: an outbox whose transactions stay open for a while, leases, held keys and a
//! schedule, which are away, late, or do not answer when the case says so.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    Claim, Clock, Due, Error, ErrorKind, EventId, Group, HeldMessage, HeldName, HeldPlace,
    HeldReport, HoldEntry, KeyDecision, KeyStateDesk, KeyStateStore, LeaseReply, LeaseRequest,
    LeaseStore, MemberId, MemoryKeyState, MemoryLeases, MemoryOutbox, MemorySchedule, Message,
    OUTBOX_LANES, OutboxDepth, OutboxMessage, OutboxStore, Refused, Result, ScheduleStore,
    Scheduled, ScheduledReport, TakeScheduled, Taken, Timestamp, TopicPartition, Wait,
};
use eventbus_verify::{Entry, Operation, Phase};
use tokio::time::{Instant, sleep};

use crate::event;
use crate::world::Books;

/// How long every call is late, once that begins.
const LATE_FOR: Duration = Duration::from_secs(3);

/// One database, as far as the SDK looks into it. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Stores {
    pub(crate) outbox: MemoryOutbox,
    leases: MemoryLeases,
    held: MemoryKeyState,
    schedule: MemorySchedule,
    books: Books,
    /// Which process uses it, in the ledger.
    process: u32,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Positions that open transactions wrote.
    uncommitted: Vec<u64>,
    trouble: Trouble,
}

#[derive(Debug, Default)]
struct Trouble {
    away_until: Option<Instant>,
    late_by: Duration,
    late_until: Option<Instant>,
    unanswered: u32,
}

/// A transaction that wrote to the outbox, and is open.
#[derive(Debug)]
pub(crate) struct Open {
    positions: Vec<u64>,
}

impl Stores {
    pub(crate) fn new(clock: Arc<dyn Clock>, books: Books) -> Self {
        Self {
            outbox: MemoryOutbox::with_clock(Arc::clone(&clock)),
            leases: MemoryLeases::new(),
            held: MemoryKeyState::with_clock(clock),
            schedule: MemorySchedule::new(),
            books,
            process: 0,
            shared: Arc::default(),
        }
    }

    /// The same database, as another process uses it.
    pub(crate) fn used_by(&self, process: u32) -> Self {
        Self {
            process,
            ..self.clone()
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn be_away(&self, time: Duration) {
        self.lock().trouble.away_until = Some(Instant::now() + time);
    }

    pub(crate) fn be_late(&self, by: Duration) {
        let trouble = &mut self.lock().trouble;
        trouble.late_by = by;
        trouble.late_until = Some(Instant::now() + LATE_FOR);
    }

    pub(crate) fn leave_unanswered(&self, calls: u32) {
        self.lock().trouble.unanswered = calls;
    }

    pub(crate) fn heal(&self) {
        self.lock().trouble = Trouble::default();
    }

    /// Makes a call with the trouble there is.
    async fn call<T>(&self, done: impl Future<Output = Result<T>>) -> Result<T> {
        let (late_by, unanswered) = {
            let mut shared = self.lock();
            let trouble = &mut shared.trouble;
            let now = Instant::now();
            if trouble.away_until.is_some_and(|until| now < until) {
                return Err(away());
            }
            let is_late = trouble.late_until.is_some_and(|until| now < until);
            let unanswered = trouble.unanswered > 0;
            trouble.unanswered = trouble.unanswered.saturating_sub(1);
            (is_late.then_some(trouble.late_by), unanswered)
        };
        let answer = done.await;
        if let Some(by) = late_by {
            sleep(by).await;
        }
        match unanswered {
            true => Err(away()),
            false => answer,
        }
    }

    /// Writes messages in a transaction that is open then.
    pub(crate) async fn append(&self, messages: Vec<(EventId, Message)>) -> Result<Open> {
        let ids: Vec<_> = messages.iter().map(|(id, _)| id.clone()).collect();
        self.outbox.append(messages)?;
        let rows = self.rows().await?;
        let ours = rows.iter().filter(|row| ids.contains(&row.id));
        let positions: Vec<u64> = ours.map(|row| row.position).collect();
        self.lock().uncommitted.extend(&positions);
        Ok(Open { positions })
    }

    pub(crate) fn commit(&self, open: &Open) -> Result<()> {
        self.forget(open);
        // Tells that there is something to publish.
        self.outbox.append(Vec::new())
    }

    pub(crate) async fn roll_back(&self, open: &Open) -> Result<()> {
        self.outbox.remove(&open.positions).await?;
        self.forget(open);
        Ok(())
    }

    fn forget(&self, open: &Open) {
        let mut shared = self.lock();
        shared
            .uncommitted
            .retain(|position| !open.positions.contains(position));
    }

    /// All rows of the outbox, committed or not.
    pub(crate) async fn rows(&self) -> Result<Vec<OutboxMessage>> {
        let lanes: Vec<u32> = (0..OUTBOX_LANES).collect();
        self.outbox.next(&lanes, 1_000_000, &[]).await
    }

    /// How many events wait for their time.
    pub(crate) async fn scheduled(&self) -> Result<usize> {
        Ok(self.schedule.list(None, 1_000_000).await?.len())
    }
}

fn away() -> Error {
    Error::new(
        ErrorKind::Unavailable,
        "ask the simulated database",
        "it is away, as the case says",
    )
}

#[async_trait]
impl OutboxStore for Stores {
    async fn next(
        &self,
        lanes: &[u32],
        messages_max: usize,
        except: &[u64],
    ) -> Result<Vec<OutboxMessage>> {
        let mut hidden = self.lock().uncommitted.clone();
        hidden.extend(except);
        let next = self.outbox.next(lanes, messages_max, &hidden);
        self.call(next).await
    }

    async fn remove(&self, positions: &[u64]) -> Result<()> {
        self.call(self.outbox.remove(positions)).await
    }

    async fn appended(&self) {
        self.outbox.appended().await;
    }

    async fn depth(&self) -> Result<OutboxDepth> {
        self.call(self.outbox.depth()).await
    }
}

#[async_trait]
impl LeaseStore for Stores {
    async fn exchange(&self, request: &LeaseRequest) -> Result<LeaseReply> {
        self.call(self.leases.exchange(request)).await
    }

    async fn leave(&self, group: &Group, member: MemberId) -> Result<()> {
        self.call(self.leases.leave(group, member)).await
    }

    async fn changed(&self, group: &Group) {
        self.leases.changed(group).await;
    }
}

#[async_trait]
impl KeyStateDesk for Stores {
    async fn list(
        &self,
        group: &Group,
        after: Option<&HeldPlace>,
        names_max: usize,
    ) -> Result<Vec<HeldReport>> {
        self.call(self.held.list(group, after, names_max)).await
    }

    async fn messages(
        &self,
        group: &Group,
        held: &HeldPlace,
        after: Option<u64>,
        messages_max: usize,
    ) -> Result<Vec<HeldMessage>> {
        let messages = self.held.messages(group, held, after, messages_max);
        self.call(messages).await
    }

    async fn decide(
        &self,
        group: &Group,
        held: &HeldPlace,
        decision: &KeyDecision,
    ) -> Result<bool> {
        self.call(self.held.decide(group, held, decision)).await
    }
}

#[async_trait]
impl KeyStateStore for Stores {
    async fn claim(&self, group: &Group, place: &TopicPartition) -> Result<(Claim, Vec<HeldName>)> {
        self.call(self.held.claim(group, place)).await
    }

    async fn hold(&self, claim: &Claim, entries: &[HoldEntry]) -> Result<()> {
        let group = Books::group_of(claim.group.as_str());
        let session = self.books.work.session();
        let note = |phase| {
            for entry in entries {
                if let Some((stamp, _)) = event::read(&entry.message) {
                    let journal = self.books.of(entry.message.topic.as_str());
                    let entry = Entry::of(Operation::Park, stamp).with_group(group);
                    journal.note(self.process, session, phase, entry);
                }
            }
        };
        note(Phase::Invoke);
        let result = self.call(self.held.hold(claim, entries)).await;
        note(match &result {
            Ok(()) => Phase::Ok,
            Err(_) => Phase::Unknown,
        });
        result
    }

    async fn advance(
        &self,
        claim: &Claim,
        name: &HeldName,
        done: Option<u64>,
    ) -> Result<Option<HeldMessage>> {
        self.call(self.held.advance(claim, name, done)).await
    }

    async fn wait(
        &self,
        claim: &Claim,
        name: &HeldName,
        wait: &Wait,
        carried_out: bool,
    ) -> Result<()> {
        let waited = self.held.wait(claim, name, wait, carried_out);
        self.call(waited).await
    }

    async fn due(
        &self,
        group: &Group,
        claims: &[Claim],
        now: Timestamp,
        names_max: usize,
    ) -> Result<Due> {
        self.call(self.held.due(group, claims, now, names_max))
            .await
    }

    async fn decided(&self, group: &Group, seen: u64) {
        self.held.decided(group, seen).await;
    }
}

#[async_trait]
impl ScheduleStore for Stores {
    async fn add(&self, messages: &[Scheduled]) -> Result<()> {
        self.call(self.schedule.add(messages)).await
    }

    async fn cancel(&self, id: &EventId) -> Result<bool> {
        self.call(self.schedule.cancel(id)).await
    }

    async fn take(&self, request: &TakeScheduled) -> Result<Taken> {
        self.call(self.schedule.take(request)).await
    }

    async fn done(&self, claim: u64, published: &[EventId], refused: &Refused) -> Result<()> {
        let done = self.schedule.done(claim, published, refused);
        self.call(done).await
    }

    async fn list(
        &self,
        after: Option<&ScheduledReport>,
        reports_max: usize,
    ) -> Result<Vec<ScheduledReport>> {
        self.call(self.schedule.list(after, reports_max)).await
    }

    async fn changed(&self, seen: u64) {
        ScheduleStore::changed(&self.schedule, seen).await;
    }
}
