#![doc = include_str!("../README.md")]
#![warn(clippy::unwrap_used, clippy::print_stdout)]

mod config;
mod connect;
mod signal;

pub mod broker;
pub mod desk;
pub mod format;
pub mod layer;
pub mod metrics;
pub mod prelude;
pub mod store;
pub mod unit_of_work;

pub use config::EventBusConfig;
pub use connect::{Connect, connect};
/// How a [`Service`] is, over HTTP.
#[cfg(feature = "axum")]
pub use eventbus_axum as health;
/// Where the events of a request come from.
#[cfg(feature = "axum")]
pub use eventbus_axum::{BadOrigin, RequestOrigin};
pub use signal::shutdown_signal;

// The bus: publishing, reading, asking.
pub use eventbus_core::{
    Capabilities, Compression, Durability, EventBus, EventBusBuilder, LaneLag, Origin, Outgoing,
    OutgoingBatch, PartlyPublished, Reader, Record, TopicReport, TopicSpec,
};
// Events and what is known about them.
pub use eventbus_core::{
    Envelope, Event, EventId, Group, Headers, Key, Message, Metadata, Position, Timestamp, Topic,
    header,
};
#[cfg(feature = "kafka")]
pub use eventbus_kafka::{KafkaBroker, KafkaConfig};
#[cfg(feature = "macros")]
pub use eventbus_macros::Event;
#[cfg(feature = "rabbitmq")]
pub use eventbus_rabbitmq::{
    RabbitMqBroker, RabbitMqConfig, RabbitMqIngress, RabbitMqIngressBuilder, RabbitMqIngressStatus,
    RabbitMqQueue,
};
#[cfg(feature = "redis")]
pub use eventbus_redis::{RedisBroker, RedisConfig, RedisDuplicates, RedisKeyState};
#[cfg(feature = "postgres")]
pub use eventbus_sql::{
    PostgresBroker, PostgresConfig, PostgresOutbox, PostgresStore, PostgresTransaction,
};
#[cfg(feature = "sqlite")]
pub use eventbus_sql::{SqliteBroker, SqliteConfig, SqliteOutbox, SqliteStore, SqliteTransaction};
// Consumers and their handlers.
pub use eventbus_core::{
    BatchHandler, BatchItem, Breaker, Consumer, ConsumerBuilder, ConsumerState, ConsumerStatus,
    Context, Counts, DuplicateWindow, Handler, LaneStatus, Limits, NoUnit, OnError, OnPoison,
    Replay, ReplayReport, RetryPolicy, Start, Until,
};
// What could not be handled, keys that wait for an operator, and events that wait for their time.
pub use eventbus_core::{DeadLetter, DeadLetters, Edit, HeldKeys, Redrive, ScheduledEvents};
// Consumers, servers and what is beside them as one service; where events are, and whether none are.
pub use eventbus_core::{
    BrokerHealth, ConsumerHealth, Drain, DrainReport, EventPlace, GroupPosition, GroupProgress,
    HeldFor, Lookup, Progress, Service, ServiceHandle, ServiceHealth, ServiceState, Stopping,
    Undrained, Unknown, Whereabouts,
};
// From an outbox to the broker.
pub use eventbus_core::{OnRefused, Relay, RelayHandle, RelayStatus};
// Errors, time, and the broker in memory.
pub use eventbus_core::{
    BoxError, Clock, Error, ErrorKind, MemoryBroker, MemoryConfig, MemoryKeyState, MemoryProfile,
    MemorySchedule, MemoryUnit, Result, Retry, SystemClock, error_chain,
};
// What `#[derive(Event)]` writes names these here.
#[doc(hidden)]
pub use eventbus_core::{Json, assert_upcast, unknown_version, upcast_from};
