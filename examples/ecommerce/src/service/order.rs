//! The order service: decides how each order ends, and says so once.
//!
//! ```text
//!   OrderCreated ───▶ open ──┬── NotificationSent (shipped) ──▶ shipped    ▶ OrderShipped
//!                            ├── InventoryShort ──────────────▶ cancelled  ▶ OrderCancelled
//!                            └── PaymentFailed ───────────────▶ cancelled  ▶ OrderCancelled
//! ```

use std::fmt;

use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus, OnError, RetryPolicy};
use serde::{Deserialize, Serialize};
use sqlx::types::Json;

use crate::database::{Database, Tables, Tx, handling, sql};
use crate::databases::Databases;
use crate::events::{
    CancelReason, InventoryShort, Notice, NotificationSent, OrderCancelled, OrderCreated, OrderId,
    OrderShipped, PaymentFailed,
};

const TABLES: Tables = Tables {
    sqlite: &["
        CREATE TABLE orders (
            order_id TEXT PRIMARY KEY,
            standing TEXT NOT NULL
        ) STRICT, WITHOUT ROWID"],
    postgres: &["
        CREATE TABLE orders (
            order_id text PRIMARY KEY,
            standing jsonb NOT NULL
        )"],
};

/// Where an order stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It is under way.
    Open,
    /// It was cancelled.
    Cancelled(CancelReason),
    /// It was shipped.
    Shipped,
}

/// An order that has ended is told to end once more: somebody has to look at it.
#[derive(Debug)]
pub struct Contradiction {
    order_id: OrderId,
    stands: Standing,
    told: Standing,
}

/// Opens the book of all orders.
///
/// # Errors
///
/// When the service's database cannot be opened.
pub async fn open(databases: &Databases) -> anyhow::Result<Database> {
    databases.open("order", &TABLES).await
}

/// Takes an order up, unless news of its end came first.
async fn created(order: OrderCreated, mut cx: Context<(), Database>) -> Result<(), BoxError> {
    let mut tx = handling(&order, &mut cx).await?;
    sql("INSERT INTO orders (order_id, standing) VALUES ($1, $2) ON CONFLICT DO NOTHING")
        .bind(order.order_id.to_string())
        .bind_json(&Standing::Open)
        .execute(&mut tx)
        .await?;
    Ok(())
}

async fn short(short: InventoryShort, mut cx: Context<(), Database>) -> Result<(), BoxError> {
    let mut tx = handling(&short, &mut cx).await?;
    let (order_id, reason) = (short.order_id, CancelReason::OutOfStock);
    end(&mut tx, order_id, Standing::Cancelled(reason)).await?;
    cx.publish(OrderCancelled {
        order_id,
        customer: short.customer,
        reason,
    })?;
    Ok(())
}

async fn unpaid(failed: PaymentFailed, mut cx: Context<(), Database>) -> Result<(), BoxError> {
    let mut tx = handling(&failed, &mut cx).await?;
    let (order_id, reason) = (failed.order_id, CancelReason::PaymentDeclined);
    end(&mut tx, order_id, Standing::Cancelled(reason)).await?;
    cx.publish(OrderCancelled {
        order_id,
        customer: failed.customer,
        reason,
    })?;
    Ok(())
}

/// That a customer knows of a cancellation changes nothing.
async fn told(sent: NotificationSent, mut cx: Context<(), Database>) -> Result<(), BoxError> {
    let mut tx = handling(&sent, &mut cx).await?;
    let order_id = sent.order_id;
    if sent.notice == Notice::Shipped {
        end(&mut tx, order_id, Standing::Shipped).await?;
        cx.publish(OrderShipped { order_id })?;
    }
    Ok(())
}

/// Ends an order, which ends once. Another event of the order may come at the same moment, on another
/// topic: the second finds what the first has written.
async fn end(tx: &mut Tx<'_>, order_id: OrderId, told: Standing) -> Result<(), BoxError> {
    let ended = sql("INSERT INTO orders (order_id, standing) VALUES ($1, $2)
         ON CONFLICT (order_id) DO UPDATE SET standing = $2 WHERE orders.standing = $3")
    .bind(order_id.to_string())
    .bind_json(&told)
    .bind_json(&Standing::Open)
    .execute(tx)
    .await?;
    if ended > 0 {
        return Ok(());
    }
    let (Json(stands),) = sql("SELECT standing FROM orders WHERE order_id = $1")
        .bind(order_id.to_string())
        .fetch_one(tx)
        .await?;
    Err(Contradiction {
        order_id,
        stands,
        told,
    }
    .into())
}

/// Wires the order service.
pub fn consumer(bus: &EventBus, database: Database) -> ConsumerBuilder<(), Database> {
    bus.consumer("order")
        .unit(database)
        .on(created)
        .on(short)
        .on(unpaid)
        .on(told)
        .retry(RetryPolicy::default().when(|_: &Contradiction| OnError::DeadLetter))
        .skip_others()
}

impl fmt::Display for Contradiction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "order {} stands as {:?} and is told to be {:?}: find out which is true before re-driving",
            self.order_id, self.stands, self.told
        )
    }
}

impl std::error::Error for Contradiction {}

#[cfg(test)]
mod tests;
