//! Who calls, in which session, as part of which flow, and under which idempotency key: headers.

use axum::http::HeaderMap;
use eventbus::prelude::Origin;

use super::problem::Problem;

/// Most characters such a header may have.
const LENGTH_MAX: usize = 200;

/// What the headers of a request say about its sender.
#[derive(Debug)]
pub struct Caller {
    /// `Idempotency-Key`: the client's name for this order, to be able to post it again.
    pub idempotency_key: Option<String>,
    /// `X-User-Id`.
    pub user_id: Option<String>,
    session_id: Option<String>,
    correlation_id: Option<String>,
}

impl Caller {
    /// Reads the headers.
    pub fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        Ok(Self {
            idempotency_key: read(headers, "idempotency-key")?,
            user_id: read(headers, "x-user-id")?,
            session_id: read(headers, "x-session-id")?,
            correlation_id: read(headers, "x-correlation-id")?,
        })
    }

    /// Where the events of this request come from.
    pub fn origin(&self) -> Origin {
        let mut origin = Origin::new();
        if let Some(user_id) = &self.user_id {
            origin = origin.with_metadata("userId", user_id);
        }
        if let Some(session_id) = &self.session_id {
            origin = origin.with_metadata("sessionId", session_id);
        }
        if let Some(correlation_id) = &self.correlation_id {
            origin = origin.with_correlation_id(correlation_id);
        }
        origin
    }
}

fn read(headers: &HeaderMap, name: &'static str) -> Result<Option<String>, Problem> {
    let Some(value) = headers.get(name) else {
        return Ok(None);
    };
    match value.to_str() {
        Ok(text) if (1..=LENGTH_MAX).contains(&text.len()) => Ok(Some(text.to_owned())),
        _ => Err(Problem::bad_header(name, LENGTH_MAX)),
    }
}
