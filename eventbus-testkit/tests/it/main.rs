//! Tests of the testkit itself.

mod wrong_broker;
