//! The conformance suite of stores of duplicate windows: one function a check, and the macro that
//! makes tests of them.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{ClaimEvents, DuplicateStore, EventClaim, EventId, Group, MemberId, Result};
use tokio::time::Instant;

use crate::broker::unique_topic;

/// Gives the suite handles on one store.
#[async_trait]
pub trait DuplicatesHarness: Send + Sync {
    /// A handle; several are handles on the same store. A durable store is read from its disk anew.
    ///
    /// # Errors
    ///
    /// When the store is away.
    async fn open(&self) -> Result<Arc<dyn DuplicateStore>>;
}

/// Expands to one `#[tokio::test]` for each check of [`duplicates`](crate::duplicates).
///
/// The expression makes the [`DuplicatesHarness`] of one test and may `await`. An attribute in front of
/// it is put on every test.
#[macro_export]
macro_rules! duplicates_conformance {
    (@checks $attributes:tt $harness:expr; $($check:ident)*) => {
        $( $crate::duplicates_conformance!(@check $attributes $harness; $check); )*
    };
    (@check [$(#[$attribute:meta])*] $harness:expr; $check:ident) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        $(#[$attribute])*
        async fn $check() {
            let harness = $harness;
            $crate::duplicates::$check(&harness).await;
        }
    };
    (@all $attributes:tt $harness:expr) => {
        $crate::duplicates_conformance!(@checks $attributes $harness;
            new_event_is_granted_to_the_first_that_asks
            handled_event_is_known_by_another_handle
            answers_come_in_the_order_of_the_ids
            own_claim_is_renewed
            claim_ends_with_its_lease
            released_event_is_free_at_once
            only_the_own_claim_is_released
            marking_needs_no_claim_and_survives_a_release
            window_ends
            marking_again_counts_the_window_anew
            groups_share_nothing
            concurrent_claims_grant_one
        );
    };
    // One attribute, not several: before an expression a repetition would be ambiguous.
    (#[$attribute:meta] $harness:expr) => {
        $crate::duplicates_conformance!(@all [#[$attribute]] $harness);
    };
    ($harness:expr) => {
        $crate::duplicates_conformance!(@all [] $harness);
    };
}

/// Nobody waits as long in these checks.
const LONG: Duration = Duration::from_secs(600);
/// Long enough to be asked within it, on a slow machine.
const SHORT: Duration = Duration::from_millis(400);
const LIMIT: Duration = Duration::from_secs(20);

/// A member of a group at a store.
struct Stage {
    store: Arc<dyn DuplicateStore>,
    group: Group,
    member: MemberId,
}

impl Stage {
    async fn new(harness: &dyn DuplicatesHarness) -> Self {
        // Unique, as the names of topics are: the store may be shared.
        let group =
            Group::new(unique_topic().as_str()).expect("the name of a topic is one of a group");
        Self::in_group(harness, group).await
    }

    async fn in_group(harness: &dyn DuplicatesHarness, group: Group) -> Self {
        Self {
            store: harness.open().await.expect("the store opens"),
            group,
            member: MemberId::random(),
        }
    }

    /// Another member of the group, with a handle of its own.
    async fn colleague(&self, harness: &dyn DuplicatesHarness) -> Self {
        Self::in_group(harness, self.group.clone()).await
    }

    async fn claim_all(&self, ids: &[EventId], lease: Duration) -> Vec<EventClaim> {
        let request = ClaimEvents::new(self.group.clone(), self.member, ids.to_vec(), lease);
        let claims = self.store.claim(&request).await;
        claims.expect("the store answers")
    }

    async fn claim(&self, id: &EventId, lease: Duration) -> EventClaim {
        let claims = self.claim_all(std::slice::from_ref(id), lease).await;
        assert_eq!(claims.len(), 1, "one answer for each id");
        claims[0]
    }

    async fn mark(&self, id: &EventId, window: Duration) {
        let ids = std::slice::from_ref(id);
        let marked = self.store.mark_handled(&self.group, ids, window).await;
        marked.expect("the store answers");
    }

    async fn release(&self, id: &EventId) {
        let ids = std::slice::from_ref(id);
        let released = self.store.release(&self.group, self.member, ids).await;
        released.expect("the store answers");
    }

    /// Asks until the event is granted; returns how long that took.
    async fn claim_when_free(&self, id: &EventId) -> Duration {
        let begun = Instant::now();
        while self.claim(id, LONG).await != EventClaim::Granted {
            assert!(begun.elapsed() < LIMIT, "it is never free");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        begun.elapsed()
    }
}

fn assert_busy(claim: EventClaim) {
    let EventClaim::Busy { free_in } = claim else {
        panic!("another member has claimed it: {claim:?}");
    };
    assert!(free_in <= LONG, "{free_in:?}");
}

/// Who asks first has an event; others hear that it is busy, and for how long at most.
///
/// # Panics
///
/// When the store breaks the contract; so do all checks.
pub async fn new_event_is_granted_to_the_first_that_asks(harness: &dyn DuplicatesHarness) {
    let first = Stage::new(harness).await;
    let second = first.colleague(harness).await;
    let id = EventId::new();
    assert_eq!(first.claim(&id, LONG).await, EventClaim::Granted);
    assert_busy(second.claim(&id, LONG).await);
    assert_busy(second.claim(&id, LONG).await);
    let other = EventId::parse("order-42/placed").expect("a text is an id");
    assert_eq!(second.claim(&other, LONG).await, EventClaim::Granted);
}

/// What is marked is handled for every member, the one that marked it included.
pub async fn handled_event_is_known_by_another_handle(harness: &dyn DuplicatesHarness) {
    let first = Stage::new(harness).await;
    let second = first.colleague(harness).await;
    let id = EventId::parse("order-42/paid").expect("a text is an id");
    assert_eq!(first.claim(&id, LONG).await, EventClaim::Granted);
    first.mark(&id, LONG).await;
    assert_eq!(second.claim(&id, LONG).await, EventClaim::Handled);
    assert_eq!(first.claim(&id, LONG).await, EventClaim::Handled);
}

/// Several events are claimed at once, each with its own answer.
pub async fn answers_come_in_the_order_of_the_ids(harness: &dyn DuplicatesHarness) {
    let first = Stage::new(harness).await;
    let second = first.colleague(harness).await;
    let ids: Vec<_> = (0..4).map(|_| EventId::new()).collect();
    first.mark(&ids[1], LONG).await;
    assert_eq!(first.claim(&ids[2], LONG).await, EventClaim::Granted);
    let claims = second.claim_all(&ids, LONG).await;
    assert_eq!(claims.len(), 4);
    assert_eq!(claims[0], EventClaim::Granted);
    assert_eq!(claims[1], EventClaim::Handled);
    assert_busy(claims[2]);
    assert_eq!(claims[3], EventClaim::Granted);
    assert!(second.claim_all(&[], LONG).await.is_empty());
}

/// Whoever claims again what is its own has it for longer.
pub async fn own_claim_is_renewed(harness: &dyn DuplicatesHarness) {
    let first = Stage::new(harness).await;
    let second = first.colleague(harness).await;
    let id = EventId::new();
    assert_eq!(first.claim(&id, SHORT).await, EventClaim::Granted);
    assert_eq!(first.claim(&id, LONG).await, EventClaim::Granted);
    let EventClaim::Busy { free_in } = second.claim(&id, LONG).await else {
        panic!("it is claimed");
    };
    assert!(free_in > SHORT, "{free_in:?}");
}

/// A claim that is not renewed ends, and not before its time.
pub async fn claim_ends_with_its_lease(harness: &dyn DuplicatesHarness) {
    let first = Stage::new(harness).await;
    let second = first.colleague(harness).await;
    let id = EventId::new();
    let begun = Instant::now();
    assert_eq!(first.claim(&id, SHORT).await, EventClaim::Granted);
    second.claim_when_free(&id).await;
    assert!(begun.elapsed() >= SHORT / 2, "too early");
    assert_busy(first.claim(&id, LONG).await);
}

/// Who gives an event up leaves it to the next that asks.
pub async fn released_event_is_free_at_once(harness: &dyn DuplicatesHarness) {
    let first = Stage::new(harness).await;
    let second = first.colleague(harness).await;
    let id = EventId::new();
    assert_eq!(first.claim(&id, LONG).await, EventClaim::Granted);
    first.release(&id).await;
    assert_eq!(second.claim(&id, LONG).await, EventClaim::Granted);
}

/// Who releases what is not its own changes nothing.
pub async fn only_the_own_claim_is_released(harness: &dyn DuplicatesHarness) {
    let first = Stage::new(harness).await;
    let second = first.colleague(harness).await;
    let id = EventId::new();
    assert_eq!(first.claim(&id, LONG).await, EventClaim::Granted);
    second.release(&id).await;
    second.release(&EventId::new()).await;
    assert_busy(second.claim(&id, LONG).await);
}

/// An effect that happened counts, whoever has the claim by then; and nobody undoes that.
pub async fn marking_needs_no_claim_and_survives_a_release(harness: &dyn DuplicatesHarness) {
    let late = Stage::new(harness).await;
    let next = late.colleague(harness).await;
    let id = EventId::new();
    assert_eq!(next.claim(&id, LONG).await, EventClaim::Granted);
    late.mark(&id, LONG).await;
    next.release(&id).await;
    late.release(&id).await;
    assert_eq!(next.claim(&id, LONG).await, EventClaim::Handled);
    late.mark(&EventId::new(), LONG).await;
}

/// When its window is over, an event is as new, and not before.
pub async fn window_ends(harness: &dyn DuplicatesHarness) {
    let stage = Stage::new(harness).await;
    let id = EventId::new();
    let begun = Instant::now();
    stage.mark(&id, SHORT).await;
    stage.claim_when_free(&id).await;
    assert!(begun.elapsed() >= SHORT / 2, "too early");
}

/// The window of an event counts from when it was marked last.
pub async fn marking_again_counts_the_window_anew(harness: &dyn DuplicatesHarness) {
    let stage = Stage::new(harness).await;
    let (id, other) = (EventId::new(), EventId::new());
    stage.mark(&id, SHORT).await;
    stage.mark(&other, SHORT).await;
    stage.mark(&id, LONG).await;
    stage.claim_when_free(&other).await;
    assert_eq!(stage.claim(&id, LONG).await, EventClaim::Handled);
}

/// What one group has handled or claimed is new to another.
pub async fn groups_share_nothing(harness: &dyn DuplicatesHarness) {
    let (one, another) = (Stage::new(harness).await, Stage::new(harness).await);
    let (handled, claimed) = (EventId::new(), EventId::new());
    one.mark(&handled, LONG).await;
    assert_eq!(one.claim(&claimed, LONG).await, EventClaim::Granted);
    assert_eq!(another.claim(&handled, LONG).await, EventClaim::Granted);
    assert_eq!(another.claim(&claimed, LONG).await, EventClaim::Granted);
}

/// However many ask at once, one of them has it.
pub async fn concurrent_claims_grant_one(harness: &dyn DuplicatesHarness) {
    let stage = Stage::new(harness).await;
    let id = EventId::new();
    let mut members = Vec::new();
    for _ in 0..16 {
        members.push(stage.colleague(harness).await);
    }
    let claims = members.iter().map(|member| member.claim(&id, LONG));
    let claims = futures_util::future::join_all(claims).await;
    let granted = claims.iter().filter(|claim| **claim == EventClaim::Granted);
    assert_eq!(granted.count(), 1);
}
