//! The board: where each order stands, as the gateway's clients see it.
//!
//! Events of different topics come in any order, so nothing on the board ever goes back.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use eventbus::prelude::{Context, Event};
use serde::{Deserialize, Serialize};
use sqlx::types::Json;
use tokio::sync::watch;

use super::keys::Keys;
use crate::events::{CancelReason, OrderId};
use crate::store::{Store, Work};

const MIGRATIONS: &[&str] = &["
    CREATE TABLE orders (
        order_id TEXT PRIMARY KEY,
        view     TEXT NOT NULL,
        is_over  INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX orders_open ON orders (order_id) WHERE NOT is_over;
    CREATE TABLE posted (
        number   INTEGER PRIMARY KEY,
        order_id TEXT NOT NULL UNIQUE,
        form     TEXT NOT NULL
    ) STRICT"];

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

/// Where all orders stand, shared by the HTTP handlers and the consumer.
#[derive(Clone, Debug)]
pub struct Board {
    store: Store,
    /// How many orders are not over.
    open: Arc<watch::Sender<i64>>,
}

impl Board {
    /// The board in the data directory.
    ///
    /// # Errors
    ///
    /// When the gateway's database cannot be opened.
    pub async fn open(data: &Path) -> anyhow::Result<Self> {
        let store = Store::open(data, "gateway", MIGRATIONS).await?;
        let open = sqlx::query_scalar("SELECT count(*) FROM orders WHERE NOT is_over")
            .fetch_one(&mut *store.reader().await)
            .await?;
        Ok(Self {
            store,
            open: Arc::new(watch::Sender::new(open)),
        })
    }

    /// The idempotency keys, which lie beside the orders that they name.
    pub fn keys(&self) -> Keys {
        Keys::new(self.store.clone())
    }

    /// The order, if the gateway took it or heard of it.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn find(&self, order_id: OrderId) -> anyhow::Result<Option<OrderView>> {
        Ok(find(&mut *self.store.reader().await, order_id).await?)
    }

    /// How many orders are not over, now and whenever that changes.
    pub fn count_open(&self) -> watch::Receiver<i64> {
        self.open.subscribe()
    }

    /// The gateway took it.
    ///
    /// # Errors
    ///
    /// When the database cannot be written.
    pub async fn placed(&self, order_id: OrderId) -> anyhow::Result<()> {
        self.change(self.store.begin().await?, order_id, |_| {})
            .await
    }

    /// Changes an order as news of it demand.
    ///
    /// # Errors
    ///
    /// When the database cannot be written.
    pub async fn hear<E: Event + Sync>(
        &self,
        news: &E,
        cx: &Context<Self>,
        order_id: OrderId,
        change: impl FnOnce(&mut OrderView) + Send,
    ) -> anyhow::Result<()> {
        let work = self.store.handling(news, cx).await?;
        self.change(work, order_id, change).await
    }

    /// Changes one order and keeps count of those that are not over.
    async fn change(
        &self,
        mut work: Work,
        order_id: OrderId,
        change: impl FnOnce(&mut OrderView) + Send,
    ) -> anyhow::Result<()> {
        let before = find(&mut work, order_id).await?;
        let was_open = before.as_ref().is_some_and(|order| !order.is_over());
        let mut order = before.unwrap_or_default();
        change(&mut order);
        let is_open = !order.is_over();
        sqlx::query("INSERT OR REPLACE INTO orders (order_id, view, is_over) VALUES (?, ?, ?)")
            .bind(order_id.to_string())
            .bind(Json(&order))
            .bind(!is_open)
            .execute(&mut *work)
            .await?;
        work.commit().await?;
        if is_open != was_open {
            let step = if is_open { 1 } else { -1 };
            self.open.send_modify(|open| *open += step);
        }
        Ok(())
    }
}

async fn find(
    connection: &mut sqlx::SqliteConnection,
    order_id: OrderId,
) -> sqlx::Result<Option<OrderView>> {
    let found = sqlx::query_scalar("SELECT view FROM orders WHERE order_id = ?")
        .bind(order_id.to_string())
        .fetch_optional(connection);
    Ok(found.await?.map(|Json(order)| order))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::service::sample::TestData;

    const ORDER: OrderId = OrderId(Uuid::from_u128(1));

    #[test]
    fn nothing_goes_back() {
        let mut order = OrderView::default();
        order.reach(Status::Shipped);
        order.reach(Status::Reserved);
        order.pack("PX1");
        assert_eq!(order.status, Status::Shipped);
        assert_eq!(order.tracking.as_deref(), Some("PX1"));
    }

    #[tokio::test]
    async fn an_order_is_open_until_all_that_follows_has_happened() {
        let data = TestData::new();
        let board = Board::open(data.path()).await.unwrap();
        let open = board.count_open();
        let change = async |change: fn(&mut OrderView)| {
            let work = board.store.begin().await.unwrap();
            board.change(work, ORDER, change).await.unwrap();
            *open.borrow()
        };
        board.placed(ORDER).await.unwrap();
        assert_eq!(*open.borrow(), 1);
        change(|order| order.fail(CancelReason::PaymentDeclined)).await;
        change(|order| order.reach(Status::Cancelled)).await;
        assert_eq!(change(OrderView::tell).await, 1, "the stock is not back");
        let again = Board::open(data.path()).await.unwrap();
        assert_eq!(
            *again.count_open().borrow(),
            1,
            "counted again at the start"
        );
        assert_eq!(change(OrderView::release).await, 0);
        change(OrderView::release).await;
        assert_eq!(change(|_| {}).await, 0, "an order is over once");
    }
}
