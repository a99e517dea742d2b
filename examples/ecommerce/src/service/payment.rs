//! The payment service: charges what is set aside; a declined card is news, not an error.

use std::path::Path;
use std::sync::Arc;

use eventbus::SqliteStore;
use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus};
use sqlx::types::Json;

use crate::client::provider_retries;
use crate::client::psp::{Charge, ChargeOutcome, PaymentProvider};
use crate::database::{self, handling};
use crate::events::{InventoryReserved, PaymentFailed, PaymentProcessed};

const MIGRATIONS: &[&str] = &["
    CREATE TABLE payments (
        order_id TEXT PRIMARY KEY,
        cents    INTEGER NOT NULL,
        outcome  TEXT NOT NULL
    ) STRICT, WITHOUT ROWID"];

/// Opens the books: what came of each charge.
///
/// # Errors
///
/// When the service's database cannot be opened.
pub async fn open(data: &Path) -> anyhow::Result<SqliteStore> {
    database::open(data, "payment", MIGRATIONS).await
}

/// No transaction is open while the provider is asked. Asked again under the same key, after a
/// crash, it gives the same answer.
async fn charge(
    reserved: InventoryReserved,
    mut cx: Context<Arc<dyn PaymentProvider>, SqliteStore>,
) -> Result<(), BoxError> {
    let charge = Charge {
        order_id: reserved.order_id,
        amount: reserved.total,
        card: reserved.card.clone(),
    };
    let key = cx.idempotency_key();
    let outcome = cx.state().charge(&charge, &key).await?;
    sqlx::query("INSERT INTO payments (order_id, cents, outcome) VALUES (?, ?, ?)")
        .bind(reserved.order_id.to_string())
        .bind(i64::try_from(reserved.total.0)?)
        .bind(Json(&outcome))
        .execute(handling(&reserved, &mut cx).await?)
        .await?;
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

/// Wires the payment service, which charges through `provider`.
pub fn consumer(
    bus: &EventBus,
    store: SqliteStore,
    provider: Arc<dyn PaymentProvider>,
) -> ConsumerBuilder<Arc<dyn PaymentProvider>, SqliteStore> {
    bus.consumer("payment")
        .state(provider)
        .unit(store)
        .on(charge)
        .retry(provider_retries())
        .skip_others()
}

#[cfg(test)]
mod tests;
