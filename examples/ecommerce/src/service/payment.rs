//! The payment service: charges what is set aside; a declined card is news, not an error.

use std::sync::Arc;

use eventbus::prelude::{BoxError, ConsumerBuilder, Context, EventBus};

use crate::client::provider_retries;
use crate::client::psp::{Charge, ChargeOutcome, PaymentProvider};
use crate::database::{Database, Tables, handling, sql};
use crate::databases::Databases;
use crate::events::{InventoryReserved, PaymentFailed, PaymentProcessed};

const TABLES: Tables = Tables {
    sqlite: &["
        CREATE TABLE payments (
            order_id TEXT PRIMARY KEY,
            cents    INTEGER NOT NULL,
            outcome  TEXT NOT NULL
        ) STRICT, WITHOUT ROWID"],
    postgres: &["
        CREATE TABLE payments (
            order_id text PRIMARY KEY,
            cents    bigint NOT NULL,
            outcome  jsonb NOT NULL
        )"],
};

/// Opens the books: what came of each charge.
///
/// # Errors
///
/// When the service's database cannot be opened.
pub async fn open(databases: &Databases) -> anyhow::Result<Database> {
    databases.open("payment", &TABLES).await
}

/// No transaction is open while the provider is asked. Asked again under the same key, after a
/// crash, it gives the same answer.
async fn charge(
    reserved: InventoryReserved,
    mut cx: Context<Arc<dyn PaymentProvider>, Database>,
) -> Result<(), BoxError> {
    let charge = Charge {
        order_id: reserved.order_id,
        amount: reserved.total,
        card: reserved.card.clone(),
    };
    let key = cx.idempotency_key();
    let outcome = cx.state().charge(&charge, &key).await?;
    let mut tx = handling(&reserved, &mut cx).await?;
    sql("INSERT INTO payments (order_id, cents, outcome) VALUES ($1, $2, $3)")
        .bind(reserved.order_id.to_string())
        .bind(i64::try_from(reserved.total.0)?)
        .bind_json(&outcome)
        .execute(&mut tx)
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
    database: Database,
    provider: Arc<dyn PaymentProvider>,
) -> ConsumerBuilder<Arc<dyn PaymentProvider>, Database> {
    bus.consumer("payment")
        .state(provider)
        .unit(database)
        .on(charge)
        .retry(provider_retries())
        .skip_others()
}

#[cfg(test)]
mod tests;
