//! All services on one bus: what travels along a flow, from the first event to the last.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use eventbus::Envelope;
use eventbus::prelude::{Origin, Outgoing, Start, Topic, Until};
use eventbus_testkit::TestBus;

use super::inventory::{self, Warehouse};
use super::sample::{TestData, created, line, on_each_store, serve, test_bus};
use super::{notification, order, payment, shipping};
use crate::client::ProviderError;
use crate::client::mailer::{Mail, Mailer};
use crate::client::psp::{Charge, ChargeOutcome, PaymentProvider};
use crate::events::{OrderCancelled, OrderCreated, OrderShipped, topics};

struct Providers {
    declines: bool,
}

#[async_trait]
impl PaymentProvider for Providers {
    async fn charge(&self, _charge: &Charge, key: &str) -> Result<ChargeOutcome, ProviderError> {
        Ok(match self.declines {
            true => ChargeOutcome::Declined {
                reason: "insufficient funds".to_owned(),
            },
            false => ChargeOutcome::Charged {
                charge_id: key.to_owned(),
            },
        })
    }
}

#[async_trait]
impl Mailer for Providers {
    async fn send(&self, _mail: &Mail, _key: &str) -> Result<(), ProviderError> {
        Ok(())
    }
}

/// Sends `order` through all services, and gives every event there was.
async fn run_through(
    bus: &TestBus,
    data: &TestData,
    order: Outgoing<OrderCreated>,
    declines: bool,
) -> Vec<Envelope> {
    let databases = data.databases();
    let orders = order::open(databases).await.unwrap();
    let warehouse = Warehouse::open(databases).await.unwrap();
    let stock = BTreeMap::from([("teapot".to_owned(), 3)]);
    warehouse.deliver(bus, &stock).await.unwrap();
    let payments = payment::open(databases).await.unwrap();
    let labels = shipping::open(databases).await.unwrap();
    let mails = notification::open(databases).await.unwrap();
    let providers = Arc::new(Providers { declines });
    let (psp, mailer) = (Arc::clone(&providers), providers);
    let _consumers = (
        serve(bus, &orders, order::consumer(bus, orders.clone())).await,
        serve(
            bus,
            warehouse.database(),
            inventory::consumer(bus, &warehouse),
        )
        .await,
        serve(
            bus,
            &payments,
            payment::consumer(bus, payments.clone(), psp),
        )
        .await,
        serve(bus, &labels, shipping::consumer(bus, labels.clone())).await,
        serve(
            bus,
            &mails,
            notification::consumer(bus, mails.clone(), mailer),
        )
        .await,
    );
    bus.publish(order).await.unwrap();
    bus.settled().await;
    let topics: Vec<Topic> = topics().into_iter().map(|topic| topic.name).collect();
    let reader = bus.read(&topics, Start::Earliest, Some(Until::Now)).await;
    let mut reader = reader.unwrap();
    let mut envelopes = Vec::new();
    while let Some(record) = reader.next().await.unwrap() {
        envelopes.push(bus.envelope(&record.message).unwrap());
    }
    envelopes
}

on_each_store!(
    every_event_of_a_flow_knows_its_cause_its_flow_and_its_user,
    a_declined_card_cancels_the_order_and_gives_the_stock_back,
    an_order_that_falls_short_is_cancelled_before_anybody_pays,
);

async fn every_event_of_a_flow_knows_its_cause_its_flow_and_its_user(data: TestData) {
    let bus = test_bus();
    let origin = Origin::new().with_correlation_id("req-9");
    let origin = origin.with_metadata("userId", "u-17");
    let order = Outgoing::new(created(1, vec![line("teapot", 1)])).with_origin(origin);
    let events = run_through(&bus, &data, order, false).await;
    let by_id: HashMap<String, &Envelope> = events
        .iter()
        .map(|envelope| (envelope.id.to_string(), envelope))
        .collect();
    let mut last = events
        .iter()
        .find(|envelope| envelope.event_type == "OrderShipped");
    let mut chain = Vec::new();
    while let Some(envelope) = last {
        assert_eq!(envelope.correlation_id, "req-9");
        assert_eq!(envelope.metadata["userId"], "u-17");
        chain.push(envelope.event_type.as_str());
        let cause = envelope.causation_id.as_ref();
        last = cause.map(|cause| by_id[cause]);
    }
    chain.reverse();
    let flow = [
        "OrderCreated",
        "InventoryReserved",
        "PaymentProcessed",
        "ShippingCreated",
        "NotificationSent",
        "OrderShipped",
    ];
    assert_eq!(chain, flow);
    assert_eq!(events.len(), flow.len());
    assert!(bus.dead_letters().await.is_empty());
}

async fn a_declined_card_cancels_the_order_and_gives_the_stock_back(data: TestData) {
    let bus = test_bus();
    let order = Outgoing::new(created(1, vec![line("teapot", 3)]));
    let events = run_through(&bus, &data, order, true).await;
    let mut types: Vec<&str> = events
        .iter()
        .map(|envelope| envelope.event_type.as_str())
        .collect();
    types.sort_unstable();
    let wanted = [
        "InventoryReleased",
        "InventoryReserved",
        "NotificationSent",
        "OrderCancelled",
        "OrderCreated",
        "PaymentFailed",
    ];
    assert_eq!(types, wanted);
    assert!(bus.published::<OrderShipped>().await.is_empty());
    assert!(bus.dead_letters().await.is_empty());
}

async fn an_order_that_falls_short_is_cancelled_before_anybody_pays(data: TestData) {
    let bus = test_bus();
    let order = Outgoing::new(created(1, vec![line("teapot", 4)]));
    let events = run_through(&bus, &data, order, false).await;
    assert_eq!(events.len(), 4);
    assert_eq!(bus.published::<OrderCancelled>().await.len(), 1);
}
