//! Leases: even shares, one holder at a time, quick hand-overs, and what faults cost.

mod random;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    ErrorKind, Group, HeldLeases, Lease, LeaseConfig, LeaseReply, LeaseRequest, LeaseSignal,
    LeaseStore, LeaseTopic, Leaseholder, MemberId, MemoryLeases, Result, Topic, TopicPartition,
};
use eventbus_testkit::{LeaseHarness, within};
use futures_util::FutureExt;
use tokio::time::{Instant, sleep};

use wire::{Fault, Wire};

const GROUP: Group = Group::from_static("payments");
const ORDERS: Topic = Topic::from_static("orders");
const TTL: Duration = Duration::from_secs(10);
const REVOKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Virtual time in which a few exchanges are made, each at least a thousandth of the ttl after the
/// one before.
const MOMENT: Duration = Duration::from_millis(100);

struct MemoryHarness(MemoryLeases);

#[async_trait]
impl LeaseHarness for MemoryHarness {
    async fn connect(&self) -> Result<Arc<dyn LeaseStore>> {
        Ok(Arc::new(self.0.clone()))
    }
}

mod store {
    use super::{MemoryHarness, MemoryLeases};
    eventbus_testkit::lease_store_conformance!(MemoryHarness(MemoryLeases::new()));
}

fn topic(name: Topic, partitions: u32) -> LeaseTopic {
    LeaseTopic { name, partitions }
}

fn config(partitions: u32) -> LeaseConfig {
    LeaseConfig::new(GROUP, vec![topic(ORDERS, partitions)])
        .with_ttl(TTL)
        .with_revoke_timeout(REVOKE_TIMEOUT)
}

fn place(partition: u32) -> TopicPartition {
    TopicPartition::new(ORDERS, partition)
}

/// A member whose owner gives revoked places back at once.
struct Owner {
    held: HeldLeases,
    task: tokio::task::JoinHandle<()>,
}

impl Owner {
    fn join(store: impl LeaseStore, config: LeaseConfig) -> Self {
        let mut leaseholder = Leaseholder::join(Arc::new(store), config);
        let held = leaseholder.held();
        let task = tokio::spawn(async move {
            loop {
                if let Ok(LeaseSignal::Revoking(places)) = leaseholder.next().await {
                    leaseholder.held().release(&places);
                }
            }
        });
        Self { held, task }
    }

    /// How many of the first 100 places it holds.
    fn count(&self) -> usize {
        (0..100)
            .filter(|number| self.held.epoch(&place(*number)).is_some())
            .count()
    }

    /// Ends it without a word.
    async fn crash(self) {
        self.task.abort();
        assert!(self.task.await.expect_err("it is aborted").is_cancelled());
    }
}

/// A store that takes its time to hear that somebody leaves.
#[derive(Debug)]
struct SlowToLeave(MemoryLeases, Duration);

#[async_trait]
impl LeaseStore for SlowToLeave {
    async fn exchange(&self, request: &LeaseRequest) -> Result<LeaseReply> {
        self.0.exchange(request).await
    }

    async fn leave(&self, group: &Group, member: MemberId) -> Result<()> {
        sleep(self.1).await;
        self.0.leave(group, member).await
    }

    async fn changed(&self, group: &Group) {
        self.0.changed(group).await;
    }
}

/// `connections` and `endurance` of dev/verify, on a machine with many times more to do than it can:
/// members ended with an error and left their lanes to time, though the store was only slow.
#[tokio::test(start_paused = true)]
async fn a_member_waits_for_a_slow_store_to_hear_that_it_leaves() {
    for (slow, leaves) in [(TTL / 2, true), (2 * TTL, false)] {
        let store = SlowToLeave(MemoryLeases::new(), slow);
        let leaseholder = Leaseholder::join(Arc::new(store), config(1));
        sleep(MOMENT).await;
        let left = leaseholder.close().await;
        assert_eq!(left.is_ok(), leaves, "{left:?}");
        assert!(left.is_ok() || left.is_err_and(|error| error.kind() == ErrorKind::Timeout));
    }
}

fn counts(owners: &[Owner]) -> Vec<usize> {
    let mut counts: Vec<usize> = owners.iter().map(Owner::count).collect();
    counts.sort_unstable();
    counts
}

async fn granted(leaseholder: &mut Leaseholder) -> Vec<Lease> {
    match within(TTL * 3, leaseholder.next()).await {
        Ok(LeaseSignal::Granted(leases)) => leases,
        other => panic!("not granted: {other:?}"),
    }
}

