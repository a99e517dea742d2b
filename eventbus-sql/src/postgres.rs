//! PostgreSQL: a durable partitioned log in a schema of a database, for any number of processes and
//! machines, and the store of a service that has its own data there.

mod admin;
mod broker;
mod config;
mod database;
mod error;
mod groups;
mod headers;
mod inbox;
mod janitor;
mod key_state;
mod leases;
mod lending;
mod outbox;
mod page;
mod schedule;
mod session;
mod settle;
mod store;
mod subscriber;
mod tables;
mod topics;
mod transaction;
mod unit;
mod wake;
mod writer;

pub use broker::PostgresBroker;
pub use config::PostgresConfig;
pub use leases::PostgresLeases;
pub use schedule::PostgresSchedule;
pub use store::PostgresStore;
pub use transaction::{PostgresOutbox, PostgresTransaction};
