//! The in-memory broker: a server in this process with the semantics of a real one, not a channel.
//!
//! ```text
//!  MemoryBroker (a client) ──publish──▶ State: topics ─ partitions ─ log ◀─ cursor of each group
//!  MemoryBroker (another)  ──subscribe─▶        members ─ lanes ─▶ Assigned, Delivered, Revoking …
//! ```

mod admin;
mod config;
mod duplicates;
mod group;
mod key_state;
mod leases;
mod log;
mod member;
mod named;
mod outbox;
mod room;
mod schedule;
mod settle;
mod state;
mod unit;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::broker::{
    AdminReply, AdminRequest, Broker, Capabilities, Deliveries, Member, Outcome, PublishError,
    Publisher, Settlement, Subscriber, Unpublished,
};
use crate::clock::FOREVER;
use crate::delivery::{Lane, Receipt, Signal, Subscription};
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Group, Message};
use state::{Rest, State, Turn, ended};

pub use config::{MemoryConfig, MemoryProfile};
pub use duplicates::MemoryDuplicates;
pub use key_state::MemoryKeyState;
pub use leases::MemoryLeases;
pub use outbox::MemoryOutbox;
pub use schedule::MemorySchedule;
pub use unit::{CommitFault, MemoryUnit};

/// A client of an in-memory server: what is published lives as long as a client or member does.
///
/// Clones are the same client; [`connect`](Self::connect) makes another one of the same server.
/// Topics are created by publishing and subscribing, with [`MemoryConfig::partitions`], or one for
/// dead letters (`….dlq`). Keyed messages go where [`partition_of`](crate::partition_of) says,
/// others to each partition in turn.
///
/// # Contract
///
/// - **Room.** At most [`MemoryConfig::bytes`] are stored. When they are used up, what every group
///   of a topic has settled is dropped, oldest first, and so is what stands on a topic without
///   groups; dead letters and what a group has not settled are kept, and `publish` waits. Members
///   and readers that were overtaken get a [`Signal::Gap`]. Beyond it there is a reserve, so that
///   a full server can be emptied: an eighth for dead letters, half of that for what follows from
///   a message, known by the header [`CAUSATION_ID`](crate::header::CAUSATION_ID).
/// - **Batches.** A message that is refused for its own fault (too large) is reported before
///   anything is taken; the others are taken. Where `ordered_pipelining` is declared, later
///   messages of its key are held back and reported too (`Conflict`).
/// - **Groups.** What a group has settled without a gap is its position; after a crash everything
///   above it is handed out again, also what was settled there. Lanes move one by one: a moving
///   lane goes on when it is released or `revoke_timeout` after `Revoking`, which is looked at
///   whenever a member of the group calls `next` or `settle`.
/// - **Settling** is done when the call returns. After `close`, `next` and `settle` answer
///   `Closed`.
///
/// # Examples
///
/// ```
/// use eventbus_core::{Group, MemoryBroker, Message, Publisher, Signal, Subscriber, Subscription, Topic};
///
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// let broker = MemoryBroker::new();
/// let topic = Topic::from_static("orders");
/// broker.publish(vec![Message::new(topic.clone(), "first").with_key("42")]).await?;
///
/// let group = Group::from_static("payments");
/// let mut member = broker.subscribe(Subscription::group(group, vec![topic])).await?;
/// assert!(matches!(member.deliveries.next().await?, Signal::Assigned(lanes) if lanes.len() == 4));
/// assert!(matches!(member.deliveries.next().await?, Signal::Delivered(batch) if batch.len() == 1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct MemoryBroker {
    client: Arc<Client>,
}

#[derive(Debug)]
struct Client {
    id: u64,
    closed: AtomicBool,
    server: Arc<Server>,
}

#[derive(Debug)]
struct Server {
    config: MemoryConfig,
    capabilities: Capabilities,
    state: Mutex<State>,
    key_state: MemoryKeyState,
    schedule: MemorySchedule,
    space: Arc<Notify>,
    clients: AtomicU64,
}

impl Server {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing is left half done by a panic that a later call could not read.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is like no other broker.
    fn is_itself(&self) -> bool {
        self.config.profile == MemoryProfile::Memory
    }

    fn client(self: &Arc<Self>) -> MemoryBroker {
        MemoryBroker {
            client: Arc::new(Client {
                id: self.clients.fetch_add(1, Ordering::Relaxed),
                closed: AtomicBool::new(false),
                server: Arc::clone(self),
            }),
        }
    }
}

