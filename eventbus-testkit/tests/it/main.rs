//! Tests of the testkit itself.

mod simulation;
mod wrong_broker;
