//! What goes wrong, as clients hear it: `application/problem+json` (RFC 9457).

use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use eventbus::BadOrigin;
use serde::Serialize;
use tracing::error;

use crate::events::OrderId;

/// Says what a path takes (LDP 1.0, section 7.1).
const ACCEPT_POST: HeaderName = HeaderName::from_static("accept-post");

/// A problem and what the client can do about it.
#[derive(Debug)]
pub struct Problem(Box<Details>);

#[derive(Debug, Serialize)]
struct Details {
    /// A URI that stands for this kind of problem; nobody has to be able to open it.
    #[serde(rename = "type")]
    kind: String,
    title: &'static str,
    #[serde(serialize_with = "number")]
    status: StatusCode,
    detail: String,
    instance: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<FieldError>,
    /// What the answer says besides, as a header.
    #[serde(skip)]
    header: Option<(HeaderName, &'static str)>,
}

/// What is wrong with one value of the body.
#[derive(Debug, Serialize)]
pub struct FieldError {
    pointer: String,
    detail: String,
}

impl FieldError {
    /// The value at `pointer`, such as `#/items/0/quantity`.
    pub fn new(pointer: String, detail: String) -> Self {
        Self { pointer, detail }
    }
}

impl Problem {
    fn new(status: StatusCode, name: &str, title: &'static str, detail: impl Into<String>) -> Self {
        Self(Box::new(Details {
            kind: format!("tag:eventbus-shop.example,2026:{name}"),
            title,
            status,
            detail: detail.into(),
            instance: String::new(),
            errors: Vec::new(),
            header: None,
        }))
    }

    fn with_header(mut self, name: HeaderName, value: &'static str) -> Self {
        self.0.header = Some((name, value));
        self
    }

    /// Says at which request it happened.
    pub fn at(mut self, uri: &Uri) -> Self {
        self.0.instance = uri.path().to_owned();
        self
    }

    /// The order cannot be taken as it is.
    pub fn invalid_order(errors: Vec<FieldError>) -> Self {
        let mut problem = Self::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid-order",
            "The order is not valid",
            "nothing was ordered: mend what `errors` lists and post it again",
        );
        problem.0.errors = errors;
        problem
    }

    /// The body is no JSON.
    pub fn malformed_json(error: &serde_json::Error) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "malformed-json",
            "The body is not JSON",
            error.to_string(),
        )
    }

    /// The body did not arrive whole.
    pub fn broken_body() -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "broken-body",
            "The body did not arrive whole",
            "post the order again",
        )
    }

    /// The body is called something else than JSON.
    pub fn not_json() -> Self {
        let problem = Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "not-json",
            "The body is not called JSON",
            "send `Content-Type: application/json`",
        );
        problem.with_header(ACCEPT_POST, "application/json")
    }

    /// The body is too long.
    pub fn too_large(bytes_max: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "too-large",
            "The body is too large",
            format!("an order has at most {bytes_max} bytes"),
        )
    }

    /// A header is empty, too long, or not text.
    pub fn bad_header(detail: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "bad-header",
            "A header is not valid",
            detail,
        )
    }

    /// The idempotency key stands for another order.
    pub fn key_reused() -> Self {
        Self::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "idempotency-key-reused",
            "The Idempotency-Key stands for another order",
            "post the same body again, or take a new key for a new order",
        )
    }

    /// The database is away: the outcome is unknown, and asking again is safe.
    pub fn unknown_outcome(order_id: OrderId, cause: &anyhow::Error) -> Self {
        error!(%order_id, error = ?cause, "the order could not be looked after");
        let problem = Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "come-again",
            "The shop cannot answer now",
            "come again after the time in Retry-After; an order posted with the same \
             Idempotency-Key will be one order",
        );
        problem.with_header(header::RETRY_AFTER, "1")
    }

    /// There is no such order.
    pub fn no_such_order(id: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "no-such-order",
            "There is no such order",
            format!("no order is called {id:?} here"),
        )
    }

    /// There is no such page.
    pub fn nothing_here() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "nothing-here",
            "There is nothing here",
            "this shop has POST /orders, GET /orders/{id}, GET /livez and GET /readyz",
        )
    }

    /// The page exists, but not for this method.
    pub fn wrong_method(method: &Method) -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "wrong-method",
            "The method is not allowed here",
            format!("{method} is not among the methods of the Allow header"),
        )
    }
}

impl From<BadOrigin> for Problem {
    fn from(bad: BadOrigin) -> Self {
        Self::bad_header(bad.to_string())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self.0).expect("texts and numbers have a JSON form");
        let content_type = (header::CONTENT_TYPE, "application/problem+json");
        let mut response = (self.0.status, [content_type], body).into_response();
        if let Some((name, value)) = self.0.header {
            let value = HeaderValue::from_static(value);
            response.headers_mut().insert(name, value);
        }
        response
    }
}

fn number<S: serde::Serializer>(status: &StatusCode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u16(status.as_u16())
}
