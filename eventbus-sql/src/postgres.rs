//! The PostgreSQL broker: a durable partitioned log in a schema of a database, for any number of
//! processes and machines.

mod admin;
mod broker;
mod config;
mod database;
mod error;
mod groups;
mod headers;
mod janitor;
mod key_state;
mod leases;
mod page;
mod session;
mod settle;
mod subscriber;
mod tables;
mod topics;
mod wake;
mod writer;

pub use broker::PostgresBroker;
pub use config::PostgresConfig;
pub use key_state::PostgresKeyState;
pub use leases::PostgresLeases;
