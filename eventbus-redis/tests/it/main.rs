//! Tests against the Redis that `dev/brokers up redis` starts.

mod conformance;
mod server;
mod stores;
mod streams;
