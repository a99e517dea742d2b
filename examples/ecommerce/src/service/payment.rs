//! The payment service: charges what is set aside; a declined card is news, not an error.

use std::path::Path;
use std::sync::Arc;

use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus};
use sqlx::types::Json;

use crate::client::provider_retries;
use crate::client::psp::{Charge, ChargeOutcome, PaymentProvider};
use crate::events::{InventoryReserved, PaymentFailed, PaymentProcessed};
use crate::store::Store;

const MIGRATIONS: &[&str] = &["
    CREATE TABLE payments (
        order_id TEXT PRIMARY KEY,
        cents    INTEGER NOT NULL,
        outcome  TEXT NOT NULL
    ) STRICT, WITHOUT ROWID"];

/// The provider that takes the money, and our own books.
#[derive(Clone)]
pub struct Payments {
    provider: Arc<dyn PaymentProvider>,
    books: Store,
}

impl Payments {
    /// Payments through `provider`, with the books in the data directory.
    ///
    /// # Errors
    ///
    /// When the service's database cannot be opened.
    pub async fn open(data: &Path, provider: impl PaymentProvider) -> anyhow::Result<Self> {
        Ok(Self {
            provider: Arc::new(provider),
            books: Store::open(data, "payment", MIGRATIONS).await?,
        })
    }

    /// Enters what came of a charge, once.
    async fn book(
        &self,
        reserved: &InventoryReserved,
        outcome: &ChargeOutcome,
        cx: &Context<Self>,
    ) -> anyhow::Result<()> {
        let mut work = self.books.handling(reserved, cx).await?;
        sqlx::query(
            "INSERT INTO payments (order_id, cents, outcome) VALUES (?, ?, ?) \
             ON CONFLICT DO NOTHING",
        )
        .bind(reserved.order_id.to_string())
        .bind(i64::try_from(reserved.total.0)?)
        .bind(Json(outcome))
        .execute(&mut *work)
        .await?;
        work.commit().await
    }
}

/// No transaction is open while the provider is asked; asked again under the same key, it gives
/// the same answer.
async fn charge(reserved: InventoryReserved, cx: Context<Payments>) -> Result<(), BoxError> {
    let charge = Charge {
        order_id: reserved.order_id,
        amount: reserved.total,
        card: reserved.card.clone(),
    };
    let payments = cx.state();
    let key = cx.idempotency_key();
    let outcome = payments.provider.charge(&charge, &key).await?;
    payments.book(&reserved, &outcome, &cx).await?;
    match outcome {
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
