//! The inventory service: sets stock aside for orders and puts it back when they are not paid.
//!
//! Stock is conserved: what there was in the beginning is on the shelf or set aside for an order.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus};

use crate::events::{
    InventoryReleased, InventoryReserved, InventoryShort, Line, OrderCreated, OrderId,
    PaymentFailed,
};

/// The shelves and what is set aside, shared by the handlers.
#[derive(Clone, Debug)]
pub struct Warehouse(Arc<Mutex<Stock>>);

#[derive(Debug)]
struct Stock {
    shelf: BTreeMap<String, u32>,
    /// What became of each order: asked again, the warehouse answers the same and moves nothing.
    orders: HashMap<OrderId, Reservation>,
}

/// What the warehouse did for an order.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// A warehouse with so many pieces of each product on its shelves.
    pub fn new(shelf: BTreeMap<String, u32>) -> Self {
        Self(Arc::new(Mutex::new(Stock {
            shelf,
            orders: HashMap::new(),
        })))
    }

    /// What is on the shelves.
    pub fn on_shelf(&self) -> BTreeMap<String, u32> {
        self.lock().shelf.clone()
    }

    /// What is set aside, over all orders.
    pub fn set_aside(&self) -> BTreeMap<String, u32> {
        let mut pieces = BTreeMap::new();
        for reservation in self.lock().orders.values() {
            if let Reservation::Held(lines) = reservation {
                add(&mut pieces, lines);
            }
        }
        pieces
    }

    /// Sets everything aside or nothing, once per order.
    fn reserve(&self, order_id: OrderId, lines: &[Line]) -> Reservation {
        let mut stock = self.lock();
        if let Some(before) = stock.orders.get(&order_id) {
            return before.clone();
        }
        let mut wanted = BTreeMap::new();
        add(&mut wanted, lines);
        let reservation = match stock.short_of(&wanted) {
            Some(product) => Reservation::Short(product),
            None => {
                stock.take(&wanted);
                Reservation::Held(lines.to_vec())
            }
        };
        stock.orders.insert(order_id, reservation.clone());
        reservation
    }

    /// Puts back what is set aside for an order, once.
    fn release(&self, order_id: OrderId) -> Result<Vec<Line>, NothingHeld> {
        let mut stock = self.lock();
        match stock.orders.get(&order_id).cloned() {
            Some(Reservation::Held(lines)) => {
                add(&mut stock.shelf, &lines);
                let released = Reservation::Released(lines.clone());
                stock.orders.insert(order_id, released);
                Ok(lines)
            }
            Some(Reservation::Released(lines)) => Ok(lines),
            Some(Reservation::Short(_)) | None => Err(NothingHeld(order_id)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Stock> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stock {
    /// The first product of which there is not enough.
    fn short_of(&self, wanted: &BTreeMap<String, u32>) -> Option<String> {
        let there = |product: &str| self.shelf.get(product).copied().unwrap_or(0);
        wanted
            .iter()
            .find(|(product, quantity)| there(product) < **quantity)
            .map(|(product, _)| product.clone())
    }

    /// Takes from the shelves what is known to be there.
    fn take(&mut self, wanted: &BTreeMap<String, u32>) {
        for (product, quantity) in wanted {
            if let Some(there) = self.shelf.get_mut(product) {
                *there -= quantity;
            }
        }
    }
}

fn add(pieces: &mut BTreeMap<String, u32>, lines: &[Line]) {
    for line in lines {
        *pieces.entry(line.product.clone()).or_default() += line.quantity;
    }
}

async fn reserve(order: OrderCreated, cx: Context<Warehouse>) -> Result<(), BoxError> {
    match cx.state().reserve(order.order_id, &order.lines) {
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
    let order_id = failed.order_id;
    let lines = cx.state().release(order_id)?;
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
