//! The board: where each order stands, as the gateway's clients see it.
//!
//! Events of different topics come in any order, so nothing on the board ever goes back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;
use tokio::sync::watch;

use crate::events::{CancelReason, OrderId};

/// How far an order is; later is greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
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
#[derive(Clone, Debug, Default)]
pub struct OrderView {
    /// How far it is.
    pub status: Status,
    /// Why it came, or will come, to nothing.
    pub reason: Option<CancelReason>,
    /// The number on its label.
    pub tracking: Option<String>,
    /// When it was shipped or cancelled.
    pub ended_at: Option<Instant>,
    /// The customer knows the outcome.
    told: bool,
    /// What was set aside is back on the shelf.
    released: bool,
}

impl OrderView {
    /// Whether nothing more will happen to the order.
    fn is_over(&self) -> bool {
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
pub struct Board(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    orders: Mutex<HashMap<OrderId, OrderView>>,
    /// How many orders are not over.
    open: watch::Sender<usize>,
}

impl Default for Board {
    fn default() -> Self {
        Self(Arc::new(Inner {
            orders: Mutex::default(),
            open: watch::Sender::new(0),
        }))
    }
}

impl Board {
    /// The order, if the gateway took it or heard of it.
    pub fn find(&self, order_id: OrderId) -> Option<OrderView> {
        let orders = self.0.orders.lock();
        let orders = orders.unwrap_or_else(PoisonError::into_inner);
        orders.get(&order_id).cloned()
    }

    /// How many orders are not over, now and whenever that changes.
    pub fn open(&self) -> watch::Receiver<usize> {
        self.0.open.subscribe()
    }

    /// The gateway took it.
    pub fn placed(&self, order_id: OrderId) {
        self.change(order_id, |_| {});
    }

    /// It is at least so far.
    pub fn reached(&self, order_id: OrderId, status: Status) {
        self.change(order_id, |order| {
            order.status = order.status.max(status);
            if status >= Status::Shipped {
                order.ended_at.get_or_insert_with(Instant::now);
            }
        });
    }

    /// It has a parcel with this number.
    pub fn packed(&self, order_id: OrderId, tracking: String) {
        self.reached(order_id, Status::Packed);
        self.change(order_id, |order| order.tracking = Some(tracking));
    }

    /// It will be cancelled for this reason.
    pub fn failed(&self, order_id: OrderId, reason: CancelReason) {
        self.change(order_id, |order| order.reason = Some(reason));
    }

    /// The customer knows the outcome.
    pub fn told(&self, order_id: OrderId) {
        self.change(order_id, |order| order.told = true);
    }

    /// What was set aside is back on the shelf.
    pub fn released(&self, order_id: OrderId) {
        self.change(order_id, |order| order.released = true);
    }

    /// Changes one order and keeps count of those that are not over.
    fn change(&self, order_id: OrderId, change: impl FnOnce(&mut OrderView)) {
        let orders = self.0.orders.lock();
        let mut orders = orders.unwrap_or_else(PoisonError::into_inner);
        let known = orders.len();
        let order = orders.entry(order_id).or_default();
        let was_over = order.is_over();
        change(order);
        let is_over = order.is_over();
        let opened = orders.len() - known;
        let closed = usize::from(is_over && !was_over);
        if opened != closed {
            self.0
                .open
                .send_modify(|open| *open = *open + opened - closed);
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const ORDER: OrderId = OrderId(Uuid::from_u128(1));

    #[test]
    fn nothing_goes_back() {
        let board = Board::default();
        board.reached(ORDER, Status::Shipped);
        board.reached(ORDER, Status::Reserved);
        board.packed(ORDER, "PX1".to_owned());
        let order = board.find(ORDER).expect("it is known");
        assert_eq!(order.status, Status::Shipped);
        assert_eq!(order.tracking.as_deref(), Some("PX1"));
    }

    #[test]
    fn an_order_is_open_until_all_that_follows_has_happened() {
        let board = Board::default();
        let open = board.open();
        board.placed(ORDER);
        assert_eq!(*open.borrow(), 1);
        board.failed(ORDER, CancelReason::PaymentDeclined);
        board.reached(ORDER, Status::Cancelled);
        board.told(ORDER);
        assert_eq!(*open.borrow(), 1, "the stock is not back");
        board.released(ORDER);
        assert_eq!(*open.borrow(), 0);
        board.released(ORDER);
        board.placed(ORDER);
        assert_eq!(*open.borrow(), 0, "an order is over once");
    }
}
