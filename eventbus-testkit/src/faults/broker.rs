//! A client of the in-memory broker whose calls go wrong as a plan says.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    AdminReply, AdminRequest, Broker, Capabilities, Deliveries, Error, ErrorKind, Group, Lane,
    Member, MemoryBroker, Message, Outcome, PublishError, Publisher, Receipt, Result, Settlement,
    Signal, Subscriber, Subscription, Unpublished,
};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::{Call, Fault, FaultPlan};

/// A client of an in-memory server whose calls go wrong as a [`FaultPlan`] says, until it is
/// [healed](Self::heal). Calls are counted over all clients that [`connect`](Self::connect) makes.
#[derive(Clone, Debug)]
pub struct FaultyBroker {
    inner: MemoryBroker,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    plan: FaultPlan,
    state: Mutex<State>,
    /// Tells that less goes wrong than before.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// How many calls of each kind there were.
    calls: [u64; 4],
    outage_until: Option<Instant>,
    is_healed: bool,
    /// How many faults happened.
    happened: usize,
    /// How many signals are kept back.
    kept_back: usize,
    strangers: JoinSet<()>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A set of plain values: none is half written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call, and says what happens to it.
    ///
    /// # Errors
    ///
    /// The broker is away.
    fn meet(&self, call: Call) -> Result<Option<Fault>> {
        let mut state = self.lock();
        if state.is_healed {
            return Ok(None);
        }
        let count = &mut state.calls[call as usize];
        *count += 1;
        let fault = self.plan.meeting(call, *count);
        state.happened += usize::from(fault.is_some());
        if let Some(Fault::Outage(time)) = fault {
            state.outage_until = Some(Instant::now() + time);
        }
        drop(state);
        self.check_up(call)?;
        Ok(fault)
    }

    fn check_up(&self, call: Call) -> Result<()> {
        let state = self.lock();
        let is_away = state.outage_until.is_some_and(|end| Instant::now() < end);
        match is_away && !state.is_healed {
            true => Err(away(call)),
            false => Ok(()),
        }
    }
}

fn away(call: Call) -> Error {
    Error::new(
        ErrorKind::Unavailable,
        match call {
            Call::Publish => "publish",
            Call::Next => "next",
            Call::Settle => "settle",
            Call::Release => "release",
        },
        "the simulated broker is away, as its plan of faults says",
    )
}

impl FaultyBroker {
    /// A client of `server` for which this goes wrong.
    #[must_use]
    pub fn new(server: MemoryBroker, plan: FaultPlan) -> Self {
        Self {
            inner: server,
            shared: Arc::new(Shared {
                plan,
                state: Mutex::default(),
                changed: Notify::new(),
            }),
        }
    }

    /// Another client of the same server, which meets the faults of the same plan.
    #[must_use]
    pub fn connect(&self) -> Self {
        Self {
            inner: self.inner.connect(),
            shared: Arc::clone(&self.shared),
        }
    }

    /// What goes wrong.
    pub fn plan(&self) -> &FaultPlan {
        &self.shared.plan
    }

    /// How many faults have happened.
    pub fn happened(&self) -> usize {
        self.shared.lock().happened
    }

    /// From now on nothing more goes wrong. What is late comes when it would have.
    pub fn heal(&self) {
        let mut state = self.shared.lock();
        state.is_healed = true;
        state.strangers.abort_all();
        drop(state);
        self.shared.changed.notify_waiters();
    }

    /// Whether no signal is kept back and no stranger is there, so that time alone changes nothing.
    pub(crate) fn is_quiet(&self) -> bool {
        let mut state = self.shared.lock();
        while state.strangers.try_join_next().is_some() {}
        state.kept_back == 0 && state.strangers.is_empty()
    }

    /// Resolves when less may be going wrong than when this future was first polled.
    pub(crate) async fn changed(&self) {
        self.shared.changed.notified().await;
    }

