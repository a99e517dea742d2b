//! A mail provider that keeps every mail to itself and sends once per idempotency key.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::ledger::Ledger;
use super::{FakeArgs, idempotency_key, not_written, serve};
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
    ledger: Ledger<Sent>,
}

/// All that the provider says of a mail: it went out.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Sent;

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
    ///
    /// # Errors
    ///
    /// When the ledger cannot be written.
    pub fn call(&mut self, key: &str, mail: &Mail) -> io::Result<()> {
        self.ledger.called(key)?;
        match self.ledger.answer(key) {
            Some(Sent) => Ok(()),
            None => self.ledger.answered(key, mail.order_id, Sent),
        }
    }

    /// Everything it was asked.
    pub fn calls(&self) -> MailerCalls {
        let (calls, repeats) = self.ledger.totals();
        MailerCalls {
            calls,
            repeats,
            mails: self.ledger.answers().count() as u64,
            mails_twice: self.ledger.served_twice(|Sent| true),
            keys: self.ledger.calls().clone(),
        }
    }
}

/// Runs the provider until it is told to stop.
///
/// # Errors
///
/// When the port is taken, or the ledger in use.
pub async fn run(args: MailerArgs) -> anyhow::Result<()> {
    let mailer = Arc::new(Mutex::new(FakeMailer {
        ledger: Ledger::open(args.fake.ledger.as_deref())?,
    }));
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
    match lock(&mailer).call(&key, &mail) {
        Ok(()) => StatusCode::ACCEPTED.into_response(),
        Err(error) => not_written(&error),
    }
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
        mailer.call("a", &mail).unwrap();
        mailer.call("a", &mail).unwrap();
        assert_eq!((mailer.calls().mails, mailer.calls().mails_twice), (1, 0));
        mailer.call("b", &mail).unwrap();
        assert_eq!((mailer.calls().mails, mailer.calls().mails_twice), (2, 1));
    }
}
