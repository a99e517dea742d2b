//! Tests against the Kafka that `dev/brokers up kafka` starts.

mod changes;
mod conformance;
mod errors;
mod proxy;
mod python;
mod server;
