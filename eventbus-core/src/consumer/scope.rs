//! One delivery while it is being handled: shared by worker, layers and context, and used again.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;

use super::Runtime;
use super::claims::Claimed;
use crate::delivery::{Delivery, Lane, Position};
use crate::envelope::{Envelope, EventId};
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::event::{Event, read_event};
use crate::header::KnownHeaders;
use crate::message::{Group, Message};
use crate::outgoing::{Frame, Origin, Outgoing, into_message};
use crate::unit_of_work::{InboxEntry, Work};

/// One delivery while it is being handled.
pub(crate) struct Scope {
    runtime: Arc<Runtime>,
    /// Empty only while the scope waits in the pool.
    delivery: Option<Delivery>,
    partition: u32,
    id: OnceLock<EventId>,
    route: Option<Route>,
    attempt: AtomicU32,
    /// Whether `state` may hold anything: most handlers leave nothing in it.
    touched: AtomicBool,
    /// The run waits for the broker or the unit of work, not for the handler.
    awaits_others: AtomicBool,
    state: Mutex<State>,
}

/// Which handler takes it, found once for all attempts.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) handler: usize,
    pub(crate) version: u32,
    pub(crate) data: Bytes,
}

#[derive(Default)]
struct State {
    outgoing: Vec<Collected>,
    work: Option<Box<dyn Work>>,
    /// The right to handle the event, where the consumer has a duplicate window.
    claimed: Option<Arc<Claimed>>,
    /// Counts how often the transaction was lent or called back: one lent before is not taken back.
    loan: u64,
    failure: Option<Failure>,
    /// The handler has ended and a context outlives it: nobody sends what that one publishes.
    ended: bool,
}

struct Collected {
    event_type: &'static str,
    message: Message,
}

/// What a handler's code met apart from returning an error.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The data could not be read.
    Undecodable(Error),
    /// A batch handler failed this item alone.
    Item(BoxError),
}

/// What a message turned out to be before any handler saw it.
#[derive(Debug)]
pub(crate) enum Routed {
    Handle,
    Skip(Skip),
    NoHandler(String),
    Undecodable(Error),
}

/// Why a message is settled unhandled; counted by these names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Skip {
    OtherGroup,
    Expired,
    OtherType,
    OtherKey,
}

impl Scope {
    pub(crate) fn new(runtime: Arc<Runtime>) -> Self {
        Self {
            runtime,
            delivery: None,
            partition: 0,
            id: OnceLock::new(),
            route: None,
            attempt: AtomicU32::new(1),
            touched: AtomicBool::new(false),
            awaits_others: AtomicBool::new(false),
            state: Mutex::default(),
        }
    }

    #[inline]
    pub(crate) fn fill(&mut self, delivery: Option<Delivery>, partition: u32) {
        self.delivery = delivery;
        self.partition = partition;
    }

    /// Empties it for the next delivery; keeps the allocations.
    #[inline]
    pub(crate) fn clear(&mut self) {
        self.delivery = None;
        self.id = OnceLock::new();
        self.route = None;
        *self.attempt.get_mut() = 1;
        *self.awaits_others.get_mut() = false;
        self.forget();
    }

    #[inline]
    pub(crate) fn delivery(&self) -> &Delivery {
        self.delivery
            .as_ref()
            .expect("a scope outside the pool holds a delivery")
    }

    #[inline]
    pub(crate) fn message(&self) -> &Message {
        &self.delivery().message
    }

    #[inline]
    pub(crate) fn lane(&self) -> Lane {
        self.delivery().receipt.lane
    }

    #[inline]
    pub(crate) fn group(&self) -> &Group {
        &self.runtime.group
    }

    #[inline]
    pub(crate) fn runtime(&self) -> &Arc<Runtime> {
        &self.runtime
    }

    #[inline]
    pub(crate) fn partition(&self) -> u32 {
        self.partition
    }

    #[inline]
    pub(crate) fn position(&self) -> Option<Position> {
        self.delivery().position
    }

    #[inline]
    pub(crate) fn attempt(&self) -> u32 {
        self.attempt.load(Ordering::Relaxed)
    }

    #[inline]
    pub(crate) fn is_replay(&self) -> bool {
        self.runtime.replay.is_some()
    }

    /// Says whether the run waits for the broker or the unit of work: being late is then not the
    /// handler's failure.
    #[inline]
    pub(crate) fn set_awaits_others(&self, awaits: bool) {
        self.awaits_others.store(awaits, Ordering::Relaxed);
    }

    pub(crate) fn awaits_others(&self) -> bool {
        self.awaits_others.load(Ordering::Relaxed)
    }

