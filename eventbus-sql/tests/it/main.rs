//! The brokers as their users meet them: SQLite here, PostgreSQL in its folder.

mod child;
mod conformance;
mod crash;
mod damage;
mod events;
mod files;
mod key_state;
mod leases;
mod moving;
mod outbox;
mod place;
#[cfg(feature = "postgres")]
mod postgres;
mod processes;
mod relays;
mod retention;
mod schedule;
mod scheduled;
mod unit;
mod waiting;
