//! The payment service: charges what is set aside; a declined card is news, not an error.

use std::sync::Arc;

use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus};

use crate::client::provider_retries;
use crate::client::psp::{Charge, ChargeOutcome, PaymentProvider};
use crate::events::{InventoryReserved, PaymentFailed, PaymentProcessed};

/// The provider that takes the money; it keeps the books.
#[derive(Clone)]
pub struct Payments(Arc<dyn PaymentProvider>);

impl Payments {
    /// Payments through `provider`.
    pub fn new(provider: impl PaymentProvider) -> Self {
        Self(Arc::new(provider))
    }
}

async fn charge(reserved: InventoryReserved, cx: Context<Payments>) -> Result<(), BoxError> {
    let charge = Charge {
        order_id: reserved.order_id,
        amount: reserved.total,
        card: reserved.card,
    };
    let provider = &cx.state().0;
    match provider.charge(&charge, &cx.idempotency_key()).await? {
        ChargeOutcome::Charged { charge_id } => {
            cx.publish(PaymentProcessed {
                order_id: reserved.order_id,
                customer: reserved.customer,
                lines: reserved.lines,
                amount: reserved.total,
                charge_id,
            })?;
        }
        ChargeOutcome::Declined { reason } => {
            cx.publish(PaymentFailed {
                order_id: reserved.order_id,
                customer: reserved.customer,
                reason,
            })?;
        }
    }
    Ok(())
}

/// Wires the payment service.
pub fn consumer(bus: &EventBus, payments: Payments) -> ConsumerBuilder<Payments> {
    bus.consumer("payment")
        .state(payments)
        .on(charge)
        .retry(provider_retries())
        .skip_others()
}

#[cfg(test)]
mod tests;
