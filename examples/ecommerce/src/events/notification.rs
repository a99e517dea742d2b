//! `notification-events`: what customers were told.

use eventbus::prelude::Event;
use serde::{Deserialize, Serialize};

use super::order::OrderId;

/// What a customer is told about an order: its one outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// The parcel is on its way.
    Shipped,
    /// The order came to nothing.
    Cancelled,
}

/// The customer was told.
#[derive(Clone, Debug, PartialEq, Eq, Event, Serialize, Deserialize)]
#[event(
    type = "NotificationSent",
    topic = "notification-events",
    key = "order_id"
)]
pub struct NotificationSent {
    /// The order.
    pub order_id: OrderId,
    /// What the customer was told.
    pub notice: Notice,
    /// Where the mail went.
    pub email: String,
}
