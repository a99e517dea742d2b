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

pub use board::{Board, OrderView, Status};
use caller::Caller;
use keys::Keys;
use order_form::OrderForm;
use problem::Problem;

/// How long a client waits for the event bus before it is told to come again.
const PUBLISH_WITHIN: Duration = Duration::from_secs(5);

/// What the HTTP handlers share.
#[derive(Debug)]
struct Desk {
    bus: EventBus,
    board: Board,
    keys: Keys,
}

/// What clients may ask of the gateway.
pub fn routes(bus: EventBus, board: Board) -> Router {
    let keys = board.keys();
    let desk = Desk { bus, board, keys };
    Router::new()
        .route("/orders", post(take_order))
        .route("/orders/{id}", get(show_order))
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
            Some(key) => self.keys.order_id(&caller.user_id, key, &form).await?,
            None => OrderId(Uuid::now_v7()),
        };
        self.publish(form.into_order(order_id), &caller).await?;
        let placed = self.board.placed(order_id).await;
        placed.map_err(|cause| Problem::unknown_outcome(order_id, &cause))?;
        Ok(order_id)
    }

    /// Publishes the order under an id made from its number: an order that is posted again is the
    /// same event again, which every service recognises.
    async fn publish(&self, order: OrderCreated, caller: &Caller) -> Result<(), Problem> {
        let order_id = order.order_id;
        let event = Outgoing::new(order)
            .with_id(EventId::from_name(&format!("OrderCreated/{order_id}")))
            .with_origin(caller.origin());
        let published = timeout(PUBLISH_WITHIN, self.bus.publish(event)).await;
        let published = match published {
            Ok(published) => published.map_err(anyhow::Error::new),
            Err(late) => Err(anyhow::Error::new(late)),
        };
        published.map_err(|cause| Problem::unknown_outcome(order_id, &cause))?;
        Ok(())
    }

    /// The order on the board that a client calls `id`.
    async fn find(&self, id: &str) -> Result<(OrderId, OrderView), Problem> {
        let order_id = Uuid::parse_str(id).map(OrderId);
        let order_id = order_id.map_err(|_| Problem::no_such_order(id))?;
        let found = self.board.find(order_id).await;
        let found = found.map_err(|cause| Problem::unknown_outcome(order_id, &cause))?;
        let order = found.ok_or_else(|| Problem::no_such_order(id))?;
        Ok((order_id, order))
    }
}

async fn show_order(
    State(desk): State<Arc<Desk>>,
    uri: Uri,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let found = desk.find(&id).await;
    let (order_id, order) = found.map_err(|problem| problem.at(&uri))?;
    Ok(Json(json!({
        "order_id": order_id,
        "status": order.status,
        "reason": order.reason,
        "tracking": order.tracking,
    }))
    .into_response())
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
            let change = |order: &mut OrderView| order.reach(Status::Placed);
            Ok(cx.state().hear(&order, &cx, order.order_id, change).await?)
        })
        .on(async |reserved: InventoryReserved, cx: Context<Board>| {
            let change = |order: &mut OrderView| order.reach(Status::Reserved);
            Ok(cx
                .state()
                .hear(&reserved, &cx, reserved.order_id, change)
                .await?)
        })
        .on(async |short: InventoryShort, cx: Context<Board>| {
            let change = |order: &mut OrderView| order.fail(CancelReason::OutOfStock);
            Ok(cx.state().hear(&short, &cx, short.order_id, change).await?)
        })
        .on(async |released: InventoryReleased, cx: Context<Board>| {
            let change = OrderView::release;
            Ok(cx
                .state()
                .hear(&released, &cx, released.order_id, change)
                .await?)
        })
        .on(async |paid: PaymentProcessed, cx: Context<Board>| {
            let change = |order: &mut OrderView| order.reach(Status::Paid);
            Ok(cx.state().hear(&paid, &cx, paid.order_id, change).await?)
        })
        .on(async |failed: PaymentFailed, cx: Context<Board>| {
            let change = |order: &mut OrderView| order.fail(CancelReason::PaymentDeclined);
            Ok(cx
                .state()
                .hear(&failed, &cx, failed.order_id, change)
                .await?)
        })
        .on(async |parcel: ShippingCreated, cx: Context<Board>| {
            let change = |order: &mut OrderView| order.pack(&parcel.tracking);
            Ok(cx
                .state()
                .hear(&parcel, &cx, parcel.order_id, change)
                .await?)
        })
        .on(async |sent: NotificationSent, cx: Context<Board>| {
            let change = OrderView::tell;
            Ok(cx.state().hear(&sent, &cx, sent.order_id, change).await?)
        })
        .on(async |order: OrderShipped, cx: Context<Board>| {
            let change = |order: &mut OrderView| order.reach(Status::Shipped);
            Ok(cx.state().hear(&order, &cx, order.order_id, change).await?)
        })
        .on(async |cancelled: OrderCancelled, cx: Context<Board>| {
            let change = |order: &mut OrderView| {
                order.fail(cancelled.reason);
                order.reach(Status::Cancelled);
            };
            Ok(cx
                .state()
                .hear(&cancelled, &cx, cancelled.order_id, change)
                .await?)
        })
}

#[cfg(test)]
mod tests;
