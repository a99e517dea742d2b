//! One member of a group that shares places by leases: renews them in time, keeps to its share and
//! tells its owner. What it believes is in `book.rs`.

use std::hash::{BuildHasher, RandomState};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use super::book::Book;
use super::{Lease, LeaseMember, LeaseReply, LeaseRequest, LeaseStore, LeaseTopic, MemberId};
use crate::clock::FOREVER;
use crate::error::{Error, ErrorKind, Result};
use crate::message::Group;
use crate::retry::with_jitter;
use crate::topic::TopicPartition;

/// What a member shares, and how long it may be silent.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LeaseConfig {
    /// The group whose members share the places.
    pub group: Group,
    /// What this member can read.
    pub topics: Vec<LeaseTopic>,
    /// How long after its last sign of life a member that died holds others up. Leases are renewed
    /// three times in it, so it has to be several times what an exchange with the store takes.
    pub ttl: Duration,
    /// How long a place may be kept after `Revoking`.
    pub revoke_timeout: Duration,
}

impl LeaseConfig {
    /// A member of `group` that reads `topics`, with a `ttl` of 10 seconds and a `revoke_timeout`
    /// of 5.
    #[must_use]
    pub fn new(group: Group, topics: Vec<LeaseTopic>) -> Self {
        Self {
            group,
            topics,
            ttl: Duration::from_secs(10),
            revoke_timeout: Duration::from_secs(5),
        }
    }

    /// Sets how long a member that died holds others up, at least a millisecond.
    #[must_use]
    pub fn with_ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl.max(Duration::from_millis(1));
        self
    }

    /// Sets how long a place may be kept after `Revoking`.
    #[must_use]
    pub fn with_revoke_timeout(mut self, timeout: Duration) -> Self {
        self.revoke_timeout = timeout;
        self
    }

    /// How long an exchange may take: another one, and a third, fit into the time that is left.
    fn patience(&self) -> Duration {
        self.ttl / 3
    }
}

/// What [`Leaseholder::next`] tells.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeaseSignal {
    /// These are ours from now on.
    Granted(Vec<Lease>),
    /// Still ours: stop what runs there, then [`release`](HeldLeases::release) them.
    Revoking(Vec<TopicPartition>),
    /// Gone already: not renewed or not released in time. Stop at once.
    Lost(Vec<TopicPartition>),
}

/// A member that holds its even share of a group's places.
///
/// A task of its own renews the leases, so that they last while the owner is busy or finishes what
/// runs; it ends with this handle. The owner's receiving half waits for [`next`](Self::next) beside
/// its log, the answering half has the [`HeldLeases`].
///
/// # Contract
///
/// - Shares are even, to within one place among members that read the same topics, as soon as
///   every member has heard of a change: within moments where the store says
///   [`changed`](LeaseStore::changed), otherwise within a third of `ttl`.
/// - What it believes to hold ends by its own clock before the store gives it to another. That
///   clock stands still while the machine sleeps: what is written needs the fencing epoch beside.
/// - Members of this machine whose processes are gone are not waited for.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use eventbus_core::{Group, LeaseConfig, LeaseSignal, LeaseTopic, Leaseholder, MemoryLeases, Topic};
///
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// let orders = LeaseTopic { name: Topic::from_static("orders"), partitions: 4 };
/// let config = LeaseConfig::new(Group::from_static("payments"), vec![orders]);
/// let mut leaseholder = Leaseholder::join(Arc::new(MemoryLeases::new()), config);
/// let LeaseSignal::Granted(leases) = leaseholder.next().await? else { unreachable!() };
/// assert_eq!(leases.len(), 4);
/// assert_eq!(leaseholder.held().epoch(&leases[0].place), Some(leases[0].epoch));
/// leaseholder.close().await?;
/// # Ok::<(), eventbus_core::Error>(())
/// # }).unwrap();
/// ```
#[derive(Debug)]
pub struct Leaseholder {
    held: HeldLeases,
    task: JoinHandle<Result<()>>,
}

