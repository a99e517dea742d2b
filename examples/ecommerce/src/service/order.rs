//! The order service: decides how each order ends, and says so once.
//!
//! ```text
//!   OrderCreated ───▶ open ──┬── NotificationSent (shipped) ──▶ shipped    ▶ OrderShipped
//!                            ├── InventoryShort ──────────────▶ cancelled  ▶ OrderCancelled
//!                            └── PaymentFailed ───────────────▶ cancelled  ▶ OrderCancelled
//! ```

use std::fmt;
use std::path::Path;

use eventbus::prelude::{
    BoxError, ConsumerBuilder, Context, Event, EventBus, OnError, RetryPolicy,
};
use serde::{Deserialize, Serialize};
use sqlx::types::Json;

use crate::events::{
    CancelReason, InventoryShort, Notice, NotificationSent, OrderCancelled, OrderCreated, OrderId,
    OrderShipped, PaymentFailed,
};
use crate::store::{Store, Work};

const MIGRATIONS: &[&str] = &["
    CREATE TABLE orders (
        order_id TEXT PRIMARY KEY,
        standing TEXT NOT NULL
    ) STRICT, WITHOUT ROWID"];

/// All orders.
#[derive(Clone, Debug)]
pub struct Orders(Store);

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

/// An order that ended in one way is told to end in another: somebody has to look at it.
#[derive(Debug)]
pub struct Contradiction {
    order_id: OrderId,
    stands: Standing,
    told: Standing,
}

impl Orders {
    /// The orders in the data directory.
    ///
    /// # Errors
    ///
    /// When the service's database cannot be opened.
    pub async fn open(data: &Path) -> anyhow::Result<Self> {
        Ok(Self(Store::open(data, "order", MIGRATIONS).await?))
    }

    /// Takes an order up, unless it is known: news of its end may have come first.
    async fn take_up(&self, order: &OrderCreated, cx: &Context<Self>) -> Result<(), BoxError> {
        let mut work = self.0.handling(order, cx).await?;
        if standing(&mut work, order.order_id).await?.is_none() {
            set_standing(&mut work, order.order_id, Standing::Open).await?;
        }
        work.commit().await?;
        Ok(())
    }

    /// Notes that a customer knows of a cancellation, which changes nothing.
    async fn note(&self, sent: &NotificationSent, cx: &Context<Self>) -> Result<(), BoxError> {
        self.0.handling(sent, cx).await?.commit().await?;
        Ok(())
    }

    /// Ends an order as `news` tells; ending it again in the same way changes nothing.
    async fn end<E: Event + Sync>(
        &self,
        news: &E,
        cx: &Context<Self>,
        order_id: OrderId,
        told: Standing,
    ) -> Result<(), BoxError> {
        let mut work = self.0.handling(news, cx).await?;
        let stands = standing(&mut work, order_id).await?;
        let stands = stands.unwrap_or(Standing::Open);
        if stands != Standing::Open && stands != told {
            let contradiction = Contradiction {
                order_id,
                stands,
                told,
            };
            return Err(contradiction.into());
        }
        set_standing(&mut work, order_id, told).await?;
        work.commit().await?;
        Ok(())
    }
}

async fn standing(work: &mut Work, order_id: OrderId) -> sqlx::Result<Option<Standing>> {
    let found = sqlx::query_scalar("SELECT standing FROM orders WHERE order_id = ?")
        .bind(order_id.to_string())
        .fetch_optional(&mut **work);
    Ok(found.await?.map(|Json(standing)| standing))
}

async fn set_standing(work: &mut Work, order_id: OrderId, standing: Standing) -> sqlx::Result<()> {
    sqlx::query("INSERT OR REPLACE INTO orders (order_id, standing) VALUES (?, ?)")
        .bind(order_id.to_string())
        .bind(Json(standing))
        .execute(&mut **work)
        .await?;
    Ok(())
}

async fn created(order: OrderCreated, cx: Context<Orders>) -> Result<(), BoxError> {
    cx.state().take_up(&order, &cx).await
}

async fn short(short: InventoryShort, cx: Context<Orders>) -> Result<(), BoxError> {
    let (order_id, reason) = (short.order_id, CancelReason::OutOfStock);
    let end = Standing::Cancelled(reason);
    cx.state().end(&short, &cx, order_id, end).await?;
    cx.publish(OrderCancelled {
        order_id,
        customer: short.customer,
        reason,
    })?;
    Ok(())
}

async fn unpaid(failed: PaymentFailed, cx: Context<Orders>) -> Result<(), BoxError> {
    let (order_id, reason) = (failed.order_id, CancelReason::PaymentDeclined);
    let end = Standing::Cancelled(reason);
    cx.state().end(&failed, &cx, order_id, end).await?;
    cx.publish(OrderCancelled {
        order_id,
        customer: failed.customer,
        reason,
    })?;
    Ok(())
}

async fn told(sent: NotificationSent, cx: Context<Orders>) -> Result<(), BoxError> {
    let order_id = sent.order_id;
    match sent.notice {
        Notice::Shipped => {
            let end = Standing::Shipped;
            cx.state().end(&sent, &cx, order_id, end).await?;
            cx.publish(OrderShipped { order_id })?;
        }
        Notice::Cancelled => cx.state().note(&sent, &cx).await?,
    }
    Ok(())
}

/// Wires the order service.
pub fn consumer(bus: &EventBus, orders: Orders) -> ConsumerBuilder<Orders> {
    bus.consumer("order")
        .state(orders)
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
