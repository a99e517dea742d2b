//! The rules of the shipping service.

use std::collections::HashSet;

use eventbus_testkit::TestBus;

use super::{Labels, consumer};
use crate::events::ShippingCreated;
use crate::service::sample::{TestData, paid, publish_twice};

#[tokio::test]
async fn every_paid_order_gets_a_label_of_its_own() {
    let (bus, data) = (TestBus::new(), TestData::new());
    let labels = Labels::open(data.path()).await.unwrap();
    let _shipping = bus.spawn(consumer(&bus, labels)).await;
    for number in 0..20 {
        bus.publish(paid(number)).await.unwrap();
    }
    bus.settled().await;
    let parcels = bus.published::<ShippingCreated>().await;
    let labels: HashSet<String> = parcels.into_iter().map(|parcel| parcel.tracking).collect();
    assert_eq!(labels.len(), 20);
}

#[tokio::test]
async fn a_payment_delivered_twice_gets_the_same_label_again() {
    let (bus, data) = (TestBus::new(), TestData::new());
    let labels = Labels::open(data.path()).await.unwrap();
    let _shipping = bus.spawn(consumer(&bus, labels)).await;
    publish_twice(&bus, paid(1)).await;
    let parcels = bus.published::<ShippingCreated>().await;
    assert_eq!(parcels.len(), 2);
    assert_eq!(parcels[0], parcels[1]);
}
