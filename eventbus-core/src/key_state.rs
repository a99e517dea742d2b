//! The contract of stores that keep keys apart: the messages of a key that waits, in their order.
//!
//! ```text
//!  can't be handled, or to be tried again later ─▶ hold ─▶ [ first │ second │ … ] ─▶ settled on the broker
//!  later messages of the key ────────────────────▶ hold ──────────────▲
//!  its time has come, or an operator decided ─▶ advance ─▶ handled ─▶ advance … ─▶ nothing left: the key is free
//! ```

use std::fmt;

use async_trait::async_trait;

use crate::clock::Timestamp;
use crate::delivery::Position;
use crate::envelope::EventId;
use crate::error::Result;
use crate::message::{Group, Key, Message};
use crate::topic::TopicPartition;

/// Most keys that are held for one group on one partition. When they are used up, what can't be
/// handled holds its key on the broker, as with [`OnPoison::BlockKey`](crate::OnPoison::BlockKey).
pub const HELD_KEYS_MAX: usize = 10_000;

/// Keeps keys apart durably: the half that consumers use.
///
/// One member at a time writes for a group and a partition: the one that claimed it last. What an
/// earlier one still writes is refused, so that it cannot change what its successor has read.
#[async_trait]
pub trait KeyStateStore: KeyStateDesk {
    /// Takes over what is held for `group` on one partition, and tells it.
    ///
    /// # Contract
    ///
    /// - From now on calls with an earlier claim of this group and partition are `Conflict`.
    /// - Durable when it resolves.
    async fn claim(&self, group: &Group, place: &TopicPartition) -> Result<(Claim, Vec<HeldName>)>;

    /// Puts messages last, each behind those of its name, in the given order. All or nothing,
    /// durable when it resolves.
    ///
    /// # Contract
    ///
    /// - The first message of a name says what the name waits for; what later ones say of that is
    ///   passed over.
    /// - A message whose position is not behind the last one held of its name is there already: it
    ///   is passed over, so that a call may be repeated.
    ///
    /// # Errors
    ///
    /// `Conflict` when the claim is an earlier one; `RateLimited` when a new name would be more
    /// than [`HELD_KEYS_MAX`].
    async fn hold(&self, claim: &Claim, entries: &[HoldEntry]) -> Result<()>;

    /// Removes the first message of a name, if it has the number `done`, and returns the one that
    /// is first then, not tried yet. With its last message the name goes, too, and `None` says so.
    /// Decisions to retry or release are carried out thereby; one to discard goes on.
    ///
    /// # Errors
    ///
    /// `Conflict` when the claim is an earlier one.
    async fn advance(
        &self,
        claim: &Claim,
        name: &HeldName,
        done: Option<u64>,
    ) -> Result<Option<HeldMessage>>;

    /// Sets what a name waits for and how its first message fared. `carried_out` says that what an
    /// operator had decided was tried, and is forgotten; otherwise it is due still. Passes over a
    /// name that is not held.
    ///
    /// # Errors
    ///
    /// `Conflict` when the claim is an earlier one.
    async fn wait(
        &self,
        claim: &Claim,
        name: &HeldName,
        wait: &Wait,
        carried_out: bool,
    ) -> Result<()>;

    /// The names held under these claims of `group` whose time has come at `now`, or about which an operator has
    /// decided: at most `names_max`, longest due first; and when the next one's time comes.
    ///
    /// # Contract
    ///
    /// - A claim that is not the latest any more brings no names, and is told in [`Due::superseded`]:
    ///   whoever still has the partition would otherwise wait for what can never be due under it.
    async fn due(
        &self,
        group: &Group,
        claims: &[Claim],
        now: Timestamp,
        names_max: usize,
    ) -> Result<Due>;

    /// Resolves when an operator may have decided since [`Due::version`] was `seen`; may resolve for
    /// nothing.
    async fn decided(&self, group: &Group, seen: u64);
}

/// Keeps keys apart durably: the half that operators use, from any process.
#[async_trait]
pub trait KeyStateDesk: fmt::Debug + Send + Sync + 'static {
    /// What is held for `group`, at most `names_max` names behind `after`, in a stable order.
    async fn list(
        &self,
        group: &Group,
        after: Option<&HeldPlace>,
        names_max: usize,
    ) -> Result<Vec<HeldReport>>;

    /// The messages of one name in their order, at most `messages_max` behind the number `after`.
    async fn messages(
        &self,
        group: &Group,
        held: &HeldPlace,
        after: Option<u64>,
        messages_max: usize,
    ) -> Result<Vec<HeldMessage>>;

    /// Records what is to become of a name; its owner does it, now or when there is one. `false`
    /// when it is not held, or another decision is to be carried out first.
    async fn decide(&self, group: &Group, held: &HeldPlace, decision: &KeyDecision)
    -> Result<bool>;
}

/// The right to write for a group and a partition, until somebody else claims it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Claim {
    /// For this group.
    pub group: Group,
    /// What is claimed.
    pub place: TopicPartition,
    /// Rises with every claim.
    pub fence: u64,
}

impl Claim {
    /// A claim with this fence.
    #[must_use]
    pub fn new(group: Group, place: TopicPartition, fence: u64) -> Self {
        Self {
            group,
            place,
            fence,
        }
    }
}

/// What is held together.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum HeldName {
    /// All messages of a key.
    Key(Key),
    /// One message by itself: it has no key, or its key goes on without it.
    Message(EventId),
}

impl HeldName {
    /// The key, where all of a key is held.
    pub fn key(&self) -> Option<&Key> {
        match self {
            Self::Key(key) => Some(key),
            Self::Message(_) => None,
        }
    }
}

impl fmt::Display for HeldName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(key) => key.fmt(f),
            Self::Message(id) => write!(f, "message {id}"),
        }
    }
}

