//! What of the testkit needs a machine: sockets.

mod faults;
mod simulation;
mod wrong_broker;
mod proxy;