    /// A call without an answer of its own but that it was done.
    async fn call(
        shared: &Shared,
        call: Call,
        done: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        match shared.meet(call)? {
            Some(Fault::Refused | Fault::Unanswered { done: false }) => Err(away(call)),
            Some(Fault::Unanswered { done: true }) => {
                done.await?;
                Err(away(call))
            }
            Some(Fault::Late(by)) => {
                sleep(by).await;
                done.await
            }
            Some(Fault::AnsweredLate(by)) => {
                done.await?;
                sleep(by).await;
                Ok(())
            }
            _ => done.await,
        }
    }
}

#[async_trait]
impl Publisher for FaultyBroker {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        let fault = match self.shared.meet(Call::Publish) {
            Ok(fault) => fault,
            Err(_) => return Err(unpublished(batch, Outcome::NotTaken)),
        };
        match fault {
            Some(Fault::Refused) => Err(unpublished(batch, Outcome::NotTaken)),
            Some(Fault::Unanswered { done: false }) => Err(unpublished(batch, Outcome::Unknown)),
            Some(Fault::Unanswered { done: true }) => {
                self.inner.publish(batch.clone()).await?;
                Err(unpublished(batch, Outcome::Unknown))
            }
            Some(Fault::Partly) => self.publish_partly(batch).await,
            Some(Fault::Twice) => {
                self.inner.publish(batch.clone()).await?;
                self.inner.publish(batch).await
            }
            Some(Fault::Late(by)) => {
                sleep(by).await;
                self.inner.publish(batch).await
            }
            Some(Fault::AnsweredLate(by)) => {
                self.inner.publish(batch).await?;
                sleep(by).await;
                Ok(())
            }
            _ => self.inner.publish(batch).await,
        }
    }
}

impl FaultyBroker {
    /// Takes what stands before the middle and, where the broker does not declare that it pipelines
    /// in order, every second message behind it.
    async fn publish_partly(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        let in_order = self.inner.capabilities().ordered_pipelining;
        let middle = batch.len() / 2;
        let is_taken = |index: usize| index < middle || (!in_order && (index - middle) % 2 == 1);
        let (mut taken, mut refused) = (Vec::new(), Vec::new());
        for (index, message) in batch.into_iter().enumerate() {
            match is_taken(index) {
                true => taken.push(message),
                false => refused.push(refusal(index, message, Outcome::NotTaken)),
            }
        }
        if !taken.is_empty() {
            self.inner.publish(taken).await?;
        }
        match refused.is_empty() {
            true => Ok(()),
            false => Err(PublishError::new(refused)),
        }
    }
}

fn unpublished(batch: Vec<Message>, outcome: Outcome) -> PublishError {
    let messages = batch.into_iter().enumerate();
    let unpublished = messages.map(|(index, message)| refusal(index, message, outcome));
    PublishError::new(unpublished.collect())
}

fn refusal(index: usize, message: Message, outcome: Outcome) -> Unpublished {
    Unpublished::new(index, message, outcome, away(Call::Publish))
}

#[async_trait]
impl Subscriber for FaultyBroker {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        let member = self.inner.subscribe(subscription.clone()).await?;
        Ok(Member::new(
            Box::new(FaultyDeliveries {
                inner: member.deliveries,
                broker: self.clone(),
                subscription,
                kept_back: None,
            }),
            Box::new(FaultySettlement {
                inner: member.settlement,
                shared: Arc::clone(&self.shared),
            }),
        ))
    }
}

#[async_trait]
impl Broker for FaultyBroker {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        self.inner.admin(request).await
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}

#[derive(Debug)]
struct FaultyDeliveries {
    inner: Box<dyn Deliveries>,
    broker: FaultyBroker,
    subscription: Subscription,
    kept_back: Option<KeptBack>,
}

/// What the broker gave and the member has not got. Dropped, it goes to the next owner of its lanes.
#[derive(Debug)]
struct KeptBack {
    signal: Option<Signal>,
    until: Instant,
    shared: Arc<Shared>,
}

impl Drop for KeptBack {
    fn drop(&mut self) {
        self.shared.lock().kept_back -= 1;
        self.shared.changed.notify_waiters();
    }
}

