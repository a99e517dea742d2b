//! The order service: decides how each order ends, and says so once.
//!
//! ```text
//!   OrderCreated ───▶ open ──┬── NotificationSent (shipped) ──▶ shipped    ▶ OrderShipped
//!                            ├── InventoryShort ──────────────▶ cancelled  ▶ OrderCancelled
//!                            └── PaymentFailed ───────────────▶ cancelled  ▶ OrderCancelled
//! ```

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus, OnError, RetryPolicy};

use crate::events::{
    CancelReason, InventoryShort, Notice, NotificationSent, OrderCancelled, OrderCreated, OrderId,
    OrderShipped, PaymentFailed,
};

/// All orders, shared by the handlers.
#[derive(Clone, Debug, Default)]
pub struct Orders(Arc<Mutex<HashMap<OrderId, Standing>>>);

/// Where an order stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Opens an order, unless it is known: news of its end may have come first.
    fn open(&self, order_id: OrderId) {
        self.lock().entry(order_id).or_insert(Standing::Open);
    }

    /// Ends an order; ending it again in the same way changes nothing.
    fn end(&self, order_id: OrderId, told: Standing) -> Result<(), Contradiction> {
        let mut orders = self.lock();
        let stands = orders.entry(order_id).or_insert(Standing::Open);
        if *stands != Standing::Open && *stands != told {
            return Err(Contradiction {
                order_id,
                stands: *stands,
                told,
            });
        }
        *stands = told;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<OrderId, Standing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn created(order: OrderCreated, cx: Context<Orders>) -> Result<(), BoxError> {
    cx.state().open(order.order_id);
    Ok(())
}

async fn short(short: InventoryShort, cx: Context<Orders>) -> Result<(), BoxError> {
    let reason = CancelReason::OutOfStock;
    cx.state()
        .end(short.order_id, Standing::Cancelled(reason))?;
    cx.publish(OrderCancelled {
        order_id: short.order_id,
        customer: short.customer,
        reason,
    })?;
    Ok(())
}

async fn unpaid(failed: PaymentFailed, cx: Context<Orders>) -> Result<(), BoxError> {
    let reason = CancelReason::PaymentDeclined;
    cx.state()
        .end(failed.order_id, Standing::Cancelled(reason))?;
    cx.publish(OrderCancelled {
        order_id: failed.order_id,
        customer: failed.customer,
        reason,
    })?;
    Ok(())
}

async fn told(sent: NotificationSent, cx: Context<Orders>) -> Result<(), BoxError> {
    if sent.notice == Notice::Shipped {
        let order_id = sent.order_id;
        cx.state().end(order_id, Standing::Shipped)?;
        cx.publish(OrderShipped { order_id })?;
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
