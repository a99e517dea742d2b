//! The handle users hold: publishes, makes consumers, asks the broker.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use metrics::{Counter, Histogram};
use tokio::time::Instant;
use tracing::{Instrument, trace};

use crate::activity::Activity;
use crate::broker::{
    AdminReply, AdminRequest, Broker, Capabilities, GroupPosition, LaneLag, PublishError,
    TopicReport,
};
use crate::clock::{Clock, SystemClock};
use crate::consumer::held::HeldLanes;
use crate::consumer::slots::is_in_handler;
use crate::consumer::{ConsumerBuilder, OPERATION_DURATION, SENT_MESSAGES};
use crate::dead_letter::{DeadLetters, in_parts};
use crate::delivery::{Start, Subscription, Until};
use crate::envelope::{Envelope, EventId};
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::format::{EnvelopeFormat, Format, Formats};
use crate::held_keys::{HeldKeys, no_key_state};
use crate::key_state::KeyStateStore;
use crate::message::{Group, Key, Message, Topic};
use crate::outgoing::{Frame, Origin, Outgoing, OutgoingBatch, into_message};
use crate::reader::Reader;
use crate::schedule::ScheduleStore;
use crate::schedule::scheduler::Schedule;
use crate::sending::{PartlyPublished, Turns, repeats_a_key};
use crate::service::Service;
use crate::topic::TopicSpec;
use crate::whereabouts::Lookup;

/// Publishes events and makes consumers; clones share one broker connection.
///
/// # Examples
///
/// ```
/// # use eventbus_macros::Event;
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(crate = "eventbus_core", type = "OrderCreated", topic = "order-events", key = "order_id")]
/// # struct OrderCreated { order_id: u64 }
/// use eventbus_core::{Event as _, EventBus, MemoryBroker, Start, Until};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let bus = EventBus::new(MemoryBroker::new());
/// let id = bus.publish(OrderCreated { order_id: 42 }).await?;
///
/// let mut reader = bus.read(&[OrderCreated::TOPIC], Start::Earliest, Some(Until::Now)).await?;
/// let record = reader.next().await?.expect("one was published");
/// assert_eq!(bus.envelope(&record.message)?.id, id);
/// assert_eq!(bus.event::<OrderCreated>(&record.message)?.expect("of this type").order_id, 42);
/// assert!(reader.next().await?.is_none());
/// # Ok::<(), eventbus_core::Error>(())
/// # }).unwrap();
/// ```
#[derive(Clone)]
pub struct EventBus {
    inner: Arc<Inner>,
    /// The service that publishes through this handle.
    source: Arc<str>,
}

struct Inner {
    broker: Arc<dyn Broker>,
    capabilities: Capabilities,
    clock: Arc<dyn Clock>,
    formats: Formats,
    format: Arc<dyn Format>,
    topic_formats: HashMap<Topic, Arc<dyn Format>>,
    topic_prefix: String,
    /// Topics of events that were published, with the prefix: as many as there are in the program.
    published: RwLock<HashMap<Topic, Topic>>,
    key_state: Option<Arc<dyn KeyStateStore>>,
    schedule: Option<Schedule>,
    /// Of the consumers on this bus, to let them hear at once of what is decided here.
    keepers: Mutex<Vec<Weak<HeldLanes>>>,
    activity: Arc<Activity>,
    sent: Counter,
    publish_duration: Histogram,
}

/// Sets up an [`EventBus`]; made by [`EventBus::builder`].
#[derive(Debug)]
#[must_use]
pub struct EventBusBuilder {
    broker: Arc<dyn Broker>,
    source: String,
    clock: Arc<dyn Clock>,
    formats: Formats,
    format: Arc<dyn Format>,
    topic_formats: HashMap<Topic, Arc<dyn Format>>,
    topic_prefix: String,
    key_state: Option<Arc<dyn KeyStateStore>>,
    schedule: Option<Arc<dyn ScheduleStore>>,
}

impl EventBusBuilder {
    /// Names the service that publishes; by default the program's name.
    pub fn source(mut self, source: impl Into<String>) -> Self {
        self.source = source.into();
        self
    }

