//! The SQLite broker: a durable partitioned log in one file, for several processes of one machine.

mod admin;
mod append;
mod broker;
mod config;
mod database;
mod deliveries;
mod error;
mod groups;
mod headers;
mod janitor;
mod key_state;
mod leases;
mod member;
mod page;
mod schedule;
mod settle;
mod subscriber;
mod tables;
mod topics;
mod wake;
mod writer;

pub use broker::SqliteBroker;
pub use config::SqliteConfig;
pub use key_state::SqliteKeyState;
pub use schedule::SqliteSchedule;
