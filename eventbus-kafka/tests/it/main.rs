//! Tests against the Kafka that `dev/brokers up kafka` starts.

mod conformance;
mod errors;
mod server;