impl FaultyDeliveries {
    fn keep_back(&mut self, signal: Signal, time: Duration) {
        self.broker.shared.lock().kept_back += 1;
        self.kept_back = Some(KeptBack {
            signal: Some(signal),
            until: Instant::now() + time,
            shared: Arc::clone(&self.broker.shared),
        });
    }

    /// Lets a fault happen to a signal; none means that it is kept back.
    fn befall(&mut self, signal: Signal, fault: Fault) -> Result<Option<Signal>> {
        match (fault, &self.subscription.group) {
            (Fault::Refused, _) => {
                self.keep_back(signal, Duration::ZERO);
                Err(away(Call::Next))
            }
            (Fault::Late(by), _) => {
                self.keep_back(signal, by);
                Ok(None)
            }
            (Fault::Lost, Some(group)) => {
                self.broker.inner.lose(group);
                Ok(Some(signal))
            }
            (Fault::Stranger(time), Some(group)) => {
                self.invite(group.clone(), time);
                Ok(Some(signal))
            }
            (Fault::Shuffled, _) => Ok(Some(shuffled(signal))),
            _ => Ok(Some(signal)),
        }
    }

    /// Lets a stranger join for a while.
    fn invite(&self, group: Group, time: Duration) {
        let subscription = Subscription::group(group, self.subscription.topics.clone());
        let subscription = subscription.with_start(self.subscription.start);
        let server = self.broker.inner.clone();
        let shared = Arc::downgrade(&self.broker.shared);
        self.broker.shared.lock().strangers.spawn(async move {
            // Where it is refused, such as by a closed broker, nobody comes.
            if let Ok(member) = server.subscribe(subscription).await {
                sleep(time).await;
                drop(member);
            }
            if let Some(shared) = shared.upgrade() {
                shared.changed.notify_waiters();
            }
        });
    }
}

/// The same messages, the lane that came last first.
fn shuffled(signal: Signal) -> Signal {
    let Signal::Delivered(mut deliveries) = signal else {
        return signal;
    };
    let mut lanes: Vec<Lane> = Vec::new();
    for delivery in &deliveries {
        if !lanes.contains(&delivery.receipt.lane) {
            lanes.insert(0, delivery.receipt.lane);
        }
    }
    let place = |lane: &Lane| lanes.iter().position(|found| found == lane);
    deliveries.sort_by_key(|delivery| place(&delivery.receipt.lane));
    Signal::Delivered(deliveries)
}

#[async_trait]
impl Deliveries for FaultyDeliveries {
    async fn next(&mut self) -> Result<Signal> {
        loop {
            if let Some(kept_back) = &self.kept_back {
                sleep_until(kept_back.until).await;
            }
            self.broker.shared.check_up(Call::Next)?;
            if let Some(mut kept_back) = self.kept_back.take()
                && let Some(signal) = kept_back.signal.take()
            {
                return Ok(signal);
            }
            let signal = self.inner.next().await?;
            let fault = match self.broker.shared.meet(Call::Next) {
                Ok(fault) => fault,
                Err(error) => {
                    self.keep_back(signal, Duration::ZERO);
                    return Err(error);
                }
            };
            let Some(fault) = fault else {
                return Ok(signal);
            };
            if let Some(signal) = self.befall(signal, fault)? {
                return Ok(signal);
            }
        }
    }

    async fn close(self: Box<Self>) -> Result<()> {
        self.inner.close().await
    }
}

#[derive(Debug)]
struct FaultySettlement {
    inner: Box<dyn Settlement>,
    shared: Arc<Shared>,
}

#[async_trait]
impl Settlement for FaultySettlement {
    async fn settle(&mut self, settled: &[Receipt]) -> Result<()> {
        FaultyBroker::call(&self.shared, Call::Settle, self.inner.settle(settled)).await
    }

    async fn release(&mut self, lanes: &[Lane]) -> Result<()> {
        FaultyBroker::call(&self.shared, Call::Release, self.inner.release(lanes)).await
    }
}
