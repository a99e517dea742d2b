//! Idempotency keys: which order each one names.

use axum::http::HeaderMap;
use uuid::Uuid;

use super::problem::Problem;
use crate::events::OrderId;

/// Most characters that a key may have.
const LENGTH_MAX: usize = 200;

/// The namespace of order numbers made from keys (UUID version 5, RFC 9562).
const NAMED: Uuid = Uuid::from_u128(0x6563_6f6d_6d65_4000_8000_6f72_6465_7273);

/// The number of the order that a request is about: the same for the same `Idempotency-Key` of the
/// same user, and a new one without a key.
///
/// # Errors
///
/// A problem when the header cannot be a key.
pub fn order_id(headers: &HeaderMap, user_id: Option<&str>) -> Result<OrderId, Problem> {
    let Some(key) = headers.get("idempotency-key") else {
        return Ok(OrderId(Uuid::now_v7()));
    };
    let key = key.to_str().unwrap_or_default();
    if !(1..=LENGTH_MAX).contains(&key.len()) {
        return Err(Problem::bad_header(format!(
            "`idempotency-key` has 1 to {LENGTH_MAX} visible ASCII characters, or is left out"
        )));
    }
    let user_id = user_id.unwrap_or_default();
    // The length keeps user and key from running together.
    let name = format!("{} {user_id} {key}", user_id.len());
    Ok(OrderId(Uuid::new_v5(&NAMED, name.as_bytes())))
}