impl Default for MemoryBroker {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryBroker {
    /// Starts a server with the defaults and returns a client of it.
    #[must_use]
    pub fn new() -> Self {
        Self::with(MemoryConfig::default())
    }

    /// Starts a server and returns a client of it.
    #[must_use]
    pub fn with(config: MemoryConfig) -> Self {
        let state = State::new(config.clone());
        let server = Arc::new(Server {
            capabilities: state.capabilities.clone(),
            key_state: MemoryKeyState::with_clock(Arc::clone(&config.clock)),
            schedule: MemorySchedule::new(),
            space: Arc::clone(&state.space),
            state: Mutex::new(state),
            config,
            clients: AtomicU64::new(0),
        });
        server.client()
    }

    /// The server that `url` names: a new one for `memory:`, and for `memory:shop` the one of this
    /// name in this process, which lives as long as one of its clients. Options stand behind `?`;
    /// see [`MemoryConfig::from_url`].
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the url can't be read, `Conflict` when the server of this name was
    /// started with other options.
    pub fn from_url(url: &str) -> Result<Self> {
        let config = MemoryConfig::from_url(url)?;
        let address = url.split_once('?').map_or(url, |(address, _)| address);
        let name = address
            .trim_start_matches("memory:")
            .trim_start_matches('/');
        match name {
            "" => Ok(Self::with(config)),
            name => named::client(name, config),
        }
    }

    /// Another client of the same server: closing one leaves the other working.
    #[must_use]
    pub fn connect(&self) -> Self {
        self.client.server.client()
    }

    /// Where buses on this server hold keys: one store for all its clients. None where it is like
    /// another broker, which brings no such store either.
    pub fn key_state(&self) -> Option<MemoryKeyState> {
        let server = &self.client.server;
        server.is_itself().then(|| server.key_state.clone())
    }

    /// Where events of buses on this server wait for their time: one schedule for all its clients.
    /// None where it is like another broker, which brings none either.
    pub fn schedule(&self) -> Option<MemorySchedule> {
        let server = &self.client.server;
        server.is_itself().then(|| server.schedule.clone())
    }

    /// How many settlements the server ignored because their lane had been given away or they had
    /// been made before.
    pub fn stale_settlements(&self) -> u64 {
        self.client.server.lock().stale
    }

    /// Takes all lanes of a group away from its living members, which hear `Lost`, and shares them
    /// out anew: what happens to a member that stood still for too long. For tests.
    pub fn lose(&self, group: &Group) {
        let mut state = self.client.server.lock();
        if let Some(group) = state.find_group(group) {
            state.lose(group);
        }
    }

    /// Whether some member or reader would be given a signal at once, whether or not it asks. For
    /// tests that wait until nothing can go on.
    pub fn deliverable(&self) -> bool {
        self.client.server.lock().is_deliverable()
    }

    fn is_closed(&self) -> bool {
        self.client.closed.load(Ordering::Acquire)
    }

    fn check_open(&self, operation: &'static str) -> Result<()> {
        if self.is_closed() {
            return Err(Error::new(
                ErrorKind::Closed,
                operation,
                "the broker handle is closed: connect again",
            ));
        }
        Ok(())
    }

    /// Takes what has room at once; true when nothing is left to do.
    fn take(&self, rest: &mut Rest) -> bool {
        let now = self.client.server.config.clock.now();
        let mut state = self.client.server.lock();
        // Looked at under the lock, so that nothing is taken after `close` has returned.
        self.is_closed() || state.take(rest, now)
    }

    /// Waits for room until everything is taken, the handle is closed or the time is up.
    async fn take_slowly(&self, rest: &mut Rest) {
        let server = &self.client.server;
        let deadline = Instant::now() + server.config.publish_timeout.min(FOREVER);
        loop {
            let mut room = std::pin::pin!(server.space.notified());
            // Room that is made between the look and the wait is not missed.
            room.as_mut().enable();
            if self.take(rest) {
                return;
            }
            tokio::select! {
                () = room => {}
                () = sleep_until(deadline) => return,
            }
        }
    }

