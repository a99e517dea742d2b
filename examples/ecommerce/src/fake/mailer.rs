//! A mail provider that keeps every mail to itself and sends once per idempotency key.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::ledger::Ledger;
use super::{FakeArgs, idempotency_key, serve};
use crate::client::mailer::Mail;

/// How the fake mail provider behaves.
#[derive(Args, Clone, Debug)]
pub struct MailerArgs {
    #[command(flatten)]
    fake: FakeArgs,
}

/// The provider's outbox.
#[derive(Debug, Default)]
pub struct FakeMailer {
    ledger: Ledger<()>,
}

/// What `GET /calls` answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MailerCalls {
    /// Calls in all.
    pub calls: u64,
    /// Calls that repeated a key: they sent nothing.
    pub repeats: u64,
    /// Mails sent.
    pub mails: u64,
    /// Orders mailed under more than one key.
    pub mails_twice: u64,
    /// Calls per key.
    pub keys: BTreeMap<String, u64>,
}

impl FakeMailer {
    /// Sends a mail once per key.
    pub fn call(&mut self, key: &str, mail: &Mail) {
        if self.ledger.called(key) {
            self.ledger.answered(key, ());
            self.ledger.served(mail.order_id);
        }
    }

    /// Everything it was asked.
    pub fn calls(&self) -> MailerCalls {
        let (calls, repeats) = self.ledger.totals();
        MailerCalls {
            calls,
            repeats,
            mails: calls - repeats,
            mails_twice: self.ledger.served_twice(),
            keys: self.ledger.calls().clone(),
        }
    }
}

/// Runs the provider until it is told to stop.
///
/// # Errors
///
/// When the port is taken.
pub async fn run(args: MailerArgs) -> anyhow::Result<()> {
    let mailer = Arc::new(Mutex::new(FakeMailer::default()));
    let routes = Router::new()
        .route("/mails", post(take_mail))
        .route("/calls", get(show_calls))
        .with_state(mailer);
    serve(args.fake.port, routes).await
}

async fn take_mail(
    State(mailer): State<Arc<Mutex<FakeMailer>>>,
    headers: HeaderMap,
    Json(mail): Json<Mail>,
) -> Response {
    let Some(key) = idempotency_key(&headers) else {
        let text = "name the call with an Idempotency-Key header";
        return (StatusCode::BAD_REQUEST, text).into_response();
    };
    lock(&mailer).call(&key, &mail);
    StatusCode::ACCEPTED.into_response()
}

async fn show_calls(State(mailer): State<Arc<Mutex<FakeMailer>>>) -> Json<MailerCalls> {
    Json(lock(&mailer).calls())
}

fn lock(mailer: &Mutex<FakeMailer>) -> std::sync::MutexGuard<'_, FakeMailer> {
    mailer.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::events::OrderId;

    #[test]
    fn a_repeated_key_sends_nothing_and_a_second_key_is_a_second_mail() {
        let mail = Mail {
            order_id: OrderId(Uuid::from_u128(1)),
            to: "ada@example.com".to_owned(),
            subject: "On its way".to_owned(),
            text: String::new(),
        };
        let mut mailer = FakeMailer::default();
        mailer.call("a", &mail);
        mailer.call("a", &mail);
        assert_eq!((mailer.calls().mails, mailer.calls().mails_twice), (1, 0));
        mailer.call("b", &mail);
        assert_eq!((mailer.calls().mails, mailer.calls().mails_twice), (2, 1));
    }
}
