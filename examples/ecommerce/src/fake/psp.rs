//! A payment provider that declines some cards, is busy or slow now and then, and charges once per
//! idempotency key.

use std::collections::BTreeMap;
use std::hash::BuildHasher;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use clap::Args;
use foldhash::fast::FixedState;
use serde::{Deserialize, Serialize};

use super::ledger::Ledger;
use super::{FakeArgs, idempotency_key, not_written, serve};
use crate::client::psp::{Charge, ChargeOutcome};
use crate::events::Cents;

/// How the fake payment provider behaves.
#[derive(Args, Clone, Debug)]
pub struct PspArgs {
    #[command(flatten)]
    fake: FakeArgs,
    /// Which calls it fails at first: the same seed fails the same idempotency keys
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Declines cards whose token ends like this
    #[arg(long, default_value = DECLINED)]
    decline: String,
    /// Is never busy or slow
    #[arg(long)]
    calm: bool,
    /// Refuses calls for cards whose token ends like this, which no asking again helps against
    #[arg(long, value_name = "SUFFIX")]
    refuse: Option<String>,
    /// Looks into calls for cards whose token ends like this first, and never comes to an end
    #[arg(long, value_name = "SUFFIX")]
    review: Option<String>,
}

/// How the tokens of declined cards end.
pub const DECLINED: &str = "0002";

/// Longer than any client waits.
const HANG: Duration = Duration::from_secs(1);

/// What happens to a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// It is answered.
    Answer(ChargeOutcome),
    /// It is charged or declined, but the answer comes too late.
    AnswerLate(ChargeOutcome),
    /// Nothing happens: the provider is busy.
    Busy,
    /// Nothing happens, however often it is asked.
    Refuse,
    /// Nothing happens yet: somebody looks into it.
    Review,
}

/// The provider's books.
#[derive(Debug)]
pub struct FakePsp {
    faults: FixedState,
    decline: String,
    refuse: Option<String>,
    review: Option<String>,
    calm: bool,
    ledger: Ledger<Entry>,
}

/// What the books say of one key.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    outcome: ChargeOutcome,
    amount: Cents,
}

impl Entry {
    /// What was taken.
    fn charged(&self) -> Option<Cents> {
        let charged = matches!(self.outcome, ChargeOutcome::Charged { .. });
        charged.then_some(self.amount)
    }
}

/// What `GET /calls` answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PspCalls {
    /// Calls in all.
    pub calls: u64,
    /// Calls that repeated a key: they charged nothing.
    pub repeats: u64,
    /// What was taken.
    pub charged_cents: u64,
    /// What was given back; this provider never does.
    pub refunded_cents: u64,
    /// Charges declined.
    pub declined: u64,
    /// Orders charged under more than one key.
    pub charges_twice: u64,
    /// Calls per key.
    pub keys: BTreeMap<String, u64>,
}

impl FakePsp {
    /// A provider with the books of `ledger`.
    fn new(seed: u64, decline: &str, ledger: Ledger<Entry>) -> Self {
        Self {
            faults: FixedState::with_seed(seed),
            decline: decline.to_owned(),
            refuse: None,
            review: None,
            calm: false,
            ledger,
        }
    }

    /// Takes a call: the first with its key may meet a busy or slow provider.
    ///
    /// # Errors
    ///
    /// When the ledger cannot be written.
    pub fn call(&mut self, key: &str, charge: &Charge) -> io::Result<Reaction> {
        let is_of = |suffix: &Option<String>| {
            let suffix = suffix.as_deref();
            suffix.is_some_and(|suffix| charge.card.ends_with(suffix))
        };
        if is_of(&self.refuse) {
            return Ok(Reaction::Refuse);
        }
        if is_of(&self.review) {
            return Ok(Reaction::Review);
        }
        let first = self.ledger.called(key)?;
        let roll = self.faults.hash_one(key) % 1000;
        Ok(match (first, roll) {
            (true, 0..15) if !self.calm => Reaction::Busy,
            (true, 15..20) if !self.calm => Reaction::AnswerLate(self.charge(key, charge)?),
            _ => Reaction::Answer(self.charge(key, charge)?),
        })
    }

    /// Charges once per key.
    fn charge(&mut self, key: &str, charge: &Charge) -> io::Result<ChargeOutcome> {
        if let Some(entry) = self.ledger.answer(key) {
            return Ok(entry.outcome);
        }
        let outcome = if charge.card.ends_with(&self.decline) {
            ChargeOutcome::Declined {
                reason: "insufficient funds".to_owned(),
            }
        } else {
            ChargeOutcome::Charged {
                charge_id: format!("ch_{:016x}", self.faults.hash_one(key)),
            }
        };
        let entry = Entry {
            outcome: outcome.clone(),
            amount: charge.amount,
        };
        self.ledger.answered(key, charge.order_id, entry)?;
        Ok(outcome)
    }

    /// Everything it was asked.
    pub fn calls(&self) -> PspCalls {
        let (calls, repeats) = self.ledger.totals();
        let entries = self.ledger.answers().map(|(_, entry)| entry);
        let charged: Vec<Cents> = entries.filter_map(Entry::charged).collect();
        let declined = self.ledger.answers().count() - charged.len();
        PspCalls {
            calls,
            repeats,
            charged_cents: charged.into_iter().sum::<Cents>().0,
            refunded_cents: 0,
            declined: declined as u64,
            charges_twice: self.ledger.served_twice(|entry| entry.charged().is_some()),
            keys: self.ledger.calls().clone(),
        }
    }
}