    /// Replaces the machine's clock.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Sets the format of topics that have none of their own; by default [`EnvelopeFormat`].
    pub fn format(mut self, format: impl Format) -> Self {
        self.format = Arc::new(format);
        self.formats = self.formats.with(Arc::clone(&self.format));
        self
    }

    /// Sets the format of one topic.
    pub fn topic_format(mut self, topic: Topic, format: impl Format) -> Self {
        let format: Arc<dyn Format> = Arc::new(format);
        self.formats = self.formats.with(Arc::clone(&format));
        self.topic_formats.insert(topic, format);
        self
    }

    /// Puts `prefix` before the name of every topic, such as `staging.`.
    pub fn topic_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.topic_prefix = prefix.into();
        self
    }

    /// Sets where keys are held that wait for an operator or for a delayed attempt. With it
    /// [`OnPoison::ParkKey`](crate::OnPoison::ParkKey) is what consumers do by default.
    pub fn key_state(mut self, store: Arc<dyn KeyStateStore>) -> Self {
        self.key_state = Some(store);
        self
    }

    /// Sets where events wait that are published at a time to come, and makes this bus one of those
    /// that publish them then: from its first publish, consumer or service on, until it is closed.
    /// All buses with this store have to be on one broker.
    pub fn schedule(mut self, store: Arc<dyn ScheduleStore>) -> Self {
        self.schedule = Some(store);
        self
    }

    /// The bus.
    pub fn build(self) -> EventBus {
        let activity = Activity::new();
        let schedule = |store| Schedule::new(store, activity.part());
        let capabilities = self.broker.capabilities();
        let labels = [("messaging.system", capabilities.system)];
        EventBus {
            source: Arc::from(self.source),
            inner: Arc::new(Inner {
                sent: metrics::counter!(SENT_MESSAGES, &labels),
                publish_duration: metrics::histogram!(OPERATION_DURATION, &labels),
                broker: self.broker,
                capabilities,
                clock: self.clock,
                formats: self.formats,
                format: self.format,
                topic_formats: self.topic_formats,
                topic_prefix: self.topic_prefix,
                published: RwLock::default(),
                key_state: self.key_state,
                schedule: self.schedule.map(schedule),
                keepers: Mutex::default(),
                activity,
            }),
        }
    }
}

/// Room that a dead letter needs beside the message it holds.
const DEAD_LETTER_RESERVE: usize = 8 * 1024;

impl EventBus {
    /// A bus on `broker` with the defaults.
    pub fn new(broker: impl Broker) -> Self {
        Self::builder(broker).build()
    }

    /// Starts a bus on `broker`.
    pub fn builder(broker: impl Broker) -> EventBusBuilder {
        Self::builder_on(Arc::new(broker))
    }

    /// Starts a bus on a broker whose type is known only at run time.
    pub fn builder_on(broker: Arc<dyn Broker>) -> EventBusBuilder {
        EventBusBuilder {
            broker,
            source: program_name(),
            clock: Arc::new(SystemClock),
            formats: Formats::default(),
            format: Arc::new(EnvelopeFormat),
            topic_formats: HashMap::new(),
            topic_prefix: String::new(),
            key_state: None,
            schedule: None,
        }
    }

