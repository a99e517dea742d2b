//! The conformance suite of stores of leases: one function a check, and the macro that makes tests
//! of them.
//!
//! A store's `tests/it/leases.rs` holds a [`LeaseHarness`] and one line:
//!
//! ```
//! use std::sync::Arc;
//!
//! use eventbus_core::{LeaseStore, MemoryLeases, Result};
//! use eventbus_testkit::{LeaseHarness, lease_store_conformance};
//!
//! struct Harness(MemoryLeases);
//!
//! #[async_trait::async_trait]
//! impl LeaseHarness for Harness {
//!     async fn connect(&self) -> Result<Arc<dyn LeaseStore>> {
//!         Ok(Arc::new(self.0.clone()))
//!     }
//! }
//!
//! // Without the attribute where no server is needed.
//! lease_store_conformance!(#[ignore = "needs brokers: ./dev/test"] Harness(MemoryLeases::new()));
//! ```
//!
//! A check panics when the store breaks the contract. Groups are new in every check. Time is the
//! real one, because the store's clock is its own; nothing is wrong only because a machine is slow.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    Group, HeldLeases, Lease, LeaseConfig, LeaseReply, LeaseRequest, LeaseSignal, LeaseStore,
    LeaseTopic, Leaseholder, MemberId, ProcessId, Result, Topic, TopicPartition,
};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep};

use crate::broker::unique_group;
use crate::probe::within;

/// How long a check may take, on a slow machine with other tests beside it.
const DEADLINE: Duration = Duration::from_secs(60);
/// Longer than any check.
const LONG: Duration = Duration::from_secs(600);
/// Short enough to be waited for.
const SHORT: Duration = Duration::from_millis(400);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);
const TOPIC: Topic = Topic::from_static("orders");

/// Gives the suite clients of one store.
#[async_trait]
pub trait LeaseHarness: Send + Sync {
    /// An independent client of the store.
    ///
    /// # Errors
    ///
    /// When the store is away.
    async fn connect(&self) -> Result<Arc<dyn LeaseStore>>;
}

