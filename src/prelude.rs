//! What a service file needs, in one line: `use eventbus::prelude::*;`.

pub use eventbus_core::{
    BatchItem, BoxError, Consumer, ConsumerBuilder, Context, DuplicateWindow, Edit, Error,
    ErrorKind, Event, EventBus, EventId, Handler, NoUnit, OnError, OnPoison, Origin, Outgoing,
    Redrive, Replay, Result, RetryPolicy, Service, Start, Topic, TopicSpec, Until,
};
#[cfg(feature = "macros")]
pub use eventbus_macros::Event;

pub use crate::{Connect, EventBusConfig, shutdown_signal};
