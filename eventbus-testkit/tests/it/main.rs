//! Tests of the testkit itself.

mod faults;
mod simulation;
mod wrong_broker;
