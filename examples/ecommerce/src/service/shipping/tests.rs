//! The rules of the shipping service.

use std::collections::HashSet;

use super::{consumer, open};
use crate::events::ShippingCreated;
use crate::service::sample::{TestData, on_each_store, paid, publish_twice, serve, test_bus};

on_each_store!(
    every_paid_order_gets_a_label_of_its_own,
    a_payment_delivered_twice_gets_one_label,
);

async fn every_paid_order_gets_a_label_of_its_own(data: TestData) {
    let bus = test_bus();
    let database = open(data.databases()).await.unwrap();
    let _shipping = serve(&bus, &database, consumer(&bus, database.clone())).await;
    for number in 0..20 {
        bus.publish(paid(number)).await.unwrap();
    }
    bus.settled().await;
    let parcels = bus.published::<ShippingCreated>().await;
    let labels: HashSet<String> = parcels.into_iter().map(|parcel| parcel.tracking).collect();
    assert_eq!(labels.len(), 20);
}

async fn a_payment_delivered_twice_gets_one_label(data: TestData) {
    let bus = test_bus();
    let database = open(data.databases()).await.unwrap();
    let _shipping = serve(&bus, &database, consumer(&bus, database.clone())).await;
    publish_twice(&bus, paid(1)).await;
    assert_eq!(bus.published::<ShippingCreated>().await.len(), 1);
}
