//! An event on its way out: what its publisher may say about it, and how it becomes a message.

use crate::bus::EventBus;
use crate::clock::Timestamp;
use crate::codec::Codec;
use crate::envelope::{Envelope, EventId, Metadata};
use crate::error::Result;
use crate::event::Event;
use crate::format::Format;
use crate::header;
use crate::message::{Key, Message, Topic};

/// An event and what is said about it; every [`Event`] becomes one by itself.
///
/// # Examples
///
/// ```
/// # use eventbus_core::{Event, EventId, Json, Key, Outgoing, Result, Topic, unknown_version};
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct OrderCreated { order_id: u64 }
/// # impl Event for OrderCreated {
/// #     const TYPE: &'static str = "OrderCreated";
/// #     const TOPIC: Topic = Topic::from_static("order-events");
/// #     const VERSION: u32 = 1;
/// #     type Codec = Json;
/// #     fn key(&self) -> Option<Key> { Some(Key::display(self.order_id)) }
/// #     fn upcast(version: u32, _: &[u8]) -> Result<Self> { Err(unknown_version::<Self>(version)) }
/// # }
/// let event = Outgoing::new(OrderCreated { order_id: 42 })
///     .with_id(EventId::from_name("POST /orders 7f3a"))
///     .with_metadata("userId", "u-17");
/// ```
#[derive(Clone, Debug)]
pub struct Outgoing<E> {
    event: E,
    id: Option<EventId>,
    origin: Option<Origin>,
    metadata: Metadata,
    expires_at: Option<Timestamp>,
    not_before: Option<Timestamp>,
}

impl<E> Outgoing<E> {
    /// An event about which nothing more is said.
    pub fn new(event: E) -> Self {
        Self {
            event,
            id: None,
            origin: None,
            metadata: Metadata::new(),
            expires_at: None,
            not_before: None,
        }
    }

    pub(crate) fn not_before(&self) -> Option<Timestamp> {
        self.not_before
    }

    pub(crate) fn key(&self) -> Option<Key>
    where
        E: Event,
    {
        self.event.key()
    }

    /// Sets its id, such as one made from a client's idempotency key.
    #[must_use]
    pub fn with_id(mut self, id: EventId) -> Self {
        self.id = Some(id);
        self
    }

    /// Makes it part of the flow that `origin` describes. In a handler the flow is that of the
    /// event handled, unless this is called.
    #[must_use]
    pub fn with_origin(mut self, origin: Origin) -> Self {
        self.origin = Some(origin);
        self
    }

    /// Adds metadata, which everything that follows from the event inherits.
    #[must_use]
    pub fn with_metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(name.into(), value.into());
        self
    }

    /// Sets a time after which nobody handles it any more; it is counted as expired.
    #[must_use]
    pub fn with_expiry(mut self, time: Timestamp) -> Self {
        self.expires_at = Some(time);
        self
    }

    /// Sets a time before which it is not published: until then it waits in the schedule of the
    /// bus; see [`EventBus::publish_at`](crate::EventBus::publish_at).
    #[must_use]
    pub fn with_not_before(mut self, time: Timestamp) -> Self {
        self.not_before = Some(time);
        self
    }
}

impl<E: Event> From<E> for Outgoing<E> {
    fn from(event: E) -> Self {
        Self::new(event)
    }
}

/// Where an event comes from: the flow it is part of and what travels along.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Origin {
    /// What is constant along the flow; without one the event begins a flow of its own.
    pub correlation_id: Option<String>,
    /// What caused it.
    pub causation_id: Option<String>,
    /// What travels along.
    pub metadata: Metadata,
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// W3C trace context.
    pub tracestate: Option<String>,
}

impl Origin {
    /// No origin.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets what is constant along the flow, such as a request's id.
    #[must_use]
    pub fn with_correlation_id(mut self, id: impl Into<String>) -> Self {
        self.correlation_id = Some(id.into());
        self
    }

    /// Sets what caused it.
    #[must_use]
    pub fn with_causation_id(mut self, id: impl Into<String>) -> Self {
        self.causation_id = Some(id.into());
        self
    }

