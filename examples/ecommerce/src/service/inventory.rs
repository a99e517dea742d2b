//! The inventory service: sets stock aside for orders and puts it back when they are not paid.
//!
//! Stock is conserved: what there was in the beginning is on the shelf or set aside for an order.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus};
use serde::{Deserialize, Serialize};
use sqlx::types::Json;

use crate::events::{
    InventoryReleased, InventoryReserved, InventoryShort, Line, OrderCreated, OrderId,
    PaymentFailed,
};
use crate::store::{Store, Work};

const MIGRATIONS: &[&str] = &["
    CREATE TABLE shelf (
        product TEXT PRIMARY KEY,
        pieces  INTEGER NOT NULL CHECK (pieces >= 0)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE reservations (
        order_id    TEXT PRIMARY KEY,
        reservation TEXT NOT NULL
    ) STRICT, WITHOUT ROWID"];

/// The shelves, and what became of each order: asked again, the warehouse answers the same and
/// moves nothing.
#[derive(Clone, Debug)]
pub struct Warehouse(Store);

/// What the warehouse did for an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reservation {
    /// Everything is set aside.
    Held(Vec<Line>),
    /// This product was short, so nothing was set aside.
    Short(String),
    /// It was set aside once and is back on the shelf.
    Released(Vec<Line>),
}

/// Stock was to be put back that was never set aside.
#[derive(Debug)]
pub struct NothingHeld(OrderId);

impl Warehouse {
    /// The warehouse in the data directory; a product it does not know yet gets as many pieces on
    /// the shelf as `delivered` says.
    ///
    /// # Errors
    ///
    /// When the service's database cannot be opened.
    pub async fn open(data: &Path, delivered: &BTreeMap<String, u32>) -> anyhow::Result<Self> {
        let store = Store::open(data, "inventory", MIGRATIONS).await?;
        let mut work = store.begin().await?;
        for (product, pieces) in delivered {
            sqlx::query("INSERT INTO shelf (product, pieces) VALUES (?, ?) ON CONFLICT DO NOTHING")
                .bind(product)
                .bind(pieces)
                .execute(&mut *work)
                .await?;
        }
        work.commit().await?;
        Ok(Self(store))
    }

    /// What is on the shelves.
    pub async fn on_shelf(&self) -> anyhow::Result<BTreeMap<String, u32>> {
        let mut reader = self.0.reader().await;
        let shelf: Vec<(String, u32)> = sqlx::query_as("SELECT product, pieces FROM shelf")
            .fetch_all(&mut *reader)
            .await?;
        Ok(shelf.into_iter().collect())
    }

    /// What is set aside, over all orders.
    pub async fn set_aside(&self) -> anyhow::Result<BTreeMap<String, u32>> {
        let mut reader = self.0.reader().await;
        let reservations: Vec<Json<Reservation>> =
            sqlx::query_scalar("SELECT reservation FROM reservations")
                .fetch_all(&mut *reader)
                .await?;
        let mut pieces = BTreeMap::new();
        for Json(reservation) in reservations {
            if let Reservation::Held(lines) = reservation {
                add(&mut pieces, &lines);
            }
        }
        Ok(pieces)
    }

    /// Sets everything aside or nothing, once per order.
    async fn reserve(
        &self,
        order: &OrderCreated,
        cx: &Context<Self>,
    ) -> anyhow::Result<Reservation> {
        let mut work = self.0.handling(order, cx).await?;
        let reservation = match find(&mut work, order.order_id).await? {
            Some(before) => before,
            None => {
                let reservation = take(&mut work, &order.lines).await?;
                keep(&mut work, order.order_id, &reservation).await?;
                reservation
            }
        };
        work.commit().await?;
        Ok(reservation)
    }

    /// Puts back what is set aside for an order, once.
    async fn release(
        &self,
        failed: &PaymentFailed,
        cx: &Context<Self>,
    ) -> Result<Vec<Line>, BoxError> {
        let mut work = self.0.handling(failed, cx).await?;
        let lines = match find(&mut work, failed.order_id).await? {
            Some(Reservation::Held(lines)) => {
                put(&mut work, &lines).await?;
                let released = Reservation::Released(lines.clone());
                keep(&mut work, failed.order_id, &released).await?;
                lines
            }
            Some(Reservation::Released(lines)) => lines,
            Some(Reservation::Short(_)) | None => return Err(NothingHeld(failed.order_id).into()),
        };
        work.commit().await?;
        Ok(lines)
    }
}

/// What was done for an order before.
async fn find(work: &mut Work, order_id: OrderId) -> sqlx::Result<Option<Reservation>> {
    let found = sqlx::query_scalar("SELECT reservation FROM reservations WHERE order_id = ?")
        .bind(order_id.to_string())
        .fetch_optional(&mut **work);
    Ok(found.await?.map(|Json(reservation)| reservation))
}

async fn keep(work: &mut Work, order_id: OrderId, reservation: &Reservation) -> sqlx::Result<()> {
    sqlx::query("INSERT OR REPLACE INTO reservations (order_id, reservation) VALUES (?, ?)")
        .bind(order_id.to_string())
        .bind(Json(reservation))
        .execute(&mut **work)
        .await?;
    Ok(())
}

/// Takes everything from the shelves, or nothing when a product is short.
async fn take(work: &mut Work, lines: &[Line]) -> sqlx::Result<Reservation> {
    let mut wanted = BTreeMap::new();
    add(&mut wanted, lines);
    for (product, quantity) in &wanted {
        let there: Option<u32> = sqlx::query_scalar("SELECT pieces FROM shelf WHERE product = ?")
            .bind(product)
            .fetch_optional(&mut **work)
            .await?;
        if there.unwrap_or(0) < *quantity {
            return Ok(Reservation::Short(product.clone()));
        }
    }
    for (product, quantity) in &wanted {
        sqlx::query("UPDATE shelf SET pieces = pieces - ? WHERE product = ?")
            .bind(quantity)
            .bind(product)
            .execute(&mut **work)
            .await?;
    }
    Ok(Reservation::Held(lines.to_vec()))
}

/// Puts everything on the shelves.
async fn put(work: &mut Work, lines: &[Line]) -> sqlx::Result<()> {
    for line in lines {
        sqlx::query("UPDATE shelf SET pieces = pieces + ? WHERE product = ?")
            .bind(line.quantity)
            .bind(&line.product)
            .execute(&mut **work)
            .await?;
    }
    Ok(())
}

fn add(pieces: &mut BTreeMap<String, u32>, lines: &[Line]) {
    for line in lines {
        *pieces.entry(line.product.clone()).or_default() += line.quantity;
    }
}

async fn reserve(order: OrderCreated, cx: Context<Warehouse>) -> Result<(), BoxError> {
    match cx.state().reserve(&order, &cx).await? {
        Reservation::Held(lines) | Reservation::Released(lines) => {
            cx.publish(InventoryReserved {
                order_id: order.order_id,
                customer: order.customer,
                lines,
                total: order.total,
                card: order.card,
            })?;
        }
        Reservation::Short(product) => {
            cx.publish(InventoryShort {
                order_id: order.order_id,
                customer: order.customer,
                product,
            })?;
        }
    }
    Ok(())
}

async fn put_back(failed: PaymentFailed, cx: Context<Warehouse>) -> Result<(), BoxError> {
    let lines = cx.state().release(&failed, &cx).await?;
    let order_id = failed.order_id;
    cx.publish(InventoryReleased { order_id, lines })?;
    Ok(())
}

/// Wires the inventory service.
pub fn consumer(bus: &EventBus, warehouse: Warehouse) -> ConsumerBuilder<Warehouse> {
    bus.consumer("inventory")
        .state(warehouse)
        .on(reserve)
        .on(put_back)
        .skip_others()
}

impl fmt::Display for NothingHeld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nothing is set aside for order {}", self.0)
    }
}

impl std::error::Error for NothingHeld {}

#[cfg(test)]
mod tests;
