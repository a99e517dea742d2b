//! The notification service: tells the customer the one outcome of each order, by mail.

use std::sync::Arc;

use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus};

use crate::client::mailer::{Mail, Mailer};
use crate::client::provider_retries;
use crate::events::{Notice, NotificationSent, OrderCancelled, ShippingCreated};

/// The provider that sends the mails.
#[derive(Clone)]
pub struct Notifications(Arc<dyn Mailer>);

impl Notifications {
    /// Notifications through `mailer`.
    pub fn new(mailer: impl Mailer) -> Self {
        Self(Arc::new(mailer))
    }
}

async fn shipped(parcel: ShippingCreated, cx: Context<Notifications>) -> Result<(), BoxError> {
    let mail = Mail {
        order_id: parcel.order_id,
        to: parcel.customer.email,
        subject: "Your order is on its way".to_owned(),
        text: format!(
            "Dear {},\nyour parcel {} is on its way.",
            parcel.customer.name, parcel.tracking
        ),
    };
    tell(mail, Notice::Shipped, cx).await
}

async fn cancelled(order: OrderCancelled, cx: Context<Notifications>) -> Result<(), BoxError> {
    let mail = Mail {
        order_id: order.order_id,
        to: order.customer.email,
        subject: "Your order was cancelled".to_owned(),
        text: format!(
            "Dear {},\nwe had to cancel your order: {}. You were not charged.",
            order.customer.name, order.reason
        ),
    };
    tell(mail, Notice::Cancelled, cx).await
}

async fn tell(mail: Mail, notice: Notice, cx: Context<Notifications>) -> Result<(), BoxError> {
    cx.state().0.send(&mail, &cx.idempotency_key()).await?;
    cx.publish(NotificationSent {
        order_id: mail.order_id,
        notice,
        email: mail.to,
    })?;
    Ok(())
}

/// Wires the notification service.
pub fn consumer(bus: &EventBus, notifications: Notifications) -> ConsumerBuilder<Notifications> {
    bus.consumer("notification")
        .state(notifications)
        .on(shipped)
        .on(cancelled)
        .retry(provider_retries())
        .skip_others()
}

#[cfg(test)]
mod tests;
