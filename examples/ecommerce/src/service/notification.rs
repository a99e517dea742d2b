//! The notification service: tells the customer the one outcome of each order, by mail.

use std::sync::Arc;

use eventbus::prelude::{BoxError, ConsumerBuilder, Context, Event, EventBus};

use crate::client::mailer::{Mail, Mailer};
use crate::client::provider_retries;
use crate::database::{Database, Tables, handling, sql};
use crate::databases::Databases;
use crate::events::{Notice, NotificationSent, OrderCancelled, ShippingCreated};

const TABLES: Tables = Tables {
    sqlite: &["
        CREATE TABLE mails (
            order_id TEXT NOT NULL,
            notice   TEXT NOT NULL,
            email    TEXT NOT NULL,
            PRIMARY KEY (order_id, notice)
        ) STRICT, WITHOUT ROWID"],
    postgres: &["
        CREATE TABLE mails (
            order_id text NOT NULL,
            notice   jsonb NOT NULL,
            email    text NOT NULL,
            PRIMARY KEY (order_id, notice)
        )"],
};

/// Opens the list of what was sent.
///
/// # Errors
///
/// When the service's database cannot be opened.
pub async fn open(databases: &Databases) -> anyhow::Result<Database> {
    databases.open("notification", &TABLES).await
}

async fn shipped(
    parcel: ShippingCreated,
    cx: Context<Arc<dyn Mailer>, Database>,
) -> Result<(), BoxError> {
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

async fn cancelled(
    order: OrderCancelled,
    cx: Context<Arc<dyn Mailer>, Database>,
) -> Result<(), BoxError> {
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

/// No transaction is open while the mailer is asked. Asked again under the same key, after a crash,
/// it sends nothing.
async fn tell<E: Event + Sync>(
    event: &E,
    mail: Mail,
    notice: Notice,
    mut cx: Context<Arc<dyn Mailer>, Database>,
) -> Result<(), BoxError> {
    let key = cx.idempotency_key();
    cx.state().send(&mail, &key).await?;
    let mut tx = handling(event, &mut cx).await?;
    sql("INSERT INTO mails (order_id, notice, email) VALUES ($1, $2, $3)")
        .bind(mail.order_id.to_string())
        .bind_json(&notice)
        .bind(&*mail.to)
        .execute(&mut tx)
        .await?;
    cx.publish(NotificationSent {
        order_id: mail.order_id,
        notice,
        email: mail.to,
    })?;
    Ok(())
}

/// Wires the notification service, which sends through `mailer`.
pub fn consumer(
    bus: &EventBus,
    database: Database,
    mailer: Arc<dyn Mailer>,
) -> ConsumerBuilder<Arc<dyn Mailer>, Database> {
    bus.consumer("notification")
        .state(mailer)
        .unit(database)
        .on(shipped)
        .on(cancelled)
        .retry(provider_retries())
        .skip_others()
}

#[cfg(test)]
mod tests;
