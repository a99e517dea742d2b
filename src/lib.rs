#![doc = include_str!("../README.md")]
#![warn(clippy::unwrap_used, clippy::print_stdout)]

mod config;
mod connect;
mod signal;

pub mod prelude;

pub use config::EventBusConfig;
pub use connect::{Connect, connect};
pub use eventbus_core::*;
#[cfg(feature = "macros")]
pub use eventbus_macros::Event;
#[cfg(feature = "sqlite")]
pub use eventbus_sql::{SqliteBroker, SqliteConfig};
pub use signal::shutdown_signal;
