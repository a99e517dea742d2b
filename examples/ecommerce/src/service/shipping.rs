//! The shipping service: one parcel, one label per paid order.

use std::path::Path;

use eventbus::SqliteStore;
use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus};

use crate::database::{self, handling};
use crate::events::{PaymentProcessed, ShippingCreated};

const MIGRATIONS: &[&str] = &["
    CREATE TABLE labels (
        number   INTEGER PRIMARY KEY,
        order_id TEXT NOT NULL UNIQUE
    ) STRICT"];

/// Opens the labels printed so far.
///
/// # Errors
///
/// When the service's database cannot be opened.
pub async fn open(data: &Path) -> anyhow::Result<SqliteStore> {
    database::open(data, "shipping", MIGRATIONS).await
}

async fn pack(paid: PaymentProcessed, mut cx: Context<(), SqliteStore>) -> Result<(), BoxError> {
    let label = "INSERT INTO labels (order_id) VALUES (?) RETURNING number";
    let number: i64 = sqlx::query_scalar(label)
        .bind(paid.order_id.to_string())
        .fetch_one(handling(&paid, &mut cx).await?)
        .await?;
    cx.publish(ShippingCreated {
        order_id: paid.order_id,
        customer: paid.customer,
        tracking: format!("PX{number:09}"),
    })?;
    Ok(())
}

/// Wires the shipping service.
pub fn consumer(bus: &EventBus, store: SqliteStore) -> ConsumerBuilder<(), SqliteStore> {
    bus.consumer("shipping").unit(store).on(pack).skip_others()
}

#[cfg(test)]
mod tests;
