#![doc = include_str!("../README.md")]
#![warn(clippy::unwrap_used, clippy::print_stdout)]

#[cfg(any(feature = "sqlite", feature = "postgres"))]
#[cfg(any(feature = "sqlite", feature = "postgres"))]
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod option;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "sqlite")]
mod sqlite;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod unit;
mod wakes;

#[cfg(feature = "postgres")]
pub use postgres::{
    PostgresBroker, PostgresConfig, PostgresLeases, PostgresOutbox, PostgresSchedule,
    PostgresStore, PostgresTransaction,
};
#[cfg(feature = "sqlite")]
pub use sqlite::{
    SqliteBroker, SqliteConfig, SqliteOutbox, SqliteSchedule, SqliteStore, SqliteTransaction,
};
