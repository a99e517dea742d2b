//! Tests of eventbus-core through the testkit.

mod conformance;
mod formats;
mod memory;
