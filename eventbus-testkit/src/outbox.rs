//! The conformance suite of outboxes: one function a check, and the macro that makes tests of them.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    EventId, Headers, Key, Message, OUTBOX_BYTES_MIN, OUTBOX_LANES, OutboxMessage, OutboxStore,
    Result, outbox_lane,
};
use tokio::time::timeout;

use crate::broker::unique_topic;

/// Gives the suite handles on one outbox, and transactions that append to it.
#[async_trait]
pub trait OutboxHarness: Send + Sync {
    /// A handle; several are handles on the same outbox, which is empty at first. A durable one is
    /// read from its disk anew.
    ///
    /// # Errors
    ///
    /// When the store is away.
    async fn open(&self) -> Result<Arc<dyn OutboxStore>>;

    /// Begins a transaction. Where the store has one writer, it waits for the one before.
    ///
    /// # Errors
    ///
    /// When the store is away.
    async fn begin(&self) -> Result<Box<dyn OutboxTransaction>>;
}

/// A transaction of the business. Dropping it rolls back.
#[async_trait]
pub trait OutboxTransaction: Send {
    /// Appends messages, in order.
    ///
    /// # Errors
    ///
    /// Those of the store.
    async fn append(&mut self, messages: Vec<(EventId, Message)>) -> Result<()>;

    /// Commits.
    ///
    /// # Errors
    ///
    /// Those of the store.
    async fn commit(self: Box<Self>) -> Result<()>;
}

