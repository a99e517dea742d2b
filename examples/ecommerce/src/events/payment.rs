//! `payment-events`: what the payment provider took or declined.

use eventbus::prelude::Event;
use serde::{Deserialize, Serialize};

use super::order::{Cents, Customer, Line, OrderId};

/// The money is ours; the parcel can be packed.
#[derive(Clone, Debug, PartialEq, Eq, Event, Serialize, Deserialize)]
#[event(type = "PaymentProcessed", topic = "payment-events", key = "order_id")]
pub struct PaymentProcessed {
    /// The order.
    pub order_id: OrderId,
    /// Who paid.
    pub customer: Customer,
    /// What was paid for.
    pub lines: Vec<Line>,
    /// How much was taken.
    pub amount: Cents,
    /// The charge, as the payment provider calls it.
    pub charge_id: String,
}

/// The payment provider declined the card; nothing was taken.
#[derive(Clone, Debug, PartialEq, Eq, Event, Serialize, Deserialize)]
#[event(type = "PaymentFailed", topic = "payment-events", key = "order_id")]
pub struct PaymentFailed {
    /// The order.
    pub order_id: OrderId,
    /// Who could not pay.
    pub customer: Customer,
    /// What the provider said.
    pub reason: String,
}
