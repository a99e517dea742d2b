//! Tests against the RabbitMQ that `dev/brokers up rabbitmq` starts.

mod changes;
mod conformance;
mod errors;
mod letters;
mod order;
mod proxy;
mod server;