    #[inline]
    pub(crate) fn route(&self) -> Option<&Route> {
        self.route.as_ref()
    }

    #[inline]
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, to put something into it.
    #[inline]
    fn touch(&self) -> MutexGuard<'_, State> {
        self.touched.store(true, Ordering::Release);
        self.state()
    }

    /// Whether an attempt may have left anything.
    #[inline]
    pub(crate) fn is_touched(&self) -> bool {
        self.touched.load(Ordering::Acquire)
    }

    /// Forgets what an attempt left.
    #[inline]
    fn forget(&self) {
        if self.is_touched() {
            self.wipe();
        }
    }

    /// Apart from `forget`, so that the look whether it is needed stays a look.
    #[cold]
    fn wipe(&self) {
        let mut state = self.state();
        state.outgoing.clear();
        state.work = None;
        state.claimed = None;
        state.failure = None;
        state.ended = false;
        self.touched.store(false, Ordering::Release);
    }

    /// Finds out what the message is; the one place where headers and format are read.
    pub(crate) fn find_route(&mut self) -> Routed {
        let Some(delivery) = &self.delivery else {
            return Routed::Skip(Skip::OtherType);
        };
        let known = KnownHeaders::of(&delivery.message.headers);
        if known
            .to_group()
            .is_some_and(|group| self.is_replay() || group != self.runtime.group.as_str())
        {
            // In a replay the original stands on the topic, too: handling both would repeat it.
            return Routed::Skip(Skip::OtherGroup);
        }
        match known.expires_at().map(str::parse::<crate::Timestamp>) {
            Some(Ok(expiry)) if expiry <= self.runtime.bus.clock().now() => {
                return Routed::Skip(Skip::Expired);
            }
            Some(Err(error)) => return Routed::Undecodable(error),
            _ => {}
        }
        let reading = match self.runtime.bus.formats().read(&delivery.message, &known) {
            Ok((_, reading)) => reading,
            Err(error) => return Routed::Undecodable(error),
        };
        let Some(handler) = self.runtime.handler_of(&reading.event_type) else {
            return match self.runtime.settings.skip_others {
                true => Routed::Skip(Skip::OtherType),
                false => Routed::NoHandler(match reading.event_type {
                    Cow::Borrowed(event_type) => event_type.to_owned(),
                    Cow::Owned(event_type) => event_type,
                }),
            };
        };
        let (version, data) = (reading.version, reading.data);
        self.route = Some(Route {
            handler,
            version,
            data,
        });
        Routed::Handle
    }

    /// Reads the event for its handler.
    pub(crate) fn decode<E: Event>(&self) -> Result<E> {
        let route = self
            .route
            .as_ref()
            .expect("a handler runs only for a routed message");
        read_event(route.version, &route.data)
    }

    pub(crate) fn id(&self) -> &EventId {
        self.id.get_or_init(|| self.find_id())
    }

    /// The message's own id; where it has none, one made from its place; where the broker has no
    /// places, a new one, by which duplicates cannot be recognised.
    fn find_id(&self) -> EventId {
        let now = self.runtime.bus.clock().now();
        let formats = self.runtime.bus.formats();
        formats.id_of(self.message(), || self.place_id(), now)
    }

    fn place_id(&self) -> EventId {
        match self.position() {
            Some(position) => EventId::of_place(&self.message().topic, self.partition, position.0),
            None => EventId::new(),
        }
    }

    pub(crate) fn envelope(&self) -> Result<Envelope> {
        self.runtime.bus.formats().envelope(
            self.message(),
            (self.id().clone(), self.runtime.bus.clock().now()),
        )
    }

    pub(crate) fn inbox_entry(&self) -> InboxEntry {
        InboxEntry {
            id: self.id().clone(),
            topic: self.message().topic.clone(),
            partition: self.partition,
            position: self.position(),
            receipt: self.delivery().receipt,
        }
    }

    /// Forgets what an earlier attempt left and counts a new one.
    #[inline]
    pub(crate) fn begin_attempt(&self, attempt: u32) {
        self.attempt.store(attempt, Ordering::Relaxed);
        self.set_awaits_others(false);
        self.forget();
    }

    pub(crate) fn publish<E: Event>(&self, outgoing: Outgoing<E>) -> Result<EventId> {
        let bus = &self.runtime.bus;
        if self
            .runtime
            .replay
            .as_ref()
            .is_some_and(|replay| !replay.publishes)
        {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "publish from a handler",
                "this is a replay, which sends nothing: check `cx.is_replay()`, or allow it with `Replay::allow_publish`",
            )
            .with("type", E::TYPE));
        }
        let cause = self.envelope()?;
        let known = KnownHeaders::of(&self.message().headers);
        let origin = Origin {
            correlation_id: Some(cause.correlation_id),
            causation_id: Some(cause.id.to_string()),
            metadata: cause.metadata,
            traceparent: known.traceparent().map(str::to_owned),
            tracestate: known.tracestate().map(str::to_owned),
        };
        self.runtime.bus.check_time(outgoing.not_before())?;
        let key = outgoing.key();
        let mut state = self.touch();
        if state.ended {
            return Err(Error::new(
                ErrorKind::Closed,
                "publish from a handler",
                "the handler has ended, and nobody would send it: await what the handler spawns before it returns, or publish with the bus",
            )
            .with("type", E::TYPE));
        }
        let ordinal = state
            .outgoing
            .iter()
            .filter(|other| other.event_type == E::TYPE && other.message.key == key)
            .count();
        // A handler publishes far fewer than 2^32 events.
        let id = EventId::derived(
            self.id(),
            &self.runtime.group,
            E::TYPE,
            key.as_ref(),
            ordinal as u32,
        );
        let topic = bus.topic(&E::TOPIC)?;
        let frame = Frame {
            format: bus.format_of(&topic),
            topic,
            source: bus.source(),
            now: bus.clock().now(),
            id,
            origin,
        };
        let (id, message) = into_message(outgoing, frame)?;
        message.check(bus.event_bytes_max())?;
        state.outgoing.push(Collected {
            event_type: E::TYPE,
            message,
        });
        Ok(id)
    }

    /// Takes nothing more from contexts that outlive the handler.
    #[cold]
    pub(crate) fn end(&self) {
        self.touch().ended = true;
    }

    /// The same delivery for another attempt, apart from contexts that outlive the one before.
    #[cold]
    pub(crate) fn renewed(&self) -> Self {
        self.end();
        // A context that lives on is not to keep the event from others.
        self.give_up_claim();
        let mut scope = Self::new(Arc::clone(&self.runtime));
        scope.fill(self.delivery.clone(), self.partition);
        scope.id = self.id.clone();
        scope.route = self.route.clone();
        scope
    }

    /// Takes what the handler collected.
    #[inline]
    pub(crate) fn take_outgoing(&self, into: &mut Vec<Message>) {
        if !self.is_touched() {
            return;
        }
        let mut state = self.state();
        into.extend(state.outgoing.drain(..).map(|collected| collected.message));
    }

    pub(crate) fn fail(&self, error: BoxError) {
        self.touch().failure = Some(Failure::Item(error));
    }

    pub(crate) fn reject(&self, error: Error) {
        self.touch().failure = Some(Failure::Undecodable(error));
    }

    #[inline]
    pub(crate) fn take_failure(&self) -> Option<Failure> {
        match self.is_touched() {
            true => self.state().failure.take(),
            false => None,
        }
    }

    /// Keeps the right to handle the event, until it is used up or the delivery is done with.
    pub(crate) fn set_claimed(&self, claimed: Claimed) {
        self.touch().claimed = Some(Arc::new(claimed));
    }

    pub(crate) fn claimed(&self) -> Option<Arc<Claimed>> {
        self.state().claimed.clone()
    }

    /// Lets others handle the event.
    pub(crate) fn give_up_claim(&self) {
        let claimed = self.state().claimed.take();
        drop(claimed);
    }

    /// Lends a transaction to the context of the handler that runs next.
    pub(crate) fn lend_work(&self, work: Box<dyn Work>) {
        let mut state = self.touch();
        state.loan += 1;
        state.work = Some(work);
    }

    /// Takes what was lent, and the number of the loan.
    #[inline]
    pub(crate) fn take_work(&self) -> Option<(Box<dyn Work>, u64)> {
        // Most consumers have no unit of work: they do not pay for the lock.
        self.runtime.unit.as_ref()?;
        let mut state = self.state();
        let loan = state.loan;
        state.work.take().map(|work| (work, loan))
    }

    /// Takes a transaction back from its context; one that comes too late is rolled back.
    pub(crate) fn return_work(&self, work: Box<dyn Work>, loan: u64) {
        let mut state = self.touch();
        if state.loan == loan {
            state.work = Some(work);
            return;
        }
        drop(state);
        drop(work);
    }

    /// Ends the loan: the transaction, if it came back; what comes later is rolled back.
    pub(crate) fn reclaim_work(&self) -> Option<Box<dyn Work>> {
        let mut state = self.state();
        state.loan += 1;
        state.work.take()
    }
}

impl std::fmt::Debug for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scope")
            .field("delivery", &self.delivery)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}
