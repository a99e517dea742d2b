//! Idempotency keys: which order each one names, and what was ordered under it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

use super::order_form::OrderForm;
use super::problem::Problem;
use crate::events::OrderId;

/// How many orders are remembered to tell another body under the same key. One that was forgotten
/// still names the same order, because the number is made from the key.
const KEYS_MAX: usize = 100_000;

/// The namespace of order numbers made from keys (UUID version 5, RFC 9562).
const NAMED: Uuid = Uuid::from_u128(0x6563_6f6d_6d65_4000_8000_6f72_6465_7273);

/// The keys seen, the oldest forgotten first.
#[derive(Debug, Default)]
pub struct Keys(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    forms: HashMap<OrderId, Uuid>,
    oldest: VecDeque<OrderId>,
}

impl Keys {
    /// The order that `key` names for this user: the same every time.
    ///
    /// # Errors
    ///
    /// A problem when something else was ordered under this key.
    pub fn order_id(
        &self,
        user_id: &Option<String>,
        key: &str,
        form: &OrderForm,
    ) -> Result<OrderId, Problem> {
        let user_id = user_id.as_deref().unwrap_or_default();
        // The length keeps user and key from running together.
        let name = format!("{} {user_id} {key}", user_id.len());
        let order_id = OrderId(Uuid::new_v5(&NAMED, name.as_bytes()));
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match seen.remember(order_id, form.fingerprint()) {
            true => Ok(order_id),
            false => Err(Problem::key_reused()),
        }
    }
}

impl Seen {
    /// Whether the form is the first or the same as before.
    fn remember(&mut self, order_id: OrderId, form: Uuid) -> bool {
        if let Some(before) = self.forms.get(&order_id) {
            return *before == form;
        }
        if self.oldest.len() == KEYS_MAX
            && let Some(oldest) = self.oldest.pop_front()
        {
            self.forms.remove(&oldest);
        }
        self.oldest.push_back(order_id);
        self.forms.insert(order_id, form);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded() {
        let mut seen = Seen::default();
        for number in 0..=KEYS_MAX as u128 {
            assert!(seen.remember(OrderId(Uuid::from_u128(number)), Uuid::nil()));
        }
        assert_eq!((seen.forms.len(), seen.oldest.len()), (KEYS_MAX, KEYS_MAX));
        let forgotten = OrderId(Uuid::from_u128(0));
        assert!(seen.remember(forgotten, Uuid::max()), "it was forgotten");
        assert!(!seen.remember(forgotten, Uuid::nil()));
    }
}
