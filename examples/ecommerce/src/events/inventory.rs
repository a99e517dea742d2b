//! `inventory-events`: what the warehouse set aside, could not set aside, and put back.

use eventbus::prelude::Event;
use serde::{Deserialize, Serialize};

use super::order::{Cents, Customer, Line, OrderId};

/// Everything the order asks for is set aside; it can be paid.
#[derive(Clone, Debug, PartialEq, Eq, Event, Serialize, Deserialize)]
#[event(
    type = "InventoryReserved",
    topic = "inventory-events",
    key = "order_id"
)]
pub struct InventoryReserved {
    /// The order.
    pub order_id: OrderId,
    /// Who ordered.
    pub customer: Customer,
    /// What is set aside.
    pub lines: Vec<Line>,
    /// What it costs.
    pub total: Cents,
    /// The card to charge.
    pub card: String,
}

/// Something the order asks for is not there; nothing was set aside.
#[derive(Clone, Debug, PartialEq, Eq, Event, Serialize, Deserialize)]
#[event(type = "InventoryShort", topic = "inventory-events", key = "order_id")]
pub struct InventoryShort {
    /// The order.
    pub order_id: OrderId,
    /// Who ordered.
    pub customer: Customer,
    /// The product that is short.
    pub product: String,
}

/// What was set aside for the order is back on the shelf.
#[derive(Clone, Debug, PartialEq, Eq, Event, Serialize, Deserialize)]
#[event(
    type = "InventoryReleased",
    topic = "inventory-events",
    key = "order_id"
)]
pub struct InventoryReleased {
    /// The order.
    pub order_id: OrderId,
    /// What was put back.
    pub lines: Vec<Line>,
}
