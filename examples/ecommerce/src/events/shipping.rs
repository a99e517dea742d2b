//! `shipping-events`: parcels.

use eventbus::prelude::Event;
use serde::{Deserialize, Serialize};

use super::order::{Customer, OrderId};

/// The parcel is packed and has a label.
#[derive(Clone, Debug, PartialEq, Eq, Event, Serialize, Deserialize)]
#[event(type = "ShippingCreated", topic = "shipping-events", key = "order_id")]
pub struct ShippingCreated {
    /// The order.
    pub order_id: OrderId,
    /// Who gets the parcel.
    pub customer: Customer,
    /// The number on the label.
    pub tracking: String,
}
