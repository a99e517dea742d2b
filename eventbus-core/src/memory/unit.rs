//! A unit of work in memory: business state, inbox and outbox that change together or not at all.

use std::any::Any;
use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::OwnedMutexGuard;

use crate::broker::{Broker, PublishError};
use crate::envelope::EventId;
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::header;
use crate::message::{Group, Message};
use crate::sending::{Turns, repeats_a_key};
use crate::unit_of_work::{Committed, InboxEntry, Unit, UnitOfWork, Work};

/// A database in memory, as a unit of work sees it: the state `T` that handlers change through
/// [`Context::transaction`](crate::Context::transaction), an inbox for each group, and an outbox.
///
/// Clones share the data. One transaction at a time: from `begin` to `commit` nobody else writes.
///
/// ```text
///  begin: lock, copy T ─▶ handlers change the copy ─▶ commit: T, ids and outbox in one step, unlock
///                                                              │
///                              broker ◀── publish, in order ◀──┘ (outside the transaction)
/// ```
///
/// # Contract
///
/// - A commit that fails before it applies leaves no trace; so does work that is dropped.
/// - What a commit publishes goes to the outbox with the state, and to the broker after the
///   transaction, in the order of the commits. While the broker is away it stays in the outbox and
///   the commit reports a retryable error although it has applied: the consumer holds, handles the
///   events again as duplicates, and by that sends what is left. What the broker refuses for good
///   stays in the outbox, too; [`flush`](Self::flush) tells why.
/// - Everything is gone when the last clone is dropped. A process that ends between commit and
///   publish loses state, inbox and outbox alike: unlike in a database, nothing is left to
///   contradict what is on the broker, and the event is handled again.
/// - The inbox of a group remembers the last [`INBOX_MAX`](Self::INBOX_MAX) events.
///
/// # Examples
///
/// ```
/// use eventbus_core::{MemoryBroker, MemoryUnit};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let broker = MemoryBroker::new();
/// let balances = MemoryUnit::new(broker, 0u64).with_group_max(100);
/// assert_eq!(balances.state().await, 0);
/// # });
/// ```
pub struct MemoryUnit<T> {
    group_max: usize,
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    broker: Arc<dyn Broker>,
    store: Arc<tokio::sync::Mutex<Store<T>>>,
    /// Held while the outbox is sent, so that it is sent in order.
    sending: tokio::sync::Mutex<()>,
    faults: Mutex<Faults>,
}

struct Store<T> {
    state: T,
    inboxes: HashMap<Group, Inbox>,
    outbox: VecDeque<Message>,
}

#[derive(Default)]
struct Inbox {
    ids: HashSet<EventId>,
    /// The same ids, oldest first.
    order: VecDeque<EventId>,
}

impl Inbox {
    fn insert(&mut self, id: EventId, ids_max: usize) {
        if self.ids.insert(id.clone()) {
            self.order.push_back(id);
        }
        while self.order.len() > ids_max {
            if let Some(oldest) = self.order.pop_front() {
                self.ids.remove(&oldest);
            }
        }
    }
}

#[derive(Default)]
struct Faults {
    begins: u32,
    commits: u32,
    commit_applies: bool,
}

/// When an injected failure of a commit happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums, reason = "there is no third time")]
pub enum CommitFault {
    /// Nothing was applied.
    Before,
    /// All of it was applied, but the answer was lost.
    After,
}

impl<T: Clone + Send + 'static> MemoryUnit<T> {
    /// How many events the inbox of a group remembers.
    pub const INBOX_MAX: usize = 100_000;

    /// A unit that holds `state` and publishes to `broker`; one event a transaction.
    #[must_use]
    pub fn new(broker: impl Broker, state: T) -> Self {
        Self::on(Arc::new(broker), state)
    }

    /// As [`new`](Self::new), with a broker whose type is known only at run time.
    #[must_use]
    pub fn on(broker: Arc<dyn Broker>, state: T) -> Self {
        let store = Store {
            state,
            inboxes: HashMap::new(),
            outbox: VecDeque::new(),
        };
        Self {
            group_max: 1,
            shared: Arc::new(Shared {
                broker,
                store: Arc::new(tokio::sync::Mutex::new(store)),
                sending: tokio::sync::Mutex::new(()),
                faults: Mutex::new(Faults::default()),
            }),
        }
    }

    /// Sets the most events one transaction holds, at least one.
    #[must_use]
    pub fn with_group_max(mut self, events: usize) -> Self {
        self.group_max = events.max(1);
        self
    }

    /// The state as the last commit left it. Waits for the transaction that is open.
    pub async fn state(&self) -> T {
        self.shared.store.lock().await.state.clone()
    }

    /// How many messages are committed and not on the broker yet.
    pub async fn outbox_len(&self) -> usize {
        self.shared.store.lock().await.outbox.len()
    }

    /// Sends what the outbox holds, in order; every commit does so, too.
    ///
    /// # Cancellation
    ///
    /// What was not acknowledged stays in the outbox and is sent again, with the same ids.
    ///
    /// # Errors
    ///
    /// Those of publishing; what was not taken stays in the outbox.
    pub async fn flush(&self) -> Result<()> {
        self.shared.flush().await.map_err(Error::from)
    }

    /// Lets the next `times` begins fail, as if the database were away. For tests.
    pub fn fail_begin(&self, times: u32) {
        self.shared.faults().begins = times;
    }

    /// Lets the next `times` commits fail. For tests.
    pub fn fail_commit(&self, times: u32, fault: CommitFault) {
        let mut faults = self.shared.faults();
        faults.commits = times;
        faults.commit_applies = fault == CommitFault::After;
    }
}