    /// A handle on the same connection for another service of this process: its name is the source
    /// of what is published through it.
    #[must_use]
    pub fn with_source(&self, source: &str) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            source: Arc::from(source),
        }
    }

    /// Publishes an event and resolves with its id when the broker has taken it durably.
    ///
    /// Two publishes awaited one after the other keep their order. Where the broker does not declare
    /// `history` (RabbitMQ), what is published before a group was first subscribed is not for that
    /// group: start the consumers first.
    ///
    /// # Cancellation
    ///
    /// A dropped future leaves it unknown whether the event is on the broker.
    ///
    /// # Errors
    ///
    /// `Unsupported` inside a running handler, though not in a task that it spawned: there [`Context::publish`](crate::Context::publish)
    /// is meant, whose events are sent only if the handler succeeds and carry derived ids.
    /// Otherwise those of the event's format and codec, and of the broker; the context `outcome`
    /// says whether the event may be on the broker all the same.
    pub async fn publish<E: Event>(&self, event: impl Into<Outgoing<E>> + Send) -> Result<EventId> {
        if is_in_handler() {
            return Err(inside_handler(E::TYPE));
        }
        self.publish_now(event).await
    }

    /// Publishes several events of one type with one call to the broker; their order is kept.
    ///
    /// # Errors
    ///
    /// As [`publish`](Self::publish); when the broker took only some of them, the source is a
    /// [`PartlyPublished`] that says which. Where it does not declare `ordered_pipelining`, later
    /// events of a key may be on the broker without an earlier one.
    pub async fn publish_all<E: Event>(
        &self,
        events: impl IntoIterator<Item = impl Into<Outgoing<E>>> + Send,
    ) -> Result<Vec<EventId>> {
        if is_in_handler() {
            return Err(inside_handler(E::TYPE));
        }
        let events = events.into_iter();
        let (least, _) = events.size_hint();
        let (mut ids, mut messages) = (Vec::with_capacity(least), Vec::with_capacity(least));
        for event in events {
            let (id, message) = self.message_of(event.into(), Origin::new())?;
            ids.push(id);
            messages.push(message);
        }
        match self.send_all_in_time(messages).await {
            Ok(()) => Ok(ids),
            Err(error) => Err(PartlyPublished::error(ids, error)),
        }
    }

    /// Publishes at once, also inside a running handler: the event is on the broker even if the
    /// handler fails, and once more, with another id, when it is run again.
    ///
    /// # Errors
    ///
    /// As [`publish`](Self::publish).
    pub async fn publish_now<E: Event>(
        &self,
        event: impl Into<Outgoing<E>> + Send,
    ) -> Result<EventId> {
        let (id, message) = self.message_of(event.into(), Origin::new())?;
        self.send_in_time(vec![message]).await?;
        Ok(id)
    }

    /// Publishes messages as they are, by the names that topics have on the broker: for tools and
    /// bridges, which know no event types. Services publish events with [`publish`](Self::publish).
    /// Inside a running handler they are sent at once, as with [`publish_now`](Self::publish_now).
    /// Those whose header [`NOT_BEFORE`](crate::header::NOT_BEFORE) names a time to come wait in the
    /// schedule of the bus.
    ///
    /// # Errors
    ///
    /// Names each message that was not acknowledged; the others were.
    pub async fn publish_messages(&self, messages: Vec<Message>) -> Result<(), PublishError> {
        self.send_in_time(messages).await
    }

    /// Starts a batch of events that are published later, all part of the flow that `origin`
    /// describes: what an outbox writes in a transaction of the business.
    ///
    /// # Errors
    ///
    /// `Unsupported` inside a running handler: there [`Context::publish`](crate::Context::publish)
    /// is meant, with a unit of work for what the handler writes.
    pub fn batch(&self, origin: Origin) -> Result<OutgoingBatch> {
        if is_in_handler() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "begin batch",
                "this runs inside a handler: use `cx.publish(…)`, and `.unit(store)` to write through `cx.transaction()`",
            ));
        }
        Ok(OutgoingBatch::new(self.clone(), origin))
    }

    pub(crate) fn message_of<E: Event>(
        &self,
        outgoing: Outgoing<E>,
        origin: Origin,
    ) -> Result<(EventId, Message)> {
        self.check_time(outgoing.not_before())?;
        let topic = self.topic_of::<E>()?;
        let frame = Frame {
            format: self.format_of(&topic),
            topic,
            source: &self.source,
            now: self.inner.clock.now(),
            id: EventId::new(),
            origin,
        };
        let (id, message) = into_message(outgoing, frame)?;
        message.check(self.event_bytes_max())?;
        Ok((id, message))
    }

    /// The name of an event's topic on the broker.
    fn topic_of<E: Event>(&self) -> Result<Topic> {
        if self.inner.topic_prefix.is_empty() {
            return Ok(E::TOPIC);
        }
        let published = &self.inner.published;
        let known = published.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(topic) = known.get(E::TOPIC.as_str()) {
            return Ok(topic.clone());
        }
        drop(known);
        let topic = self.topic(&E::TOPIC)?;
        let mut known = published.write().unwrap_or_else(PoisonError::into_inner);
        known.insert(E::TOPIC, topic.clone());
        Ok(topic)
    }

    /// Starts a consumer: a member of `group`.
    pub fn consumer(&self, group: &str) -> ConsumerBuilder {
        ConsumerBuilder::new(self.clone(), group)
    }

    /// The dead letters that `group` left of these topics.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the group's name is not allowed.
    pub fn dead_letters(&self, group: &str, topics: &[Topic]) -> Result<DeadLetters> {
        let topics = self.topics(topics)?;
        Ok(DeadLetters::new(self.clone(), Group::new(group)?, topics))
    }

    /// The keys that wait for `group`: parked, or for a delayed attempt.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the group's name is not allowed, `Unsupported` when the bus has no store
    /// of held keys.
    pub fn held_keys(&self, group: &str) -> Result<HeldKeys> {
        let store = self.inner.key_state.clone();
        let store = store.ok_or_else(|| no_key_state("look for held keys", ""))?;
        Ok(HeldKeys::new(self.clone(), store, Group::new(group)?))
    }

    /// Reads topics without a group, from `start` on, to `until` or for ever.
    ///
    /// # Errors
    ///
    /// Those of the broker; `Unsupported` where it can't read from there.
    pub async fn read(
        &self,
        topics: &[Topic],
        start: Start,
        until: Option<Until>,
    ) -> Result<Reader> {
        let topics = self.topics(topics)?;
        self.read_physical(topics, start, until).await
    }

    pub(crate) async fn read_physical(
        &self,
        topics: Vec<Topic>,
        start: Start,
        until: Option<Until>,
    ) -> Result<Reader> {
        let mut subscription = Subscription::reader(topics).with_start(start);
        subscription.until = until;
        let member = self.inner.broker.subscribe(subscription).await?;
        Ok(Reader::new(member, until.is_some()))
    }

    /// Creates the topics that are missing and reports how others differ from what is declared.
    ///
    /// # Errors
    ///
    /// Those of the broker. A difference is no error: look at [`TopicReport::drift`].
    pub async fn apply_topics(&self, topics: &[TopicSpec]) -> Result<Vec<TopicReport>> {
        let mut specs = topics.to_vec();
        for spec in &mut specs {
            spec.name = self.topic(&spec.name)?;
        }
        match self
            .inner
            .broker
            .admin(AdminRequest::ApplyTopics(specs))
            .await?
        {
            AdminReply::Topics(reports) => Ok(reports),
            _ => Err(unexpected_reply("apply topics")),
        }
    }

    /// How far `group` is behind on each partition of these topics.
    ///
    /// # Errors
    ///
    /// Those of the broker; `Unsupported` where it can't tell.
    pub async fn lag(&self, group: &str, topics: &[Topic]) -> Result<Vec<LaneLag>> {
        let topics = self.topics(topics)?;
        let group = Group::new(group)?;
        match self
            .inner
            .broker
            .admin(AdminRequest::Lag { group, topics })
            .await?
        {
            AdminReply::Lag(lag) => Ok(lag),
            _ => Err(unexpected_reply("ask for lag")),
        }
    }

    /// Where every group stands that reads these topics and how far it is behind; where no topic is
    /// named, all topics.
    ///
    /// # Errors
    ///
    /// Those of the broker; `Unsupported` where it can't tell.
    pub async fn lags(&self, topics: &[Topic]) -> Result<Vec<GroupPosition>> {
        let topics = self.topics(topics)?;
        match self
            .inner
            .broker
            .admin(AdminRequest::Groups { topics })
            .await?
        {
            AdminReply::Groups(positions) => Ok(positions),
            _ => Err(unexpected_reply("ask for groups")),
        }
    }

    /// What these topics are like; where none is named, all there are, dead letters' among them.
    ///
    /// # Errors
    ///
    /// `NotFound` when one is missing, `Unsupported` where the broker can't list all; otherwise
    /// those of the broker.
    pub async fn describe_topics(&self, topics: &[Topic]) -> Result<Vec<TopicReport>> {
        let topics = self.topics(topics)?;
        match self
            .inner
            .broker
            .admin(AdminRequest::DescribeTopics(topics))
            .await?
        {
            AdminReply::Topics(reports) => Ok(reports),
            _ => Err(unexpected_reply("describe topics")),
        }
    }

    /// Finds out where the events of a key are: on which partition, which groups have settled them
    /// and which have not, and which dead letters they left.
    ///
    /// # Examples
    ///
    /// ```
    /// # use eventbus_macros::Event;
    /// # use serde::{Deserialize, Serialize};
    /// # #[derive(Event, Serialize, Deserialize)]
    /// # #[event(crate = "eventbus_core", type = "OrderCreated", topic = "order-events", key = "order_id")]
    /// # struct OrderCreated { order_id: u64 }
    /// use eventbus_core::{Event as _, EventBus, MemoryBroker};
    ///
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// let bus = EventBus::new(MemoryBroker::new());
    /// let id = bus.publish(OrderCreated { order_id: 42 }).await?;
    ///
    /// let places = bus.whereabouts(&OrderCreated::TOPIC, "42").await?;
    /// assert_eq!(places.events[0].id, id);
    /// assert!(places.dead_letters.is_empty() && places.unknown.is_empty());
    /// # Ok::<(), eventbus_core::Error>(())
    /// # }).unwrap();
    /// ```
    pub fn whereabouts(&self, topic: &Topic, key: impl Into<Key>) -> Lookup {
        Lookup::new(self.clone(), topic.clone(), key.into())
    }

    /// Asks the broker whether it answers, and returns how long that took.
    ///
    /// # Errors
    ///
    /// Those of the broker. One that hangs is not given up: bound the time.
    pub async fn health(&self) -> Result<Duration> {
        let begun = Instant::now();
        self.inner.broker.admin(AdminRequest::Health).await?;
        Ok(begun.elapsed())
    }

    /// Starts a service: consumers, servers and what runs beside them, stopped in the right order.
    pub fn service(&self, name: &str) -> Service {
        Service::new(self.clone(), name)
    }

    /// What the broker can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.inner.capabilities
    }

    /// Ends the connection, for all clones of this handle and every consumer on it. Idempotent.
    /// Scheduled events that are being published are waited for, a few seconds at most; the others
    /// are left to other processes, or to the next start.
    ///
    /// # Errors
    ///
    /// Those of the broker.
    pub async fn close(&self) -> Result<()> {
        if let Some(schedule) = self.schedule() {
            schedule.close().await;
        }
        self.inner.broker.close().await
    }

    /// Reads the envelope of a message that came from a [`Reader`] or a dead letter.
    ///
    /// # Errors
    ///
    /// `Codec` when no format claims the message.
    pub fn envelope(&self, message: &Message) -> Result<Envelope> {
        let fallback = (EventId::new(), self.inner.clock.now());
        self.inner.formats.envelope(message, fallback)
    }

    /// Reads the event in a message, or `None` when it is of another type.
    ///
    /// # Errors
    ///
    /// `Codec` when no format claims the message, or its data are damaged.
    pub fn event<E: Event>(&self, message: &Message) -> Result<Option<E>> {
        let known = crate::header::KnownHeaders::of(&message.headers);
        let (_, reading) = self.inner.formats.read(message, &known)?;
        match reading.event_type == E::TYPE {
            true => crate::event::read_event(reading.version, &reading.data).map(Some),
            false => Ok(None),
        }
    }

    /// The name of `topic` on the broker, with the prefix of the environment.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when prefix and name together are not allowed.
    pub fn topic(&self, topic: &Topic) -> Result<Topic> {
        match self.inner.topic_prefix.as_str() {
            "" => Ok(topic.clone()),
            prefix => Topic::new(&format!("{prefix}{topic}"))
                .map_err(|error| error.with("topic prefix", prefix)),
        }
    }

    /// The names of several topics on the broker.
    pub(crate) fn topics(&self, topics: &[Topic]) -> Result<Vec<Topic>> {
        topics.iter().map(|topic| self.topic(topic)).collect()
    }

    /// Who has work on this bus: what a test waits for.
    pub fn activity(&self) -> &Activity {
        &self.inner.activity
    }

    /// The clock that dates events.
    pub fn clock(&self) -> &dyn Clock {
        self.inner.clock.as_ref()
    }

    pub(crate) fn shared_activity(&self) -> &Arc<Activity> {
        &self.inner.activity
    }

    /// Where keys are held, if anywhere.
    pub(crate) fn key_state(&self) -> Option<&Arc<dyn KeyStateStore>> {
        self.inner.key_state.as_ref()
    }

    /// Where events wait for their time, if anywhere.
    pub(crate) fn schedule(&self) -> Option<&Schedule> {
        self.inner.schedule.as_ref()
    }

    /// Sees to it that what is scheduled is published, from now on.
    pub(crate) fn start_schedule(&self) {
        if let Some(schedule) = self.schedule() {
            schedule.start(self);
        }
    }

    /// A handle that does not keep the connection.
    pub(crate) fn downgrade(&self) -> WeakBus {
        WeakBus {
            inner: Arc::downgrade(&self.inner),
            source: Arc::clone(&self.source),
        }
    }

    /// Lets a consumer hear of decisions that are made through this bus.
    pub(crate) fn add_keeper(&self, keeper: &Arc<HeldLanes>) {
        let mut keepers = self.lock_keepers();
        keepers.retain(|keeper| keeper.strong_count() > 0);
        keepers.push(Arc::downgrade(keeper));
    }

    pub(crate) fn wake_keepers(&self) {
        for keeper in self.lock_keepers().iter().filter_map(Weak::upgrade) {
            keeper.wake();
        }
    }

    fn lock_keepers(&self) -> MutexGuard<'_, Vec<Weak<HeldLanes>>> {
        let keepers = self.inner.keepers.lock();
        keepers.unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether both handles are of one connection, which is closed for both.
    pub(crate) fn shares_connection_with(&self, other: &EventBus) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    pub(crate) fn broker(&self) -> &dyn Broker {
        self.inner.broker.as_ref()
    }

    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    pub(crate) fn formats(&self) -> &Formats {
        &self.inner.formats
    }

    /// The format of a topic, by its name on the broker.
    pub(crate) fn format_of(&self, topic: &Topic) -> &dyn Format {
        let name = topic.as_str();
        let name = name.strip_prefix(&self.inner.topic_prefix).unwrap_or(name);
        self.inner
            .topic_formats
            .get(name)
            .unwrap_or(&self.inner.format)
            .as_ref()
    }

    /// Most bytes of key, headers and payload that an event may have: what the broker takes, less
    /// the room that its dead letter would need.
    pub fn event_bytes_max(&self) -> usize {
        let broker_max = self.inner.capabilities.message_bytes_max;
        broker_max.saturating_sub(DEAD_LETTER_RESERVE.min(broker_max / 2))
    }

    /// Publishes messages as [`send`](Self::send) does, except those of a time to come: they are put
    /// into the schedule first. What fails of these keeps none of the others, and the other way round.
    pub(crate) async fn send_in_time(&self, messages: Vec<Message>) -> Result<(), PublishError> {
        let (messages, apart) = self.set_aside(messages).await;
        let sent = match messages.is_empty() {
            true => Ok(()),
            false => self.send(messages).await,
        };
        apart.join(sent)
    }

    /// As [`send_in_time`](Self::send_in_time), with one call of the broker.
    async fn send_all_in_time(&self, messages: Vec<Message>) -> Result<(), PublishError> {
        let (messages, apart) = self.set_aside(messages).await;
        let sent = match messages.is_empty() {
            true => Ok(()),
            false => self.send_at_once(messages).await,
        };
        apart.join(sent)
    }

    /// Publishes messages as they are. After a failure no message is on the broker before an earlier
    /// one of its key, so that the others can be sent again; a dead letter that is refused for its
    /// size is stored in parts.
    pub(crate) async fn send(&self, messages: Vec<Message>) -> Result<(), PublishError> {
        if !self.inner.capabilities.ordered_pipelining && repeats_a_key(&messages) {
            return self.send_by_turns(messages).await;
        }
        match self.send_at_once(messages).await {
            Ok(()) => Ok(()),
            Err(refused) => {
                let parts = in_parts(refused, self.inner.capabilities.message_bytes_max)?;
                self.send_by_turns(parts).await
            }
        }
    }

    /// Publishes one message of each key at a time.
    async fn send_by_turns(&self, messages: Vec<Message>) -> Result<(), PublishError> {
        let turns = Turns::new(messages);
        turns.send(|turn| self.send_at_once(turn)).await
    }

    /// Publishes messages with one call of the broker.
    pub(crate) async fn send_at_once(&self, messages: Vec<Message>) -> Result<(), PublishError> {
        let count = messages.len();
        let begun = Instant::now();
        let published = match self.send_span(&messages) {
            None => self.inner.broker.publish(messages),
            Some(span) => Box::pin(self.inner.broker.publish(messages).instrument(span)),
        };
        trace!(target: "eventbus::step", step = "publish.before");
        let result = published.await;
        trace!(target: "eventbus::step", step = "publish.after");
        self.inner.publish_duration.record(begun.elapsed());
        let failed = result
            .as_ref()
            .err()
            .map_or(0, |error| error.unpublished.len());
        self.inner
            .sent
            .increment(count.saturating_sub(failed) as u64);
        result
    }
}

