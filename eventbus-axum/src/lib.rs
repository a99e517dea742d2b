#![doc = include_str!("../README.md")]
#![warn(clippy::unwrap_used, clippy::print_stdout)]

use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use eventbus_core::{
    BrokerHealth, ConsumerHealth, ConsumerState, ServiceHandle, ServiceHealth, ServiceState,
};
use serde_json::{Value, json};

mod origin;

pub use origin::{BadOrigin, RequestOrigin};

/// Answers `/livez` and `/readyz` for the service of this handle.
pub fn router(service: &ServiceHandle) -> Router {
    Router::new()
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .with_state(service.clone())
}

async fn live(State(service): State<ServiceHandle>) -> Json<Value> {
    Json(json!({ "alive": true, "state": state(&service.state()) }))
}

async fn ready(State(service): State<ServiceHandle>) -> (StatusCode, Json<Value>) {
    let health = service.health().await;
    let status = match health.is_ready() {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, Json(detail(&health)))
}

fn detail(health: &ServiceHealth) -> Value {
    json!({
        "service": &*health.service,
        "state": state(&health.state),
        "ready": health.is_ready(),
        "reasons": health.reasons(),
        "concerns": health.concerns(),
        "brokers": health.brokers.iter().map(broker).collect::<Vec<_>>(),
        "consumers": health.consumers.iter().map(consumer).collect::<Vec<_>>(),
    })
}

fn state(state: &ServiceState) -> &'static str {
    match state {
        ServiceState::Starting => "starting",
        ServiceState::Running => "running",
        ServiceState::Stopping { .. } => "stopping",
        ServiceState::Stopped => "stopped",
        _ => "unknown",
    }
}

fn broker(broker: &BrokerHealth) -> Value {
    json!({
        "system": broker.system,
        "up": broker.error.is_none(),
        "took_ms": milliseconds(broker.took),
        "error": broker.error,
    })
}

fn consumer(consumer: &ConsumerHealth) -> Value {
    let status = &consumer.status;
    let (state, reason) = match &status.state {
        ConsumerState::Running => ("running", None),
        ConsumerState::Paused => ("paused", None),
        ConsumerState::Holding { reason } => ("holding", Some(reason)),
        ConsumerState::Failed { error } => ("failed", Some(error)),
        _ => ("unknown", None),
    };
    let oldest = status.lanes.iter().filter_map(|lane| lane.oldest_age).max();
    json!({
        "group": consumer.group.as_str(),
        "topics": consumer.topics.iter().map(|topic| topic.as_str()).collect::<Vec<_>>(),
        "state": state,
        "reason": reason,
        "lanes": status.lanes.len(),
        "in_flight": status.lanes.iter().map(|lane| lane.in_flight).sum::<usize>(),
        "oldest_age_ms": oldest.map(milliseconds),
        "held": status.held,
        "handled": status.counts.handled,
        "dead_lettered": status.counts.dead_lettered,
    })
}

/// To the hundredth.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 100_000.0).round() / 100.0
}
