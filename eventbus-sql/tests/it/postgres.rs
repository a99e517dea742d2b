//! PostgreSQL as its users meet it, on a real server.

mod conformance;
mod debezium;
mod disk;
mod dump;
mod faults;
mod floor;
mod key_state;
mod leases;
mod long;
mod offline;
mod order;
mod outbox;
mod own_server;
mod processes;
mod proxy;
pub(crate) mod relays;
mod retention;
mod schedule;
mod schema;
mod server;
mod service;
mod shop;
mod storms;
mod unit;