/// Expands to one `#[tokio::test]` for each check of [`lease`](crate::lease).
///
/// The expression makes the [`LeaseHarness`] of one test and may `await`. An attribute in front of
/// it is put on every test.
#[macro_export]
macro_rules! lease_store_conformance {
    (@checks $attributes:tt $harness:expr; $($check:ident)*) => {
        $( $crate::lease_store_conformance!(@check $attributes $harness; $check); )*
    };
    (@check [$(#[$attribute:meta])*] $harness:expr; $check:ident) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        $(#[$attribute])*
        async fn $check() {
            let harness = $harness;
            $crate::lease::$check(&harness).await;
        }
    };
    (@all $attributes:tt $harness:expr) => {
        $crate::lease_store_conformance!(@checks $attributes $harness;
            a_lease_has_one_holder
            a_lease_that_is_renewed_stays
            an_expired_lease_is_granted_again_with_a_higher_epoch_and_not_before
            an_expired_lease_is_granted_once
            a_member_that_comes_too_late_holds_nothing
            leaving_frees_at_once
            a_dead_member_is_ended_at_once
            the_epoch_rises_at_every_grant
            a_lost_reply_does_no_harm
            a_late_request_releases_nothing_newer
            only_the_holder_releases
            concurrent_exchanges_grant_each_place_once
            the_reply_names_every_member
            groups_share_nothing
            members_share_evenly_and_hand_over
        );
    };
    // One attribute, not several: before an expression a repetition would be ambiguous.
    (#[$attribute:meta] $harness:expr) => {
        $crate::lease_store_conformance!(@all [#[$attribute]] $harness);
    };
    ($harness:expr) => {
        $crate::lease_store_conformance!(@all [] $harness);
    };
}

/// A process that is certainly dead, where the system tells of processes: this one, had it been
/// started at another time.
///
/// # Panics
///
/// When a process id is not written as documented.
#[must_use]
pub fn dead_process() -> ProcessId {
    let current = ProcessId::current().to_string();
    let (rest, started) = current.rsplit_once('/').expect("it ends with the start");
    let started: u64 = started.parse().expect("it is a number");
    format!("{rest}/{}", started + 1)
        .parse()
        .expect("it is an id")
}

/// One member as the store sees it.
struct Asker {
    store: Arc<dyn LeaseStore>,
    group: Group,
    id: MemberId,
    ttl: Duration,
}

impl Asker {
    async fn new(harness: &dyn LeaseHarness, group: &Group, ttl: Duration) -> Self {
        Self {
            store: harness.connect().await.expect("the store answers"),
            group: group.clone(),
            id: MemberId::random(),
            ttl,
        }
    }

    fn request(&self) -> LeaseRequest {
        LeaseRequest::new(self.group.clone(), self.id, topics(8), self.ttl)
    }

    async fn send(&self, request: LeaseRequest) -> LeaseReply {
        self.store
            .exchange(&request)
            .await
            .expect("the store answers")
    }

    /// What it holds after asking for these places.
    async fn want(&self, places: &[TopicPartition]) -> Vec<Lease> {
        let reply = self.send(self.request().with_wanted(places.to_vec())).await;
        sorted(reply.leases_of(self.id))
    }

    /// The lease of a place that is free.
    async fn take(&self, number: u32) -> Lease {
        let leases = self.want(&[place(number)]).await;
        let lease = leases
            .into_iter()
            .find(|lease| lease.place == place(number));
        lease.expect("it was free")
    }

    /// What it holds after releasing this lease.
    async fn release(&self, lease: &Lease) -> Vec<Lease> {
        let request = self.request().with_released(vec![lease.clone()]);
        sorted(self.send(request).await.leases_of(self.id))
    }

    /// Asks until it is granted `place`.
    async fn take_when_free(&self, number: u32) -> Lease {
        loop {
            if let Some(lease) = self.want(&[place(number)]).await.into_iter().next() {
                return lease;
            }
            sleep(PAUSE).await;
        }
    }
}

fn topics(partitions: u32) -> Vec<LeaseTopic> {
    vec![LeaseTopic {
        name: TOPIC,
        partitions,
    }]
}

fn place(number: u32) -> TopicPartition {
    TopicPartition::new(TOPIC, number)
}

fn sorted(leases: &[Lease]) -> Vec<Lease> {
    let mut leases = leases.to_vec();
    leases.sort_unstable();
    leases
}

/// A place that somebody holds is not granted to another.
pub async fn a_lease_has_one_holder(harness: &dyn LeaseHarness) {
    within(DEADLINE, async {
        let group = unique_group();
        let first = Asker::new(harness, &group, LONG).await;
        let second = Asker::new(harness, &group, LONG).await;
        let lease = first.take(0).await;
        let leases = second.want(&[place(0), place(1)]).await;
        assert_eq!(leases.len(), 1, "{leases:?}");
        assert_eq!(leases[0].place, place(1));
        assert_eq!(first.want(&[]).await, [lease]);
    })
    .await;
}

/// Each exchange renews all that the member holds.
pub async fn a_lease_that_is_renewed_stays(harness: &dyn LeaseHarness) {
    within(DEADLINE, async {
        let group = unique_group();
        let first = Asker::new(harness, &group, SHORT).await;
        let second = Asker::new(harness, &group, LONG).await;
        // Again, when this machine was too slow to renew in time.
        'again: loop {
            let mut sent = Instant::now();
            let start = sent;
            let lease = first.take_when_free(0).await;
            while start.elapsed() < SHORT * 3 {
                let taken = second.want(&[place(0)]).await;
                if !taken.is_empty() {
                    assert!(sent.elapsed() >= SHORT, "it was taken before its time");
                    second.release(&taken[0]).await;
                    continue 'again;
                }
                let sending = Instant::now();
                let held = first.want(&[]).await;
                if held.is_empty() {
                    assert!(sent.elapsed() >= SHORT, "it was lost before its time");
                    continue 'again;
                }
                assert_eq!(held, std::slice::from_ref(&lease));
                sent = sending;
                sleep(PAUSE).await;
            }
            return;
        }
    })
    .await;
}

/// What is not renewed is free when its time is over, not before, and its epoch goes on rising.
pub async fn an_expired_lease_is_granted_again_with_a_higher_epoch_and_not_before(
    harness: &dyn LeaseHarness,
) {
    within(DEADLINE, async {
        let group = unique_group();
        let first = Asker::new(harness, &group, SHORT).await;
        let second = Asker::new(harness, &group, LONG).await;
        let sent = Instant::now();
        let before = first.take(0).await;
        let after = second.take_when_free(0).await;
        assert!(sent.elapsed() >= SHORT, "it was taken before its time");
        assert!(after.epoch > before.epoch, "{after:?} after {before:?}");
        assert_eq!(first.want(&[place(0)]).await, []);
    })
    .await;
}

/// When several ask for what is not renewed, one gets it.
pub async fn an_expired_lease_is_granted_once(harness: &dyn LeaseHarness) {
    within(DEADLINE, async {
        let group = unique_group();
        Asker::new(harness, &group, SHORT).await.take(0).await;
        sleep(SHORT * 2).await;
        let granted = ask_all_at_once(harness, &group, 8, &[place(0)]).await;
        assert_eq!(granted.len(), 1, "{granted:?}");
    })
    .await;
}

/// A member whose time is over has lost everything, though nobody took it.
pub async fn a_member_that_comes_too_late_holds_nothing(harness: &dyn LeaseHarness) {
    within(DEADLINE, async {
        let late = Asker::new(harness, &unique_group(), SHORT).await;
        let before = late.take(0).await;
        sleep(SHORT * 2).await;
        assert_eq!(late.want(&[]).await, []);
        assert!(late.take(0).await.epoch > before.epoch);
    })
    .await;
}

/// Leaving frees what is held, and leaving again is no error.
pub async fn leaving_frees_at_once(harness: &dyn LeaseHarness) {
    within(DEADLINE, async {
        let group = unique_group();
        let first = Asker::new(harness, &group, LONG).await;
        let second = Asker::new(harness, &group, LONG).await;
        let before = first.take(0).await;
        for _ in 0..2 {
            let left = first.store.leave(&group, first.id).await;
            left.expect("a member can leave");
        }
        assert!(second.take(0).await.epoch > before.epoch);
        let reply = second.send(second.request()).await;
        assert!(reply.members.iter().all(|member| member.id == second.id));
    })
    .await;
}

/// A member that is named dead is gone, and what it held is free for who names it.
pub async fn a_dead_member_is_ended_at_once(harness: &dyn LeaseHarness) {
    within(DEADLINE, async {
        let group = unique_group();
        let first = Asker::new(harness, &group, LONG).await;
        let second = Asker::new(harness, &group, LONG).await;
        let wanted = first.request().with_wanted(vec![place(0)]);
        let reply = first.send(wanted.with_process(dead_process())).await;
        let before = reply.leases_of(first.id)[0].clone();
        let request = second.request().with_wanted(vec![place(0)]);
        let reply = second.send(request.with_dead(vec![first.id])).await;
        assert_eq!(reply.members.len(), 1, "{reply:?}");
        let lease = &reply.leases_of(second.id)[0];
        assert!(lease.epoch > before.epoch, "{lease:?} after {before:?}");
    })
    .await;
}

/// Every grant raises the epoch, also to the same member, at once, and when nobody was left.
pub async fn the_epoch_rises_at_every_grant(harness: &dyn LeaseHarness) {
    within(DEADLINE, async {
        let group = unique_group();
        let mut last: Option<Lease> = None;
        for _ in 0..3 {
            let asker = Asker::new(harness, &group, LONG).await;
            let first = asker.take(0).await;
            let request = asker.request().with_released(vec![first.clone()]);
            let reply = asker.send(request.with_wanted(vec![place(0)])).await;
            let again = reply.leases_of(asker.id)[0].clone();
            assert!(again.epoch > first.epoch, "{again:?} after {first:?}");
            assert!(last.is_none_or(|last| first.epoch > last.epoch));
            last = Some(again);
            let left = asker.store.leave(&group, asker.id).await;
            left.expect("a member can leave");
        }
    })
    .await;
}

/// Who asks once more finds what it was granted, in the same epoch.
pub async fn a_lost_reply_does_no_harm(harness: &dyn LeaseHarness) {
    within(DEADLINE, async {
        let asker = Asker::new(harness, &unique_group(), LONG).await;
        let lost = asker.want(&[place(0), place(1)]).await;
        assert_eq!(asker.want(&[place(0), place(1)]).await, lost);
        assert_eq!(asker.want(&[]).await, lost);
        let left = asker.release(&lost[0]).await;
        assert_eq!(left, lost[1..]);
        assert_eq!(asker.release(&lost[0]).await, lost[1..]);
    })
    .await;
}

/// A request that arrives after a later one takes nothing away that was granted since.
pub async fn a_late_request_releases_nothing_newer(harness: &dyn LeaseHarness) {
    within(DEADLINE, async {
        let asker = Asker::new(harness, &unique_group(), LONG).await;
        let first = asker.take(0).await;
        asker.release(&first).await;
        let second = asker.take(0).await;
        assert_eq!(asker.release(&first).await, [second]);
    })
    .await;
}

/// Nobody releases what another holds.
pub async fn only_the_holder_releases(harness: &dyn LeaseHarness) {
    within(DEADLINE, async {
        let group = unique_group();
        let first = Asker::new(harness, &group, LONG).await;
        let second = Asker::new(harness, &group, LONG).await;
        let lease = first.take(0).await;
        second.release(&lease).await;
        assert_eq!(second.want(&[place(0)]).await, []);
        assert_eq!(first.want(&[]).await, [lease]);
    })
    .await;
}

/// Members that ask for everything at once get each place once.
pub async fn concurrent_exchanges_grant_each_place_once(harness: &dyn LeaseHarness) {
    within(DEADLINE, async {
        let places: Vec<_> = (0..64).map(place).collect();
        let granted = ask_all_at_once(harness, &unique_group(), 16, &places).await;
        let mut times: HashMap<&TopicPartition, u32> = HashMap::new();
        for lease in &granted {
            *times.entry(&lease.place).or_default() += 1;
        }
        assert!(times.values().all(|times| *times == 1), "{granted:?}");
        assert_eq!(times.len(), places.len());
    })
    .await;
}

/// So many new members ask for `places` at once; what they were granted.
async fn ask_all_at_once(
    harness: &dyn LeaseHarness,
    group: &Group,
    members: usize,
    places: &[TopicPartition],
) -> Vec<Lease> {
    let mut asking = JoinSet::new();
    for _ in 0..members {
        let asker = Asker::new(harness, group, LONG).await;
        let places = places.to_vec();
        asking.spawn(async move { asker.want(&places).await });
    }
    asking.join_all().await.concat()
}

/// Everybody sees every member: its process, its topics, its leases.
pub async fn the_reply_names_every_member(harness: &dyn LeaseHarness) {
    within(DEADLINE, async {
        let group = unique_group();
        let first = Asker::new(harness, &group, LONG).await;
        let second = Asker::new(harness, &group, LONG).await;
        let leases = first.want(&[place(1), place(3)]).await;
        let parcels = LeaseTopic {
            name: Topic::from_static("parcels"),
            partitions: 1_000,
        };
        let topics = [topics(8), vec![parcels]].concat();
        let request = LeaseRequest::new(group.clone(), second.id, topics.clone(), LONG);
        let process = dead_process();
        second.send(request.with_process(process.clone())).await;
        let reply = first.send(first.request()).await;
        assert_eq!(reply.members.len(), 2, "{reply:?}");
        assert_eq!(sorted(reply.leases_of(first.id)), leases);
        assert_eq!(reply.leases_of(second.id), []);
        let seen = reply.members.iter().find(|member| member.id == second.id);
        let seen = seen.expect("it is a member");
        assert_eq!((&seen.process, &seen.topics), (&process, &topics));
    })
    .await;
}

/// The same place of another group is another place.
pub async fn groups_share_nothing(harness: &dyn LeaseHarness) {
    within(DEADLINE, async {
        let first = Asker::new(harness, &unique_group(), LONG).await;
        let second = Asker::new(harness, &unique_group(), LONG).await;
        let lease = first.take(0).await;
        second.take(0).await;
        let left = second.store.leave(&second.group, first.id).await;
        left.expect("it is no member there, which is no error");
        let reply = first.send(first.request()).await;
        assert_eq!(reply.members.len(), 1, "{reply:?}");
        assert_eq!(reply.leases_of(first.id), [lease]);
    })
    .await;
}

/// The mechanism over this store: shares are even, and who leaves hands over.
pub async fn members_share_evenly_and_hand_over(harness: &dyn LeaseHarness) {
    within(DEADLINE, async {
        let group = unique_group();
        let mut owners = Vec::new();
        for _ in 0..3 {
            let store = harness.connect().await.expect("the store answers");
            let config = LeaseConfig::new(group.clone(), topics(8)).with_ttl(SHORT * 5);
            owners.push(Owner::new(Leaseholder::join(store, config)));
        }
        until_shares_are(&owners, &[2, 3, 3]).await;
        owners.swap_remove(0).close().await;
        until_shares_are(&owners, &[4, 4]).await;
    })
    .await;
}

/// A leaseholder whose owner gives back at once what is revoked.
struct Owner {
    held: HeldLeases,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<()>>,
}

impl Owner {
    fn new(mut leaseholder: Leaseholder) -> Self {
        let held = leaseholder.held();
        let (stop, mut stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            loop {
                let signal = tokio::select! {
                    signal = leaseholder.next() => signal?,
                    _ = &mut stopped => return leaseholder.close().await,
                };
                if let LeaseSignal::Revoking(places) = signal {
                    leaseholder.held().release(&places);
                }
            }
        });
        Self { held, stop, task }
    }

    fn count(&self) -> usize {
        let held = |number: &u32| self.held.epoch(&place(*number)).is_some();
        (0..8).filter(held).count()
    }

    async fn close(self) {
        self.stop.send(()).expect("it is there");
        let closed = self.task.await.expect("it does not panic");
        closed.expect("the store answers");
    }
}

async fn until_shares_are(owners: &[Owner], shares: &[usize]) {
    loop {
        let mut counts: Vec<usize> = owners.iter().map(Owner::count).collect();
        counts.sort_unstable();
        if counts == shares {
            return;
        }
        sleep(PAUSE).await;
    }
}
