//! The SQLite broker as its users meet it.

mod child;
mod conformance;
mod damage;
mod files;
mod key_state;
mod place;
mod processes;
mod retention;
mod schedule;
mod scheduled;
