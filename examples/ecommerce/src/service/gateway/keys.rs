//! Idempotency keys: which order each one names, and what was ordered under it.

use uuid::Uuid;

use super::order_form::OrderForm;
use super::problem::Problem;
use crate::events::OrderId;
use crate::store::Store;

/// How many orders are remembered to tell another body under the same key. One that was forgotten
/// still names the same order, because the number is made from the key.
const KEYS_MAX: i64 = 1_000_000;

/// The namespace of order numbers made from keys (UUID version 5, RFC 9562).
const NAMED: Uuid = Uuid::from_u128(0x6563_6f6d_6d65_4000_8000_6f72_6465_7273);

/// The keys seen, the oldest forgotten first.
#[derive(Debug)]
pub struct Keys(Store);

impl Keys {
    /// The keys in the gateway's database.
    pub fn new(store: Store) -> Self {
        Self(store)
    }

    /// The order that `key` names for this user: the same every time.
    ///
    /// # Errors
    ///
    /// A problem when something else was ordered under this key, or the database is away.
    pub async fn order_id(
        &self,
        user_id: &Option<String>,
        key: &str,
        form: &OrderForm,
    ) -> Result<OrderId, Problem> {
        let user_id = user_id.as_deref().unwrap_or_default();
        // The length keeps user and key from running together.
        let name = format!("{} {user_id} {key}", user_id.len());
        let order_id = OrderId(Uuid::new_v5(&NAMED, name.as_bytes()));
        let remembered = self.remember(order_id, form.fingerprint(), KEYS_MAX).await;
        match remembered.map_err(|cause| Problem::unknown_outcome(order_id, &cause))? {
            true => Ok(order_id),
            false => Err(Problem::key_reused()),
        }
    }

    /// Whether the form is the first or the same as before.
    async fn remember(&self, order_id: OrderId, form: Uuid, keys_max: i64) -> anyhow::Result<bool> {
        let mut work = self.0.begin().await?;
        sqlx::query("INSERT INTO posted (order_id, form) VALUES (?, ?) ON CONFLICT DO NOTHING")
            .bind(order_id.to_string())
            .bind(form.to_string())
            .execute(&mut *work)
            .await?;
        let first: String = sqlx::query_scalar("SELECT form FROM posted WHERE order_id = ?")
            .bind(order_id.to_string())
            .fetch_one(&mut *work)
            .await?;
        sqlx::query("DELETE FROM posted WHERE number <= (SELECT max(number) FROM posted) - ?")
            .bind(keys_max)
            .execute(&mut *work)
            .await?;
        work.commit().await?;
        Ok(first == form.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Board;
    use super::*;
    use crate::service::sample::{TestData, order_id};

    #[tokio::test]
    async fn a_restart_forgets_nothing_and_what_is_remembered_is_bounded() {
        let data = TestData::new();
        let keys = Board::open(data.path()).await.unwrap().keys();
        for number in 0..=5 {
            let first = keys.remember(order_id(number), Uuid::nil(), 5).await;
            assert!(first.unwrap());
        }
        let keys = Board::open(data.path()).await.unwrap().keys();
        let another = keys.remember(order_id(5), Uuid::max(), 5).await;
        assert!(!another.unwrap(), "the last is remembered");
        let forgotten = keys.remember(order_id(0), Uuid::max(), 5).await;
        assert!(forgotten.unwrap(), "the first was forgotten");
    }
}
