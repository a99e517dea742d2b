//! The shipping service: one parcel, one label per paid order.

use std::path::Path;

use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus};

use crate::events::{PaymentProcessed, ShippingCreated};
use crate::store::Store;

const MIGRATIONS: &[&str] = &["
    CREATE TABLE labels (
        number   INTEGER PRIMARY KEY,
        order_id TEXT NOT NULL UNIQUE
    ) STRICT"];

/// The labels printed so far.
#[derive(Clone, Debug)]
pub struct Labels(Store);

impl Labels {
    /// The labels in the data directory.
    ///
    /// # Errors
    ///
    /// When the service's database cannot be opened.
    pub async fn open(data: &Path) -> anyhow::Result<Self> {
        Ok(Self(Store::open(data, "shipping", MIGRATIONS).await?))
    }

    /// The order's label, printed when it is asked for first.
    async fn print(&self, paid: &PaymentProcessed, cx: &Context<Self>) -> anyhow::Result<String> {
        let order_id = paid.order_id.to_string();
        let mut work = self.0.handling(paid, cx).await?;
        sqlx::query("INSERT INTO labels (order_id) VALUES (?) ON CONFLICT DO NOTHING")
            .bind(&order_id)
            .execute(&mut *work)
            .await?;
        let number: i64 = sqlx::query_scalar("SELECT number FROM labels WHERE order_id = ?")
            .bind(&order_id)
            .fetch_one(&mut *work)
            .await?;
        work.commit().await?;
        Ok(format!("PX{number:09}"))
    }
}

async fn pack(paid: PaymentProcessed, cx: Context<Labels>) -> Result<(), BoxError> {
    let tracking = cx.state().print(&paid, &cx).await?;
    cx.publish(ShippingCreated {
        order_id: paid.order_id,
        customer: paid.customer,
        tracking,
    })?;
    Ok(())
}

/// Wires the shipping service.
pub fn consumer(bus: &EventBus, labels: Labels) -> ConsumerBuilder<Labels> {
    bus.consumer("shipping")
        .state(labels)
        .on(pack)
        .skip_others()
}

#[cfg(test)]
mod tests;
