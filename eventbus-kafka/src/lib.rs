//! Apache Kafka for the eventbus SDK.
//!
//! ```text
//!  publish ─▶ permits ─▶ idempotent producer ═▶ partition of murmur2(key) ═▶ queue of the partition
//!                │                                                               │ polled as credit allows
//!     one answer a batch ◀── delivery reports                     next ◀─────────┘
//!
//!  settle ─▶ everything before it is done? ─▶ commit ─▶ answered ─▶ resolved
//!  revoked ─▶ handlers end ─▶ release ─▶ only now given up: the next owner begins
//! ```
//!
//! A partition's offset is committed when every message before it is settled, and `settle` resolves
//! when the group's coordinator has answered. Nothing is committed by a timer, by dropping or by
//! closing a consumer, and a partition that is revoked stays until its handlers have ended.
//!
//! Users reach it through `connect("kafka://…")` of the facade; [`KafkaBroker`] is for set-ups that a
//! URL cannot say.

mod admin;
mod broker;
mod client;
mod committer;
mod config;
mod deliveries;
mod error;
mod in_flight;
mod lanes;
mod poller;
mod producer;
mod record;
mod start;
mod subscriber;
mod topics;

pub use broker::KafkaBroker;
pub use config::KafkaConfig;
