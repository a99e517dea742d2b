//! The duplicate store in memory passes the suite of such stores, and says what it forgets.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    ClaimEvents, DuplicateStore, ErrorKind, EventClaim, EventId, Group, MemberId, MemoryDuplicates,
    Result,
};
use eventbus_testkit::{DuplicatesHarness, duplicates_conformance};

#[derive(Default)]
struct InMemory(MemoryDuplicates);

#[async_trait]
impl DuplicatesHarness for InMemory {
    async fn open(&self) -> Result<Arc<dyn DuplicateStore>> {
        Ok(Arc::new(self.0.clone()))
    }
}

duplicates_conformance!(InMemory::default());

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

async fn claim(store: &MemoryDuplicates, ids: &[EventId]) -> Result<Vec<EventClaim>> {
    let group = Group::from_static("payments");
    let request = ClaimEvents::new(group, MemberId::random(), ids.to_vec(), DAY);
    store.claim(&request).await
}

async fn mark(store: &MemoryDuplicates, ids: &[EventId], window: Duration) {
    let group = Group::from_static("payments");
    store.mark_handled(&group, ids, window).await.unwrap();
}

#[tokio::test]
async fn without_room_the_events_whose_windows_end_first_are_forgotten_and_counted() {
    let store = MemoryDuplicates::with_ids_max(3);
    let ids: Vec<_> = (0..4).map(|_| EventId::new()).collect();
    mark(&store, &ids[..1], 2 * DAY).await;
    mark(&store, &ids[1..3], DAY).await;
    assert_eq!((store.known(), store.forgotten()), (3, 0));
    mark(&store, &ids[3..], DAY).await;
    assert_eq!((store.known(), store.forgotten()), (3, 1));
    let known = claim(&store, &[ids[0].clone(), ids[2].clone(), ids[3].clone()]).await;
    assert_eq!(known.unwrap(), [EventClaim::Handled; 3]);
    assert_eq!(
        claim(&store, &ids[1..2]).await.unwrap(),
        [EventClaim::Granted]
    );
    assert_eq!((store.known(), store.forgotten()), (3, 2));
}

#[tokio::test]
async fn claims_are_never_forgotten_and_refused_where_they_take_all_the_room() {
    let store = MemoryDuplicates::with_ids_max(2);
    let ids: Vec<_> = (0..3).map(|_| EventId::new()).collect();
    claim(&store, &ids[..2]).await.unwrap();
    let refused = claim(&store, &ids[2..]).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::RateLimited);
    assert!(refused.is_retryable());
    mark(&store, &ids[..1], DAY).await;
    assert_eq!(
        claim(&store, &ids[2..]).await.unwrap(),
        [EventClaim::Granted]
    );
    assert_eq!(store.forgotten(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_has_ended_takes_no_room() {
    let store = MemoryDuplicates::with_ids_max(10);
    for _ in 0..100 {
        mark(&store, &[EventId::new()], DAY).await;
        tokio::time::advance(DAY / 8).await;
    }
    assert!(store.known() <= 8);
    assert_eq!(store.forgotten(), 0);
}
