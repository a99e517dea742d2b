//! Tests of eventbus-core through its public API and the testkit.

mod batches;
mod breaker;
mod conformance;
mod dead_letters;
mod failures;
mod fixtures;
mod formats;
mod hand_over;
mod held;
mod key_state;
mod layers;
mod leases;
mod memory;
mod order;
mod outbox;
mod publishing;
mod relay;
mod replay;
mod review;
mod schedule;
mod scheduled;
mod service;
mod shutdown;
mod units;
mod whereabouts;
