//! Where the events of a request come from, read from its headers.

use std::fmt;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use eventbus_core::Origin;

/// Most characters that a header may have which becomes part of events.
const LENGTH_MAX: usize = 200;
/// As many of `tracestate` vendors have to pass on (W3C Trace Context, section 3.3.1.5).
const TRACESTATE_LENGTH_MAX: usize = 512;

/// The origin of the events that a request leads to: an extractor.
///
/// | header | becomes |
/// | --- | --- |
/// | `X-Correlation-Id` | the correlation id of the flow; without it the first event begins one |
/// | `X-User-Id` | the metadata `userId` |
/// | `X-Session-Id` | the metadata `sessionId` |
/// | `traceparent`, `tracestate` | the trace context, if it is valid, as W3C Trace Context has it |
///
/// The headers are believed: what stands in front of the service sets them, and removes those that
/// come from outside.
///
/// # Examples
///
/// ```
/// use axum::Router;
/// use axum::routing::post;
/// use eventbus_axum::RequestOrigin;
///
/// async fn take_order(RequestOrigin(origin): RequestOrigin) -> String {
///     // let mut tx = outbox.begin(origin).await?;
///     origin.correlation_id.unwrap_or_default()
/// }
///
/// let routes: Router = Router::new().route("/orders", post(take_order));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(
    clippy::exhaustive_structs,
    reason = "a pattern in the arguments of a handler"
)]
pub struct RequestOrigin(pub Origin);

/// A header that cannot become part of an event: empty, too long, or not visible ASCII characters.
/// As an answer it is 400, with the header's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BadOrigin {
    /// The header, in lower case.
    pub header: &'static str,
}

impl<S: Sync> FromRequestParts<S> for RequestOrigin {
    type Rejection = BadOrigin;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, BadOrigin> {
        let headers = &parts.headers;
        let mut origin = Origin::new();
        origin.correlation_id = read(headers, "x-correlation-id")?;
        if let Some(user_id) = read(headers, "x-user-id")? {
            origin = origin.with_metadata("userId", user_id);
        }
        if let Some(session_id) = read(headers, "x-session-id")? {
            origin = origin.with_metadata("sessionId", session_id);
        }
        // Who gets an invalid trace context begins a trace of its own.
        if let Some(traceparent) = text(headers, "traceparent").filter(|text| is_traceparent(text))
        {
            origin = origin.with_traceparent(traceparent);
            let tracestate = text(headers, "tracestate");
            if let Some(tracestate) = tracestate.filter(|text| text.len() <= TRACESTATE_LENGTH_MAX)
            {
                origin = origin.with_tracestate(tracestate);
            }
        }
        Ok(Self(origin))
    }
}

fn read(headers: &HeaderMap, header: &'static str) -> Result<Option<String>, BadOrigin> {
    if !headers.contains_key(header) {
        return Ok(None);
    }
    match text(headers, header) {
        Some(text) if (1..=LENGTH_MAX).contains(&text.len()) => Ok(Some(text.to_owned())),
        _ => Err(BadOrigin { header }),
    }
}

fn text<'h>(headers: &'h HeaderMap, header: &str) -> Option<&'h str> {
    headers.get(header).and_then(|value| value.to_str().ok())
}

/// Whether it is `version-traceid-parentid-flags` in lower-case hexadecimal digits, of version 00.
fn is_traceparent(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let [version, trace_id, parent_id, flags] = parts[..] else {
        return false;
    };
    let is_hex = |part: &str, length| {
        let mut digits = part.bytes();
        part.len() == length && digits.all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_id =
        |part: &str, length| is_hex(part, length) && part.bytes().any(|digit| digit != b'0');
    version == "00" && is_id(trace_id, 32) && is_id(parent_id, 16) && is_hex(flags, 2)
}

impl fmt::Display for BadOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the header `{}` has 1 to {LENGTH_MAX} visible ASCII characters, or is left out",
            self.header
        )
    }
}

impl std::error::Error for BadOrigin {}

impl IntoResponse for BadOrigin {
    fn into_response(self) -> Response {
        (StatusCode::BAD_REQUEST, self.to_string()).into_response()
    }
}

#[cfg(test)]
mod tests;
