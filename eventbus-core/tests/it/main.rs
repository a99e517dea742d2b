//! Tests of eventbus-core through its public API and the testkit.

mod conformance;
mod memory;
mod order;
