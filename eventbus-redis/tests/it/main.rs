//! Tests against the Redis that `dev/brokers up redis` starts.

mod conformance;
mod proxy;
mod server;
mod streams;
