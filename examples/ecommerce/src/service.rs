//! The services: each a state, handlers, and one `consumer` that wires them to the bus.

pub mod gateway;
pub mod inventory;
pub mod notification;
pub mod order;
pub mod payment;
pub mod shipping;

#[cfg(test)]
pub mod sample;

#[cfg(test)]
mod tests;
