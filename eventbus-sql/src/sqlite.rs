//! The SQLite broker: a durable partitioned log in one file, for several processes of one machine.

mod admin;
mod append;
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
mod places;
mod readers;
mod schedule;
mod settle;
mod store;
mod subscriber;
mod tables;
mod timer;
mod topics;
mod transaction;
mod unit;
mod wake;
mod writer;

pub use broker::SqliteBroker;
pub use config::SqliteConfig;
pub use schedule::SqliteSchedule;
pub use store::SqliteStore;
pub use transaction::{SqliteOutbox, SqliteTransaction};
