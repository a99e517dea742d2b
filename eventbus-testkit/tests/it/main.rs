//! Tests of the testkit itself.

mod faults;
mod proxy;
mod simulation;
mod wrong_broker;
