//! Tests against the RabbitMQ that `dev/brokers up rabbitmq` starts.

mod adopted;
mod changes;
mod child;
mod conformance;
mod errors;
mod history;
mod ingress;
mod letters;
mod moving;
mod order;
mod own;
mod proxy;
mod publishing;
mod server;
mod shop;
mod slow;
