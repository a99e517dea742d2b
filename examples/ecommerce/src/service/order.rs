//! The order service: decides how each order ends, and says so once.
//!
//! ```text
//!   OrderCreated ───▶ open ──┬── NotificationSent (shipped) ──▶ shipped    ▶ OrderShipped
//!                            ├── InventoryShort ──────────────▶ cancelled  ▶ OrderCancelled
//!                            └── PaymentFailed ───────────────▶ cancelled  ▶ OrderCancelled
//! ```

use std::fmt;
use std::path::Path;

use eventbus::SqliteStore;
use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus, OnError, RetryPolicy};
use serde::{Deserialize, Serialize};
use sqlx::SqliteConnection;
use sqlx::types::Json;

use crate::database::{self, handling};
use crate::events::{
    CancelReason, InventoryShort, Notice, NotificationSent, OrderCancelled, OrderCreated, OrderId,
    OrderShipped, PaymentFailed,
};

const MIGRATIONS: &[&str] = &["
    CREATE TABLE orders (
        order_id TEXT PRIMARY KEY,
        standing TEXT NOT NULL
    ) STRICT, WITHOUT ROWID"];

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
pub async fn open(data: &Path) -> anyhow::Result<SqliteStore> {
    database::open(data, "order", MIGRATIONS).await
}

/// Takes an order up, unless news of its end came first.
async fn created(order: OrderCreated, mut cx: Context<(), SqliteStore>) -> Result<(), BoxError> {
    let tx = handling(&order, &mut cx).await?;
    if standing(tx, order.order_id).await?.is_none() {
        set_standing(tx, order.order_id, Standing::Open).await?;
    }
    Ok(())
}

async fn short(short: InventoryShort, mut cx: Context<(), SqliteStore>) -> Result<(), BoxError> {
    let tx = handling(&short, &mut cx).await?;
    let (order_id, reason) = (short.order_id, CancelReason::OutOfStock);
    end(tx, order_id, Standing::Cancelled(reason)).await?;
    cx.publish(OrderCancelled {
        order_id,
        customer: short.customer,
        reason,
    })?;
    Ok(())
}

async fn unpaid(failed: PaymentFailed, mut cx: Context<(), SqliteStore>) -> Result<(), BoxError> {
    let tx = handling(&failed, &mut cx).await?;
    let (order_id, reason) = (failed.order_id, CancelReason::PaymentDeclined);
    end(tx, order_id, Standing::Cancelled(reason)).await?;
    cx.publish(OrderCancelled {
        order_id,
        customer: failed.customer,
        reason,
    })?;
    Ok(())
}

/// That a customer knows of a cancellation changes nothing.
async fn told(sent: NotificationSent, mut cx: Context<(), SqliteStore>) -> Result<(), BoxError> {
    let tx = handling(&sent, &mut cx).await?;
    let order_id = sent.order_id;
    if sent.notice == Notice::Shipped {
        end(tx, order_id, Standing::Shipped).await?;
        cx.publish(OrderShipped { order_id })?;
    }
    Ok(())
}

/// Ends an order, which ends once.
async fn end(tx: &mut SqliteConnection, order_id: OrderId, told: Standing) -> Result<(), BoxError> {
    let stands = standing(tx, order_id).await?;
    let stands = stands.unwrap_or(Standing::Open);
    if stands != Standing::Open {
        let contradiction = Contradiction {
            order_id,
            stands,
            told,
        };
        return Err(contradiction.into());
    }
    set_standing(tx, order_id, told).await?;
    Ok(())
}

async fn standing(tx: &mut SqliteConnection, order_id: OrderId) -> sqlx::Result<Option<Standing>> {
    let found = sqlx::query_scalar("SELECT standing FROM orders WHERE order_id = ?")
        .bind(order_id.to_string())
        .fetch_optional(tx);
    Ok(found.await?.map(|Json(standing)| standing))
}

async fn set_standing(
    tx: &mut SqliteConnection,
    order_id: OrderId,
    standing: Standing,
) -> sqlx::Result<()> {
    sqlx::query("INSERT OR REPLACE INTO orders (order_id, standing) VALUES (?, ?)")
        .bind(order_id.to_string())
        .bind(Json(standing))
        .execute(tx)
        .await?;
    Ok(())
}

/// Wires the order service.
pub fn consumer(bus: &EventBus, store: SqliteStore) -> ConsumerBuilder<(), SqliteStore> {
    bus.consumer("order")
        .unit(store)
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