/// Expands to one `#[tokio::test]` for each check of [`outbox`](crate::outbox).
///
/// The expression makes the [`OutboxHarness`] of one test and may `await`. An attribute in front of
/// it is put on every test.
#[macro_export]
macro_rules! outbox_conformance {
    (@checks $attributes:tt $harness:expr; $($check:ident)*) => {
        $( $crate::outbox_conformance!(@check $attributes $harness; $check); )*
    };
    (@check [$(#[$attribute:meta])*] $harness:expr; $check:ident) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        $(#[$attribute])*
        async fn $check() {
            let harness = $harness;
            $crate::outbox::$check(&harness).await;
        }
    };
    (@all $attributes:tt $harness:expr) => {
        $crate::outbox_conformance!(@checks $attributes $harness;
            messages_come_back_in_order_and_unchanged
            what_was_rolled_back_is_never_seen
            removed_messages_are_gone
            removed_positions_are_not_given_again
            lanes_are_read_apart
            lanes_get_even_shares
            what_is_left_out_is_passed_over
            a_short_answer_is_all_there_is
            a_transaction_that_is_late_is_not_skipped
            transactions_one_after_the_other_keep_their_order
            an_append_is_heard_of
            depth_counts_what_waits
        );
    };
    // One attribute, not several: before an expression a repetition would be ambiguous.
    (#[$attribute:meta] $harness:expr) => {
        $crate::outbox_conformance!(@all [#[$attribute]] $harness);
    };
    ($harness:expr) => {
        $crate::outbox_conformance!(@all [] $harness);
    };
}

const SECOND: Duration = Duration::from_secs(1);

fn all_lanes() -> Vec<u32> {
    (0..OUTBOX_LANES).collect()
}

/// Message number `number` of a key.
fn message(key: &str, number: u64) -> (EventId, Message) {
    let message = Message::new(unique_topic(), format!("{number}")).with_key(Key::from(key));
    (EventId::new(), message)
}

/// The numbers of the messages of a key, as they come.
fn numbers(messages: &[OutboxMessage], key: &str) -> Vec<u64> {
    let of_key = messages
        .iter()
        .filter(|next| next.message.key == Some(Key::from(key)));
    let numbers = of_key.map(|next| {
        let text = std::str::from_utf8(&next.message.payload).expect("a number as text");
        text.parse().expect("a number")
    });
    numbers.collect()
}

async fn open(harness: &dyn OutboxHarness) -> Arc<dyn OutboxStore> {
    harness.open().await.expect("the store is there")
}

async fn append(harness: &dyn OutboxHarness, messages: Vec<(EventId, Message)>) {
    let mut transaction = harness.begin().await.expect("a transaction begins");
    transaction.append(messages).await.expect("there is room");
    transaction.commit().await.expect("it commits");
}

async fn next(store: &Arc<dyn OutboxStore>, messages_max: usize) -> Vec<OutboxMessage> {
    let next = store.next(&all_lanes(), messages_max, &[]).await;
    next.expect("the store is there")
}

async fn remove(store: &Arc<dyn OutboxStore>, messages: &[OutboxMessage]) {
    let positions: Vec<_> = messages.iter().map(|next| next.position).collect();
    let removed = store.remove(&positions).await;
    removed.expect("the store is there");
}

/// Reads what is next and removes it, as a relay does that has published it.
async fn take(store: &Arc<dyn OutboxStore>, messages_max: usize) -> Vec<OutboxMessage> {
    let found = next(store, messages_max).await;
    remove(store, &found).await;
    found
}

/// Takes until `count` messages were seen, and asserts that no more come.
async fn drain(store: &Arc<dyn OutboxStore>, seen: &mut Vec<OutboxMessage>, count: usize) {
    let drained = timeout(10 * SECOND, async {
        while seen.len() < count {
            seen.extend(take(store, 7).await);
            tokio::task::yield_now().await;
        }
    });
    drained.await.expect("all that was committed is found");
    assert!(next(store, 10).await.is_empty());
}

/// What is appended is found by another handle: topic, key, headers and payload byte by byte, ids
/// that are texts, and messages without a key.
pub async fn messages_come_back_in_order_and_unchanged(harness: &dyn OutboxHarness) {
    let headers = Headers::builder()
        .push("eb-type", "OrderPlaced")
        .and_then(|headers| headers.push("binary", [0u8, 159, 255].as_slice()))
        .expect("they fit")
        .build();
    let whole = Message::new(unique_topic(), vec![0u8, 1, 2, 255])
        .with_key(Key::new(vec![0u8, 255, 7]))
        .with_headers(headers);
    let named = EventId::parse("order-42/placed").expect("an id");
    let unkeyed = Message::new(unique_topic(), "no key");
    let unkeyed_id = EventId::new();
    let appended = vec![
        (named.clone(), whole.clone()),
        (unkeyed_id.clone(), unkeyed.clone()),
    ];
    append(harness, appended).await;
    let found = next(&open(harness).await, 10).await;
    assert_eq!(found.len(), 2);
    for (id, message) in [(named, whole), (unkeyed_id, unkeyed)] {
        let found = found
            .iter()
            .find(|next| next.id == id)
            .expect("it is there");
        assert_eq!(found.message.topic, message.topic);
        assert_eq!(found.message.key, message.key);
        assert_eq!(found.message.headers, message.headers);
        assert_eq!(found.message.payload, message.payload);
        assert_eq!(found.lane, outbox_lane(message.key.as_ref(), &id));
    }
}

/// A transaction that is rolled back, or dropped, publishes nothing.
pub async fn what_was_rolled_back_is_never_seen(harness: &dyn OutboxHarness) {
    let mut transaction = harness.begin().await.expect("a transaction begins");
    let appended = transaction.append(vec![message("a", 1)]).await;
    appended.expect("there is room");
    drop(transaction);
    append(harness, vec![message("a", 2)]).await;
    let found = next(&open(harness).await, 10).await;
    assert_eq!(numbers(&found, "a"), [2]);
}

/// What is removed does not come again, at another handle either; to remove it again is no error.
pub async fn removed_messages_are_gone(harness: &dyn OutboxHarness) {
    append(
        harness,
        (1..=5).map(|number| message("a", number)).collect(),
    )
    .await;
    let store = open(harness).await;
    let first = next(&store, 2).await;
    assert_eq!(numbers(&first, "a"), [1, 2]);
    remove(&store, &first).await;
    remove(&store, &first).await;
    let rest = next(&open(harness).await, 10).await;
    assert_eq!(numbers(&rest, "a"), [3, 4, 5]);
}

/// What is appended later has a greater position, also when nothing is left of what was before.
pub async fn removed_positions_are_not_given_again(harness: &dyn OutboxHarness) {
    let store = open(harness).await;
    let mut last = None;
    for number in 1..=3 {
        append(harness, vec![message("a", number)]).await;
        let found = next(&store, 10).await;
        assert_eq!(numbers(&found, "a"), [number]);
        assert!(
            last < Some(found[0].position),
            "{last:?} is before {found:?}"
        );
        last = Some(found[0].position);
        remove(&store, &found).await;
    }
}

/// Only lanes that are asked for are read.
pub async fn lanes_are_read_apart(harness: &dyn OutboxHarness) {
    let messages: Vec<_> = (0..50)
        .map(|number| message(&format!("key-{number}"), number))
        .collect();
    append(harness, messages).await;
    let store = open(harness).await;
    let mut found = 0;
    for lane in all_lanes() {
        let of_lane = store.next(&[lane], 100, &[]).await.expect("it is there");
        assert!(of_lane.iter().all(|next| next.lane == lane));
        found += of_lane.len();
    }
    assert_eq!(found, 50);
    let none = store.next(&[], 100, &[]).await.expect("it is there");
    assert!(none.is_empty());
}

/// A lane with many messages does not keep others waiting.
pub async fn lanes_get_even_shares(harness: &dyn OutboxHarness) {
    let few = (0..)
        .map(|number| format!("few-{number}"))
        .find(|few| outbox_lane(Some(&Key::from(few.as_str())), &EventId::new()) != many_lane())
        .expect("keys have different lanes");
    append(
        harness,
        (1..=100).map(|number| message("many", number)).collect(),
    )
    .await;
    append(harness, vec![message(&few, 1)]).await;
    let found = next(&open(harness).await, 20).await;
    assert_eq!(numbers(&found, &few), [1]);
    assert!(found.len() <= 20);
    let many = numbers(&found, "many");
    assert_eq!(many, (1..=many.len() as u64).collect::<Vec<_>>());
    assert!(many.len() >= 10, "{many:?}");
}

/// What is left out is passed over, wherever it stands, and what comes behind it is found: a relay reads
/// on while what it published is removed.
pub async fn what_is_left_out_is_passed_over(harness: &dyn OutboxHarness) {
    let keys = ["a", "b", "c"];
    let messages = (1..=20).flat_map(|number| keys.map(|key| message(key, number)));
    append(harness, messages.collect()).await;
    let store = open(harness).await;
    let found = next(&store, 40).await;
    let except: Vec<_> = found.iter().map(|next| next.position).collect();
    let mut seen = found;
    for _ in 0..60 {
        let except: Vec<_> = seen.iter().map(|next| next.position).collect();
        let more = store.next(&all_lanes(), 7, &except).await;
        seen.extend(more.expect("the store is there"));
    }
    for key in keys {
        assert_eq!(numbers(&seen, key), (1..=20).collect::<Vec<_>>());
    }
    // In the middle, with what is gone meanwhile.
    store
        .remove(&except[..5])
        .await
        .expect("the store is there");
    let rest = store.next(&all_lanes(), 100, &except[3..9]).await;
    let rest = rest.expect("the store is there");
    assert_eq!(rest.len(), 60 - 9);
    assert!(
        rest.iter()
            .all(|next| !except[..9].contains(&next.position))
    );
}

/// Less than one lane's share, and few bytes, say that nothing else waits: a relay does not look
/// again.
pub async fn a_short_answer_is_all_there_is(harness: &dyn OutboxHarness) {
    let large = |number| {
        let text = "x".repeat(OUTBOX_BYTES_MIN / 9);
        let message = Message::new(unique_topic(), text);
        (
            EventId::new(),
            message.with_key(Key::from(format!("key-{number}").as_str())),
        )
    };
    append(harness, (0..8).map(large).collect()).await;
    let store = open(harness).await;
    let share = 9;
    let found = next(&store, share * OUTBOX_LANES as usize).await;
    assert_eq!(found.len(), 8);
    let first = found[0].lane;
    let of_lane = found.iter().filter(|next| next.lane == first).count();
    let alone = store.next(&[first], share, &[]).await.expect("it is there");
    assert_eq!(alone.len(), of_lane);
}

fn many_lane() -> u32 {
    outbox_lane(Some(&Key::from("many")), &EventId::new())
}

/// A message whose transaction commits after later ones were published is published, too.
pub async fn a_transaction_that_is_late_is_not_skipped(harness: &dyn OutboxHarness) {
    let store = open(harness).await;
    let mut late = harness.begin().await.expect("a transaction begins");
    let appended = late.append(vec![message("late", 1)]).await;
    appended.expect("there is room");
    let mut seen = Vec::new();
    let others = async {
        for number in 1..=3 {
            append(harness, vec![message("early", number)]).await;
            seen.extend(take(&store, 10).await);
        }
    };
    let mut others = Box::pin(others);
    // Where there is one writer, they wait for it.
    let waits = timeout(SECOND, &mut others).await.is_err();
    late.commit().await.expect("it commits");
    if waits {
        others.await;
    } else {
        drop(others);
    }
    drain(&store, &mut seen, 4).await;
    assert_eq!(numbers(&seen, "late"), [1]);
    assert_eq!(numbers(&seen, "early"), [1, 2, 3]);
}

/// Of two transactions of which the second begins to append when the first has committed, the
/// messages of the first come first, also when the second was begun before it.
pub async fn transactions_one_after_the_other_keep_their_order(harness: &dyn OutboxHarness) {
    let store = open(harness).await;
    for number in (1..=20).step_by(2) {
        append_two(harness, number).await;
    }
    let mut seen = Vec::new();
    drain(&store, &mut seen, 20).await;
    assert_eq!(numbers(&seen, "a"), (1..=20).collect::<Vec<_>>());
}

/// Appends `number`, and the next one in a transaction that was begun before; or one after the
/// other, where an open transaction keeps others from beginning.
async fn append_two(harness: &dyn OutboxHarness, number: u64) {
    let mut begun = harness.begin().await.expect("a transaction begins");
    let first = timeout(SECOND / 4, append(harness, vec![message("a", number)])).await;
    if first.is_err() {
        drop(begun);
        append(harness, vec![message("a", number)]).await;
        begun = harness.begin().await.expect("a transaction begins");
    }
    let second = begun.append(vec![message("a", number + 1)]).await;
    second.expect("there is room");
    begun.commit().await.expect("it commits");
}

/// Whoever waits hears of a commit that another handle made.
pub async fn an_append_is_heard_of(harness: &dyn OutboxHarness) {
    let store = open(harness).await;
    for number in 1..=3 {
        let mut appended = store.appended();
        // Polled once, so that what comes now is heard of.
        let early = timeout(SECOND / 20, &mut appended).await;
        append(harness, vec![message("a", number)]).await;
        if early.is_err() {
            let heard = timeout(5 * SECOND, appended).await;
            heard.expect("the append is heard of");
        }
    }
}

/// The depth is what waits on each lane, and since when.
pub async fn depth_counts_what_waits(harness: &dyn OutboxHarness) {
    let store = open(harness).await;
    let empty = store.depth().await.expect("the store is there");
    assert_eq!((empty.messages(), empty.oldest), (0, None));
    append(
        harness,
        (1..=5).map(|number| message("many", number)).collect(),
    )
    .await;
    let depth = store.depth().await.expect("the store is there");
    assert_eq!(depth.lanes, [(many_lane(), 5)]);
    assert!(depth.oldest.is_some());
    remove(&store, &next(&store, 10).await).await;
    let empty = store.depth().await.expect("the store is there");
    assert_eq!((empty.messages(), empty.oldest), (0, None));
}
