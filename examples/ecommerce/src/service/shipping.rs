//! The shipping service: one parcel, one label per paid order.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus};

use crate::events::{OrderId, PaymentProcessed, ShippingCreated};

/// The labels printed so far, shared by the handlers.
#[derive(Clone, Debug, Default)]
pub struct Labels(Arc<Mutex<HashMap<OrderId, String>>>);

impl Labels {
    /// The order's label, printed when it is asked for first.
    fn print(&self, order_id: OrderId) -> String {
        let mut labels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = labels.len() + 1;
        let label = labels.entry(order_id);
        label.or_insert_with(|| format!("PX{number:09}")).clone()
    }
}

async fn pack(paid: PaymentProcessed, cx: Context<Labels>) -> Result<(), BoxError> {
    let tracking = cx.state().print(paid.order_id);
    cx.publish(ShippingCreated {
        order_id: paid.order_id,
        customer: paid.customer,
        tracking,
    })?;
    Ok(())
}

/// Wires the shipping service.
pub fn consumer(bus: &EventBus, labels: Labels) -> ConsumerBuilder<Labels> {
    bus.consumer("shipping")
        .state(labels)
        .on(pack)
        .skip_others()
}

#[cfg(test)]
mod tests;