impl<T> Shared<T> {
    fn faults(&self) -> std::sync::MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Send + 'static> Shared<T> {
    async fn flush(&self) -> Result<(), PublishError> {
        let _sending = self.sending.lock().await;
        let batch: Vec<_> = self.store.lock().await.outbox.iter().cloned().collect();
        if batch.is_empty() {
            return Ok(());
        }
        let count = batch.len();
        let result = self.publish(batch).await;
        // Messages leave the outbox only now: a dropped future has lost none.
        let outbox = &mut self.store.lock().await.outbox;
        outbox.drain(..count);
        let Err(error) = result else { return Ok(()) };
        for unpublished in error.unpublished.iter().rev() {
            outbox.push_front(unpublished.message.clone());
        }
        Err(error)
    }

    /// Publishes so that what has to be sent again does not come behind a later message of its key.
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        if self.broker.capabilities().ordered_pipelining || !repeats_a_key(&batch) {
            return self.broker.publish(batch).await;
        }
        let turns = Turns::new(batch);
        turns.send(|turn| self.broker.publish(turn)).await
    }
}

impl<T> Clone for MemoryUnit<T> {
    fn clone(&self) -> Self {
        Self {
            group_max: self.group_max,
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<T> fmt::Debug for MemoryUnit<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryUnit")
            .field("group_max", &self.group_max)
            .finish_non_exhaustive()
    }
}

impl<T: Send + 'static> Unit for MemoryUnit<T> {
    type Resource = T;
}

#[async_trait]
impl<T: Clone + Send + 'static> UnitOfWork for MemoryUnit<T> {
    fn group_max(&self) -> usize {
        self.group_max
    }

    async fn begin(&self, group: &Group, events: &[InboxEntry]) -> Result<Box<dyn Work>> {
        let store = Arc::clone(&self.shared.store).lock_owned().await;
        {
            let mut faults = self.shared.faults();
            if faults.begins > 0 {
                faults.begins -= 1;
                return Err(away("begin"));
            }
        }
        let mut seen = HashSet::new();
        let duplicates = events
            .iter()
            .map(|event| {
                let inbox = store.inboxes.get(group);
                let handled = inbox.is_some_and(|inbox| inbox.ids.contains(&event.id));
                handled || !seen.insert(event.id.clone())
            })
            .collect();
        Ok(Box::new(MemoryWork {
            shared: Arc::clone(&self.shared),
            state: store.state.clone(),
            store,
            group: group.clone(),
            ids: events.iter().map(|event| event.id.clone()).collect(),
            duplicates,
        }))
    }
}

/// One open transaction.
struct MemoryWork<T> {
    shared: Arc<Shared<T>>,
    /// The lock that makes it the only one.
    store: OwnedMutexGuard<Store<T>>,
    /// What handlers change.
    state: T,
    group: Group,
    ids: Vec<EventId>,
    duplicates: Vec<bool>,
}

impl<T> fmt::Debug for MemoryWork<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryWork")
            .field("group", &self.group)
            .field("ids", &self.ids)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl<T: Clone + Send + 'static> Work for MemoryWork<T> {
    fn is_duplicate(&self, index: usize) -> bool {
        self.duplicates[index]
    }

    async fn transaction(&mut self) -> Result<&mut (dyn Any + Send)> {
        Ok(&mut self.state)
    }

    async fn commit(self: Box<Self>, outgoing: Vec<Message>) -> Result<Committed> {
        let Self {
            shared,
            mut store,
            state,
            group,
            ids,
            ..
        } = *self;
        let fault = {
            let mut faults = shared.faults();
            let fault = faults.commits > 0;
            faults.commits = faults.commits.saturating_sub(1);
            fault.then_some(faults.commit_applies)
        };
        if fault == Some(false) {
            return Err(away("commit"));
        }
        if let Some(later) = outgoing.iter().find(|message| is_for_later(message)) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "commit",
                "a unit of work in memory sends what it commits at once: schedule in one with an outbox, or from a consumer without a unit",
            )
            .with("topic", &later.topic));
        }
        store.state = state;
        let inbox = store.inboxes.entry(group).or_default();
        for id in ids {
            inbox.insert(id, MemoryUnit::<T>::INBOX_MAX);
        }
        store.outbox.extend(outgoing);
        // The transaction ends here: nothing is published while it is open.
        drop(store);
        if fault.is_some() {
            return Err(away("commit"));
        }
        match shared.flush().await {
            Ok(()) => Ok(Committed::SettleNext),
            Err(error) if error.is_retryable() => Err(error.into()),
            Err(error) => {
                tracing::error!(error = %error, "the broker refuses what was committed: it stays in the outbox");
                Ok(Committed::SettleNext)
            }
        }
    }

    async fn roll_back(self: Box<Self>, _error: Option<&BoxError>) -> Result<()> {
        Ok(())
    }
}

fn is_for_later(message: &Message) -> bool {
    message.headers.get(header::NOT_BEFORE).is_some()
}

fn away(operation: &'static str) -> Error {
    Error::new(
        ErrorKind::Unavailable,
        operation,
        "the store is away, as a test asked for",
    )
}
