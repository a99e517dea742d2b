//! `order-events`: an order from its creation to its one end, and the words all events share.

use std::fmt;

use eventbus::prelude::Event;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The number of an order; the key of every event of the shop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OrderId(pub Uuid);

impl fmt::Display for OrderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An amount of money in cents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cents(pub u64);

impl fmt::Display for Cents {
    /// As people write it: `1234.05`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}.{:02}", self.0 / 100, self.0 % 100))
    }
}

impl std::iter::Sum for Cents {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        Self(amounts.map(|amount| amount.0).sum())
    }
}

/// Who ordered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Customer {
    /// How the customer is addressed.
    pub name: String,
    /// Where mails about the order go.
    pub email: String,
}

/// So many pieces of one product.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// The product's id in the catalogue.
    pub product: String,
    /// How many pieces.
    pub quantity: u32,
}

/// A customer placed an order and the gateway accepted it.
#[derive(Clone, Debug, PartialEq, Eq, Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", key = "order_id")]
pub struct OrderCreated {
    /// The order.
    pub order_id: OrderId,
    /// Who ordered.
    pub customer: Customer,
    /// What was ordered, each product once.
    pub lines: Vec<Line>,
    /// What it costs.
    pub total: Cents,
    /// The card as the payment provider knows it: a token, never a card number.
    pub card: String,
}

/// Why an order came to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CancelReason {
    /// There was not enough stock.
    OutOfStock,
    /// The payment provider declined the card.
    PaymentDeclined,
}

impl fmt::Display for CancelReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfStock => "a product is out of stock",
            Self::PaymentDeclined => "the card was declined",
        })
    }
}

/// The order came to nothing: one of its two ends.
#[derive(Clone, Debug, PartialEq, Eq, Event, Serialize, Deserialize)]
#[event(type = "OrderCancelled", topic = "order-events", key = "order_id")]
pub struct OrderCancelled {
    /// The order.
    pub order_id: OrderId,
    /// Who ordered.
    pub customer: Customer,
    /// Why.
    pub reason: CancelReason,
}

/// The parcel is on its way and the customer knows: the other end.
#[derive(Clone, Debug, PartialEq, Eq, Event, Serialize, Deserialize)]
#[event(type = "OrderShipped", topic = "order-events", key = "order_id")]
pub struct OrderShipped {
    /// The order.
    pub order_id: OrderId,
}
