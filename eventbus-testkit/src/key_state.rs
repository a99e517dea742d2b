//! The conformance suite of stores that keep keys apart: one function a check, and the macro that
//! makes tests of them.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    Claim, ErrorKind, EventId, Group, Headers, HeldMessage, HeldName, HeldPlace, HoldEntry, Key,
    KeyAction, KeyDecision, KeyStateStore, Message, Position, Result, Timestamp, TopicPartition,
    Wait,
};

use crate::broker::{unique_group, unique_topic};

/// Gives the suite handles on one store.
#[async_trait]
pub trait KeyStateHarness: Send + Sync {
    /// A handle; several are handles on the same store. A durable store is read from its disk anew.
    ///
    /// # Errors
    ///
    /// When the store is away.
    async fn open(&self) -> Result<Arc<dyn KeyStateStore>>;
}

/// Expands to one `#[tokio::test]` for each check of [`key_state`](crate::key_state).
///
/// The expression makes the [`KeyStateHarness`] of one test and may `await`. An attribute in front of
/// it is put on every test.
#[macro_export]
macro_rules! key_state_conformance {
    (@checks $attributes:tt $harness:expr; $($check:ident)*) => {
        $( $crate::key_state_conformance!(@check $attributes $harness; $check); )*
    };
    (@check [$(#[$attribute:meta])*] $harness:expr; $check:ident) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        $(#[$attribute])*
        async fn $check() {
            let harness = $harness;
            $crate::key_state::$check(&harness).await;
        }
    };
    (@all $attributes:tt $harness:expr) => {
        $crate::key_state_conformance!(@checks $attributes $harness;
            held_messages_come_back_in_order_and_unchanged
            name_goes_with_its_last_message
            later_claim_fences_earlier_ones
            looking_tells_which_claims_are_superseded
            claim_tells_what_is_held
            message_held_twice_is_there_once
            only_the_first_message_is_advanced
            wait_is_due_at_its_time
            attempts_are_kept
            parked_name_waits_for_a_decision
            decision_is_due_until_it_is_carried_out
            discard_is_due_until_nothing_is_left
            decision_is_heard_by_another_handle
            names_do_not_mix
            list_and_messages_come_in_pages
            concurrent_claims_leave_one_owner
        );
    };
    // One attribute, not several: before an expression a repetition would be ambiguous.
    (#[$attribute:meta] $harness:expr) => {
        $crate::key_state_conformance!(@all [#[$attribute]] $harness);
    };
    ($harness:expr) => {
        $crate::key_state_conformance!(@all [] $harness);
    };
}

struct Stage {
    store: Arc<dyn KeyStateStore>,
    group: Group,
    place: TopicPartition,
}

impl Stage {
    async fn new(harness: &dyn KeyStateHarness) -> Self {
        Self {
            store: open(harness).await,
            group: unique_group(),
            place: TopicPartition::new(unique_topic(), 3),
        }
    }

    async fn claim(&self) -> Claim {
        self.claim_and_names().await.0
    }

    async fn claim_and_names(&self) -> (Claim, Vec<HeldName>) {
        self.store
            .claim(&self.group, &self.place)
            .await
            .expect("a partition can be claimed")
    }

    /// Message number `number` of `name`, at the position of this number.
    fn entry(&self, name: &HeldName, number: u64, wait: Wait) -> HoldEntry {
        let mut message = Message::new(self.place.topic.clone(), format!("{number}"));
        if let HeldName::Key(key) = name {
            message = message.with_key(key.clone());
        }
        HoldEntry::new(
            name.clone(),
            message,
            Some(Position(u128::from(number))),
            wait,
        )
    }

    async fn hold(&self, claim: &Claim, name: &HeldName, numbers: &[u64], wait: Wait) {
        let entries: Vec<_> = numbers
            .iter()
            .map(|number| self.entry(name, *number, wait.clone()))
            .collect();
        self.store
            .hold(claim, &entries)
            .await
            .expect("the claim is the latest");
    }

    async fn advance(
        &self,
        claim: &Claim,
        name: &HeldName,
        done: Option<u64>,
    ) -> Option<HeldMessage> {
        self.store
            .advance(claim, name, done)
            .await
            .expect("the claim is the latest")
    }

    /// Takes all messages of a name, one after another, as texts.
    async fn take_all(&self, claim: &Claim, name: &HeldName) -> Vec<String> {
        let mut texts = Vec::new();
        let mut done = None;
        while let Some(first) = self.advance(claim, name, done).await {
            done = Some(first.number);
            texts.push(text_of(&first));
        }
        texts
    }

    async fn due_names(&self, claim: &Claim, now: Timestamp) -> Vec<HeldName> {
        let claims = [claim.clone()];
        let due = self.store.due(&self.group, &claims, now, 100).await;
        let due = due.expect("the store answers");
        due.names.into_iter().map(|due| due.held.name).collect()
    }

    fn held(&self, name: &HeldName) -> HeldPlace {
        HeldPlace::new(self.place.clone(), name.clone())
    }

    async fn decide(&self, name: &HeldName, action: KeyAction) -> bool {
        self.store
            .decide(&self.group, &self.held(name), &decision(action))
            .await
            .expect("the store answers")
    }
}

async fn open(harness: &dyn KeyStateHarness) -> Arc<dyn KeyStateStore> {
    harness.open().await.expect("the store can be opened")
}

fn key(text: &str) -> HeldName {
    HeldName::Key(Key::from(text))
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_micros(seconds * 1_000_000)
}

fn until(seconds: i64) -> Wait {
    let mut wait = Wait::nothing();
    wait.until = Some(at(seconds));
    wait
}

fn parked() -> Wait {
    let mut wait = Wait::nothing();
    wait.until = None;
    wait.attempts = 5;
    wait.cause = "error".to_owned();
    wait.error = "no funds".to_owned();
    wait
}

fn decision(action: KeyAction) -> KeyDecision {
    KeyDecision::new(action, "ann", "the bank is back", at(50))
}

fn text_of(held: &HeldMessage) -> String {
    String::from_utf8_lossy(&held.message.payload).into_owned()
}

/// What was held comes back message by message, with all its bytes, after the store was opened anew.
///
/// # Panics
///
/// When the store breaks the contract; so do all checks.
pub async fn held_messages_come_back_in_order_and_unchanged(harness: &dyn KeyStateHarness) {
    let mut stage = Stage::new(harness).await;
    let claim = stage.claim().await;
    let name = key("42");
    let headers = Headers::builder()
        .push("binary", [0, 255, 10])
        .and_then(|headers| headers.push("text", "grüezi"))
        .expect("within the limits")
        .build();
    let mut first = stage.entry(&name, 1, parked());
    first.message = Message::new(stage.place.topic.clone(), vec![0, 1, 2, 255])
        .with_key("42")
        .with_headers(headers.clone());
    stage
        .store
        .hold(&claim, &[first])
        .await
        .expect("it can be held");
    stage.hold(&claim, &name, &[2, 3], Wait::nothing()).await;

    stage.store = open(harness).await;
    let held = stage.advance(&claim, &name, None).await;
    let held = held.expect("it is held");
    assert_eq!(held.message.payload.as_ref(), [0, 1, 2, 255]);
    assert_eq!(held.message.headers, headers);
    assert_eq!(held.message.key, Some(Key::from("42")));
    assert_eq!(held.message.topic, stage.place.topic);
    assert_eq!(held.position, Some(Position(1)));
    let second = stage.advance(&claim, &name, Some(held.number)).await;
    let second = second.expect("a second one is held");
    assert_eq!(text_of(&second), "2");
    let third = stage.advance(&claim, &name, Some(second.number)).await;
    assert_eq!(third.as_ref().map(text_of).as_deref(), Some("3"));
}

/// With its last message a name is gone, and may be held anew.
pub async fn name_goes_with_its_last_message(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let claim = stage.claim().await;
    let name = key("42");
    stage.hold(&claim, &name, &[1, 2], Wait::nothing()).await;
    assert_eq!(stage.take_all(&claim, &name).await, ["1", "2"]);
    assert!(stage.claim_and_names().await.1.is_empty());
    let claim = stage.claim().await;
    stage.hold(&claim, &name, &[3], Wait::nothing()).await;
    assert_eq!(stage.take_all(&claim, &name).await, ["3"]);
}

/// What an earlier owner writes is refused and changes nothing.
pub async fn later_claim_fences_earlier_ones(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let earlier = stage.claim().await;
    let name = key("42");
    stage.hold(&earlier, &name, &[1], parked()).await;
    let later = stage.claim().await;
    assert!(later.fence > earlier.fence);

    let entry = stage.entry(&name, 2, Wait::nothing());
    let refused = [
        stage.store.hold(&earlier, &[entry]).await.err(),
        stage.store.advance(&earlier, &name, Some(1)).await.err(),
        stage
            .store
            .wait(&earlier, &name, &until(1), true)
            .await
            .err(),
    ];
    for error in refused {
        let kind = error.map(|error| error.kind());
        assert_eq!(kind, Some(ErrorKind::Conflict));
    }
    assert!(stage.due_names(&earlier, at(100)).await.is_empty());
    assert_eq!(stage.take_all(&later, &name).await, ["1"]);
}

/// Whoever asks what is due under an earlier claim hears that it is one.
pub async fn looking_tells_which_claims_are_superseded(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let earlier = stage.claim().await;
    stage.hold(&earlier, &key("42"), &[1], until(1)).await;
    let later = stage.claim().await;
    let other = TopicPartition::new(stage.place.topic.clone(), stage.place.partition + 1);
    let other = stage.store.claim(&stage.group, &other).await;
    let (other, _) = other.expect("the store answers");

    let claims = [other.clone(), earlier.clone()];
    let due = stage.store.due(&stage.group, &claims, at(100), 10).await;
    let due = due.expect("the store answers");
    assert!(due.names.is_empty());
    assert_eq!(due.superseded, [earlier]);
    let claims = [other, later];
    let due = stage.store.due(&stage.group, &claims, at(100), 10).await;
    let due = due.expect("the store answers");
    assert_eq!(due.names.len(), 1);
    assert!(due.superseded.is_empty());
}

/// A claim says which names are held.
pub async fn claim_tells_what_is_held(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let (claim, names) = stage.claim_and_names().await;
    assert!(names.is_empty());
    let single = HeldName::Message(EventId::from_name("one message"));
    stage.hold(&claim, &key("42"), &[1, 2], parked()).await;
    stage.hold(&claim, &single, &[3], until(7)).await;
    let (_, mut names) = stage.claim_and_names().await;
    names.sort();
    assert_eq!(names, [key("42"), single]);
}

/// A repeated call holds nothing twice, whatever was taken meanwhile.
pub async fn message_held_twice_is_there_once(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let claim = stage.claim().await;
    let name = key("42");
    stage.hold(&claim, &name, &[1, 2], parked()).await;
    stage.hold(&claim, &name, &[1, 2, 3], parked()).await;
    let first = stage.advance(&claim, &name, None).await;
    let first = first.expect("it is held").number;
    stage.advance(&claim, &name, Some(first)).await;
    stage.hold(&claim, &name, &[1, 4], parked()).await;
    assert_eq!(stage.take_all(&claim, &name).await, ["2", "3", "4"]);
}

/// Only the first message can be done, and only once.
pub async fn only_the_first_message_is_advanced(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let claim = stage.claim().await;
    let name = key("42");
    stage.hold(&claim, &name, &[1, 2, 3], parked()).await;
    let first = stage.advance(&claim, &name, None).await;
    let first = first.expect("it is held").number;
    let second = stage.advance(&claim, &name, Some(first)).await;
    let again = stage.advance(&claim, &name, Some(first)).await;
    assert_eq!(
        second.map(|held| held.number),
        again.map(|held| held.number),
        "a repeated call removes nothing more"
    );
    assert_eq!(stage.take_all(&claim, &name).await, ["2", "3"]);
}

/// A name is due when its time has come, and the store says when the next one is.
pub async fn wait_is_due_at_its_time(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let claim = stage.claim().await;
    stage.hold(&claim, &key("late"), &[1], until(30)).await;
    stage.hold(&claim, &key("soon"), &[2], until(10)).await;
    let claims = [claim.clone()];
    let early = stage.store.due(&stage.group, &claims, at(9), 100).await;
    let early = early.expect("the store answers");
    assert!(early.names.is_empty());
    assert_eq!(early.next, Some(at(10)));
    assert_eq!(stage.due_names(&claim, at(10)).await, [key("soon")]);
    let both = [key("soon"), key("late")];
    assert_eq!(stage.due_names(&claim, at(30)).await, both);
    let one = stage.store.due(&stage.group, &claims, at(30), 1).await;
    assert_eq!(one.expect("the store answers").names.len(), 1);

    let moved = stage
        .store
        .wait(&claim, &key("soon"), &until(40), false)
        .await;
    moved.expect("the claim is the latest");
    assert_eq!(stage.due_names(&claim, at(30)).await, [key("late")]);
}

/// How often the first message failed is kept, and is the first message's alone.
pub async fn attempts_are_kept(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let claim = stage.claim().await;
    let name = key("42");
    let mut wait = until(10);
    wait.attempts = 3;
    wait.first_failed = Some(at(1));
    stage.hold(&claim, &name, &[1, 2], wait).await;
    let first = stage.advance(&claim, &name, None).await;
    let first = first.expect("it is held");
    assert_eq!((first.attempts, first.first_failed), (3, Some(at(1))));
    let second = stage.advance(&claim, &name, Some(first.number)).await;
    let second = second.expect("it is held");
    assert_eq!((second.attempts, second.first_failed), (0, None));
}

/// A parked name is never due by itself.
pub async fn parked_name_waits_for_a_decision(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let claim = stage.claim().await;
    stage.hold(&claim, &key("42"), &[1, 2], parked()).await;
    let claims = [claim.clone()];
    let due = stage
        .store
        .due(&stage.group, &claims, at(i64::MAX / 1_000_000), 100)
        .await;
    let due = due.expect("the store answers");
    assert!(due.names.is_empty());
    assert_eq!(due.next, None);
    let list = stage.store.list(&stage.group, None, 10).await;
    let list = list.expect("the store answers");
    assert_eq!(list.len(), 1);
    assert!(list[0].wait.is_parked());
    assert_eq!(list[0].messages, 2);
    assert_eq!(
        (list[0].wait.cause.as_str(), list[0].wait.error.as_str()),
        ("error", "no funds")
    );
}

/// A decision makes its name due until it was carried out; meanwhile there is no second one.
pub async fn decision_is_due_until_it_is_carried_out(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let claim = stage.claim().await;
    let name = key("42");
    assert!(!stage.decide(&name, KeyAction::Retry).await, "nothing held");
    stage.hold(&claim, &name, &[1, 2], parked()).await;
    assert!(stage.decide(&name, KeyAction::Retry).await);
    assert!(!stage.decide(&name, KeyAction::Discard).await);
    let claims = [claim.clone()];
    let due = stage.store.due(&stage.group, &claims, at(60), 10).await;
    let due = due.expect("the store answers").names;
    assert_eq!(due[0].decision, Some(decision(KeyAction::Retry)));

    // Something else happened to the name meanwhile.
    let parked_again = stage.store.wait(&claim, &name, &parked(), false).await;
    parked_again.expect("the claim is the latest");
    assert_eq!(stage.due_names(&claim, at(60)).await.len(), 1);
    let carried_out = stage.store.wait(&claim, &name, &parked(), true).await;
    carried_out.expect("the claim is the latest");
    assert!(stage.due_names(&claim, at(60)).await.is_empty());

    assert!(stage.decide(&name, KeyAction::Release).await);
    let first = stage.advance(&claim, &name, None).await;
    stage
        .advance(&claim, &name, first.map(|first| first.number))
        .await;
    let list = stage.store.list(&stage.group, None, 10).await;
    let list = list.expect("the store answers");
    assert_eq!(list[0].decision, None, "it was carried out");
    assert_eq!(stage.due_names(&claim, at(60)).await, [name]);
}

/// What is to be discarded stays so until nothing is left of it.
pub async fn discard_is_due_until_nothing_is_left(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let claim = stage.claim().await;
    let name = key("42");
    stage.hold(&claim, &name, &[1, 2], parked()).await;
    assert!(stage.decide(&name, KeyAction::Discard).await);
    let first = stage.advance(&claim, &name, None).await;
    stage
        .advance(&claim, &name, first.map(|first| first.number))
        .await;
    let claims = [claim.clone()];
    let due = stage.store.due(&stage.group, &claims, at(60), 10).await;
    let due = due.expect("the store answers").names;
    assert_eq!(due[0].decision, Some(decision(KeyAction::Discard)));
    assert_eq!(stage.take_all(&claim, &name).await, ["2"]);
    assert!(stage.due_names(&claim, at(60)).await.is_empty());
}

/// Whoever waits for decisions hears of one that was made through another handle.
pub async fn decision_is_heard_by_another_handle(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let claim = stage.claim().await;
    let name = key("42");
    stage.hold(&claim, &name, &[1], parked()).await;
    let operator = open(harness).await;
    loop {
        let claims = [claim.clone()];
        let due = stage.store.due(&stage.group, &claims, at(60), 10).await;
        let due = due.expect("the store answers");
        if !due.names.is_empty() {
            break;
        }
        let heard = stage.store.decided(&stage.group, due.version);
        let (held, retry) = (stage.held(&name), decision(KeyAction::Retry));
        let decided = operator.decide(&stage.group, &held, &retry);
        let both = async { tokio::join!(heard, decided) };
        let both = tokio::time::timeout(Duration::from_secs(60), both).await;
        both.expect("the decision is heard")
            .1
            .expect("the store answers");
    }
}

/// Neither groups nor partitions nor names see each other's messages.
pub async fn names_do_not_mix(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let mut neighbour = Stage::new(harness).await;
    neighbour.group = stage.group.clone();
    neighbour.place = TopicPartition::new(stage.place.topic.clone(), 4);
    let mut stranger = Stage::new(harness).await;
    stranger.place = stage.place.clone();
    let claim = stage.claim().await;
    let name = key("42");
    stage.hold(&claim, &name, &[1], parked()).await;
    stage.hold(&claim, &key("43"), &[2], parked()).await;
    for other in [&neighbour, &stranger] {
        let (claim, names) = other.claim_and_names().await;
        assert!(names.is_empty());
        other.hold(&claim, &name, &[9], parked()).await;
        assert_eq!(other.take_all(&claim, &name).await, ["9"]);
    }
    assert_eq!(stage.take_all(&claim, &name).await, ["1"]);
    assert_eq!(stage.take_all(&claim, &key("43")).await, ["2"]);
}

/// Long lists come in pages, without a gap and without a repetition.
pub async fn list_and_messages_come_in_pages(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let claim = stage.claim().await;
    for number in 0..7 {
        let name = key(&number.to_string());
        stage
            .hold(&claim, &name, &[number * 10, number * 10 + 1], parked())
            .await;
    }
    let mut names = Vec::new();
    let mut after = None;
    loop {
        let page = stage.store.list(&stage.group, after.as_ref(), 3).await;
        let page = page.expect("the store answers");
        assert!(page.len() <= 3);
        let Some(last) = page.last() else { break };
        after = Some(last.held.clone());
        names.extend(page.into_iter().map(|report| report.held.name));
    }
    names.sort();
    let all: Vec<_> = (0..7).map(|number| key(&number.to_string())).collect();
    assert_eq!(names, all);

    let held = stage.held(&key("3"));
    let first = stage.store.messages(&stage.group, &held, None, 1).await;
    let first = first.expect("the store answers");
    assert_eq!(text_of(&first[0]), "30");
    assert_eq!(first[0].attempts, 5);
    let after = Some(first[0].number);
    let rest = stage.store.messages(&stage.group, &held, after, 10).await;
    let rest = rest.expect("the store answers");
    assert_eq!(rest.iter().map(text_of).collect::<Vec<_>>(), ["31"]);
}

/// However many claim at once, one of them owns the partition in the end.
pub async fn concurrent_claims_leave_one_owner(harness: &dyn KeyStateHarness) {
    let stage = Stage::new(harness).await;
    let claims = futures_util::future::join_all((0..16).map(|_| stage.claim())).await;
    let mut owners = 0;
    for claim in &claims {
        let entry = stage.entry(&key("42"), claim.fence, parked());
        owners += usize::from(stage.store.hold(claim, &[entry]).await.is_ok());
    }
    assert_eq!(owners, 1);
}
