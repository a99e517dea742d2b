#![doc = include_str!("../README.md")]
#![warn(clippy::unwrap_used, clippy::print_stdout)]

mod sqlite;

pub use sqlite::{
    SqliteBroker, SqliteConfig, SqliteOutbox, SqliteSchedule, SqliteStore, SqliteTransaction,
};
