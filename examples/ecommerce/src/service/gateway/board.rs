//! The board: where each order stands, as the gateway's clients see it.
//!
//! Events of different topics come in any order, so nothing on the board ever goes back.

use std::time::{Duration, SystemTime};

use eventbus::prelude::{BoxError, Context, Event};
use serde::{Deserialize, Serialize};
use sqlx::types::Json;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::database::{Database, Tables, Tx, handling, sql};
use crate::databases::Databases;
use crate::events::{CancelReason, OrderId};

/// How often the board is looked at while somebody waits for it to change.
const GLANCE: Duration = Duration::from_millis(10);

const TABLES: Tables = Tables {
    sqlite: &["
        CREATE TABLE orders (
            order_id TEXT PRIMARY KEY,
            form     TEXT, -- none if the order was not placed here
            view     TEXT NOT NULL,
            is_over  INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID;
        CREATE INDEX orders_open ON orders (order_id) WHERE NOT is_over"],
    postgres: &["
        CREATE TABLE orders (
            order_id text PRIMARY KEY,
            form     text, -- none if the order was not placed here
            view     jsonb NOT NULL,
            is_over  boolean NOT NULL
        );
        CREATE INDEX orders_open ON orders (order_id) WHERE NOT is_over"],
};

/// How far an order is; later is greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It was accepted.
    #[default]
    Placed,
    /// Stock is set aside.
    Reserved,
    /// It is paid.
    Paid,
    /// The parcel has a label.
    Packed,
    /// The parcel is on its way and the customer knows.
    Shipped,
    /// It came to nothing.
    Cancelled,
}

/// What the board shows of an order.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct OrderView {
    /// How far it is.
    pub status: Status,
    /// Why it came, or will come, to nothing.
    pub reason: Option<CancelReason>,
    /// The number on its label.
    pub tracking: Option<String>,
    /// When it was shipped or cancelled.
    pub ended_at: Option<SystemTime>,
    /// The customer knows the outcome.
    told: bool,
    /// What was set aside is back on the shelf.
    released: bool,
}

impl OrderView {
    /// It is at least so far.
    pub fn reach(&mut self, status: Status) {
        self.status = self.status.max(status);
        if status >= Status::Shipped {
            self.ended_at.get_or_insert_with(SystemTime::now);
        }
    }

    /// It has a parcel with this number.
    pub fn pack(&mut self, tracking: &str) {
        self.reach(Status::Packed);
        self.tracking = Some(tracking.to_owned());
    }

    /// It will be cancelled for this reason.
    pub fn fail(&mut self, reason: CancelReason) {
        self.reason = Some(reason);
    }

    /// The customer knows the outcome.
    pub fn tell(&mut self) {
        self.told = true;
    }

    /// What was set aside is back on the shelf.
    pub fn release(&mut self) {
        self.released = true;
    }

    /// Whether nothing more will happen to the order.
    pub fn is_over(&self) -> bool {
        match (self.status, self.reason) {
            (Status::Shipped, _) => true,
            (Status::Cancelled, Some(CancelReason::PaymentDeclined)) => self.told && self.released,
            (Status::Cancelled, _) => self.told,
            _ => false,
        }
    }
}

/// What came of placing an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// It is on the board.
    Now,
    /// It was there, from the same form.
    Before,
    /// An order from another form is there.
    Otherwise,
}

/// Where all orders stand, for those who ask.
#[derive(Clone, Debug)]
pub struct Board(Database);

impl Board {
    /// Opens the board.
    ///
    /// # Errors
    ///
    /// When the gateway's database cannot be opened.
    pub async fn open(databases: &Databases) -> anyhow::Result<Self> {
        Ok(Self(databases.open("gateway", &TABLES).await?))
    }

    /// What it is kept in.
    pub fn database(&self) -> &Database {
        &self.0
    }

    /// The order, if the gateway took it or heard of it.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn find(&self, order_id: OrderId) -> anyhow::Result<Option<OrderView>> {
        let found = sql("SELECT view FROM orders WHERE order_id = $1")
            .bind(order_id.to_string())
            .fetch_optional(&self.0);
        Ok(found.await?.map(|(Json(order),)| order))
    }

    /// How many orders are not over.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn count_open(&self) -> anyhow::Result<usize> {
        let (open,): (i64,) = sql("SELECT count(*) FROM orders WHERE NOT is_over")
            .fetch_one(&self.0)
            .await?;
        Ok(usize::try_from(open)?)
    }

    /// Waits until at most so many orders are not over, or none ended for so long; returns how
    /// many are left.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn wait_until_open(&self, most: usize, patience: Duration) -> anyhow::Result<usize> {
        let (mut fewest, mut since) = (usize::MAX, Instant::now());
        loop {
            let open = self.count_open().await?;
            if open < fewest {
                (fewest, since) = (open, Instant::now());
            }
            if open <= most || since.elapsed() > patience {
                return Ok(open);
            }
            sleep(GLANCE).await;
        }
    }
}

/// Puts an order on the board, unless there is one of its number.
pub async fn place(tx: &mut Tx<'_>, order_id: OrderId, form: Uuid) -> sqlx::Result<Placed> {
    let placed = sql(
        "INSERT INTO orders (order_id, form, view, is_over) VALUES ($1, $2, $3, $4)
         ON CONFLICT DO NOTHING",
    )
    .bind(order_id.to_string())
    .bind(form.to_string())
    .bind_json(&OrderView::default())
    .bind(false)
    .execute(tx)
    .await?;
    if placed > 0 {
        return Ok(Placed::Now);
    }
    let before: Option<(Option<String>,)> = sql("SELECT form FROM orders WHERE order_id = $1")
        .bind(order_id.to_string())
        .fetch_optional(tx)
        .await?;
    let is_same = before.is_some_and(|(before,)| before == Some(form.to_string()));
    Ok(if is_same {
        Placed::Before
    } else {
        Placed::Otherwise
    })
}

/// Changes an order as news of it demand. Other news of the order may come at the same moment, on
/// another topic: the first statement holds the order for this transaction.
pub async fn hear<E: Event + Sync>(
    news: &E,
    cx: &mut Context<(), Database>,
    order_id: OrderId,
    change: impl FnOnce(&mut OrderView) + Send,
) -> Result<(), BoxError> {
    let mut tx = handling(news, cx).await?;
    let (Json(mut order),): (Json<OrderView>,) = sql(
        "INSERT INTO orders (order_id, view, is_over) VALUES ($1, $2, $3)
             ON CONFLICT (order_id) DO UPDATE SET view = orders.view RETURNING view",
    )
    .bind(order_id.to_string())
    .bind_json(&OrderView::default())
    .bind(false)
    .returning(&mut tx)
    .await?;
    change(&mut order);
    sql("UPDATE orders SET view = $2, is_over = $3 WHERE order_id = $1")
        .bind(order_id.to_string())
        .bind_json(&order)
        .bind(order.is_over())
        .execute(&mut tx)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_goes_back() {
        let mut order = OrderView::default();
        order.reach(Status::Shipped);
        order.reach(Status::Reserved);
        order.pack("PX1");
        assert_eq!(order.status, Status::Shipped);
        assert_eq!(order.tracking.as_deref(), Some("PX1"));
    }

    #[test]
    fn an_order_is_open_until_all_that_follows_has_happened() {
        let mut order = OrderView::default();
        order.fail(CancelReason::PaymentDeclined);
        order.reach(Status::Cancelled);
        order.tell();
        assert!(!order.is_over(), "the stock is not back");
        order.release();
        assert!(order.is_over());
    }
}
