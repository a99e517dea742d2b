//! An order as a client writes it: read, checked, and turned into the event.

use std::collections::HashSet;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use futures_util::StreamExt as _;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::problem::{FieldError, Problem};
use crate::catalogue;
use crate::events::{Cents, Customer, Line, OrderCreated, OrderId};

/// Most bytes an order may have.
const BODY_BYTES_MAX: usize = 64 * 1024;
/// A larger body is read to its end up to here, so that the client gets to read the answer
/// instead of a connection reset.
const DRAINED_BYTES_MAX: usize = 16 * 1024 * 1024;
const ITEMS_MAX: usize = 50;
const QUANTITY_MAX: i64 = 100;
const TEXT_LENGTH_MAX: usize = 254;

/// `POST /orders`.
#[derive(Debug, Serialize, Deserialize)]
pub struct OrderForm {
    customer: Customer,
    card: String,
    items: Vec<Item>,
}

/// One thing ordered. The quantity is wide enough to read whatever number a client writes.
#[derive(Debug, Serialize, Deserialize)]
struct Item {
    product: String,
    quantity: i64,
}

impl OrderForm {
    /// Reads a body as JSON of the right shape.
    pub async fn read(headers: &HeaderMap, body: Body) -> Result<Self, Problem> {
        if !is_json(headers) {
            return Err(Problem::not_json());
        }
        let bytes = read_bytes(headers, body).await?;
        let mut json = serde_json::Deserializer::from_slice(&bytes);
        let form = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let pointer = pointer(error.path());
            let cause = error.into_inner();
            match cause.is_data() {
                true => Problem::invalid_order(vec![FieldError::new(pointer, cause.to_string())]),
                false => Problem::malformed_json(&cause),
            }
        })?;
        json.end()
            .map_err(|error| Problem::malformed_json(&error))?;
        Ok(form)
    }

    /// Finds everything that is wrong with it.
    pub fn check(&self) -> Result<(), Problem> {
        let mut errors = Vec::new();
        let mut wrong = |pointer: String, detail: String| {
            errors.push(FieldError::new(pointer, detail));
        };
        if !is_text(&self.customer.name) {
            wrong("#/customer/name".to_owned(), text_rule());
        }
        if !is_text(&self.customer.email) || !self.customer.email.contains('@') {
            let detail = format!("an address with an @, {}", text_rule());
            wrong("#/customer/email".to_owned(), detail);
        }
        if !is_token(&self.card) {
            let detail = "a card token such as tok_4242, never a card number".to_owned();
            wrong("#/card".to_owned(), detail);
        }
        if !(1..=ITEMS_MAX).contains(&self.items.len()) {
            wrong("#/items".to_owned(), format!("1 to {ITEMS_MAX} items"));
        }
        let mut products = HashSet::new();
        for (index, item) in self.items.iter().enumerate().take(ITEMS_MAX) {
            if catalogue::find(&item.product).is_none() {
                let detail = "not a product of this shop".to_owned();
                wrong(format!("#/items/{index}/product"), detail);
            } else if !products.insert(&item.product) {
                let detail = "the product stands here twice: add up the quantities".to_owned();
                wrong(format!("#/items/{index}/product"), detail);
            }
            if !(1..=QUANTITY_MAX).contains(&item.quantity) {
                let detail = format!("1 to {QUANTITY_MAX} pieces");
                wrong(format!("#/items/{index}/quantity"), detail);
            }
        }
        match errors.is_empty() {
            true => Ok(()),
            false => Err(Problem::invalid_order(errors)),
        }
    }

    /// The event of a form that was checked.
    pub fn into_order(self, order_id: OrderId) -> OrderCreated {
        let lines: Vec<Line> = self
            .items
            .into_iter()
            .map(|item| Line {
                product: item.product,
                quantity: u32::try_from(item.quantity).unwrap_or(0),
            })
            .collect();
        OrderCreated {
            order_id,
            customer: self.customer,
            total: total(&lines),
            lines,
            card: self.card,
        }
    }

    /// The same for the same order, however its JSON was written.
    pub fn fingerprint(&self) -> Uuid {
        let canonical = serde_json::to_vec(self).expect("texts and numbers have a JSON form");
        Uuid::new_v5(&Uuid::NAMESPACE_OID, &canonical)
    }
}

/// What the lines cost; a product that is not on offer costs nothing.
fn total(lines: &[Line]) -> Cents {
    lines
        .iter()
        .filter_map(|line| {
            let product = catalogue::find(&line.product)?;
            Some(Cents(product.price.0 * u64::from(line.quantity)))
        })
        .sum()
}

fn is_json(headers: &HeaderMap) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE);
    let content_type = content_type.and_then(|value| value.to_str().ok());
    let essence = content_type.and_then(|value| value.split(';').next());
    essence.is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json"))
}

async fn read_bytes(headers: &HeaderMap, body: Body) -> Result<Vec<u8>, Problem> {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let waits = headers.contains_key(header::EXPECT);
    if announced.is_some_and(|length| length > BODY_BYTES_MAX as u64 && waits) {
        // The client asked before sending: it need not send at all.
        return Err(Problem::too_large(BODY_BYTES_MAX));
    }
    let mut bytes = Vec::new();
    let mut length = 0;
    let mut parts = body.into_data_stream();
    while let Some(part) = parts.next().await {
        let part = part.map_err(|_| Problem::broken_body())?;
        length += part.len();
        if length > DRAINED_BYTES_MAX {
            break;
        }
        if length <= BODY_BYTES_MAX {
            bytes.extend_from_slice(&part);
        }
    }
    match length <= BODY_BYTES_MAX {
        true => Ok(bytes),
        false => Err(Problem::too_large(BODY_BYTES_MAX)),
    }
}

/// The place of a wrong value as a JSON pointer in a URI fragment (RFC 6901).
fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;

    let mut pointer = String::from("#");
    for segment in path {
        match segment {
            Segment::Seq { index } => pointer.push_str(&format!("/{index}")),
            Segment::Map { key } => {
                pointer.push('/');
                pointer.push_str(&key.replace('~', "~0").replace('/', "~1"));
            }
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    pointer
}

fn is_text(text: &str) -> bool {
    (1..=TEXT_LENGTH_MAX).contains(&text.len()) && !text.chars().any(char::is_control)
}

fn text_rule() -> String {
    format!("1 to {TEXT_LENGTH_MAX} bytes without control characters")
}

fn is_token(card: &str) -> bool {
    let token = card.strip_prefix("tok_").unwrap_or_default();
    (1..=60).contains(&token.len()) && token.bytes().all(|byte| byte.is_ascii_alphanumeric())
}
