//! The SQLite broker as its users meet it.

mod child;
mod conformance;
mod crash;
mod damage;
mod events;
mod files;
mod key_state;
mod leases;
mod outbox;
mod place;
mod processes;
mod retention;
mod schedule;
mod scheduled;
mod unit;