    /// Why a message is left over.
    fn leftover(&self) -> Error {
        if let Err(closed) = self.check_open("publish") {
            return closed;
        }
        Error::new(
            ErrorKind::RateLimited,
            "publish",
            "the in-memory broker is full of dead letters and of messages that groups have not settled: publish again when they have, trim dead-letter topics, or set `bytes` higher",
        )
        .with("bytes", self.client.server.config.bytes)
    }

    /// Checks what the profile can honour, before anything changes.
    fn check_subscription(&self, state: &State, subscription: &Subscription) -> Result<()> {
        subscription.check()?;
        for topic in &subscription.topics {
            state.check_start("subscribe", topic, subscription.start)?;
            if subscription.group.is_none() && !self.client.server.config.keeps_history(topic) {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "subscribe",
                    "this broker does not declare `replay`: subscribe with a group",
                )
                .with("topic", topic));
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Publisher for MemoryBroker {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        let capabilities = &self.client.server.capabilities;
        let bytes_max = capabilities.message_bytes_max;
        let sound = batch.iter().all(|message| message.check(bytes_max).is_ok());
        let (mut rest, mut unpublished) = if sound {
            (Rest::all_of(batch), Vec::new())
        } else {
            let (sound, refused) = capabilities.check_batch(batch);
            let (indices, messages) = sound.into_iter().unzip();
            (Rest::some_of(messages, indices), refused)
        };
        if !self.take(&mut rest) {
            self.take_slowly(&mut rest).await;
        }
        unpublished.extend(rest.into_left().map(|(index, message)| {
            Unpublished::new(index, message, Outcome::NotTaken, self.leftover())
        }));
        PublishError::of(unpublished)
    }
}

#[async_trait]
impl Subscriber for MemoryBroker {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        let server = &self.client.server;
        let now = server.config.clock.now();
        let mut state = server.lock();
        self.check_open("subscribe")?;
        self.check_subscription(&state, &subscription)?;
        let id = state.subscribe(self.client.id, &subscription, now);
        let handle = Arc::new(MemberHandle {
            id,
            notify: state.member(id).notify(),
            server: Arc::clone(server),
        });
        Ok(Member::new(
            Box::new(MemoryDeliveries(Arc::clone(&handle))),
            Box::new(MemorySettlement(handle)),
        ))
    }
}

#[async_trait]
impl Broker for MemoryBroker {
    fn capabilities(&self) -> Capabilities {
        self.client.server.capabilities.clone()
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        let mut state = self.client.server.lock();
        self.check_open(request.operation())?;
        state.answer(request)
    }

    async fn close(&self) -> Result<()> {
        let mut state = self.client.server.lock();
        if !self.client.closed.swap(true, Ordering::AcqRel) {
            state.close_client(self.client.id);
        }
        Ok(())
    }
}

/// What the two halves of a member share; the last one to be dropped makes the member leave.
#[derive(Debug)]
struct MemberHandle {
    id: usize,
    notify: Arc<Notify>,
    server: Arc<Server>,
}

impl Drop for MemberHandle {
    fn drop(&mut self) {
        self.server.lock().forget_member(self.id);
    }
}

#[derive(Debug)]
struct MemoryDeliveries(Arc<MemberHandle>);

#[async_trait]
impl Deliveries for MemoryDeliveries {
    async fn next(&mut self) -> Result<Signal> {
        let MemberHandle { id, notify, server } = &*self.0;
        loop {
            let turn = server.lock().turn(*id)?;
            match turn {
                Turn::Signal(signal) => return Ok(signal),
                Turn::Wait(None) => notify.notified().await,
                Turn::Wait(Some(deadline)) => {
                    tokio::select! {
                        () = notify.notified() => {}
                        () = sleep_until(deadline) => {}
                    }
                }
            }
        }
    }

    async fn close(self: Box<Self>) -> Result<()> {
        self.0.server.lock().leave(self.0.id);
        Ok(())
    }
}

#[derive(Debug)]
struct MemorySettlement(Arc<MemberHandle>);

#[async_trait]
impl Settlement for MemorySettlement {
    async fn settle(&mut self, settled: &[Receipt]) -> Result<()> {
        self.0.server.lock().settle(self.0.id, settled)
    }

    async fn release(&mut self, lanes: &[Lane]) -> Result<()> {
        let mut state = self.0.server.lock();
        let member = state.member(self.0.id);
        if member.ended {
            return Err(ended("release"));
        }
        if let Some(group) = member.group {
            state.release(group, self.0.id, lanes);
        }
        Ok(())
    }
}
