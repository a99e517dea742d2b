//! The shared vocabulary: what the services tell each other, one file per topic.
//!
//! An event carries what the next step needs, so that no service asks another for data and no step
//! has to join events of two topics, between which there is no order.

use std::time::Duration;

use eventbus::prelude::{Event, TopicSpec};

mod inventory;
mod notification;
mod order;
mod payment;
mod shipping;

pub use inventory::{InventoryReleased, InventoryReserved, InventoryShort};
pub use notification::{Notice, NotificationSent};
pub use order::{
    CancelReason, Cents, Customer, Line, OrderCancelled, OrderCreated, OrderId, OrderShipped,
};
pub use payment::{PaymentFailed, PaymentProcessed};
pub use shipping::ShippingCreated;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Every topic of the shop with its partitions and how long it is kept: created or checked at start.
pub fn topics() -> Vec<TopicSpec> {
    let table = [
        (OrderCreated::TOPIC, 20, 365 * DAY),
        (InventoryReserved::TOPIC, 16, 7 * DAY),
        (PaymentProcessed::TOPIC, 12, 7 * 365 * DAY),
        (ShippingCreated::TOPIC, 8, 365 * DAY),
        (NotificationSent::TOPIC, 4, 30 * DAY),
    ];
    table
        .into_iter()
        .map(|(topic, partitions, retention)| {
            TopicSpec::new(topic)
                .with_partitions(partitions)
                .with_retention(retention)
        })
        .collect()
}
