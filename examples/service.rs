//! A whole service: it takes orders over HTTP, two consumers work on them, `/readyz` says how it is,
//! and a signal stops all of it in order without losing a thing.
//!
//! `cargo run --example service --features axum`

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::put;
use eventbus::prelude::*;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", key = "order_id")]
struct OrderCreated {
    order_id: u64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "PaymentProcessed", topic = "payment-events", key = "order_id")]
struct PaymentProcessed {
    order_id: u64,
}

async fn take(State(bus): State<EventBus>, Path(order_id): Path<u64>) -> StatusCode {
    match bus.publish(OrderCreated { order_id }).await {
        Ok(_) => StatusCode::ACCEPTED,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

async fn charge(order: OrderCreated, cx: Context) -> Result<(), BoxError> {
    println!("charging order {}", order.order_id);
    cx.publish(PaymentProcessed {
        order_id: order.order_id,
    })?;
    Ok(())
}

async fn mail(payment: PaymentProcessed, _: Context) -> Result<(), BoxError> {
    println!("mailing the receipt of order {}", payment.order_id);
    Ok(())
}

#[tokio::main]
async fn main() -> eventbus::Result<()> {
    let bus = EventBus::connect("memory:").await?;
    let payments = bus.consumer("payments").on(charge).spawn().await?;
    let receipts = bus.consumer("receipts").on(mail).spawn().await?;

    let service = bus.service("shop").consumer(payments).consumer(receipts);
    let routes = Router::new()
        .route("/orders/{id}", put(take))
        .with_state(bus.clone())
        .merge(eventbus::health::router(&service.handle()));

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    service
        .server("http", |stop| {
            axum::serve(listener, routes).with_graceful_shutdown(stop)
        })
        // In a service of your own: `.run_until(shutdown_signal())`.
        .run_until(async {
            println!("{}", ask(address, "PUT /orders/42").await);
            println!("{}", ask(address, "GET /readyz").await);
        })
        .await
}

/// What a customer and an orchestrator would do; ends this program.
async fn ask(address: std::net::SocketAddr, request: &str) -> String {
    let mut server = TcpStream::connect(address).await.unwrap();
    let request = format!("{request} HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n");
    server.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    server.read_to_string(&mut answer).await.unwrap();
    answer
}
