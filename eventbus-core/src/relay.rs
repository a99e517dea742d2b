//! Brings what was committed to an outbox to the broker.
//!
//! ```text
//!  lanes by lease ─▶ next ─▶ [ of a held key? ─▶ hold behind it ─▶ remove ]
//!                     ▲  └─▶ publish, outside any transaction ─▶ taken: remove
//!                     │                                       ─▶ away: the pass is repeated, later
//!   appended, or a look from time to time                     ─▶ refused: its key is parked
//! ```

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::bus::EventBus;
use crate::clock::FOREVER;
use crate::drained::Drain;
use crate::error::{Error, ErrorKind, Result};
use crate::key_state::KeyStateStore;
use crate::lease::LeaseStore;
use crate::message::{Group, Topic};
use crate::outbox::{OutboxDepth, OutboxStore};

mod lanes;
mod parked;
mod pass;
mod runner;
mod taken;

use runner::Runner;

/// The place whose partitions are the lanes of an outbox, for leases and held keys.
const OUTBOX: Topic = Topic::from_static("outbox");

/// Messages that relays published.
pub const RELAYED: &str = "eventbus.outbox.published";
/// Messages that relays put aside, because the broker refused them or one of their key.
pub const RELAY_HELD: &str = "eventbus.outbox.held";
/// Messages that operators gave up, because the broker refuses them.
pub const RELAY_GIVEN_UP: &str = "eventbus.outbox.given_up";
/// Committed messages that wait for a relay, by `lane`.
pub const OUTBOX_MESSAGES: &str = "eventbus.outbox.messages";
/// Age of the oldest message that waits for a relay, in seconds.
pub const OUTBOX_AGE: &str = "eventbus.outbox.oldest_age";
/// Age of the oldest open transaction that holds messages back, in seconds.
pub const OUTBOX_HELD_BACK: &str = "eventbus.outbox.held_back";

/// What becomes of a key of which the broker has refused a message for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnRefused {
    /// Later messages of the key wait behind it, until an operator decides.
    #[default]
    ParkKey,
    /// The message waits alone; later ones of its key are published.
    SkipKey,
}

