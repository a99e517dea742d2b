#![doc = include_str!("../README.md")]

mod admin;
mod broker;
mod config;
mod database;
mod duplicates;
mod error;
mod groups;
mod janitor;
mod key_state;
mod leases;
mod pages;
mod position;
mod record;
mod server;
mod subscriber;
#[cfg_attr(not(feature = "tls"), path = "no_tls.rs")]
mod tls;
mod topics;
mod watch;
mod writer;

pub use broker::RedisBroker;
pub use config::RedisConfig;
pub use duplicates::RedisDuplicates;
pub use key_state::RedisKeyState;
pub use leases::RedisLeases;