    /// Adds metadata.
    #[must_use]
    pub fn with_metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(name.into(), value.into());
        self
    }

    /// Sets the W3C `traceparent`.
    #[must_use]
    pub fn with_traceparent(mut self, traceparent: impl Into<String>) -> Self {
        self.traceparent = Some(traceparent.into());
        self
    }

    /// Sets the W3C `tracestate`.
    #[must_use]
    pub fn with_tracestate(mut self, tracestate: impl Into<String>) -> Self {
        self.tracestate = Some(tracestate.into());
        self
    }
}

/// Events of any types that are written now and published later, such as by an outbox; made by
/// [`EventBus::batch`].
///
/// # Examples
///
/// ```
/// # use eventbus_macros::Event;
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(crate = "eventbus_core", type = "OrderCreated", topic = "order-events", key = "order_id")]
/// # struct OrderCreated { order_id: u64 }
/// use eventbus_core::{EventBus, MemoryBroker, Origin};
///
/// let bus = EventBus::new(MemoryBroker::new());
/// let mut batch = bus.batch(Origin::new().with_correlation_id("request-7"))?;
/// let id = batch.publish(OrderCreated { order_id: 42 })?;
/// assert_eq!(batch.into_messages()[0].0, id);
/// # Ok::<(), eventbus_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct OutgoingBatch {
    bus: EventBus,
    origin: Origin,
    messages: Vec<(EventId, Message)>,
}

impl OutgoingBatch {
    pub(crate) fn new(bus: EventBus, origin: Origin) -> Self {
        Self {
            bus,
            origin,
            messages: Vec::new(),
        }
    }

    /// Adds an event, and returns its id; their order is kept.
    ///
    /// # Errors
    ///
    /// Those of the event's format and codec, and `InvalidInput` when it is too large for the broker.
    pub fn publish<E: Event>(&mut self, event: impl Into<Outgoing<E>>) -> Result<EventId> {
        let (id, message) = self.bus.message_of(event.into(), self.origin.clone())?;
        self.messages.push((id.clone(), message));
        Ok(id)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Them as messages, each with its event's id.
    pub fn into_messages(self) -> Vec<(EventId, Message)> {
        self.messages
    }
}

/// What the bus adds to an event.
pub(crate) struct Frame<'a> {
    pub(crate) topic: Topic,
    pub(crate) format: &'a dyn Format,
    pub(crate) source: &'a str,
    pub(crate) now: Timestamp,
    /// The id when the publisher gave none.
    pub(crate) id: EventId,
    /// The flow when the publisher gave none.
    pub(crate) origin: Origin,
}

/// Makes the message of an event.
pub(crate) fn into_message<E: Event>(
    outgoing: Outgoing<E>,
    frame: Frame<'_>,
) -> Result<(EventId, Message)> {
    let Outgoing {
        event,
        id,
        origin,
        metadata,
        expires_at,
        not_before,
    } = outgoing;
    let id = id.unwrap_or(frame.id);
    let origin = origin.unwrap_or(frame.origin);
    let mut envelope = Envelope::new(id, E::TYPE, E::VERSION, frame.now);
    envelope.source = frame.source.to_owned();
    if let Some(correlation_id) = origin.correlation_id {
        envelope.correlation_id = correlation_id;
    }
    envelope.causation_id = origin.causation_id;
    envelope.metadata = origin.metadata;
    envelope.metadata.extend(metadata);

    let data = E::Codec::encode(&event).map_err(|error| error.with("type", E::TYPE))?;
    let (headers, payload) =
        frame
            .format
            .write(&envelope, <E::Codec as Codec<E>>::CONTENT_TYPE, &data)?;
    let headers = match (&origin.traceparent, expires_at, not_before) {
        (None, None, None) => headers,
        (traceparent, expires_at, not_before) => headers
            .to_builder()
            .push_some(header::TRACEPARENT, traceparent.as_ref())?
            .push_some(header::TRACESTATE, origin.tracestate.as_ref())?
            .push_some(header::EXPIRES_AT, expires_at.map(|time| time.to_string()))?
            .push_some(header::NOT_BEFORE, not_before.map(|time| time.to_string()))?
            .build(),
    };
    let mut message = Message::new(frame.topic, payload).with_headers(headers);
    message.key = event.key();
    Ok((envelope.id, message))
}
