//! Tests against the Redis that `dev/brokers up redis` starts, and servers of their own.

mod conformance;
mod errors;
mod lost;
mod own_server;
mod proxy;
mod server;
mod stalled;
mod stopped;
mod stores;
mod streams;
#[cfg(feature = "tls")]
mod tls;