/// Runs the provider until it is told to stop.
///
/// # Errors
///
/// When the port is taken, or the ledger in use.
pub async fn run(args: PspArgs) -> anyhow::Result<()> {
    let ledger = Ledger::open(args.fake.ledger.as_deref())?;
    let mut psp = FakePsp::new(args.seed, &args.decline, ledger);
    psp.refuse = args.refuse;
    psp.review = args.review;
    psp.calm = args.calm;
    let psp = Arc::new(Mutex::new(psp));
    let routes = Router::new()
        .route("/charges", post(take_charge))
        .route("/calls", get(show_calls))
        .with_state(psp);
    serve(args.fake.port, routes).await
}

async fn take_charge(
    State(psp): State<Arc<Mutex<FakePsp>>>,
    headers: HeaderMap,
    Json(charge): Json<Charge>,
) -> Response {
    let Some(key) = idempotency_key(&headers) else {
        let text = "name the call with an Idempotency-Key header";
        return (StatusCode::BAD_REQUEST, text).into_response();
    };
    let reaction = lock(&psp).call(&key, &charge);
    match reaction {
        Err(error) => not_written(&error),
        Ok(Reaction::Answer(outcome)) => answer(outcome),
        Ok(Reaction::AnswerLate(outcome)) => {
            tokio::time::sleep(HANG).await;
            answer(outcome)
        }
        Ok(Reaction::Refuse) => {
            let text = "this provider does not know such cards";
            (StatusCode::BAD_REQUEST, text).into_response()
        }
        Ok(Reaction::Review) => (StatusCode::LOCKED, "somebody looks into it").into_response(),
        Ok(Reaction::Busy) => {
            let retry = [(header::RETRY_AFTER, "0")];
            (StatusCode::SERVICE_UNAVAILABLE, retry, "busy").into_response()
        }
    }
}

fn answer(outcome: ChargeOutcome) -> Response {
    let status = match &outcome {
        ChargeOutcome::Charged { .. } => StatusCode::CREATED,
        ChargeOutcome::Declined { .. } => StatusCode::PAYMENT_REQUIRED,
    };
    (status, Json(outcome)).into_response()
}

async fn show_calls(State(psp): State<Arc<Mutex<FakePsp>>>) -> Json<PspCalls> {
    Json(lock(&psp).calls())
}

fn lock(psp: &Mutex<FakePsp>) -> std::sync::MutexGuard<'_, FakePsp> {
    psp.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::events::OrderId;

    fn charge(number: u128, card: &str) -> Charge {
        Charge {
            order_id: OrderId(Uuid::from_u128(number)),
            amount: Cents(500),
            card: card.to_owned(),
        }
    }

    fn new_psp() -> FakePsp {
        FakePsp::new(1, DECLINED, Ledger::default())
    }

    /// A key that the seed lets through, and one that it meets with `wanted`.
    fn key_met_with(psp: &mut FakePsp, wanted: impl Fn(&Reaction) -> bool) -> String {
        (0..10_000)
            .map(|number| format!("search/{number}"))
            .find(|key| wanted(&new_psp().call(key, &charge(0, "tok_1")).unwrap()))
            .inspect(|key| assert!(!psp.ledger.calls().contains_key(key)))
            .expect("one key in a thousand is enough")
    }

    #[test]
    fn a_repeated_key_charges_nothing() {
        let mut psp = new_psp();
        let key = key_met_with(&mut psp, |reaction| matches!(reaction, Reaction::Answer(_)));
        let first = psp.call(&key, &charge(1, "tok_4242")).unwrap();
        assert_eq!(psp.call(&key, &charge(1, "tok_4242")).unwrap(), first);
        let calls = psp.calls();
        assert_eq!((calls.calls, calls.repeats), (2, 1));
        assert_eq!((calls.charged_cents, calls.charges_twice), (500, 0));
        assert_eq!(calls.keys[&key], 2);
    }

    #[test]
    fn an_order_charged_under_two_keys_is_charged_twice() {
        let mut psp = new_psp();
        for key in ["a", "b", "a", "b"] {
            psp.call(key, &charge(1, "tok_4242")).unwrap();
        }
        assert_eq!(psp.calls().charges_twice, 1);
        assert_eq!(psp.calls().charged_cents, 1000);
    }

    #[test]
    fn a_busy_provider_charges_nothing_and_a_slow_one_once() {
        let mut psp = new_psp();
        let busy = key_met_with(&mut psp, |reaction| *reaction == Reaction::Busy);
        assert_eq!(
            psp.call(&busy, &charge(1, "tok_1")).unwrap(),
            Reaction::Busy
        );
        assert_eq!(psp.calls().charged_cents, 0);
        assert!(matches!(
            psp.call(&busy, &charge(1, "tok_1")).unwrap(),
            Reaction::Answer(_)
        ));

        let slow = key_met_with(&mut psp, |reaction| {
            matches!(reaction, Reaction::AnswerLate(_))
        });
        let Reaction::AnswerLate(late) = psp.call(&slow, &charge(2, "tok_1")).unwrap() else {
            panic!("the same seed reacts in the same way");
        };
        assert_eq!(
            psp.call(&slow, &charge(2, "tok_1")).unwrap(),
            Reaction::Answer(late)
        );
        assert_eq!(psp.calls().charged_cents, 1000);
    }

    #[test]
    fn a_declined_card_stays_declined() {
        let mut psp = new_psp();
        for _ in 0..2 {
            let reaction = psp.call("a", &charge(1, "tok_0002")).unwrap();
            assert!(matches!(
                reaction,
                Reaction::Answer(ChargeOutcome::Declined { .. })
            ));
        }
        assert_eq!((psp.calls().declined, psp.calls().charged_cents), (1, 0));
    }
}