async fn revoking(leaseholder: &mut Leaseholder) -> Vec<TopicPartition> {
    match within(TTL * 3, leaseholder.next()).await {
        Ok(LeaseSignal::Revoking(places)) => places,
        other => panic!("not revoking: {other:?}"),
    }
}

async fn lost(leaseholder: &mut Leaseholder) -> Vec<TopicPartition> {
    loop {
        match within(TTL * 3, leaseholder.next()).await {
            Ok(LeaseSignal::Lost(places)) => return places,
            Err(error) if error.is_retryable() => {}
            other => panic!("not lost: {other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn shares_are_even_after_joins_leaves_and_crashes() {
    let store = MemoryLeases::new();
    let mut owners = Vec::new();
    for members in 1..=5 {
        owners.push(Owner::join(store.clone(), config(11)));
        sleep(MOMENT).await;
        let counts = counts(&owners);
        assert_eq!(counts.iter().sum::<usize>(), 11, "{members}: {counts:?}");
        assert!(counts[members - 1] - counts[0] <= 1, "{counts:?}");
    }
    for owner in owners.drain(..2) {
        owner.crash().await;
    }
    assert!(counts(&owners).iter().sum::<usize>() < 11);
    sleep(TTL * 2).await;
    assert_eq!(counts(&owners), [3, 4, 4]);
}

#[tokio::test(start_paused = true)]
async fn without_hints_members_find_out_when_they_renew() {
    let store = MemoryLeases::new();
    let deaf = || {
        let fault = Fault {
            deaf: true,
            ..Fault::default()
        };
        Wire::new(&store, fault)
    };
    let mut owners = vec![Owner::join(deaf(), config(7))];
    sleep(MOMENT).await;
    assert_eq!(counts(&owners), [7]);
    owners.push(Owner::join(deaf(), config(7)));
    sleep(TTL).await;
    assert_eq!(counts(&owners), [3, 4]);
}

#[tokio::test(start_paused = true)]
async fn members_hold_only_what_they_read() {
    const PARCELS: Topic = Topic::from_static("parcels");
    let store = MemoryLeases::new();
    let both = LeaseConfig::new(GROUP, vec![topic(ORDERS, 4), topic(PARCELS, 4)]);
    let one = LeaseConfig::new(GROUP, vec![topic(PARCELS, 4)]);
    let both = Owner::join(store.clone(), both);
    sleep(MOMENT).await;
    let one = Owner::join(store.clone(), one);
    sleep(MOMENT).await;
    assert_eq!((both.count(), one.count()), (4, 0));
    let parcels = (0..4).map(|number| TopicPartition::new(PARCELS, number));
    let epochs = parcels.filter_map(|place| one.held.epoch(&place));
    assert_eq!(
        epochs.collect::<Vec<_>>(),
        [2; 4],
        "it has all of them, granted again"
    );
}

#[tokio::test(start_paused = true)]
async fn what_nobody_holds_is_granted_without_a_wait() {
    let before = Instant::now();
    let mut first = Leaseholder::join(Arc::new(MemoryLeases::new()), config(4));
    assert_eq!(granted(&mut first).await.len(), 4);
    assert_eq!(before.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn close_gives_everything_back_at_once() {
    let store: Arc<dyn LeaseStore> = Arc::new(MemoryLeases::new());
    let mut first = Leaseholder::join(Arc::clone(&store), config(4));
    assert_eq!(granted(&mut first).await.len(), 4);
    let mut second = Leaseholder::join(store, config(4));
    revoking(&mut first).await;
    let held = first.held();
    first.close().await.expect("the store is there");
    assert_eq!(held.epoch(&place(0)), None);
    let before = Instant::now();
    let mut count = 0;
    while count < 4 {
        count += granted(&mut second).await.len();
    }
    assert!(before.elapsed() <= MOMENT);
}

#[tokio::test(start_paused = true)]
async fn a_revoked_place_is_kept_until_it_is_released_and_then_handed_over_at_once() {
    let store: Arc<dyn LeaseStore> = Arc::new(MemoryLeases::new());
    let mut first = Leaseholder::join(Arc::clone(&store), config(4));
    granted(&mut first).await;
    let mut second = Leaseholder::join(store, config(4));
    let places = revoking(&mut first).await;
    assert_eq!(places.len(), 2);
    sleep(REVOKE_TIMEOUT - MOMENT).await;
    assert!(
        places
            .iter()
            .all(|place| first.held().epoch(place) == Some(1))
    );
    assert!(second.next().now_or_never().is_none());
    let before = Instant::now();
    first.held().release(&places);
    assert_eq!(first.held().epoch(&places[0]), None);
    let leases = granted(&mut second).await;
    assert!(before.elapsed() <= MOMENT);
    assert!(
        leases
            .iter()
            .all(|lease| places.contains(&lease.place) && lease.epoch == 2)
    );
}

#[tokio::test(start_paused = true)]
async fn a_place_that_is_not_released_is_lost_after_the_revoke_timeout() {
    let store: Arc<dyn LeaseStore> = Arc::new(MemoryLeases::new());
    let mut first = Leaseholder::join(Arc::clone(&store), config(4));
    granted(&mut first).await;
    let mut second = Leaseholder::join(store, config(4));
    let places = revoking(&mut first).await;
    let before = Instant::now();
    assert_eq!(lost(&mut first).await, places);
    assert!(before.elapsed() - REVOKE_TIMEOUT <= MOMENT);
    assert_eq!(granted(&mut second).await.len(), 2);
    assert!(before.elapsed() - REVOKE_TIMEOUT <= MOMENT);
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_does_not_listen_holds_up_nobody_beyond_the_revoke_timeout() {
    let store: Arc<dyn LeaseStore> = Arc::new(MemoryLeases::new());
    let mut first = Leaseholder::join(Arc::clone(&store), config(4));
    granted(&mut first).await;
    let mut second = Leaseholder::join(store, config(4));
    let leases = granted(&mut second).await;
    assert_eq!(leases.len(), 2);
    assert!(
        leases
            .iter()
            .all(|lease| first.held().epoch(&lease.place).is_none())
    );
    assert_eq!(
        lost(&mut first).await.len(),
        2,
        "it hears of it when it listens"
    );
}

#[tokio::test(start_paused = true)]
async fn a_member_that_is_cut_off_hears_lost_before_the_next_owner_is_granted() {
    let store = MemoryLeases::new();
    let wire = Arc::new(Wire::new(&store, Fault::default()));
    let mut first = Leaseholder::join(Arc::clone(&wire) as Arc<dyn LeaseStore>, config(2));
    granted(&mut first).await;
    let mut second = Leaseholder::join(Arc::new(store), config(2));
    let places = revoking(&mut first).await;
    first.held().release(&places);
    granted(&mut second).await;
    let down = Fault {
        down: true,
        ..Fault::default()
    };
    wire.fail(down, TTL * 3);
    let (lost_at, granted_at) = tokio::join!(
        async {
            lost(&mut first).await;
            Instant::now()
        },
        async {
            granted(&mut second).await;
            Instant::now()
        },
    );
    assert!(lost_at <= granted_at);
    // It is back: its share, in a new epoch.
    let place = loop {
        if let Ok(LeaseSignal::Revoking(places)) = second.next().await {
            second.held().release(&places);
            break places[0].clone();
        }
    };
    let lease = loop {
        if let Ok(LeaseSignal::Granted(leases)) = first.next().await {
            break leases[0].clone();
        }
    };
    assert_eq!(lease.place, place);
    assert_eq!(lease.epoch, 3, "first, second, first again");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_for_less_than_the_ttl_costs_nothing_and_is_reported() {
    let wire = Arc::new(Wire::new(&MemoryLeases::new(), Fault::default()));
    let mut leaseholder = Leaseholder::join(Arc::clone(&wire) as Arc<dyn LeaseStore>, config(2));
    granted(&mut leaseholder).await;
    let down = Fault {
        down: true,
        ..Fault::default()
    };
    wire.fail(down, TTL * 6 / 10);
    let before = wire.exchanges();
    let error = leaseholder.next().await.expect_err("it is away");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let quiet = tokio::time::timeout(TTL * 3, async {
        loop {
            if let Ok(signal) = leaseholder.next().await {
                return signal;
            }
        }
    });
    assert!(quiet.await.is_err(), "nothing is lost or granted again");
    assert_eq!(leaseholder.held().epoch(&place(0)), Some(1));
    assert!(
        wire.exchanges() - before < 20,
        "it is not asked all the time"
    );
}

#[tokio::test(start_paused = true)]
async fn a_lost_reply_does_no_harm() {
    let store = MemoryLeases::new();
    let wire = Arc::new(Wire::new(&store, Fault::default()));
    let mute = Fault {
        mute: true,
        ..Fault::default()
    };
    wire.fail(mute.clone(), MOMENT);
    let mut first = Leaseholder::join(Arc::clone(&wire) as Arc<dyn LeaseStore>, config(4));
    first.next().await.expect_err("the reply is lost");
    assert_eq!(granted(&mut first).await.len(), 4);
    let mut second = Leaseholder::join(Arc::new(store), config(4));
    let places = revoking(&mut first).await;
    wire.fail(mute, MOMENT);
    first.held().release(&places);
    let leases = granted(&mut second).await;
    assert!(leases.iter().all(|lease| lease.epoch == 2));
    first.next().await.expect_err("the reply is lost");
    assert!(first.held().epoch(&leases[0].place).is_none());
    sleep(TTL * 2).await;
    assert!(
        first.next().now_or_never().is_none(),
        "both have their shares"
    );
    assert!(
        second.next().now_or_never().is_none(),
        "both have their shares"
    );
}

// Elsewhere it is waited for, as a crash in this process is.
#[cfg(target_os = "linux")]
#[tokio::test(start_paused = true)]
async fn a_dead_process_is_not_waited_for() {
    let store = MemoryLeases::new();
    let dead = eventbus_testkit::lease::dead_process();
    assert!(dead.is_dead());
    let as_dead = Fault {
        process: Some(dead),
        ..Fault::default()
    };
    let mut first = Leaseholder::join(Arc::new(Wire::new(&store, as_dead)), config(4));
    granted(&mut first).await;
    drop(first);
    let before = Instant::now();
    let mut second = Leaseholder::join(Arc::new(store), config(4));
    let leases = granted(&mut second).await;
    assert!(before.elapsed() <= MOMENT);
    assert!(leases.len() == 4 && leases.iter().all(|lease| lease.epoch == 2));
}

#[tokio::test(start_paused = true)]
async fn a_crash_in_this_process_is_waited_for_and_no_longer_than_the_ttl() {
    let store = MemoryLeases::new();
    let mut first = Leaseholder::join(Arc::new(store.clone()), config(4));
    granted(&mut first).await;
    let held = first.held();
    drop(first);
    assert_eq!(held.epoch(&place(0)), None);
    let before = Instant::now();
    let mut second = Leaseholder::join(Arc::new(store), config(4));
    let mut count = 0;
    while count < 4 {
        count += granted(&mut second).await.len();
    }
    let waited = before.elapsed();
    assert!(
        waited >= TTL - MOMENT && waited <= TTL * 4 / 3,
        "{waited:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_dropped_next_consumes_no_signal() {
    let mut leaseholder = Leaseholder::join(Arc::new(MemoryLeases::new()), config(4));
    assert!(leaseholder.next().now_or_never().is_none());
    sleep(MOMENT).await;
    assert_eq!(granted(&mut leaseholder).await.len(), 4);
    let released = [place(0), place(3)];
    leaseholder.held().release(&released);
    assert!(leaseholder.next().now_or_never().is_none());
    sleep(MOMENT).await;
    let leases = granted(&mut leaseholder).await;
    let places: Vec<_> = leases.iter().map(|lease| lease.place.clone()).collect();
    assert_eq!(
        places, released,
        "nobody else is there, so it is granted again"
    );
    assert!(leases.iter().all(|lease| lease.epoch == 2));
}

#[tokio::test(start_paused = true)]
async fn leases_last_while_the_owner_does_not_listen() {
    let mut leaseholder = Leaseholder::join(Arc::new(MemoryLeases::new()), config(1));
    granted(&mut leaseholder).await;
    sleep(TTL * 5).await;
    assert_eq!(leaseholder.held().epoch(&place(0)), Some(1));
}

#[tokio::test(start_paused = true)]
async fn a_renewal_is_one_exchange_in_a_third_of_the_ttl() {
    let wire = Arc::new(Wire::new(&MemoryLeases::new(), Fault::default()));
    let mut leaseholder = Leaseholder::join(Arc::clone(&wire) as Arc<dyn LeaseStore>, config(100));
    granted(&mut leaseholder).await;
    sleep(MOMENT).await;
    let before = wire.exchanges();
    sleep(TTL * 3).await;
    let renewals = wire.exchanges() - before;
    assert!((9..=10).contains(&renewals), "{renewals}");
}
