//! The rules of the notification service.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use eventbus::prelude::Consumer;
use eventbus_testkit::TestBus;

use super::{consumer, open};
use crate::client::ProviderError;
use crate::client::mailer::{Mail, Mailer};
use crate::events::{CancelReason, Notice, NotificationSent};
use crate::service::sample::{
    TestData, cancelled, customer, on_each_store, packed, publish_twice, serve, test_bus,
};

/// Keeps what it is given, and is away for the first calls.
#[derive(Clone, Debug, Default)]
struct Outbox {
    away: usize,
    calls: Arc<Mutex<Vec<(String, Mail)>>>,
}

impl Outbox {
    fn calls(&self) -> Vec<(String, Mail)> {
        self.calls.lock().unwrap().clone()
    }
}

#[async_trait]
impl Mailer for Outbox {
    async fn send(&self, mail: &Mail, key: &str) -> Result<(), ProviderError> {
        let mut calls = self.calls.lock().unwrap();
        calls.push((key.to_owned(), mail.clone()));
        match calls.len() <= self.away {
            true => Err(ProviderError::Away("503 busy".into())),
            false => Ok(()),
        }
    }
}

async fn run(bus: &TestBus, data: &TestData, outbox: &Outbox) -> Consumer {
    let database = open(data.databases()).await.unwrap();
    let mailer = Arc::new(outbox.clone());
    serve(bus, &database, consumer(bus, database.clone(), mailer)).await
}

on_each_store!(
    each_outcome_is_one_mail,
    an_event_delivered_twice_is_mailed_once,
    a_mailer_that_is_away_is_asked_again_with_the_same_key,
);

async fn each_outcome_is_one_mail(data: TestData) {
    let (bus, outbox) = (test_bus(), Outbox::default());
    let _notification = run(&bus, &data, &outbox).await;
    bus.publish(packed(1)).await.unwrap();
    bus.publish(cancelled(2, CancelReason::OutOfStock))
        .await
        .unwrap();
    bus.settled().await;
    let sent = bus.published::<NotificationSent>().await;
    let mut notices: Vec<Notice> = sent.iter().map(|sent| sent.notice).collect();
    notices.sort_by_key(|notice| *notice == Notice::Cancelled);
    assert_eq!(notices, [Notice::Shipped, Notice::Cancelled]);
    assert!(
        outbox
            .calls()
            .iter()
            .all(|(_, mail)| mail.to == customer().email)
    );
    let texts: String = outbox
        .calls()
        .into_iter()
        .map(|(_, mail)| mail.text)
        .collect();
    assert!(
        texts.contains("PX000000001") && texts.contains("out of stock"),
        "{texts}"
    );
}

async fn an_event_delivered_twice_is_mailed_once(data: TestData) {
    let (bus, outbox) = (test_bus(), Outbox::default());
    let _notification = run(&bus, &data, &outbox).await;
    publish_twice(&bus, packed(1)).await;
    assert_eq!(outbox.calls().len(), 1);
    assert_eq!(bus.published::<NotificationSent>().await.len(), 1);
}

async fn a_mailer_that_is_away_is_asked_again_with_the_same_key(data: TestData) {
    let outbox = Outbox {
        away: 2,
        ..Outbox::default()
    };
    let bus = test_bus();
    let _notification = run(&bus, &data, &outbox).await;
    bus.publish(packed(1)).await.unwrap();
    bus.run_out().await;
    assert_eq!(bus.published::<NotificationSent>().await.len(), 1);
    let calls = outbox.calls();
    assert_eq!(calls.len(), 3);
    assert!(calls.iter().all(|(key, _)| *key == calls[0].0));
}