impl Leaseholder {
    /// Starts to join: the first signal comes when the store has answered.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[must_use]
    pub fn join(store: Arc<dyn LeaseStore>, config: LeaseConfig) -> Self {
        let held = HeldLeases(Arc::new(Shared {
            book: Mutex::new(Book::new(config.clone(), Instant::now())),
            work: Notify::new(),
            news: Notify::new(),
        }));
        let keeper = Keeper {
            store,
            config,
            shared: Arc::clone(&held.0),
        };
        let task = tokio::spawn(keeper.run());
        Self { held, task }
    }

    /// Who this is in the store.
    pub fn member(&self) -> MemberId {
        self.held.0.lock().member
    }

    /// What it holds, to be asked and to be given back; clones are the same.
    pub fn held(&self) -> HeldLeases {
        self.held.clone()
    }

    /// Waits for one signal.
    ///
    /// # Cancellation
    ///
    /// Safe: a dropped future has consumed no signal.
    ///
    /// # Errors
    ///
    /// Those of the store, one for each exchange that went wrong while this was waited for. After a
    /// retryable one it goes on by itself, and leases last until their time is over; after any
    /// other, close it.
    pub async fn next(&mut self) -> Result<LeaseSignal> {
        let shared = &self.held.0;
        loop {
            let (signal, deadline) = shared.look();
            if let Some(signal) = signal {
                return signal;
            }
            tokio::select! {
                () = shared.news.notified() => {}
                () = sleep_until(deadline) => {}
            }
        }
    }

    /// Leaves: everything it holds is free at once. What still runs has to be stopped before.
    ///
    /// # Cancellation
    ///
    /// A dropped future is a crash: others wait until the time of this member is over.
    ///
    /// # Errors
    ///
    /// When the store did not hear of it; then, too, others wait for that time.
    pub async fn close(mut self) -> Result<()> {
        self.held.0.lock().close();
        self.held.0.work.notify_one();
        (&mut self.task).await.unwrap_or_else(|error| {
            Err(Error::new(
                ErrorKind::Internal,
                "leave group",
                "the task that renews leases ended",
            )
            .with_source(error))
        })
    }
}

impl Drop for Leaseholder {
    /// Ends without a word to the store, as a crash does.
    fn drop(&mut self) {
        self.held.0.lock().close();
        self.task.abort();
    }
}

/// What a [`Leaseholder`] holds. Clones are the same; they hold nothing when it is gone.
#[derive(Clone, Debug)]
pub struct HeldLeases(Arc<Shared>);

impl HeldLeases {
    /// The fencing epoch of `place`, while it is held: by the clock, whether or not
    /// [`LeaseSignal::Lost`] was heard.
    #[must_use]
    pub fn epoch(&self, place: &TopicPartition) -> Option<u64> {
        self.0.lock().epoch(place, Instant::now())
    }

    /// How many members of the group are so, this one included, as the store said last; those that
    /// are certainly dead are left out. It is as new as the newest grant.
    pub(crate) fn count_members(&self, is_so: impl Fn(&LeaseMember) -> bool) -> usize {
        let book = self.0.lock();
        book.members.iter().filter(|member| is_so(member)).count()
    }

    /// Gives places back: nothing runs there any more. What is not held is ignored. A place that
    /// was not revoked may be granted again at once.
    pub fn release(&self, places: &[TopicPartition]) {
        // Each call has the store asked, which nothing is no reason for.
        if places.is_empty() {
            return;
        }
        self.0.lock().release(places);
        self.0.work.notify_one();
    }
}

#[derive(Debug)]
struct Shared {
    book: Mutex<Book>,
    /// There is something to tell the store.
    work: Notify,
    /// There is something to tell the owner.
    news: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Book> {
        // Nothing is left half done by a panic that a later call could not read.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the owner has to hear, and when to look again at the latest.
    fn look(&self) -> (Option<Result<LeaseSignal>>, Instant) {
        let now = Instant::now();
        let mut book = self.lock();
        if book.expire(now) {
            self.work.notify_one();
        }
        let signal = book.next();
        (signal, book.deadline().unwrap_or(now + FOREVER))
    }
}

/// Talks with the store.
#[derive(Debug)]
struct Keeper {
    store: Arc<dyn LeaseStore>,
    config: LeaseConfig,
    shared: Arc<Shared>,
}

impl Keeper {
    /// Renews until the owner closes, then leaves.
    async fn run(self) -> Result<()> {
        let renewed = AssertUnwindSafe(self.renew()).catch_unwind().await;
        if renewed.is_err() {
            self.report(Error::new(
                ErrorKind::Internal,
                "renew leases",
                "the store of leases panicked: nothing is renewed any more",
            ));
            self.wait_for_close().await;
        }
        let member = self.shared.lock().member;
        let left = self.store.leave(&self.config.group, member);
        // Until then others wait for its time to be over anyway, so that nothing is won by giving up.
        timeout(self.config.ttl, left).await.unwrap_or_else(|_| {
            let what = "the store of leases did not answer within `ttl`: others wait until what this member held is over";
            Err(self.late("leave group", what))
        })
    }

