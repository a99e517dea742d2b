//! The conformance suite of stores that keep messages until their time comes: one function a check,
//! and the macro that makes tests of them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    ErrorKind, EventId, Headers, Key, MemberId, Message, Refused, Result, ScheduleStore, Scheduled,
    TakeScheduled, Taken, Timestamp,
};
use tokio::time::Instant;

use crate::broker::unique_topic;

/// Gives the suite handles on one store that nothing else uses.
#[async_trait]
pub trait ScheduleHarness: Send + Sync {
    /// A handle; several are handles on the same store. A durable store is read from its disk anew.
    ///
    /// # Errors
    ///
    /// When the store is away.
    async fn open(&self) -> Result<Arc<dyn ScheduleStore>>;
}

/// Expands to one `#[tokio::test]` for each check of [`schedule`](crate::schedule).
///
/// The expression makes the [`ScheduleHarness`] of one test and may `await`. An attribute in front of
/// it is put on every test.
#[macro_export]
macro_rules! schedule_store_conformance {
    (@checks $attributes:tt $harness:expr; $($check:ident)*) => {
        $( $crate::schedule_store_conformance!(@check $attributes $harness; $check); )*
    };
    (@check [$(#[$attribute:meta])*] $harness:expr; $check:ident) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        $(#[$attribute])*
        async fn $check() {
            let harness = $harness;
            $crate::schedule::$check(&harness).await;
        }
    };
    (@all $attributes:tt $harness:expr) => {
        $crate::schedule_store_conformance!(@checks $attributes $harness;
            scheduled_message_comes_unchanged_at_its_time
            earliest_comes_first_and_ties_as_they_were_added
            id_that_waits_is_passed_over
            cancelled_message_does_not_come
            taken_message_is_not_cancelled
            what_was_not_published_comes_again_first
            refused_message_comes_again_later
            batches_are_bounded
            other_takers_wait_for_the_report
            late_taker_is_replaced_and_its_report_refused
            dead_taker_is_replaced_at_once
            report_ends_the_claim
            earlier_message_is_heard_by_another_handle
            waiting_messages_are_counted
            list_comes_in_pages
            concurrent_takers_share_nothing
        );
    };
    // One attribute, not several: before an expression a repetition would be ambiguous.
    (#[$attribute:meta] $harness:expr) => {
        $crate::schedule_store_conformance!(@all [#[$attribute]] $harness);
    };
    ($harness:expr) => {
        $crate::schedule_store_conformance!(@all [] $harness);
    };
}

/// Nobody waits as long in these checks.
const TTL: Duration = Duration::from_secs(600);
const LIMIT: Duration = Duration::from_secs(20);

struct Stage {
    store: Arc<dyn ScheduleStore>,
    topic: eventbus_core::Topic,
    taker: MemberId,
}

impl Stage {
    async fn new(harness: &dyn ScheduleHarness) -> Self {
        Self {
            store: open(harness).await,
            topic: unique_topic(),
            taker: MemberId::random(),
        }
    }

    /// A message for a time, with the text as its payload and its id.
    fn at(&self, seconds: i64, text: &str) -> Scheduled {
        let message = Message::new(self.topic.clone(), text.to_owned()).with_key("k");
        Scheduled::new(id(text), time(seconds), message)
    }

    async fn add(&self, messages: &[Scheduled]) {
        self.store.add(messages).await.expect("there is room");
    }

    fn request(&self, now: i64) -> TakeScheduled {
        TakeScheduled::new(self.taker, time(now), TTL)
    }

    async fn take(&self, now: i64) -> Taken {
        take(&*self.store, &self.request(now)).await
    }

    async fn done(&self, claim: u64, published: &[&str]) {
        report(&*self.store, claim, published)
            .await
            .expect("the claim is the latest");
    }
}

async fn open(harness: &dyn ScheduleHarness) -> Arc<dyn ScheduleStore> {
    harness.open().await.expect("the store opens")
}

async fn take(store: &dyn ScheduleStore, request: &TakeScheduled) -> Taken {
    store.take(request).await.expect("the store answers")
}

async fn report(store: &dyn ScheduleStore, claim: u64, published: &[&str]) -> Result<()> {
    let published: Vec<_> = published.iter().map(|text| id(text)).collect();
    store.done(claim, &published, &nothing()).await
}

fn nothing() -> Refused {
    Refused {
        ids: Vec::new(),
        unknown: Vec::new(),
        again: time(0),
    }
}

fn id(text: &str) -> EventId {
    EventId::parse(text).expect("a text is an id")
}

fn time(seconds: i64) -> Timestamp {
    Timestamp::from_micros(1_800_000_000_000_000 + seconds * 1_000_000)
}

fn texts(taken: &Taken) -> Vec<String> {
    let text = |it: &Scheduled| String::from_utf8_lossy(&it.message.payload).into_owned();
    taken.messages.iter().map(text).collect()
}

/// A message comes when it is due, not before, with all it had, also from another handle; until
/// then the store says when that will be.
pub async fn scheduled_message_comes_unchanged_at_its_time(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    let headers = Headers::builder()
        .push("eb-type", "Reminder")
        .and_then(|headers| headers.push("binary", [0, 255, 10]))
        .expect("within limits")
        .build();
    let mut message = Message::new(stage.topic.clone(), vec![0u8, 159, 146, 150]);
    message = message
        .with_headers(headers)
        .with_key(Key::new(vec![1u8, 0, 255]));
    let scheduled = Scheduled::new(EventId::new(), time(10), message);
    stage.add(std::slice::from_ref(&scheduled)).await;

    let stage = Stage {
        store: open(harness).await,
        ..stage
    };
    let early = stage.take(9).await;
    assert!(early.messages.is_empty() && early.busy.is_none());
    assert_eq!(early.next, Some(time(10)));
    let taken = stage.take(10).await;
    assert_eq!(taken.messages.len(), 1);
    let found = &taken.messages[0];
    assert_eq!(
        (&found.id, found.not_before),
        (&scheduled.id, scheduled.not_before)
    );
    let (found, message) = (&found.message, &scheduled.message);
    assert_eq!((&found.topic, &found.key), (&message.topic, &message.key));
    assert_eq!(found.payload, message.payload);
    assert!(found.headers.iter().eq(message.headers.iter()));
    let published = std::slice::from_ref(&scheduled.id);
    let done = stage.store.done(taken.claim, published, &nothing()).await;
    done.expect("the claim is the latest");
    let after = stage.take(11).await;
    assert!(after.messages.is_empty() && after.next.is_none());
}

/// What is due comes by time, and where times are equal as it was added.
pub async fn earliest_comes_first_and_ties_as_they_were_added(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    stage.add(&[stage.at(3, "d"), stage.at(1, "a")]).await;
    stage.add(&[stage.at(2, "b")]).await;
    stage.add(&[stage.at(2, "c"), stage.at(9, "later")]).await;
    let taken = stage.take(5).await;
    assert_eq!(texts(&taken), ["a", "b", "c", "d"]);
    assert_eq!(taken.next, Some(time(9)));
}

/// Adding an id again, in the same call or later, leaves the message that waits as it is.
pub async fn id_that_waits_is_passed_over(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    let other = Scheduled::new(
        id("a"),
        time(8),
        Message::new(stage.topic.clone(), "another"),
    );
    stage.add(&[stage.at(1, "a"), other.clone()]).await;
    stage.add(&[other, stage.at(2, "b")]).await;
    let taken = stage.take(9).await;
    assert_eq!(texts(&taken), ["a", "b"]);
    stage.done(taken.claim, &["a", "b"]).await;
    // It does not wait any more, so that it is another schedule of the same id.
    stage.add(&[stage.at(1, "a")]).await;
    assert_eq!(texts(&stage.take(9).await), ["a"]);
}

/// A cancelled message is gone, once.
pub async fn cancelled_message_does_not_come(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    stage.add(&[stage.at(1, "a"), stage.at(2, "b")]).await;
    let other = open(harness).await;
    let cancel = async |text| other.cancel(&id(text)).await.expect("the store answers");
    assert!(cancel("a").await);
    assert!(!cancel("a").await);
    assert!(!cancel("never added").await);
    assert_eq!(texts(&stage.take(5).await), ["b"]);
}

/// What was taken may be on the broker: cancelling says that it came too late, also when the taker
/// did not publish it.
pub async fn taken_message_is_not_cancelled(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    stage.add(&[stage.at(1, "a"), stage.at(2, "b")]).await;
    let taken = stage.take(1).await;
    let cancel = async |text| {
        let cancelled = stage.store.cancel(&id(text)).await;
        cancelled.expect("the store answers")
    };
    assert!(!cancel("a").await);
    assert!(cancel("b").await, "it was not due");
    stage.done(taken.claim, &[]).await;
    assert!(!cancel("a").await);
    assert_eq!(texts(&stage.take(1).await), ["a"]);
}

/// What was not reported as published is due still, before later ones.
pub async fn what_was_not_published_comes_again_first(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    stage
        .add(&[stage.at(1, "a"), stage.at(2, "b"), stage.at(3, "c")])
        .await;
    let taken = stage.take(2).await;
    assert_eq!(texts(&taken), ["a", "b"]);
    stage.done(taken.claim, &["b"]).await;
    let taken = stage.take(3).await;
    assert_eq!(texts(&taken), ["a", "c"]);
    // Taking again without a report begins anew.
    assert_eq!(texts(&stage.take(3).await), ["a", "c"]);
}

/// Messages that the broker refused come from the time on that was said, in the order that was said,
/// hold up nobody, and can be cancelled, unless they may be on the broker all the same.
pub async fn refused_message_comes_again_later(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    stage
        .add(&[stage.at(2, "b"), stage.at(2, "c"), stage.at(1, "a")])
        .await;
    let taken = stage.take(2).await;
    let refused = Refused {
        ids: vec![id("a"), id("c")],
        unknown: vec![id("c")],
        again: time(60),
    };
    let done = stage.store.done(taken.claim, &[id("b")], &refused).await;
    done.expect("the claim is the latest");
    let early = stage.take(59).await;
    assert!(early.messages.is_empty());
    assert_eq!(early.next, Some(time(60)));
    let listed = stage.store.list(None, 10).await.expect("it answers");
    assert_eq!((listed.len(), listed[0].due), (2, time(60)));
    let cancelled = stage.store.cancel(&id("c")).await;
    assert!(!cancelled.expect("it answers"), "it may be on the broker");
    let taken = stage.take(61).await;
    assert_eq!(texts(&taken), ["a", "c"], "in the order that was said");
    assert_eq!(taken.messages[0].not_before, time(1), "as it was asked for");
    let refused = Refused {
        ids: vec![id("a")],
        unknown: Vec::new(),
        again: time(120),
    };
    let done = stage.store.done(taken.claim, &[id("c")], &refused).await;
    done.expect("the claim is the latest");
    assert!(stage.store.cancel(&id("a")).await.expect("it answers"));
}

/// A batch has at most so many messages and bytes, and always one message.
pub async fn batches_are_bounded(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    let large = "x".repeat(1000);
    let message = |text: &str| Message::new(stage.topic.clone(), text.to_owned());
    let all = [("1", "s"), ("2", "s"), ("3", &large), ("4", "s")];
    let all = all.map(|(name, text)| Scheduled::new(id(name), time(1), message(text)));
    stage.add(&all).await;
    for (messages_max, bytes_max, expected) in [(2, 9000, 2), (9, 500, 2), (9, 9000, 4), (9, 0, 1)]
    {
        let request = stage.request(1).with_limits(messages_max, bytes_max);
        let taken = take(&*stage.store, &request).await;
        assert_eq!(
            taken.messages.len(),
            expected,
            "{messages_max}, {bytes_max}"
        );
    }
}

/// While one is at it, others are told who, and take nothing, not even what it did not take.
pub async fn other_takers_wait_for_the_report(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    stage
        .add(&[stage.at(1, "a"), stage.at(2, "b"), stage.at(9, "c")])
        .await;
    let taken = stage.take(1).await;
    let other = Stage {
        store: open(harness).await,
        taker: MemberId::random(),
        ..Stage::new(harness).await
    };
    let told = other.take(5).await;
    assert!(told.messages.is_empty());
    let busy = told.busy.expect("somebody is at it");
    assert_eq!(busy.taker, stage.taker);
    assert!(busy.free_in > TTL / 2 && busy.free_in <= TTL);
    assert_eq!(told.next, Some(time(9)));
    stage.done(taken.claim, &["a"]).await;
    assert_eq!(texts(&other.take(5).await), ["b"]);
}

/// A taker whose time is over is replaced; what it reports then is refused, and changes nothing.
pub async fn late_taker_is_replaced_and_its_report_refused(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    stage.add(&[stage.at(1, "a"), stage.at(1, "b")]).await;
    let mut request = stage.request(1);
    request.ttl = Duration::from_millis(100);
    let other = Stage {
        store: open(harness).await,
        taker: MemberId::random(),
        topic: stage.topic.clone(),
    };
    let begun = Instant::now();
    let late = take(&*stage.store, &request).await;
    let taken = loop {
        let taken = other.take(1).await;
        match taken.busy {
            None => break taken,
            Some(busy) => tokio::time::sleep(busy.free_in).await,
        }
        assert!(begun.elapsed() < LIMIT, "its time is never over");
    };
    assert!(begun.elapsed() >= Duration::from_millis(50), "too early");
    assert_eq!(texts(&taken), ["a", "b"]);
    let reported = report(&*stage.store, late.claim, &["a", "b"]).await;
    let error = reported.expect_err("another one has taken over");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    other.done(taken.claim, &["a"]).await;
    assert_eq!(texts(&other.take(1).await), ["b"]);
}

/// Who names the taker dead that is at it replaces it; who names another one does not.
pub async fn dead_taker_is_replaced_at_once(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    stage.add(&[stage.at(1, "a")]).await;
    let dead = stage.take(1).await;
    let other = MemberId::random();
    let request = TakeScheduled::new(other, time(1), TTL);
    let wrong = request.clone().with_dead(MemberId::random());
    assert!(take(&*stage.store, &wrong).await.busy.is_some());
    let taken = take(&*stage.store, &request.with_dead(stage.taker)).await;
    assert_eq!(texts(&taken), ["a"]);
    let reported = report(&*stage.store, dead.claim, &["a"]).await;
    assert_eq!(
        reported.expect_err("it is replaced").kind(),
        ErrorKind::Conflict
    );
}

/// A report counts once: served again it cannot remove what was added since.
pub async fn report_ends_the_claim(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    stage.add(&[stage.at(1, "a")]).await;
    let taken = stage.take(1).await;
    stage.done(taken.claim, &["a"]).await;
    stage.add(&[stage.at(1, "a")]).await;
    let again = report(&*stage.store, taken.claim, &["a"]).await;
    assert_eq!(
        again.expect_err("it was reported").kind(),
        ErrorKind::Conflict
    );
    assert_eq!(texts(&stage.take(1).await), ["a"]);
}

/// Whoever waits for the next message hears of an earlier one that another handle adds.
pub async fn earlier_message_is_heard_by_another_handle(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    stage.add(&[stage.at(100, "a")]).await;
    let seen = stage.take(1).await.version;
    let other = open(harness).await;
    let waiting = tokio::spawn(async move { other.changed(seen).await });
    stage.add(&[stage.at(50, "b")]).await;
    let heard = tokio::time::timeout(LIMIT, waiting).await;
    heard.expect("it is heard").expect("it waits");
    assert_eq!(stage.take(1).await.next, Some(time(50)));
    // What was added before it is asked is heard, too.
    let heard = tokio::time::timeout(LIMIT, stage.store.changed(seen)).await;
    heard.expect("it is not missed");
}

/// The number of waiting messages follows what is added, cancelled and published.
pub async fn waiting_messages_are_counted(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    assert_eq!(stage.take(0).await.waiting, 0);
    stage
        .add(&[stage.at(1, "a"), stage.at(1, "b"), stage.at(2, "c")])
        .await;
    stage.add(&[stage.at(5, "c")]).await;
    assert_eq!(stage.take(0).await.waiting, 3);
    assert!(stage.store.cancel(&id("c")).await.expect("it answers"));
    let taken = stage.take(1).await;
    assert_eq!(taken.waiting, 2, "what is taken waits still");
    stage.done(taken.claim, &["a", "b", "not there"]).await;
    assert_eq!(stage.take(9).await.waiting, 0);
}

/// What waits is listed in the order of its times, page by page, with what operators want to know.
pub async fn list_comes_in_pages(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    let headers = Headers::builder().push("eb-type", "Reminder");
    let mut typed = stage.at(2, "typed");
    typed.message = typed
        .message
        .with_headers(headers.expect("within limits").build());
    let bytes = typed.message.size();
    stage
        .add(&[stage.at(7, "late"), typed, stage.at(2, "tie")])
        .await;
    stage.add(&[stage.at(1, "early")]).await;
    stage.take(1).await;
    let mut listed = Vec::new();
    loop {
        let page = stage.store.list(listed.last(), 2).await;
        let page = page.expect("the store answers");
        assert!(page.len() <= 2);
        if page.is_empty() {
            break;
        }
        listed.extend(page);
    }
    let ids: Vec<_> = listed.iter().map(|it| it.id.to_string()).collect();
    assert_eq!(ids, ["early", "typed", "tie", "late"]);
    let taken: Vec<_> = listed.iter().map(|it| it.is_taken).collect();
    assert_eq!(taken, [true, false, false, false]);
    let typed = &listed[1];
    assert_eq!((&typed.topic, typed.due), (&stage.topic, time(2)));
    assert_eq!(typed.event_type.as_deref(), Some("Reminder"));
    assert_eq!(typed.bytes, bytes);
    assert_eq!(
        typed.key.as_ref().map(ToString::to_string).as_deref(),
        Some("k")
    );
}

/// However many take at once, each message is reported by one of them.
pub async fn concurrent_takers_share_nothing(harness: &dyn ScheduleHarness) {
    let stage = Stage::new(harness).await;
    let all: Vec<_> = (0..60).map(|it| stage.at(it, &it.to_string())).collect();
    stage.add(&all).await;
    let mut takers = Vec::new();
    for _ in 0..4 {
        let store = open(harness).await;
        takers.push(tokio::spawn(async move {
            let request = TakeScheduled::new(MemberId::random(), time(99), TTL).with_limits(7, 999);
            let mut mine = Vec::new();
            loop {
                let taken = take(&*store, &request).await;
                if taken.busy.is_some() {
                    tokio::task::yield_now().await;
                    continue;
                }
                let texts = texts(&taken);
                if texts.is_empty() {
                    return mine;
                }
                let ids: Vec<_> = texts.iter().map(String::as_str).collect();
                let reported = report(&*store, taken.claim, &ids).await;
                reported.expect("nobody takes over");
                mine.extend(texts);
            }
        }));
    }
    let mut found = Vec::new();
    for taker in takers {
        found.extend(taker.await.expect("it does not panic"));
    }
    let distinct: HashSet<_> = found.iter().collect();
    assert_eq!((found.len(), distinct.len()), (60, 60));
}
