//! The inventory service: sets stock aside for orders and puts it back when they are not paid.
//!
//! Stock is conserved: what there was in the beginning is on the shelf or set aside for an order.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use eventbus::SqliteStore;
use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus, Origin};
use serde::{Deserialize, Serialize};
use sqlx::SqliteConnection;
use sqlx::types::Json;

use crate::database::{self, handling};
use crate::events::{
    InventoryReleased, InventoryReserved, InventoryShort, Line, OrderCreated, OrderId,
    PaymentFailed,
};

const MIGRATIONS: &[&str] = &["
    CREATE TABLE shelf (
        product TEXT PRIMARY KEY,
        pieces  INTEGER NOT NULL CHECK (pieces >= 0)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE reservations (
        order_id    TEXT PRIMARY KEY,
        reservation TEXT NOT NULL
    ) STRICT, WITHOUT ROWID"];

/// The shelves, and what is set aside for each order.
#[derive(Clone, Debug)]
pub struct Warehouse(SqliteStore);

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

/// Stock was to be put back that is not set aside.
#[derive(Debug)]
pub struct NothingHeld(OrderId);

impl Warehouse {
    /// The warehouse in the data directory.
    ///
    /// # Errors
    ///
    /// When the service's database cannot be opened.
    pub async fn open(data: &Path) -> anyhow::Result<Self> {
        Ok(Self(database::open(data, "inventory", MIGRATIONS).await?))
    }

    /// What it keeps its data in.
    pub fn store(&self) -> &SqliteStore {
        &self.0
    }

    /// Puts on the shelf what was delivered of products that the warehouse does not know yet.
    ///
    /// # Errors
    ///
    /// When the service's database cannot be written.
    pub async fn deliver(
        &self,
        bus: &EventBus,
        delivered: &BTreeMap<String, u32>,
    ) -> anyhow::Result<()> {
        let mut tx = self.0.outbox(bus).begin(Origin::new()).await?;
        for (product, pieces) in delivered {
            sqlx::query("INSERT INTO shelf (product, pieces) VALUES (?, ?) ON CONFLICT DO NOTHING")
                .bind(product)
                .bind(pieces)
                .execute(&mut *tx)
                .await?;
        }
        tx.commit().await?;
        Ok(())
    }

    /// What is on the shelves.
    pub async fn on_shelf(&self) -> anyhow::Result<BTreeMap<String, u32>> {
        let shelf: Vec<(String, u32)> = sqlx::query_as("SELECT product, pieces FROM shelf")
            .fetch_all(self.0.readers())
            .await?;
        Ok(shelf.into_iter().collect())
    }

    /// What is set aside, over all orders.
    pub async fn set_aside(&self) -> anyhow::Result<BTreeMap<String, u32>> {
        let reservations: Vec<Json<Reservation>> =
            sqlx::query_scalar("SELECT reservation FROM reservations")
                .fetch_all(self.0.readers())
                .await?;
        let mut pieces = BTreeMap::new();
        for Json(reservation) in reservations {
            if let Reservation::Held(lines) = reservation {
                add(&mut pieces, &lines);
            }
        }
        Ok(pieces)
    }
}

/// What was done for an order.
async fn find(tx: &mut SqliteConnection, order_id: OrderId) -> sqlx::Result<Option<Reservation>> {
    let found = sqlx::query_scalar("SELECT reservation FROM reservations WHERE order_id = ?")
        .bind(order_id.to_string())
        .fetch_optional(&mut *tx);
    Ok(found.await?.map(|Json(reservation)| reservation))
}

async fn keep(
    tx: &mut SqliteConnection,
    order_id: OrderId,
    reservation: &Reservation,
) -> sqlx::Result<()> {
    sqlx::query("INSERT OR REPLACE INTO reservations (order_id, reservation) VALUES (?, ?)")
        .bind(order_id.to_string())
        .bind(Json(reservation))
        .execute(&mut *tx)
        .await?;
    Ok(())
}

/// Takes everything from the shelves, or nothing when a product is short: which one.
async fn take(tx: &mut SqliteConnection, lines: &[Line]) -> sqlx::Result<Option<String>> {
    let mut wanted = BTreeMap::new();
    add(&mut wanted, lines);
    for (product, quantity) in &wanted {
        let there: Option<u32> = sqlx::query_scalar("SELECT pieces FROM shelf WHERE product = ?")
            .bind(product)
            .fetch_optional(&mut *tx)
            .await?;
        if there.unwrap_or(0) < *quantity {
            return Ok(Some(product.clone()));
        }
    }
    for (product, quantity) in &wanted {
        sqlx::query("UPDATE shelf SET pieces = pieces - ? WHERE product = ?")
            .bind(quantity)
            .bind(product)
            .execute(&mut *tx)
            .await?;
    }
    Ok(None)
}

/// Puts everything on the shelves.
async fn put(tx: &mut SqliteConnection, lines: &[Line]) -> sqlx::Result<()> {
    for line in lines {
        sqlx::query("UPDATE shelf SET pieces = pieces + ? WHERE product = ?")
            .bind(line.quantity)
            .bind(&line.product)
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

fn add(pieces: &mut BTreeMap<String, u32>, lines: &[Line]) {
    for line in lines {
        *pieces.entry(line.product.clone()).or_default() += line.quantity;
    }
}

/// Sets everything aside or nothing.
async fn reserve(order: OrderCreated, mut cx: Context<(), SqliteStore>) -> Result<(), BoxError> {
    let order_id = order.order_id;
    let tx = handling(&order, &mut cx).await?;
    if let Some(product) = take(tx, &order.lines).await? {
        keep(tx, order_id, &Reservation::Short(product.clone())).await?;
        cx.publish(InventoryShort {
            order_id,
            customer: order.customer,
            product,
        })?;
    } else {
        keep(tx, order_id, &Reservation::Held(order.lines.clone())).await?;
        cx.publish(InventoryReserved {
            order_id,
            customer: order.customer,
            lines: order.lines,
            total: order.total,
            card: order.card,
        })?;
    }
    Ok(())
}

async fn put_back(failed: PaymentFailed, mut cx: Context<(), SqliteStore>) -> Result<(), BoxError> {
    let order_id = failed.order_id;
    let tx = handling(&failed, &mut cx).await?;
    let Some(Reservation::Held(lines)) = find(tx, order_id).await? else {
        return Err(NothingHeld(order_id).into());
    };
    put(tx, &lines).await?;
    keep(tx, order_id, &Reservation::Released(lines.clone())).await?;
    cx.publish(InventoryReleased { order_id, lines })?;
    Ok(())
}

/// Wires the inventory service.
pub fn consumer(bus: &EventBus, warehouse: &Warehouse) -> ConsumerBuilder<(), SqliteStore> {
    bus.consumer("inventory")
        .unit(warehouse.store().clone())
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
