//! The PostgreSQL broker as its users meet it, on a real server.

mod conformance;
mod faults;
mod key_state;
mod leases;
mod order;
mod processes;
mod proxy;
mod retention;
mod schema;
mod server;
