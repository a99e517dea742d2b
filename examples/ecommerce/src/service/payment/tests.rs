//! The rules of the payment service.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use eventbus::prelude::Consumer;
use eventbus_testkit::TestBus;

use super::{consumer, open};
use crate::client::ProviderError;
use crate::client::psp::{Charge, ChargeOutcome, PaymentProvider};
use crate::events::{Cents, PaymentFailed, PaymentProcessed};
use crate::service::sample::{TestData, on_each_store, publish_twice, reserved, serve, test_bus};

/// A provider that is away for the first calls, or refuses, and declines `tok_0002`.
#[derive(Clone, Debug, Default)]
struct Psp {
    away: usize,
    refuses: bool,
    calls: Arc<Mutex<Vec<(String, Charge)>>>,
}

impl Psp {
    fn keys(&self) -> Vec<String> {
        let calls = self.calls.lock().unwrap();
        calls.iter().map(|(key, _)| key.clone()).collect()
    }
}

#[async_trait]
impl PaymentProvider for Psp {
    async fn charge(&self, charge: &Charge, key: &str) -> Result<ChargeOutcome, ProviderError> {
        let mut calls = self.calls.lock().unwrap();
        calls.push((key.to_owned(), charge.clone()));
        if calls.len() <= self.away {
            return Err(ProviderError::Away("503 busy".into()));
        }
        if self.refuses {
            return Err(ProviderError::Refused("400 what?".to_owned()));
        }
        Ok(match charge.card == "tok_0002" {
            true => ChargeOutcome::Declined {
                reason: "insufficient funds".to_owned(),
            },
            false => ChargeOutcome::Charged {
                charge_id: "ch_7".to_owned(),
            },
        })
    }
}

async fn run(bus: &TestBus, data: &TestData, psp: &Psp) -> Consumer {
    let database = open(data.databases()).await.unwrap();
    let psp = Arc::new(psp.clone());
    serve(bus, &database, consumer(bus, database.clone(), psp)).await
}

on_each_store!(
    what_is_set_aside_is_charged,
    a_declined_card_is_news_and_not_an_error,
    a_provider_that_is_away_is_asked_again_with_the_same_key,
    an_event_delivered_twice_is_charged_once,
    a_refused_call_needs_a_person,
);

async fn what_is_set_aside_is_charged(data: TestData) {
    let (bus, psp) = (test_bus(), Psp::default());
    let _payment = run(&bus, &data, &psp).await;
    bus.publish(reserved(1)).await.unwrap();
    bus.settled().await;
    let paid = bus.published::<PaymentProcessed>().await;
    assert_eq!(paid.len(), 1);
    assert_eq!(
        (paid[0].amount, paid[0].charge_id.as_str()),
        (Cents(500), "ch_7")
    );
}

async fn a_declined_card_is_news_and_not_an_error(data: TestData) {
    let (bus, psp) = (test_bus(), Psp::default());
    let _payment = run(&bus, &data, &psp).await;
    let mut order = reserved(1);
    order.card = "tok_0002".to_owned();
    bus.publish(order).await.unwrap();
    bus.settled().await;
    assert_eq!(
        bus.published::<PaymentFailed>().await[0].reason,
        "insufficient funds"
    );
    assert!(bus.published::<PaymentProcessed>().await.is_empty());
    assert_eq!(psp.keys().len(), 1);
}

async fn a_provider_that_is_away_is_asked_again_with_the_same_key(data: TestData) {
    let psp = Psp {
        away: 3,
        ..Psp::default()
    };
    let bus = test_bus();
    let _payment = run(&bus, &data, &psp).await;
    bus.publish(reserved(1)).await.unwrap();
    bus.run_out().await;
    assert_eq!(bus.published::<PaymentProcessed>().await.len(), 1);
    let keys = psp.keys();
    assert_eq!(keys.len(), 4);
    assert!(keys.iter().all(|key| *key == keys[0]), "{keys:?}");
}

async fn an_event_delivered_twice_is_charged_once(data: TestData) {
    let (bus, psp) = (test_bus(), Psp::default());
    let _payment = run(&bus, &data, &psp).await;
    publish_twice(&bus, reserved(1)).await;
    assert_eq!(psp.keys().len(), 1);
    assert_eq!(bus.published::<PaymentProcessed>().await.len(), 1);
}

async fn a_refused_call_needs_a_person(data: TestData) {
    let psp = Psp {
        refuses: true,
        ..Psp::default()
    };
    let bus = test_bus();
    let _payment = run(&bus, &data, &psp).await;
    bus.publish(reserved(1)).await.unwrap();
    bus.settled().await;
    assert_eq!(psp.keys().len(), 1);
    assert_eq!(bus.dead_letters().await.len(), 1);
}
