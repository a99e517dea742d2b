//! Tests of eventbus-core through its public API and the testkit.

mod conformance;
mod formats;
mod memory;
mod order;
mod review;
