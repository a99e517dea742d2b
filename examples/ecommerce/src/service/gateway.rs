//! The gateway: takes orders over HTTP, says where they stand, and publishes `OrderCreated`.
//!
//! ```text
//!  POST /orders ─▶ read, check ─▶ name the order ─▶ publish OrderCreated ─▶ 202 Location: /orders/{id}
//!  GET /orders/{id} ◀─ board ◀─ every event of the order (group "gateway")
//! ```

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use eventbus::prelude::{ConsumerBuilder, Context, EventBus, EventId, Outgoing};
use serde_json::json;
use tokio::time::timeout;
use tracing::error;
use uuid::Uuid;

use crate::events::{
    CancelReason, InventoryReleased, InventoryReserved, InventoryShort, NotificationSent,
    OrderCancelled, OrderCreated, OrderId, OrderShipped, PaymentFailed, PaymentProcessed,
    ShippingCreated,
};

mod board;
mod caller;
mod keys;
mod order_form;
mod problem;
mod server;

pub use board::{Board, Status};
use caller::Caller;
use keys::Keys;
use order_form::OrderForm;
use problem::Problem;
pub use server::Gateway;

/// How long a client waits for the event bus before it is told to come again.
const PUBLISH_WITHIN: Duration = Duration::from_secs(5);

/// What the HTTP handlers share.
#[derive(Debug)]
struct Desk {
    bus: EventBus,
    board: Board,
    keys: Keys,
}

fn routes(bus: EventBus, board: Board) -> Router {
    let desk = Desk {
        bus,
        board,
        keys: Keys::default(),
    };
    Router::new()
        .route("/orders", post(take_order))
        .route("/orders/{id}", get(show_order))
        .route("/health", get(show_health))
        .fallback(nothing_here)
        .method_not_allowed_fallback(wrong_method)
        .with_state(Arc::new(desk))
}

async fn take_order(
    State(desk): State<Arc<Desk>>,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let accepted = desk.accept(&headers, body).await;
    let order_id = accepted.map_err(|problem| problem.at(&uri))?;
    let location = format!("/orders/{order_id}");
    let answer = json!({ "order_id": order_id, "status": Status::Placed, "href": location });
    Ok((
        StatusCode::ACCEPTED,
        [(header::LOCATION, location)],
        Json(answer),
    )
        .into_response())
}

impl Desk {
    /// Takes an order: everything is checked before anything is published.
    async fn accept(&self, headers: &HeaderMap, body: Body) -> Result<OrderId, Problem> {
        let caller = Caller::of(headers)?;
        let form = OrderForm::read(headers, body).await?;
        form.check()?;
        let order_id = match &caller.idempotency_key {
            Some(key) => self.keys.order_id(&caller.user_id, key, &form)?,
            None => OrderId(Uuid::now_v7()),
        };
        self.publish(form.into_order(order_id), &caller).await?;
        self.board.placed(order_id);
        Ok(order_id)
    }

    /// Publishes the order under an id made from its number: an order that is posted again is the
    /// same event again, which every service recognises.
    async fn publish(&self, order: OrderCreated, caller: &Caller) -> Result<(), Problem> {
        let order_id = order.order_id;
        let event = Outgoing::new(order)
            .with_id(EventId::from_name(&format!("OrderCreated/{order_id}")))
            .with_origin(caller.origin());
        match timeout(PUBLISH_WITHIN, self.bus.publish(event)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(cause)) => {
                error!(%order_id, error = ?cause, "the order could not be published");
                Err(Problem::come_again())
            }
            Err(_) => {
                error!(%order_id, "the event bus did not answer in time");
                Err(Problem::come_again())
            }
        }
    }
}

async fn show_order(
    State(desk): State<Arc<Desk>>,
    uri: Uri,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let order_id = Uuid::parse_str(&id).ok().map(OrderId);
    let found = order_id.and_then(|order_id| Some((order_id, desk.board.find(order_id)?)));
    match found {
        Some((order_id, order)) => Ok(Json(json!({
            "order_id": order_id,
            "status": order.status,
            "reason": order.reason,
            "tracking": order.tracking,
        }))
        .into_response()),
        None => Err(Problem::no_such_order(&id).at(&uri)),
    }
}

async fn show_health() -> Json<serde_json::Value> {
    Json(json!({ "status": "up" }))
}

async fn nothing_here(uri: Uri) -> Problem {
    Problem::nothing_here().at(&uri)
}

async fn wrong_method(method: Method, uri: Uri) -> Problem {
    Problem::wrong_method(&method).at(&uri)
}

/// Wires what keeps the board up to date.
pub fn consumer(bus: &EventBus, board: Board) -> ConsumerBuilder<Board> {
    bus.consumer("gateway")
        .state(board)
        .on(async |order: OrderCreated, cx: Context<Board>| {
            cx.state().reached(order.order_id, Status::Placed);
            Ok(())
        })
        .on(async |reserved: InventoryReserved, cx: Context<Board>| {
            cx.state().reached(reserved.order_id, Status::Reserved);
            Ok(())
        })
        .on(async |short: InventoryShort, cx: Context<Board>| {
            let reason = CancelReason::OutOfStock;
            cx.state().failed(short.order_id, reason);
            Ok(())
        })
        .on(async |released: InventoryReleased, cx: Context<Board>| {
            cx.state().released(released.order_id);
            Ok(())
        })
        .on(async |paid: PaymentProcessed, cx: Context<Board>| {
            cx.state().reached(paid.order_id, Status::Paid);
            Ok(())
        })
        .on(async |failed: PaymentFailed, cx: Context<Board>| {
            let reason = CancelReason::PaymentDeclined;
            cx.state().failed(failed.order_id, reason);
            Ok(())
        })
        .on(async |parcel: ShippingCreated, cx: Context<Board>| {
            cx.state().packed(parcel.order_id, parcel.tracking);
            Ok(())
        })
        .on(async |sent: NotificationSent, cx: Context<Board>| {
            cx.state().told(sent.order_id);
            Ok(())
        })
        .on(async |order: OrderShipped, cx: Context<Board>| {
            cx.state().reached(order.order_id, Status::Shipped);
            Ok(())
        })
        .on(async |order: OrderCancelled, cx: Context<Board>| {
            cx.state().failed(order.order_id, order.reason);
            cx.state().reached(order.order_id, Status::Cancelled);
            Ok(())
        })
}

#[cfg(test)]
mod tests;