/// Where a name is held.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub struct HeldPlace {
    /// On this partition.
    pub place: TopicPartition,
    /// Under this name.
    pub name: HeldName,
}

impl HeldPlace {
    /// A name on a partition.
    #[must_use]
    pub fn new(place: TopicPartition, name: HeldName) -> Self {
        Self { place, name }
    }
}

impl fmt::Display for HeldPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.name, self.place)
    }
}

/// A message to be held.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HoldEntry {
    /// With what it is held together.
    pub name: HeldName,
    /// The message as it was published.
    pub message: Message,
    /// Its place in its partition, where the broker has positions.
    pub position: Option<Position>,
    /// What it waits for, if it is the first.
    pub wait: Wait,
}

impl HoldEntry {
    /// A message behind those of `name`, which waits for what is before it.
    #[must_use]
    pub fn new(name: HeldName, message: Message, position: Option<Position>, wait: Wait) -> Self {
        Self {
            name,
            message,
            position,
            wait,
        }
    }
}

/// What a name waits for, and how its first message fared.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Wait {
    /// When it is tried again; `None` waits for an operator.
    pub until: Option<Timestamp>,
    /// Failed attempts of the first message.
    pub attempts: u32,
    /// When the first of them failed.
    pub first_failed: Option<Timestamp>,
    /// What kind of cause the last one had, as in [`DeadLetter::cause`](crate::DeadLetter::cause).
    pub cause: String,
    /// Its error in one line.
    pub error: String,
}

impl Wait {
    /// Waits for what is before it only: it is due at once.
    #[must_use]
    pub fn nothing() -> Self {
        Self {
            until: Some(Timestamp::from_micros(0)),
            attempts: 0,
            first_failed: None,
            cause: String::new(),
            error: String::new(),
        }
    }

    /// Whether it waits for an operator.
    pub fn is_parked(&self) -> bool {
        self.until.is_none()
    }
}

/// A message that is held.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HeldMessage {
    /// Its number among those of its name: later ones are greater.
    pub number: u64,
    /// The message as it was published.
    pub message: Message,
    /// Its place in its partition, where the broker has positions.
    pub position: Option<Position>,
    /// Failed attempts so far.
    pub attempts: u32,
    /// When the first of them failed.
    pub first_failed: Option<Timestamp>,
}

impl HeldMessage {
    /// A message that was not tried yet.
    #[must_use]
    pub fn new(number: u64, message: Message, position: Option<Position>) -> Self {
        Self {
            number,
            message,
            position,
            attempts: 0,
            first_failed: None,
        }
    }
}

/// What [`KeyStateStore::due`] found.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Due {
    /// What is to be done now.
    pub names: Vec<DueName>,
    /// When the time of the next one comes.
    pub next: Option<Timestamp>,
    /// Changes with every decision of an operator.
    pub version: u64,
    /// Of the claims asked about, those that somebody has claimed anew.
    pub superseded: Vec<Claim>,
}

impl Due {
    /// What is due, and when the next one is, under claims that are all valid.
    #[must_use]
    pub fn new(names: Vec<DueName>, next: Option<Timestamp>, version: u64) -> Self {
        Self {
            names,
            next,
            version,
            superseded: Vec::new(),
        }
    }

    /// The same, with the claims that somebody has claimed anew.
    #[must_use]
    pub fn with_superseded(mut self, superseded: Vec<Claim>) -> Self {
        self.superseded = superseded;
        self
    }
}

/// A name whose time has come, or about which an operator has decided.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DueName {
    /// Where it is held.
    pub held: HeldPlace,
    /// What it waited for.
    pub wait: Wait,
    /// What an operator decided.
    pub decision: Option<KeyDecision>,
}

impl DueName {
    /// A name that is due.
    #[must_use]
    pub fn new(held: HeldPlace, wait: Wait, decision: Option<KeyDecision>) -> Self {
        Self {
            held,
            wait,
            decision,
        }
    }
}

/// What becomes of a held key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KeyAction {
    /// All its messages are handled, in their order, the first one with its attempts anew.
    Retry,
    /// The first message becomes a dead letter; those behind it are handled, in their order.
    Release,
    /// All its messages become dead letters.
    Discard,
}

impl KeyAction {
    /// Its name in stores and tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Release => "release",
            Self::Discard => "discard",
        }
    }

    /// The action of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Retry, Self::Release, Self::Discard]
            .into_iter()
            .find(|action| action.as_str() == name)
    }
}

/// What an operator decided about a held key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyDecision {
    /// What becomes of it.
    pub action: KeyAction,
    /// Who decided.
    pub by: String,
    /// Why.
    pub because: String,
    /// When.
    pub at: Timestamp,
}

impl KeyDecision {
    /// A decision.
    #[must_use]
    pub fn new(
        action: KeyAction,
        by: impl Into<String>,
        because: impl Into<String>,
        at: Timestamp,
    ) -> Self {
        Self {
            action,
            by: by.into(),
            because: because.into(),
            at,
        }
    }
}

/// A held name as operators see it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HeldReport {
    /// Where it is held.
    pub held: HeldPlace,
    /// What it waits for.
    pub wait: Wait,
    /// Since when.
    pub since: Timestamp,
    /// How many messages are held.
    pub messages: u64,
    /// What an operator decided, if that is not carried out yet.
    pub decision: Option<KeyDecision>,
}

impl HeldReport {
    /// A report.
    #[must_use]
    pub fn new(
        held: HeldPlace,
        wait: Wait,
        since: Timestamp,
        messages: u64,
        decision: Option<KeyDecision>,
    ) -> Self {
        Self {
            held,
            wait,
            since,
            messages,
            decision,
        }
    }
}