    async fn renew(&self) {
        let mut changed = self.store.changed(&self.config.group);
        let mut is_new = true;
        while !self.shared.lock().is_closed() {
            let sent = Instant::now();
            let request = self.shared.lock().request(sent);
            let mut exchange = pin!(self.exchange(&request));
            let mut hinted = false;
            let outcome = loop {
                tokio::select! {
                    // First of all, so that no change is missed from before the store answers.
                    biased;
                    () = &mut changed, if !hinted => hinted = true,
                    outcome = &mut exchange => break outcome,
                }
            };
            if hinted {
                changed = self.store.changed(&self.config.group);
            }
            match outcome {
                Ok(reply) => {
                    let more = self.take(&request, &reply, sent);
                    if !more && !hinted {
                        self.wait(&mut changed, sent).await;
                    }
                    if std::mem::take(&mut is_new) && more {
                        // Only the first reply says whom there is to share with.
                        continue;
                    }
                    // However often something changes, the store is not asked all the time.
                    sleep_until(sent + self.config.ttl.min(FOREVER) / 1_000).await;
                }
                Err(error) => {
                    self.report(error);
                    // Not sooner for a hint: the store may be away because too much is asked of it.
                    let pause = jittered(self.config.ttl / 10);
                    // Over or closed: the loop looks.
                    let _ = timeout(pause, self.wait_for_close()).await;
                }
            }
        }
    }

    /// Waits until there is a reason for another exchange than the one that was sent at `sent`.
    async fn wait<'s>(&'s self, changed: &mut BoxFuture<'s, ()>, sent: Instant) {
        tokio::select! {
            () = &mut *changed => *changed = self.store.changed(&self.config.group),
            () = self.shared.work.notified() => {}
            () = sleep_until(self.renewal(sent)) => {}
        }
    }

    async fn exchange(&self, request: &LeaseRequest) -> Result<LeaseReply> {
        timeout(self.config.patience(), self.store.exchange(request))
            .await
            .unwrap_or_else(|_| {
                let what = "the store of leases did not answer within a third of `ttl`: set it higher, or look at the store";
                Err(self.late("renew leases", what))
            })
    }

    /// Takes a reply in; true when there is more to ask for at once.
    fn take(&self, request: &LeaseRequest, reply: &LeaseReply, sent: Instant) -> bool {
        let is_dead =
            |member: &&LeaseMember| member.id != request.member && member.process.is_dead();
        let dead = reply.members.iter().filter(is_dead);
        let dead = dead.map(|member| member.id).collect();
        let mut book = self.shared.lock();
        let more = book.apply(request, reply, dead, sent, Instant::now());
        self.shared.news.notify_one();
        more
    }

    fn report(&self, error: Error) {
        self.shared.lock().fail(error);
        self.shared.news.notify_one();
    }

    /// When the request after the one of `sent` is due: early enough for two more, should it fail, or when a revoked
    /// place is to be given back.
    fn renewal(&self, sent: Instant) -> Instant {
        let renewal = sent + jittered(self.config.ttl.min(FOREVER) * 3 / 10);
        let deadline = self.shared.lock().deadline();
        deadline.map_or(renewal, |deadline| deadline.min(renewal))
    }

    async fn wait_for_close(&self) {
        while !self.shared.lock().is_closed() {
            self.shared.work.notified().await;
        }
    }

    fn late(&self, operation: &'static str, what: &str) -> Error {
        Error::new(ErrorKind::Timeout, operation, what).with("group", &self.config.group)
    }
}

/// Up to a tenth more, so that members that started together do not ask together for ever.
fn jittered(pause: Duration) -> Duration {
    with_jitter(pause, RandomState::new().hash_one(()))
}
