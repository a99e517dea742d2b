//! The gateway: takes orders over HTTP, says where they stand, and publishes `OrderCreated`.
//!
//! ```text
//!  POST /orders ─▶ read, check ─▶ name the order ─▶ [ order, OrderCreated ] ─▶ 202 Location: /orders/{id}
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
use eventbus::prelude::{ConsumerBuilder, Context, EventBus, Origin};
use eventbus::{BadOrigin, RequestOrigin};
use serde_json::json;
use tokio::time::timeout;
use uuid::Uuid;

use crate::database::{Database, Outbox};
use crate::events::{
    CancelReason, InventoryReleased, InventoryReserved, InventoryShort, NotificationSent,
    OrderCancelled, OrderCreated, OrderId, OrderShipped, PaymentFailed, PaymentProcessed,
    ShippingCreated,
};

mod board;
mod keys;
mod order_form;
mod problem;

pub use board::{Board, OrderView, Status};
use board::{Placed, hear};
use order_form::OrderForm;
use problem::Problem;

/// How long a client waits for the database before it is told to come again.
const PLACE_WITHIN: Duration = Duration::from_secs(5);

/// What the HTTP handlers share.
#[derive(Debug)]
struct Desk {
    outbox: Outbox,
    board: Board,
}

/// What clients may ask of the gateway.
pub fn routes(bus: &EventBus, board: Board) -> Router {
    let outbox = board.database().outbox(bus);
    Router::new()
        .route("/orders", post(take_order))
        .route("/orders/{id}", get(show_order))
        .fallback(nothing_here)
        .method_not_allowed_fallback(wrong_method)
        .with_state(Arc::new(Desk { outbox, board }))
}

async fn take_order(
    State(desk): State<Arc<Desk>>,
    uri: Uri,
    headers: HeaderMap,
    origin: Result<RequestOrigin, BadOrigin>,
    body: Body,
) -> Result<Response, Problem> {
    let accepted = desk.accept(origin, &headers, body).await;
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
    /// Takes an order: everything is checked before anything is written.
    async fn accept(
        &self,
        origin: Result<RequestOrigin, BadOrigin>,
        headers: &HeaderMap,
        body: Body,
    ) -> Result<OrderId, Problem> {
        let RequestOrigin(origin) = origin?;
        let user_id = origin.metadata.get("userId").map(String::as_str);
        let order_id = keys::order_id(headers, user_id)?;
        let form = OrderForm::read(headers, body).await?;
        form.check()?;
        let placed = timeout(PLACE_WITHIN, self.place(order_id, form, origin)).await;
        let placed = placed.unwrap_or_else(|late| Err(late.into()));
        match placed.map_err(|cause| Problem::unknown_outcome(order_id, &cause))? {
            true => Ok(order_id),
            false => Err(Problem::key_reused()),
        }
    }

    /// Writes the order and its event in one transaction, unless it was placed before; false when
    /// that was another one.
    async fn place(
        &self,
        order_id: OrderId,
        form: OrderForm,
        origin: Origin,
    ) -> anyhow::Result<bool> {
        let fingerprint = form.fingerprint();
        let mut tx = self.outbox.begin(origin).await?;
        match board::place(&mut tx.tx(), order_id, fingerprint).await? {
            Placed::Before => return Ok(true),
            Placed::Otherwise => return Ok(false),
            Placed::Now => {}
        }
        tx.publish(form.into_order(order_id))?;
        tx.commit().await?;
        Ok(true)
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
pub fn consumer(bus: &EventBus, board: &Board) -> ConsumerBuilder<(), Database> {
    bus.consumer("gateway")
        .unit(board.database().clone())
        .on(async |order: OrderCreated, mut cx: Context<(), Database>| {
            let change = |order: &mut OrderView| order.reach(Status::Placed);
            hear(&order, &mut cx, order.order_id, change).await
        })
        .on(
            async |reserved: InventoryReserved, mut cx: Context<(), Database>| {
                let change = |order: &mut OrderView| order.reach(Status::Reserved);
                hear(&reserved, &mut cx, reserved.order_id, change).await
            },
        )
        .on(
            async |short: InventoryShort, mut cx: Context<(), Database>| {
                let change = |order: &mut OrderView| order.fail(CancelReason::OutOfStock);
                hear(&short, &mut cx, short.order_id, change).await
            },
        )
        .on(
            async |released: InventoryReleased, mut cx: Context<(), Database>| {
                hear(&released, &mut cx, released.order_id, OrderView::release).await
            },
        )
        .on(
            async |paid: PaymentProcessed, mut cx: Context<(), Database>| {
                let change = |order: &mut OrderView| order.reach(Status::Paid);
                hear(&paid, &mut cx, paid.order_id, change).await
            },
        )
        .on(
            async |failed: PaymentFailed, mut cx: Context<(), Database>| {
                let change = |order: &mut OrderView| order.fail(CancelReason::PaymentDeclined);
                hear(&failed, &mut cx, failed.order_id, change).await
            },
        )
        .on(
            async |parcel: ShippingCreated, mut cx: Context<(), Database>| {
                let change = |order: &mut OrderView| order.pack(&parcel.tracking);
                hear(&parcel, &mut cx, parcel.order_id, change).await
            },
        )
        .on(
            async |sent: NotificationSent, mut cx: Context<(), Database>| {
                hear(&sent, &mut cx, sent.order_id, OrderView::tell).await
            },
        )
        .on(async |order: OrderShipped, mut cx: Context<(), Database>| {
            let change = |order: &mut OrderView| order.reach(Status::Shipped);
            hear(&order, &mut cx, order.order_id, change).await
        })
        .on(
            async |cancelled: OrderCancelled, mut cx: Context<(), Database>| {
                let change = |order: &mut OrderView| {
                    order.fail(cancelled.reason);
                    order.reach(Status::Cancelled);
                };
                hear(&cancelled, &mut cx, cancelled.order_id, change).await
            },
        )
}

#[cfg(test)]
mod tests;
