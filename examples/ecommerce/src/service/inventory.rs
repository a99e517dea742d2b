//! The inventory service: sets stock aside for orders and puts it back when they are not paid.
//!
//! Stock is conserved: what there was in the beginning is on the shelf or set aside for an order.

use std::collections::BTreeMap;
use std::fmt;

use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus, Origin};
use serde::{Deserialize, Serialize};
use sqlx::types::Json;

use crate::database::{Database, Tables, Tx, handling, sql};
use crate::databases::Databases;
use crate::events::{
    InventoryReleased, InventoryReserved, InventoryShort, Line, OrderCreated, OrderId,
    PaymentFailed,
};

const TABLES: Tables = Tables {
    sqlite: &["
        CREATE TABLE shelf (
            product TEXT PRIMARY KEY,
            pieces  INTEGER NOT NULL CHECK (pieces >= 0)
        ) STRICT, WITHOUT ROWID;
        CREATE TABLE reservations (
            order_id    TEXT PRIMARY KEY,
            reservation TEXT NOT NULL
        ) STRICT, WITHOUT ROWID"],
    postgres: &["
        CREATE TABLE shelf (
            product text PRIMARY KEY,
            pieces  bigint NOT NULL CHECK (pieces >= 0)
        );
        CREATE TABLE reservations (
            order_id    text PRIMARY KEY,
            reservation jsonb NOT NULL
        )"],
};

/// The shelves, and what is set aside for each order.
#[derive(Clone, Debug)]
pub struct Warehouse(Database);

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
    /// Opens the warehouse.
    ///
    /// # Errors
    ///
    /// When the service's database cannot be opened.
    pub async fn open(databases: &Databases) -> anyhow::Result<Self> {
        Ok(Self(databases.open("inventory", &TABLES).await?))
    }

    /// What it keeps its data in.
    pub fn database(&self) -> &Database {
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
            sql("INSERT INTO shelf (product, pieces) VALUES ($1, $2) ON CONFLICT DO NOTHING")
                .bind(&**product)
                .bind(*pieces)
                .execute(&mut tx.tx())
                .await?;
        }
        tx.commit().await?;
        Ok(())
    }

    /// What is on the shelves.
    pub async fn on_shelf(&self) -> anyhow::Result<BTreeMap<String, u32>> {
        let mut shelf = BTreeMap::new();
        let rows = sql("SELECT product, pieces FROM shelf");
        for (product, pieces) in rows.fetch_all::<(String, i64)>(&self.0).await? {
            shelf.insert(product, u32::try_from(pieces)?);
        }
        Ok(shelf)
    }

    /// What is set aside, over all orders.
    pub async fn set_aside(&self) -> anyhow::Result<BTreeMap<String, u32>> {
        let reservations = sql("SELECT reservation FROM reservations");
        let mut pieces = BTreeMap::new();
        for (Json(reservation),) in reservations.fetch_all(&self.0).await? {
            if let Reservation::Held(lines) = reservation {
                add(&mut pieces, &lines);
            }
        }
        Ok(pieces)
    }
}

/// What was done for an order.
async fn find(tx: &mut Tx<'_>, order_id: OrderId) -> sqlx::Result<Option<Reservation>> {
    let found = sql("SELECT reservation FROM reservations WHERE order_id = $1")
        .bind(order_id.to_string())
        .fetch_optional(tx);
    Ok(found.await?.map(|(Json(reservation),)| reservation))
}

async fn keep(tx: &mut Tx<'_>, order_id: OrderId, reservation: &Reservation) -> sqlx::Result<()> {
    sql(
        "INSERT INTO reservations (order_id, reservation) VALUES ($1, $2)
         ON CONFLICT (order_id) DO UPDATE SET reservation = $2",
    )
    .bind(order_id.to_string())
    .bind_json(reservation)
    .execute(tx)
    .await?;
    Ok(())
}

/// Takes everything from the shelves, or nothing when a product is short: which one. Products are
/// taken in the same order by everybody, so that no two orders wait for each other.
async fn take(tx: &mut Tx<'_>, lines: &[Line]) -> sqlx::Result<Option<String>> {
    let mut taken = BTreeMap::new();
    for (product, quantity) in pieces(lines) {
        let was_there =
            sql("UPDATE shelf SET pieces = pieces - $1 WHERE product = $2 AND pieces >= $1")
                .bind(quantity)
                .bind(&*product)
                .execute(tx)
                .await?;
        if was_there == 0 {
            put(tx, &taken).await?;
            return Ok(Some(product));
        }
        taken.insert(product, quantity);
    }
    Ok(None)
}

/// Puts everything on the shelves.
async fn put(tx: &mut Tx<'_>, pieces: &BTreeMap<String, u32>) -> sqlx::Result<()> {
    for (product, quantity) in pieces {
        sql("UPDATE shelf SET pieces = pieces + $1 WHERE product = $2")
            .bind(*quantity)
            .bind(&**product)
            .execute(tx)
            .await?;
    }
    Ok(())
}

/// How many of each product these are.
fn pieces(lines: &[Line]) -> BTreeMap<String, u32> {
    let mut pieces = BTreeMap::new();
    add(&mut pieces, lines);
    pieces
}

fn add(pieces: &mut BTreeMap<String, u32>, lines: &[Line]) {
    for line in lines {
        *pieces.entry(line.product.clone()).or_default() += line.quantity;
    }
}

/// Sets everything aside or nothing.
async fn reserve(order: OrderCreated, mut cx: Context<(), Database>) -> Result<(), BoxError> {
    let order_id = order.order_id;
    let mut tx = handling(&order, &mut cx).await?;
    if let Some(product) = take(&mut tx, &order.lines).await? {
        keep(&mut tx, order_id, &Reservation::Short(product.clone())).await?;
        cx.publish(InventoryShort {
            order_id,
            customer: order.customer,
            product,
        })?;
    } else {
        keep(&mut tx, order_id, &Reservation::Held(order.lines.clone())).await?;
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

async fn put_back(failed: PaymentFailed, mut cx: Context<(), Database>) -> Result<(), BoxError> {
    let order_id = failed.order_id;
    let mut tx = handling(&failed, &mut cx).await?;
    let Some(Reservation::Held(lines)) = find(&mut tx, order_id).await? else {
        return Err(NothingHeld(order_id).into());
    };
    put(&mut tx, &pieces(&lines)).await?;
    keep(&mut tx, order_id, &Reservation::Released(lines.clone())).await?;
    cx.publish(InventoryReleased { order_id, lines })?;
    Ok(())
}

/// Wires the inventory service.
pub fn consumer(bus: &EventBus, warehouse: &Warehouse) -> ConsumerBuilder<(), Database> {
    bus.consumer("inventory")
        .unit(warehouse.database().clone())
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
