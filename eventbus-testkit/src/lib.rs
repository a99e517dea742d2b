//! For tests of services and of brokers: a bus with virtual time, and the conformance suite.

#![warn(clippy::unwrap_used, clippy::print_stdout)]

pub mod broker;
mod probe;
mod test_bus;

pub use broker::BrokerHarness;
pub use probe::{Ledger, Probe, Record, text_of, within};
pub use test_bus::TestBus;
