//! For tests of services and of brokers: a bus with virtual time, and the conformance suites.

#![warn(clippy::unwrap_used, clippy::print_stdout)]

pub mod broker;
pub mod duplicates;
pub mod faults;
pub mod key_state;
pub mod lease;
pub mod outbox;
mod probe;
pub mod proxy;
pub mod schedule;
mod simulation;
mod test_bus;

pub use broker::BrokerHarness;
pub use duplicates::DuplicatesHarness;
pub use faults::{FaultPlan, FaultyBroker};
pub use key_state::KeyStateHarness;
pub use lease::LeaseHarness;
pub use outbox::{OutboxHarness, OutboxTransaction};
pub use probe::{Ledger, Probe, Record, text_of, within};
pub use proxy::{
    AmqpMethod, AmqpMethods, Direction, FaultProxy, KafkaApi, Protocol, RedisCommands, Requests,
    Statements, Traffic, WireFault,
};
pub use schedule::ScheduleHarness;
pub use simulation::{SEED_VARIABLE, Simulation};
pub use test_bus::TestBus;
