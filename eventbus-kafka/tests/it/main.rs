//! Tests against the Kafka that `dev/brokers up kafka` starts.

mod changes;
mod conformance;
mod errors;
mod proxy;
mod python;
#[cfg(feature = "tls")]
mod secured;
mod server;
