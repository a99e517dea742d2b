//! RabbitMQ for the eventbus SDK.
//!
//! ```text
//!  publish ─▶ a channel of several ─▶ exchange of the topic ═ partition of murmur2(key) ═▶ a quorum queue for each group
//!                │                                                                             │ single active consumer
//!     one answer a batch ◀─ confirms, returns                          next ◀─ a channel a lane ┘
//!
//!  settle ─▶ everything before it is done? ─▶ acknowledged up to there ─▶ the server has it ─▶ resolved
//!  members announce themselves ─▶ each computes the same shares ─▶ release ─▶ its channel closes ─▶ the next one begins
//! ```
//!
//! A queue hands its messages to one consumer at a time, in their order, and what that one has not
//! acknowledged comes first to the next. That is the fence. Who is to consume what, members agree about
//! among themselves. Messages are only ever acknowledged, never rejected, and a lane is given away by
//! closing its channel, never by cancelling: both would change their order.
//!
//! Users reach it through `connect("amqp://…")` of the facade; [`RabbitMqBroker`] is for set-ups that a
//! URL cannot say.

mod admin;
mod adopted;
mod broker;
mod config;
mod confirms;
mod deliveries;
mod error;
mod groups;
mod ingress;
mod lanes;
mod link;
mod names;
mod opening;
mod properties;
mod publisher;
mod reader;
mod roster;
mod session;
mod subscriber;
mod tls;
mod topics;

pub use adopted::RabbitMqQueue;
pub use broker::RabbitMqBroker;
pub use config::RabbitMqConfig;
pub use ingress::{RabbitMqIngress, RabbitMqIngressBuilder, RabbitMqIngressStatus};
