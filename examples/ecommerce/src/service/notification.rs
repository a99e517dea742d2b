//! The notification service: tells the customer the one outcome of each order, by mail.

use std::path::Path;
use std::sync::Arc;

use eventbus::prelude::{BoxError, ConsumerBuilder, Context, Event, EventBus};
use sqlx::types::Json;

use crate::client::mailer::{Mail, Mailer};
use crate::client::provider_retries;
use crate::events::{Notice, NotificationSent, OrderCancelled, ShippingCreated};
use crate::store::Store;

const MIGRATIONS: &[&str] = &["
    CREATE TABLE mails (
        order_id TEXT NOT NULL,
        notice   TEXT NOT NULL,
        email    TEXT NOT NULL,
        PRIMARY KEY (order_id, notice)
    ) STRICT, WITHOUT ROWID"];

/// The provider that sends the mails, and what was sent.
#[derive(Clone)]
pub struct Notifications {
    mailer: Arc<dyn Mailer>,
    sent: Store,
}

impl Notifications {
    /// Notifications through `mailer`, noted in the data directory.
    ///
    /// # Errors
    ///
    /// When the service's database cannot be opened.
    pub async fn open(data: &Path, mailer: impl Mailer) -> anyhow::Result<Self> {
        Ok(Self {
            mailer: Arc::new(mailer),
            sent: Store::open(data, "notification", MIGRATIONS).await?,
        })
    }

    /// Notes that a mail went out, once.
    async fn note<E: Event + Sync>(
        &self,
        event: &E,
        cx: &Context<Self>,
        sent: &NotificationSent,
    ) -> anyhow::Result<()> {
        let mut work = self.sent.handling(event, cx).await?;
        sqlx::query(
            "INSERT INTO mails (order_id, notice, email) VALUES (?, ?, ?) \
             ON CONFLICT DO NOTHING",
        )
        .bind(sent.order_id.to_string())
        .bind(Json(sent.notice))
        .bind(&sent.email)
        .execute(&mut *work)
        .await?;
        work.commit().await
    }
}

async fn shipped(parcel: ShippingCreated, cx: Context<Notifications>) -> Result<(), BoxError> {
    let mail = Mail {
        order_id: parcel.order_id,
        to: parcel.customer.email.clone(),
        subject: "Your order is on its way".to_owned(),
        text: format!(
            "Dear {},\nyour parcel {} is on its way.",
            parcel.customer.name, parcel.tracking
        ),
    };
    tell(&parcel, mail, Notice::Shipped, cx).await
}

async fn cancelled(order: OrderCancelled, cx: Context<Notifications>) -> Result<(), BoxError> {
    let mail = Mail {
        order_id: order.order_id,
        to: order.customer.email.clone(),
        subject: "Your order was cancelled".to_owned(),
        text: format!(
            "Dear {},\nwe had to cancel your order: {}. You were not charged.",
            order.customer.name, order.reason
        ),
    };
    tell(&order, mail, Notice::Cancelled, cx).await
}

/// No transaction is open while the mailer is asked; asked again under the same key, it sends
/// nothing.
async fn tell<E: Event + Sync>(
    event: &E,
    mail: Mail,
    notice: Notice,
    cx: Context<Notifications>,
) -> Result<(), BoxError> {
    let notifications = cx.state();
    let key = cx.idempotency_key();
    notifications.mailer.send(&mail, &key).await?;
    let sent = NotificationSent {
        order_id: mail.order_id,
        notice,
        email: mail.to,
    };
    notifications.note(event, &cx, &sent).await?;
    cx.publish(sent)?;
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