/// Publishes what was committed to an outbox, in the order of each key, and removes it.
///
/// Every process of a service may run one: they share the outbox's lanes by leases.
///
/// # Contract
///
/// - A message is removed only when the broker has taken it, or when it is held durably elsewhere.
///   What was published when the process ended, and not removed, is published again with the same
///   id, and so is a relay's last batch when the relay was stopped beyond its lease: consumers with
///   an inbox handle it once, and in order.
/// - While the broker is away, nothing is lost or counted; it is asked again, less and less often.
///   So it is for a topic that is not there yet.
/// - A message that the broker refuses for what it is (too large, for later without a
///   schedule) is held under the relay's name as a group, and found by [`EventBus::held_keys`] on
///   a bus with that store: retry publishes it again, release and discard give it up.
/// - A message that goes on failing while others are taken waits with its key for a while, in the
///   same place, so that it does not hold up its lane.
///
/// # Examples
///
/// ```no_run
/// # use std::sync::Arc;
/// # use eventbus_core::{EventBus, KeyStateStore, LeaseStore, OutboxStore, Relay, Result};
/// # async fn example(bus: EventBus, store: Arc<impl OutboxStore + LeaseStore + KeyStateStore>) -> Result<()> {
/// let relay = Relay::new(&bus, store);
/// bus.service("orders")
///     .background("relay", |stop| relay.run_until(stop))
///     .run_until(async { /* until a signal comes */ })
///     .await
/// # }
/// ```
#[must_use = "nothing is published until `.run_until(…).await`"]
pub struct Relay {
    bus: EventBus,
    outbox: Arc<dyn OutboxStore>,
    leases: Arc<dyn LeaseStore>,
    held: Arc<dyn KeyStateStore>,
    name: Group,
    /// Where it publishes to, as the name that the others see.
    target: Option<Topic>,
    after: Option<Drain>,
    batch: usize,
    ttl: Duration,
    on_refused: OnRefused,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    status: Mutex<RelayStatus>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, RelayStatus> {
        // A status is a set of plain values: none is half written.
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a relay is doing.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct RelayStatus {
    /// The lanes that it has now.
    pub lanes: Vec<u32>,
    /// Messages that it published since it began.
    pub published: u64,
    /// Messages that it put aside since it began.
    pub held: u64,
    /// How much waited when it looked last, over all lanes: none before its first second, some seconds ago, or, where so much waits that
    /// counting takes long, a hundred times as long as that.
    pub depth: OutboxDepth,
    /// What keeps it from publishing or removing, in one line; none when the last pass went well.
    pub error: Option<String>,
}

/// Tells what a [`Relay`] is doing, also while it runs. Clones are the same.
#[derive(Clone, Debug)]
pub struct RelayHandle(Arc<Shared>);

impl RelayHandle {
    /// What it is doing.
    pub fn status(&self) -> RelayStatus {
        self.0.lock().clone()
    }
}

impl Relay {
    /// A relay from `store` to the broker of `bus`.
    pub fn new<S>(bus: &EventBus, store: Arc<S>) -> Self
    where
        S: OutboxStore + LeaseStore + KeyStateStore,
    {
        Self::on(bus, Arc::clone(&store) as _, Arc::clone(&store) as _, store)
    }

    /// As [`new`](Self::new), with stores of their own for messages, leases and held keys.
    pub fn on(
        bus: &EventBus,
        outbox: Arc<dyn OutboxStore>,
        leases: Arc<dyn LeaseStore>,
        held: Arc<dyn KeyStateStore>,
    ) -> Self {
        Self {
            bus: bus.clone(),
            outbox,
            leases,
            held,
            name: Group::from_static("outbox"),
            target: None,
            after: None,
            batch: 1_000,
            ttl: Duration::from_secs(10),
            on_refused: OnRefused::default(),
            shared: Arc::default(),
        }
    }

    /// Names it; by default `outbox`. Relays of one name share the lanes, so all of an outbox have
    /// the same.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the name is not allowed for a group.
    pub fn name(mut self, name: &str) -> Result<Self> {
        self.name = Group::new(name)?;
        Ok(self)
    }

    /// Names the broker that it publishes to, so that the relays of an outbox know whether they
    /// agree: while those of two targets run, none publishes, and the
    /// [`status`](RelayHandle::status) says so. Without a name the target is that of the others
    /// without one. A relay of an SDK that knew no targets cannot tell, and publishes on.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the name is not allowed for a topic, less seven characters.
    pub fn target(mut self, name: &str) -> Result<Self> {
        self.target = Some(Topic::new(&format!("target.{name}"))?);
        Ok(self)
    }

    /// Lets it publish only when another broker is drained, on which relays of the outbox published
    /// before: when no relay of another [`target`](Self::target) runs, and what theirs published is
    /// handled. What is committed meanwhile waits in the outbox, so that of each key what is on the
    /// new broker comes after what was on the old one.
    ///
    /// Each relay looks once, when it has lanes, and again when one of another target came and went.
    /// Going back is a move like any other, and waits for the broker that is left then.
    pub fn after(mut self, drain: Drain) -> Self {
        self.after = Some(drain);
        self
    }

    /// Sets how many messages are published at once, at least one; by default 1,000. As many may be
    /// published twice after a crash.
    pub fn batch(mut self, messages: usize) -> Self {
        self.batch = messages.max(1);
        self
    }

    /// Sets after how long other relays take over the lanes of one that died on another machine;
    /// by default 10 seconds.
    pub fn lease_ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl.clamp(Duration::from_millis(1), FOREVER);
        self
    }

    /// Sets what becomes of a key of which the broker has refused a message.
    pub fn on_refused(mut self, on_refused: OnRefused) -> Self {
        self.on_refused = on_refused;
        self
    }

    /// What tells what it is doing.
    pub fn handle(&self) -> RelayHandle {
        RelayHandle(Arc::clone(&self.shared))
    }

    /// Publishes until `signal` resolves; then ends the batch that is under way, if the broker
    /// answers within five seconds, and gives its lanes away.
    ///
    /// # Cancellation
    ///
    /// A dropped future is a crash: what was under way may be published again.
    ///
    /// # Errors
    ///
    /// What the store said that cannot be mended by trying again. The broker's errors are in the
    /// [`status`](RelayHandle::status) and the log, and end nothing. `InvalidInput` when it is to
    /// wait for another broker and has no [`target`](Self::target); those of asking that broker.
    pub async fn run_until(self, signal: impl Future<Output = ()>) -> Result<()> {
        if self.after.is_some() && self.target.is_none() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "run relay",
                "a relay that comes after another broker has a name for its own: add `.target(…)`, by which relays of the other one are told apart",
            ));
        }
        Runner::new(self).run_until(signal).await
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay")
            .field("name", &self.name)
            .field("outbox", &self.outbox)
            .field("batch", &self.batch)
            .finish_non_exhaustive()
    }
}
