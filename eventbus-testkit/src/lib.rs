//! For tests of services and of brokers: a bus with virtual time, and the conformance suite.

mod test_bus;

pub use test_bus::TestBus;
