//! The shipping service: one parcel, one label per paid order.

use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus};

use crate::database::{Database, Tables, handling, sql};
use crate::databases::Databases;
use crate::events::{PaymentProcessed, ShippingCreated};

const TABLES: Tables = Tables {
    sqlite: &["
        CREATE TABLE labels (
            number   INTEGER PRIMARY KEY,
            order_id TEXT NOT NULL UNIQUE
        ) STRICT"],
    postgres: &["
        CREATE TABLE labels (
            number   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            order_id text NOT NULL UNIQUE
        )"],
};

/// Opens the labels printed so far.
///
/// # Errors
///
/// When the service's database cannot be opened.
pub async fn open(databases: &Databases) -> anyhow::Result<Database> {
    databases.open("shipping", &TABLES).await
}

async fn pack(paid: PaymentProcessed, mut cx: Context<(), Database>) -> Result<(), BoxError> {
    let mut tx = handling(&paid, &mut cx).await?;
    let (number,): (i64,) = sql("INSERT INTO labels (order_id) VALUES ($1) RETURNING number")
        .bind(paid.order_id.to_string())
        .returning(&mut tx)
        .await?;
    cx.publish(ShippingCreated {
        order_id: paid.order_id,
        customer: paid.customer,
        tracking: format!("PX{number:09}"),
    })?;
    Ok(())
}

/// Wires the shipping service.
pub fn consumer(bus: &EventBus, database: Database) -> ConsumerBuilder<(), Database> {
    bus.consumer("shipping")
        .unit(database)
        .on(pack)
        .skip_others()
}

#[cfg(test)]
mod tests;