impl EventBus {
    /// The span of a publish, after OpenTelemetry's messaging conventions; none when nobody listens.
    fn send_span(&self, messages: &[Message]) -> Option<tracing::Span> {
        if !tracing::enabled!(tracing::Level::INFO) {
            return None;
        }
        let topic = messages.first().map(|message| message.topic.as_str())?;
        let span = tracing::info_span!(
            "send",
            otel.name = format_args!("send {topic}"),
            otel.kind = "producer",
            messaging.system = self.inner.capabilities.system,
            messaging.operation.name = "send",
            messaging.operation.type = "send",
            messaging.destination.name = topic,
            messaging.batch.message_count = messages.len(),
        );
        Some(span)
    }
}

/// A bus as its own task knows it: gone when nobody else uses it.
#[derive(Debug)]
pub(crate) struct WeakBus {
    inner: Weak<Inner>,
    source: Arc<str>,
}

impl WeakBus {
    pub(crate) fn upgrade(&self) -> Option<EventBus> {
        Some(EventBus {
            inner: self.inner.upgrade()?,
            source: Arc::clone(&self.source),
        })
    }
}

impl fmt::Debug for EventBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventBus")
            .field("broker", &self.inner.broker)
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl From<PublishError> for Error {
    /// The first failure, with the outcome in the context.
    fn from(error: PublishError) -> Self {
        let count = error.unpublished.len();
        let Some(first) = error.unpublished.into_iter().next() else {
            return Error::new(ErrorKind::Internal, "publish", "an error without a failure");
        };
        let outcome = match first.outcome {
            crate::broker::Outcome::NotTaken => "not taken",
            crate::broker::Outcome::Unknown => "unknown: it may be on the broker",
        };
        let error = first.error.with("outcome", outcome);
        match count {
            1 => error,
            count => error.with("not acknowledged", count),
        }
    }
}

fn inside_handler(event_type: &'static str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "publish",
        "this runs inside a handler: use `cx.publish(…)`, or `cx.publish_at(…)` and `cx.publish_after(…)`, which send only if the handler succeeds, or spell it `bus.publish_now(…)`",
    )
    .with("type", event_type)
}

fn unexpected_reply(operation: &'static str) -> Error {
    Error::new(
        ErrorKind::Internal,
        operation,
        "the broker's adapter answered with a reply of another kind",
    )
}

/// The name of the running program, without its path.
fn program_name() -> String {
    // Not `args`, which panics when the path is no Unicode.
    std::env::args_os()
        .next()
        .and_then(|path| {
            let path = std::path::PathBuf::from(path);
            path.file_stem()
                .map(|name| name.to_string_lossy().into_owned())
        })
        .unwrap_or_else(|| "eventbus".to_owned())
}
