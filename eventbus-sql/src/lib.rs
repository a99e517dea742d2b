#![doc = include_str!("../README.md")]
#![warn(clippy::unwrap_used, clippy::print_stdout)]

mod duration;
mod log;
mod sqlite;

pub use sqlite::{
    SqliteBroker, SqliteConfig, SqliteOutbox, SqliteSchedule, SqliteStore, SqliteTransaction,
};
