//! For tests of services and of brokers: a bus with virtual time, and the conformance suite.

#![warn(clippy::unwrap_used, clippy::print_stdout)]

mod test_bus;

pub use test_bus::TestBus;
